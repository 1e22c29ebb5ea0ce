"""From a sweep of methods and learning rates to a leaderboard and a figure of frontiers.

    python -m studies.frontier --results runs/leaderboard/results.jsonl --run runs/toy

Any method is less harmful at a higher rate, and at some rate it breaks the model. So methods are
compared at the same price: *harm at a compliance of at least 95% of the base model's*. The
validation sets choose the rate, the held-out sets give the numbers and the ranks. Beside the
results this writes `table.json` and `frontier.svg`; where `--run` is a finished run, its report
shows all of it, and `--markdown FILE` writes the tables alone.

harm: mean over the harmful sets of the share of unsafe reasoning; response harm: the same of
responses; compliance: mean over the benign sets; capability: mean accuracy over the task sets. A
truncated response neither complies nor does harm. What no set measures is left out; where that is
the harm, methods are ranked by capability.
"""
import argparse
import re
from html import escape
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np

import evaluate
from studies.axes import AXES, mean_over_sets
from studies.figures import finished_evaluations
from studies.frontier_figure import FLOOR, Line, Spot, element, frontier_svg
from support.errors import InputError, exit_cleanly
from support.files import read_jsonl, write_json, write_text
from support.plugins import load_domain
from support.statistics import (
    DIFFERENCE,
    bootstrap_means,
    group_by_prompt,
    interval_of,
    student_interval,
)

FIGURE_WORDS = {  # the axes' names in the figure
    "harm": "harmful reasoning",
    "compliance": "benign compliance",
    "capability": "capability",
}
GOALS = ("harm", "capability", "compliance")  # methods are ranked by the first that was measured
PRICES = ("compliance", "capability")  # what a method must keep FLOOR of
PARTS = ("validation", "test")
COSTS = ("generations", "judge_calls", "cpu_seconds")
FIELDS = ("method", "lr", "seed", "evaluation", *PARTS)  # of a record; others may be missing
NO_RATE = "-"  # of the base model, and of a method that trains nothing
ROUNDING = 1e-9
DRAWS = 2000  # of the bootstraps
REFERENCE = "ipo"  # the default; a sweep may lack it
MARK = " †"  # at a rate that does not keep it on the validation sets


class Point(NamedTuple):
    """A method at one rate, which is NO_RATE for `base`."""
    method: str
    lr: str
    records: list  # of `results.jsonl`, one for each seed

    @property
    def title(self):
        """The method's name for a reader."""
        return self.records[0].get("title") or self.method


# ------------------------------------------------------------------------------------ the points

def read_points(path):
    """The base model and the points of a sweep: (Point, {method: [Point], lowest rate first}).

    A sweep may be under way: points without all of `seeds_to_use` are left out. Raises InputError
    where there is no base model, for a file of other records, and where nothing was measured.
    """
    records = {}  # (method, rate): {seed: record}
    for record in read_jsonl(path):
        for field in FIELDS:
            if field not in record:
                raise InputError(
                    f"{path}: a record without the field `{field}`. Give the results.jsonl of "
                    "`python -m studies.leaderboard`."
                )
        records.setdefault((record["method"], record["lr"]), {})[record["seed"]] = record
    base_records = records.pop(("base", NO_RATE), None)
    if base_records is None:
        raise InputError(f"{path}: no record of the base model yet. Let the sweep go on first.")
    seeds = seeds_to_use(base_records, list(records.values()))
    base = Point("base", NO_RATE, [base_records[seed] for seed in seeds])
    for part in PARTS:
        if goal_of(point_estimates(base, part)) is None:
            raise InputError(
                f"{path}: no {part} set measures {', '.join(AXES[goal] for goal in GOALS)}. "
                "Give the sweep such a set."
            )
    frontiers = {}
    for method, lr in sorted(records, key=rate_order):
        by_seed = records[method, lr]
        if set(seeds) <= set(by_seed):
            point = Point(method, lr, [by_seed[seed] for seed in seeds])
            frontiers.setdefault(method, []).append(point)
        else:
            print(f"left out, as not all of its seeds are there: {method} lr={lr}")
    return base, frontiers


