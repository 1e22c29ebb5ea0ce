"""From a sweep of methods and learning rates to one table and one figure: frontiers, not points.

    python -m studies.frontier --results runs/baselines/results.jsonl --run runs/toy

Any method is less harmful at a higher rate, and at some rate it breaks the model. So methods are
compared at the same price: *harm at a compliance of at least 95% of the base model's*. The
validation sets choose the rate, the held-out sets give the numbers. Beside the results this writes
`table.json` and `frontier.svg`; where `--run` is a finished run, its report shows both.

harm: mean over the harmful sets of the share of unsafe reasoning; response harm: the same of
responses; compliance: mean over the benign sets; capability: mean accuracy over the task sets. A
truncated response neither complies nor does harm.
"""
import argparse
import math
from html import escape
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np

import evaluate
from studies.baselines import AXES, METHODS, mean_over_sets
from studies.figures import finished_evaluations
from support.errors import InputError, exit_cleanly
from support.files import read_jsonl, write_json, write_text
from support.report import round_ticks, scale
from support.statistics import (
    DIFFERENCE,
    bootstrap_means,
    group_by_prompt,
    interval_of,
    student_interval,
)

PARTS = ("validation", "test")
COSTS = ("generations", "judge_calls", "cpu_seconds")
FIELDS = ("method", "lr", "seed", "evaluation", *PARTS)  # of a record; COSTS may be missing
FLOOR = 0.95  # CHOICE: the share of the base model's compliance and capability to keep
ROUNDING = 1e-9
MARK = " †"  # at a rate that does not keep it on the validation sets


class Point(NamedTuple):
    """A method at one rate; `base` has the rate "-"."""
    method: str
    lr: str
    records: list  # of `results.jsonl`, one for each seed


# ------------------------------------------------------------------------------------ the points

def read_points(path):
    """The base model and the points of a sweep: (Point, {method: [Point], lowest rate first}).

    Points that lack a seed are left out, because a sweep may be under way. Raises InputError where
    there is no base model, and for a file of other records.
    """
    records = {}  # (method, rate): {seed: record}
    for record in read_jsonl(path):
        for field in FIELDS:
            if field not in record:
                raise InputError(
                    f"{path}: a record without the field `{field}`. Give the results.jsonl of "
                    "`python -m studies.baselines run`."
                )
        records.setdefault((record["method"], record["lr"]), {})[record["seed"]] = record
    if ("base", "-") not in records:
        raise InputError(f"{path}: no record of the base model yet. Let the sweep go on first.")
    seeds = sorted(records["base", "-"])
    points = []
    for (method, lr), by_seed in records.items():
        if seeds == sorted(by_seed):
            points.append(Point(method, lr, [by_seed[seed] for seed in seeds]))
        else:
            print(f"left out, as not all of its seeds are there: {method} lr={lr}")
    base = next(point for point in points if point.method == "base")
    frontiers = {}
    for method in in_order({point.method for point in points}):
        found = [point for point in points if point.method == method]
        frontiers[method] = sorted(found, key=lambda point: float(point.lr))
    return base, frontiers


def in_order(methods):
    """Methods but for `base`: first those that METHODS knows, in its order, then others."""
    known = [method for method in METHODS if method in methods]
    others = sorted(set(methods) - set(METHODS) - {"base"})
    return [*known, *others]


def axis_values(point, part, axis):
    """One value for each seed, None where no set has that metric."""
    return [mean_over_sets(record[part], AXES[axis]) for record in point.records]


def axis_estimate(point, part, axis):
    """Mean and interval over the seeds, and their `values`; None where no set has that metric."""
    values = axis_values(point, part, axis)
    if None in values:
        return None
    return {**student_interval(values), "values": values}


def point_estimates(point, part):
    """{axis: estimate over the seeds}."""
    return {axis: axis_estimate(point, part, axis) for axis in AXES}


# ------------------------------------------------------------------------------ choosing the rate

def choose_rate(points, base):
    """The rate with the lowest harm that keeps FLOOR of the base's compliance and capability.

    points: {rate: {axis: mean}}, base: {axis: mean}, on the validation sets; a capability may be
    None. Returns (rate, True), or, where no rate keeps both, (the one with the highest compliance,
    False). Of equal rates the first counts.

    >>> base = {"harm": 0.8, "compliance": 1.0, "capability": None}
    >>> low = {"harm": 0.3, "compliance": 0.96, "capability": None}
    >>> high = {"harm": 0.1, "compliance": 0.94, "capability": None}
    >>> choose_rate({"low": low, "high": high}, base)
    ('low', True)
    """
    keeping = [lr for lr, found in points.items() if keeps_floor(found, base)]
    if keeping:
        return min(keeping, key=lambda lr: points[lr]["harm"]), True
    return max(points, key=lambda lr: points[lr]["compliance"]), False


