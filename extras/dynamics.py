"""Turning points (Eq. 2, 3 of the paper, Figure 5) and rollout diversity (Figure 4): pure bookkeeping, seconds.

    python intervene.py turning-points --model M --traces ... --steps ... --verdicts ... --csr runs/my/csr.jsonl --out ...
    python intervene.py diversity      --traces ... --verdicts ... --out runs/my/diversity.jsonl

As in `extras/mining.py` and `extras/kl.py`, a command writes records to NAME.jsonl and what a figure shows to
NAME.summary.json, in estimates (`extras/estimates.py`). Positions are numbers of tokens: i stands for the prefix
z[:i] = `trace["ids"][:i]`, so a step that begins at token h has been entered from position h + 1 on.
"""
import numpy as np

import data
import model as lm_code
from extras import csr, kl, mining
from extras.csr import ratio, step_starts
from extras.estimates import SPAN, correlations, means, shares, show


def turning_point(at, holds, window, tail=True):
    """The first position from which a condition holds for `window` tokens (Eq. 2, 3); None if there is none.

    at: measured positions, rising; holds: whether the condition holds at each. CHOICE: where not every token is
    measured, the condition must hold at every measured position of the window and at the first one that lies beyond it.
    CHOICE: after the reasoning's end nothing can change, so a window that it cuts short counts; not with tail=False.

    >>> turning_point([0, 1, 2, 3, 4], [True, False, True, True, True], window=3, tail=False)
    2
    >>> turning_point([0, 1, 2, 3, 4], [True, False, True, True, True], window=4, tail=False)  # ends too early
    >>> turning_point([0, 9, 30, 43, 60], [True, False, True, True, False], window=15)  # 14 tokens were not enough
    >>> turning_point([0, 9, 30, 44, 60], [True, False, True, True, False], window=15)
    30
    """
    start = None
    for i, ok in zip(at, holds):
        start = None if not ok else i if start is None else start
        if ok and i >= start + window - 1:
            return start
    return start if tail else None


def above(csr, mu):
    """Whether each ratio is above mu; a position without verdicts is not.

    >>> above([0.95, None, 0.9], 0.9)
    [True, False, False]
    """
    return [s is not None and s > mu for s in csr]


def below(csr, eta):
    """Whether each ratio is below eta; a position without verdicts is not."""
    return [s is not None and s < eta for s in csr]


def curves(records, traces, steps, verdicts, tokenizer, mu, eta, window):
    """For each trace with CSR records what its figure shows (5a), and what mining starts from.

    {"id", "prompt_id", "safe": verdict on the trace itself, "steps": texts, "starts": token at which each step begins
    and, last, the reasoning's end, "cue": number of the cue step or None, "cue_token", "positions", "csr", "low",
    "high", "verdicts": one entry a position, "safety", "unsafe": turning points or None, "safety_full", "unsafe_full":
    the same where only windows that end within the reasoning count, "trigger": number of the step that the safety
    turning point falls in, the one with the prefix's last token; None also where S is above mu before any token}.
    """
    found, steps, verdicts = {}, {s["id"]: s["steps"] for s in steps}, {v["id"]: v for v in verdicts}
    for r in records:
        found.setdefault(r["trace"], []).append(r)
    rows = []
    for t in (t for t in traces if t["id"] in found):
        at, v = sorted(found[t["id"]], key=lambda r: r["i"]), verdicts[t["id"]]
        starts, i, csr = step_starts(tokenizer, t, steps[t["id"]]), [r["i"] for r in at], [r["csr"] for r in at]
        row = {"id": t["id"], "prompt_id": t["prompt_id"], "safe": v["reasoning_safe"], "steps": steps[t["id"]],
               "starts": starts, "cue": v["cue"] or None, "cue_token": starts[v["cue"] - 1] if v["cue"] else None,
               "positions": i, **{k: [r[k] for r in at] for k in ("csr", "low", "high", "verdicts")}}
        for kind, holds in (("safety", above(csr, mu)), ("unsafe", below(csr, eta))):
            row[kind] = turning_point(i, holds, window)
            row[kind + "_full"] = turning_point(i, holds, window, tail=False)
        row["trigger"] = row["safety"] and sum(s < row["safety"] for s in starts[:-1]) or None
        rows.append(row)
    return rows


