"""Where the continuation safety ratio turns for good (Section 3, Eq. 2 and 3, Figure 5).

    python -m studies.turning_points --model M --traces ... --steps ... --verdicts ... \\
        --csr runs/my/csr.jsonl --out runs/my/turning_points.jsonl

Nothing is sampled or judged: this evaluates the records of `studies.csr`, in seconds. Positions are
numbers of tokens: i stands for the prefix z[:i] = `trace["ids"][:i]`, so a step that begins at
token h has been entered from position h + 1 on.
"""
from collections import defaultdict
from itertools import product

import numpy as np

from intervene import recorded_flags
from model import load_tokenizer
from studies.common import (
    SPAN,
    ByTrace,
    prompt_ids_of,
    step_starts,
    steps_by_trace,
    study_parser,
)
from studies.csr import safety_ratio, uncertain_traces
from support.errors import InputError, exit_cleanly
from support.files import read_jsonl, write_json, write_jsonl
from support.stages import run_stage, sidecar
from support.statistics import (
    coefficient_estimate,
    column_estimates,
    correlations,
    format_estimate,
    mean_estimate,
    pearson,
)


# ---------------------------------------------------------------------------------- the definition

def turning_point(positions, holds, window, tail=True):
    """The first position from which a condition holds for `window` tokens (Eq. 2, 3), or None.

    positions: where it was measured, rising; holds: whether it holds at each. CHOICE: where not
    every token is measured, the condition must hold at every measured position of the window and at
    the first one beyond it. CHOICE: after the end of the reasoning nothing can change, so a window
    that the end cuts short counts too, unless tail=False.

    >>> turning_point([0, 1, 2, 3, 4], [True, False, True, True, True], window=3, tail=False)
    2
    >>> turning_point([0, 1, 2, 3, 4], [True, False, True, True, True], window=4, tail=False)
    >>> turning_point([0, 9, 30, 43, 60], [True, False, True, True, False], window=15)  # 14 tokens
    >>> turning_point([0, 9, 30, 44, 60], [True, False, True, True, False], window=15)
    30
    """
    start = None
    for i, met in zip(positions, holds):
        if not met:
            start = None
            continue
        if start is None:
            start = i
        if i >= start + window - 1:
            return start
    return start if tail else None


def above(csr, mu):
    """Whether each ratio is above mu; a position without verdicts is not.

    >>> above([0.95, None, 0.9], 0.9)
    [True, False, False]
    """
    return [ratio is not None and ratio > mu for ratio in csr]


def below(csr, eta):
    """Whether each ratio is below eta; a position without verdicts is not."""
    return [ratio is not None and ratio < eta for ratio in csr]


# -------------------------------------------------------------------------------- trace by trace

def curves(records, traces, steps, verdicts, tokenizer, mu, eta, window):
    """The `trace_curve` of each trace that has CSR records."""
    measured = defaultdict(list)
    for record in records:
        measured[record["trace"]].append(record)
    steps_of = steps_by_trace(steps)
    verdict_of = ByTrace({verdict["id"]: verdict for verdict in verdicts})
    rows = []
    for trace in traces:
        key = trace["id"]
        if key in measured:
            along = sorted(measured[key], key=lambda record: record["i"])
            starts = step_starts(tokenizer, trace, steps_of[key])
            rows.append(trace_curve(
                trace, steps_of[key], starts, verdict_of[key], along, mu, eta, window))
    return rows


def trace_curve(trace, steps, starts, verdict, records, mu, eta, window):
    """The record of a trace: what Figure 5a shows of it, and what triggers are mined from.

    records: the trace's CSR records, positions rising. Returns {"id", "prompt_id", "safe": verdict
    on the trace itself, "steps": texts, "starts": token at which each step begins and, last, the
    end of the reasoning, "cue": number of the cue step or None, "cue_token", "positions", "csr",
    "low", "high", "verdicts": an entry for each position, "safety", "unsafe": turning points or
    None, "safety_full", "unsafe_full": the same where only windows that end within the reasoning
    count, "trigger": number of the step that the safety turning point falls in, or None}.
    """
    positions = [record["i"] for record in records]
    columns = {}
    for key in ("csr", "low", "high", "verdicts"):
        columns[key] = [record[key] for record in records]
    is_safe = above(columns["csr"], mu)
    is_unsafe = below(columns["csr"], eta)
    safety = turning_point(positions, is_safe, window)
    cue = verdict["cue"] or None
    return {
        "id": trace["id"],
        "prompt_id": trace["prompt_id"],
        "safe": verdict["reasoning_safe"],
        "steps": steps,
        "starts": starts,
        "cue": cue,
        "cue_token": starts[cue - 1] if cue else None,
        "positions": positions,
        **columns,
        "safety": safety,
        "safety_full": turning_point(positions, is_safe, window, tail=False),
        "unsafe": turning_point(positions, is_unsafe, window),
        "unsafe_full": turning_point(positions, is_unsafe, window, tail=False),
        "trigger": step_at(starts, safety),
    }


