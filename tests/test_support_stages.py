"""What a stage records and refuses: settings, inputs, code, and damage to what was made."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import intervene
import ipo
from support.code_hash import CANNOT_DECIDE, code_hashes
from support.errors import InputError
from support.files import read_json, read_jsonl, write_json, write_jsonl
from support.record import deciding_flags, fingerprint
from support.stages import check_output, close_stage, open_stage, run_stage

ROOT = Path(__file__).resolve().parents[1]
CODE = ["*.py", "support/*", "domains/*", "prompts/*", "toy/rules.json"]
PROGRAM = ROOT / "data.py"  # a small one


def test_a_stage_refuses_other_settings_and_other_inputs(tmp_path):
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="in.txt: no such file"):
        open_stage(PROGRAM, out, {"seed": 1}, [source])
    source.write_text("one\n")
    # Nothing was made with it, so it does not bind.
    assert open_stage(PROGRAM, out, {"seed": 0}, [source]) is None
    assert open_stage(PROGRAM, out, {"seed": 1, "save_every": 5}, [source]) is None
    out.write_text('{"id": "a"}\n')
    assert open_stage(PROGRAM, out, {"seed": 1, "save_every": 9}, [source]) is None
    with pytest.raises(InputError, match="seed: 1 then, 2 now"):
        open_stage(PROGRAM, out, {"seed": 2}, [source])
    source.write_text("two\n")
    with pytest.raises(InputError, match="in.txt"):
        open_stage(PROGRAM, out, {"seed": 1}, [source])
    source.write_text("one\n")
    close_stage(out, {"pairs": 3})
    assert open_stage(PROGRAM, out, {"seed": 1}, [source])["counts"] == {"pairs": 3}
    (tmp_path / "out.rounds").mkdir()
    out.unlink()  # the remedy that the message gives: made again, with nothing left of the old settings
    assert open_stage(PROGRAM, out, {"seed": 2}, [source]) is None
    assert not (tmp_path / "out.rounds").exists() and not (tmp_path / "out.funnel.json").exists()


def test_an_output_belongs_to_one_program_and_a_new_flag_is_a_change_of_code(tmp_path):
    out = tmp_path / "out.jsonl"
    open_stage(PROGRAM, out, {"command": "one", "seed": 0}, [])
    out.write_text('{"id": "a"}\n')
    with pytest.raises(InputError, match="data.py one then, data.py two now"):
        open_stage(PROGRAM, out, {"command": "two", "seed": 0}, [])
    config = read_json(tmp_path / "out.config.json")
    config["code"]["data.py"] = "of yesterday"
    write_json(tmp_path / "out.config.json", config)
    with pytest.raises(InputError, match="made with other code .data.py."):
        open_stage(PROGRAM, out, {"command": "one", "seed": 0, "new": 5}, [])
    flags = {"command": "one", "seed": 0, "new": 5, "accept_code_change": True}
    assert open_stage(PROGRAM, out, flags, []) is None
    assert read_json(tmp_path / "out.config.json")["flags"] == {"seed": 0, "new": 5}


def test_rounds_of_an_unfinished_output_are_not_thrown_away_for_other_settings(tmp_path):
    out, rounds = tmp_path / "pairs.jsonl", tmp_path / "pairs.rounds"
    open_stage(PROGRAM, out, {"seed": 1}, [])
    rounds.mkdir()
    with pytest.raises(InputError, match="pairs.rounds was made with other settings .seed: 1 then, 2 now"):
        open_stage(PROGRAM, out, {"seed": 2}, [])
    assert rounds.exists()


def test_passwords_in_urls_do_not_reach_the_config(tmp_path):
    flags = {"judge": "https://me:secret@host/v1", "judging": ["--judge", "https://me:secret@host/v1"]}
    open_stage(PROGRAM, tmp_path / "o.jsonl", flags, [])
    assert "secret" not in (tmp_path / "o.config.json").read_text()


def test_a_finished_stage_is_not_run_again(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    calls = []

    def work():
        calls.append(1)
        out.write_text("{}\n")
        return {"pairs": 3}, {"judge": {}}

    run_stage(PROGRAM, out, {"seed": 1}, [], work)
    run_stage(PROGRAM, out, {"seed": 1}, [], work)
    assert len(calls) == 1
    assert capsys.readouterr().out == "out: 3 pairs\nout: 3 pairs (finished before)\n"


# --------------------------------------------------------------------------------- what decides

def test_chat_template_and_tokenizer_files_are_part_of_a_model(tmp_path):
    names = ("chat_template.jinja", "tokenizer.model", "tokenizer.json", "merges.txt", "model.safetensors")
    for name in names:
        (tmp_path / name).write_text("one")
    prints = {fingerprint(tmp_path)}
    for name in names:
        (tmp_path / name).write_text("two")
        prints.add(fingerprint(tmp_path))
    assert len(prints) == len(names) + 1
    (tmp_path / "README.md").write_text("of no effect")
    (tmp_path / ".stage1.lock").write_text("of no effect")
    assert fingerprint(tmp_path) in prints


SERVED = {"server": "http://node1:8000/v1", "batch_size": 16, "device": "cuda", "dtype": "bfloat16", "seed": 0}


@pytest.mark.parametrize("flags, other", [
    (SERVED, {"server": "http://node2:9000/v1", "batch_size": 64, "device": "cpu", "dtype": "float32"}),
    ({"judge": "gpt:1234", "judge_concurrency": 8}, {"judge_concurrency": 2, "judge_cache": "x", "max_cost": 5}),
    ({"device": "cuda:0"}, {"device": "cuda:1"}),
    ({"device": "cpu"}, {"device": "auto"}),  # no GPU here
    ({"micro_tokens": 16384}, {"micro_tokens": 4096, "checkpoint_activations": True, "save_every": 1})])
def test_where_and_how_fast_a_stage_runs_refuses_nothing(flags, other, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert deciding_flags(flags) == deciding_flags({**flags, **other})


@pytest.mark.parametrize("flags, other", [
    (SERVED, {"server": None}), (SERVED, {"seed": 1}),
    ({"server": None, "batch_size": 16}, {"batch_size": 64}),  # another rounding is another token
    ({"device": "cpu"}, {"device": "cuda"}),
    ({"judge": "local:judge:1234", "judge_concurrency": 8}, {"judge_concurrency": 2})])
def test_what_decides_a_result_is_compared(flags, other):
    assert deciding_flags(flags) != deciding_flags({**flags, **other})


def test_a_file_is_the_same_by_whatever_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    write_json(Path("model/config.json"), {})
    Path("set.jsonl").write_text("{}\n")
    out = tmp_path / "out.jsonl"
    out_of = lambda model, data: ({"model": model, "set": [f"a=harmful:{data}"], "seed": 0}, [model, data])
    open_stage(PROGRAM, out, *out_of("model", "set.jsonl"))
    out.write_text('{"id": "a"}\n')
    assert open_stage(PROGRAM, out, *out_of(str(tmp_path / "model"), str(tmp_path / "set.jsonl"))) is None
    shutil.copytree("model", "elsewhere")
    assert open_stage(PROGRAM, out, *out_of("elsewhere", "set.jsonl")) is None
    write_json(Path("elsewhere/config.json"), {"layers": 2})
    with pytest.raises(InputError, match="elsewhere: '.*' then, '.*' now"):
        open_stage(PROGRAM, out, *out_of("elsewhere", "set.jsonl"))


# ------------------------------------------------------------------------------------- the code

def test_the_hashed_files_are_those_that_a_program_imports(tmp_path):
    (tmp_path / "room").mkdir()
    sources = {"program.py": "import json, first\n", "first.py": "def f():\n    from room import second\n",
               "room/__init__.py": "", "room/second.py": "import room.third\n", "unused.py": "",
               "room/third.py": "from first import f  # a circle\n"}
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    hashes = code_hashes(tmp_path / "program.py", tmp_path)
    assert list(hashes) == ["first.py", "program.py", "room/__init__.py", "room/second.py", "room/third.py"]
    program = tmp_path / "first.py"
    program.write_text('"""What it is."""\n\n# why\ndef f():\n    """What it does."""\n'
                       "    from room import (second,)\n")
    assert code_hashes(tmp_path / "program.py", tmp_path) == hashes
    program.write_text("def f():\n    from room import third\n")
    changed = code_hashes(tmp_path / "program.py", tmp_path)
    assert {name for name in hashes if changed.get(name) != hashes[name]} == {"first.py", "room/second.py"}


def test_every_file_that_is_left_out_exists_and_has_a_reason():
    for name, reason in CANNOT_DECIDE.items():
        assert (ROOT / name).is_file() and reason


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository whose code a test may edit, with the traces of a finished stage."""
    root = tmp_path / "copy"
    for pattern in CODE:
        for path in ROOT.glob(pattern):
            if path.is_file():
                target = root / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    traces = []
    for n in range(3):
        traces.append({"id": f"p{n}#0", "prompt_id": f"p{n}", "prompt": "How?", "reasoning": "One. Two. Three.",
                       "response": "So.", "truncated": False})
    write_jsonl(root / "run" / "traces.jsonl", traces)
    return root


