"""The figures' part of the report: what the summaries say, the paper beside it, and all text escaped."""
import json
import sys

import pytest

import data
import evaluate
from extras import figures


def estimate(value, low, high, n=30):
    return {"value": value, "low": low, "high": high, "n": n}


@pytest.fixture
def run(tmp_path):
    one, curve = estimate(1.0, 0.95, 1.0), [estimate(1.0, 1.0, 1.0), estimate(0.3, 0.2, 0.4)]
    aligned = {"offsets": [-1, 0, 1], "csr": [estimate(0.5, 0.4, 0.6), estimate(None, None, None, 0), one]}
    summaries = {
        "diversity": {"rollouts": 2, "counts": [3, 1, 0], "histogram": [estimate(0.4, 0.3, 0.5)] * 3},
        "turning_points": {"safe_with_turning_point": one, "pearson": estimate(0.8, 0.7, 0.9), "aligned": {"safe": aligned, "unsafe": None},
                           "cue_and_turning_point": [[3, 4], [5, 5]], "sensitivity": [
                               {"mu": 0.9, "eta": 0.1, "window": 15, "continuations": 8, "safe_with_turning_point": one,
                                "unsafe_with_turning_point": None, "pearson": estimate(None, None, None, 0)}]},
        "curve": {"interventions": [0, 1], "overall": curve, "arms": [
            {"arm": arm, "text": text, "harmful": curve} for arm, text in (("trigger", "<i>no</i>"), ("neutral", "n"), ("removal", None))]},
        "mined": {"pools": {k: one for k in ("mined", "hand_written", "difference")},
                  "mined": [{"trigger": "<script>", "success": one}], "hand_written": []},
        "kl_a & b": {"by_offset": {"offsets": [0, 1], "kl": [one, one]}, "by_token": [estimate(0.1, 0, 1), one], "peak_token": 1,
                     "peak_offset": 0}}
    for name, summary in summaries.items():
        data.write_json(tmp_path / "dynamics" / f"{name}.summary.json", summary)
    return tmp_path


def test_each_figure_has_the_papers_value_and_ours_and_is_escaped(run):
    evals = {"b<": {"sets": {"h": {"kind": "harmful", "unsafe response | safe reasoning": {"mean": 0.01, "low": 0, "high": 0.02},
                                   "safe response | unsafe reasoning": {"mean": 0.3, "low": 0.2, "high": 0.4}}, "t": {"kind": "task"}}}}
    html = figures.page_part(run, evals)
    for figure in ("Figures 2 and 3", "Figure 4", "Figure 5", "Figure 6", "Figure 7"):
        assert figure in html
    assert "30.0% [20.0, 40.0] and 1.0% [0.0, 2.0]; this contradicts the paper" in html
    evals["b<"]["sets"]["h"]["safe response | unsafe reasoning"]["high"] = 0.61
    assert "this contradicts the paper, whose" not in figures.page_part(run, evals)
    assert "Here 0.400 [0.300, 0.500] n=30; the paper&#x27;s 0.36 lies within our interval." in html
    assert "Here 1.000 [0.950, 1.000] n=30; this contradicts the paper&#x27;s 0.9, which lies outside our interval." in html
    assert "Here 0.300 [0.200, 0.400] n=30; this contradicts the paper&#x27;s 0.6" in html
    assert "<script>" not in html and "&lt;script&gt;" in html and "a &amp; b: 1.00 nats at token 1" in html
    assert html.count("<img") == 5 and "not defined" in html


def test_without_matplotlib_the_tables_are_left_and_it_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = figures.page_part(run, {})
    assert "<img" not in html and "matplotlib is missing" in html and "&lt;script&gt;" in html


def test_nothing_is_shown_before_anything_is_measured(tmp_path):
    assert figures.page_part(tmp_path, {}) == ""


def test_every_stage_gets_the_runs_files_and_the_flags(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(figures.intervene, "main", lambda argv: asked.append(argv))
    (tmp_path / "eval" / "base").mkdir(parents=True)
    data.write_json(tmp_path / "eval" / "base" / "metrics.json", {"sets": {"t": {"kind": "task", "accuracy": evaluate.measure([1], ["a"])}}})
    evaluate.main(["figures", "--run", str(tmp_path), "--model", "M", "--temperature", "0.5", "--at", "step", "--kl", f"x={tmp_path}"])
    assert [argv[0] for argv in asked] == ["diversity", "csr", "turning-points", "mine-triggers", "curve", "kl"]
    csr = asked[1]
    assert csr[csr.index("--temperature") + 1] == "0.5" and csr[csr.index("--at") + 1] == "step"
    for argv in asked:  # what was not given must not be passed on, and each stage's parser must take the rest
        assert "None" not in argv and figures.intervene.build_parser().parse_args(argv)
    assert json.dumps(asked).count(str(tmp_path / "verdicts.jsonl")) == 6 and (tmp_path / "report.html").exists()
    with pytest.raises(SystemExit, match="--kl y: write NAME=FOLDER"):
        evaluate.main(["figures", "--run", str(tmp_path), "--model", "M", "--kl", "y"])
