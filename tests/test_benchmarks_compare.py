"""Tables of several runs: pairing, intervals of known coverage, the paper's layout and figures."""
import csv
import io
import itertools
import json
import math
import random

import numpy as np
import pytest

from benchmarks import compare
from support.errors import InputError
from support.files import write_json, write_jsonl


def run_of(folder, name, kind, verdicts, **entry):
    """A finished run with one set, from {prompt: [verdict record]}; entry: more of it in metrics.json."""
    records = [{"id": f"{p}#{k}", **v} for p, vs in verdicts.items() for k, v in enumerate(vs)]
    write_jsonl(folder / f"{name}.verdicts.jsonl", records)
    path = folder / "metrics.json"
    sets = json.loads(path.read_text())["sets"] if path.exists() else {}
    write_json(path, {"sets": {**sets, name: {"kind": kind, **entry}}})


def marks(*flags):
    return {str(i): [{"correct": bool(f)} for f in fs] for i, fs in enumerate(flags)}


def test_differences_are_paired_by_prompt(tmp_path):
    """Both runs vary much between prompts and little from each other: the paired interval is narrow, the runs' own are wide."""
    rng = random.Random(0)
    base = [[rng.random() < 0.5] for _ in range(200)]
    better = [[b or rng.random() < 0.1] for [b] in base]
    run_of(tmp_path / "base", "sums", "task", marks(*base))
    run_of(tmp_path / "better", "sums", "task", marks(*better))
    runs = {r: {"sums": compare.read_verdicts(tmp_path / r, "sums", {"kind": "task"})} for r in ("base", "better")}
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
    runs = {r: {"s": compare.read_verdicts(tmp_path / r, "s", {"kind": "task"})} for r in "ab"}
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


def counts(unjudged, truncated):
    return {"n_unjudged": unjudged, "n_truncated": truncated}


def harmful_run(folder, responses, name="jbb"):
    """A finished run from what became of each response: True (harmful), False, "cut" or "unjudged"."""
    known = [None if r in ("cut", "unjudged") else r for r in responses]
    verdicts = {str(i): [{"reasoning_safe": True, "response_safe": None if r is None else not r, "cue": None}] for i, r in enumerate(known)}
    run_of(folder, name, "harmful", verdicts, reasoning=counts(0, 0), response=counts(responses.count("unjudged"), responses.count("cut")))


def table_of(folder, capsys, *runs):
    """The printed table as {row: {column: cell}}, its notes, and the rows of the CSV file."""
    compare.main([*(f"{r}={folder}/{r}" for r in runs), "--out", str(folder / "t.csv")])
    lines = capsys.readouterr().out.splitlines()
    head, _, *body = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    sheet = {row["run"]: row for row in csv.DictReader(io.StringIO((folder / "t.csv").read_text()))}
    return {row[0]: dict(zip(head, row)) for row in body}, [line for line in lines if line and not line.startswith("|")], sheet


def test_truncated_responses_do_not_make_a_model_look_safe(tmp_path, capsys):
    """Two models with the same verdicts, of which one is cut short in 45 of the 50 harmful ones: 5 to 50 of 100."""
    harmful_run(tmp_path / "base", [True] * 50 + [False] * 50)
    harmful_run(tmp_path / "cut", [True] * 5 + ["cut"] * 45 + [False] * 50)
    table, notes, sheet = table_of(tmp_path, capsys, "base", "cut")
    column = "jbb: reasoning / response"
    assert table["base"][column].endswith("] n=100") and " / 50.0 [" in table["base"][column]
    assert " / 9.1 [" in table["cut"][column] and table["cut"][column].endswith("] n=55, 45 truncated (5.0 to 50.0)")
    assert " / +0.0 [" in table["cut − base"][column]
    assert table["cut − base"][column].endswith("] on 55 prompts (-45.0 to +0.0: could be due to what is missing)")
    assert table["cut"][column].startswith("0.0 [0.0, ") and "] n=100 / " in table["cut"][column], "all reasoning was judged"
    assert any("(a to b): the value if all that are unjudged or truncated went one way or the other" in note for note in notes)
    cells = {row: {key.removeprefix("jbb response").strip(): cell for key, cell in cells.items() if key.startswith("jbb response")}
             for row, cells in sheet.items()}
    assert {k: v for k, v in cells["cut"].items() if k not in ("low", "high")} == {
        "": "9.09", "n": "55", "unjudged": "0", "truncated": "45", "lowest": "5.00", "highest": "50.00", "note": ""}
    assert {k: v for k, v in cells["cut − base"].items() if k not in ("low", "high")} == {
        "": "0.00", "n": "55", "unjudged": "", "truncated": "", "lowest": "-45.00", "highest": "0.00", "note": "could be due to what is missing"}
    assert cells["base"]["lowest"] == "" and cells["base"]["n"] == "100"


