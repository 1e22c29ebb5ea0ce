"""The import rule: the five in order, support below, domains, studies, launch, ... above."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIVE = ["data", "model", "intervene", "ipo", "evaluate"]
ABOVE = ["domains", "studies", "benchmarks", "launch"]


def imported_names(path):
    """The first part of every name that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            yield node.module.split(".")[0]


def allowed(room):
    if room == "support":
        return ["support"]
    if room in FIVE:
        return ["support", *FIVE[:FIVE.index(room)]]
    # domains, studies, benchmarks, launch, toy: the five, and files of their own room. So nobody imports a
    # domain: make_judge and load_domain find it by its name.
    return ["support", room, *FIVE]


def test_studies_and_benchmarks_import_the_five_the_five_support_and_support_none_of_them():
    files = [ROOT / f"{name}.py" for name in FIVE]
    for room in ("support", "toy", *ABOVE):
        files += (ROOT / room).rglob("*.py")
    ours = {"support", "toy", *ABOVE, *FIVE}
    for path in files:
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        wrong = ours & set(imported_names(path)) - set(allowed(room))
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(wrong)}"


def test_no_two_files_import_each_other():
    graph = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in (*FIVE, "support", *ABOVE):
            graph[".".join(parts)] = set(_modules(path))

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        for other in graph.get(name, ()):
            visit(other, [*trail, name])
    for name in graph:
        visit(name, [])


def _modules(path):
    """Full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
