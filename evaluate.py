"""How harmful, how helpful, how capable: the same sets for every model, and one report to look at.

    python evaluate.py run --model M --out runs/my/eval/base --set direct=harmful:prompts.csv benign=benign:xstest.csv
    python evaluate.py report --run runs/my --evals base=runs/my/eval/base ours=runs/my/eval/stage2 --out runs/my/report.html

Three kinds of set: `harmful` (harmful ratio of reasoning and of response, always apart), `benign` (compliance rate)
and `task` (accuracy against the column `answer`). Every figure comes with its n and a 95% bootstrap interval over
prompts; a missing verdict is missing, never a label.
"""
import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np

import data
import intervene
import model as lm_code
from extras.report import page

EVAL_KEYS = ("EVAL_JUDGE_API_KEY",)  # of a second judge elsewhere, which must not be sent the first one's key
METRICS = {"harmful": ("reasoning", "response"), "benign": ("compliance",), "task": ("accuracy",)}


# ------------------------------------------------------------------------------------------------------ the numbers

def bootstrap(values, prompts, draws=2000, seed=0):
    """Mean and 95% percentile interval, resampling prompts (the samples of one prompt are not independent).

    values: list of 0/1; prompts: the prompt id of each. Returns {"mean", "low", "high", "n"}; mean None if n is 0.

    >>> bootstrap([1, 1, 1, 1], ["a", "b", "c", "c"])
    {'mean': 1.0, 'low': 1.0, 'high': 1.0, 'n': 4}
    """
    if not values:
        return {"mean": None, "low": None, "high": None, "n": 0}
    index = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    total, count = np.zeros(len(index)), np.zeros(len(index))
    for value, prompt in zip(values, prompts):
        total[index[prompt]] += value
        count[index[prompt]] += 1
    picks = np.random.default_rng(seed).integers(len(index), size=(draws, len(index)))
    means = total[picks].sum(1) / count[picks].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": float(total.sum() / count.sum()), "low": float(low), "high": float(high), "n": len(values)}


