"""What a method is given: the decorator, the commands behind a method, costs, locks, own losses."""
import importlib
import os
import re
import sys
import time
from pathlib import Path

import pytest

import ipo
import studies.methods
from studies import lab, leaderboard
from studies.methods.dpo import independent_pairs
from support.errors import InputError, ServiceError
from support.files import read_json, read_jsonl, write_json, write_jsonl
from support.unanswered import Unanswered

ROOT = Path(__file__).resolve().parents[1]
NOTHING = {
    "generations": 0, "judge_calls": 0, "seconds": 0.0, "cpu_seconds": 0.0, "killed_before": False,
}


def settings_in(out, **more):
    """Settings of a sweep in a folder."""
    settings = lab.Settings(
        model="toy/model",
        out=Path(out),
        prompts="h.jsonl",
        benign="b.jsonl",
        limit=5,
        samples=3,
        triggers="t.txt",
        instruction="i.txt",
        teacher="",
        sampling=["--max-new-tokens", "99", "--batch-size", "7"],
        served=[],
        judging=["--judge", "rules"],
        train_args=["--epochs", "2"],
        grpo_epochs=1,
    )
    return settings._replace(**more)


@pytest.fixture
def small(model_dir, tmp_path):
    """Settings that the random model can run at once."""
    prompts = tmp_path / "prompts.jsonl"
    write_jsonl(prompts, [{"id": "p", "prompt": "How?"}, {"id": "q", "prompt": "Why?"}])
    return settings_in(
        tmp_path / "out", model=str(model_dir), prompts=str(prompts), benign="", limit=0,
        sampling=["--max-new-tokens", "6", "--device", "cpu"], train_args=["--device", "cpu"],
    )


# ------------------------------------------------------------------------------------ the methods

@pytest.fixture
def method_file(tmp_path, monkeypatch):
    """A function that writes a file of methods beside those of studies/methods/."""
    folder = tmp_path / "methods"
    folder.mkdir()
    places = [*studies.methods.__path__, str(folder)]
    monkeypatch.setattr(studies.methods, "__path__", places)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    lab.load_methods()
    before = dict(lab.METHODS)

    def write(name, text):
        (folder / f"{name}.py").write_text(f"from studies.lab import method\n\n{text}")

    yield write
    lab.METHODS.clear()
    lab.METHODS.update(before)
    for path in folder.glob("*.py"):
        sys.modules.pop(f"studies.methods.{path.stem}", None)


def test_a_method_is_named_after_its_function_and_its_file_is_found(method_file):
    method_file("first", '@method("First", "arXiv 1", "42%", needs_benign=True)\n'
                         "def my_own_way(lab):\n    return lab.model\n")
    method_file("second", '@method("Second", trains=False, needs_teacher=True)\n'
                          "def other(lab):\n    return lab.model\n")
    methods = lab.load_methods()
    assert list(methods)[-2:] == ["my-own-way", "other"]
    first = methods["my-own-way"]
    second = methods["other"]
    assert (first.name, first.title) == ("my-own-way", "First")
    assert (first.paper, first.claims) == ("arXiv 1", "42%")
    assert (second.paper, second.claims) == ("", "")
    assert (first.trains, first.needs_benign, first.needs_teacher) == (True, True, False)
    assert (second.trains, second.needs_benign, second.needs_teacher) == (False, False, True)
    assert first.make(settings_in("S")) == "toy/model"
    assert (first.file.name, second.file.name) == ("first.py", "second.py")
    assert lab.load_methods() == methods, "a second call registers nothing twice"


def test_two_functions_of_one_name_are_refused(method_file):
    method_file("another", '@method("Mine")\ndef ipo_both(lab):\n    return lab.model\n')
    with pytest.raises(InputError) as caught:
        lab.load_methods()
    assert str(caught.value) == (
        "studies.methods.another: there is another method ipo-both; rename it.")


def test_a_file_that_cannot_be_imported_is_named(method_file):
    method_file("broken", "def other(lab)\n    return lab.model\n")
    with pytest.raises(InputError, match="studies/methods/broken.py cannot be imported: .*Mend it"):
        lab.load_methods()
    method_file("broken", '@method("Mine", needs_bening=True)\ndef mine(lab):\n    return None\n')
    with pytest.raises(InputError, match="broken.py cannot be imported: .*needs_bening"):
        lab.load_methods()