def stage(root, name, *flags):
    """(exit status, stdout, stderr) of a stage that needs no model."""
    files = {"steps": ["--traces", "run/traces.jsonl", "--out", "run/steps.jsonl"],
             "judge": ["--traces", "run/traces.jsonl", "--steps", "run/steps.jsonl", "--out", "run/verdicts.jsonl"]}
    done = subprocess.run([sys.executable, "intervene.py", name, *files[name], *flags],
                          cwd=root, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_edited_code_is_refused_until_it_is_accepted(copy):
    assert stage(copy, "steps")[0] == 0
    made = (copy / "run/steps.jsonl").read_bytes()
    # Words and other programs change nothing.
    edit(copy / "intervene.py", "def segment(traces):\n", "# a word\n\ndef segment(traces):\n")
    edit(copy / "evaluate.py", "def always(metric, prompt):", "def ever(metric, prompt):")
    edit(copy / "support" / "report.py", "import ", "import ast\nimport ")
    assert "(finished before)" in stage(copy, "steps")[1]
    edit(copy / "intervene.py", 'split_steps(trace["reasoning"])', 'split_steps(trace["response"])')
    status, _, said = stage(copy, "steps")
    assert status == 2 and said.count("\n") == 1
    for words in ("run/steps.jsonl was made with other code (intervene.py)", "RUN=...", "--accept-code-change"):
        assert words in said
    # Partly written it is refused as well.
    funnel = (copy / "run/steps.funnel.json").rename(copy / "run/aside")
    assert stage(copy, "steps")[::2] == (2, said)
    funnel.rename(copy / "run/steps.funnel.json")
    assert "(finished before)" in stage(copy, "steps", "--accept-code-change")[1]
    assert (copy / "run/steps.jsonl").read_bytes() == made
    config = read_json(copy / "run/steps.config.json")
    (change,) = config["accepted code changes"]
    assert list(change) == ["intervene.py"] and config["code"]["intervene.py"] == change["intervene.py"][1]
    assert stage(copy, "steps")[0] == 0  # once is enough
    (copy / "run/steps.jsonl").unlink()  # made again it is the new code's, and there is nothing to accept
    assert "(finished before)" not in stage(copy, "steps")[1]
    assert (copy / "run/steps.jsonl").read_bytes() != made


# --------------------------------------------------------------------------------------- damage

def test_damage_is_reported_as_damage_to_the_file_that_has_it(copy):
    assert stage(copy, "steps")[0] == 0 and stage(copy, "judge")[0] == 0
    path = copy / "run/steps.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"Two", b"Tvo", 1))
    for name in ("steps", "judge"):
        status, _, said = stage(copy, name)
        assert status == 2 and said.count("\n") == 1, said
        assert "run/steps.jsonl has changed since `intervene.py steps` made it" in said
        assert "Delete run/steps.jsonl" in said and "verdicts" not in said
    path.unlink()  # what it says
    for name in ("steps", "judge"):
        assert stage(copy, name)[0] == 0
    assert path.read_bytes() == whole


def test_an_output_without_its_config_is_refused(copy):
    assert stage(copy, "steps")[0] == 0
    (copy / "run/steps.config.json").unlink()
    status, _, said = stage(copy, "steps")
    assert status == 2 and said.count("\n") == 1
    assert "steps.config.json is missing" in said and "delete run/steps.jsonl to make it again" in said
    (copy / "run/steps.jsonl").unlink()
    assert stage(copy, "steps")[0] == 0


def test_an_empty_folder_is_no_output(tmp_path):
    (tmp_path / "stage1").mkdir()
    assert open_stage(PROGRAM, tmp_path / "stage1", {}, []) is None


def test_evaluations_are_checked_and_deleted_metrics_are_made_again(tmp_path, model_dir, capsys):
    write_jsonl(tmp_path / "set.jsonl", [{"id": str(n), "prompt": f"Number {n}", "answer": "1"} for n in range(3)])
    folder = tmp_path / "base"
    argv = ["run", "--model", str(model_dir), "--max-new-tokens", "8", "--device", "cpu",
            "--set", f"sums=task:{tmp_path / 'set.jsonl'}", "--out", str(folder)]
    evaluate.main(argv)
    traces = (folder / "sums.traces.jsonl").read_bytes()
    metrics = (folder / "metrics.json").read_bytes()
    (folder / "metrics.json").unlink()
    evaluate.main(argv)
    assert (folder / "metrics.json").read_bytes() == metrics and (folder / "sums.traces.jsonl").read_bytes() == traces
    edit(folder / "metrics.json", '"n": 3', '"n": 9')
    report = ["report", "--run", str(tmp_path), "--evals", str(folder), "--out", str(tmp_path / "r.html")]
    for command in (argv, report):
        with pytest.raises(InputError, match="metrics.json has changed since `evaluate.py run` .*Delete .*base"):
            evaluate.main(command)
    (folder / "metrics.json").write_bytes(metrics)
    (folder / "sums.verdicts.jsonl").unlink()
    with pytest.raises(InputError, match="sums.verdicts.jsonl is missing.* Delete .*base"):
        evaluate.main(argv)


def test_damaged_weights_are_named_by_the_stage_that_reads_them(tmp_path):
    folder, out = tmp_path / "stage1", tmp_path / "after.jsonl"
    open_stage(PROGRAM, folder, {}, [])
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "metrics.jsonl"):
        (folder / name).write_bytes(bytes(range(256)))
    close_stage(folder, {})
    (folder / "metrics.jsonl").write_text("a log: no result\n")
    assert open_stage(PROGRAM, out, {}, [folder]) is None
    content = bytearray(range(256))
    content[100] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="model.safetensors has changed since `data.py` made it. Delete .*stage1"):
        open_stage(PROGRAM, out, {}, [folder])
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors is missing"):
        open_stage(PROGRAM, out, {}, [folder])
    assert check_output(folder) == ["stage1/model.safetensors"]  # which training makes again


def test_ids_that_come_twice_are_refused_by_stages(copy):
    path = copy / "run/traces.jsonl"
    write_jsonl(path, [*read_jsonl(path), read_jsonl(path)[0]])
    status, _, said = stage(copy, "steps")
    assert status == 2 and "run/traces.jsonl" in said and "p0#0" in said and said.count("\n") == 1


def test_the_flag_is_in_every_stage(capsys):
    stages = [(intervene, name) for name in intervene.STAGES]
    for program, command in [*stages, (ipo, "train"), (evaluate, "run")]:
        with pytest.raises(SystemExit):
            program.main([command, "--help"])
        assert "--accept-code-change" in capsys.readouterr().out
