"""Several evaluations in one table, in the paper's layout, with paired differences.

    python -m benchmarks.compare base=runs/eval/base ours=runs/eval/ours --paper DS-8B \
        --out table.md table.csv

The other runs are compared with the first, prompt by prompt. What is missing stands beside each
number, with what it could hide. --paper adds the paper's own rows.
"""
import argparse
import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.run import BENCHMARK_KINDS
from evaluate import format_missing, missing_bounds, read_evaluations
from support.errors import InputError, exit_cleanly
from support.files import read_json, read_jsonl, write_text
from support.stages import sidecar
from support.statistics import bootstrap_means, group_by_prompt, interval_of

PAPER = Path(__file__).resolve().parent / "paper.json"

# The columns of a set, by kind: the metrics of each. Other kinds have one column, accuracy.
HARMFUL_COLUMNS = [("reasoning", "response"), ("rubric",)]
COLUMNS_OF_KIND = {
    "harmful": HARMFUL_COLUMNS,
    "strongreject": HARMFUL_COLUMNS,
    "benign": [("compliance",)],
    "xstest": [("compliance",), ("refusal",)],
    "code": [("accuracy",), ("pass@10",)],
}
# Sets of one group stand together; all other kinds are in the group "tasks".
GROUP_OF_KIND = {
    "harmful": "harmful",
    "strongreject": "harmful",
    "benign": "compliance",
    "xstest": "compliance",
}
# The metrics whose average over its sets follows a group.
AVERAGED_METRICS = {"harmful": ("reasoning", "response"), "tasks": ("accuracy",)}

SHARE_EDGES = (0, 1)  # for `interval_of`
DIFFERENCE_EDGES = (-1, 1)
UNDECIDED = "could be due to what is missing"
# What the four parts of prompts that `bootstrap_means` invents score in the base run. In the other
# run they score its default, (0, 0, 1, 1): one part hits in both runs, one in neither, and one in
# each run alone.
INVENTED_FOR_BASE = (0, 1, 0, 1)


# The columns of a metric in a CSV file, and what stands in them: a value in per cent with the ends
# of its interval, counts (of a difference: n prompts), and the ends of the bounds.
CSV_COLUMNS = {
    "": "value",
    "low": "low",
    "high": "high",
    "n": "n",
    "unjudged": "n_unjudged",
    "truncated": "n_truncated",
    "lowest": "lowest",
    "highest": "highest",
    "note": "note",
}
CSV_PERCENTS = ("value", "low", "high", "lowest", "highest")


class SetVerdicts(NamedTuple):
    """What one run says about one set."""
    kind: str
    values: dict        # {metric: ([value from 0 to 1 or None], [prompt id])}
    missing: dict = {}  # {metric: Missing}


class Missing(NamedTuple):
    """How many responses of a set one metric has no verdict on, and how many were cut short."""
    n_unjudged: int
    n_truncated: int


class Column(NamedTuple):
    """A column of the table."""
    title: str
    metrics: tuple  # that share its cells
    sets: list      # names of the sets that it averages


class Row(NamedTuple):
    """A row of the table; a cell is the list of its metrics' results, None where there is none.

    A result of a run is an estimate, with "n_unjudged", "n_truncated" and, where values are
    missing, "bounds". A difference has no such counts: its n counts prompts, and "note" says where
    the bounds leave its sign open. A result of the paper's is a value alone.
    """
    label: str
    cells: list


# ---------------------------------------------------------------------------------------- the table

def table_columns(runs):
    """The columns: those of each set; several harmful sets, or several tasks, also get an average.

    runs: {run: {set: SetVerdicts}}.
    """
    kinds = {}
    present = set()
    for run in runs.values():
        for name, verdicts in run.items():
            kinds[name] = verdicts.kind
            for metric in verdicts.values:
                present.add((name, metric))
    groups = {"harmful": [], "compliance": [], "tasks": []}
    for name, kind in kinds.items():
        group = GROUP_OF_KIND.get(kind, "tasks")
        groups[group].append(name)

    columns = []
    for group, names in groups.items():
        for name in names:
            for metrics in COLUMNS_OF_KIND.get(kinds[name], [("accuracy",)]):
                if (name, metrics[0]) in present:
                    columns.append(set_column(name, metrics))
        if group in AVERAGED_METRICS and len(names) > 1:
            metrics = AVERAGED_METRICS[group]
            title = f"average of {len(names)}: {' / '.join(metrics)}"
            columns.append(Column(title, metrics, names))
    return columns


def set_column(name, metrics):
    """The column of one set's metrics."""
    title = name
    if metrics != ("accuracy",):
        title += f": {' / '.join(metrics)}"
    return Column(title, metrics, [name])


