"""Hashes of the source files that a stage runs: edited code makes other results."""
import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What no result depends on, so that an edit of it refuses none. All other files count.
CANNOT_DECIDE = {
    "support/batch_size.py": "what it comes to is recorded",
    "support/cache.py": "gives back the replies that were put in",
    "support/chat.py": "no stage talks",
    "support/code_hash.py": "only compares",
    "support/errors.py": "the wording of refusals",
    "support/flags.py": "the values of flags are recorded",
    "support/http.py": "asks again, counts and pays; question and reading of a reply are elsewhere",
    "support/lock.py": "who may write",
    "support/model_card.py": "describes what was made",
    "support/progress.py": "shows how far the work is",
    "support/ranks.py": "which process does what",
    "support/record.py": "only compares",
    "support/report.py": "shows what there is",
    "support/run_folder.py": "reads what there is, for the report",
    "support/stages.py": "opens and closes them",
}


def code_hashes(program, root=ROOT):
    """{file: 16 hex digits} of a program's file and of all that it imports from the repository.

    Imports inside functions count too. Comments, docstrings and formatting don't.
    """
    root = Path(root).resolve()
    program = Path(program).resolve()
    todo = [program]
    hashes = {}
    while todo:
        path = todo.pop()
        inside = path.is_relative_to(root)
        name = path.relative_to(root).as_posix() if inside else path.name
        if name in hashes or name in CANNOT_DECIDE:
            continue
        hashes[name], imported = _read_source(path.read_text(encoding="utf-8"))
        for module in imported:
            todo += _files_of(module, root)
    return dict(sorted(hashes.items()))


@functools.lru_cache(maxsize=None)
def _read_source(text):
    """(hash of a source text, names of the modules that it may import)."""
    tree = ast.parse(text)
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from a import b`: b may be a name in a, or a module of its own.
            imported += [f"{node.module}.{alias.name}" for alias in node.names]
    essence = repr(_essence(tree))
    return hashlib.sha256(essence.encode()).hexdigest()[:16], tuple(imported)


def _essence(node):
    """What a syntax tree says, as nested lists, without docstrings.

    Empty fields are left out: which of them a tree has depends on Python's version.
    """
    if isinstance(node, list):
        return [_essence(child) for child in node]
    if not isinstance(node, ast.AST):
        return node
    said = [type(node).__name__]
    for field, value in ast.iter_fields(node):
        if field == "body" and _starts_with_docstring(node):
            value = value[1:]
        if value is not None and value != []:
            said += [field, _essence(value)]
    return said


def _starts_with_docstring(node):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None


def _files_of(module, root):
    """The files in the repository that importing a module runs: its own and its packages'."""
    files = []
    place = root
    for part in module.split("."):
        place = place / part
        for path in (place.with_name(f"{part}.py"), place / "__init__.py"):
            if path.is_file():
                files.append(path)
    return files
