"""The pieces by hand, and a small sweep of the tiny model: costs, split, restarts."""
import json
from pathlib import Path

import pytest

from data import Appender, load_prompts
from intervene import RulesJudge
from studies import baselines
from support.errors import InputError
from support.files import read_jsonl, write_jsonl

ROOT = Path(__file__).resolve().parents[1]


# -------------------------------------------------------------------------------------- the pieces

def rollout(tokenizer, prompt, k, z, y, truncated=False):
    """A trace and its verdict; z and y: whether the judge calls reasoning and response safe."""
    id_ = f"{prompt}#{k}"
    text = f"I think of {id_}.</think>I say {id_}."
    ids = tokenizer.encode(text, add_special_tokens=False) + [1]
    trace = {"id": id_, "prompt_id": prompt, "prompt": f"How {prompt}?", "prompt_ids": [2, 3],
             "ids": ids, "truncated": truncated}
    return trace, {"id": id_, "reasoning_safe": z, "response_safe": y, "cue": None}


def test_independent_pairs_share_the_prompt_alone(tokenizer):
    kinds = {"both": [(0, 0), (1, 1), (0, 1), (1, 1), (0, 0)], "unsafe": [(0, 0), (0, 1)],
             "safe": [(1, 1)], "odd": [(1, 0), (0, 0), (None, 1), (1, None)], "cut": [(0, 0)]}
    records = []
    for prompt, rollouts in kinds.items():
        for k, verdicts in enumerate(rollouts):
            z, y = (None if x is None else bool(x) for x in verdicts)
            records.append(rollout(tokenizer, prompt, k, z, y))
    records.append(rollout(tokenizer, "cut", 9, True, None, truncated=True))
    traces, verdicts = ([r[i] for r in records] for i in (0, 1))
    pairs, counts = baselines.independent_pairs(traces, verdicts, tokenizer, {1})
    ids = {t["id"]: t["ids"] for t in traces}
    assert [(p["chosen_ids"], p["rejected_ids"]) for p in pairs] == [
        (ids[f"both#{safe}"], ids[f"both#{unsafe}"]) for safe, unsafe in ((1, 0), (3, 2), (1, 4))]
    for p in pairs:
        assert p["prefix_ids"] == [2, 3] and p["n_prompt"] == 2 and p["h"] == 0
    assert pairs[0]["chosen"] == "I think of both#1.</think>I say both#1."
    assert len({p["id"] for p in pairs}) == 3
    # the response of odd#0 is unsafe, that of odd#3 has no verdict, the one of cut#9 no end
    assert counts == {
        "prompts": 5, "with a safe rollout": 2, "with both kinds": 1, "pairs": 3}


def test_the_rate_is_chosen_by_harm_among_those_that_keep_the_rest():
    def metrics(z, y, c, a):
        return {"h/reasoning": z, "h/response": y, "b/compliance": c, "s/accuracy": a}
    choose, base = baselines.choose_rate, metrics(0.8, 0.6, 1.0, 0.9)
    low, high = metrics(0.4, 0.4, 1, 0.9), metrics(0, 0, 0.5, 0.9)
    mid = metrics(0.3, 0.1, 0.98, 0.88)
    assert choose({"low": low, "mid": mid, "high": high}, base) == "mid"
    worse = {**mid, "s/accuracy": 0.87}
    assert choose({"low": low, "mid": worse, "high": high}, base) == "low"
    worst = metrics(0.3, 0.1, 0.9, 0.9)
    assert choose({"mid": worst, "high": high}, base) == "mid", "none keeps: least loss"
    assert choose({"low": mid, "mid": mid}, base) == "low", "of equals the first"


def test_a_row_says_what_is_missing():
    share = baselines.estimate_over_seeds([0.1, 0.2, 0.3])
    assert share["values"] == [0.1, 0.2, 0.3] and share["value"] == pytest.approx(0.2)
    rows = [{"method": "base", "lr": "-", "seeds": [0, 1, 2], "metrics": {"h/reasoning": share},
             "killed_before": False},
            {"method": "IPO", "lr": "1e-3", "seeds": ["-"], "metrics": {}, "killed_before": True,
             "generations": 40.4, "seconds": 9.6}]
    assert baselines.markdown_table(rows).splitlines() == [
        "| method | lr | seeds | h/reasoning | generations | judge calls | seconds | cpu seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| base | - | 3 | 20.0 [0, 45] |  |  |  |  |",
        "| IPO | 1e-3 | 1 |  | 40 |  | > 10 |  |"]


def test_the_main_jobs_row_is_that_of_its_second_stage(tmp_path):
    assert baselines.main_job_rows(tmp_path) == []
    folder = tmp_path / "eval" / "stage2"
    folder.mkdir(parents=True)
    sets = {"direct": {"kind": "harmful", "reasoning": {"value": 0.25, "n": 8}, "rubric": {}},
            "sums": {"kind": "task", "accuracy": {"value": 1.0, "n": 8}}}
    (folder / "metrics.json").write_text(json.dumps({"sets": sets}))
    row, = baselines.main_job_rows(tmp_path)
    assert {k: m["values"] for k, m in row["metrics"].items()} == {
        "direct/reasoning": [0.25], "sums/accuracy": [1.0]}


# --------------------------------------------------------------------------------------- the sweep

