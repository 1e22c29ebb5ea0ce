"""Tables of several runs: pairing, intervals of known coverage, the paper's layout and figures."""
import csv
import io
import json
import math
import random

import numpy as np
import pytest

from benchmarks import compare
from support.errors import InputError
from support.files import write_json, write_jsonl


def run_of(folder, name, kind, verdicts):
    """A finished run with one set, from {prompt: [verdict record]}."""
    records = [{"id": f"{p}#{k}", **v} for p, vs in verdicts.items() for k, v in enumerate(vs)]
    write_jsonl(folder / f"{name}.verdicts.jsonl", records)
    path = folder / "metrics.json"
    sets = json.loads(path.read_text())["sets"] if path.exists() else {}
    write_json(path, {"sets": {**sets, name: {"kind": kind}}})


def marks(*flags):
    return {str(i): [{"correct": bool(f)} for f in fs] for i, fs in enumerate(flags)}


def test_differences_are_paired_by_prompt(tmp_path):
    """Both runs vary much between prompts and little from each other: the paired interval is narrow, the runs' own are wide."""
    rng = random.Random(0)
    base = [[rng.random() < 0.5] for _ in range(200)]
    better = [[b or rng.random() < 0.1] for [b] in base]
    run_of(tmp_path / "base", "sums", "task", marks(*base))
    run_of(tmp_path / "better", "sums", "task", marks(*better))
    runs = {r: {"sums": compare.read_verdicts(tmp_path / r, "sums", "task")} for r in ("base", "better")}
    columns, rows, _ = compare.comparison(runs)
    (own,), (difference,) = rows[0][1][0], rows[2][1][0]
    gained = sum(b[0] != a[0] for a, b in zip(base, better)) / 200
    assert [title for title, _, _ in columns] == ["sums"] and rows[2][0] == "better − base"
    assert difference["value"] == pytest.approx(gained) and own["value"] == sum(b[0] for b in base) / 200
    half = 1.96 * math.sqrt(gained * (1 - gained) / 200)
    assert difference["low"] == pytest.approx(gained - half, abs=0.02) and difference["high"] == pytest.approx(gained + half, abs=0.02)
    assert difference["low"] > 0 and own["high"] - own["low"] > 1.5 * (difference["high"] - difference["low"])


def test_paired_intervals_hold_the_difference_in_95_percent_of_trials():
    rng, held, trials = np.random.default_rng(3), 0, 400
    for _ in range(trials):
        easy = rng.beta(1, 1, 60)
        a, b = ((rng.random(60) < easy * share).tolist() for share in (0.9, 0.6))  # the true difference is 0.5 * 0.3
        runs = [{"s": compare.SetVerdicts("task", {"accuracy": (side, list(range(60)))})} for side in (a, b)]
        r = compare.paired_difference(runs[1], runs[0], ["s"], "accuracy")
        held += r["low"] <= -0.15 <= r["high"]
    assert 0.92 <= held / trials <= 0.98


def test_only_common_prompts_and_valid_verdicts_are_compared(tmp_path):
    run_of(tmp_path / "a", "s", "task", marks([1], [0], [1], [1, 1]))
    run_of(tmp_path / "b", "s", "task", {**marks([0], [0]), "3": [{"correct": True}, {"correct": False}], "9": [{"correct": True}]})
    runs = {r: {"s": compare.read_verdicts(tmp_path / r, "s", "task")} for r in "ab"}
    _, rows, notes = compare.comparison(runs)
    assert rows[2][1][0][0]["value"] == pytest.approx((0 + 0 + 1) / 4 - (1 + 0 + 2) / 4)
    assert "s: 3 prompts are in both a (4) and b (4)." in notes
    assert compare.average_of_sets(runs["a"], ["t"], "accuracy") is None
    same = compare.paired_difference(runs["a"], runs["a"], ["s"], "accuracy")
    assert same["value"] == 0 and same["low"] < -0.02 and same["high"] > 0.02, "four equal prompts do not prove equality"


