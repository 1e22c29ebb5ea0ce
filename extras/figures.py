"""The paper's figures from a finished run: `python evaluate.py figures --run runs/my --model M` measures, the report shows.

Each figure has one sentence on what to see, the paper's value and ours. Where the paper's value lies outside our interval the
page says so in the same words for every figure; nothing is tuned to agree.
"""
import json
from html import escape
from pathlib import Path

import intervene
from extras.estimates import show
from extras.report import COLOURS, figure

SAMPLER = ("model", "server", "temperature", "top_p", "max_new_tokens", "batch_size", "seed", "device", "dtype")
JUDGE = ("judge", "judge_model", "judge_concurrency", "judge_cache", "judge_price_in", "judge_price_out", "max_cost")


def measure(args):
    """Run the stages of the analysis on a run's rollouts; each writes to `RUN/dynamics/` and is skipped if finished."""
    run, out = Path(args.run), Path(args.run) / "dynamics"
    args.judge_cache = args.judge_cache or out / "judge_cache.jsonl"

    def flags(*names):
        given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
        return [x for n, value in given.items() for x in ("--" + n.replace("_", "-"), str(value))]
    files = {"--traces": "rollouts", "--steps": "steps", "--verdicts": "verdicts"}
    traces = [x for flag, name in files.items() for x in (flag, str(run / f"{name}.jsonl"))]
    judged = [*traces, *flags(*SAMPLER, *JUDGE)]
    stages = {"diversity": ["diversity", *traces[:2], *traces[4:]],
              "csr": ["csr", *judged, *flags("at", "continuations", "uncertain")],
              "turning_points": ["turning-points", *traces, "--csr", str(out / "csr.jsonl"), *flags("model")],
              "mined": ["mine-triggers", *judged, "--points", str(out / "turning_points.jsonl")],
              "curve": ["curve", *judged]}
    for spec in args.kl:
        name, _, path = spec.partition("=")
        if not path or not Path(path).is_dir():
            raise SystemExit(f"--kl {spec}: write NAME=FOLDER, a model that was trained from --model.")
        stages[f"kl_{name}"] = ["kl", "--model", path, "--reference", args.model, *traces, *flags("device", "dtype")]
    for name, argv in stages.items():
        intervene.main([*argv, "--out", str(out / f"{name}.jsonl")])


# ------------------------------------------------------------------------------------------------------ the figures

def against(estimate, paper):
    """Our estimate, the paper's value, and whether that lies within our interval.

    >>> against({"value": 0.9, "low": 0.8, "high": 0.95, "n": 30}, 0.85)
    "Here 0.900 [0.800, 0.950] n=30; the paper's 0.85 lies within our interval."
    """
    if not estimate or estimate["value"] is None:
        return f"Here it is not defined; the paper has {paper}."
    inside = estimate["low"] <= paper <= estimate["high"]
    return (f"Here {show(estimate)}; the paper's {paper} lies within our interval." if inside else
            f"Here {show(estimate)}; this contradicts the paper's {paper}, which lies outside our interval.")


def band(ax, x, estimates, colour, label):
    """A curve with its intervals."""
    kept = [(a, e) for a, e in zip(x, estimates) if e["value"] is not None]
    if kept:
        x, e = zip(*kept)
        ax.plot(x, [v["value"] for v in e], color=colour, label=label)
        ax.fill_between(x, [v["low"] for v in e], [v["high"] for v in e], color=colour, alpha=0.2, lw=0)


def draw_gap(plt, rows):
    """Figures 2 and 3: bars of the two conditional shares for each model and set."""
    fig, ax = plt.subplots(figsize=(9, 0.5 * len(rows) + 0.8))
    for i, (label, results) in enumerate(rows):
        for k, e in enumerate(results):
            said = ("safe answer although unsafe reasoning", "unsafe answer although safe reasoning")[k]
            ax.barh(i + 0.4 * k, 100 * (e["mean"] or 0), 0.36, color=COLOURS[(2, 1)[k]], label=said if i == 0 else None)
    ax.set_yticks([i + 0.2 for i in range(len(rows))], [label for label, _ in rows])
    ax.invert_yaxis()
    ax.set(xlabel="%", xlim=(0, 101))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return fig


def draw_diversity(plt, s):
    """Figure 4: prompts by how many of their rollouts reason safely."""
    fig, ax = plt.subplots(figsize=(9, 2.4))
    ax.bar(range(len(s["counts"])), s["counts"], color=COLOURS[3])
    ax.set(xlabel=f"safe reasonings among {s['rollouts']} rollouts", ylabel="prompts")
    return fig


