"""Several evaluations in one table: the paper's layout, paired differences to the first run, the paper's own figures.

A column is (title, metrics that share its cells, names of the sets that it averages). A row is (label, cells), a cell the
list of its metrics' results: {"mean", "low", "high"}, only a mean in the paper's rows, or None.
"""
import csv
import io
import json
from pathlib import Path

import numpy as np

from extras.intervals import grouped, interval, resample

PAPER = Path(__file__).resolve().parent / "paper.json"
BLOCKS = {"harmful": (("reasoning", "response"), ("rubric",)), "benign": (("compliance",),),
          "xstest": (("compliance",), ("refusal",)), "code": (("accuracy",), ("pass@10",))}  # of other kinds: accuracy


def layout(runs):
    """The columns: each set, and behind several harmful sets or several tasks their average."""
    kinds = {name: kind for sets in runs.values() for name, (kind, _) in sets.items()}
    has = {(name, metric) for sets in runs.values() for name, (_, found) in sets.items() for metric in found}
    group_of = {"harmful": "harmful", "benign": "", "xstest": ""}
    columns, groups = [], grouped(kinds, [group_of.get(kind, "tasks") for kind in kinds.values()])
    for group in ("harmful", "", "tasks"):
        names = groups.get(group, [])
        for name in names:
            for metrics in BLOCKS.get(kinds[name], (("accuracy",),)):
                if (name, metrics[0]) in has:
                    columns.append((name if metrics == ("accuracy",) else f"{name}: {' / '.join(metrics)}", metrics, [name]))
        if group and len(names) > 1:
            metrics = ("reasoning", "response") if group == "harmful" else ("accuracy",)
            columns.append((f"average of {len(names)}: {' / '.join(metrics)}", metrics, names))
    return columns


def result(run, names, metric, base=None):
    """Mean over sets with its interval; with a base, of the difference to it on the prompts that both have values of.

    run, base: {set: (kind, {metric: (values, prompts)})}. The sets are drawn independently, the two runs together: of the
    four parts of prompts that `resample` invents, one is a hit of both runs, one of neither, one of each alone.
    """
    means, draws = [], []
    for seed, name in enumerate(names):
        ours, theirs = (valid(r, name, metric) for r in (run, base or run))
        common = [prompt for prompt in theirs if prompt in ours]
        if not common:
            return None
        sides = [[side[prompt] for prompt in common] for side in (ours, theirs)]
        mean, other = (np.mean([v for group in side for v in group]) for side in sides)
        drawn = resample(sides[0], seed=seed)
        means.append(mean - other if base else mean)
        draws.append(drawn - resample(sides[1], seed=seed, invented=(0, 1, 0, 1)) if base else drawn)
    return {**interval(np.mean(means), np.mean(draws, axis=0), (-1, 1) if base else (0, 1)), "signed": base is not None}


def valid(run, name, metric):
    """The values of a metric by prompt, without the missing ones."""
    values, prompts = run.get(name, ("", {}))[1].get(metric, ((), ()))
    kept = [(float(v), p) for v, p in zip(values, prompts) if v is not None]
    return grouped(*zip(*kept)) if kept else {}


def compare_rows(runs, paper=None):
    """(columns, rows, notes) of runs {name: {set: (kind, {metric: (values, prompts)})}}; paper: a model in paper.json."""
    columns, (first, *others) = layout(runs), runs

    def row(run, *base):
        return [[result(run, names, metric, *base) for metric in metrics] for _, metrics, names in columns]
    rows = [(run, row(runs[run])) for run in runs] + [(f"{run} − {first}", row(runs[run], runs[first])) for run in others]
    notes = ["Per cent, with 95% bootstrap intervals over prompts; differences are paired, in percentage points."]
    for name in runs[first]:
        for run in others:
            a, b = ({p for _, prompts in runs[r].get(name, ("", {}))[1].values() for p in prompts} for r in (first, run))
            if a != b and b:
                notes.append(f"{name}: {len(a & b)} prompts are in both {first} ({len(a)}) and {run} ({len(b)}).")
    theirs = paper_rows(paper, columns) if paper else []
    if theirs:
        notes.append(f"The paper's: figures of {paper} in arXiv 2509.24393, by the paper's own judge.")
    return columns, rows + theirs, notes


def paper_rows(model, columns):
    """The rows of the paper's table that say something about these columns. Raises SystemExit for a model it lacks."""
    told = json.loads(PAPER.read_text(encoding="utf-8"))
    if model not in told["models"]:
        raise SystemExit(f"--paper {model}: there are figures of {', '.join(told['models'])}.")
    rows = [(f"{method} (the paper's)", [[told_by(told["sets"], figures, names, metric) for metric in metrics]
                                         for _, metrics, names in columns])
            for method, figures in told["models"][model].items()]
    return [row for row in rows if any(map(any, row[1]))]


def told_by(sets, figures, names, metric):
    """The paper's figure for a column, or None; its average only where the column averages the paper's sets.

    The paper's name of a set may be the beginning of ours: "gpqa" of "gpqa-diamond".

    >>> told_by({"accuracy": ["gpqa"]}, {"gpqa": {"accuracy": 49.0}}, ["gpqa-diamond"], "accuracy")
    {'mean': 0.49}
    """
    known = sets.get(metric, list(figures))
    keys = [next((k for k in known if name.startswith(k)), name) for name in names]
    key = keys[0] if len(keys) == 1 else "average" if sorted(keys) == sorted(known) else None
    value = figures.get(key, {}).get(metric)
    return None if value is None else {"mean": value / 100}


def to_markdown(columns, rows, notes):
    """The table as Markdown."""
    def text(r):
        if r is None:
            return "–"
        mean, *ends = (f"{100 * r[key]:{'+' if r.get('signed') else ''}.1f}" for key in ("mean", "low", "high") if key in r)
        return f"{mean} [{', '.join(ends)}]" if ends else mean
    lines = [["", *(title for title, _, _ in columns)], ["---"] * (1 + len(columns))]
    lines += [[label, *(" / ".join(map(text, cell)) for cell in cells)] for label, cells in rows]
    table = ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]
    return "\n".join([*table, "", *notes]) + "\n"


def to_csv(columns, rows, notes):
    """The table as CSV: for each metric the mean and the ends of its interval, in per cent; empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    titles = [f"{title.partition(':')[0]} {m}" for title, metrics, _ in columns for m in metrics]
    writer.writerow(["run", *(f"{t}{end}" for t in titles for end in ("", " low", " high"))])
    for label, cells in rows:
        writer.writerow([label, *("" if r is None or key not in r else f"{100 * r[key]:.2f}"
                                  for cell in cells for r in cell for key in ("mean", "low", "high"))])
    return out.getvalue()