def step_at(starts, position):
    """Number of the step with the last token of a prefix; None without a token or a position.

    >>> step_at([0, 2, 5], 2), step_at([0, 2, 5], 3), step_at([0, 2, 5], 0), step_at([0, 2], None)
    (1, 2, None, None)
    """
    if not position:
        return None
    number = sum(start < position for start in starts[:-1])
    return number or None


# ------------------------------------------------------------------------------- over all traces

def turning_point_estimates(rows, mu, eta, window, continuations=None, tail=True, draws=2000):
    """Shares of traces that turn, and how the first cue correlates with the unsafe turning point.

    continuations: use only the first of each position. Returns the estimates by name
    ("safe_with_turning_point", "unsafe_with_turning_point", "pearson", "spearman") and the points
    of Figure 5b: (cue's token, unsafe turning point) of each unsafe trace that has both.
    """
    # Equation 2 on safe traces.
    safe_rows = [row for row in rows if row["safe"] is True]
    safe_turned = []
    for row in safe_rows:
        holds = above(ratios(row, continuations), mu)
        turn = turning_point(row["positions"], holds, window, tail)
        safe_turned.append(turn is not None)

    # Equation 3 on unsafe ones, and the position of their first cue.
    unsafe_rows = [row for row in rows if row["safe"] is False]
    unsafe_turned = []
    points = []
    point_prompts = []
    for row in unsafe_rows:
        holds = below(ratios(row, continuations), eta)
        turn = turning_point(row["positions"], holds, window, tail)
        unsafe_turned.append(turn is not None)
        if turn is not None and row["cue"]:
            points.append((row["cue_token"], turn))
            point_prompts.append(row["prompt_id"])

    cue_tokens = [cue for cue, _ in points]
    turns = [turn for _, turn in points]
    estimates = {
        "safe_with_turning_point": mean_estimate(safe_turned, prompt_ids_of(safe_rows), draws),
        "unsafe_with_turning_point": mean_estimate(
            unsafe_turned, prompt_ids_of(unsafe_rows), draws),
        **correlations(cue_tokens, turns, point_prompts, draws),
    }
    return estimates, points


def ratios(row, continuations=None):
    """CSR at each position of a curve, of its first `continuations` only if that is given."""
    if continuations is None:
        return row["csr"]
    return [safety_ratio(verdicts[:continuations])["csr"] for verdicts in row["verdicts"]]


def mean_csr_around(rows, safe):
    """Mean CSR by distance from where the trigger (safe traces) or the cue (unsafe ones) begins.

    Returns {"offsets": tokens, "csr": an estimate for each}; None where no trace has such a step.
    """
    key = "trigger" if safe else "cue"
    chosen = [row for row in rows if row["safe"] is safe and row[key]]
    if not chosen:
        return None
    offsets = list(range(-SPAN, SPAN + 1))
    table = np.full((len(chosen), len(offsets)), np.nan)  # (traces, offsets)
    for cells, row in zip(table, chosen):
        anchor = row["starts"][row[key] - 1]
        for i, csr in zip(row["positions"], row["csr"]):
            offset = i - anchor
            if abs(offset) <= SPAN and csr is not None:
                cells[offset + SPAN] = csr
    return {"offsets": offsets, "csr": column_estimates(table, prompt_ids_of(chosen))}


def sensitivity(rows, mu, eta, window):
    """Rows of estimates at other thresholds, windows and numbers of continuations."""
    most = most_continuations(rows)
    thresholds = {(mu, eta), (0.8, 0.2), (0.9, 0.1), (0.95, 0.05)}
    windows = {window, 1, 5, 15, 30}
    counts = {most}
    counts.update(n for n in (8, 32, 128) if n < most)
    table = []
    # Few draws, because there are many rows and two digits of an interval will do.
    for (m, e), w, n in product(sorted(thresholds), sorted(windows), sorted(counts)):
        estimates, _ = turning_point_estimates(rows, m, e, w, n, draws=300)
        table.append({"mu": m, "eta": e, "window": w, "continuations": n, **estimates})
    return table


def most_continuations(rows):
    """The largest number of continuations at any position."""
    return max(len(verdicts) for row in rows for verdicts in row["verdicts"])


def correlation_by_chance(rows, draws=2000, seed=0):
    """Pearson's R of first cue and unsafe turning point where the two are independent.

    The cues are permuted among the traces. Returns estimates, of which `value` is the mean over
    permutations and the interval holds 95% of them: "tokens", where each keeps its position in
    tokens, and "shares", where it keeps its position as a share of the reasoning. The second is
    above 0, because in a longer trace the cue and the turning point both come later.
    """
    turned = [row for row in rows_with_turning_point(rows, "unsafe", False) if row["cue"]]
    turns = np.array([row["unsafe"] for row in turned], dtype=float)
    cues = np.array([row["cue_token"] for row in turned], dtype=float)
    lengths = np.array([row["starts"][-1] for row in turned], dtype=float)
    rng = np.random.default_rng(seed)
    by_chance = {}
    for name, units in (("tokens", np.ones(len(turned))), ("shares", lengths)):
        drawn = []
        for _ in range(draws):
            permuted = rng.permutation(cues / units) * units
            drawn.append(pearson(permuted, turns))
        by_chance[name] = coefficient_estimate(np.mean(drawn), np.array(drawn), len(turned))
    return by_chance


