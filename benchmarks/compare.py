"""Several evaluations in one table, in the paper's layout, with paired differences.

    python -m benchmarks.compare base=runs/eval/base ours=runs/eval/ours --paper DS-8B \
        --out table.md table.csv

The other runs are compared with the first, prompt by prompt. --paper adds the paper's own rows.
"""
import argparse
import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.run import BENCHMARK_KINDS
from evaluate import read_evaluations
from support.errors import InputError, exit_cleanly
from support.files import read_jsonl, write_text
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
# What the four parts of prompts that `bootstrap_means` invents score in the base run. In the other
# run they score its default, (0, 0, 1, 1): one part hits in both runs, one in neither, and one in
# each run alone.
INVENTED_FOR_BASE = (0, 1, 0, 1)


class SetVerdicts(NamedTuple):
    """What one run says about one set."""
    kind: str
    values: dict  # {metric: ([value from 0 to 1 or None], [prompt id])}


class Column(NamedTuple):
    """A column of the table."""
    title: str
    metrics: tuple  # that share its cells
    sets: list      # names of the sets that it averages


class Row(NamedTuple):
    """A row of the table; a cell is the list of its metrics' results, None where there is none.

    A result is {"value", "low", "high", "signed"}; only a value in the paper's rows.
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


def average_of_sets(run, names, metric):
    """The mean of a metric over sets with its interval; None where a set has no value.

    The sets are drawn independently.
    """
    means = []
    draws = []
    for seed, name in enumerate(names):
        by_prompt = valid_values(run, name, metric)
        if not by_prompt:
            return None
        groups = list(by_prompt.values())
        means.append(np.mean(np.concatenate(groups)))
        draws.append(bootstrap_means(groups, seed=seed))
    interval = interval_of(np.mean(means), np.mean(draws, axis=0), SHARE_EDGES)
    return {**interval, "signed": False}


def paired_difference(run, base, names, metric):
    """The mean over sets of run minus base, on the prompts that both have values of.

    The sets are drawn independently. The two runs are drawn together: a prompt weighs the same in
    both.
    """
    means = []
    draws = []
    for seed, name in enumerate(names):
        by_prompt = valid_values(run, name, metric)
        base_by_prompt = valid_values(base, name, metric)
        common = [prompt for prompt in base_by_prompt if prompt in by_prompt]
        if not common:
            return None
        groups = [by_prompt[prompt] for prompt in common]
        base_groups = [base_by_prompt[prompt] for prompt in common]
        mean = np.mean(np.concatenate(groups))
        base_mean = np.mean(np.concatenate(base_groups))
        drawn = bootstrap_means(groups, seed=seed)
        base_drawn = bootstrap_means(base_groups, seed=seed, invented=INVENTED_FOR_BASE)
        means.append(mean - base_mean)
        draws.append(drawn - base_drawn)
    interval = interval_of(np.mean(means), np.mean(draws, axis=0), DIFFERENCE_EDGES)
    return {**interval, "signed": True}


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
        "Per cent, with 95% bootstrap intervals over prompts; "
        "differences are paired, in percentage points.",
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
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
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
    """A result in per cent, with its interval if it has one; differences with their sign.

    >>> format_result({"value": 0.25, "low": 0.125, "high": 0.5, "signed": True})
    '+25.0 [+12.5, +50.0]'
    """
    if result is None:
        return "–"
    number = "{:+.1f}" if result.get("signed") else "{:.1f}"
    text = number.format(100 * result["value"])
    if "low" in result:
        low = number.format(100 * result["low"])
        high = number.format(100 * result["high"])
        text += f" [{low}, {high}]"
    return text


def to_csv(columns, rows):
    """The table as CSV: of each metric the value and the ends of its interval, in per cent.

    A cell is empty where there is none.
    """
    header = ["run"]
    for column in columns:
        set_title, _, _ = column.title.partition(":")
        for metric in column.metrics:
            title = f"{set_title} {metric}"
            header += [title, f"{title} low", f"{title} high"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        line = [row.label]
        for cell in row.cells:
            for result in cell:
                line += csv_numbers(result)
        writer.writerow(line)
    return out.getvalue()


def csv_numbers(result):
    """Value, low and high of a result as text."""
    numbers = []
    for key in ("value", "low", "high"):
        number = (result or {}).get(key)
        numbers.append("" if number is None else f"{100 * number:.2f}")
    return numbers


# ------------------------------------------------------------------------------------- command line

def read_verdicts(folder, name, kind):
    """The verdicts of one set in the folder of a finished evaluation."""
    records = {}
    for part in ("verdicts", "rubric"):
        path = folder / f"{name}.{part}.jsonl"
        if path.exists():
            for record in read_jsonl(path):
                records.setdefault(record["id"], {}).update(record)
    values = BENCHMARK_KINDS[kind].collect(list(records.values()))
    return SetVerdicts(kind, values)


def judge_names(folders):
    """The judges of finished evaluations, by their names in the stages' configs."""
    judges = set()
    for folder in folders:
        path = sidecar(folder, "config")
        if path.exists():
            config = json.loads(path.read_text(encoding="utf-8"))
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
            runs[run][name] = read_verdicts(folders[run], name, entry["kind"])
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
