"""How harmful, how helpful, how capable: the same sets for every model, and one report to look at.

    python evaluate.py run --model M --out runs/my/eval/base --set direct=harmful:prompts.csv benign=benign:xstest.csv
    python evaluate.py report --run runs/my --evals base=runs/my/eval/base ours=runs/my/eval/stage2 --out runs/my/report.html

Three kinds of set: `harmful` (harmful ratio of reasoning and of response, always apart), `benign` (compliance rate)
and `task` (accuracy against the column `answer`). Every figure comes with its n and a 95% bootstrap interval over
prompts; a missing verdict is missing, never a label.
"""
import argparse
import base64
import io
import json
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np

import data
import intervene

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
    return {"sets": len(sets), "prompts": prompts, "short enough": prompts - dropped}


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
    """Rows of the before/after table: [(set, metric, [result of each model])]."""
    first = next(iter(evals.values()))["sets"]
    return [(name, metric, [e["sets"].get(name, {}).get(metric) for e in evals.values()])
            for name, entry in first.items() for metric in METRICS[entry["kind"]]]


def label(name, metric):
    """What a row is called.

    >>> label("direct", "reasoning")
    'direct: harmful reasoning'
    """
    return f"{name}: " + {"reasoning": "harmful reasoning", "response": "harmful responses"}.get(metric, metric)


def cell(result):
    """A result as text: per cent, interval and n, with the bounds where verdicts are missing."""
    if not result or result["mean"] is None:
        return "no verdicts" if result else "not run"
    text = f"{100 * result['mean']:.1f}% [{100 * result['low']:.1f}, {100 * result['high']:.1f}] n={result['n']}"
    if result["n_unjudged"]:
        low, high = result["bounds"]
        text += f", {result['n_unjudged']} unjudged ({100 * low:.1f} to {100 * high:.1f})"
    return text + (f", {result['n_truncated']} truncated" if result["n_truncated"] else "")


def text_table(evals):
    """The table for a terminal."""
    rows = [("", *evals)] + [(label(name, metric), *map(cell, results)) for name, metric, results in table(evals)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows)


def figure(draw):
    """Draw with matplotlib into one <img>; a note instead where matplotlib is missing."""
    try:
        import matplotlib
        matplotlib.use("svg")
        from matplotlib import pyplot as plt
    except ImportError:
        return "<p class=note>No figure: matplotlib is missing (<code>pip install -e '.[figures]'</code>).</p>"
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "ipo"}):
        fig = draw(plt)
        buffer = io.BytesIO()
        fig.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(fig)
    return f'<img alt="figure" src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


COLOURS = ("#9aa3ad", "#e2a33b", "#2f7d5b", "#4a6fb5", "#8a5aa8")