def test_bounds_are_what_every_filling_of_the_gaps_gives(tmp_path, capsys):
    """Against all 2^k fillings, on random runs; and the words where these leave the sign of the difference open."""
    rng = random.Random(5)
    for trial in range(40):
        folder = tmp_path / str(trial)
        runs = {r: [rng.choice([True, True, False, "cut", "unjudged", False, r == "b"]) for _ in range(7)] for r in "ab"}
        for r, responses in runs.items():
            harmful_run(folder / r, responses)
        shares = {}
        for r, responses in runs.items():
            gaps = [i for i, x in enumerate(responses) if not isinstance(x, bool)]
            shares[r] = []
            for filling in itertools.product((0, 1), repeat=len(gaps)):
                filled = {i: int(x) for i, x in enumerate(responses) if isinstance(x, bool)} | dict(zip(gaps, filling))
                shares[r].append(sum(filled.values()) / 7)
        table, _, sheet = table_of(folder, capsys, "a", "b")
        for r, responses in runs.items():
            cells = sheet[r]
            missing = sum(not isinstance(x, bool) for x in responses)
            expected = [f"{100 * min(shares[r]):.2f}", f"{100 * max(shares[r]):.2f}"] if missing else ["", ""]
            assert [cells["jbb response lowest"], cells["jbb response highest"]] == expected
            assert cells["jbb response n"] == str(7 - missing) and cells["jbb response truncated"] == str(responses.count("cut"))
            assert cells["jbb response unjudged"] == str(responses.count("unjudged"))
        both = [i for i in range(7) if isinstance(runs["a"][i], bool) and isinstance(runs["b"][i], bool)]
        cells = sheet["b − a"]
        assert cells["jbb response n"] == str(len(both))
        if len(shares["a"]) == len(shares["b"]) == 1:
            assert cells["jbb response lowest"] == cells["jbb response note"] == ""
            continue
        differences = [b - a for a in shares["a"] for b in shares["b"]]
        assert float(cells["jbb response lowest"]) == pytest.approx(100 * min(differences), abs=0.006)
        assert float(cells["jbb response highest"]) == pytest.approx(100 * max(differences), abs=0.006)
        mean = sum(runs["b"][i] - runs["a"][i] for i in both) / len(both) if both else 0
        settled = mean and all(d * mean > 1e-9 for d in differences)
        assert (cells["jbb response note"] == "") is bool(settled)


def test_a_difference_that_nothing_missing_can_explain_carries_no_words(tmp_path, capsys):
    harmful_run(tmp_path / "base", [True] * 80 + [False] * 20)
    harmful_run(tmp_path / "ours", [True] * 10 + ["cut"] * 5 + [False] * 80 + ["unjudged"] * 5)
    table, _, _ = table_of(tmp_path, capsys, "base", "ours")
    column = "jbb: reasoning / response"
    assert table["ours"][column].endswith("n=90, 5 unjudged, 5 truncated (10.0 to 20.0)")
    assert table["ours − base"][column].endswith("on 90 prompts (-70.0 to -60.0)")


def test_averages_bring_what_is_missing_together(tmp_path, capsys):
    for r, cut in (("base", 0), ("ours", 5)):
        for name, harmful in (("jbb", 6), ("mine", 2)):
            harmful_run(tmp_path / r, [True] * harmful + ["cut"] * cut + [False] * (10 - harmful - cut) if cut + harmful <= 10 else ["cut"] * 10, name)
    table, _, sheet = table_of(tmp_path, capsys, "base", "ours")
    column = "average of 2: reasoning / response"
    assert table["ours"][column].endswith(" / no value n=5, 15 truncated (10.0 to 85.0)"), "0 to 10 of 10 and 2 to 7 of 10"
    assert table["ours"]["jbb: reasoning / response"].endswith(" / no value n=0, 10 truncated (0.0 to 100.0)")
    assert table["base"][column].endswith(" / 40.0 [" + table["base"][column].rpartition("[")[2]) and table["base"][column].endswith("n=20")
    assert table["ours − base"][column].endswith(" / no value on 5 prompts (-30.0 to +45.0: could be due to what is missing)")
    assert sheet["ours"]["average of 2 response"] == "" and sheet["ours"]["average of 2 response lowest"] == "10.00"


def test_truncated_answers_are_wrong_in_accuracy_and_so_not_missing(tmp_path, capsys):
    for r in ("base", "ours"):
        run_of(tmp_path / r, "sums", "task", marks([1], [0], [0], [1]), accuracy=counts(0, 2))
    table, _, sheet = table_of(tmp_path, capsys, "base", "ours")
    assert table["ours"]["sums"].endswith("] n=4, 2 truncated") and table["ours − base"]["sums"].endswith("on 4 prompts")
    assert sheet["ours"]["sums accuracy truncated"] == "2" and sheet["ours"]["sums accuracy lowest"] == ""
