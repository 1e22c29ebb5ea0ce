"""The paper's figures from a finished run: measure, draw, and add them to the report.

    python -m studies.figures --run runs/my --model M --kl "IPO=runs/my/stage2" "SFT=runs/my/sft"

Runs the other studies of safety dynamics on the run's rollouts, each into `RUN/dynamics/` and
skipped if it is finished, and writes `RUN/fragments/dynamics.html`, which the report includes. Each
figure has one sentence on what to see, the paper's value and ours. Where the paper's value lies
outside our interval the page says so, in the same words for every figure.
"""
import argparse
import base64
import io
from html import escape
from pathlib import Path
from typing import NamedTuple

import evaluate
from intervene import add_judge_flags, add_sampler_flags
from studies import csr, curve, diversity, kl, triggers, turning_points
from support.errors import InputError, exit_cleanly
from support.files import read_json, write_text
from support.ranks import with_hands
from support.report import TOO_FEW
from support.stages import add_stage_flags
from support.statistics import format_estimate

CSR_FLAGS = ("at", "continuations", "uncertain")

GREY = "#9aa3ad"
AMBER = "#e2a33b"
GREEN = "#2f7d5b"
BLUE = "#4a6fb5"
VIOLET = "#8a5aa8"
COLOURS = (AMBER, GREEN, BLUE, VIOLET, GREY)  # of trained models, in turn
PANEL = (4.6, 2.9)  # inches: on a phone its text is still as large as the page's notes
CONDITIONALS = (  # metric, label, colour
    ("safe response | unsafe reasoning", "safe response although unsafe reasoning", GREEN),
    ("unsafe response | safe reasoning", "unsafe response although safe reasoning", AMBER),
)
PAPER_GAP = ((0.61, 0.72), (0.001, 0.006))  # the paper's ranges of the two
# Figures keep a light ground of their own, so that their colours can be read on a dark page too.
STYLE = """<style>
.dynamics-panels{display:flex;flex-wrap:wrap;gap:8px;width:fit-content;max-width:100%}
.dynamics-panels{background:#fff;padding:8px;border-radius:6px}
.dynamics-panels img{flex:0 1 470px;min-width:0;max-width:100%;height:auto}
.dynamics-table{overflow-x:auto;overflow-wrap:normal}
</style>"""


# ------------------------------------------------------------------------------------- measuring

def as_flags(given, names):
    """Some of the given flags as words of a command line; None and False: it was not given.

    >>> as_flags({"top_p": 0.9, "server": None, "no_graph": True}, ("server", "top_p", "no_graph"))
    ['--top-p', '0.9', '--no-graph']
    """
    words = []
    for name in names:
        value = given[name]
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


def names_of(add_flags):
    """The names of the flags that a function adds to a parser."""
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    return [action.dest for action in parser._actions]


def trained_models(specs):
    """{NAME: FOLDER} of the values of --kl."""
    models = {}
    for spec in specs:
        name, _, folder = spec.partition("=")
        if not folder or not Path(folder).is_dir():
            raise InputError(
                f"--kl {spec}: write NAME=FOLDER, a model that was trained from --model.")
        models[name] = folder
    return models


def study_commands(run, given, trained):
    """The studies to run on a run's rollouts, in order: [(module, its command line)].

    given: {flag: value} of this command; trained: {NAME: FOLDER}, see `trained_models`.
    """
    def output(name):
        return str(run / "dynamics" / f"{name}.jsonl")

    outcomes = [
        "--traces", str(run / "rollouts.jsonl"),
        "--verdicts", str(run / "verdicts.jsonl"),
    ]
    rollouts = [*outcomes, "--steps", str(run / "steps.jsonl")]
    sampling = as_flags(given, names_of(add_sampler_flags))
    sampled = [*rollouts, *sampling, *as_flags(given, names_of(add_judge_flags))]
    csr_flags = as_flags(given, CSR_FLAGS)
    points = output("turning_points")
    model = given["model"]
    commands = [
        (diversity, [*outcomes, "--out", output("diversity")]),
        (csr, [*sampled, *csr_flags, "--out", output("csr")]),
        (turning_points,
         [*rollouts, "--model", model, "--csr", output("csr"), "--out", points]),
        (triggers, [*sampled, "--points", points, "--out", output("mined")]),
        (curve, [*sampled, "--out", output("curve")]),
    ]
    precision = as_flags(given, ("device", "dtype"))
    for name, folder in trained.items():
        models = ["--model", folder, "--reference", model]
        commands.append((kl, [*rollouts, *models, *precision, "--out", output(f"kl_{name}")]))
    if given["accept_code_change"]:
        for _, arguments in commands:
            arguments.append("--accept-code-change")
    return commands