def seeds_to_use(base_records, others):
    """The base model's seeds that at least half of all other points have, in order.

    base_records: {seed: record}; others: such a dict of each point. Early in a sweep no seed may
    be so common; then it is the most common one.
    """
    counts = {}
    for seed in sorted(base_records):
        counts[seed] = sum(seed in by_seed for by_seed in others)
    used = [seed for seed, count in counts.items() if 2 * count >= len(others)]
    if not used:
        used = [max(counts, key=counts.get)]
    for seed, count in counts.items():
        if seed not in used:
            print(f"left out: seed {seed}, which {count} of {len(others)} points have")
    return used


def rate_order(key):
    """The place of (method, rate): by name, then from the lowest rate to the highest.

    >>> sorted([("b", "-"), ("a", "1e-4"), ("a", "9e-5")], key=rate_order)
    [('a', '9e-5'), ('a', '1e-4'), ('b', '-')]
    """
    method, lr = key
    if lr == NO_RATE:
        return method, 0.0
    return method, float(lr)


# -------------------------------------------------------------------------------------- the axes

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


def means(point, part):
    """{axis: mean over the seeds, None where no set has that metric}."""
    found = {}
    for axis, estimate in point_estimates(point, part).items():
        found[axis] = estimate["value"] if estimate else None
    return found


def first_measured(axes, found):
    """The first of some axes that has a value, or None; found: {axis: value or None}."""
    for axis in axes:
        if found.get(axis) is not None:
            return axis
    return None


def goal_of(found):
    """The axis that methods are ranked by, or None; found: {axis: value or None}.

    >>> goal_of({"harm": None, "compliance": 0.9, "capability": 0.8})
    'capability'
    """
    return first_measured(GOALS, found)


def badness(value, goal):
    """A value of the goal, turned so that less is better: only of harm is less better already."""
    return value if goal == "harm" else -value


# ------------------------------------------------------------------------------ choosing the rate

def choose_rate(points, base):
    """The rate with the lowest harm that keeps FLOOR of the base's compliance and capability.

    points: {rate: {axis: mean}}, base: {axis: mean}, on the validation sets; None: not measured.
    Without harm it is the rate with the highest capability. Returns (rate, True), or, where no rate
    keeps both, (the one with the highest compliance, False). Of equal rates the first counts.

    >>> base = {"harm": 0.8, "compliance": 1.0, "capability": None}
    >>> low = {"harm": 0.3, "compliance": 0.96, "capability": None}
    >>> high = {"harm": 0.1, "compliance": 0.94, "capability": None}
    >>> choose_rate({"low": low, "high": high}, base)
    ('low', True)
    """
    keeping = [lr for lr, found in points.items() if keeps_floor(found, base)]
    if keeping:
        goal = goal_of(base)
        return min(keeping, key=lambda lr: badness(points[lr][goal], goal)), True
    price = first_measured(PRICES, base)
    return max(points, key=lambda lr: points[lr][price]), False


def keeps_floor(found, base):
    """Whether FLOOR of compliance and capability is kept."""
    for axis in PRICES:
        if base[axis] is not None and found[axis] < FLOOR * base[axis] - ROUNDING:
            return False
    return True


class Choice(NamedTuple):
    """A method's Point at the chosen rate, and whether that keeps FLOOR."""
    point: Point
    kept: bool


def chosen_points(base, frontiers):
    """{method: Choice}, best first: by the goal on the held-out sets.

    Methods that do not keep FLOOR come last, those with the highest compliance first: by the goal
    the most damaged one would win.
    """
    base_validation = means(base, "validation")
    chosen = {}
    for method, points in frontiers.items():
        by_rate = {point.lr: point for point in points}
        validation = {lr: means(point, "validation") for lr, point in by_rate.items()}
        lr, kept = choose_rate(validation, base_validation)
        chosen[method] = Choice(by_rate[lr], kept)
    measured = means(base, "test")
    goal = goal_of(measured)
    price = first_measured(PRICES, measured)

    def place(method):
        choice = chosen[method]
        found = means(choice.point, "test")
        bad = badness(found[goal], goal)
        lost = -found[price] if price else 0
        if choice.kept:
            return 0, bad, lost
        else:
            return 1, lost, bad

    return {method: chosen[method] for method in sorted(chosen, key=place)}


