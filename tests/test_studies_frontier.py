"""The choice of the rate, ranks, tables and figure, from hand-made records and numbers by hand."""
import json
import re
from xml.etree import ElementTree

import pytest

import evaluate
from studies import frontier, frontier_tables, ranking
from studies.frontier_figure import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Line, Spot, frontier_svg
from support.errors import InputError
from support.files import write_json, write_jsonl
from support.statistics import DIFFERENCE, mean_estimate

SVG = "{http://www.w3.org/2000/svg}"
TITLES = {"ipo": "IPO, stage 1", "dpo": "DPO, whole trajectory"}


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
            "title": TITLES.get(method, method), "paper": f"arXiv 2501.0000{len(method)}",
            "claims": f"{method} is <b>better</b> | safer",
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


def without(results, *metrics):
    """Take metrics out of all records of a file."""
    records = sweep_records()
    for entry in records:
        for part in ("validation", "test"):
            kept = {k: v for k, v in entry[part].items() if k.partition("/")[2] not in metrics}
            entry[part] = kept
    write_jsonl(results, records)


def table_of(results, reference="ipo"):
    base, frontiers = ranking.read_points(results)
    return ranking.make_table(base, frontiers, reference, results.parent)


# ---------------------------------------------------------------------------------------- the rate

def axes(harm, compliance, capability):
    return {"harm": harm, "compliance": compliance, "capability": capability}


def test_the_rate_has_the_lowest_harm_of_those_that_keep_95_per_cent():
    base = axes(0.8, 0.8, 0.6)
    low, mid = axes(0.5, 0.8, 0.6), axes(0.3, 0.76, 0.57)  # 95% of 0.8 and 0.6
    assert ranking.choose_rate({"low": low, "mid": mid}, base) == ("mid", True)
    for damaged in (axes(0.1, 0.759, 0.6), axes(0.1, 0.8, 0.569)):
        rates = {"low": low, "mid": mid, "high": damaged}
        assert ranking.choose_rate(rates, base) == ("mid", True)
    assert ranking.choose_rate({"x": mid, "y": mid}, base) == ("x", True), "of equals the first"
    worse, better = axes(None, 0.8, 0.6), axes(None, 0.77, 0.61)
    damaged = axes(None, 0.1, 0.9)
    unsafe = {"low": worse, "mid": better, "high": damaged}
    assert ranking.choose_rate(unsafe, axes(None, 0.8, 0.6)) == ("mid", True), "no harm measured"
    without_tasks = {"high": axes(0.1, 0.8, None), "low": axes(0.5, 0.8, None)}
    assert ranking.choose_rate(without_tasks, axes(0.8, 0.8, None)) == ("high", True)


def test_if_no_rate_keeps_it_that_with_the_highest_compliance_is_taken():
    rates = {"low": axes(0.5, 0.6, 0.6), "mid": axes(0.3, 0.7, 0.6), "high": axes(0, 0.1, 0.6)}
    assert ranking.choose_rate(rates, axes(0.8, 0.8, 0.6)) == ("mid", False)
    rates = {"low": axes(0.5, None, 0.4), "mid": axes(0.3, None, 0.5)}
    assert ranking.choose_rate(rates, axes(0.8, None, 0.6)) == ("mid", False)


# --------------------------------------------------------------------------------------- the table

def test_points_come_in_the_order_of_methods_and_rates_with_all_seeds(results, capsys):
    with open(results, "a") as file:
        file.write(json.dumps(record("sft", "1e-4", 0, (0, 1, 1), (0, 1, 1))) + "\n")
    base, frontiers = ranking.read_points(results)
    assert [(m, [p.lr for p in points]) for m, points in frontiers.items()] == [
        ("dpo", ["1e-4", "1e-3"]), ("ipo", ["9e-5", "1e-3"]), ("new", ["1e-5", "1e-4"])]
    assert [r["seed"] for r in base.records] == [0, 1, 2]
    assert "sft lr=1e-4" in capsys.readouterr().out, "left out, since two seeds are missing"


