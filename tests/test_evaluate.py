import json
import math
import random

import pytest

import data
import evaluate


def test_bootstrap_of_independent_samples_matches_the_normal_interval():
    rng = random.Random(0)
    values = [int(rng.random() < 0.3) for _ in range(400)]
    r = evaluate.bootstrap(values, range(400), draws=5000)
    p = sum(values) / 400
    half = 1.96 * math.sqrt(p * (1 - p) / 400)
    assert r["mean"] == p and r["n"] == 400
    assert r["low"] == pytest.approx(p - half, abs=0.006) and r["high"] == pytest.approx(p + half, abs=0.006)


def test_bootstrap_resamples_prompts_not_samples():
    values, prompts = [1] * 50 + [0] * 50, [0] * 50 + [1] * 50  # two prompts, each all or nothing
    r = evaluate.bootstrap(values, prompts)
    assert (r["low"], r["high"]) == (0.0, 1.0)


def test_missing_verdicts_are_counted_and_bounded_not_labelled():
    traces = [{"prompt_id": str(i)} for i in range(10)]
    r = evaluate.measure([True] * 4 + [False] * 4 + [None] * 2, traces)
    assert r["mean"] == 0.5 and r["n"] == 8 and r["n_unjudged"] == 2 and r["bounds"] == [0.4, 0.6]
    assert "2 unjudged (40.0 to 60.0)" in evaluate.cell(r)
    assert evaluate.cell(evaluate.measure([None], traces[:1])) == "no verdicts"


@pytest.mark.parametrize("text, answer, right", [
    (r"\boxed{85}.", "85", True), (r"first \boxed{84}, no: \boxed{85}", "85", True), (r"\boxed{85} then \boxed{84}", "85", False),
    (r"\boxed{ 025 }", "25", True), ("The answer is 85.", "85", False), (r"\boxed{85", "85", False),
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left(3,\frac{\pi}{2}\right)", True), ("", "1", False)])
def test_correct(text, answer, right):
    assert evaluate.correct(text, answer) is right


@pytest.mark.parametrize("spec", ["direct", "direct=harmful", "direct=harmfull:x.csv", "../x=harmful:x.csv", "=task:x"])
def test_bad_sets_say_what_to_write(spec):
    with pytest.raises(SystemExit, match="NAME=KIND:FILE"):
        evaluate.parse_sets([spec])


def test_the_report_escapes_everything_a_model_wrote(tmp_path):
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)>&amp; \"quoted\""
    folder = tmp_path / "eval" / "base"
    trace = {"id": "a#0", "prompt_id": "a", "prompt": evil, "opening": "", "reasoning": evil + ". Two. ", "closing": "</think>",
             "response": evil, "truncated": False}
    data.write_jsonl(folder / "direct.traces.jsonl", [trace])
    data.write_jsonl(folder / "direct.steps.jsonl", [{"id": "a#0", "steps": [evil + ".", " Two."]}])
    data.write_jsonl(folder / "direct.verdicts.jsonl", [{"id": "a#0", "reasoning_safe": False, "response_safe": None, "cue": 2}])
    data.write_json(folder / "metrics.json", {"sets": {"direct": {
        "kind": "harmful", **{m: evaluate.measure([True], [trace]) for m in ("reasoning", "response")}}}})
    data.write_jsonl(tmp_path / "pairs.jsonl", [{
        "id": "p" + evil, "prompt": evil, "prefix": evil + ".", "trigger": evil, "chosen": f" {evil} {evil}</think>{evil}",
        "rejected": f" {evil}. It goes on.</think>{evil}"}])
    data.write_json(tmp_path / "pairs.funnel.json", {"stage": "pairs", "counts": {evil: 1}, "by_trigger": {evil: [1, 1]}})
    evaluate.main(["report", "--run", str(tmp_path), "--evals", f"<b>base={folder}", "--out", str(tmp_path / "r.html")])
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;alert(&#x27;x&#x27;)" in page
    for kind in ("prefix", "cue", "trigger", "kept", "bad"):
        assert f'class="{kind}"' in page
    assert "http" not in page.replace("http://www.w3.org", ""), "the report must not load anything from elsewhere"


def test_report_of_a_folder_without_metrics(tmp_path):
    with pytest.raises(SystemExit, match="write NAME=FOLDER"):
        evaluate.main(["report", "--run", str(tmp_path), "--evals", "base", "--out", str(tmp_path / "r.html")])


def test_a_task_without_answers_is_refused_before_anything_is_sampled(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "7", "prompt": "1 + 1?"}) + "\n")
    with pytest.raises(SystemExit, match=r"t\.jsonl, id 7: a task needs a column `answer`"):
        evaluate.main(["run", "--model", str(tmp_path), "--out", str(tmp_path / "e"), "--set", f"t=task:{tmp_path}/t.jsonl"])
