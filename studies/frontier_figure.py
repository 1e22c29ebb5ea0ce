"""The figure of frontiers: one share against another, a line for each method, as an SVG.

It takes any lines, not only those of a sweep: the first COLOURED in colour and with their names,
the others grey, with a number at the rate that was chosen. Lengths are in the units of the SVG.
"""
import math
from html import escape
from typing import NamedTuple

from support.report import round_ticks, scale

FLOOR = 0.95  # CHOICE: the share of the base model's compliance and capability to keep
WIDTH = 360
LEFT = 34
RIGHT = 350
TOP = 28
BOTTOM = 236
LEGEND = 284  # where it begins
ROW = 16      # of the legend
COLOURED = 8
LONG = 26     # a name of more letters needs the legend's whole width
# CHOICE: the y axis begins at most this many points below the floor. What lies lower is of no use
# to anyone, and would squeeze what matters; it is drawn at the edge.
DEPTH = 15
X_TICKS = (0, 1, 5, 10, 20, 40, 60, 80, 100)
LETTER = 5.4  # the width of a digit
SHAPES = (
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z",           # circle
    "M-3.5 -3.5H3.5V3.5H-3.5Z",                      # square
    "M0 -4.6L4.4 3.2H-4.4Z",                         # triangle
    "M0 -5L4.4 0L0 5L-4.4 0Z",                       # diamond
    "M0 4.6L4.4 -3.2H-4.4Z",                         # triangle, upside down
    "M-1.5 -4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",  # plus
    "M0 -4.8L4.6 -1.5L2.8 3.9H-2.8L-4.6 -1.5Z",      # pentagon
    "M-4.5 -4.5H4.5L0 0L4.5 4.5H-4.5L0 0Z",          # hourglass
)
DOT = "M-2 0A2 2 0 1 0 2 0A2 2 0 1 0 -2 0Z"
# It brings its own colours, so that it can stand alone; they are those of the report.
STYLE = """
.frontier{--ground:#fff;--ink:#1b2127;--soft:#59636d;--line:#deded8;display:block;width:100%;
 max-width:640px;height:auto;font-family:system-ui,sans-serif}
.frontier .k0{--k:#c27f12}.frontier .k1{--k:#9159ad}.frontier .k2{--k:#7a5230}
.frontier .k3{--k:#c2185b}.frontier .k4{--k:#0e8a9a}.frontier .k5{--k:#2f8a61}
.frontier .k6{--k:#2f5fc4}.frontier .k7{--k:#c2410c}.frontier .grey{--k:#8a949e}
@media (prefers-color-scheme:dark){
.frontier{--ground:#1c2227;--ink:#e6e8ea;--soft:#a3adb6;--line:#343c44}
.frontier .k0{--k:#e0a544}.frontier .k1{--k:#b98ad1}.frontier .k2{--k:#c79a70}
.frontier .k3{--k:#f06a9b}.frontier .k4{--k:#4fc3d3}.frontier .k5{--k:#4cb384}
.frontier .k6{--k:#7ba0e8}.frontier .k7{--k:#f08a5d}.frontier .grey{--k:#87929d}}
.frontier text{font-size:11px;fill:var(--soft)}
.frontier .ground{fill:var(--ground)}
.frontier .rule{stroke:var(--line)}
.frontier .floor{stroke:var(--soft);stroke-dasharray:4 3}
.frontier .base{fill:none;stroke:var(--ink);stroke-width:1.5}
.frontier .name{fill:var(--ink)}
.frontier polyline{fill:none;stroke:var(--k);stroke-width:1.5;opacity:.65}
.frontier .spot{fill:var(--ground);stroke:var(--k);stroke-width:1.2}
.frontier .chosen{fill:var(--k);stroke:var(--ground);stroke-width:.6}
.frontier .bar{stroke:var(--k);stroke-width:1.5}
.frontier .grey polyline{stroke-width:.8;opacity:.5}
.frontier .lead{stroke:var(--k);stroke-width:.5}
.frontier .number{font-size:9px;fill:var(--soft);stroke:var(--ground);stroke-width:2;
 paint-order:stroke}
"""


class Spot(NamedTuple):
    """A place in the figure, in per cent; ranges: ((x low, x high), (y low, y high)) or None."""
    x: float
    y: float
    note: str  # shown under the pointer
    ranges: tuple = None


class Line(NamedTuple):
    """Spots in order with one name; those that have ranges are drawn large."""
    label: str
    spots: list


def frontier_svg(lines, base, x_title="harmful reasoning", y_title="benign compliance"):
    """One share (x, less is better) against another (y) as an SVG.

    lines: of the methods, best first; base: the base model's Spot.
    """
    spots = [base]
    for line in lines:
        spots += line.spots
    across, down, parts = draw_axes(spots, FLOOR * base.y, x_title, y_title)
    parts += draw_floor(base, across, down)
    parts.append(draw_lines(lines, across, down))
    parts += draw_chosen(lines[:COLOURED], across, down)
    parts += draw_numbers(lines, base, across, down)
    keys, height = draw_legend(lines)
    parts += keys
    ground = element("rect", width=WIDTH, height=height, class_="ground")
    title = element("title", escape(f"{x_title} against {y_title}, by method"))
    return element(
        "svg", f"{title}<style>{STYLE}</style>{ground}{''.join(parts)}",
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", class_="frontier",
        role="img",
    )