def test_a_sweep_under_way_counts_the_seeds_that_half_of_all_points_have(results, capsys):
    records = [r for r in sweep_records() if r["seed"] == 0]
    records += [record("base", "-", 1, (0.8, 1, 0.9), (0.8, 1, 0.9))]
    later = [r for r in sweep_records() if r["seed"] == 1 and r["method"] != "base"]
    for count, seeds in ((0, [0]), (2, [0]), (3, [0, 1])):  # of 6 points
        write_jsonl(results, [*records, *later[:count]])
        base, frontiers = ranking.read_points(results)
        assert [r["seed"] for r in base.records] == seeds
        points = sum(frontiers.values(), [])
        assert len(points) == (6 if seeds == [0] else 3)
        assert all(len(p.records) == len(seeds) for p in points)
        said = capsys.readouterr().out
        assert (f"left out: seed 1, which {count} of 6 points have" in said) == (seeds == [0])
        assert said.count("not all of its seeds") == 6 - len(points)
    # Half of the points have one seed, half the other: then one of the two is better than none.
    trained = {r["id"]: r for r in sweep_records() if r["method"] != "base"}.values()
    bases = [r for r in records if r["method"] == "base"]
    apart = [r for number, r in enumerate(trained) if r["seed"] == number % 2]
    write_jsonl(results, bases + apart)
    base, frontiers = ranking.read_points(results)
    assert len(base.records) == 1 and frontiers
    write_jsonl(results, records[1:2])
    base, frontiers = ranking.read_points(results)
    assert (len(base.records), frontiers) == (1, {}), "the base model alone"
    assert ranking.make_table(base, frontiers, "ipo", results.parent)["rows"][0]["rank"] is None


def test_without_the_base_model_there_is_nothing_to_compare_with(tmp_path):
    write_jsonl(tmp_path / "results.jsonl", sweep_records()[:1])
    with pytest.raises(InputError, match="no record of the base model"):
        ranking.read_points(tmp_path / "results.jsonl")
    with pytest.raises(InputError, match="no such file"):
        frontier.main(["--results", str(tmp_path / "elsewhere.jsonl")])


def test_a_file_of_other_records_is_refused(results):
    write_jsonl(results, [{"id": "p#0", "method": "sft", "lr": "1e-4"}])
    with pytest.raises(InputError, match="results.jsonl: a record without the field `seed`"):
        frontier.main(["--results", str(results)])


def test_the_reference_is_a_method_of_the_sweep(results, capsys):
    with pytest.raises(InputError, match="--reference ipo2: .* The results have dpo, ipo, new"):
        frontier.main(["--results", str(results), "--reference", "ipo2"])
    frontier.main(["--results", str(results), "--reference", "new"])
    assert "harm beyond that of new, in points, paired by seed." in capsys.readouterr().out
    write_jsonl(results, [r for r in sweep_records() if r["method"] != "ipo"])
    frontier.main(["--results", str(results)])
    assert "Differences" not in capsys.readouterr().out, "the default, which this sweep lacks"


def test_the_table_is_of_held_out_sets_at_the_chosen_rates(results):
    rows = {row["method"]: row for row in table_of(results)["rows"]}
    assert list(rows) == ["base", "IPO, stage 1", "new", "DPO, whole trajectory"]
    assert [row["rank"] for row in rows.values()] == [None, 1, 2, 3]
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
    assert frontier_tables.difference_text(e).startswith("-30.0 [-55, -5]")


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
    _, frontiers = ranking.read_points(results)
    (_, new), (_, ipo) = frontiers["new"], frontiers["ipo"]
    e = ranking.difference_by_prompt(new, ipo, folder)
    # Set a: +1 on p and 0 on q three times, +1 on r with seed 0 alone; mean 4/7.
    # Set b: 0, -1, -1 on s and 0 on t; mean -1/3.
    assert e["value"] == pytest.approx((4 / 7 - 1 / 3) / 2)
    assert -1 < e["low"] < e["value"] < e["high"] < 1

    (folder / "seed2" / "new-1e-4" / "eval" / "b.verdicts.jsonl").unlink()
    assert ranking.difference_by_prompt(new, ipo, folder) is None, "one seed of one set is missing"

    only_a = [r._replace(records=[{**x, "test": {"a/reasoning": 0}} for x in r.records])
              for r in (new, ipo)]
    one = ranking.difference_by_prompt(*only_a, folder)
    same = mean_estimate([1, 1, 1, 0, 0, 0, 1], list("pppqqqr"), invented=DIFFERENCE)
    assert (one["low"], one["high"]) == pytest.approx((same["low"], same["high"]))