def test_an_error_in_a_method_is_one_line_and_its_traceback_is_in_the_log(tmp_path, capsys):
    def broken(lab):
        return {}["no such"]

    method = lab.load_methods()["sft"]._replace(make=broken)
    trial = lab.Lab(settings_in(tmp_path), "sft", "1e-4", 0)
    with pytest.raises(InputError) as caught:
        leaderboard.make_model(method, trial)
    assert str(caught.value) == (
        f"sft: KeyError: 'no such'. {tmp_path}/seed0/sft-1e-4/log.txt has the traceback.")
    assert "in broken" in capsys.readouterr().err


def test_every_file_of_methods_is_loaded():
    files = {method.file.stem for method in lab.load_methods().values()}
    with_methods = set()
    for path in (ROOT / "studies" / "methods").glob("*.py"):
        if "@method(" in path.read_text():
            with_methods.add(path.stem)
    assert files == with_methods


def test_a_comment_is_no_other_code(method_file):
    codes = []
    for text in ("return 1\n", '"""Text."""\n    return 1  # why\n', "return 2\n"):
        lab.METHODS.pop("mine", None)
        sys.modules.pop("studies.methods.own", None)
        method_file("own", f'@method("Mine")\ndef mine(lab):\n    {text}')
        mine = lab.load_methods()["mine"]
        codes.append(lab.code_of(mine, []))
    assert codes[0] == codes[1] != codes[2]
    assert lab.code_of(mine, ["studies.sft"]) != lab.code_of(mine, ["studies.grpo"]) != codes[2]
    assert lab.code_of(mine, ["studies.gone", "gone.too"]) == codes[2]


def test_the_code_of_a_method_is_what_this_process_has_imported(method_file):
    text = '@method("Mine")\ndef mine(lab):\n    return "first"\n'
    method_file("own", text)
    imported = lab.load_methods()["mine"]
    code = lab.code_of(imported, [])
    method_file("own", text.replace("first", "second"))  # edited while the sweep is under way
    assert imported.make(None) == "first"
    assert lab.code_of(lab.load_methods()["mine"], []) == code
    lab.METHODS.pop("mine")
    del sys.modules["studies.methods.own"]
    assert lab.code_of(lab.load_methods()["mine"], []) != code


def test_the_runner_can_read_the_flags_of_every_program_of_a_method():
    programs = {"intervene", "ipo", "evaluate"}
    for path in [Path(lab.__file__), *(ROOT / "studies" / "methods").glob("*.py")]:
        programs |= set(re.findall(r'"(studies\.[a-z_.]+)"', path.read_text()))
    assert len(programs) > 8
    for program in programs:
        assert importlib.import_module(program).build_parser(), program


def rollout(tokenizer, prompt, k, z, y, truncated=False):
    """A judged trace; z and y: whether the judge calls reasoning and response safe."""
    name = f"{prompt}#{k}"
    text = f"I think of {name}.</think>I say {name}."
    return {
        "id": name,
        "prompt_id": prompt,
        "prompt": f"How {prompt}?",
        "prompt_ids": [2, 3],
        "ids": tokenizer.encode(text, add_special_tokens=False) + [1],
        "truncated": truncated,
        "reasoning_safe": z,
        "response_safe": y,
        "cue": None,
    }


def test_independent_pairs_share_the_prompt_alone(tokenizer):
    good = (True, True)
    bad = (False, False)
    kinds = {
        "both": [bad, good, (False, True), good, bad],
        "unsafe": [bad, (False, True)],
        "safe": [good],
        # the response of odd#0 is unsafe, that of odd#3 has no verdict
        "odd": [(True, False), bad, (None, True), (True, None)],
        "cut": [bad],
    }
    traces = []
    for prompt, rollouts in kinds.items():
        for k, (z, y) in enumerate(rollouts):
            traces.append(rollout(tokenizer, prompt, k, z, y))
    traces.append(rollout(tokenizer, "cut", 9, True, None, truncated=True))
    pairs = independent_pairs(traces, tokenizer, {1})
    ids = {trace["id"]: trace["ids"] for trace in traces}
    expected = [("both#1", "both#0"), ("both#3", "both#2"), ("both#1", "both#4")]
    assert len(pairs) == len({pair["id"] for pair in pairs}) == 3
    for pair, (safe, unsafe) in zip(pairs, expected):
        assert (pair["chosen_ids"], pair["rejected_ids"]) == (ids[safe], ids[unsafe])
        assert (pair["prefix_ids"], pair["n_prompt"], pair["h"]) == ([2, 3], 2, 0)
    assert pairs[0]["chosen"] == "I think of both#1.</think>I say both#1."


# --------------------------------------------------------------------------------- the commands