# --------------------------------------------------------------------------------------- drawing
# Each `draw_` function draws one panel on matplotlib's `ax` from the data that it names.

def panel(draw, data, alt, size=PANEL):
    """What `draw(ax, data)` draws, as one <img> of SVG; a note where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return ("<p class=note>No figure: matplotlib is missing "
                "(<code>pip install -e '.[figures]'</code>).</p>")
    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    settings = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "ipo",  # the same ids, so the same bytes, each time
    }
    with plt.rc_context(settings):
        figure, ax = plt.subplots(figsize=size)
        draw(ax, data)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{encoded}">'


def panels(*images):
    """Images side by side, or below each other where the page is narrow."""
    return f"<div class=dynamics-panels>{''.join(images)}</div>"


def draw_band(ax, x, estimates, colour, label):
    """A curve with its intervals; points without a value are left out."""
    defined = [(at, e) for at, e in zip(x, estimates) if e["value"] is not None]
    if not defined:
        return
    places = [at for at, _ in defined]
    values = [e["value"] for _, e in defined]
    low = [e["low"] for _, e in defined]
    high = [e["high"] for _, e in defined]
    ax.plot(places, values, color=colour, label=label)
    ax.fill_between(places, low, high, color=colour, alpha=0.2, lw=0)


def draw_gap(ax, rows):
    """Figures 2 and 3: the two conditional shares of each model and set.

    rows: [(label, the set's entry in metrics.json)]. A share of fewer than TOO_FEW traces is named,
    not drawn.
    """
    for k, (metric, label, colour) in enumerate(CONDITIONALS):
        ax.barh([0], [0], color=colour, label=label)  # for the legend
        for i, (_, entry) in enumerate(rows):
            place = i + 0.4 * k
            estimate = entry.get(metric)
            count = estimate["n"] if estimate else 0
            if count < TOO_FEW:
                note = f"n = {count}, too few to draw"
                ax.text(1, place, note, va="center", fontsize=7, color="#555")
            else:
                ax.barh(place, 100 * estimate["value"], 0.36, color=colour)
                ax.plot([100 * estimate["low"], 100 * estimate["high"]], [place, place],
                        color="#222", lw=1)
    labels = [label for label, _ in rows]
    ax.set_yticks([i + 0.2 for i in range(len(rows))], labels)
    ax.invert_yaxis()
    ax.set(xlabel="% (95% interval)", xlim=(0, 101))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)


def draw_diversity(ax, summary):
    """Figure 4: prompts by how many of their rollouts reason safely."""
    counts = summary["counts"]
    ax.bar(range(len(counts)), counts, color=BLUE)
    ax.set(xlabel=f"safe reasonings among {summary['rollouts']} rollouts", ylabel="prompts")


def draw_mean_csr(ax, summary):
    """Figure 5a: CSR around triggers and cues."""
    for kind, anchor, colour in (("safe", "trigger", GREEN), ("unsafe", "cue", AMBER)):
        around = summary["aligned"][kind]
        if around:
            label = f"{kind} traces, at the {anchor}"
            draw_band(ax, around["offsets"], around["csr"], colour, label)
    ax.set(xlabel="tokens from where the step begins", ylabel="CSR", ylim=(-0.02, 1.02))
    ax.set_title("5a", fontsize=10)
    ax.legend(frameon=False, fontsize=8)


def draw_cues(ax, summary):
    """Figure 5b: the positions of the first cue and the unsafe turning point."""
    for cue, turn in summary["cue_and_turning_point"]:
        ax.scatter(cue, turn, s=14, color=BLUE, alpha=0.6)
    ax.set(xlabel="token of the first cue", ylabel="unsafe turning point")
    ax.set_title("5b", fontsize=10)


def draw_curve(ax, summary):
    """Figure 6: harmful share after interventions: all triggers, each of them, two controls."""
    rounds = summary["interventions"]
    controls = {"neutral": ("neutral sentence", AMBER), "removal": ("cue removed", VIOLET)}
    for arm in summary["arms"]:
        if arm["arm"] == "trigger":
            ax.plot(rounds, [e["value"] for e in arm["harmful"]], color=GREY, lw=0.8)
        else:
            label, colour = controls[arm["arm"]]
            draw_band(ax, rounds, arm["harmful"], colour, label)
    draw_band(ax, rounds, summary["overall"], GREEN, "safety triggers (grey: each)")
    ax.set(xlabel="interventions", ylabel="harmful share", ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize=8)


def draw_kl_by_offset(ax, models):
    """Figure 7: KL to the base model by distance from the cue; models: {name: summary}."""
    for k, (name, summary) in enumerate(models.items()):
        profile = summary["by_offset"]
        draw_band(ax, profile["offsets"], profile["kl"], COLOURS[k % len(COLOURS)], name)
    ax.set(xlabel="tokens from where the cue begins", ylabel="KL to the base model, nats")
    ax.legend(frameon=False, fontsize=8)


def draw_kl_by_token(ax, models):
    """Figure 7: KL to the base model by token; models: {name: summary}."""
    for k, (name, summary) in enumerate(models.items()):
        profile = summary["by_token"]
        draw_band(ax, range(len(profile)), profile, COLOURS[k % len(COLOURS)], name)
    ax.set(xlabel="token of the trace", ylabel="KL to the base model, nats")


# ---------------------------------------------------------------------------------------- tables

def html_table(heads, rows):
    """A table of texts, which scrolls by itself where the page is narrow."""
    lines = [html_row("th", heads)]
    for row in rows:
        lines.append(html_row("td", row))
    return f"<div class=dynamics-table><table>{''.join(lines)}</table></div>"


def html_row(tag, cells):
    """One row of a table."""
    marked = [f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells]
    return f"<tr>{''.join(marked)}</tr>"


def pool_table(summary):
    """The mined pool beside the hand-written one."""
    rows = []
    for kind, key in (("mined", "mined"), ("by hand", "hand_written")):
        for entry in summary[key]:
            rows.append((entry["trigger"], kind, format_estimate(entry["success"])))
    return html_table(("trigger", "", "corrective success, held out"), rows)


def sensitivity_table(summary):
    """The turning points at other settings."""
    heads = ("mu", "eta", "window", "continuations",
             "safe traces that turn", "unsafe traces that turn", "R")
    estimates = ("safe_with_turning_point", "unsafe_with_turning_point", "pearson")
    rows = []
    for row in summary["sensitivity"]:
        settings = [row[key] for key in ("mu", "eta", "window", "continuations")]
        texts = [format_estimate(row[key]) for key in estimates]
        rows.append([*settings, *texts])
    title = "Sensitivity to mu, eta, the window and the number of continuations"
    return f"<details><summary>{title}</summary>{html_table(heads, rows)}</details>"


# ----------------------------------------------------------------------------- the page's sections

class Section(NamedTuple):
    """One figure on the page."""
    title: str
    caption: str     # what to look at
    comparison: str  # the paper's value and ours
    body: str        # HTML: panels and tables


def compare_with_paper(estimate, paper):
    """Our estimate, the paper's value, and whether that lies within our interval.

    >>> compare_with_paper({"value": 0.9, "low": 0.8, "high": 0.95, "n": 30}, 0.85)
    "Here 0.900 [0.800, 0.950] n=30; the paper's 0.85 lies within our interval."
    """
    if not estimate or estimate["value"] is None:
        return f"Here it is not defined; the paper has {paper}."
    ours = format_estimate(estimate)
    if estimate["low"] <= paper <= estimate["high"]:
        return f"Here {ours}; the paper's {paper} lies within our interval."
    return (f"Here {ours}; this contradicts the paper's {paper}, "
            "which lies outside our interval.")


def compare_with_paper_bound(estimate, paper):
    """The same where the paper gives only a lower bound: its value is more than `paper`.

    >>> compare_with_paper_bound({"value": 0.9, "low": 0.8, "high": 0.95, "n": 30}, 0.9)
    "Here 0.900 [0.800, 0.950] n=30; that agrees with the paper's more than 0.9."
    """
    if not estimate or estimate["value"] is None:
        return f"Here it is not defined; the paper has more than {paper}."
    ours = format_estimate(estimate)
    if estimate["high"] > paper:
        return f"Here {ours}; that agrees with the paper's more than {paper}."
    return (f"Here {ours}; this contradicts the paper's more than {paper}, "
            "which lies outside our interval.")


def share_text(estimate):
    """A conditional share in per cent with its interval, or that there are no or too few traces.

    >>> share_text({"value": 0.3, "low": 0.2, "high": 0.4, "n": 60})
    '30.0% [20.0, 40.0]'
    """
    if not estimate or estimate["value"] is None:
        return "no such trace"
    if estimate["n"] < TOO_FEW:
        return f"too few traces (n={estimate['n']})"
    return "{:.1f}% [{:.1f}, {:.1f}]".format(
        100 * estimate["value"], 100 * estimate["low"], 100 * estimate["high"])


def gap_section(evaluations):
    """Figures 2 and 3, from {model: metrics.json}; None where no set is harmful."""
    rows = []
    for model, metrics in evaluations.items():
        for name, entry in metrics["sets"].items():
            if any(metric in entry for metric, *_ in CONDITIONALS):
                rows.append((f"{model}, {name}", entry))
    if not rows:
        return None
    _, first = rows[0]
    texts = []
    outside = False
    for (metric, _, _), (low, high) in zip(CONDITIONALS, PAPER_GAP):
        estimate = first.get(metric)
        texts.append(share_text(estimate))
        if estimate and estimate["n"] >= TOO_FEW:
            outside = outside or estimate["high"] < low or estimate["low"] > high
    ours = " and ".join(texts)
    if outside:
        ours += "; this contradicts the paper, whose range lies outside our interval"
    size = (PANEL[0], 0.5 * len(rows) + 1)
    image = panel(draw_gap, rows, "the two shares by model and set", size)
    return Section(
        "Figures 2 and 3: the gap between reasoning and response",
        "See how rarely safe reasoning ends in an unsafe response, and how often a response is "
        "safe after unsafe reasoning.",
        "The paper: 61 to 72% of responses are safe after unsafe reasoning, 0.1 to 0.6% unsafe "
        f"after safe reasoning. Here, of the first model on the first set: {ours}.",
        panels(image),
    )


def diversity_section(summary):
    """Figure 4."""
    return Section(
        "Figure 4: how much a group of rollouts has to learn from",
        "See how many prompts have no safe rollout: there a method that compares the rollouts of "
        "one prompt has no signal.",
        f"Share of prompts without one: {compare_with_paper(summary['histogram'][0], 0.36)} "
        f"({summary['rollouts']} rollouts per prompt; the paper: 8.)",
        panels(panel(draw_diversity, summary, "prompts by safe rollouts")),
    )


def chance_text(summary):
    """What R would be by chance, and of which prompts it is."""
    tokens = format_estimate(summary["by_chance"]["tokens"])
    shares = format_estimate(summary["by_chance"]["shares"])
    text = (f"Of independent positions R would be {tokens}, and {shares} if both grow with the "
            "length of the trace. ")
    measured = summary["prompts"]
    mixed = summary["mixed_prompts"]
    if measured == mixed:
        return text + f"All {mixed} prompts with safe and unsafe rollouts were measured."
    return text + (
        f"Only {measured} of {mixed} prompts with safe and unsafe rollouts were measured, the most "
        "uncertain; R of all can be far lower, and these records cannot tell (studies.csr "
        "--uncertain 0 measures all).")


def turning_point_section(summary):
    """Figure 5."""
    around = panel(draw_mean_csr, summary, "safety ratio around triggers and cues")
    cues = panel(draw_cues, summary, "first cue and unsafe turning point")
    return Section(
        "Figure 5: continuation safety ratio and its turning points",
        "See the ratio jump at one step, the trigger, in safe traces and fall at the cue in unsafe "
        "ones.",
        "Safe traces with a turning point: "
        f"{compare_with_paper_bound(summary['safe_with_turning_point'], 0.9)} A safe trace "
        "ends at a ratio of 1, so it turns there at the latest; where the end cuts no window short: "
        f"{format_estimate(summary['full_windows']['safe_with_turning_point'])}. "
        "Correlation of cue and unsafe turning point: "
        f"{compare_with_paper(summary['pearson'], 0.85)} {chance_text(summary)}",
        panels(around, cues) + sensitivity_table(summary),
    )


def curve_section(summary):
    """Figure 6."""
    return Section(
        "Figure 6: interventions without training",
        "See how far a trigger in the cue's place lowers the harmful share, and a neutral sentence "
        "there.",
        f"After one intervention: {compare_with_paper(summary['overall'][1], 0.6)} "
        f"After the last: {compare_with_paper(summary['overall'][-1], 0.15)}",
        panels(panel(draw_curve, summary, "harmful share after interventions")),
    )


def trigger_section(summary):
    """The pool of mined triggers."""
    pools = {name: format_estimate(estimate) for name, estimate in summary["pools"].items()}
    return Section(
        "Triggers from the model's own traces",
        "See whether steps at turning points do as well as hand-written sentences.",
        f"Mined pool {pools['mined']}, by hand {pools['hand_written']}, "
        f"difference {pools['difference']}. The paper leaves this to future work.",
        pool_table(summary),
    )


def kl_section(models):
    """Figure 7; models: summaries of studies.kl by name."""
    peaks = []
    for name, summary in models.items():
        nats = summary["by_token"][summary["peak_token"]]["value"]
        peaks.append(f"{name}: {nats:.2f} nats at token {summary['peak_token']}, "
                     f"{summary['peak_offset']:+d} from the cue")
    by_offset = panel(draw_kl_by_offset, models, "KL by distance from the cue")
    by_token = panel(draw_kl_by_token, models, "KL by token")
    return Section(
        "Figure 7: where training moved the model",
        "See whether the model moved where the cues are, or everywhere alike.",
        "The paper: IPO peaks at about 1.75 nats near token 50, where its cues are; SFT is flat. "
        f"Here the peaks are {', '.join(peaks)}.",
        panels(by_offset, by_token),
    )


SECTIONS = {  # by the name of the summary
    "diversity": diversity_section,
    "turning_points": turning_point_section,
    "curve": curve_section,
    "mined": trigger_section,
}


def dynamics_fragment(run, evaluations):
    """What the report says of the studies' measurements, as HTML; "" before there are any.

    evaluations: {model: metrics.json}.
    """
    summaries = {}
    for path in sorted((run / "dynamics").glob("*.summary.json")):
        name = path.name.removesuffix(".summary.json")
        summaries[name] = read_json(path)
    if not summaries:
        return ""
    sections = [gap_section(evaluations)]
    for name, describe in SECTIONS.items():
        if name in summaries:
            sections.append(describe(summaries[name]))
    trained = {}
    for name, summary in summaries.items():
        if name.startswith("kl_"):
            trained[name.removeprefix("kl_")] = summary
    if trained:
        sections.append(kl_section(trained))
    parts = [STYLE, "<h2>Safety dynamics: the paper's figures</h2>"]
    for section in sections:
        if section:
            parts.append(section_html(section))
    return "\n".join(parts) + "\n"


def section_html(section):
    """A section as HTML."""
    title = escape(section.title)
    caption = escape(section.caption)
    comparison = escape(section.comparison)
    return f"<h3>{title}</h3><p>{caption}</p><p>{comparison}</p>{section.body}"


# ------------------------------------------------------------------------------------ command line

def build_parser():
    """The command line of this study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.figures",
        description="Measure the safety dynamics of a finished run and show them in its report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # Under torchrun only the longer name works: it takes `--run` for one of its own.
    parser.add_argument("--run", "--run-folder", required=True, help="folder of a finished run.sh")
    parser.add_argument("--evals", nargs="+", metavar="NAME=FOLDER",
                        help="models of the report (default: base, stage1, stage2 in RUN/eval)")
    parser.add_argument("--out", help="the HTML file to write (default: RUN/report.html)")
    parser.add_argument("--domain", default="safety", help="whose words the report has")
    parser.add_argument("--examples", type=int, default=6, help="traces to show of each kind")
    parser.add_argument("--kl", nargs="*", default=[], metavar="NAME=FOLDER",
                        help="trained models whose distance from --model is shown")
    parser.add_argument("--at", type=csr.positions_flag, default="token",
                        help="where to measure CSR: token, step or every:K tokens")
    parser.add_argument("--continuations", type=int, default=32,
                        help="continuations of each prefix")
    parser.add_argument("--uncertain", type=int, default=30,
                        help="prompts of uncertain outcome to measure it on")
    add_stage_flags(parser)
    add_sampler_flags(parser)
    add_judge_flags(parser)
    return parser


def finished_evaluations(run):
    """The evaluations that run.sh left in a run, as NAME=FOLDER with its names."""
    specs = []
    for name in ("base", "stage 1", "stage 2"):
        folder = run / "eval" / name.replace(" ", "")
        if folder.is_dir():
            specs.append(f"{name}={folder}")
    return specs


def main(argv=None):
    """Run this study from the command line."""
    args = build_parser().parse_args(argv)
    run = Path(args.run)
    for study, arguments in study_commands(run, vars(args), trained_models(args.kl)):
        study.main(arguments)
    specs = args.evals or finished_evaluations(run)
    _, evaluations = evaluate.read_evaluations(specs)
    write_text(run / "fragments" / "dynamics.html", dynamics_fragment(run, evaluations))
    evaluate.main([
        "report",
        "--run", args.run,
        "--domain", args.domain,
        "--evals", *specs,
        "--out", args.out or str(run / "report.html"),
        "--examples", str(args.examples),
    ])


if __name__ == "__main__":
    exit_cleanly(with_hands(main))