def test_the_tables_as_text(results):
    table = table_of(results)
    lines = frontier_tables.markdown_table(frontier_tables.chosen_lines(table)).splitlines()
    assert lines[0] == ("| rank | method | rank, 95% | lr | harm | compliance | capability | "
                        "response harm | "
                        "harm beyond IPO, stage 1, by seed | by prompt | generations | "
                        "judge calls | CPU s |")
    assert lines[2].startswith("|  | base |  | - | 75.0 [75, 75] | 98.0 [98, 98] | 80.0 [80, 80] |")
    assert lines[2].endswith("|  |  |  |  |  |")
    assert lines[3].startswith("| 1 | IPO, stage 1 | 1 | 1e-3 | 20.0 [0, 45] |")
    assert lines[5].startswith("| 3 | DPO, whole trajectory |  | 1e-4 † | 50.0 [50, 50] |")
    assert lines[4].endswith("| +20.0 [+20, +20] |  | 11 | 21 | 2 |")
    assert any(note.startswith("† No rate keeps that") for note in frontier_tables.notes(table))
    points = frontier_tables.markdown_table(frontier_tables.point_lines(table))
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
    _, base, ipo, new = frontier_tables.chosen_lines(table)
    assert base[4] == "75.0" and ipo[4] == "20.0" and ipo[-1] == "> 2" and new[-1] == "2"
    assert ipo[:3] == ["1", "IPO, stage 1", ""] and new[8] == "+20.0"
    assert "Student" not in " ".join(frontier_tables.notes(table))
    assert not any(note.startswith("†") for note in frontier_tables.notes(table))


def test_one_seed_has_intervals_over_prompts_where_its_evaluation_is_there(tmp_path):
    records = [r for r in sweep_records() if r["seed"] == 1 and r["method"] != "dpo"]
    write_jsonl(tmp_path / "results.jsonl", records)

    def estimate(value, low, high, n_truncated=0):
        return {
            "value": value, "low": low, "high": high, "n": 8, "n_unjudged": 0,
            "n_truncated": n_truncated,
        }

    nothing = {**estimate(None, None, None, 8), "n": 0}  # no response came to an end
    for entry in records:
        sets = {
            "a": {"reasoning": estimate(0.3, 0.2, 0.5), "response": nothing},
            "b": {"reasoning": estimate(0.1, 0.0, 0.5), "response": estimate(0.4, 0.2, 0.5)},
            "c": {"compliance": estimate(0.9, 0.8, 1.0, n_truncated=2)},
            "d": {"accuracy": estimate(0.8, 0.5, 0.9)},
        }
        write_json(tmp_path / entry["evaluation"] / "metrics.json", {"sets": sets})
    table = table_of(tmp_path / "results.jsonl")
    _, _, ipo, _ = frontier_tables.chosen_lines(table)
    # Harm, the mean of 30 and 10: down by the root of 10 and 10 squared, halved, up by that of 20
    # and 40. Compliance, of which 8 of 10 have a response: 10 either way become 8, around its 90.
    assert ipo[4:7] == ["20.0 [13, 42]", "90.0 [82, 98]", "80.0 [50, 90]"]
    assert ipo[7] == "10.0 [0, 15]"  # of one set; the other counts as 0
    said = " ".join(frontier_tables.notes(table))
    assert "Intervals are over prompts" in said and "Student" not in said


# --------------------------------------------------------------------------------------- the ranks

