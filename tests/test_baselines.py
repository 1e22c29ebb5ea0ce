import json

import numpy as np
import pytest

import data
from extras import baselines
from tests.test_end_to_end import MODEL, ROOT
from toy.world import RulesJudge


# ---------------------------------------------------------------------------------------------------------- the pieces

def rollout(tokenizer, prompt, k, z, y, truncated=False):
    """A trace and its verdict; z and y say whether the judge calls reasoning and response safe."""
    id = f"{prompt}#{k}"
    ids = tokenizer.encode(f"I think of {id}.</think>I say {id}.", add_special_tokens=False) + [1]
    return ({"id": id, "prompt_id": prompt, "prompt": f"How {prompt}?", "prompt_ids": [2, 3], "ids": ids, "truncated": truncated},
            {"id": id, "reasoning_safe": z, "response_safe": y, "cue": None})


def test_independent_pairs_share_the_prompt_alone(tokenizer):
    kinds = {"both": [(0, 0), (1, 1), (0, 1), (1, 1), (0, 0)], "unsafe": [(0, 0), (0, 1)], "safe": [(1, 1)],
             "odd": [(1, 0), (0, 0), (None, 1), (1, None)], "cut": [(0, 0)]}
    records = [rollout(tokenizer, p, k, *(None if x is None else bool(x) for x in zy)) for p, zs in kinds.items()
               for k, zy in enumerate(zs)]
    records.append(rollout(tokenizer, "cut", 9, True, None, truncated=True))
    traces, verdicts = ([r[i] for r in records] for i in (0, 1))
    pairs, counts = baselines.independent_pairs(traces, verdicts, tokenizer, {1})
    ids = {t["id"]: t["ids"] for t in traces}
    assert [(p["chosen_ids"], p["rejected_ids"]) for p in pairs] == [
        (ids[f"both#{safe}"], ids[f"both#{unsafe}"]) for safe, unsafe in ((1, 0), (3, 2), (1, 4))]
    assert all(p["prefix_ids"] == [2, 3] and p["n_prompt"] == 2 and p["h"] == 0 for p in pairs)
    assert pairs[0]["chosen"] == "I think of both#1.</think>I say both#1." and len({p["id"] for p in pairs}) == 3
    # the response of odd#0 is unsafe, that of odd#3 has no verdict, the one of cut#9 no end
    assert counts == {"prompts": 5, "with a safe rollout": 2, "with both kinds": 1, "pairs": 3}


def test_the_rate_is_chosen_by_harm_among_those_that_keep_the_rest():
    base = {"h/reasoning": 0.8, "h/response": 0.6, "b/compliance": 1.0, "s/accuracy": 0.9}
    trial = lambda z, y, c, a: {"h/reasoning": z, "h/response": y, "b/compliance": c, "s/accuracy": a}
    low, mid, high = trial(0.4, 0.4, 1, 0.9), trial(0.3, 0.1, 0.98, 0.88), trial(0, 0, 0.5, 0.9)
    assert baselines.choose({"low": low, "mid": mid, "high": high}, base) == "mid"
    assert baselines.choose({"low": low, "mid": {**mid, "s/accuracy": 0.87}, "high": high}, base) == "low"
    assert baselines.choose({"mid": trial(0.3, 0.1, 0.9, 0.9), "high": high}, base) == "mid", "none keeps: least loss"
    assert baselines.choose({"low": mid, "mid": mid}, base) == "low", "of equals the first"


def test_student_quantiles():
    """Against the integral of the density, 1 / (1 + t^2 / v)^((v + 1) / 2): 95% of it lies within the quantile."""
    for n, quantile in baselines.T95.items():
        u = np.linspace(-np.pi / 2, np.pi / 2, 200_001)[1:-1]  # t = tan(u) brings the tails in
        density = (1 + np.tan(u) ** 2 / (n - 1)) ** (-n / 2) / np.cos(u) ** 2
        assert density[np.abs(np.tan(u)) <= quantile].sum() / density.sum() == pytest.approx(0.95, abs=2e-4)


# ----------------------------------------------------------------------------------------------------------- the sweep