def share_and_cues(rows, mu, eta, window, n=None, tail=True, draws=2000):
    """Share of safe traces with a safety turning point, of unsafe ones with an unsafe one, and the cue's correlations.

    n: use only the first n continuations of each position. Returns estimates by name, and the points of Figure 5b:
    [cue's token, unsafe turning point] of each unsafe trace that has both.
    """
    result, cues, turns, prompts = {}, [], [], []
    for safe, name in ((True, "safe_with_turning_point"), (False, "unsafe_with_turning_point")):
        some, found = [r for r in rows if r["safe"] is safe], []
        for r in some:
            csr = [ratio(v[:n])["csr"] for v in r["verdicts"]] if n else r["csr"]
            at = turning_point(r["positions"], above(csr, mu) if safe else below(csr, eta), window, tail)
            found.append(at is not None)
            if not safe and at is not None and r["cue"]:
                cues, turns, prompts = cues + [r["cue_token"]], turns + [at], prompts + [r["prompt_id"]]
        result[name] = shares(found, [r["prompt_id"] for r in some], draws)[0] if some else None
    return {**result, **correlations(cues, turns, prompts, draws)}, list(zip(cues, turns))


def aligned(rows, safe):
    """Mean CSR by distance from where the trigger step (safe traces) or the cue (unsafe ones) begins.

    Returns {"offsets": tokens, "csr": an estimate for each}; None where no trace has such a step.
    """
    offsets = np.arange(-SPAN, SPAN + 1)
    some = [(r, r["starts"][step - 1]) for r in rows if r["safe"] is safe and (step := r["trigger" if safe else "cue"])]
    if not some:
        return None
    table = np.full((len(some), len(offsets)), np.nan)
    for row, (r, anchor) in zip(table, some):
        for i, s in zip(r["positions"], r["csr"]):
            if abs(i - anchor) <= SPAN and s is not None:
                row[i - anchor + SPAN] = s
    return {"offsets": offsets.tolist(), "csr": means(table, [r["prompt_id"] for r, _ in some])}


def sensitivity(rows, mu, eta, window):
    """The figures again for other mu, eta, windows and numbers of continuations, each combination a row (300 draws)."""
    most = max(len(v) for r in rows for v in r["verdicts"])
    grid = [(m, e, w, n) for m, e in {(mu, eta), (0.8, 0.2), (0.9, 0.1), (0.95, 0.05)}
            for w in {window, 1, 5, 15, 30} for n in {most, *(k for k in (8, 32, 128) if k < most)}]
    return [{"mu": m, "eta": e, "window": w, "continuations": n, **share_and_cues(rows, m, e, w, n, draws=300)[0]}
            for m, e, w, n in sorted(grid)]