def points_of_harms(harms):
    """A Point for each list of harms by seed."""
    points = []
    for number, values in enumerate(harms):
        records = []
        for seed, harm in enumerate(values):
            entry = record(f"m{number}", "1", seed, (0, 1, 1), (harm, 1, 1))
            entry["test"] = {"a/reasoning": harm, "b/reasoning": harm}
            records.append(entry)
        points.append(ranking.Point(f"m{number}", "1", records))
    return points


def test_ranks_over_seeds_where_there_are_no_verdicts(tmp_path):
    # The second is ahead if seed 1 is drawn twice or more: 7 of 27 draws.
    points = points_of_harms([[0.1, 0.2, 0.3], [0.2, 0.1, 0.4], [0.9, 0.9, 0.9]])
    assert ranking.rank_ranges(points, "harm", tmp_path) == [(1, 2), (1, 2), (3, 3)]
    equal = points_of_harms([[0.1, 0.1], [0.1, 0.1], [0.2, 0.3]])
    assert ranking.rank_ranges(equal, "harm", tmp_path) == [(1, 2), (1, 2), (3, 3)]
    one_seed = points_of_harms([[0.1], [0.2]])
    assert ranking.rank_ranges(one_seed, "harm", tmp_path) == [None, None]
    assert ranking.rank_ranges([], "harm", tmp_path) == []


def test_a_high_capability_is_a_good_rank(tmp_path):
    points = []
    for number, (first, second) in enumerate([(0.9, 0.8), (0.5, 0.4)]):
        records = [{"test": {"d/accuracy": first}}, {"test": {"d/accuracy": second}}]
        points.append(ranking.Point(f"m{number}", "1", records))
    assert ranking.rank_ranges(points, "capability", tmp_path) == [(1, 1), (2, 2)]


def test_ranks_over_prompts_pair_the_prompts_of_all_methods(tmp_path):
    points = points_of_harms([[0.5], [0.5], [0.6]])
    ids = [f"p{k}#0" for k in range(40)]
    for name in ("a", "b"):
        half = {trace_id: k % 2 == 0 for k, trace_id in enumerate(ids)}
        backwards = dict(reversed(half.items()))
        more = {**half, "p1#0": True, "p3#0": True, "p5#0": True, "p7#0": True, "p9#0": True}
        for number, unsafe in enumerate([half, backwards, more]):
            write_verdicts(tmp_path, f"m{number}", "1", 0, name, unsafe)
    drawn = ranking.drawn_harms(points, tmp_path)
    assert drawn.shape == (3, 1, 2000)
    assert drawn[0] == pytest.approx(drawn[1]), "in whatever order the file has them"
    assert drawn.mean() == pytest.approx((0.5 + 0.5 + 0.625) / 3, abs=0.01)
    # Half of 40 prompts: the standard error of two sets' mean is 0.5 / sqrt(80), about 0.056.
    assert drawn[0].std() == pytest.approx(0.055, abs=0.01)
    ranges = ranking.rank_ranges(points, "harm", tmp_path)
    # Unpaired, ten prompts of eighty would not be enough to tell the third from the others.
    assert ranges == [(1, 2), (1, 2), (3, 3)]
    (tmp_path / "seed0" / "m2-1" / "eval" / "b.verdicts.jsonl").unlink()
    assert ranking.drawn_harms(points, tmp_path) is None


def test_of_equal_methods_that_keep_more_compliance_comes_first(results):
    records = [r for r in sweep_records() if r["method"] == "base"]
    for seed in range(3):
        for method, compliance in (("a", 0.97), ("b", 0.99), ("c", 0.98)):
            records.append(record(method, "-", seed, (0, 1, 0.9), (0, compliance, 0.8)))
        # Broken models: the less harmful is the more broken one.
        records.append(record("x", "1", seed, (0, 0.1, 0.9), (0, 0.1, 0.8)))
        records.append(record("y", "1", seed, (0, 0.5, 0.9), (0.1, 0.5, 0.8)))
    write_jsonl(results, records)
    rows = table_of(results)["rows"]
    assert [row["method"] for row in rows] == ["base", "b", "c", "a", "y", "x"]
    assert [row["rank range"] for row in rows] == [None, (1, 3), (1, 3), (1, 3), None, None]