# --------------------------------------------------------------------------------------- the ranks

def rank_ranges(points, goal, folder):
    """Of each point the (lowest, highest) rank in 95% of bootstrap draws; None for one seed alone.

    points: best first. A draw takes the seeds and the prompts of each set anew, the same for all
    points, because they share them. Without verdicts (`drawn_harms`) it takes the seeds alone. In
    a draw, equal points have all ranks that they share. CHOICE: a rank that the draws hardly ever
    give is in its own range, all the same.
    """
    n_seeds = len(points[0].records) if points else 0
    by_seed = None
    if goal == "harm":
        by_seed = drawn_harms(points, folder)  # (points, seeds, draws)
    if by_seed is None:
        if n_seeds < 2:
            return [None] * len(points)
        fixed = [axis_values(point, "test", goal) for point in points]
        by_seed = np.repeat(np.array(fixed)[:, :, None], DRAWS, axis=2)
    evenly = np.full(n_seeds, 1 / n_seeds)
    times_drawn = np.random.default_rng(0).multinomial(n_seeds, evenly, DRAWS)  # (draws, seeds)
    drawn = (by_seed * times_drawn.T).sum(1) / n_seeds  # (points, draws)
    drawn = badness(drawn, goal)
    ranges = []
    for number, ours in enumerate(drawn):
        best = 1 + (drawn < ours - ROUNDING).sum(0)
        worst = (drawn <= ours + ROUNDING).sum(0)
        low = int(np.percentile(best, 2.5, method="lower"))
        high = int(np.percentile(worst, 97.5, method="higher"))
        ranges.append((min(low, number + 1), max(high, number + 1)))
    return ranges


def drawn_harms(points, folder):
    """Harm of points by seed under random weights of the prompts, (points, seeds, draws).

    None as soon as one file of verdicts is missing. All have the same weights of a set's prompts.
    """
    names = harmful_sets(points[0]) if points else []
    if not names:
        return None
    drawn = np.zeros((len(points), len(points[0].records), DRAWS))
    for number, name in enumerate(names):
        groups_of = {}  # (number of the point, of the seed): {prompt: [unsafe]}
        prompts = set()  # of all points and seeds
        for point_number, point in enumerate(points):
            for seed_number, record in enumerate(point.records):
                unsafe = unsafe_reasoning(folder / record["evaluation"], name)
                if not unsafe:
                    return None
                ids = [prompt_of(trace_id) for trace_id in unsafe]
                groups = group_by_prompt(unsafe.values(), ids)
                groups_of[point_number, seed_number] = groups
                prompts.update(groups)
        for place, groups in groups_of.items():
            # A prompt without a verdict keeps its place, so that weights fall on the same prompts.
            in_order = [groups.get(prompt, []) for prompt in sorted(prompts)]
            drawn[place] += bootstrap_means(in_order, DRAWS, number) / len(names)
    return drawn


def harmful_sets(point):
    """The names of the held-out sets with a harm."""
    suffix = "/" + AXES["harm"]
    return [key.partition("/")[0] for key in point.records[0]["test"] if key.endswith(suffix)]


def prompt_of(trace_id):
    """The prompt id of a trace id.

    >>> prompt_of("toy#7#0")
    'toy#7'
    """
    return trace_id.rpartition("#")[0]


# -------------------------------------------------------------------------------- the differences

def difference_by_seed(point, reference, goal="harm"):
    """Harm (or another goal) beyond the reference's, paired by seed: they share base rollouts."""
    pairs = zip(axis_values(point, "test", goal), axis_values(reference, "test", goal))
    values = [ours - theirs for ours, theirs in pairs]
    return {**student_interval(values, edges=(-1, 1)), "values": values}


