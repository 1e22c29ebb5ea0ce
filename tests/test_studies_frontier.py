"""The choice of the rate, the table and the figure, from hand-made records and numbers by hand."""
import json
import re
from xml.etree import ElementTree

import pytest

import evaluate
from studies import frontier
from support.errors import InputError
from support.files import write_json, write_jsonl
from support.statistics import DIFFERENCE, mean_estimate

SVG = "{http://www.w3.org/2000/svg}"


def record(method, lr, seed, validation, test, **more):
    """A record of a sweep; validation and test: (harm, compliance, capability).

    There are two harmful sets, 10 points above and below the harm, and responses are half as bad.
    """
    parts = {}
    for name, (harm, compliance, capability) in {"validation": validation, "test": test}.items():
        parts[name] = {
            "a/reasoning": harm + 0.1, "a/response": harm / 2, "b/reasoning": harm - 0.1,
            "b/response": harm / 2, "c/compliance": compliance, "d/accuracy": capability}
    return {"id": f"{method} lr={lr} seed={seed}", "method": method, "lr": lr, "seed": seed,
            "evaluation": f"seed{seed}/{method}-{lr}/eval", "killed_before": False,
            "generations": 10 + seed, "judge_calls": 20 + seed, "cpu_seconds": 1.5, **parts, **more}


def sweep_records():
    """Three seeds of two methods at two rates each, in any order."""
    records = []
    for seed in (2, 0, 1):
        drift = 0.1 * (seed - 1)  # of some values with the seed
        records += [
            record("new", "1e-4", seed, (0.4, 0.99, 0.9), (0.4 + drift, 0.97, 0.9)),
            record("base", "-", seed, (0.8, 1.0, 0.9), (0.75, 0.98, 0.8)),
            # On the validation sets it keeps 95% on average, although not with each seed.
            record("ipo", "1e-3", seed, (0.2, 0.96 + drift / 5, 0.9), (0.2 + drift, 0.9, 0.8)),
            record("ipo", "9e-5", seed, (0.3, 1.0, 0.9), (0.3, 0.98, 0.8)),
            # Harmless but useless at 1e-3; at 1e-4 it keeps all but capability.
            record("dpo", "1e-3", seed, (0.0, 0.2, 0.9), (0.0, 0.3, 0.8)),
            record("dpo", "1e-4", seed, (0.2, 0.99, 0.8), (0.5, 0.97, 0.7)),
            record("new", "1e-5", seed, (0.6, 1.0, 0.9), (0.6, 0.97, 0.9)),
        ]
    return records


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "sweep" / "results.jsonl"
    write_jsonl(path, sweep_records())
    return path


def table_of(results, reference="ipo"):
    base, frontiers = frontier.read_points(results)
    return frontier.make_table(base, frontiers, reference, results.parent)


# ---------------------------------------------------------------------------------------- the rate

def axes(harm, compliance, capability):
    return {"harm": harm, "compliance": compliance, "capability": capability}


def test_the_rate_has_the_lowest_harm_of_those_that_keep_95_per_cent():
    base = axes(0.8, 0.8, 0.6)
    low, mid = axes(0.5, 0.8, 0.6), axes(0.3, 0.76, 0.57)  # 95% of 0.8 and 0.6
    assert frontier.choose_rate({"low": low, "mid": mid}, base) == ("mid", True)
    for damaged in (axes(0.1, 0.759, 0.6), axes(0.1, 0.8, 0.569)):
        rates = {"low": low, "mid": mid, "high": damaged}
        assert frontier.choose_rate(rates, base) == ("mid", True)
    assert frontier.choose_rate({"x": mid, "y": mid}, base) == ("x", True), "of equals the first"
    without_tasks = {"high": axes(0.1, 0.8, None), "low": axes(0.5, 0.8, None)}
    assert frontier.choose_rate(without_tasks, axes(0.8, 0.8, None)) == ("high", True)