# ---------------------------------------------------------------------- other sweeps, other words

def test_methods_without_a_rate_are_points(results):
    records = sweep_records()
    for seed in range(3):
        records.append(record("zero", "-", seed, (0.1, 1, 0.9), (0.1, 0.98, 0.8)))
    write_jsonl(results, records)
    table = table_of(results)
    assert (table["rows"][1]["method"], table["rows"][1]["lr"]) == ("zero", "-")
    line = frontier.lines_of(table)[0]
    assert (line.label, len(line.spots)) == ("1 zero", 1)
    frontier.main(["--results", str(results)])


def test_axes_that_no_set_has_are_left_out(results, capsys):
    without(results, "compliance", "response")
    frontier.main(["--results", str(results)])
    said = capsys.readouterr().out
    assert "| lr | harm | capability | harm beyond" in said
    assert "keeps 95% of the base model's capability on" in said
    rows = {row["method"]: row["lr"] for row in table_of(results)["rows"]}
    assert rows["DPO, whole trajectory"] == "1e-3", "harmless, and nobody asks for compliance"
    svg = (results.parent / "frontier.svg").read_text()
    assert "capability, %" in svg and "compliance" not in svg


def test_without_harm_methods_are_ranked_by_capability(results, capsys):
    without(results, "reasoning", "response")
    frontier.main(["--results", str(results)])
    said = capsys.readouterr().out
    assert "| lr | compliance | capability | capability beyond IPO, stage 1, by seed |" in said
    assert "highest capability that keeps 95% of the base model's compliance and cap" in said
    assert "figure: none" in said and not (results.parent / "frontier.svg").exists()
    table = table_of(results)
    methods = [row["method"] for row in table["rows"]]
    assert methods == ["base", "new", "IPO, stage 1", "DPO, whole trajectory"]
    assert "svg" not in frontier.report_fragment(table, frontier.draw_table(table))
    without(results, "reasoning", "compliance", "accuracy")
    with pytest.raises(InputError, match="no validation set measures reasoning, accuracy, compl"):
        ranking.read_points(results)


def test_a_domain_has_its_own_words(results):
    base, frontiers = ranking.read_points(results)
    words = {"harm": "wrong reasoning", "compliance": "answers"}
    table = ranking.make_table(base, frontiers, "ipo", results.parent, words)
    heads = frontier_tables.chosen_lines(table)[0]
    assert heads[4:7] == ["wrong reasoning", "answers", "capability"]
    assert heads[8] == "wrong reasoning beyond IPO, stage 1, by seed"
    assert frontier_tables.claim_lines(table)[0][3:5] == ["wrong reasoning", "answers"]
    page = frontier.report_fragment(table, frontier.draw_table(table))
    assert "lowest wrong reasoning that keeps 95% of the base" in page and "answers and cap" in page
    assert "wrong reasoning, % (square-root scale)" in page
    assert "harm" not in re.sub(r"response harm", "", page)


def test_claims_stand_beside_what_was_measured(results, tmp_path):
    table = table_of(results)
    assert frontier_tables.claim_lines(table)[:2] == [
        ["method", "paper", "what it claims", "harm", "compliance", "capability"],
        ["IPO, stage 1", "arXiv 2501.00003", "ipo is <b>better</b> | safer", "75.0 → 20.0",
         "98.0 → 90.0", "80.0 → 80.0"]]
    page = tmp_path / "page.md"
    frontier.main(["--results", str(results), "--markdown", str(page)])
    lines = page.read_text().splitlines()
    assert lines[0].startswith("| rank | method |") and lines[6] == ""
    assert lines[7].startswith("In per cent on the held-out sets, mean of 3 seeds")
    claim = ("| IPO, stage 1 | [arXiv 2501.00003](https://arxiv.org/abs/2501.00003) | ipo is "
             r"&lt;b>better&lt;/b> \| safer | 75.0 → 20.0 | 98.0 → 90.0 | 80.0 → 80.0 |")
    assert claim in lines
    assert lines[-1].startswith("| DPO, whole trajectory † |")
    fragment = frontier.report_fragment(table, frontier.draw_table(table))
    assert '<a href="https://arxiv.org/abs/2501.00003">arXiv 2501.00003</a>' in fragment