def draw_points(plt, s):
    """Figures 5a and 5b: CSR around triggers and cues; where the cue and the unsafe turning point stand."""
    fig, (a, b) = plt.subplots(1, 2, figsize=(9, 2.8))
    for kind, colour, anchor in (("safe", COLOURS[2], "trigger"), ("unsafe", COLOURS[1], "cue")):
        if s["aligned"][kind]:
            band(a, s["aligned"][kind]["offsets"], s["aligned"][kind]["csr"], colour, f"{kind} traces, at the {anchor}")
    a.set(xlabel="tokens from where the step begins", ylabel="CSR", ylim=(-0.02, 1.02), title="5a")
    a.legend(frameon=False, fontsize=8)
    if s["cue_and_turning_point"]:
        b.scatter(*zip(*s["cue_and_turning_point"]), s=14, color=COLOURS[3], alpha=0.6)
    b.set(xlabel="token of the first cue", ylabel="unsafe turning point", title="5b")
    return fig


def draw_curve(plt, s):
    """Figure 6: harmful share after interventions, over all triggers, each of them, and the two controls."""
    fig, ax = plt.subplots(figsize=(9, 2.8))
    for arm in s["arms"]:
        if arm["arm"] == "trigger":
            ax.plot(s["interventions"], [e["value"] for e in arm["harmful"]], color=COLOURS[0], lw=0.8)
    for arm, colour, label in (("neutral", COLOURS[1], "neutral sentence"), ("removal", COLOURS[4], "cue removed")):
        band(ax, s["interventions"], next(a["harmful"] for a in s["arms"] if a["arm"] == arm), colour, label)
    band(ax, s["interventions"], s["overall"], COLOURS[2], "safety triggers (grey: each)")
    ax.set(xlabel="interventions", ylabel="harmful share", ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize=8)
    return fig


def draw_kl(plt, models):
    """Figure 7: KL to the base model by distance from the cue and by token."""
    fig, (a, b) = plt.subplots(1, 2, figsize=(9, 2.8))
    for k, (name, s) in enumerate(models.items()):
        band(a, s["by_offset"]["offsets"], s["by_offset"]["kl"], COLOURS[(k + 1) % len(COLOURS)], name)
        band(b, range(len(s["by_token"])), s["by_token"], COLOURS[(k + 1) % len(COLOURS)], name)
    a.set(xlabel="tokens from where the cue begins", ylabel="KL to the base model, nats")
    b.set(xlabel="token of the trace")
    a.legend(frameon=False, fontsize=8)
    return fig


def pool_table(s):
    """The mined pool beside the hand-written one."""
    rows = "".join(f"<tr><td>{escape(x['trigger'])}</td><td>{kind}</td><td>{show(x['success'])}</td></tr>"
                   for kind, key in (("mined", "mined"), ("by hand", "hand_written")) for x in s[key])
    return f"<table><tr><th>trigger</th><th></th><th>corrective success, held out</th></tr>{rows}</table>"


def sensitivity_table(s):
    """The turning points at other settings."""
    keys = ("safe_with_turning_point", "unsafe_with_turning_point", "pearson")
    rows = "".join("<tr>" + "".join(f"<td>{r[k]}</td>" for k in ("mu", "eta", "window", "continuations"))
                   + "".join(f"<td>{show(r[k])}</td>" for k in keys) + "</tr>" for r in s["sensitivity"])
    heads = ("mu", "eta", "window", "continuations", "safe traces that turn", "unsafe traces that turn", "R")
    return ("<details><summary>Sensitivity to mu, eta, the window and the number of continuations</summary><table><tr>"
            + "".join(f"<th>{h}</th>" for h in heads) + f"</tr>{rows}</table></details>")


# --------------------------------------------------------------------------------------- what the page says of them
# Each function returns (title, what to see, the paper's value and ours, HTML).

def gap(evals):
    """Figures 2 and 3, from the joint tables of the evaluations; None where no set is harmful."""
    wanted = ("safe response | unsafe reasoning", "unsafe response | safe reasoning")
    rows = [(f"{model}, {name}", [entry.get(m, {"mean": None}) for m in wanted]) for model, e in evals.items()
            for name, entry in e["sets"].items() if entry["kind"] == "harmful"]
    if not rows:
        return None
    ours = " and ".join("no such trace" if r["mean"] is None else f"{100 * r['mean']:.1f}% [{100 * r['low']:.1f}, "
                        f"{100 * r['high']:.1f}]" for r in rows[0][1])
    ranges = zip(rows[0][1], ((0.61, 0.72), (0.001, 0.006)))
    if any(r["mean"] is not None and (r["high"] < low or r["low"] > high) for r, (low, high) in ranges):
        ours += "; this contradicts the paper, whose range lies outside our interval"
    return ("Figures 2 and 3: the gap between reasoning and response",
            "See how rarely safe reasoning ends in an unsafe answer, and how often an answer is safe after unsafe reasoning.",
            "The paper: 61 to 72% of answers are safe after unsafe reasoning, 0.1 to 0.6% unsafe after safe reasoning. Here, of "
            f"the first model on the first set: {ours}.", figure(lambda plt: draw_gap(plt, rows)))