def keeps_floor(found, base):
    """Whether FLOOR of compliance and capability is kept."""
    for axis in ("compliance", "capability"):
        if base[axis] is not None and found[axis] < FLOOR * base[axis] - ROUNDING:
            return False
    return True


def means(point, part):
    """{axis: mean over the seeds, None where no set has that metric}."""
    found = {}
    for axis, estimate in point_estimates(point, part).items():
        found[axis] = estimate["value"] if estimate else None
    return found


def chosen_points(base, frontiers):
    """{method: (its Point at the chosen rate, whether that keeps FLOOR)}."""
    chosen = {}
    for method, points in frontiers.items():
        by_rate = {point.lr: point for point in points}
        validation = {lr: means(point, "validation") for lr, point in by_rate.items()}
        lr, kept = choose_rate(validation, means(base, "validation"))
        chosen[method] = by_rate[lr], kept
    return chosen


# -------------------------------------------------------------------------------- the differences

def difference_by_seed(point, reference):
    """Harm beyond the reference's, paired by seed, which gives both the same base rollouts."""
    pairs = zip(axis_values(point, "test", "harm"), axis_values(reference, "test", "harm"))
    values = [ours - theirs for ours, theirs in pairs]
    return {**student_interval(values, edges=(-1, 1)), "values": values}


def difference_by_prompt(point, reference, folder, draws=2000):
    """The same with an interval over prompts; None as soon as one seed's verdicts are missing.

    The others alone would be a difference of other seeds than those of the table. folder: of the
    sweep. Each set's prompts are weighted by themselves, because they are drawn from
    different populations; the harm is the mean over the sets.
    """
    values = []  # of each set
    drawn = np.zeros(draws)
    sets = [key.partition("/")[0] for key in point.records[0]["test"] if key.endswith("/reasoning")]
    for number, name in enumerate(sets):
        differences = []
        prompts = []
        for ours, theirs in zip(point.records, reference.records):
            unsafe = unsafe_reasoning(folder / ours["evaluation"], name)
            their_unsafe = unsafe_reasoning(folder / theirs["evaluation"], name)
            shared = [trace_id for trace_id in unsafe if trace_id in their_unsafe]
            if not shared:
                return None
            for trace_id in shared:
                differences.append(unsafe[trace_id] - their_unsafe[trace_id])
                prompts.append(trace_id.rpartition("#")[0])
        groups = group_by_prompt(differences, prompts).values()
        values.append(mean(differences))
        drawn += bootstrap_means(groups, draws, number, DIFFERENCE) / len(sets)
    return interval_of(mean(values), drawn, (-1, 1))


def unsafe_reasoning(folder, name):
    """{trace id: 1 if its reasoning is unsafe, else 0} of those of a set with a verdict."""
    path = folder / f"{name}.verdicts.jsonl"
    unsafe = {}
    if path.exists():
        for verdict in read_jsonl(path):
            if verdict["reasoning_safe"] is not None:
                unsafe[verdict["id"]] = int(not verdict["reasoning_safe"])
    return unsafe


# -------------------------------------------------------------------------------------- the tables

def table_row(point, kept, reference, folder):
    """A row of the table: a method at its chosen rate, on the held-out sets."""
    row = {
        "method": METHODS.get(point.method, point.method),
        "lr": point.lr,
        "kept": kept,
        **point_estimates(point, "test"),
        "by seed": None,
        "by prompt": None,
        "killed_before": any(record.get("killed_before") for record in point.records),
    }
    if reference and point.method not in ("base", reference.method):
        row["by seed"] = difference_by_seed(point, reference)
        row["by prompt"] = difference_by_prompt(point, reference, folder)
    for name in COSTS:
        if point.method != "base" and name in point.records[0]:
            row[name] = mean(record[name] for record in point.records)
    return row