def test_paths_are_those_of_the_seed_and_of_the_model(tmp_path):
    trained = lab.Lab(settings_in(tmp_path), "ipo", "1e-4", 2)
    untrained = lab.Lab(settings_in(tmp_path), "safepath-zero-shot", "-", 2)
    assert trained.shared == untrained.shared == tmp_path / "seed2"
    assert trained.out == tmp_path / "seed2" / "ipo-1e-4"
    assert untrained.out == tmp_path / "seed2" / "safepath-zero-shot"
    assert trained.as_method("sft").out == tmp_path / "seed2" / "sft-1e-4"
    path = trained.write("more/records.jsonl", [{"id": "a"}])
    assert path == tmp_path / "seed2" / "more" / "records.jsonl"
    assert read_jsonl(path) == [{"id": "a"}]


def test_costs_of_all_commands_add_up_and_each_counts_once(monkeypatch):
    costs = {
        "a": {**NOTHING, "generations": 3, "seconds": 1.04, "cpu_seconds": 2.0},
        "b": {**NOTHING, "generations": 4, "judge_calls": 5, "seconds": 1.0},
        "c": {**NOTHING, "judge_calls": 6, "killed_before": True},
    }
    monkeypatch.setattr(lab, "run_once", lambda _, command: costs[command.out.name])
    mine = lab.Lab(settings_in("S"), "mine", "1e-4", 0)
    other = mine.as_method("other")
    mine.run("ipo", "--out", "a")
    other.run("ipo", "--out", "b")
    mine.run("ipo", "--out", "a")
    expected = {
        "generations": 7, "judge_calls": 5, "seconds": 2.0, "cpu_seconds": 2.0,
        "killed_before": False,
    }
    assert mine.cost() == other.cost() == expected
    alone = lab.Lab(settings_in("S"), "other", "1e-4", 0)
    assert alone.cost() == NOTHING
    alone.run("ipo", "--out", "c")
    assert alone.cost() == {**NOTHING, "judge_calls": 6, "killed_before": True}
    assert mine.cost() == expected


def test_a_stage_that_counts_its_own_cost_is_taken_at_its_word(tmp_path):
    command = lab.Command("studies.mine", ["--out", str(tmp_path / "x")])
    counts = {"kept": 1, "generations": 12, "judge calls": 34}
    write_json(tmp_path / "x.funnel.json", {"counts": counts})
    assert lab.count_cost(command) == {"generations": 12, "judge_calls": 34}


def test_benign_prompts_are_asked_for_by_name():
    mine = lab.Lab(settings_in("S", benign=""), "thinksafe", "1e-4", 0)
    with pytest.raises(InputError, match="thinksafe needs benign prompts"):
        mine.benign_rollouts()


def test_what_starts_on_all_gpus():
    settings = settings_in("S", launch=("torchrun", "--x"))
    served = ["--server", "http://here", "--out", "x"]
    starts = [
        ("ipo", ["train", "--out", "x"], ["torchrun", "--x", "ipo.py", "train"]),
        ("intervene", ["pairs", "--out", "x"], ["torchrun", "--x", "intervene.py", "pairs"]),
        ("intervene", ["pairs", *served], [sys.executable, "intervene.py", "pairs"]),
        ("studies.grpo", ["--out", "x"], [sys.executable, "-m", "studies.grpo"]),
    ]
    for program, words, expected in starts:
        started = lab.start_words(settings, lab.Command(program, words))
        assert started[:len(expected)] == expected


def test_errors_of_a_command_can_travel_to_another_process(monkeypatch):
    def fail(argv):
        raise Unanswered(1, 3, "status 503")

    monkeypatch.setattr(ipo, "main", fail)
    with pytest.raises(ServiceError, match="1 of 3 verdicts are missing") as caught:
        lab.run_command(settings_in("S"), lab.Command("ipo", ["train", "--out", "x"]))
    assert caught.type is ServiceError, "Unanswered itself cannot be pickled"
    refused = lab.Command("intervene", ["steps", "--nonsense", "--out", "x"])
    with pytest.raises(InputError, match="intervene refused its flags: steps --nonsense --out x"):
        lab.run_command(settings_in("S"), refused)


# ------------------------------------------------------------------------------- done, and in use

def test_rollouts_are_made_once_and_their_cost_is_kept(small, capsys):
    mine = lab.Lab(small, "mine", "1e-4", 0)
    path = mine.rollouts()
    assert path == small.out / "seed0" / "rollouts.jsonl"
    names = sorted(trace["id"] for trace in read_jsonl(path))
    assert names == ["p#0", "p#1", "p#2", "q#0", "q#1", "q#2"]
    cost = mine.cost()
    assert (cost["generations"], cost["killed_before"]) == (6, False)
    content = path.read_bytes()
    capsys.readouterr()
    again = lab.Lab(small, "other", "3e-4", 0)
    assert again.rollouts() == path
    assert "(finished before)" in capsys.readouterr().out
    assert path.read_bytes() == content
    assert again.cost() == cost, "not the time of finding it"
    written = read_json(path.with_name("rollouts.cost.json"))
    assert round(written["seconds"], 1) == cost["seconds"]