def difference_by_prompt(point, reference, folder, draws=DRAWS):
    """The same of harm, with an interval over prompts; None as soon as one seed's verdicts miss.

    The others alone would be a difference of other seeds than those of the table. folder: of the
    sweep. Each set's prompts are weighted by themselves, because they are drawn from
    different populations; the harm is the mean over the sets.
    """
    values = []  # of each set
    drawn = np.zeros(draws)
    names = harmful_sets(point)
    if not names:
        return None
    for number, name in enumerate(names):
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
                prompts.append(prompt_of(trace_id))
        groups = group_by_prompt(differences, prompts).values()
        values.append(mean(differences))
        drawn += bootstrap_means(groups, draws, number, DIFFERENCE) / len(names)
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

def table_row(point, kept, reference, goal, folder):
    """A row of the table: a method at its chosen rate, on the held-out sets."""
    first = point.records[0]
    row = {
        "rank": None,
        "rank range": None,
        "method": point.title,
        "paper": first.get("paper", ""),
        "claims": first.get("claims", ""),
        "lr": point.lr,
        "kept": kept,
        **point_estimates(point, "test"),
        "by seed": None,
        "by prompt": None,
        "killed_before": any(record.get("killed_before") for record in point.records),
    }
    if reference and point.method not in ("base", reference.method):
        row["by seed"] = difference_by_seed(point, reference, goal)
        if goal == "harm":
            row["by prompt"] = difference_by_prompt(point, reference, folder)
    for name in COSTS:
        if point.method != "base" and name in first:
            row[name] = mean(record[name] for record in point.records)
    return row


def make_table(base, frontiers, reference, folder, words=None):
    """Everything that `table.json` holds: the rows of the table, best first, and all points.

    reference: the method to take differences to; folder: of the sweep; words: {axis: what tables
    and figure call it}, as {"harm": "wrong reasoning"}.
    """
    chosen = chosen_points(base, frontiers)
    goal = goal_of(means(base, "test"))
    compared = None
    reference_title = reference
    if reference in chosen:
        compared = chosen[reference].point
        reference_title = compared.title
    rows = [table_row(base, True, None, goal, folder)]
    rows[0]["method"] = "base"
    for rank, (point, kept) in enumerate(chosen.values(), 1):
        row = table_row(point, kept, compared, goal, folder)
        row["rank"] = rank
        rows.append(row)
    keeping = [choice.point for choice in chosen.values() if choice.kept]
    for row, found in zip(rows[1:], rank_ranges(keeping, goal, folder)):
        row["rank range"] = found
    base_estimates = {part: point_estimates(base, part) for part in PARTS}
    return {
        "floor": FLOOR,
        "words": words or {},
        "goal": goal,
        "seeds": [record["seed"] for record in base.records],
        "reference": reference_title,
        "base": base_estimates,
        "rows": rows,
        "points": point_entries(frontiers, chosen),
    }


def point_entries(frontiers, chosen):
    """All points of the methods, best method first, as `table.json` has them."""
    entries = []
    for rank, (method, choice) in enumerate(chosen.items(), 1):
        for point in frontiers[method]:
            entry = {
                "rank": rank,
                "method": method,
                "label": point.title,
                "lr": point.lr,
                "chosen": point is choice.point,
            }
            for part in PARTS:
                entry[part] = point_estimates(point, part)
            entries.append(entry)
    return entries


def measured_axes(table, part="test"):
    """The axes that sets of a part have, in the order of AXES."""
    return [axis for axis in AXES if table["base"][part][axis]]


def axis_words(table, axes):
    """What the tables call some axes: a list."""
    return [table["words"].get(axis, axis) for axis in axes]


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
            title = "base" if point.method == "base" else point.title
            lines.append([title, point.lr, *shares])
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


def rank_texts(row):
    """A row's rank and the range of its rank; "" where there is none.

    >>> rank_texts({"rank": 3, "rank range": (2, 5)}), rank_texts({"rank": 3, "rank range": None})
    (('3', '2–5'), ('3', ''))
    """
    rank = str(row["rank"] or "")
    if not row["rank range"]:
        return rank, ""
    low, high = row["rank range"]
    if low == high:
        return rank, str(low)
    return rank, f"{low}–{high}"