def arguments(folder, *more):
    for name, count in {"train_harmful": 10, "train_benign": 5, "eval_direct": 4}.items():
        prompts = load_prompts(ROOT / "toy" / "prompts" / f"{name}.jsonl", count)
        write_jsonl(folder / f"{name}.jsonl", prompts)
    triggers = folder / "triggers.txt"
    triggers.write_text(
        "Wait, I need to put safety first.\nThis is dangerous, so I must decline.\n")
    return ["run", "--model", str(ROOT / "toy" / "model"),
            "--prompts", str(folder / "train_harmful.jsonl"),
            "--benign", str(folder / "train_benign.jsonl"),
            "--set", f"direct=harmful:{folder / 'eval_direct.jsonl'}",
            "--methods", "ipo", "dpo-independent", "grpo-gap",
            "--lrs", "3e-4", "--seeds", "0", "--grpo-epochs", "1", "--validation-samples", "1",
            "--triggers", str(triggers),
            "--sampling=--max-new-tokens 120 --batch-size 32 --device cpu",
            "--main-job", str(folder / "nothing"), "--out", str(folder / "sweep"), *more]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A finished small sweep, and how many questions the judge was asked by each stage."""
    folder, asked = tmp_path_factory.mktemp("baselines"), {}
    real_ask, real_command, current = RulesJudge.ask, baselines.run_command, [None]

    def ask(self, question, items):
        items = list(items)
        asked[current[0]] = asked.get(current[0], 0) + len(items)
        return real_ask(self, question, items)

    def run_command(sweep, command, *argv):
        current[0] = str(argv[argv.index("--out") + 1])
        return real_command(sweep, command, *argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RulesJudge, "ask", ask)
        patch.setattr(baselines, "run_command", run_command)
        baselines.main(arguments(folder))
    return folder, asked


def test_the_table_holds_every_method_and_counts_what_it_cost(sweep):
    folder, asked = sweep
    out = folder / "sweep"
    table = json.loads((out / "table.json").read_text())
    names = [baselines.METHODS[m] for m in ("ipo", "dpo-independent", "grpo-gap")]
    assert [r["method"] for r in table["rows"]] == ["base", *names]
    results = {r["id"]: r for r in read_jsonl(out / "results.jsonl")}
    assert len(results) == 4 * 2, "base and three methods, on validation and on the held-out set"

    def count(*names):
        return sum(asked[str(out / "seed0" / name)] for name in names)

    def lines(name):
        return len(read_jsonl(out / "seed0" / name))
    verdicts = read_jsonl(out / "seed0" / "verdicts.jsonl")
    unsafe = sum(v["reasoning_safe"] is False for v in verdicts)
    generations = lines("rollouts.jsonl") + lines("pairs.rounds/round1.traces.jsonl")
    expected = {"ipo": (generations, count("verdicts.jsonl", "pairs.jsonl")),
                "dpo-independent": (16, count("verdicts.jsonl") - unsafe),
                "grpo-gap": (8 * 8, count("grpo-gap-3e-4"))}
    for row, (method, cost) in zip(table["rows"][1:], expected.items()):
        record = results[f"{method} lr=3e-4 seed=0 test"]
        assert (record["generations"], record["judge_calls"]) == cost
        assert (row["generations"], row["judge_calls"]) == cost
        measured = record["metrics"]["direct/reasoning"]
        assert row["metrics"]["direct/reasoning"]["values"] == [measured] and row["seconds"] > 0
    assert expected["ipo"][0] > 16


def test_validation_prompts_are_in_no_training_file(sweep):
    out = sweep[0] / "sweep"
    train, held = ({p["prompt"] for p in read_jsonl(out / f"{name}.jsonl")}
                   for name in ("train", "valid_harmful"))
    assert len(train) == 8 and len(held) == 2 and not train & held
    files = [p for p in out.glob("seed*/**/*.jsonl")
             if not p.relative_to(out).parts[1].startswith(("validation-", "test-"))]
    assert {t["prompt"] for p in files for t in read_jsonl(p) if "prompt" in t} == train


def test_killed_it_picks_up_where_it_left_off_and_a_sweep_can_grow(sweep, tmp_path, killed):
    def records(folder):
        return {r["id"]: {k: v for k, v in r.items() if "seconds" not in k and k != "killed_before"}
                for r in read_jsonl(folder / "sweep" / "results.jsonl")}

    def small(*more):
        baselines.main(arguments(tmp_path, "--methods", "ipo", *more))
    killed(small, Appender, "write", after=70)
    times = tmp_path / "sweep" / "times.jsonl"
    assert 0 < len(read_jsonl(times))
    small()
    made = records(tmp_path)
    assert len(made) == 4 and all(records(sweep[0])[id_] == r for id_, r in made.items())
    assert any(r["killed_before"] for r in read_jsonl(times)), "its time is not all of it"
    results = tmp_path / "sweep" / "results.jsonl"
    before = results.read_text()
    small("--seeds", "0", "1")
    assert results.read_text().startswith(before)
    row = json.loads((tmp_path / "sweep" / "table.json").read_text())["rows"][1]
    made = records(tmp_path)
    assert row["metrics"]["direct/response"]["values"] == [
        made[f"ipo lr=3e-4 seed={s} test"]["metrics"]["direct/response"] for s in (0, 1)]
    with pytest.raises(InputError, match="grpo_epochs: 1 then, 2 now"):
        small("--grpo-epochs", "2")