def draw_table(plt, evals):
    """Bars of every metric for every model, with intervals."""
    rows = [r for r in table(evals) if any(x and x["mean"] is not None for x in r[2])]
    fig, ax = plt.subplots(figsize=(9, 0.75 * len(rows) + 0.8))
    height = 0.8 / len(evals)
    for k, model in enumerate(evals):
        for i, (_, _, results) in enumerate(rows):
            x = results[k]
            if x and x["mean"] is not None:
                mean, low, high = 100 * x["mean"], 100 * x["low"], 100 * x["high"]
                ax.barh(i + k * height, mean, height * 0.9, color=COLOURS[k % len(COLOURS)], label=model if i == 0 else None)
                ax.errorbar(mean, i + k * height, xerr=[[max(0, mean - low)], [max(0, high - mean)]], color="#222", lw=1)
    ax.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [label(n, m) for n, m, _ in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, 101)
    ax.set_xlabel("% (95% interval)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(evals), frameon=False)
    return fig


def draw_training(plt, logs):
    """Loss, accuracy and rewards over the steps of each training stage, one after the other."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 2.8))
    start = 0
    for k, (name, log) in enumerate(logs.items()):
        x = [start + line["step"] + 1 for line in log]
        axes[0].plot(x, [line["loss/preference"] for line in log], color=COLOURS[(k + 1) % len(COLOURS)], label=name)
        for key, style in (("rewards/chosen", "-"), ("rewards/rejected", ":")):
            axes[1].plot(x, [line[key] for line in log], style, color=COLOURS[(k + 1) % len(COLOURS)], label=f"{name} {key.split('/')[1]}")
        start += len(log)
    axes[0].set(title="preference loss (log 2 at first)", xlabel="step")
    axes[1].set(title="rewards of chosen and rejected", xlabel="step")
    for ax in axes:
        ax.legend(frameon=False, fontsize=8)
    return fig


def draw_funnel(plt, counts):
    """Where the prompts of the intervention stage went."""
    fig, ax = plt.subplots(figsize=(9, 0.33 * len(counts) + 0.4))
    ax.barh(list(counts), list(counts.values()), color=COLOURS[3])
    ax.bar_label(ax.containers[0], padding=3)
    ax.invert_yaxis()
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)
    return fig


def step_lines(text, kind, first_kind=None, start=1):
    """Sentences of a text as numbered lines of one colour; the first may have a colour of its own."""
    return "".join(f'<li value="{start + i}" class="{first_kind if i == 0 and first_kind else kind}">{escape(s.strip())}</li>'
                   for i, s in enumerate(s for s in intervene.split_steps(text) if s.strip()))


def pair_card(pair):
    """One intervention: the original trace and the corrected one, with prefix, cue, trigger and continuation coloured."""
    trace = intervene.lm_code.split_reasoning
    def column(title, suffix, kind, marked):
        rest = suffix
        head = ""
        if kind == "kept":  # the corrected side begins with the trigger, which is known to the letter
            position = suffix.find(pair["trigger"]) + len(pair["trigger"])
            head, rest = suffix[:position], suffix[position:]
        t = trace(rest)
        n = len(intervene.split_steps(pair["prefix"])) + 1
        lines = step_lines(pair["prefix"], "prefix")
        if head:
            lines += step_lines(head, marked, start=n)
            lines += step_lines(t.reasoning, kind, start=n + 1)
        else:
            lines += step_lines(t.reasoning, kind, marked, start=n)
        return (f"<div><h4>{title}</h4><ol>{lines}</ol><p class='response {kind}'>{escape(t.response)}</p></div>")
    return (f"<article><p class=prompt>{escape(pair['prompt'])}</p><div class=columns>"
            f"{column('original (rejected)', pair['rejected'], 'bad', 'cue')}"
            f"{column('intervened (chosen)', pair['chosen'], 'kept', 'trigger')}</div></article>")


def before_after(folders, set_name, count):
    """Held-out prompts of a harmful set as the first and the last model answer them, step by step with verdicts."""
    loaded = []
    if not all((folder / f"{set_name}.verdicts.jsonl").exists() for folder in (folders[0], folders[-1])):
        return "<p class=note>Not run on both models.</p>"
    for folder in (folders[0], folders[-1]):
        read = lambda kind: {r["id"]: r for r in data.read_jsonl(folder / f"{set_name}.{kind}.jsonl")}
        loaded.append((read("traces"), read("steps"), read("verdicts")))
    cards = []
    ids = sorted(loaded[0][0], key=lambda id: data.digest(id))  # a fixed, arbitrary choice, not the prettiest ones
    for id in ids[:count]:
        columns = ""
        for title, (traces, steps, verdicts) in zip(("before", "after"), loaded):
            if id not in traces:
                continue
            t, v, cue = traces[id], verdicts[id], verdicts[id]["cue"] or 0
            kinds = ["cue" if i == cue else "bad" if cue and i > cue else "prefix" for i in range(1, len(steps[id]["steps"]) + 1)]
            lines = "".join(f'<li class="{k}">{escape(s.strip())}</li>' for k, s in zip(kinds, steps[id]["steps"]))
            said = {True: "safe", False: "unsafe", None: "unjudged"}
            columns += (f"<div><h4>{title}: reasoning {said[v['reasoning_safe']]}, response "
                        f"{'truncated' if t['truncated'] else said[v['response_safe']]}</h4><ol>{lines}</ol>"
                        f"<p class=response>{escape(t['response'])}</p></div>")
        cards.append(f"<article><p class=prompt>{escape(traces[id]['prompt'] if id in traces else id)}</p>"
                     f"<div class=columns>{columns}</div></article>")
    return "".join(cards)


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2329;background:#fafaf8;margin:0 auto;max-width:1080px;padding:2rem 1.2rem}
h1{font-size:1.7rem;margin:0 0 .2rem}h2{font-size:1.2rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #ddd}
h4{margin:.2rem 0;font-size:.85rem;color:#5a646e}table{border-collapse:collapse;width:100%;background:#fff}
td,th{text-align:left;padding:.4rem .6rem;border-bottom:1px solid #e6e6e2;font-variant-numeric:tabular-nums}
img{max-width:100%;background:#fff}article{background:#fff;border:1px solid #e3e3de;border-radius:8px;padding:.8rem 1rem;margin:.8rem 0}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:1.2rem}.prompt{font-weight:600;margin:.1rem 0 .5rem}
ol{margin:.3rem 0;padding-left:1.8rem}li{margin:.15rem 0;padding:.05rem .3rem;border-radius:4px}.prefix{color:#5a646e}
.cue{background:#ffd9d2;font-weight:600}.bad{background:#fff1ee}.trigger{background:#cfe3ff;font-weight:600}.kept{background:#e9f6ee}
.response{border-top:1px dashed #ccc;margin:.5rem 0 0;padding:.4rem .3rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
.note{color:#6a737c}pre{background:#f0f0ec;padding:.8rem;overflow-x:auto;border-radius:6px;font-size:13px}
.legend span{padding:.1rem .5rem;border-radius:4px;margin-right:.5rem}
"""


def report(args):
    """Stage `report`: print the before/after table and write report.html, one file that needs nothing else."""
    run_dir = Path(args.run)
    folders = {}
    for spec in args.evals:
        name, _, folder = spec.partition("=")
        if not folder or not (Path(folder) / "metrics.json").exists():
            raise SystemExit(f"--evals {spec}: write NAME=FOLDER, a folder that `evaluate.py run` has finished.")
        folders[name] = Path(folder)
    evals = {name: json.loads((folder / "metrics.json").read_text()) for name, folder in folders.items()}
    funnels = [json.loads(p.read_text()) for p in sorted(run_dir.rglob("*.funnel.json"), key=lambda p: p.stat().st_mtime)]
    logs = {p.parent.name: log for p in sorted(run_dir.glob("*/metrics.jsonl")) if (log := data.read_jsonl(p)) and "loss/preference" in log[0]}
    pairs = [f for f in funnels if f["stage"] == "pairs"]
    examples = data.read_jsonl(run_dir / "pairs.jsonl") if (run_dir / "pairs.jsonl").exists() else []
    examples.sort(key=lambda p: data.digest(p["id"]))
    harmful = [name for name, entry in next(iter(evals.values()))["sets"].items() if entry["kind"] == "harmful"]
    rows = "".join(f"<tr><td>{escape(label(n, m))}</td>" + "".join(f"<td>{escape(cell(r))}</td>" for r in results) + "</tr>"
                   for n, m, results in table(evals))
    by_trigger = "".join(f"<tr><td>{escape(t)}</td><td>{tried}</td><td>{made}</td></tr>"
                         for f in pairs for t, (tried, made) in f.get("by_trigger", {}).items())
    body = f"""<h1>Intervened Preference Optimization</h1><p class=note>{escape(str(run_dir))}</p>
<h2>Before and after</h2><table><tr><th></th>{''.join(f'<th>{escape(n)}</th>' for n in evals)}</tr>{rows}</table>
<p class=note>Share of samples, 95% bootstrap interval over prompts, n. Harmful: lower is better; compliance, accuracy: higher.</p>
{figure(lambda plt: draw_table(plt, evals))}
<h2>Where the pairs came from</h2>{''.join(figure(lambda plt, f=f: draw_funnel(plt, f['counts'])) for f in pairs)}
<table><tr><th>safety trigger</th><th>interventions</th><th>pairs</th></tr>{by_trigger}</table>
<h2>Training</h2>{figure(lambda plt: draw_training(plt, logs)) if logs else '<p class=note>No training steps.</p>'}
<h2>Interventions: from an unsafe trace to a pair</h2><p class=legend><span class=prefix>prefix, shared</span>
<span class=cue>compliance cue</span><span class=bad>unsafe rest</span><span class=trigger>safety trigger</span>
<span class=kept>the model's own continuation</span></p>{''.join(map(pair_card, examples[:args.examples])) or '<p class=note>No pairs.</p>'}
<h2>The same prompts before and after training</h2>
{''.join(f'<h3>{escape(n)}</h3>' + before_after(list(folders.values()), n, args.examples) for n in harmful)}
<h2>All stages</h2><pre>{escape(chr(10).join(map(data.funnel_line, funnels)))}</pre>"""
    data.write_text(args.out, f"<!doctype html><html lang=en><meta charset=utf-8><title>IPO: {escape(run_dir.name)}</title>"
                              f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>{body}</html>\n")
    print(text_table(evals))
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
    intervene.add_sampler_flags(p)
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
    finished = data.begin(args.out, {**vars(args), "judge": args.judge.name, "eval_judge": None, "eval_judge_model": None},
                          [args.model, *(path for _, _, path in parse_sets(args.set))])
    if finished:
        return print(data.funnel_line(finished), "(finished before)")
    counts, judge = run(args), args.judge.summary()
    data.finish(args.out, Path(args.out).name, counts, **({"judge": judge} if judge else {}))


if __name__ == "__main__":
    main()