def chosen_lines(table):
    """The leaderboard: methods at their chosen rates, as rows of text, the heads first."""
    axes = measured_axes(table)
    [goal] = axis_words(table, [table["goal"]])
    lines = [[
        "rank", "method", "rank, 95%", "lr", *axis_words(table, axes),
        f"{goal} beyond {table['reference']}, by seed", "by prompt",
        "generations", "judge calls", "CPU s",
    ]]
    for row in table["rows"]:
        rank, rank_range = rank_texts(row)
        rate = row["lr"] if row["kept"] else row["lr"] + MARK
        shares = [share_text(row[axis]) for axis in axes]
        differences = [difference_text(row[name]) for name in ("by seed", "by prompt")]
        costs = [cost_text(row, name) for name in COSTS]
        lines.append([rank, row["method"], rank_range, rate, *shares, *differences, *costs])
    return lines


def claim_lines(table):
    """What each paper claims beside what was measured, as rows of text, the heads first.

    Measured: the base model's value, and the method's at its chosen rate.
    """
    axes = [axis for axis in measured_axes(table) if axis in GOALS]
    before = table["rows"][0]
    lines = [["method", "paper", "what it claims", *axis_words(table, axes)]]
    for row in table["rows"][1:]:
        shares = []
        for axis in axes:
            ours = 100 * row[axis]["value"]
            shares.append(f"{100 * before[axis]['value']:.1f} → {ours:.1f}")
        method = row["method"] if row["kept"] else row["method"] + MARK
        lines.append([method, row["paper"], row["claims"], *shares])
    return lines


def point_lines(table):
    """All points on the held-out sets, as rows of text, the heads first."""
    axes = measured_axes(table)
    lines = [["method", "lr", *axis_words(table, axes)]]
    for point in table["points"]:
        rate = point["lr"]
        if point["chosen"]:
            rate = f"**{rate}**"
        shares = [share_text(point["test"][axis]) for axis in axes]
        lines.append([point["label"], rate, *shares])
    return lines


def markdown_table(lines):
    """Rows of text as a Markdown table."""
    heads, *rows = lines
    rule = ["---"] * len(heads)
    written = []
    for line in [heads, rule, *rows]:
        cells = [markdown_cell(text) for text in line]
        written.append(f"| {' | '.join(cells)} |")
    return "\n".join(written)


def markdown_cell(text):
    """A text that cannot leave its cell, nor be taken for markup of HTML.

    >>> markdown_cell("a|b <i>")
    'a\\\\|b &lt;i>'
    """
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("|", "\\|")


PAPER = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


def markdown_page(table):
    """Both tables and the notes, to be put into a page of Markdown."""
    claims = markdown_table(claim_lines(table))
    claims = PAPER.sub(r"[\g<0>](https://arxiv.org/abs/\1)", claims)
    parts = [markdown_table(chosen_lines(table)), " ".join(notes(table)), claims]
    return "\n\n".join(parts) + "\n"


def notes(table):
    """What has to be said below the table: a list of sentences."""
    count = len(table["seeds"])
    kept = [axis for axis in measured_axes(table, "validation") if axis in PRICES]
    chosen_by = goal_of(table["base"]["validation"])
    wanted = "lowest" if chosen_by == "harm" else "highest"
    [chosen_by] = axis_words(table, [chosen_by])
    condition = ""
    if kept:
        prices = " and ".join(axis_words(table, kept))
        condition = f" that keeps {100 * FLOOR:.0f}% of the base model's {prices}"
    sentences = [
        f"In per cent on the held-out sets, mean of {count} seed{'s' if count > 1 else ''}, each "
        f"method at the rate with the {wanted} {chosen_by}{condition} on the validation sets.",
    ]
    if count > 1:
        sentences.append("Intervals over seeds are Student's t.")
    if any(row["rank range"] for row in table["rows"]):
        sentences.append(
            "Rank, 95%: where the rank lies in 95% of draws of other seeds and prompts (of seeds "
            "alone where verdicts are missing; a bootstrap, too narrow for few seeds), at the "
            "chosen rates. Methods whose ranges overlap may well be equal."
        )
    pairings = []
    for pairing in ("by seed", "by prompt"):
        if any(row[pairing] for row in table["rows"]):
            pairings.append(pairing)
    if pairings:
        [goal] = axis_words(table, [table["goal"]])
        sentences.append(
            f"Differences are {goal} beyond that of {table['reference']}, in points, paired "
            f"{' and '.join(pairings)}."
        )
    if not all(row["kept"] for row in table["rows"]):
        [price] = axis_words(table, kept[:1])
        sentences.append(
            f"{MARK.strip()} No rate keeps that; this is the one with the highest {price} there. "
            f"Such methods come last, by {price}."
        )
    return sentences