def summarise_turning_points(rows, mu, eta, window, mixed_prompts):
    """The summary of the study.

    mixed_prompts: how many prompts have both safe and unsafe rollouts.

    Holds mu, eta, window, continuations; how many of the `mixed_prompts` were measured, `prompts`
    (R of the most uncertain ones alone says little about the others); `by_chance`, what R is of
    independent positions; the `turning_point_estimates`, and once more as
    `full_windows`; `cue_and_turning_point`, the points of Figure 5b; `aligned`, mean CSR around
    trigger and cue; by kind of turning point `tokens_after`, quartiles, and `at_first_position`,
    where S is beyond the threshold from the start, so that nothing turned (such traces are in all
    figures); and the rows of `sensitivity`.
    """
    estimates, points = turning_point_estimates(rows, mu, eta, window)
    full_windows, _ = turning_point_estimates(rows, mu, eta, window, tail=False)
    tokens_after = {}
    at_first_position = {}
    for kind, safe in (("safety", True), ("unsafe", False)):
        turned = rows_with_turning_point(rows, kind, safe)
        after = [row["starts"][-1] - row[kind] for row in turned]
        tokens_after[kind] = np.percentile(after, (25, 50, 75)).tolist() if after else None
        at_first_position[kind] = sum(row[kind] == row["positions"][0] for row in turned)
    return {
        "mu": mu,
        "eta": eta,
        "window": window,
        "continuations": most_continuations(rows),
        "prompts": len(set(prompt_ids_of(rows))),
        "mixed_prompts": mixed_prompts,
        **estimates,
        "by_chance": correlation_by_chance(rows),
        "full_windows": full_windows,
        "cue_and_turning_point": points,
        "tokens_after": tokens_after,
        "at_first_position": at_first_position,
        "aligned": {"safe": mean_csr_around(rows, True), "unsafe": mean_csr_around(rows, False)},
        "sensitivity": sensitivity(rows, mu, eta, window),
    }


def rows_with_turning_point(rows, kind, safe):
    """Curves of safe (or unsafe) traces that have a turning point of a kind, "safety"/"unsafe"."""
    return [row for row in rows if row["safe"] is safe and row[kind] is not None]


# ------------------------------------------------------------------------------------ command line

def build_parser():
    """The command line of this study."""
    parser = study_parser(
        "turning_points",
        "Where CSR turns for good, and the cue beside it (Eq. 2, 3).",
        ("traces", "steps", "verdicts"),
    )
    parser.add_argument("--csr", required=True, help="records of studies.csr (.jsonl)")
    parser.add_argument("--model", required=True,
                        help="model that wrote the traces; only its tokenizer is loaded")
    parser.add_argument("--mu", type=float, default=0.9,
                        help="a safety turning point: CSR stays above")
    parser.add_argument("--eta", type=float, default=0.1,
                        help="an unsafe turning point: CSR stays below")
    parser.add_argument("--window", type=int, default=15, help="for so many tokens (the paper's K)")
    return parser


def main(argv=None):
    """Run this study from the command line."""
    args = build_parser().parse_args(argv)

    def work():
        traces = read_jsonl(args.traces)
        verdicts = read_jsonl(args.verdicts)
        rows = curves(
            read_jsonl(args.csr),
            traces,
            read_jsonl(args.steps),
            verdicts,
            load_tokenizer(args.model),
            args.mu,
            args.eta,
            args.window,
        )
        if not rows:
            raise InputError(f"{args.csr}: none of its traces is in {args.traces}.")
        write_jsonl(args.out, rows)
        mixed = set(prompt_ids_of(uncertain_traces(traces, verdicts, 0, 1)))
        summary = summarise_turning_points(rows, args.mu, args.eta, args.window, len(mixed))
        write_json(sidecar(args.out, "summary"), summary)
        for name in ("safe_with_turning_point", "unsafe_with_turning_point", "pearson", "spearman"):
            print(f"  {name}: {format_estimate(summary[name])}")
        whole = summary["full_windows"]["safe_with_turning_point"]
        print(f"  safe ones whose window the end does not cut short: {format_estimate(whole)}")
        for name, estimate in summary["by_chance"].items():
            print(f"  pearson by chance, {name}: {format_estimate(estimate)}")
        outcomes = [row["safe"] for row in rows]
        counts = {
            "traces": len(rows),
            "safe": outcomes.count(True),
            "safety turning points": len(rows_with_turning_point(rows, "safety", True)),
            "unsafe": outcomes.count(False),
            "unsafe turning points": len(rows_with_turning_point(rows, "unsafe", False)),
        }
        return counts, {}

    inputs = [args.model, args.csr, args.traces, args.steps, args.verdicts]
    run_stage(__file__, args.out, recorded_flags(args), inputs, work)


if __name__ == "__main__":
    exit_cleanly(main)