def make_table(base, frontiers, reference, folder):
    """Everything that `table.json` holds: the rows of the table, and all points.

    reference: the method to take differences to; folder: of the sweep.
    """
    chosen = chosen_points(base, frontiers)
    compared, _ = chosen.get(reference, (None, None))
    rows = [table_row(base, True, None, folder)]
    rows[0]["method"] = "base"
    for point, kept in chosen.values():
        rows.append(table_row(point, kept, compared, folder))
    points = []
    for method, found in frontiers.items():
        for point in found:
            entry = {
                "method": method,
                "label": METHODS.get(method, method),
                "lr": point.lr,
                "chosen": point is chosen[method][0],
            }
            for part in PARTS:
                entry[part] = point_estimates(point, part)
            points.append(entry)
    return {
        "floor": FLOOR,
        "seeds": [record["seed"] for record in base.records],
        "reference": METHODS.get(reference, reference),
        "base": {part: point_estimates(base, part) for part in PARTS},
        "rows": rows,
        "points": points,
    }


def set_lines(base, frontiers):
    """Every single metric of all points on the held-out sets, as rows of text, the heads first."""
    keys = list(base.records[0]["test"])
    lines = [["method", "lr", *keys]]
    for points in ([base], *frontiers.values()):
        for point in points:
            shares = []
            for key in keys:
                values = [record["test"][key] for record in point.records]
                shares.append(share_text(student_interval(values)))
            lines.append([METHODS.get(point.method, point.method), point.lr, *shares])
    return lines


def share_text(estimate):
    """A share in per cent, with its interval where there are several seeds; "" without one.

    >>> share_text({"value": 0.2, "low": 0.1, "high": 0.3, "n": 3})
    '20.0 [10, 30]'
    """
    if not estimate:
        return ""
    text = f"{100 * estimate['value']:.1f}"
    if estimate["n"] > 1:
        text += f" [{100 * estimate['low']:.0f}, {100 * estimate['high']:.0f}]"
    return text


def difference_text(estimate):
    """A difference in points with its sign; without an interval where one seed is all there is.

    >>> difference_text({"value": 0.2, "low": -0.1, "high": 0.3})
    '+20.0 [-10, +30]'
    """
    if not estimate:
        return ""
    text = f"{100 * estimate['value']:+.1f}"
    if estimate.get("n") != 1:
        text += f" [{100 * estimate['low']:+.0f}, {100 * estimate['high']:+.0f}]"
    return text


def cost_text(row, name):
    """One of a row's COSTS; "> " before a time that leaves out what a kill cut off."""
    if name not in row:
        return ""
    text = f"{row[name]:.0f}"
    if row["killed_before"] and name == "cpu_seconds":
        text = "> " + text
    return text


def chosen_lines(table):
    """The table of methods at their chosen rates, as rows of text, the heads first."""
    reference = table["reference"]
    lines = [[
        "method", "lr", *AXES, f"harm beyond {reference}, by seed", "by prompt",
        "generations", "judge calls", "CPU s",
    ]]
    for row in table["rows"]:
        rate = row["lr"] if row["kept"] else row["lr"] + MARK
        shares = [share_text(row[axis]) for axis in AXES]
        differences = [difference_text(row[name]) for name in ("by seed", "by prompt")]
        costs = [cost_text(row, name) for name in COSTS]
        lines.append([row["method"], rate, *shares, *differences, *costs])
    return lines


def point_lines(table):
    """All points on the held-out sets, as rows of text, the heads first."""
    lines = [["method", "lr", *AXES]]
    for point in table["points"]:
        rate = point["lr"]
        if point["chosen"]:
            rate = f"**{rate}**"
        shares = [share_text(point["test"][axis]) for axis in AXES]
        lines.append([point["label"], rate, *shares])
    return lines


def markdown_table(lines):
    """Rows of text as a Markdown table."""
    heads, *rows = lines
    rule = ["---"] * len(heads)
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *rows])


def notes(table):
    """What has to be said below the table: a list of sentences."""
    count = len(table["seeds"])
    sentences = [
        f"In per cent on the held-out sets, mean of {count} seed{'s' if count > 1 else ''}, each "
        f"method at the rate with the lowest harm that keeps {100 * FLOOR:.0f}% of the base "
        "model's compliance and capability on the validation sets.",
    ]
    if count > 1:
        sentences.append("Intervals over seeds are Student's t.")
    pairings = []
    for pairing in ("by seed", "by prompt"):
        if any(row[pairing] for row in table["rows"]):
            pairings.append(pairing)
    if pairings:
        sentences.append(
            f"Differences are harm beyond that of {table['reference']}, in points, paired "
            f"{' and '.join(pairings)}."
        )
    if not all(row["kept"] for row in table["rows"]):
        sentences.append(f"{MARK.strip()} No rate keeps that; this is the one with the highest "
                         "compliance there.")
    return sentences