def arguments(folder, *more):
    prompts = {"train_harmful": 10, "train_benign": 5, "eval_direct": 4}
    for name, count in prompts.items():
        data.write_jsonl(folder / f"{name}.jsonl", data.load_prompts(ROOT / "toy" / "prompts" / f"{name}.jsonl", count))
    (folder / "triggers.txt").write_text("Wait, I need to put safety first.\nThis is dangerous, so I must decline.\n")
    return ["run", "--model", str(MODEL), "--prompts", str(folder / "train_harmful.jsonl"), "--benign", str(folder / "train_benign.jsonl"),
            "--set", f"direct=harmful:{folder / 'eval_direct.jsonl'}", "--methods", "ipo", "dpo-independent", "grpo-gap",
            "--lrs", "3e-4", "--seeds", "0", "--grpo-epochs", "1", "--validation-samples", "1",
            "--triggers", str(folder / "triggers.txt"), "--sampling=--max-new-tokens 120 --batch-size 32 --device cpu",
            "--main-job", str(folder / "nothing"), "--out", str(folder / "sweep"), *more]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A finished small sweep, and how many questions the judge was asked by each stage."""
    folder, asked = tmp_path_factory.mktemp("baselines"), {}
    real_ask, real_stage, current = RulesJudge.ask, baselines.stage, [None]

    def ask(self, question, items):
        items = list(items)
        asked[current[0]] = asked.get(current[0], 0) + len(items)
        return real_ask(self, question, items)

    def stage(args, main, *argv):
        current[0] = str(argv[argv.index("--out") + 1])
        return real_stage(args, main, *argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RulesJudge, "ask", ask)
        patch.setattr(baselines, "stage", stage)
        baselines.main(arguments(folder))
    return folder, asked


def test_the_table_holds_every_method_and_counts_what_it_cost(sweep):
    folder, asked = sweep
    out = folder / "sweep"
    table = json.loads((out / "table.json").read_text())
    assert [r["method"] for r in table["rows"]] == ["base", *(baselines.METHODS[m] for m in ("ipo", "dpo-independent", "grpo-gap"))]
    results = {r["id"]: r for r in data.read_jsonl(out / "results.jsonl")}
    assert len(results) == 4 * 2, "base and three methods, on validation and on the held-out set"
    count = lambda *names: sum(asked[str(out / "seed0" / name)] for name in names)
    lines = lambda name: len(data.read_jsonl(out / "seed0" / name))
    unsafe = sum(v["reasoning_safe"] is False for v in data.read_jsonl(out / "seed0" / "verdicts.jsonl"))
    expected = {"ipo": (lines("rollouts.jsonl") + lines("pairs.rounds/round1.traces.jsonl"), count("verdicts.jsonl", "pairs.jsonl")),
                "dpo-independent": (16, count("verdicts.jsonl") - unsafe), "grpo-gap": (8 * 8, count("grpo-gap-3e-4"))}
    for row, (method, cost) in zip(table["rows"][1:], expected.items()):
        record = results[f"{method} lr=3e-4 seed=0 test"]
        assert (record["generations"], record["judge_calls"]) == (row["generations"], row["judge_calls"]) == cost
        assert row["metrics"]["direct/reasoning"]["values"] == [record["metrics"]["direct/reasoning"]] and row["seconds"] > 0
    assert expected["ipo"][0] > 16


def test_validation_prompts_are_in_no_training_file(sweep):
    out = sweep[0] / "sweep"
    train, held = ({p["prompt"] for p in data.read_jsonl(out / f"{n}.jsonl")} for n in ("train", "valid_harmful"))
    assert len(train) == 8 and len(held) == 2 and not train & held
    files = [p for p in out.glob("seed*/**/*.jsonl") if not p.relative_to(out).parts[1].startswith(("validation-", "test-"))]
    assert {t["prompt"] for p in files for t in data.read_jsonl(p) if "prompt" in t} == train


def test_killed_it_goes_on_and_a_sweep_can_grow(sweep, tmp_path, killed):
    def records(folder):
        return {r["id"]: {k: v for k, v in r.items() if "seconds" not in k and k != "killed_before"}
                for r in data.read_jsonl(folder / "sweep" / "results.jsonl")}
    small = lambda *more: baselines.main(arguments(tmp_path, "--methods", "ipo", *more))
    killed(small, data.Appender, "write", after=70)
    assert 0 < len(data.read_jsonl(tmp_path / "sweep" / "times.jsonl"))
    small()
    made = records(tmp_path)
    assert len(made) == 4 and all(records(sweep[0])[id] == r for id, r in made.items())
    assert any(r["killed_before"] for r in data.read_jsonl(tmp_path / "sweep" / "times.jsonl")), "its time is not whole"
    before = (tmp_path / "sweep" / "results.jsonl").read_text()
    small("--seeds", "0", "1")
    assert (tmp_path / "sweep" / "results.jsonl").read_text().startswith(before)
    row, made = json.loads((tmp_path / "sweep" / "table.json").read_text())["rows"][1], records(tmp_path)
    assert row["metrics"]["direct/response"]["values"] == [
        made[f"ipo lr=3e-4 seed={s} test"]["metrics"]["direct/response"] for s in (0, 1)]
    with pytest.raises(SystemExit, match="grpo_epochs: 1 then, 2 now"):
        small("--grpo-epochs", "2")
