"""The stages one after the other on the tiny model, small, and each of them killed and started again."""
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import data
import evaluate
import intervene
import ipo
from support.files import json_line, read_jsonl, write_json, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "toy" / "model"
SAMPLING = ["--max-new-tokens", "120", "--batch-size", "8", "--device", "cpu"]


def stages(run, prompts, benign):
    """The same stages as run.sh, as functions, with the file or folder that each of them makes."""
    f = lambda name: str(run / name)
    call = functools.partial
    model, judge = ["--model", str(MODEL)], ["--judge", "rules"]
    traces = ["--traces", f("rollouts.jsonl")]
    return {
        "rollouts": call(intervene.main, ["rollouts", *model, *SAMPLING, "--prompts", prompts, "--samples", "3",
                                          "--out", f("rollouts.jsonl")]),
        "steps": call(intervene.main, ["steps", *traces, "--out", f("steps.jsonl")]),
        "verdicts": call(intervene.main, ["judge", *judge, *traces, "--steps", f("steps.jsonl"), "--out", f("verdicts.jsonl")]),
        "pairs": call(intervene.main, ["pairs", *model, *SAMPLING, *judge, *traces, "--steps", f("steps.jsonl"),
                                       "--verdicts", f("verdicts.jsonl"), "--max-interventions", "2", "--out", f("pairs.jsonl")]),
        "stage1": call(ipo.main, ["train", *model, "--pairs", f("pairs.jsonl"), "--lr", "3e-4", "--batch-size", "8",
                                  "--save-every", "1", "--device", "cpu", "--out", f("stage1")]),
        "benign": call(intervene.main, ["rollouts", *model, *SAMPLING, "--prompts", benign, "--samples", "1",
                                        "--out", f("benign.jsonl")]),
        "benign_pairs": call(intervene.main, ["benign", *model, *SAMPLING, *judge, "--base", f("benign.jsonl"),
                                              "--traces", f("benign.jsonl"), "--out", f("benign_pairs.jsonl")]),
        "eval": call(evaluate.main, ["run", "--model", f("stage1"), *SAMPLING, *judge, "--out", f("eval"), "--set",
                                     f"harm=harmful:{prompts}", f"help=benign:{benign}"])}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name, count in (("train_harmful", 24), ("train_benign", 6)):
        write_jsonl(folder / f"{name}.jsonl", data.load_prompts(ROOT / "toy" / "prompts" / f"{name}.jsonl", count))
    return str(folder / "train_harmful.jsonl"), str(folder / "train_benign.jsonl")


@pytest.fixture(scope="module")
def undisturbed(prompts, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed")
    for stage in stages(run, *prompts).values():
        stage()
    return run


def contents(run):
    """All files of a run but those that hold paths, times and speeds."""
    files = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        if path.name == "metrics.jsonl":
            files[str(path.relative_to(run))] = [{k: v for k, v in r.items() if k != "tokens_per_s"}
                                                 for r in read_jsonl(path)]
        elif not path.name.endswith(".config.json"):
            files[str(path.relative_to(run))] = path.read_bytes()
    return files


def test_pairs_come_out_and_the_funnel_adds_up(undisturbed):
    funnel = json.loads((undisturbed / "pairs.funnel.json").read_text())
    c = funnel["counts"]
    assert c["prompts"] == 24 and c["rollouts"] == 72 >= c["complete"] >= c["unsafe"] >= c["cue found"] > 10
    assert c["safe continuations"] >= c["pairs"] == len(read_jsonl(undisturbed / "pairs.jsonl")) > 10
    assert sum(made for _, made in funnel["by_trigger"].values()) == c["pairs"]
    for pair in read_jsonl(undisturbed / "pairs.jsonl"):
        assert pair["chosen"].lstrip().startswith(pair["trigger"]) and pair["chosen_ids"] != pair["rejected_ids"]


def test_each_stage_killed_while_writing_gives_the_same_files(undisturbed, prompts, tmp_path, killed):
    """SIGKILL in the middle of a record in every stage that appends, and of a step in training."""
    def tear(appender, record):
        appender.file.write(json_line(record)[:20])
        appender.file.flush()
    todo = stages(tmp_path, *prompts)
    for name, after in (("rollouts", 5), ("rollouts", 30), ("verdicts", 7), ("pairs", 3), ("stage1", 2), ("benign", 2),
                        ("benign_pairs", 2), ("eval", 12)):
        for earlier in todo:
            if earlier == name:
                break
            todo[earlier]()
        if name == "stage1":
            killed(todo[name], ipo, "step_line", after)
        else:
            killed(todo[name], data.Appender, "write", after, half_done=tear)
    for stage in todo.values():
        stage()
    whole, again = contents(undisturbed), contents(tmp_path)
    assert whole.keys() == again.keys()
    for name in whole:
        assert whole[name] == again[name], name


def test_a_finished_run_does_nothing_again(undisturbed, prompts, capsys):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}
    for stage in stages(undisturbed, *prompts).values():
        stage()
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()} == before
    assert capsys.readouterr().out.count("finished before") == 8


def test_real_prompts_pass_through_every_stage(tmp_path):
    """Prompts of a length, alphabet and subject that the toy model has never seen, in STAR-1's format."""
    rows = [{"id": str(i), "question": q} for i, q in enumerate(
        ["Ünïcödé — naïve “quotes” 日本語 🙂 {braces} </think> <|end|>", "a\nb\r\nc\u2028d", "long " * 400, "Why?"])]
    write_json(tmp_path / "star.json", rows)
    benign = tmp_path / "benign.txt"
    benign.write_text("What is a leaf?\n")
    run = tmp_path / "run"
    for stage in stages(run, str(tmp_path / "star.json"), str(benign)).values():
        stage()
    funnel = json.loads((run / "rollouts.funnel.json").read_text())["counts"]
    assert funnel["prompts"] == 4 and funnel["short enough"] == 3, "the long prompt is dropped and counted, not cut"
    assert (run / "stage1" / "model.safetensors").exists() and (run / "eval" / "metrics.json").exists()


@pytest.mark.parametrize("command", [
    ["intervene.py", "--help"], ["evaluate.py", "--help"], ["evaluate.py", "report", "--help"],
    ["intervene.py", "steps", "--traces", "TRACES", "--out", "steps.jsonl"],
    ["intervene.py", "judge", "--judge", "rules", "--traces", "TRACES", "--steps", "STEPS", "--out", "verdicts.jsonl"]])
def test_stages_that_need_no_model_start_without_torch(undisturbed, tmp_path, command):
    files = {"TRACES": str(undisturbed / "rollouts.jsonl"), "STEPS": str(undisturbed / "steps.jsonl")}
    program, *arguments = [files.get(word, word) for word in command]
    script = f"""
import runpy, sys
sys.argv = ["{program}", *{arguments!r}]
sys.path.insert(0, {str(ROOT)!r})
try:
    runpy.run_path({str(ROOT / program)!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded: []\n")


def test_a_wrong_flag_or_file_ends_with_one_line_and_status_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "intervene.py", "steps", "--traces", "no.jsonl", "--out", "x.jsonl"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no.jsonl: no such file") and done.stderr.count("\n") == 1
