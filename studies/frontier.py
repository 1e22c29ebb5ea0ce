"""From a sweep of methods and learning rates to a leaderboard and a figure of frontiers.

    python -m studies.frontier --results runs/leaderboard/results.jsonl --run runs/toy

Any method is less harmful at a higher rate, and at some rate it breaks the model. So methods are
compared at the same price: *harm at a compliance of at least 95% of the base model's*. The
validation sets choose the rate, the held-out sets give the numbers and the ranks. Beside the
results this writes `table.json` and `frontier.svg`; where `--run` is a finished run, its report
shows all of it, and `--markdown FILE` writes the tables alone.

harm: mean over the harmful sets of the share of unsafe reasoning; response harm: the same of
responses; compliance: mean over the benign sets; capability: mean accuracy over the task sets. A
truncated response neither complies nor does harm. What no set measures is left out; where that is
the harm, methods are ranked by capability.
"""
import argparse
from html import escape
from pathlib import Path

import evaluate
from studies.figures import finished_evaluations
from studies.frontier_figure import Line, Spot, frontier_svg
from studies.frontier_tables import (
    PAPER,
    chosen_lines,
    claim_lines,
    html_rows,
    markdown_page,
    markdown_table,
    notes,
    point_lines,
    set_lines,
)
from studies.ranking import PRICES, first_measured, make_table, read_points
from support.errors import InputError, exit_cleanly
from support.files import write_json, write_text
from support.plugins import load_domain

FIGURE_WORDS = {  # the axes' names in the figure
    "harm": "harmful reasoning",
    "compliance": "benign compliance",
    "capability": "capability",
}
REFERENCE = "ipo"  # the default; a sweep may lack it


# -------------------------------------------------------------------------------------- the figure

def figure_axes(table):
    """(x axis, y axis) of the figure, or None where the sets measure too little for one."""
    price = first_measured(PRICES, table["base"]["test"])
    if table["goal"] != "harm" or price is None:
        return None
    return "harm", price


def figure_words(table, axes):
    """What the figure calls some axes: a list."""
    return [table["words"].get(axis, FIGURE_WORDS[axis]) for axis in axes]


def draw_table(table):
    """The figure of a sweep from its table; None where it has no axes."""
    axes = figure_axes(table)
    if axes is None:
        return None
    base = spot_of("base", table["base"]["test"], axes, figure_words(table, axes))
    return frontier_svg(lines_of(table), base, *figure_words(table, axes))


def lines_of(table):
    """The lines of a sweep's methods from its table, best first."""
    axes = figure_axes(table)
    words = figure_words(table, axes)
    lines = {}  # method: Line
    for point in table["points"]:
        found = point["test"]
        ranges = None
        if point["chosen"]:
            ranges = tuple(value_range(found[axis]) for axis in axes)
        label = f"{point['rank']} {point['label']}"
        line = lines.setdefault(point["method"], Line(label, []))
        line.spots.append(spot_of(f"{label}, {point['lr']}", found, axes, words, ranges))
    return list(lines.values())


def value_range(estimate):
    """The lowest and the highest seed, in per cent."""
    return 100 * min(estimate["values"]), 100 * max(estimate["values"])


def spot_of(label, found, axes, words, ranges=None):
    """The Spot of a point; found: {axis: estimate}; axes: (x, y); words: what they are called."""
    x, y = [100 * found[axis]["value"] for axis in axes]
    x_word, y_word = words
    note = f"{label}: {x_word} {x:.1f}%, {y_word} {y:.1f}%"
    return Spot(x, y, note, ranges)


# -------------------------------------------------------------------------------------- the report

TABLE_STYLE = """
@media (min-width:641px){
.frontier-table td{white-space:nowrap}
.frontier-table table,.claims-table table{font-size:.8rem}
.frontier-table tbody th{min-width:10rem}
.claims-table td:nth-of-type(n+3){white-space:nowrap}}
"""