def test_the_papers_layout_and_figures(tmp_path, capsys):
    harm = lambda r, y: {"reasoning_safe": not r, "response_safe": None if y is None else not y, "cue": None}
    for run, hits in (("base", 3), ("ours", 1)):
        for name in ("jbb", "strongreject", "wildjailbreak"):
            graded = run == "ours" and name == "strongreject"
            run_of(tmp_path / run, name, "strongreject" if graded else "harmful", {str(i): [harm(i < hits, i < hits - 1)] for i in range(4)})
        run_of(tmp_path / run, "xstest", "xstest", {str(i): [{"label": ("safe", "unsafe")[i % 2], "class": "full"}] for i in range(4)})
        for name in ("aime24", "math500", "gpqa-diamond"):
            run_of(tmp_path / run, name, "math", marks([1, 0], [1, 1]))
        run_of(tmp_path / run, "humaneval", "code", marks([1] + [0] * 9, [0] * 10))
    write_jsonl(tmp_path / "ours" / "strongreject.rubric.jsonl", [{"id": f"{i}#0", "strongreject": "043"} for i in range(4)])
    out = [str(tmp_path / "t.md"), str(tmp_path / "t.csv")]
    compare.main([str(tmp_path / "base"), f"ou|rs={tmp_path}/ours", "--paper", "DS-8B", "--out", *out])
    text = (tmp_path / "t.md").read_text()
    assert capsys.readouterr().out == text
    table = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.replace("\\|", "!").splitlines() if line.startswith("|")]
    head, body = table[0], {row[0].strip(): row for row in table[2:]}
    assert {len(row) for row in table} == {14} and list(body) == ["base", "ou!rs", "ou!rs − base", *(
        f"{m} (the paper's)" for m in ("base", "SafeChain", "RealSafe", "STAR", "GRPO", "IPO"))]
    column = {title: i for i, title in enumerate(head)}
    assert body["base"][column["jbb: reasoning / response"]].startswith("75.0 [") and " / 50.0 [" in body["base"][1]
    assert body["ou!rs − base"][column["average of 3: reasoning / response"]].startswith("-50.0 [")
    assert body["IPO (the paper's)"][column["average of 3: reasoning / response"]] == "15.3 / 6.9"
    assert body["IPO (the paper's)"][column["gpqa-diamond"]] == "49.0" and body["IPO (the paper's)"][column["average of 4: accuracy"]] == "68.5"
    assert body["SafeChain (the paper's)"][column["jbb: reasoning / response"]] == "56.1 / –"
    assert body["ou!rs"][column["strongreject: rubric"]].startswith("62.5 [") and body["base"][column["strongreject: rubric"]] == "–"
    assert body["base"][column["humaneval: pass@10"]].startswith("50.0 [") and body["base"][column["xstest: refusal"]].startswith("0.0 [")
    sheet = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert sheet[0]["jbb reasoning"] == "75.00" and sheet[5]["jbb reasoning"] == "20.70" and sheet[5]["jbb response"] == ""
    assert float(sheet[2]["jbb reasoning low"]) <= -50 <= float(sheet[2]["jbb reasoning high"])
    for flags, words in ((["--paper", "GPT-9"], "DS-8B, DS-7B, Qwen3-8B"), (["--out", "t.pdf"], ".md or .csv"),
                         ([str(tmp_path / "ours")], "comes twice")):
        with pytest.raises(InputError, match=words):
            compare.main([str(tmp_path / "ours"), *flags])


def test_averages_are_the_papers_only_over_the_papers_sets():
    sets = {"reasoning": ["jbb", "strongreject"]}
    figures = {"jbb": {"reasoning": 1.0}, "average": {"reasoning": 3.0}}
    assert compare.paper_figure(sets, figures, ["strongreject", "jbb"], "reasoning") == {"value": 0.03}
    assert compare.paper_figure(sets, figures, ["jbb", "mine"], "reasoning") is None
    assert compare.paper_figure(sets, figures, ["mine"], "reasoning") is None