def test_if_no_rate_keeps_it_that_with_the_highest_compliance_is_taken():
    rates = {"low": axes(0.5, 0.6, 0.6), "mid": axes(0.3, 0.7, 0.6), "high": axes(0, 0.1, 0.6)}
    assert frontier.choose_rate(rates, axes(0.8, 0.8, 0.6)) == ("mid", False)


# --------------------------------------------------------------------------------------- the table

def test_points_come_in_the_order_of_methods_and_rates_with_all_seeds(results, capsys):
    with open(results, "a") as file:
        file.write(json.dumps(record("sft", "1e-4", 0, (0, 1, 1), (0, 1, 1))) + "\n")
    base, frontiers = frontier.read_points(results)
    assert [(m, [p.lr for p in points]) for m, points in frontiers.items()] == [
        ("dpo", ["1e-4", "1e-3"]), ("ipo", ["9e-5", "1e-3"]), ("new", ["1e-5", "1e-4"])]
    assert [r["seed"] for r in base.records] == [0, 1, 2]
    assert "sft lr=1e-4" in capsys.readouterr().out, "left out, since two seeds are missing"


def test_without_the_base_model_there_is_nothing_to_compare_with(tmp_path):
    write_jsonl(tmp_path / "results.jsonl", sweep_records()[:1])
    with pytest.raises(InputError, match="no record of the base model"):
        frontier.read_points(tmp_path / "results.jsonl")
    with pytest.raises(InputError, match="no such file"):
        frontier.main(["--results", str(tmp_path / "elsewhere.jsonl")])


def test_a_file_of_other_records_is_refused(results):
    write_jsonl(results, [{"id": "p#0", "method": "sft", "lr": "1e-4"}])
    with pytest.raises(InputError, match="results.jsonl: a record without the field `seed`"):
        frontier.main(["--results", str(results)])


def test_the_reference_is_a_method_of_the_paper_or_of_the_sweep(results, capsys):
    with pytest.raises(InputError, match="--reference ipo2: .* The results have dpo, ipo, new"):
        frontier.main(["--results", str(results), "--reference", "ipo2"])
    frontier.main(["--results", str(results), "--reference", "new"])
    assert "harm beyond that of new, in points, paired by seed." in capsys.readouterr().out
    frontier.main(["--results", str(results), "--reference", "sft"])
    assert "Differences" not in capsys.readouterr().out, "the sweep has no SFT"


def test_the_table_is_of_held_out_sets_at_the_chosen_rates(results):
    rows = {row["method"]: row for row in table_of(results)["rows"]}
    assert list(rows) == ["base", "DPO, whole trajectory", "IPO, stage 1", "new"]
    ipo, dpo, new = rows["IPO, stage 1"], rows["DPO, whole trajectory"], rows["new"]
    assert (ipo["lr"], ipo["kept"]) == ("1e-3", True)
    assert (dpo["lr"], dpo["kept"]) == ("1e-4", False), "capability 0.8 is below 95% of 0.9"
    assert (new["lr"], new["kept"]) == ("1e-4", True)
    # 0.1, 0.2, 0.3: standard deviation 0.1, and Student's t of three values is 4.303.
    half = 4.303 * 0.1 / 3 ** 0.5
    assert ipo["harm"]["values"] == pytest.approx([0.1, 0.2, 0.3])
    assert ipo["harm"]["value"] == pytest.approx(0.2)
    assert ipo["harm"]["high"] == pytest.approx(0.2 + half) and ipo["harm"]["low"] == 0.0
    assert ipo["response harm"]["value"] == pytest.approx(0.1)
    assert ipo["compliance"]["value"] == pytest.approx(0.9)
    assert ipo["capability"]["value"] == pytest.approx(0.8)
    assert (ipo["generations"], ipo["judge_calls"], ipo["cpu_seconds"]) == (11, 21, 1.5)
    assert "generations" not in rows["base"] and ipo["by seed"] is None
    # 0.3 - 0.1, 0.4 - 0.2, 0.5 - 0.3 at equal seeds; and 0.5 less 0.1, 0.2, 0.3.
    assert new["by seed"]["values"] == pytest.approx([0.2, 0.2, 0.2])
    assert new["by seed"]["low"] == pytest.approx(0.2) == new["by seed"]["high"]
    assert dpo["by seed"]["values"] == pytest.approx([0.4, 0.3, 0.2])
    assert dpo["by seed"]["low"] == pytest.approx(0.3 - half)
    assert dpo["by prompt"] is None, "there are no verdicts here"


