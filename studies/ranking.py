"""From the records of a sweep to a table of numbers: chosen rates, ranks, differences.

`python -m studies.frontier` calls this; `make_table` is what it writes to `table.json`. Every
method stands at one rate: on the validation sets the lowest harm that keeps FLOOR of the base
model's compliance and capability. Its numbers and its rank are those of the held-out sets.
"""
from statistics import mean
from typing import NamedTuple

import numpy as np

from studies.axes import AXES, complete_share, mean_over_sets
from studies.frontier_figure import FLOOR
from support.errors import InputError
from support.files import read_json, read_jsonl
from support.statistics import (
    DIFFERENCE,
    bootstrap_means,
    group_by_prompt,
    interval_of,
    student_interval,
)

GOALS = ("harm", "capability", "compliance")  # methods are ranked by the first that was measured
PRICES = ("compliance", "capability")  # what a method must keep FLOOR of
PARTS = ("validation", "test")
COSTS = ("generations", "judge_calls", "cpu_seconds")
FIELDS = ("method", "lr", "seed", "evaluation", *PARTS)  # of a record; others may be missing
NO_RATE = "-"  # of the base model, and of a method that trains nothing
ROUNDING = 1e-9
DRAWS = 2000  # of the bootstraps


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
    be so common, or no point may have all of them; then it is the most common one.
    """
    counts = {}
    for seed in sorted(base_records):
        counts[seed] = sum(seed in by_seed for by_seed in others)
    used = [seed for seed, count in counts.items() if 2 * count >= len(others)]
    complete = [by_seed for by_seed in others if set(used) <= set(by_seed)]
    if not used or (others and not complete):
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


def point_estimates(point, part, folder=None):
    """{axis: estimate over the seeds}.

    folder: of the sweep. With it, a single seed has intervals over prompts ("over": "prompts"),
    where its evaluation is there.
    """
    estimates = {axis: axis_estimate(point, part, axis) for axis in AXES}
    if folder and len(point.records) == 1:
        [record] = point.records
        path = folder / record["evaluation"] / "metrics.json"
        if path.exists():
            sets = read_json(path, "sets")["sets"]
            for axis, estimate in estimates.items():
                if estimate:
                    estimate |= interval_over_prompts(record[part], AXES[axis], sets)
    return estimates


def interval_over_prompts(values, metric, sets):
    """The interval of the mean of a metric over sets, by those of the sets over their prompts.

    values: {"SET/METRIC": value}; sets: those of the evaluation's metrics.json. As the sets have
    different prompts, the squared distances from value to end add up (Zou and Donner, 2008).
    """
    below = []
    above = []
    for key in values:
        name, _, measured = key.partition("/")
        if measured != metric:
            continue
        estimate = sets[name][metric]
        if estimate["value"] is None:  # no response came to an end: it counts as 0
            estimate = {**estimate, "value": 0.0, "low": 0.0, "high": 0.0}
        share = complete_share(estimate, metric)
        below.append(share * (estimate["value"] - estimate["low"]))
        above.append(share * (estimate["high"] - estimate["value"]))
    middle = mean_over_sets(values, metric)
    low = middle - sum(x * x for x in below) ** 0.5 / len(below)
    high = middle + sum(x * x for x in above) ** 0.5 / len(above)
    return {"low": max(0.0, low), "high": min(1.0, high), "over": "prompts"}


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


# -------------------------------------------------------------------------------------- the table

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
        **point_estimates(point, "test", folder),
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
    base_estimates = {part: point_estimates(base, part, folder) for part in PARTS}
    return {
        "floor": FLOOR,
        "words": words or {},
        "goal": goal,
        "seeds": [record["seed"] for record in base.records],
        "reference": reference_title,
        "base": base_estimates,
        "rows": rows,
        "points": point_entries(frontiers, chosen, folder),
    }


def point_entries(frontiers, chosen, folder):
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
                entry[part] = point_estimates(point, part, folder)
            entries.append(entry)
    return entries