# -------------------------------------------------------------------------------------- the figure
# A line for each method, in the units of the SVG. It takes any lines, not only those of a sweep.

WIDTH = 360
LEFT = 34
RIGHT = 350
TOP = 28
BOTTOM = 236
LEGEND = 284  # where it begins
ROW = 16      # of the legend
SHAPES = (
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z",           # circle
    "M-3.5 -3.5H3.5V3.5H-3.5Z",                      # square
    "M0 -4.6L4.4 3.2H-4.4Z",                         # triangle
    "M0 -5L4.4 0L0 5L-4.4 0Z",                       # diamond
    "M0 4.6L4.4 -3.2H-4.4Z",                         # triangle, upside down
    "M-1.5 -4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",  # plus
    "M0 -4.8L4.6 -1.5L2.8 3.9H-2.8L-4.6 -1.5Z",      # pentagon
    "M-4.5 -4.5H4.5L0 0L4.5 4.5H-4.5L0 0Z",          # hourglass
    "M-2.2 -4.4H2.2L4.4 0L2.2 4.4H-2.2L-4.4 0Z",     # hexagon
)
# It brings its own colours, so that it can stand alone; they are those of the report.
STYLE = """
.frontier{--ground:#fff;--ink:#1b2127;--soft:#59636d;--line:#deded8;display:block;width:100%;
 max-width:640px;height:auto;font-family:system-ui,sans-serif}
.frontier .k0{--k:#76818c}.frontier .k1{--k:#c27f12}.frontier .k2{--k:#9159ad}
.frontier .k3{--k:#7a5230}.frontier .k4{--k:#c2185b}.frontier .k5{--k:#0e8a9a}
.frontier .k6{--k:#2f8a61}.frontier .k7{--k:#2f5fc4}.frontier .k8{--k:#c2410c}
@media (prefers-color-scheme:dark){
.frontier{--ground:#1c2227;--ink:#e6e8ea;--soft:#a3adb6;--line:#343c44}
.frontier .k0{--k:#9aa5b0}.frontier .k1{--k:#e0a544}.frontier .k2{--k:#b98ad1}
.frontier .k3{--k:#c79a70}.frontier .k4{--k:#f06a9b}.frontier .k5{--k:#4fc3d3}
.frontier .k6{--k:#4cb384}.frontier .k7{--k:#7ba0e8}.frontier .k8{--k:#f08a5d}}
.frontier text{font-size:11px;fill:var(--soft)}
.frontier .ground{fill:var(--ground)}
.frontier .rule{stroke:var(--line)}
.frontier .floor{stroke:var(--soft);stroke-dasharray:4 3}
.frontier .base{fill:none;stroke:var(--ink);stroke-width:1.5}
.frontier .name{fill:var(--ink)}
.frontier polyline{fill:none;stroke:var(--k);stroke-width:1.5;opacity:.65}
.frontier .spot{fill:var(--ground);stroke:var(--k);stroke-width:1.2}
.frontier .chosen{fill:var(--k);stroke:var(--ground);stroke-width:.6}
.frontier .bar{stroke:var(--k);stroke-width:1.5}
"""


class Spot(NamedTuple):
    """A place in the figure, in per cent; ranges: ((x low, x high), (y low, y high)) or None."""
    x: float
    y: float
    note: str  # shown under the pointer
    ranges: tuple = None


class Line(NamedTuple):
    """Spots in order with one name; those that have ranges are drawn large."""
    label: str
    spots: list


def frontier_svg(lines, base):
    """Harm (x) against compliance (y) of several lines, and the base model's Spot, as an SVG."""
    spots = [base]
    for line in lines:
        spots += line.spots
    across, down, parts = draw_axes(spots, FLOOR * base.y)
    parts += draw_floor(base, across, down)
    for number, line in enumerate(lines):
        parts.append(draw_line(line, number, across, down))
    for number, line in enumerate(lines):
        parts.append(draw_key(line, number, len(lines)))
    height = LEGEND + ROW * math.ceil(len(lines) / 2)
    ground = element("rect", width=WIDTH, height=height, class_="ground")
    title = element("title", escape("harmful reasoning against benign compliance, by method"))
    return element(
        "svg", f"{title}<style>{STYLE}</style>{ground}{''.join(parts)}",
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", class_="frontier",
        role="img",
    )