def test_a_difference_may_be_negative(results):
    rows = {row["method"]: row for row in table_of(results, "dpo")["rows"]}
    e = rows["IPO, stage 1"]["by seed"]
    half = 4.303 * 0.1 / 3 ** 0.5
    assert (e["value"], e["low"], e["high"]) == pytest.approx((-0.3, -0.3 - half, -0.3 + half))
    assert frontier.difference_text(e).startswith("-30.0 [-55, -5]")


def test_all_points_hold_what_each_seed_gave(results):
    points = {(p["method"], p["lr"]): p for p in table_of(results)["points"]}
    assert len(points) == 6
    assert points["ipo", "1e-3"]["test"]["harm"]["values"] == pytest.approx([0.1, 0.2, 0.3])
    assert points["ipo", "9e-5"]["validation"]["harm"]["value"] == pytest.approx(0.3)
    assert {key for key, p in points.items() if p["chosen"]} == {
        ("ipo", "1e-3"), ("dpo", "1e-4"), ("new", "1e-4")}


def write_verdicts(folder, method, lr, seed, name, unsafe):
    """unsafe: {trace id: whether the reasoning is unsafe, None without a verdict}."""
    records = []
    for trace_id, value in unsafe.items():
        records.append({"id": trace_id, "reasoning_safe": None if value is None else not value})
    evaluation = folder / f"seed{seed}" / f"{method}-{lr}" / "eval"
    write_jsonl(evaluation / f"{name}.verdicts.jsonl", records)


def test_prompts_are_paired_where_both_have_a_verdict(results):
    folder = results.parent
    for seed in range(3):
        ours = {"p#0": True, "q#0": True, "r#0": None if seed == 2 else True}
        theirs = {"p#0": False, "q#0": True, "r#0": False if seed == 0 else None}
        write_verdicts(folder, "new", "1e-4", seed, "a", ours)
        write_verdicts(folder, "ipo", "1e-3", seed, "a", theirs)
        write_verdicts(folder, "new", "1e-4", seed, "b", {"s#0": seed == 0, "t#0": True})
        write_verdicts(folder, "ipo", "1e-3", seed, "b", {"s#0": True, "t#0": True})
    _, frontiers = frontier.read_points(results)
    (_, new), (_, ipo) = frontiers["new"], frontiers["ipo"]
    e = frontier.difference_by_prompt(new, ipo, folder)
    # Set a: +1 on p and 0 on q three times, +1 on r with seed 0 alone; mean 4/7.
    # Set b: 0, -1, -1 on s and 0 on t; mean -1/3.
    assert e["value"] == pytest.approx((4 / 7 - 1 / 3) / 2)
    assert -1 < e["low"] < e["value"] < e["high"] < 1

    (folder / "seed2" / "new-1e-4" / "eval" / "b.verdicts.jsonl").unlink()
    assert frontier.difference_by_prompt(new, ipo, folder) is None, "one seed of one set is missing"

    only_a = [r._replace(records=[{**x, "test": {"a/reasoning": 0}} for x in r.records])
              for r in (new, ipo)]
    one = frontier.difference_by_prompt(*only_a, folder)
    same = mean_estimate([1, 1, 1, 0, 0, 0, 1], list("pppqqqr"), invented=DIFFERENCE)
    assert (one["low"], one["high"]) == pytest.approx((same["low"], same["high"]))