def valid_values(run, name, metric):
    """The values of a metric of one set by prompt, without the missing ones: {prompt: [value]}."""
    if name not in run:
        return {}
    values, prompts = run[name].values.get(metric, ((), ()))
    valid = []
    valid_prompts = []
    for value, prompt in zip(values, prompts):
        if value is not None:
            valid.append(float(value))
            valid_prompts.append(prompt)
    return group_by_prompt(valid, valid_prompts)


def missing_values(run, name, metric):
    """How many responses of one set have no value of a metric."""
    if metric not in run[name].missing:
        return 0
    unjudged, truncated = run[name].missing[metric]
    if BENCHMARK_KINDS[run[name].kind].truncated_scored:
        return unjudged
    return unjudged + truncated


def average_bounds(run, names, metric):
    """(low, high) of the mean over sets if all missing values were 0, and if all were 1."""
    bounds = []
    for name in names:
        by_prompt = valid_values(run, name, metric)
        valid = [value for values in by_prompt.values() for value in values]
        bounds.append(missing_bounds(valid, missing_values(run, name, metric)))
    low, high = np.mean(bounds, axis=0).tolist()
    return low, high


def has_responses(run, names, metric):
    """Whether each of these sets has a response that a metric is about, with a value or without."""
    for name in names:
        if name not in run:
            return False
        if not valid_values(run, name, metric) and not missing_values(run, name, metric):
            return False
    return True


def average_of_sets(run, names, metric):
    """The mean of a metric over sets as a result; None where it was not measured on all of them.

    The sets are drawn independently.
    """
    if not has_responses(run, names, metric):
        return None
    result = {"value": None, "n": 0, "n_unjudged": 0, "n_truncated": 0}
    missing = 0
    means = []
    draws = []
    for seed, name in enumerate(names):
        unjudged, truncated = run[name].missing.get(metric, (0, 0))
        result["n_unjudged"] += unjudged
        result["n_truncated"] += truncated
        missing += missing_values(run, name, metric)
        groups = list(valid_values(run, name, metric).values())
        if groups:
            values = np.concatenate(groups)
            result["n"] += len(values)
            means.append(np.mean(values))
            draws.append(bootstrap_means(groups, seed=seed))
    if len(means) == len(names):
        interval = interval_of(np.mean(means), np.mean(draws, axis=0), SHARE_EDGES)
        result.update(interval)
    if missing:
        result["bounds"] = average_bounds(run, names, metric)
    return result


def paired_difference(run, base, names, metric):
    """The mean over sets of run minus base as a result, on the prompts that both have values of.

    The sets are drawn independently. The two runs are drawn together: a prompt weighs the same in
    both. None where one of the two was not measured on all of the sets.
    """
    if not has_responses(run, names, metric) or not has_responses(base, names, metric):
        return None
    result = {"value": None, "n": 0}
    means = []
    draws = []
    for seed, name in enumerate(names):
        by_prompt = valid_values(run, name, metric)
        base_by_prompt = valid_values(base, name, metric)
        common = [prompt for prompt in base_by_prompt if prompt in by_prompt]
        if not common:
            continue
        result["n"] += len(common)
        groups = [by_prompt[prompt] for prompt in common]
        base_groups = [base_by_prompt[prompt] for prompt in common]
        mean = np.mean(np.concatenate(groups))
        base_mean = np.mean(np.concatenate(base_groups))
        drawn = bootstrap_means(groups, seed=seed)
        base_drawn = bootstrap_means(base_groups, seed=seed, invented=INVENTED_FOR_BASE)
        means.append(mean - base_mean)
        draws.append(drawn - base_drawn)
    if len(means) == len(names):
        interval = interval_of(np.mean(means), np.mean(draws, axis=0), DIFFERENCE_EDGES)
        result.update(interval)
    add_difference_bounds(result, average_bounds(run, names, metric),
                          average_bounds(base, names, metric))
    return result


def add_difference_bounds(result, bounds, base_bounds):
    """Add to a difference what its bounds are and what they leave open, if anything is missing.

    >>> result = {"value": 0.0}
    >>> add_difference_bounds(result, (0.05, 0.5), (0.5, 0.5))
    >>> result
    {'value': 0.0, 'bounds': (-0.45, 0.0), 'note': 'could be due to what is missing'}
    """
    low, high = bounds
    base_low, base_high = base_bounds
    if low == high and base_low == base_high:
        return
    lowest = low - base_high
    highest = high - base_low
    result["bounds"] = (lowest, highest)
    value = result["value"] or 0
    same_sign = min(value, lowest, highest) > 1e-9 or max(value, lowest, highest) < -1e-9
    if not same_sign:
        result["note"] = UNDECIDED