def element(name, content="", **attributes):
    """An element of SVG; content: markup; attributes: texts or numbers, `class_` for class.

    >>> element("line", x1=1, class_="rule")
    '<line x1="1" class="rule"></line>'
    """
    words = [name]
    for key, value in attributes.items():
        words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(str(value))}"')
    return f"<{' '.join(words)}>{content}</{name}>"


def text_at(x, y, words, **attributes):
    """A text in the figure."""
    return element("text", escape(words), x=x, y=y, **attributes)


def draw_axes(spots, floor, x_title, y_title):
    """(the function that places x, the one that places y, [markup of both axes]).

    x begins at 0; y goes from a round number below everything (but see DEPTH), which the axis says,
    to one above everything, at most 100. Error bars are part of everything.
    """
    xs = [spot.x for spot in spots]
    ys = [floor, *(spot.y for spot in spots)]
    for spot in spots:
        if spot.ranges:
            x_range, y_range = spot.ranges
            xs += x_range
            ys += y_range
    x_high = min(100, 10 * math.ceil(max(xs) / 10 + 0.2))
    y_least = max(min(ys) - 1, floor - DEPTH)
    y_low = max(0, 5 * math.floor(y_least / 5))
    y_high = min(100, 5 * math.ceil((max(ys) + 1) / 5))
    # CHOICE: x is a square-root scale: good methods crowd near 0, and the base model is far away.
    place_root = scale(0, x_high ** 0.5, LEFT, RIGHT)

    def across(x):
        return place_root(x ** 0.5)

    down = scale(y_low, y_high + 1, BOTTOM, TOP)
    y_words = f"{y_title}, %"
    if y_low:
        y_words += f" (the axis begins at {y_low})"
    parts = [
        text_at(LEFT - 26, TOP - 14, y_words),
        text_at(RIGHT, BOTTOM + 32, f"{x_title}, % (square-root scale)", text_anchor="end"),
    ]
    for y in round_ticks(y_low, y_high):
        parts.append(
            element("line", x1=LEFT, x2=RIGHT, y1=down(y), y2=down(y), class_="rule"))
        parts.append(text_at(LEFT - 5, down(y) + 4, f"{y:g}", text_anchor="end"))
    for x in X_TICKS:
        if x <= x_high:
            parts.append(text_at(across(x), BOTTOM + 16, f"{x}", text_anchor="middle"))
    return across, down, parts


def draw_floor(base, across, down):
    """The base model, and the compliance that a rate must keep: [markup]."""
    y = down(FLOOR * base.y)
    circle = element(
        "circle", element("title", escape(base.note)), cx=across(base.x), cy=down(base.y), r=5,
        class_="base",
    )
    label = f"{100 * FLOOR:.0f}% of base"
    name_x = min(across(base.x), RIGHT - 4)  # or the picture's edge would cut it
    return [
        element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="floor"),
        text_at(RIGHT, y + 12, label, text_anchor="end"),
        circle,
        text_at(name_x, down(base.y) - 8, "base", text_anchor="middle", class_="name"),
    ]


def draw_lines(lines, across, down):
    """All lines with small markers, cut off at the lower edge, as markup; grey ones below."""
    coloured = []
    grey = []
    for number, line in enumerate(lines):
        if number < COLOURED:
            coloured.append(draw_line(line, number, across, down))
        else:
            path = element("polyline", points=places_of(line, across, down))
            grey.append(element("g", path, class_="grey"))
    edge = element("rect", width=WIDTH, height=BOTTOM)
    clip = element("clipPath", edge, id="frontier-plot")
    return clip + element("g", "".join([*grey, *coloured]), clip_path="url(#frontier-plot)")


def places_of(line, across, down):
    """The places of a line's spots, as a polyline has them."""
    return " ".join(f"{across(spot.x)},{down(spot.y)}" for spot in line.spots)


def draw_line(line, number, across, down):
    """One line with its small markers and error bars, as markup."""
    parts = [element("polyline", points=places_of(line, across, down))]
    for spot in line.spots:
        if spot.ranges:
            parts += draw_ranges(spot, across, down)
        else:
            place = across(spot.x), down(spot.y)
            parts.append(draw_marker(SHAPES[number], place, spot.note, "spot", 0.8))
    return element("g", "".join(parts), class_=colour(number))


def draw_chosen(lines, across, down):
    """The large markers of coloured lines, the best on top: [markup]."""
    parts = []
    for number, line in enumerate(lines):
        for spot in line.spots:
            if spot.ranges:
                place = place_inside(spot, across, down)
                marker = draw_marker(SHAPES[number], place, spot.note, "chosen", 1.35)
                parts.append(element("g", marker, class_=colour(number)))
    return parts[::-1]