def element(name, content="", **attributes):
    """An element of SVG; content: markup; attributes: texts or numbers, `class_` for class.

    >>> element("line", x1=1, class_="rule")
    '<line x1="1" class="rule"></line>'
    """
    words = [name]
    for key, value in attributes.items():
        words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(str(value))}"')
    return f"<{' '.join(words)}>{content}</{name}>"


def text_at(x, y, words, **attributes):
    """A text in the figure."""
    return element("text", escape(words), x=x, y=y, **attributes)


def draw_axes(spots, floor):
    """(the function that places x, the one that places y, [markup of both axes]).

    x begins at 0; y ends at 100 and begins at a round number below everything, which the axis says.
    Error bars are part of everything.
    """
    xs = [spot.x for spot in spots]
    ys = [floor, *(spot.y for spot in spots)]
    for spot in spots:
        if spot.ranges:
            x_range, y_range = spot.ranges
            xs += x_range
            ys += y_range
    x_high = min(100, 10 * math.ceil(max(xs) / 10 + 0.2))
    y_least = min(ys)
    y_low = max(0, 5 * math.floor((y_least - 1) / 5))
    across = scale(0, x_high, LEFT, RIGHT)
    down = scale(y_low, 101, BOTTOM, TOP)
    y_title = "benign compliance, %"
    if y_low:
        y_title += f" (the axis begins at {y_low})"
    parts = [
        text_at(LEFT - 26, TOP - 14, y_title),
        text_at(RIGHT, BOTTOM + 32, "harmful reasoning, %", text_anchor="end"),
    ]
    for y in round_ticks(y_low, 100):
        parts.append(
            element("line", x1=LEFT, x2=RIGHT, y1=down(y), y2=down(y), class_="rule"))
        parts.append(text_at(LEFT - 5, down(y) + 4, f"{y:g}", text_anchor="end"))
    for x in round_ticks(0, x_high):
        parts.append(text_at(across(x), BOTTOM + 16, f"{x:g}", text_anchor="middle"))
    return across, down, parts


def draw_floor(base, across, down):
    """The base model, and the compliance that a rate must keep: [markup]."""
    y = down(FLOOR * base.y)
    circle = element(
        "circle", element("title", escape(base.note)), cx=across(base.x), cy=down(base.y), r=5,
        class_="base",
    )
    label = f"{100 * FLOOR:.0f}% of base"
    name_x = min(across(base.x), RIGHT - 4)  # or the picture's edge would cut it
    return [
        element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="floor"),
        text_at(RIGHT, y + 12, label, text_anchor="end"),
        circle,
        text_at(name_x, down(base.y) - 8, "base", text_anchor="middle", class_="name"),
    ]


def draw_line(line, number, across, down):
    """One line with its markers, as markup."""
    places = [f"{across(spot.x)},{down(spot.y)}" for spot in line.spots]
    parts = [element("polyline", points=" ".join(places))]
    for spot in line.spots:
        if spot.ranges:
            parts += draw_ranges(spot, across, down)
    for spot in line.spots:
        kind = "chosen" if spot.ranges else "spot"
        size = 1.35 if spot.ranges else 0.8
        parts.append(element(
            "path", element("title", escape(spot.note)), d=SHAPES[number % len(SHAPES)],
            transform=f"translate({across(spot.x)} {down(spot.y)}) scale({size})", class_=kind,
        ))
    return element("g", "".join(parts), class_=colour(number))


def draw_ranges(spot, across, down):
    """Error bars of a spot: [markup]."""
    (x_low, x_high), (y_low, y_high) = spot.ranges
    x = across(spot.x)
    y = down(spot.y)
    return [
        element("line", x1=across(x_low), x2=across(x_high), y1=y, y2=y, class_="bar"),
        element("line", x1=x, x2=x, y1=down(y_low), y2=down(y_high), class_="bar"),
    ]


def draw_key(line, number, count):
    """One entry of the legend, which has two columns, filled one after the other."""
    column, row = divmod(number, math.ceil(count / 2))
    x = LEFT - 20 + 168 * column
    y = LEGEND + ROW * row
    marker = element(
        "path", d=SHAPES[number % len(SHAPES)], transform=f"translate({x} {y})", class_="chosen",
    )
    group = element("g", marker, class_=colour(number))
    return group + text_at(x + 10, y + 4, line.label, class_="name")