# -------------------------------------------------------------------------------------- the figure

def figure_axes(table):
    """(x axis, y axis) of the figure, or None where the sets measure too little for one."""
    price = first_measured(PRICES, table["base"]["test"])
    if table["goal"] != "harm" or price is None:
        return None
    return "harm", price


def figure_words(table, axes):
    """What the figure calls some axes: a list."""
    return [table["words"].get(axis, FIGURE_WORDS[axis]) for axis in axes]


def draw_table(table):
    """The figure of a sweep from its table; None where it has no axes."""
    axes = figure_axes(table)
    if axes is None:
        return None
    base = spot_of("base", table["base"]["test"], axes, figure_words(table, axes))
    return frontier_svg(lines_of(table), base, *figure_words(table, axes))


def lines_of(table):
    """The lines of a sweep's methods from its table, best first."""
    axes = figure_axes(table)
    words = figure_words(table, axes)
    lines = {}  # method: Line
    for point in table["points"]:
        found = point["test"]
        ranges = None
        if point["chosen"]:
            ranges = tuple(value_range(found[axis]) for axis in axes)
        label = f"{point['rank']} {point['label']}"
        line = lines.setdefault(point["method"], Line(label, []))
        line.spots.append(spot_of(f"{label}, {point['lr']}", found, axes, words, ranges))
    return list(lines.values())


def value_range(estimate):
    """The lowest and the highest seed, in per cent."""
    return 100 * min(estimate["values"]), 100 * max(estimate["values"])


def spot_of(label, found, axes, words, ranges=None):
    """The Spot of a point; found: {axis: estimate}; axes: (x, y); words: what they are called."""
    x, y = [100 * found[axis]["value"] for axis in axes]
    x_word, y_word = words
    note = f"{label}: {x_word} {x:.1f}%, {y_word} {y:.1f}%"
    return Spot(x, y, note, ranges)


# -------------------------------------------------------------------------------------- the report

TABLE_STYLE = """
@media (min-width:641px){
.frontier-table td{white-space:nowrap}
.frontier-table table,.claims-table table{font-size:.8rem}
.frontier-table tbody th{min-width:10rem}
.claims-table td:nth-of-type(n+3){white-space:nowrap}}
"""


def report_fragment(table, svg):
    """What the report says of the sweep, as HTML; svg: None where there is no figure."""
    heads, *rows = chosen_lines(table)
    lines = [heads[1:]]
    for rank, method, *cells in rows:
        lines.append([f"{rank} {method}".strip(), *cells])  # on a phone it is the row's heading
    text = escape(" ".join(notes(table)))
    claims = html_rows(claim_lines(table))
    claims = PAPER.sub(r'<a href="https://arxiv.org/abs/\1">\g<0></a>', claims)
    return f"""<style>{TABLE_STYLE}</style>
<h2>Methods at many learning rates</h2>
{figure_part(table, svg)}<p>{text}</p>
<div class="wide frontier-table"><table class=stack>{html_rows(lines)}</table></div>
<h3>What each paper claims, and what was measured here</h3>
<p>Measured: the base model, and after the arrow the method, in per cent on the held-out sets.</p>
<div class="wide claims-table"><table class=stack>{claims}</table></div>
"""