def test_the_tables_as_text(results):
    table = table_of(results)
    lines = frontier.markdown_table(frontier.chosen_lines(table)).splitlines()
    assert lines[0] == ("| method | lr | harm | compliance | capability | response harm | "
                        "harm beyond IPO, stage 1, by seed | by prompt | generations | "
                        "judge calls | CPU s |")
    assert lines[2].startswith("| base | - | 75.0 [75, 75] | 98.0 [98, 98] | 80.0 [80, 80] | 37.5")
    assert lines[2].endswith("|  |  |  |  |  |")
    assert lines[3].startswith("| DPO, whole trajectory | 1e-4 † | 50.0 [50, 50] |")
    assert lines[4].startswith("| IPO, stage 1 | 1e-3 | 20.0 [0, 45] |")
    assert lines[5].endswith("| +20.0 [+20, +20] |  | 11 | 21 | 2 |")
    assert any(note.startswith("† No rate keeps that") for note in frontier.notes(table))
    points = frontier.markdown_table(frontier.point_lines(table))
    assert "| IPO, stage 1 | **1e-3** | 20.0" in points and "| IPO, stage 1 | 9e-5 | 30.0" in points


def test_every_metric_of_every_point_set_by_set(results, capsys):
    frontier.main(["--results", str(results), "--by-set"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("| method | lr | a/reasoning | a/response | b/reasoning | b/response | "
                        "c/compliance | d/accuracy |")
    assert lines[2].startswith("| base | - | 85.0 [85, 85] | 37.5 [38, 38] | 65.0 [65, 65] |")
    # Seeds 10%, 20% and 30%, plus the 10 points of set a: 4.303 * 0.1 / sqrt(3) = 0.248
    assert any(line.startswith("| IPO, stage 1 | 1e-3 | 30.0 [5, 55] |") for line in lines)


def test_one_seed_has_no_interval_and_a_killed_training_no_exact_time(tmp_path):
    records = [r for r in sweep_records() if r["seed"] == 1 and r["method"] != "dpo"]
    for entry in records:
        entry["killed_before"] = entry["method"] == "ipo"
    write_jsonl(tmp_path / "results.jsonl", records)
    table = table_of(tmp_path / "results.jsonl")
    _, base, ipo, new = frontier.chosen_lines(table)
    assert base[2] == "75.0" and ipo[2] == "20.0" and ipo[-1] == "> 2" and new[-1] == "2"
    assert new[6] == "+20.0" and "Student" not in " ".join(frontier.notes(table))
    assert not any(note.startswith("†") for note in frontier.notes(table))


# -------------------------------------------------------------------------------------- the figure

def spot(x, y, ranges=None):
    return frontier.Spot(x, y, f"at {x}", ranges)


def test_the_figure_places_every_spot_on_its_axes():
    lines = [frontier.Line("a <b>", [spot(60, 99), spot(20, 90, ((10, 30), (88, 92)))]),
             frontier.Line("second", [spot(40, 95)])]
    root = ElementTree.fromstring(frontier.frontier_svg(lines, spot(80, 100)))
    texts = {node.text: node for node in root.iter(SVG + "text")}
    assert {"a <b>", "second", "base", "95% of base", "harmful reasoning, %",
            "benign compliance, % (the axis begins at 85)"} <= set(texts)

    def x_of(value):  # where the numbers of the axis are
        return float(texts[f"{value}"].get("x"))

    def y_of(value):
        return float(texts[f"{value}"].get("y")) - 4

    first, second = root.iter(SVG + "polyline")
    (x1, y1), (x2, y2) = (map(float, place.split(",")) for place in first.get("points").split())
    assert x1 == pytest.approx(x_of(60), abs=0.1) and x2 == pytest.approx(x_of(20), abs=0.1)
    assert y2 == pytest.approx(y_of(90), abs=0.1) and y_of(100) < y1 < y_of(95)
    assert second.get("points").count(",") == 1
    bars = [node for node in root.iter(SVG + "line") if node.get("class") == "bar"]
    across, upright = bars
    middle = x_of(20)
    left, right = float(across.get("x1")), float(across.get("x2"))
    assert middle - left == pytest.approx(right - middle, abs=0.2)
    assert right == pytest.approx((x_of(20) + x_of(40)) / 2, abs=0.1)
    assert float(upright.get("y1")) > y2 > float(upright.get("y2"))
    floor, = (node for node in root.iter(SVG + "line") if node.get("class") == "floor")
    assert float(floor.get("y1")) == pytest.approx(y_of(95), abs=0.1), "95% of the base's 100%"
    circle, = root.iter(SVG + "circle")
    assert float(circle.get("cx")) == pytest.approx(x_of(80), abs=0.1)
    assert float(circle.get("cy")) == pytest.approx(y_of(100), abs=0.1)


def test_error_bars_stay_in_the_plot_and_no_share_is_beyond_100():
    lines = [frontier.Line("wide", [spot(60, 90, ((50, 100), (70, 95)))])]
    root = ElementTree.fromstring(frontier.frontier_svg(lines, spot(80, 100)))
    across, upright = (node for node in root.iter(SVG + "line") if node.get("class") == "bar")
    assert float(across.get("x2")) == frontier.RIGHT, "100% is the end of the axis"
    assert frontier.TOP < float(upright.get("y2")) < float(upright.get("y1")) < frontier.BOTTOM
    numbers = [node for node in root.iter(SVG + "text") if node.text.isdecimal()]
    assert max(int(node.text) for node in numbers) == 100
    ends = [float(node.get("x")) for node in numbers if node.text == "100"]
    assert sorted(ends) == [frontier.LEFT - 5, frontier.RIGHT], "one on each axis"


def test_an_axis_from_0_does_not_say_where_it_begins_and_shapes_repeat_at_last():
    lines = [frontier.Line(f"m{k}", [spot(1, k)]) for k in range(11)]
    text = frontier.frontier_svg(lines, spot(1, 1))
    assert "begins" not in text
    root = ElementTree.fromstring(text)
    width, height = map(float, root.get("viewBox").split()[2:])
    keys = [node for node in root.iter(SVG + "text") if re.fullmatch(r"m\d+", node.text)]
    assert len({(k.get("x"), k.get("y")) for k in keys}) == 11
    assert all(float(k.get("y")) < height for k in keys)
    groups = [g for g in root.iter(SVG + "g") if g.find(SVG + "polyline") is not None]
    looks = [(g.get("class"), g.find(SVG + "path").get("d")) for g in groups]
    assert len(set(looks[:9])) == 9 and looks[9] == looks[0]


def test_the_command_writes_table_and_figure_and_remakes_a_finished_report(
        results, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--results", str(results), "--run", str(run)]
    frontier.main(words)
    assert not run.exists(), "no finished run, no report"
    assert f"{run / 'report.html'}: no such file" in capsys.readouterr().out
    table = json.loads((results.parent / "table.json").read_text())
    assert table["seeds"] == [0, 1, 2] and len(table["points"]) == 6
    svg = (results.parent / "frontier.svg").read_text()
    assert len(list(ElementTree.fromstring(svg).iter(SVG + "polyline"))) == 3
    sets = {"t": {"kind": "task", "accuracy": evaluate.metric_estimate([1], ["a"])}}
    for name in ("base", "stage1"):
        write_json(run / "eval" / name / "metrics.json", {"sets": sets})
    (run / "report.html").write_text("of yesterday")
    frontier.main(words)
    page = (run / "report.html").read_text()
    assert "Methods at many learning rates" in page and svg.strip() in page and "1e-4 †" in page
    assert (run / "fragments" / "frontier.html").exists()


def test_texts_of_a_sweep_are_escaped(results):
    records = sweep_records()
    for entry in records:
        if entry["method"] == "new":
            entry["method"] = "<script>"
    write_jsonl(results, records)
    table = table_of(results)
    base = frontier.spot_of("base", table["base"]["test"])
    svg = frontier.frontier_svg(frontier.lines_of(table), base)
    page = frontier.report_fragment(table, svg)
    assert "<script>" not in page and page.count("&lt;script&gt;") >= 3