def test_killed_before_its_cost_was_written_a_stage_has_one(small, killed):
    mine = lab.Lab(small, "mine", "1e-4", 0)
    killed(mine.rollouts, lab, "count_cost", after=1)
    assert not (small.out / "seed0" / "rollouts.cost.json").exists()
    mine.rollouts()
    assert (mine.cost()["generations"], mine.cost()["killed_before"]) == (6, True)


def wait_for(path):
    """Wait for a file that another process makes."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


def fork_rollouts(settings, log_path):
    """A process that asks for the shared rollouts, what it prints going to a file; its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(log_path, "w") as sys.stdout:
            lab.Lab(settings, "mine", "1e-4", 0).rollouts()
        status = 0
    finally:
        os._exit(status)


def test_who_wants_what_another_process_makes_waits_and_finds_it(small, tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    go = tmp_path / "go"
    real = lab.run_command

    def run_slowly(settings, command):
        begun.touch()
        wait_for(go)
        real(settings, command)

    logs = [tmp_path / "log0", tmp_path / "log1"]
    monkeypatch.setattr(lab, "run_command", run_slowly)
    first = fork_rollouts(small, logs[0])
    wait_for(begun)
    begun.unlink()
    second = fork_rollouts(small, logs[1])
    time.sleep(0.3)
    second_waits = os.waitpid(second, os.WNOHANG) == (0, 0) and not begun.exists()
    go.touch()
    for pid in (first, second):
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert second_waits
    assert "(finished before)" not in logs[0].read_text()
    assert "(finished before)" in logs[1].read_text()
    assert len(read_jsonl(small.out / "seed0" / "rollouts.jsonl")) == 6


# ------------------------------------------------------------------------------ a loss of one's own

LOSS = """
import ipo

def losses(policy, pairs, device, beta, sft_weight, score_from):
    found, metrics = ipo.pair_losses(policy, pairs, device, beta, sft_weight, score_from)
    return found * 1, metrics
"""


def hand_written_pairs():
    """Eight pairs of a few tokens."""
    pairs = []
    for n in range(8):
        pairs.append({
            "id": f"p{n}",
            "n_prompt": 2,
            "prefix_ids": [10 + n, 20, 30],
            "chosen_ids": [40 + n, 50, 1],
            "rejected_ids": [60, 70 + n, 1],
        })
    return pairs


def test_a_loss_of_ones_own_trains_and_its_edits_are_noticed(small, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "loss_of_mine.py"
    file.write_text(LOSS)
    mine = lab.Lab(small, "mine", "1e-3", 0)
    pairs = mine.write("pairs.jsonl", hand_written_pairs())
    flags = ["--loss", "loss_of_mine:losses", "--score-from", "prompt"]
    usual = mine.train(pairs, "--score-from", "prompt", out=tmp_path / "usual")
    own = mine.train(pairs, *flags, out=tmp_path / "own")
    weights = (own / "model.safetensors").read_bytes()
    assert weights == (usual / "model.safetensors").read_bytes()
    assert weights != (Path(small.model) / "model.safetensors").read_bytes()

    file.write_text(LOSS.replace("found * 1", "found * 0.5"))
    with pytest.raises(InputError, match="own was made with other settings .*loss_of_mine.py"):
        mine.train(pairs, *flags, out=tmp_path / "own")
    del sys.modules["loss_of_mine"]
    halved = mine.train(pairs, *flags, out=tmp_path / "halved")
    first = read_jsonl(own / "metrics.jsonl")[0]["loss"]
    assert read_jsonl(halved / "metrics.jsonl")[0]["loss"] == pytest.approx(first / 2, abs=1e-6)


@pytest.mark.parametrize("spec, problem", [
    ("ipo:nothing", "--loss ipo:nothing: .*ipo.py has no `nothing`"),
    ("nowhere:losses", "--loss nowhere:losses: there is no module nowhere"),
    ("ipo.pair_losses", "--loss ipo.pair_losses: write MODULE:NAME"),
])
def test_a_loss_that_is_not_there_is_one_line(small, tmp_path, spec, problem):
    mine = lab.Lab(small, "mine", "1e-3", 0)
    pairs = mine.write("pairs.jsonl", hand_written_pairs())
    with pytest.raises(InputError, match=problem) as caught:
        mine.train(pairs, "--loss", spec)
    assert "\n" not in str(caught.value)
    assert not mine.out.exists(), "nothing was begun"