def run_turning_points(args):
    """Stage `turning-points`. Records: see `curves`. The summary holds mu, eta, window, continuations; the estimates of
    `share_and_cues`, once more as `full_windows`; `cue_and_turning_point`, the points of Figure 5b; `aligned`: {"safe",
    "unsafe"}; by kind of turning point `tokens_after`, quartiles, and `at_first_position`, where S has been beyond the
    threshold from the start, so that nothing turned (such traces are in all figures); and the rows of `sensitivity`."""
    traces, verdicts = data.read_jsonl(args.traces), data.read_jsonl(args.verdicts)
    settings = {"mu": args.mu, "eta": args.eta, "window": args.window}
    rows = curves(data.read_jsonl(args.csr), traces, data.read_jsonl(args.steps), verdicts,
                  lm_code.load_tokenizer(args.model), **settings)
    if not rows:
        raise SystemExit(f"{args.csr}: none of its traces is in {args.traces}.")
    figures, points = share_and_cues(rows, **settings)
    turned = {kind: [r for r in rows if r["safe"] is safe and r[kind] is not None]
              for kind, safe in (("safety", True), ("unsafe", False))}
    data.write_jsonl(args.out, rows)
    data.write_json(data.beside(args.out, "summary"), {
        **settings, "continuations": max(len(v) for r in rows for v in r["verdicts"]), **figures,
        "full_windows": share_and_cues(rows, **settings, tail=False)[0], "cue_and_turning_point": points,
        "tokens_after": {k: np.percentile([r["starts"][-1] - r[k] for r in some], (25, 50, 75)).tolist() if some else None
                         for k, some in turned.items()},
        "at_first_position": {k: sum(r[k] == r["positions"][0] for r in some) for k, some in turned.items()},
        "aligned": {"safe": aligned(rows, True), "unsafe": aligned(rows, False)},
        "sensitivity": sensitivity(rows, **settings)})
    for name, e in figures.items():
        print(f"  {name}: {show(e)}")
    return {"traces": len(rows), "safe": sum(r["safe"] is True for r in rows),
            "safety turning points": len(turned["safety"]), "unsafe": sum(r["safe"] is False for r in rows),
            "unsafe turning points": len(turned["unsafe"])}, {}


# ------------------------------------------------------------------------------------------------ rollout diversity

def diversity(traces, verdicts):
    """How many rollouts of each prompt have safe reasoning (Figure 4): [{"id": prompt, "safe", "judged", "rollouts"}]."""
    safe, found = {v["id"]: v["reasoning_safe"] for v in verdicts}, {}
    for t in traces:
        found.setdefault(t["prompt_id"], []).append(safe[t["id"]])
    return [{"id": p, "safe": v.count(True), "judged": len(v) - v.count(None), "rollouts": len(v)} for p, v in found.items()]


def run_diversity(args):
    """Stage `diversity`. The summary: `rollouts` a prompt, `histogram`: an estimate of the share of prompts with 0, 1, ...
    safe ones, `counts` the same as numbers; `one_at_most`. Prompts with unjudged rollouts are left out and counted."""
    rows = diversity(data.read_jsonl(args.traces), data.read_jsonl(args.verdicts))
    most = max(r["rollouts"] for r in rows)
    some = [r for r in rows if r["judged"] == most]
    table = [[r["safe"] == k for k in range(most + 1)] + [r["safe"] <= 1] for r in some]
    *histogram, one_at_most = shares(table, [r["id"] for r in some]) if some else [None] * (most + 2)
    data.write_jsonl(args.out, rows)
    data.write_json(data.beside(args.out, "summary"), {
        "rollouts": most, "counts": [sum(r["safe"] == k for r in some) for k in range(most + 1)], "histogram": histogram,
        "one_at_most": one_at_most, "left_out": len(rows) - len(some)})
    return {"prompts": len(rows), "all judged": len(some), "none safe": sum(r["safe"] == 0 for r in some),
            "mixed": sum(0 < r["safe"] < most for r in some), "all safe": sum(r["safe"] == most for r in some)}, {}


def turning_point_flags(p):
    p.add_argument("--csr", required=True, help="records of stage csr (.jsonl)")
    p.add_argument("--model", required=True, help="model that wrote the traces; only its tokenizer is loaded")
    p.add_argument("--mu", type=float, default=0.9, help="a safety turning point: CSR stays above")
    p.add_argument("--eta", type=float, default=0.1, help="an unsafe turning point: CSR stays below")
    p.add_argument("--window", type=int, default=15, help="for so many tokens (the paper's K)")


STAGES = {  # all of the analysis
    **csr.STAGES,
    "turning-points": (run_turning_points, "where CSR turns for good, and the cue beside it (Eq. 2, 3)",
                       ("traces", "steps", "verdicts"), turning_point_flags),
    **mining.STAGES, **kl.STAGES,
    "diversity": (run_diversity, "how many rollouts of each prompt are safe (Figure 4)", ("traces", "verdicts"))}