def figure_part(table, svg):
    """The figure with what it shows, as HTML; "" where there is none."""
    if svg is None:
        return ""
    x_word, y_word = figure_words(table, figure_axes(table))
    return f"""<p>Each line is one method from its lowest learning rate to its highest; a method
that trains nothing is a point. Further left is less {escape(x_word)}, further up more
{escape(y_word)}. Large, or with a number: the rate that the validation sets chose; bars go from its
lowest to its highest seed. At the lower edge: what lies below it. All on the held-out sets.</p>
<figure style="max-width:670px">{svg}</figure>
"""


def html_rows(lines):
    """Rows of text, the heads first, as the inside of an HTML table."""
    heads, *rows = lines
    head_cells = "".join(f"<th scope=col>{escape(head)}</th>" for head in heads)
    body = ""
    for first, *cells in rows:
        marked = [f"<th scope=row>{escape(first)}</th>"]
        for head, cell in zip(heads[1:], cells):
            marked.append(element("td", escape(cell or "–"), data_label=head))
        body += f"<tr>{''.join(marked)}</tr>\n"
    return f"<thead><tr>{head_cells}</tr></thead>\n<tbody>{body}</tbody>"


def add_to_report(run, fragment, domain):
    """Put the fragment into the report of a run, and make that again; a line where it has none."""
    report = run / "report.html"
    if not report.exists():
        print(f"{report}: no such file, so table and figure are in no report")
        return
    write_text(run / "fragments" / "frontier.html", fragment)
    evaluate.main([
        "report", "--run", str(run), "--domain", domain,
        "--evals", *finished_evaluations(run), "--out", str(report),
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
    add("--results", required=True, help="results.jsonl of `python -m studies.leaderboard`")
    add("--reference", default=REFERENCE, help="the method that others are compared with")
    add("--domain", default="safety", help="whose words the tables have: a file of domains/")
    add("--run", help="folder of a finished run.sh, for its report")
    add("--markdown", metavar="FILE", help="also write both tables to this file")
    add("--by-set", action="store_true", help="also print every point's metrics set by set")
    return parser


def domain_words(domain):
    """What a domain calls the axes: {axis: words}, of those that it calls something else."""
    words = {}
    for axis, phrase in (("harm", "harmful reasoning"), ("response harm", "harmful responses")):
        if phrase in domain.WORDS:
            words[axis] = domain.WORDS[phrase]
    return words


def check_reference(reference, frontiers):
    """Raise InputError for a method that the sweep lacks, unless it is the default."""
    if reference != REFERENCE and reference not in frontiers:
        raise InputError(
            f"--reference {reference}: no such method with all its seeds. The results have "
            f"{', '.join(frontiers) or 'none yet'}."
        )


def main(argv=None):
    """Make the tables and the figure of a sweep."""
    args = build_parser().parse_args(argv)
    results = Path(args.results)
    if not results.exists():
        raise InputError(f"{results}: no such file. `python -m studies.leaderboard` writes it.")
    folder = results.parent
    base, frontiers = read_points(results)
    check_reference(args.reference, frontiers)
    words = domain_words(load_domain(args.domain))
    table = make_table(base, frontiers, args.reference, folder, words)
    svg = draw_table(table)
    write_json(folder / "table.json", table)
    figure = "none, as it needs harmful sets, and benign or task sets"
    if svg:
        figure = folder / "frontier.svg"
        write_text(figure, svg + "\n")
    if args.run:
        add_to_report(Path(args.run), report_fragment(table, svg), args.domain)
    if args.markdown:
        write_text(Path(args.markdown), markdown_page(table))
    if args.by_set:
        print(markdown_table(set_lines(base, frontiers)), end="\n\n")
    print(markdown_table(point_lines(table)), end="\n\n")
    print(markdown_table(chosen_lines(table)), end="\n\n")
    print("\n".join(notes(table)))
    print(f"figure: {figure}")


if __name__ == "__main__":
    exit_cleanly(main)