def run_row(label, run, columns):
    """The row of one run."""
    cells = []
    for column in columns:
        cells.append([average_of_sets(run, column.sets, metric) for metric in column.metrics])
    return Row(label, cells)


def difference_row(label, run, base, columns):
    """The row of the differences between two runs."""
    cells = []
    for column in columns:
        cell = [paired_difference(run, base, column.sets, metric) for metric in column.metrics]
        cells.append(cell)
    return Row(label, cells)


def comparison(runs, paper=None):
    """(columns, rows, notes) of runs {run: {set: SetVerdicts}}; paper: a model in paper.json."""
    columns = table_columns(runs)
    first, *others = runs
    rows = [run_row(name, run, columns) for name, run in runs.items()]
    for name in others:
        rows.append(difference_row(f"{name} − {first}", runs[name], runs[first], columns))
    notes = [
        "Per cent, with 95% bootstrap intervals over prompts. n: responses with a value; (a to b): "
        "the value if all that are unjudged or truncated went one way or the other. Accuracy "
        "counts truncated responses as wrong. Differences are paired, in percentage points, over "
        "prompts that both runs have values of.",
        *unequal_prompts(runs),
    ]
    if paper:
        figures = paper_rows(paper, columns)
        if figures:
            notes.append(
                f"The paper's: figures of {paper} in arXiv 2509.24393, by the paper's own judge."
            )
        rows += figures
    return columns, rows, notes


def unequal_prompts(runs):
    """A note for each set of which another run has other prompts than the first run."""
    first, *others = runs
    notes = []
    for set_name in runs[first]:
        ours = prompts_of(runs[first], set_name)
        for name in others:
            theirs = prompts_of(runs[name], set_name)
            if theirs and ours != theirs:
                notes.append(
                    f"{set_name}: {len(ours & theirs)} prompts are in both {first} ({len(ours)}) "
                    f"and {name} ({len(theirs)})."
                )
    return notes


def prompts_of(run, name):
    """The ids of the prompts that a run has verdicts of, in one set."""
    found = set()
    if name in run:
        for _, prompts in run[name].values.values():
            found.update(prompts)
    return found


# --------------------------------------------------------------------------------- the paper's rows

def paper_rows(model, columns):
    """The rows of the paper's table that have figures for these columns.

    Raises InputError for a model that paper.json lacks.
    """
    paper = read_json(PAPER)
    if model not in paper["models"]:
        known = ", ".join(paper["models"])
        raise InputError(f"--paper {model}: there are figures of {known}.")
    rows = []
    for method, figures in paper["models"][model].items():
        cells = []
        has_figures = False
        for column in columns:
            cell = [
                paper_figure(paper["sets"], figures, column.sets, metric)
                for metric in column.metrics
            ]
            cells.append(cell)
            if any(cell):
                has_figures = True
        if has_figures:
            rows.append(Row(f"{method} (the paper's)", cells))
    return rows


def paper_figure(paper_sets, figures, names, metric):
    """The paper's figure for the sets of a column, or None.

    The paper's average is used only where the column averages the same sets. Its name of a set
    may be the beginning of ours: "gpqa" of "gpqa-diamond".

    >>> figures = {"gpqa": {"accuracy": 49.0}}
    >>> paper_figure({"accuracy": ["gpqa"]}, figures, ["gpqa-diamond"], "accuracy")
    {'value': 0.49}
    """
    known = paper_sets.get(metric, list(figures))
    keys = [paper_name(name, known) for name in names]
    if len(keys) == 1:
        key = keys[0]
    elif sorted(keys) == sorted(known):
        key = "average"
    else:
        return None
    percent = figures.get(key, {}).get(metric)
    if percent is None:
        return None
    return {"value": percent / 100}


def paper_name(name, known):
    """The paper's name of a set of ours, or ours where the paper has none."""
    for candidate in known:
        if name.startswith(candidate):
            return candidate
    return name


# ------------------------------------------------------------------------------------------- output

def to_markdown(columns, rows, notes):
    """The table as Markdown."""
    lines = [["", *(column.title for column in columns)], ["---"] * (1 + len(columns))]
    for row in rows:
        cells = [" / ".join(map(format_result, cell)) for cell in row.cells]
        lines.append([row.label, *cells])
    table = []
    for line in lines:
        escaped = [text.replace("|", "\\|") for text in line]
        table.append("| " + " | ".join(escaped) + " |")
    return "\n".join([*table, "", *notes]) + "\n"