def test_records_of_a_sweep_without_titles_and_claims_are_read(results):
    records = sweep_records()
    for entry in records:
        for field in ("title", "paper", "claims", "generations", "killed_before"):
            del entry[field]
    write_jsonl(results, records)
    assert [row["method"] for row in table_of(results)["rows"]] == ["base", "ipo", "new", "dpo"]


# -------------------------------------------------------------------------------------- the figure

def spot(x, y, ranges=None):
    return Spot(x, y, f"at {x}", ranges)


def test_the_figure_places_every_spot_on_its_axes():
    lines = [Line("a <b>", [spot(60, 99), spot(20, 90, ((10, 30), (88, 92)))]),
             Line("second", [spot(40, 95)])]
    root = ElementTree.fromstring(frontier_svg(lines, spot(80, 100)))
    texts = {node.text: node for node in root.iter(SVG + "text")}
    assert {"a <b>", "second", "base", "95% of base", "harmful reasoning, % (square-root scale)",
            "benign compliance, % (the axis begins at 85)"} <= set(texts)

    def x_of(value):  # where the numbers of the axis are
        return float(texts[f"{value}"].get("x"))

    def y_of(value):
        return float(texts[f"{value}"].get("y")) - 4

    assert x_of(20) - x_of(0) == pytest.approx(2 * (x_of(5) - x_of(0)), abs=0.2)
    first, second = root.iter(SVG + "polyline")
    (x1, y1), (x2, y2) = (map(float, place.split(",")) for place in first.get("points").split())
    assert x1 == pytest.approx(x_of(60), abs=0.1) and x2 == pytest.approx(x_of(20), abs=0.1)
    assert y2 == pytest.approx(y_of(90), abs=0.1) and y_of(100) < y1 < y_of(95)
    assert second.get("points").count(",") == 1
    bars = [node for node in root.iter(SVG + "line") if node.get("class") == "bar"]
    across, upright = bars
    left, right = float(across.get("x1")), float(across.get("x2"))
    assert left == pytest.approx(x_of(10), abs=0.1)
    unit = x_of(1) - x_of(0)
    assert right - x_of(0) == pytest.approx(5.477 * unit, abs=0.3), "the root of 30"
    assert float(upright.get("y1")) > y2 > float(upright.get("y2"))
    floor, = (node for node in root.iter(SVG + "line") if node.get("class") == "floor")
    assert float(floor.get("y1")) == pytest.approx(y_of(95), abs=0.1), "95% of the base's 100%"
    circle, = root.iter(SVG + "circle")
    assert float(circle.get("cx")) == pytest.approx(x_of(80), abs=0.1)
    assert float(circle.get("cy")) == pytest.approx(y_of(100), abs=0.1)


def test_error_bars_stay_in_the_plot_and_no_share_is_beyond_100():
    lines = [Line("wide", [spot(60, 90, ((50, 100), (85, 95)))])]
    root = ElementTree.fromstring(frontier_svg(lines, spot(80, 100)))
    across, upright = (node for node in root.iter(SVG + "line") if node.get("class") == "bar")
    assert float(across.get("x2")) == RIGHT, "100% is the end of the axis"
    assert TOP < float(upright.get("y2")) < float(upright.get("y1")) < BOTTOM
    numbers = [node for node in root.iter(SVG + "text") if node.text.isdecimal()]
    assert max(int(node.text) for node in numbers) == 100
    ends = [float(node.get("x")) for node in numbers if node.text == "100"]
    assert sorted(ends) == [LEFT - 5, RIGHT], "one on each axis"


def test_an_axis_from_0_does_not_say_where_it_begins():
    assert "begins" not in frontier_svg([Line("m", [spot(1, 1)])], spot(1, 1))