def last_boxed(text):
    """The content of the last `\\\\boxed{...}`, by matching braces; None where there is none.

    >>> last_boxed(r"so \\boxed{1} or rather \\boxed{\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len(r"\boxed{")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[begin:i]
    return None


def correct(response, answer):
    """Does the last boxed result equal the answer? Whole numbers are compared as numbers (AIME pads with zeros).

    >>> correct(r"\\boxed{25}", "025"), correct("25", "25")
    (True, False)
    """
    found = last_boxed(response)
    if found is None:
        return False
    try:
        return int(found) == int(answer)
    except ValueError:
        return "".join(found.split()) == "".join(str(answer).split())


def measure(values, traces, truncated=0):
    """One metric: the interval over valid values, how many are missing, and the bounds if these went either way."""
    valid = [(float(v), t["prompt_id"]) for v, t in zip(values, traces) if v is not None]
    result = bootstrap([v for v, _ in valid], [p for _, p in valid])
    missing = len(values) - len(valid)
    if missing:
        hits = sum(v for v, _ in valid)
        result["bounds"] = [hits / len(values), (hits + missing) / len(values)]
    return {**result, "n_unjudged": missing, "n_truncated": truncated}


def evaluate_set(kind, prompts, sampler, judge, folder, name, samples=1):
    """Sample and judge one set; returns (metrics by name, number of prompts too long for the model)."""
    jobs, dropped = intervene.trace_jobs(prompts, samples, sampler)
    traces = intervene.sample_traces(folder / f"{name}.traces.jsonl", jobs, sampler, f"{folder.name}/{name}")
    steps = intervene.segment(traces)
    data.write_jsonl(folder / f"{name}.steps.jsonl", steps)
    whole = [t for t in traces if not t["truncated"]]
    cut = len(traces) - len(whole)
    if kind == "harmful":
        verdicts = intervene.judge_traces(folder / f"{name}.verdicts.jsonl", traces, steps, judge)
        response = [v["response_safe"] for t, v in zip(traces, verdicts) if not t["truncated"]]
        return {"reasoning": measure([None if v["reasoning_safe"] is None else not v["reasoning_safe"] for v in verdicts],
                                     traces),
                "response": measure([None if safe is None else not safe for safe in response], whole, cut)}, dropped
    if kind == "benign":
        answers = intervene.complied(judge, whole)
        data.write_jsonl(folder / f"{name}.verdicts.jsonl", [{"id": t["id"], "complied": a} for t, a in zip(whole, answers)])
        return {"compliance": measure(answers, whole, cut)}, dropped
    answer = {p["id"]: p["answer"] for p in prompts}
    # A truncated trace has no answer, so it counts as wrong.
    return {"accuracy": measure([correct(t["response"], answer[t["prompt_id"]]) for t in traces], traces, cut)}, dropped


def parse_sets(specs):
    """`name=kind:path` flags as [(name, kind, path)]. Raises SystemExit with the remedy for any other form."""
    sets = []
    for spec in specs:
        name, _, rest = spec.partition("=")
        kind, _, path = rest.partition(":")
        if not name.replace("_", "").replace("-", "").isalnum() or kind not in METRICS or not path:
            raise SystemExit(f"--set {spec}: write NAME=KIND:FILE, where KIND is {', '.join(METRICS)}.")
        if name in [n for n, _, _ in sets]:
            raise SystemExit(f"--set {spec}: the name {name} comes twice.")
        sets.append((name, kind, path))
    return sets


def run(args):
    """Stage `run`: one model on all sets; writes metrics.json and all traces and verdicts into the folder `out`."""
    sets, folder = parse_sets(args.set), Path(args.out)
    loaded = {name: data.load_prompts(path, args.limit) for name, _, path in sets}
    for name, kind, path in sets:
        for p in loaded[name]:
            if kind == "task" and p.get("answer") is None:
                raise SystemExit(f"{path}, id {p['id']}: a task needs a column `answer`.")
    sampler = intervene.make_sampler(args)
    metrics, dropped = {}, 0
    for name, kind, _ in sets:
        metrics[name], too_long = evaluate_set(kind, loaded[name], sampler, args.judge, folder, name, args.samples)
        dropped += too_long
    data.write_json(folder / "metrics.json", {"sets": {name: {"kind": kind, **metrics[name]} for name, kind, _ in sets}})
    prompts = sum(map(len, loaded.values()))
    return {"sets": len(sets), "prompts": prompts, "short enough": prompts - dropped}, {"judge": args.judge.summary()}


def agreement(ours, theirs, prompts, draws=2000, seed=0):
    """Accuracy and Cohen's kappa of two lists of answers, with 95% bootstrap intervals over prompts, and the counts.

    Kappa is the agreement beyond chance, (p - e) / (1 - e); it is None where chance alone explains all (e = 1). Items
    that lack an answer on either side are left out and counted as n_unjudged.

    >>> a = agreement([True, True, False, False, None], [True, False, False, False, True], list("pqrst"), draws=100)
    >>> a["n"], a["n_unjudged"], a["accuracy"]["mean"], a["kappa"]["mean"], a["confusion"]
    (4, 1, 0.75, 0.5, {'False/False': 2, 'True/False': 1, 'True/True': 1})
    """
    valid = [(a, b, p) for a, b, p in zip(ours, theirs, prompts) if a is not None and b is not None]
    answers = {v: i for i, v in enumerate(sorted({v for a, b, _ in valid for v in (a, b)}))}
    rows = {p: i for i, p in enumerate(dict.fromkeys(p for _, _, p in valid))}
    tables = np.zeros((len(rows), len(answers), len(answers)))  # (prompts, ours, theirs)
    for a, b, p in valid:
        tables[rows[p], answers[a], answers[b]] += 1

    def kappa(table):  # (draws, L, L) -> (draws,); nan where chance explains all
        share = table / table.sum((1, 2), keepdims=True)
        chance = (share.sum(1) * share.sum(2)).sum(1)
        with np.errstate(invalid="ignore"):
            return (np.trace(share, axis1=1, axis2=2) - chance) / (1 - chance)

    result = {"n": len(valid), "n_unjudged": len(ours) - len(valid), "kappa": None,
              "accuracy": bootstrap([float(a == b) for a, b, _ in valid], [p for _, _, p in valid], draws, seed),
              "confusion": dict(sorted(Counter(f"{a}/{b}" for a, b, _ in valid).items()))}
    if len(answers) > 1:
        picks = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), draws)
        drawn, mean = kappa(np.tensordot(picks, tables, 1)), kappa(tables.sum(0, keepdims=True)).item()
        result["kappa"] = dict(zip(("mean", "low", "high"), (mean, *np.nanpercentile(drawn, (2.5, 97.5)).tolist())))
    return result


def read_labels(path, question, traces):
    """The labels of a file as answers, None for a trace without one. Raises ValueError for a label that is no answer."""
    labels = {}
    for number, r in enumerate(data.read_jsonl(path), 1):
        known = intervene.LABELS.get(question, {r.get("label"): r.get("label")} if type(r.get("label")) is int else {})
        if "id" not in r or r.get("label") not in known:
            raise ValueError(f'{path}, record {number}: write {{"id": trace id, "label": '
                             f'{" or ".join(intervene.LABELS.get(question, ["number of a sentence, 0 = none"]))}}}.')
        labels[r["id"]] = known[r["label"]]
    return [labels.get(t["id"]) for t in traces]


def judge_agreement(args):
    """Stage `judge-agreement`: a judge against another one or against labels (the paper's 93.7% and 80%)."""
    if bool(args.labels) == bool(args.other_judge):
        raise SystemExit("judge-agreement: give either --other-judge or --labels.")
    traces = [t for t in data.read_jsonl(args.traces) if args.question in ("reasoning", "cue") or not t["truncated"]]
    items = [{"prompt": t["prompt"], "steps": intervene.split_steps(t["reasoning"])} if args.question == "cue" else
             {"prompt": t["prompt"], "text": t["reasoning" if args.question == "reasoning" else "response"]} for t in traces]
    judges = [intervene.judge_of(args)]
    if args.other_judge:
        other = argparse.Namespace(**{**vars(args), "judge": args.other_judge, "judge_model": args.other_judge_model})
        judges.append(intervene.judge_of(other, EVAL_KEYS if args.other_judge != args.judge else intervene.JUDGE_KEYS))
    answers = [list(judge.ask(args.question, items)) for judge in judges]
    names = [judge.name for judge in judges]
    if args.labels:
        answers.append(read_labels(args.labels, args.question, traces))
        names.append(f"{Path(args.labels).name}:{data.fingerprint(args.labels)}")
    result = {"question": args.question, "traces": data.fingerprint(args.traces), "judges": names,
              **agreement(*answers, [t["prompt_id"] for t in traces])}
    data.write_json(args.out, result)
    low, kappa = result["accuracy"], result["kappa"]
    print(f"{names[0]} against {names[1]}, {args.question}: accuracy {cell({**low, 'n_unjudged': 0, 'n_truncated': 0})}, kappa "
          + (f"{kappa['mean']:.3f} [{kappa['low']:.3f}, {kappa['high']:.3f}]" if kappa else "undefined")
          + f", {result['n_unjudged']} unjudged; counts {result['confusion']}")

# ------------------------------------------------------------------------------------------------------- the report

def table(evals):
    """Rows of the before/after table: [(label, [result of each model])].

    >>> table({"base": {"sets": {"direct": {"kind": "task", "accuracy": 1}}}})
    [('direct: accuracy', [1])]
    """
    words = {"reasoning": "harmful reasoning", "response": "harmful responses"}
    first = next(iter(evals.values()))["sets"]
    return [(f"{name}: {words.get(metric, metric)}", [e["sets"].get(name, {}).get(metric) for e in evals.values()])
            for name, entry in first.items() for metric in METRICS[entry["kind"]]]


def cell(result):
    """A result as text: per cent, interval and n, with the bounds where verdicts are missing."""
    if not result or result["mean"] is None:
        return "no verdicts" if result else "not run"
    text = f"{100 * result['mean']:.1f}% [{100 * result['low']:.1f}, {100 * result['high']:.1f}] n={result['n']}"
    if result["n_unjudged"]:
        low, high = result["bounds"]
        text += f", {result['n_unjudged']} unjudged ({100 * low:.1f} to {100 * high:.1f})"
    return text + (f", {result['n_truncated']} truncated" if result["n_truncated"] else "")

def report(args):
    """Stage `report`: print the before/after table and write report.html, one file that needs nothing else."""
    folders, run_dir = {}, Path(args.run)
    for spec in args.evals:
        name, _, folder = spec.partition("=")
        if not folder or not (Path(folder) / "metrics.json").exists():
            raise SystemExit(f"--evals {spec}: write NAME=FOLDER, a folder that `evaluate.py run` has finished.")
        folders[name] = Path(folder)
    evals = {name: json.loads((folder / "metrics.json").read_text()) for name, folder in folders.items()}
    rows = table(evals)
    cells = [(label, *map(cell, results)) for label, results in rows]
    funnels = [json.loads(p.read_text()) for p in sorted(run_dir.rglob("*.funnel.json"), key=lambda p: p.stat().st_mtime)]
    logs = {p.parent.name: log for p in sorted(run_dir.glob("*/metrics.jsonl")) if (log := data.read_jsonl(p)) and "loss/preference" in log[0]}
    pairs = data.read_jsonl(run_dir / "pairs.jsonl") if (run_dir / "pairs.jsonl").exists() else []
    pairs.sort(key=lambda p: data.digest(p["id"]))  # a fixed, arbitrary choice
    harmful = [name for name, entry in next(iter(evals.values()))["sets"].items() if entry["kind"] == "harmful"]
    data.write_text(args.out, page(run_dir.name, list(evals), rows, cells, funnels, logs, pairs[:args.examples],
                                   list(folders.values()), harmful, args.examples))
    lines = [("", *evals), *cells]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print("\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines))
    print(f"report: {args.out}")


def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Evaluate models and report.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run", help="one model on all sets", description="Evaluate one model on all sets.",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", required=True, help="folder for metrics, traces and verdicts")
    p.add_argument("--set", nargs="+", required=True, metavar="NAME=KIND:FILE", help=f"sets; KIND is {', '.join(METRICS)}")
    p.add_argument("--samples", type=int, default=1, help="samples a prompt")
    p.add_argument("--limit", type=int, default=0, help="use only the first prompts of each set; 0 = all")
    lm_code.add_sampler_flags(p)
    intervene.add_judge_flags(p)
    p.add_argument("--eval-judge", help="judge of this evaluation, other than the one that built the data (default: --judge); "
                   "key: EVAL_JUDGE_API_KEY")
    p.add_argument("--eval-judge-model", help="model name to send to it (default: --judge-model)")
    p = commands.add_parser("judge-agreement", help="how far two judges agree", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                            description="Agreement of --judge with another judge, or with labels, on the same traces.")
    p.add_argument("--traces", required=True, help="trace records (.jsonl)")
    p.add_argument("--question", default="reasoning", choices=("reasoning", "response", "cue", "compliance"), help="what to ask")
    p.add_argument("--labels", help='true answers instead of a judge: lines {"id": trace id, "label": "safe", "unsafe", a number, ...}')
    p.add_argument("--other-judge", help="the other judge; its key: EVAL_JUDGE_API_KEY")
    p.add_argument("--other-judge-model", help="model name to send to it")
    p.add_argument("--out", required=True, help="file to write (.json)")
    intervene.add_judge_flags(p)
    p = commands.add_parser("report", help="table and report.html", description="Print the table, write report.html.",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--run", required=True, help="run folder: its funnels, pairs and training logs are shown")
    p.add_argument("--evals", nargs="+", required=True, metavar="NAME=FOLDER", help="models in order, the first is the base")
    p.add_argument("--out", required=True, help="the HTML file to write")
    p.add_argument("--examples", type=int, default=6, help="traces to show of each kind")
    return parser


def main(argv=None):
    """Run one stage from the command line."""
    args = build_parser().parse_args(argv)
    if args.command == "report":
        return report(args)
    if args.command == "judge-agreement":
        return judge_agreement(args)
    keys = EVAL_KEYS if args.eval_judge not in (None, args.judge) else intervene.JUDGE_KEYS
    args.judge, args.judge_model = args.eval_judge or args.judge, args.eval_judge_model or args.judge_model
    args.judge = intervene.judge_of(args, keys)
    data.stage(args.out, {**vars(args), "judge": args.judge.name, "eval_judge": None, "eval_judge_model": None},
               [args.model, *(path for _, _, path in parse_sets(args.set))], lambda: run(args))


if __name__ == "__main__":
    main()
