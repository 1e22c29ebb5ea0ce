"""The table of a sweep for a reader: as rows of text, as Markdown and as HTML.

A table here is what `studies.ranking.make_table` returns; lines are lists of cells, the heads first.
"""
import re
from html import escape

from studies.axes import AXES
from studies.frontier_figure import FLOOR, element
from studies.ranking import COSTS, GOALS, PRICES, goal_of
from support.statistics import student_interval

MARK = " †"  # at a rate that does not keep FLOOR on the validation sets
PAPER = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


def measured_axes(table, part="test"):
    """The axes that sets of a part have, in the order of AXES."""
    return [axis for axis in AXES if table["base"][part][axis]]


def axis_words(table, axes):
    """What the tables call some axes: a list."""
    return [table["words"].get(axis, axis) for axis in axes]


def set_lines(base, frontiers):
    """Every single metric of all points on the held-out sets, as rows of text, the heads first."""
    keys = list(base.records[0]["test"])
    lines = [["method", "lr", *keys]]
    for points in ([base], *frontiers.values()):
        for point in points:
            shares = []
            for key in keys:
                values = [record["test"][key] for record in point.records]
                shares.append(share_text(student_interval(values)))
            title = "base" if point.method == "base" else point.title
            lines.append([title, point.lr, *shares])
    return lines


def share_text(estimate):
    """A share in per cent, with its interval, of one seed over prompts; "" without a share.

    >>> share_text({"value": 0.2, "low": 0.1, "high": 0.3, "n": 3})
    '20.0 [10, 30]'
    """
    if not estimate:
        return ""
    text = f"{100 * estimate['value']:.1f}"
    if estimate["n"] > 1 or "over" in estimate:
        text += f" [{100 * estimate['low']:.0f}, {100 * estimate['high']:.0f}]"
    return text


def difference_text(estimate):
    """A difference in points with its sign; without an interval where one seed is all there is.

    >>> difference_text({"value": 0.2, "low": -0.1, "high": 0.3})
    '+20.0 [-10, +30]'
    """
    if not estimate:
        return ""
    text = f"{100 * estimate['value']:+.1f}"
    if estimate.get("n") != 1:
        text += f" [{100 * estimate['low']:+.0f}, {100 * estimate['high']:+.0f}]"
    return text


def cost_text(row, name):
    """One of a row's COSTS; "> " before a time that leaves out what a kill cut off."""
    if name not in row:
        return ""
    text = f"{row[name]:.0f}"
    if row["killed_before"] and name == "cpu_seconds":
        text = "> " + text
    return text


def rank_texts(row):
    """A row's rank and the range of its rank; "" where there is none.

    >>> rank_texts({"rank": 3, "rank range": (2, 5)}), rank_texts({"rank": 3, "rank range": None})
    (('3', '2–5'), ('3', ''))
    """
    rank = str(row["rank"] or "")
    if not row["rank range"]:
        return rank, ""
    low, high = row["rank range"]
    if low == high:
        return rank, str(low)
    return rank, f"{low}–{high}"


def chosen_lines(table):
    """The leaderboard: methods at their chosen rates, as rows of text, the heads first."""
    axes = measured_axes(table)
    [goal] = axis_words(table, [table["goal"]])
    lines = [[
        "rank", "method", "rank, 95%", "lr", *axis_words(table, axes),
        f"{goal} beyond {table['reference']}, by seed", "by prompt",
        "generations", "judge calls", "CPU s",
    ]]
    for row in table["rows"]:
        rank, rank_range = rank_texts(row)
        rate = row["lr"] if row["kept"] else row["lr"] + MARK
        shares = [share_text(row[axis]) for axis in axes]
        differences = [difference_text(row[name]) for name in ("by seed", "by prompt")]
        costs = [cost_text(row, name) for name in COSTS]
        lines.append([rank, row["method"], rank_range, rate, *shares, *differences, *costs])
    return lines


def claim_lines(table):
    """What each paper claims beside what was measured, as rows of text, the heads first.

    Measured: the base model's value, and the method's at its chosen rate.
    """
    axes = [axis for axis in measured_axes(table) if axis in GOALS]
    before = table["rows"][0]
    lines = [["method", "paper", "what it claims", *axis_words(table, axes)]]
    for row in table["rows"][1:]:
        shares = []
        for axis in axes:
            ours = 100 * row[axis]["value"]
            shares.append(f"{100 * before[axis]['value']:.1f} → {ours:.1f}")
        method = row["method"] if row["kept"] else row["method"] + MARK
        lines.append([method, row["paper"], row["claims"], *shares])
    return lines


