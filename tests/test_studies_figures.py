"""The figures' part of the report: what the summaries say, the paper beside it, and all text escaped."""
import argparse
import json
import sys
from types import SimpleNamespace

import pytest

import evaluate
import intervene
from studies import csr, curve, diversity, figures, kl, triggers, turning_points
from support.errors import InputError
from support.files import write_json


def estimate(value, low, high, n=30):
    return {"value": value, "low": low, "high": high, "n": n}


@pytest.fixture
def run(tmp_path):
    one, curve = estimate(1.0, 0.95, 1.0), [estimate(1.0, 1.0, 1.0), estimate(0.3, 0.2, 0.4)]
    aligned = {"offsets": [-1, 0, 1], "csr": [estimate(0.5, 0.4, 0.6), estimate(None, None, None, 0), one]}
    summaries = {
        "diversity": {"rollouts": 2, "counts": [3, 1, 0], "histogram": [estimate(0.4, 0.3, 0.5)] * 3},
        "turning_points": {"safe_with_turning_point": one, "full_windows": {"safe_with_turning_point": estimate(0.7, 0.6, 0.8)}, "pearson": estimate(0.8, 0.7, 0.9), "prompts": 30, "mixed_prompts": 53,
                           "by_chance": {"tokens": estimate(0.0, -0.3, 0.3), "shares": estimate(0.4, 0.2, 0.6)}, "aligned": {"safe": aligned, "unsafe": None},
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
        write_json(tmp_path / "dynamics" / f"{name}.summary.json", summary)
    return tmp_path


def test_each_figure_has_the_papers_value_and_ours_and_is_escaped(run):
    evals = {"b<": {"sets": {"h": {"kind": "harmful", "unsafe response | safe reasoning": estimate(0.01, 0, 0.02),
                                   "safe response | unsafe reasoning": estimate(0.3, 0.2, 0.4)}, "t": {"kind": "task"}}}}
    html = figures.dynamics_fragment(run, evals)
    for figure in ("Figures 2 and 3", "Figure 4", "Figure 5", "Figure 6", "Figure 7"):
        assert figure in html
    assert "30.0% [20.0, 40.0] and 1.0% [0.0, 2.0]; this contradicts the paper" in html
    evals["b<"]["sets"]["h"]["safe response | unsafe reasoning"]["high"] = 0.61
    assert "this contradicts the paper, whose" not in figures.dynamics_fragment(run, evals)
    assert "Here 0.400 [0.300, 0.500] n=30; the paper&#x27;s 0.36 lies within our interval." in html
    assert "Here 1.000 [0.950, 1.000] n=30; that agrees with the paper&#x27;s more than 0.9." in html
    assert "where the end cuts no window short: 0.700 [0.600, 0.800] n=30." in html
    assert "Here 0.300 [0.200, 0.400] n=30; this contradicts the paper&#x27;s 0.6, which lies outside our interval." in html
    assert "<script>" not in html and "&lt;script&gt;" in html and "a &amp; b: 1.00 nats at token 1" in html
    assert html.count("<img") == 7 and "not defined" in html
    assert "Of independent positions R would be 0.000 [-0.300, 0.300] n=30, and 0.400 [0.200, 0.600] n=30" in html
    assert "Only 30 of 53 prompts with safe and unsafe rollouts were measured" in html


def test_every_flag_of_sampler_and_judge_reaches_the_studies_that_sample(tmp_path):
    words = ["--model", "M", "--run", str(tmp_path)]
    others = {"server": "http://x/v1", "device": "cpu", "dtype": "float32", "judge": "http://y/v1", "judge_model": "J",
              "judge_kind": "qwen3guard", "guard_controversial": "safe", "cue_judge": "http://z/v1", "cue_judge_model": "Z",
              "judge_cache": "c", "judge_no_thinking": True, "no_graph": True}
    parser = argparse.ArgumentParser()
    intervene.add_sampler_flags(parser)
    intervene.add_judge_flags(parser)
    given = vars(parser.parse_args(words[:2]))
    for name, default in given.items():
        if name != "model":
            given[name] = others.get(name, 0.5 if isinstance(default, float) else 7)
    more = vars(figures.build_parser().parse_args(words)) | given
    commands = dict(figures.study_commands(tmp_path, more, {}))
    for module in (csr, triggers, curve):
        read = vars(module.build_parser().parse_args(commands[module]))
        assert {name: read[name] for name in given} == given


def test_more_than_is_contradicted_only_from_below():
    assert "agrees with" in figures.compare_with_paper_bound(estimate(1.0, 0.95, 1.0), 0.9)
    assert "contradicts" in figures.compare_with_paper_bound(estimate(0.8, 0.7, 0.85), 0.9)
    assert figures.compare_with_paper_bound(estimate(None, None, None, 0), 0.9).startswith("Here it is not defined")


def test_without_matplotlib_the_tables_are_left_and_it_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = figures.dynamics_fragment(run, {})
    assert "<img" not in html and "matplotlib is missing" in html and "&lt;script&gt;" in html


def test_nothing_is_shown_before_anything_is_measured(tmp_path):
    assert figures.dynamics_fragment(tmp_path, {}) == ""


def test_every_study_gets_the_runs_files_and_the_flags(tmp_path, monkeypatch):
    ran = []
    for study in (diversity, csr, turning_points, triggers, curve, kl):
        monkeypatch.setattr(study, "main", lambda argv, study=study: ran.append((study, argv)))
    (tmp_path / "eval" / "base").mkdir(parents=True)
    accuracy = evaluate.metric_estimate([1], ["a"])
    write_json(tmp_path / "eval" / "base" / "metrics.json", {"sets": {"t": {"kind": "task", "accuracy": accuracy}}})
    common = ["--run", str(tmp_path), "--model", "M"]
    figures.main([*common, "--temperature", "0.5", "--at", "step", "--kl", f"x={tmp_path}"])
    assert [study for study, _ in ran] == [diversity, csr, turning_points, triggers, curve, kl]
    words = ran[1][1]
    assert words[words.index("--temperature") + 1] == "0.5" and words[words.index("--at") + 1] == "step"
    for study, argv in ran:  # what was not given must not be passed on, and each study's parser must take the rest
        assert "None" not in argv and study.build_parser().parse_args(argv)
    assert json.dumps([argv for _, argv in ran]).count(str(tmp_path / "verdicts.jsonl")) == 6
    assert (tmp_path / "fragments" / "dynamics.html").exists() and (tmp_path / "report.html").exists()
    with pytest.raises(InputError, match="--kl y: write NAME=FOLDER"):
        figures.main([*common, "--kl", "y"])


def test_a_share_of_fewer_than_20_traces_is_told_but_not_drawn(run):
    rates = {"safe response | unsafe reasoning": estimate(1.0, 0.5, 1.0, n=4),
             "unsafe response | safe reasoning": estimate(0.0, 0.0, 0.1, n=20)}
    bars, notes = [], []
    axes = SimpleNamespace(
        barh=lambda place, width, *_, **__: bars.append(width), text=lambda x, y, text, **_: notes.append(text),
        plot=lambda *_, **__: None, set_yticks=lambda *_: None, invert_yaxis=lambda: None, set=lambda **_: None,
        legend=lambda **_: None)
    figures.draw_gap(axes, [("m, h", rates)])
    assert [width for width in bars if width != [0]] == [0.0] and notes == ["n = 4, too few to draw"]
    html = figures.dynamics_fragment(run, {"m": {"sets": {"h": {"kind": "harmful", **rates}}}})
    assert "too few traces (n=4) and 0.0% [0.0, 10.0]." in html and "contradicts the paper, whose" not in html