def format_result(result):
    """A result in per cent, with its interval, what it counts and what is missing.

    >>> estimate = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 8}
    >>> format_result({**estimate, "n_unjudged": 0, "n_truncated": 2, "bounds": (0.2, 0.4)})
    '25.0 [12.5, 50.0] n=8, 2 truncated (20.0 to 40.0)'
    >>> format_result({**estimate, "bounds": (-0.1, 0.4), "note": UNDECIDED})
    '+25.0 [+12.5, +50.0] on 8 prompts (-10.0 to +40.0: could be due to what is missing)'
    """
    if result is None:
        return "–"
    if "n" not in result:
        return f"{100 * result['value']:.1f}"
    if "n_truncated" in result:
        interval = format_interval(result, "{:.1f}")
        return f"{interval} n={result['n']}" + format_missing(result)
    text = f"{format_interval(result, '{:+.1f}')} on {result['n']} prompts"
    if "bounds" in result:
        low, high = result["bounds"]
        text += f" ({100 * low:+.1f} to {100 * high:+.1f}"
        if "note" in result:
            text += f": {result['note']}"
        text += ")"
    return text


def format_interval(result, number):
    """The value and interval of a result in per cent; number: how to format each."""
    if result["value"] is None:
        return "no value"
    value, low, high = (number.format(100 * result[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def to_csv(columns, rows):
    """The table as CSV: of each metric all that its result holds, see CSV_COLUMNS.

    A cell is empty where there is none.
    """
    header = ["run"]
    for column in columns:
        set_title, _, _ = column.title.partition(":")
        for metric in column.metrics:
            title = f"{set_title} {metric}"
            header += [f"{title} {part}".strip() for part in CSV_COLUMNS]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        line = [row.label]
        for cell in row.cells:
            for result in cell:
                line += csv_cells(result or {})
        writer.writerow(line)
    return out.getvalue()


def csv_cells(result):
    """The cells of a result, in the order of CSV_COLUMNS."""
    low, high = result.get("bounds", (None, None))
    percents = {"lowest": low, "highest": high, **result}
    cells = []
    for key in CSV_COLUMNS.values():
        cell = percents.get(key)
        if cell is None:
            cell = ""
        elif key in CSV_PERCENTS:
            cell = f"{100 * cell:.2f}"
        cells.append(cell)
    return cells


# ------------------------------------------------------------------------------------- command line

def read_verdicts(folder, name, entry):
    """The verdicts of one set in the folder of a finished evaluation.

    entry: of this set in metrics.json, which counts what is missing.
    """
    kind = entry["kind"]
    records = {}
    for part in ("verdicts", "rubric"):
        path = folder / f"{name}.{part}.jsonl"
        if path.exists():
            for record in read_jsonl(path):
                records.setdefault(record["id"], {}).update(record)
    values = BENCHMARK_KINDS[kind].collect(list(records.values()))
    missing = {}
    for metric in values:
        if metric in entry:
            counts = entry[metric]
            missing[metric] = Missing(counts["n_unjudged"], counts["n_truncated"])
    return SetVerdicts(kind, values, missing)


def judge_names(folders):
    """The judges of finished evaluations, by their names in the stages' configs."""
    judges = set()
    for folder in folders:
        path = sidecar(folder, "config")
        if path.exists():
            config = read_json(path, "flags", "inputs")
            judges.add(config["flags"]["judge"])
    return judges


def compare_runs(specs, paper=None, outs=()):
    """Print the table of evaluations `[NAME=]FOLDER` and write it to .md and .csv files."""
    for out in outs:
        if Path(out).suffix not in (".md", ".csv"):
            raise InputError(f"--out {out}: write names that end with .md or .csv.")
    folders, evaluations = read_evaluations(specs)
    runs = {}
    for run, evaluation in evaluations.items():
        runs[run] = {}
        for name, entry in evaluation["sets"].items():
            runs[run][name] = read_verdicts(folders[run], name, entry)
    columns, rows, notes = comparison(runs, paper)
    judges = judge_names(folders.values())
    if len(judges) > 1:
        notes.append(f"These runs had different judges: {', '.join(sorted(judges))}.")
    markdown = to_markdown(columns, rows, notes)
    print(markdown, end="")
    for out in outs:
        if Path(out).suffix == ".csv":
            write_text(out, to_csv(columns, rows))
        else:
            write_text(out, markdown)


def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Several evaluations in the paper's layout, with paired differences to the "
        "first.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]FOLDER",
        help="finished evaluations; the others are compared with the first",
    )
    parser.add_argument(
        "--paper",
        metavar="MODEL",
        help="add the paper's figures of this model: DS-8B, DS-7B or Qwen3-8B",
    )
    parser.add_argument("--out", nargs="+", default=[], help="files to write: .md, .csv")
    return parser


def main(argv=None):
    """Compare the evaluations that the command line names."""
    args = build_parser().parse_args(argv)
    compare_runs(args.runs, args.paper, args.out)


if __name__ == "__main__":
    exit_cleanly(main)