def report_fragment(table, svg):
    """What the report says of the sweep, as HTML; svg: None where there is no figure."""
    heads, *rows = chosen_lines(table)
    lines = [heads[1:]]
    for rank, method, *cells in rows:
        lines.append([f"{rank} {method}".strip(), *cells])  # on a phone it is the row's heading
    text = escape(" ".join(notes(table)))
    claims = html_rows(claim_lines(table))
    claims = PAPER.sub(r'<a href="https://arxiv.org/abs/\1">\g<0></a>', claims)
    return f"""<style>{TABLE_STYLE}</style>
<h2>Methods at many learning rates</h2>
{figure_part(table, svg)}<p>{text}</p>
<div class="wide frontier-table"><table class=stack>{html_rows(lines)}</table></div>
<h3>What each paper claims, and what was measured here</h3>
<p>Measured: the base model, and after the arrow the method, in per cent on the held-out sets.</p>
<div class="wide claims-table"><table class=stack>{claims}</table></div>
"""


def figure_part(table, svg):
    """The figure with what it shows, as HTML; "" where there is none."""
    if svg is None:
        return ""
    x_word, y_word = figure_words(table, figure_axes(table))
    return f"""<p>Each line is one method from its lowest learning rate to its highest; a method
that trains nothing is a point. Further left is less {escape(x_word)}, further up more
{escape(y_word)}. Large, or with a number: the rate that the validation sets chose; bars go from its
lowest to its highest seed. At the lower edge: what lies below it. All on the held-out sets.</p>
<figure style="max-width:670px">{svg}</figure>
"""


def add_to_report(run, fragment, domain):
    """Put the fragment into the report of a run, and make that again; a line where it has none."""
    report = run / "report.html"
    if not report.exists():
        print(f"{report}: no such file, so table and figure are in no report")
        return
    write_text(run / "fragments" / "frontier.html", fragment)
    evaluate.main([
        "report", "--run", str(run), "--domain", domain,
        "--evals", *finished_evaluations(run), "--out", str(report),
    ])


# ------------------------------------------------------------------------------------ command line

def build_parser():
    """The command line of this study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.frontier",
        description="Choose each method's learning rate, and make the table and the figure.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--results", required=True, help="results.jsonl of `python -m studies.leaderboard`")
    add("--reference", default=REFERENCE, help="the method that others are compared with")
    add("--domain", default="safety", help="whose words the tables have: a file of domains/")
    add("--run", help="folder of a finished run.sh, for its report")
    add("--markdown", metavar="FILE", help="also write both tables to this file")
    add("--by-set", action="store_true", help="also print every point's metrics set by set")
    return parser


def domain_words(domain):
    """What a domain calls the axes: {axis: words}, of those that it calls something else."""
    words = {}
    for axis, phrase in (("harm", "harmful reasoning"), ("response harm", "harmful responses")):
        if phrase in domain.WORDS:
            words[axis] = domain.WORDS[phrase]
    return words


def check_reference(reference, frontiers):
    """Raise InputError for a method that the sweep lacks, unless it is the default."""
    if reference != REFERENCE and reference not in frontiers:
        raise InputError(
            f"--reference {reference}: no such method with all its seeds. The results have "
            f"{', '.join(frontiers) or 'none yet'}."
        )


def main(argv=None):
    """Make the tables and the figure of a sweep."""
    args = build_parser().parse_args(argv)
    results = Path(args.results)
    if not results.exists():
        raise InputError(f"{results}: no such file. `python -m studies.leaderboard` writes it.")
    folder = results.parent
    base, frontiers = read_points(results)
    check_reference(args.reference, frontiers)
    words = domain_words(load_domain(args.domain))
    table = make_table(base, frontiers, args.reference, folder, words)
    svg = draw_table(table)
    write_json(folder / "table.json", table)
    figure = "none, as it needs harmful sets, and benign or task sets"
    if svg:
        figure = folder / "frontier.svg"
        write_text(figure, svg + "\n")
    if args.run:
        add_to_report(Path(args.run), report_fragment(table, svg), args.domain)
    if args.markdown:
        write_text(Path(args.markdown), markdown_page(table))
    if args.by_set:
        print(markdown_table(set_lines(base, frontiers)), end="\n\n")
    print(markdown_table(point_lines(table)), end="\n\n")
    print(markdown_table(chosen_lines(table)), end="\n\n")
    print("\n".join(notes(table)))
    print(f"figure: {figure}")


if __name__ == "__main__":
    exit_cleanly(main)