def colour(number):
    """The class of a line's colour."""
    return f"k{number % len(SHAPES)}"


def lines_of(table):
    """The lines of a sweep's methods, from its table."""
    lines = {}  # label: Line
    for point in table["points"]:
        found = point["test"]
        ranges = None
        if point["chosen"]:
            ranges = (value_range(found["harm"]), value_range(found["compliance"]))
        line = lines.setdefault(point["label"], Line(point["label"], []))
        line.spots.append(spot_of(f"{point['label']}, {point['lr']}", found, ranges))
    return list(lines.values())


def value_range(estimate):
    """The lowest and the highest seed, in per cent."""
    return 100 * min(estimate["values"]), 100 * max(estimate["values"])


def spot_of(label, found, ranges=None):
    """The Spot of a point; found: {axis: estimate}."""
    x = 100 * found["harm"]["value"]
    y = 100 * found["compliance"]["value"]
    note = f"{label}: harmful reasoning {x:.1f}%, benign compliance {y:.1f}%"
    return Spot(x, y, note, ranges)


# -------------------------------------------------------------------------------------- the report

def report_fragment(table, svg):
    """What the report says of the sweep, as HTML."""
    heads, *rows = chosen_lines(table)
    head_cells = "".join(f"<th scope=col>{escape(head)}</th>" for head in heads)
    body = ""
    for first, *cells in rows:
        marked = [f"<th scope=row>{escape(first)}</th>"]
        for head, cell in zip(heads[1:], cells):
            marked.append(element("td", escape(cell or "–"), data_label=head))
        body += f"<tr>{''.join(marked)}</tr>\n"
    text = escape(" ".join(notes(table)))
    return f"""<style>.frontier-table td{{white-space:nowrap}}</style>
<h2>Methods at many learning rates</h2>
<p>Each line is one method from its lowest learning rate to its highest. Further left is less
harmful reasoning, further up more benign prompts answered. Large: the rate that the validation sets
chose, with bars from its lowest to its highest seed. All on the held-out sets.</p>
<figure style="max-width:670px">{svg}</figure>
<p>{text}</p>
<div class="wide frontier-table"><table class=stack><thead><tr>{head_cells}</tr></thead>
<tbody>{body}</tbody></table></div>
"""


def add_to_report(run, fragment):
    """Put the fragment into the report of a run, and make that again; a line where it has none."""
    report = run / "report.html"
    if not report.exists():
        print(f"{report}: no such file, so table and figure are in no report")
        return
    write_text(run / "fragments" / "frontier.html", fragment)
    evaluate.main([
        "report", "--run", str(run), "--evals", *finished_evaluations(run), "--out", str(report),
    ])


# ------------------------------------------------------------------------------------ command line

def build_parser():
    """The command line of this study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.frontier",
        description="Choose each method's learning rate, and make the table and the figure.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--results", required=True, help="results.jsonl of `python -m studies.baselines run`")
    add("--reference", default="ipo", help="the method that others are compared with")
    add("--run", help="folder of a finished run.sh, for its report")
    add("--by-set", action="store_true", help="also print every point's metrics set by set")
    return parser


def check_reference(reference, frontiers):
    """Raise InputError for a method that neither METHODS nor the sweep knows."""
    if reference not in METHODS and reference not in frontiers:
        raise InputError(
            f"--reference {reference}: no such method. The results have "
            f"{', '.join(frontiers) or 'none yet'}."
        )


def main(argv=None):
    """Make the table and the figure of a sweep."""
    args = build_parser().parse_args(argv)
    results = Path(args.results)
    if not results.exists():
        raise InputError(f"{results}: no such file. `python -m studies.baselines run` writes it.")
    folder = results.parent
    base, frontiers = read_points(results)
    check_reference(args.reference, frontiers)
    table = make_table(base, frontiers, args.reference, folder)
    svg = frontier_svg(lines_of(table), spot_of("base", table["base"]["test"]))
    write_json(folder / "table.json", table)
    write_text(folder / "frontier.svg", svg + "\n")
    if args.run:
        add_to_report(Path(args.run), report_fragment(table, svg))
    if args.by_set:
        print(markdown_table(set_lines(base, frontiers)), end="\n\n")
    print(markdown_table(point_lines(table)), end="\n\n")
    print(markdown_table(chosen_lines(table)), end="\n\n")
    print("\n".join(notes(table)))
    print(f"figure: {folder / 'frontier.svg'}")


if __name__ == "__main__":
    exit_cleanly(main)