def test_the_upper_end_is_a_round_number_above_everything():
    line = Line("m", [spot(9, 84, ((9, 9), (80, 86)))])
    root = ElementTree.fromstring(frontier_svg([line], spot(80, 84)))
    at_edge = [t for t in root.iter(SVG + "text") if t.get("x") == str(LEFT - 5)]
    assert [t.text for t in at_edge][-1] == "90"


def many_lines(count, title="method"):
    """Lines whose chosen spots lie close together, with a better and a worse one around them."""
    lines = []
    for k in range(count):
        chosen = spot(4 + k / 5, 96 + k % 5 / 2, ((3, 30), (95, 99)))
        lines.append(Line(f"{k + 1} {title}", [spot(50, 99), chosen, spot(1, 60)]))
    return lines


def test_of_many_lines_eight_have_colours_and_a_legend_and_the_others_a_number_each():
    root = ElementTree.fromstring(frontier_svg(many_lines(25), spot(80, 100)))
    texts = list(root.iter(SVG + "text"))
    assert sum(1 for t in texts if (t.text or "").endswith(" method")) == 8
    assert "grey: the others, with their ranks, 9 to 25" in [t.text for t in texts]
    groups = [g for g in root.iter(SVG + "g") if g.find(SVG + "polyline") is not None]
    assert [g.get("class") for g in groups] == ["grey"] * 17 + [f"k{k}" for k in range(8)]
    shapes = [g.find(SVG + "path").get("d") for g in groups[17:]]
    assert len(set(shapes)) == 8
    numbers = [t for t in texts if t.get("class") == "number"]
    said = ["".join(t.itertext()) for t in numbers]
    assert [words[-1] for words in said[:2]] == ["9", "0"] and len(said) == 17
    places = [(float(t.get("x")), float(t.get("y"))) for t in numbers]
    for k, (x, y) in enumerate(places):
        assert 0 < x < WIDTH and 0 < y < BOTTOM
        for other_x, other_y in places[:k]:
            assert abs(x - other_x) > 7 or abs(y - other_y) > 8, "no number on another"


@pytest.mark.parametrize("title, columns", [("short", 2), ("a title of thirty-one letters..", 1)])
def test_the_legend_has_one_column_if_a_name_is_long_and_stays_in_the_picture(title, columns):
    root = ElementTree.fromstring(frontier_svg(many_lines(12, title), spot(80, 100)))
    _, _, width, height = map(float, root.get("viewBox").split())
    keys = [t for t in root.iter(SVG + "text") if (t.text or "").endswith(title)]
    assert len({t.get("x") for t in keys}) == columns
    assert len({(t.get("x"), t.get("y")) for t in keys}) == 8
    assert max(float(t.get("y")) for t in keys) < height - 10, "there is a line below"
    assert all(float(t.get("x")) + 6 * len(t.text) < width for t in keys)


def test_what_lies_far_below_the_floor_is_drawn_at_the_edge():
    useless = Line("useless", [spot(50, 90), spot(0, 30, ((0, 0), (20, 40)))])
    text = frontier_svg([useless], spot(80, 100))
    assert "the axis begins at 80" in text
    root = ElementTree.fromstring(text)
    marker, _ = (p for p in root.iter(SVG + "path") if p.get("class") == "chosen")
    x, y = re.search(r"translate\((\S+) (\S+)\)", marker.get("transform")).groups()
    assert (float(x), float(y)) == (LEFT, BOTTOM)
    edge = root.find(f"{SVG}clipPath/{SVG}rect")
    assert float(edge.get("height")) == BOTTOM, "the line leaves the picture there"


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
            entry["title"] = "<script>"
            entry["claims"] = "<script> is <b>better</b> | safer"
    write_jsonl(results, records)
    table = table_of(results)
    page = frontier.report_fragment(table, frontier.draw_table(table))
    assert "<script>" not in page and page.count("&lt;script&gt;") >= 3
    assert "<b>" not in page and "&lt;script&gt; is &lt;b&gt;better&lt;/b&gt; | safer" in page