def diversity(s):
    """Figure 4."""
    return ("Figure 4: how much a group of rollouts has to learn from",
            "See how many prompts have no safe rollout: there a method that compares the rollouts of one prompt has no signal.",
            f"Share of prompts without one: {against(s['histogram'][0], 0.36)} ({s['rollouts']} rollouts a prompt; the paper: 8.)",
            figure(lambda plt: draw_diversity(plt, s)))


def turning_points(s):
    """Figure 5."""
    return ("Figure 5: continuation safety ratio and its turning points",
            "See the ratio jump at one step, the trigger, in safe traces and fall at the cue in unsafe ones.",
            f"Safe traces with a turning point: {against(s['safe_with_turning_point'], 0.9)} (The paper: more than 0.9.) "
            f"Correlation of cue and unsafe turning point: {against(s['pearson'], 0.85)}",
            figure(lambda plt: draw_points(plt, s)) + sensitivity_table(s))


def curve(s):
    """Figure 6."""
    return ("Figure 6: interventions without training",
            "See how far a trigger in the cue's place lowers the harmful share, and that a neutral sentence there does not.",
            f"After one intervention: {against(s['overall'][1], 0.6)} After the last: {against(s['overall'][-1], 0.15)}",
            figure(lambda plt: draw_curve(plt, s)))


def mined(s):
    """The pool of mined triggers."""
    pools = s["pools"]
    return ("Triggers that the model gave away itself",
            "See whether steps at turning points do as well as sentences written by hand.",
            f"Mined pool {show(pools['mined'])}, by hand {show(pools['hand_written'])}, difference {show(pools['difference'])}. "
            "The paper leaves this to future work.", pool_table(s))


def divergence(models):
    """Figure 7; models: summaries of stage `kl` by name."""
    peaks = ", ".join(f"{name}: {max(e['value'] or 0 for e in s['by_token']):.2f} nats at token {s['peak_token']}, "
                      f"{s['peak_offset']:+d} from the cue" for name, s in models.items())
    return ("Figure 7: where training moved the model",
            "See whether the model moved where the cues stand, or everywhere alike.",
            f"The paper: IPO peaks at about 1.75 nats near token 50, where its cues stand; SFT is flat. Here the peaks are {peaks}.",
            figure(lambda plt: draw_kl(plt, models)))


def page_part(run, evals):
    """The part of the report that shows what `measure` wrote, as HTML; "" where nothing is there yet."""
    found = {p.name.removesuffix(".summary.json"): json.loads(p.read_text())
             for p in sorted((run / "dynamics").glob("*.summary.json"))}
    if not found:
        return ""
    named = {"diversity": diversity, "turning_points": turning_points, "curve": curve, "mined": mined}
    parts = [gap(evals), *(say(found[name]) for name, say in named.items() if name in found)]
    kl = {name[3:]: s for name, s in found.items() if name.startswith("kl_")}
    parts += [divergence(kl)] if kl else []
    return "<h2>Safety dynamics: the paper's figures</h2>" + "".join(
        f"<h3>{escape(title)}</h3><p>{escape(see)}</p><p>{escape(said)}</p>{shown}" for title, see, said, shown in filter(None, parts))


def add_flags(p):
    """The flags of `evaluate.py figures` beside those of sampler and judge (`argparse`)."""
    p.add_argument("--run", required=True, help="folder of a finished run.sh")
    p.add_argument("--evals", nargs="+", metavar="NAME=FOLDER", help="models of the report (default: base, stage1, stage2 in RUN/eval)")
    p.add_argument("--out", help="the HTML file to write (default: RUN/report.html)")
    p.add_argument("--examples", type=int, default=6, help="traces to show of each kind")
    p.add_argument("--kl", nargs="*", default=[], metavar="NAME=FOLDER", help="trained models whose distance from --model is shown")
    p.add_argument("--at", default="token", help="where to measure CSR: token, step or every:K tokens")
    p.add_argument("--continuations", type=int, default=32, help="continuations of each prefix")
    p.add_argument("--uncertain", type=int, default=30, help="prompts of uncertain outcome to measure it on")