def point_lines(table):
    """All points on the held-out sets, as rows of text, the heads first."""
    axes = measured_axes(table)
    lines = [["method", "lr", *axis_words(table, axes)]]
    for point in table["points"]:
        rate = point["lr"]
        if point["chosen"]:
            rate = f"**{rate}**"
        shares = [share_text(point["test"][axis]) for axis in axes]
        lines.append([point["label"], rate, *shares])
    return lines


def markdown_table(lines):
    """Rows of text as a Markdown table."""
    heads, *rows = lines
    rule = ["---"] * len(heads)
    written = []
    for line in [heads, rule, *rows]:
        cells = [markdown_cell(text) for text in line]
        written.append(f"| {' | '.join(cells)} |")
    return "\n".join(written)


def markdown_cell(text):
    """A text that cannot leave its cell, nor be taken for markup of HTML.

    >>> markdown_cell("a|b <i>")
    'a\\\\|b &lt;i>'
    """
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("|", "\\|")


def markdown_page(table):
    """Both tables and the notes, to be put into a page of Markdown."""
    claims = markdown_table(claim_lines(table))
    claims = PAPER.sub(r"[\g<0>](https://arxiv.org/abs/\1)", claims)
    parts = [markdown_table(chosen_lines(table)), " ".join(notes(table)), claims]
    return "\n\n".join(parts) + "\n"


def notes(table):
    """What has to be said below the table: a list of sentences."""
    count = len(table["seeds"])
    kept = [axis for axis in measured_axes(table, "validation") if axis in PRICES]
    chosen_by = goal_of(table["base"]["validation"])
    wanted = "lowest" if chosen_by == "harm" else "highest"
    [chosen_by] = axis_words(table, [chosen_by])
    condition = ""
    if kept:
        prices = " and ".join(axis_words(table, kept))
        condition = f" that keeps {100 * FLOOR:.0f}% of the base model's {prices}"
    sentences = [
        f"In per cent on the held-out sets, mean of {count} seed{'s' if count > 1 else ''}, each "
        f"method at the rate with the {wanted} {chosen_by}{condition} on the validation sets.",
    ]
    if count > 1:
        sentences.append("Intervals over seeds are Student's t.")
    elif "over" in table["rows"][0][table["goal"]]:
        sentences.append("Intervals are over prompts; what another seed would give is not known.")
    if any(row["rank range"] for row in table["rows"]):
        draws = "prompts"
        if count > 1:
            draws = (
                "seeds and prompts (of seeds alone where verdicts are missing; a bootstrap, too "
                "narrow for few seeds)"
            )
        sentences.append(
            f"Rank, 95%: where the rank lies in 95% of draws of other {draws}, at the chosen "
            "rates. Methods whose ranges overlap may well be equal."
        )
    pairings = []
    for pairing in ("by seed", "by prompt"):
        if any(row[pairing] for row in table["rows"]):
            pairings.append(pairing)
    if pairings:
        [goal] = axis_words(table, [table["goal"]])
        sentences.append(
            f"Differences are {goal} beyond that of {table['reference']}, in points, paired "
            f"{' and '.join(pairings)}."
        )
    if not all(row["kept"] for row in table["rows"]):
        [price] = axis_words(table, kept[:1])
        sentences.append(
            f"{MARK.strip()} No rate keeps that; this is the one with the highest {price} there. "
            f"Such methods come last, by {price}."
        )
    return sentences


def html_rows(lines):
    """Rows of text, the heads first, as the inside of an HTML table."""
    heads, *rows = lines
    head_cells = "".join(f"<th scope=col>{escape(head)}</th>" for head in heads)
    body = ""
    for first, *cells in rows:
        marked = [f"<th scope=row>{escape(first)}</th>"]
        for head, cell in zip(heads[1:], cells):
            marked.append(element("td", escape(cell or "–"), data_label=head))
        body += f"<tr>{''.join(marked)}</tr>\n"
    return f"<thead><tr>{head_cells}</tr></thead>\n<tbody>{body}</tbody>"