def draw_marker(shape, place, note, kind, size):
    """A marker at a place (x, y), with its note."""
    x, y = place
    return element(
        "path", element("title", escape(note)), d=shape,
        transform=f"translate({x} {y}) scale({size})", class_=kind,
    )


def place_inside(spot, across, down):
    """Where a spot is, or the lower edge above it."""
    return across(spot.x), min(down(spot.y), BOTTOM)


def draw_ranges(spot, across, down):
    """Error bars of a spot: [markup]."""
    (x_low, x_high), (y_low, y_high) = spot.ranges
    x = across(spot.x)
    y = down(spot.y)
    return [
        element("line", x1=across(x_low), x2=across(x_high), y1=y, y2=y, class_="bar"),
        element("line", x1=x, x2=x, y1=down(y_low), y2=down(y_high), class_="bar"),
    ]


def draw_numbers(lines, base, across, down):
    """The chosen rates of the grey lines: dots and numbers, none on top of another: [markup]."""
    taken = [(across(base.x), down(base.y) - 10, 14, 6)]  # boxes: middle, half width, half height
    for line in lines[:COLOURED]:
        for spot in line.spots:
            if spot.ranges:
                taken.append((*place_inside(spot, across, down), 6, 6))
    grey = []  # (number, spot)
    for number, line in enumerate(lines[COLOURED:], COLOURED + 1):
        chosen = [spot for spot in line.spots if spot.ranges] or line.spots[-1:]
        grey += [(number, spot) for spot in chosen]
    for _, spot in grey:
        taken.append((*place_inside(spot, across, down), 2, 2))
    parts = []
    for number, spot in grey:
        dot = place_inside(spot, across, down)
        box = free_box(dot, LETTER * len(str(number)) / 2 + 1, taken)
        taken.append(box)
        parts.append(draw_number(number, spot.note, dot, box))
    return parts


def free_box(dot, half_width, taken):
    """A box near a dot that overlaps none of `taken`: (x, y, half width, half height).

    The nearest ring around the dot that has one decides; without any it is the last one tried.
    """
    x, y = dot
    for radius in range(9, 60, 6):
        for angle in range(0, 360, 30):
            turn = math.radians(angle)
            box = (
                round(x + radius * math.cos(turn), 1), round(y - radius * math.sin(turn), 1),
                half_width, 4.5,
            )
            if inside_plot(box) and not any(overlap(box, other) for other in taken):
                return box
    return box


def inside_plot(box):
    """Whether a box lies between the axes and the picture's edges."""
    x, y, half_width, half_height = box
    across_fits = LEFT <= x - half_width and x + half_width <= WIDTH
    down_fits = TOP - 8 <= y - half_height and y + half_height <= BOTTOM
    return across_fits and down_fits


def overlap(box, other):
    """Whether two boxes overlap.

    >>> overlap((0, 0, 2, 2), (3, 0, 2, 2)), overlap((0, 0, 2, 2), (5, 0, 2, 2))
    (True, False)
    """
    near_across = abs(box[0] - other[0]) < box[2] + other[2]
    near_down = abs(box[1] - other[1]) < box[3] + other[3]
    return near_across and near_down


def draw_number(number, note, dot, box):
    """A dot, and its number in a box, with a line between them."""
    x, y = dot
    text_x, text_y, *_ = box
    lead = element("line", x1=x, y1=y, x2=text_x, y2=text_y, class_="lead")
    text = element(
        "text", element("title", escape(note)) + str(number), x=text_x, y=text_y + 3,
        text_anchor="middle", class_="number",
    )
    return element("g", lead + draw_marker(DOT, dot, note, "chosen", 1) + text, class_="grey")


def draw_legend(lines):
    """([markup of the legend], the height of the figure with it).

    Two columns, filled one after the other; one, if a name is long.
    """
    named = lines[:COLOURED]
    longest = max((len(line.label) for line in named), default=0)
    n_rows = len(named)
    if longest <= LONG:
        n_rows = math.ceil(n_rows / 2)
    parts = []
    for number, line in enumerate(named):
        column, row = divmod(number, n_rows)
        place = LEFT - 20 + 168 * column, LEGEND + ROW * row
        marker = draw_marker(SHAPES[number], place, line.label, "chosen", 1)
        parts.append(element("g", marker, class_=colour(number)))
        parts.append(text_at(place[0] + 10, place[1] + 4, line.label, class_="name"))
    if len(lines) > COLOURED:
        words = f"grey: the others, with their ranks, {COLOURED + 1} to {len(lines)}"
        parts.append(text_at(LEFT - 24, LEGEND + ROW * n_rows + 4, words))
        n_rows += 1
    return parts, LEGEND + ROW * n_rows


def colour(number):
    """The class of a coloured line."""
    return f"k{number}"
