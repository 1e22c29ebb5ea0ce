"""The report: one HTML file that needs nothing else, with the before/after table, figures, and traces step by step.

It only shows what the stages wrote; every number comes from `evaluate.py`. All text of models and data sets is escaped.
"""
import base64
import io
from html import escape

import data
from intervene import lm_code, split_steps

COLOURS = ("#9aa3ad", "#e2a33b", "#2f7d5b", "#4a6fb5", "#8a5aa8")
VERDICT = {True: "safe", False: "unsafe", None: "unjudged"}


# ------------------------------------------------------------------------------------------------------ the figures

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


def draw_table(plt, models, rows):
    """Bars of every metric for every model, with intervals."""
    rows = [(label, results) for label, results in rows if any(x and x["mean"] is not None for x in results)]
    fig, ax = plt.subplots(figsize=(9, 0.75 * len(rows) + 0.8))
    height = 0.8 / len(models)
    for k, model in enumerate(models):
        for i, (_, results) in enumerate(rows):
            x = results[k]
            if x and x["mean"] is not None:
                mean, low, high = 100 * x["mean"], 100 * x["low"], 100 * x["high"]
                ax.barh(i + k * height, mean, height * 0.9, color=COLOURS[k % len(COLOURS)], label=model if i == 0 else None)
                ax.errorbar(mean, i + k * height, xerr=[[max(0, mean - low)], [max(0, high - mean)]], color="#222", lw=1)
    ax.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [label for label, _ in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, 101)
    ax.set_xlabel("% (95% interval)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(models), frameon=False)
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

# ------------------------------------------------------------------------------------------------------- the traces

def card(prompt, columns):
    """A prompt with traces side by side. columns: (title, [(step, its colour)], response, the response's colour)."""
    return f"<article><p class=prompt>{escape(prompt)}</p><div class=columns>" + "".join(
        f"<div><h4>{escape(title)}</h4><ol>"
        + "".join(f'<li class="{kind}">{escape(step.strip())}</li>' for step, kind in steps if step.strip())
        + f"</ol><p class='response {kind}'>{escape(response)}</p></div>" for title, steps, response, kind in columns) + "</div></article>"


def pair_card(pair):
    """One intervention: the original trace and the corrected one, with prefix, cue, trigger and continuation coloured."""
    prefix = [(s, "prefix") for s in split_steps(pair["prefix"])]
    rejected = lm_code.split_reasoning(pair["rejected"])
    bad = [(s, "cue" if i == 0 else "bad") for i, s in enumerate(split_steps(rejected.reasoning))]
    head, trigger, rest = pair["chosen"].partition(pair["trigger"])  # the chosen side begins with it, but for white space
    chosen = lm_code.split_reasoning(rest)
    kept = [(head + trigger, "trigger"), *((s, "kept") for s in split_steps(chosen.reasoning))]
    return card(pair["prompt"], [("original (rejected)", prefix + bad, rejected.response, "bad"),
                                 ("intervened (chosen)", prefix + kept, chosen.response, "kept")])


def before_after(folders, name, count):
    """Held-out prompts of a harmful set as the first and the last model answer them, step by step with verdicts."""
    if not all((folder / f"{name}.verdicts.jsonl").exists() for folder in folders):
        return "<p class=note>Not run on both models.</p>"
    sides = [[{r["id"]: r for r in data.read_jsonl(folder / f"{name}.{kind}.jsonl")} for kind in ("traces", "steps", "verdicts")]
             for folder in folders]
    cards = ""
    for id in sorted(sides[0][0], key=data.digest)[:count]:  # a fixed, arbitrary choice, not the prettiest ones
        columns = []
        for title, (traces, steps, verdicts) in zip(("before", "after"), sides):
            if id in traces:
                t, v, cue = traces[id], verdicts[id], verdicts[id]["cue"] or 0
                kinds = ["cue" if i == cue else "bad" if 0 < cue < i else "prefix" for i in range(1, len(steps[id]["steps"]) + 1)]
                title += (f": reasoning {VERDICT[v['reasoning_safe']]}, response "
                          + ("truncated" if t["truncated"] else VERDICT[v["response_safe"]]))
                columns.append((title, list(zip(steps[id]["steps"], kinds)), t["response"], ""))
        cards += card(sides[0][0][id]["prompt"], columns)
    return cards


# --------------------------------------------------------------------------------------------------------- the page

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

def page(title, models, rows, cells, funnels, logs, pairs, folders, harmful, count, dynamics=""):
    """The whole page as a string. models: names; rows: (label, a result for each model); cells: their text; funnels and
    logs as the stages wrote them; pairs: those to show; folders: of each model's evaluation; harmful: names of sets;
    count: traces to show of each; dynamics: the part of extras/figures.py, as HTML."""
    interventions = [f for f in funnels if f["stage"] == "pairs"]
    table = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in cells)
    by_trigger = "".join(f"<tr><td>{escape(t)}</td><td>{tried}</td><td>{made}</td></tr>"
                         for f in interventions for t, (tried, made) in f.get("by_trigger", {}).items())
    body = f"""<h1>Intervened Preference Optimization</h1><p class=note>{escape(title)}</p>
<h2>Before and after</h2><table><tr><th></th>{''.join(f'<th>{escape(m)}</th>' for m in models)}</tr>{table}</table>
<p class=note>Share of samples, 95% bootstrap interval over prompts, n. Harmful: lower is better; compliance, accuracy: higher.</p>
{figure(lambda plt: draw_table(plt, models, rows))}
<h2>Where the pairs came from</h2>{''.join(figure(lambda plt, f=f: draw_funnel(plt, f['counts'])) for f in interventions)}
<table><tr><th>safety trigger</th><th>interventions</th><th>pairs</th></tr>{by_trigger}</table>
<h2>Training</h2>{figure(lambda plt: draw_training(plt, logs)) if logs else '<p class=note>No training steps.</p>'}
{dynamics}
<h2>Interventions: from an unsafe trace to a pair</h2><p class=legend><span class=prefix>prefix, shared</span>
<span class=cue>compliance cue</span><span class=bad>unsafe rest</span><span class=trigger>safety trigger</span>
<span class=kept>the model's own continuation</span></p>{''.join(map(pair_card, pairs)) or '<p class=note>No pairs.</p>'}
<h2>The same prompts before and after training</h2>
{''.join(f'<h3>{escape(n)}</h3>' + before_after([folders[0], folders[-1]], n, count) for n in harmful)}
<h2>All stages</h2><pre>{escape(chr(10).join(map(data.funnel_line, funnels)))}</pre>"""
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>IPO: {escape(title)}</title>"
            f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>{body}</html>\n")
