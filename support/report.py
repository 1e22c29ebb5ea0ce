"""The report's page: one HTML file that needs nothing else, made from plain data by `report.html`.

It only shows what the stages wrote. This module turns numbers into what the template draws (bars,
curves, coloured steps); all markup is in the template, which escapes every text of models and data.
"""
import math
import re
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path

from support.files import write_text
from support.stages import funnel_line

TOO_FEW = 20  # a share of fewer traces is named, not drawn
KEY_METRICS = {  # the rows that matter: (name, whether lower is better)
    "reasoning": ("harmful reasoning", True),
    "response": ("harmful responses", True),
    "compliance": ("compliance", False),
    "accuracy": ("accuracy", False),
}
CONDITIONAL_METRICS = {
    "safe response | unsafe reasoning": "safe response although the reasoning is unsafe",
    "unsafe response | safe reasoning": "unsafe response although the reasoning is safe",
}
HEADLINE_METRICS = {
    "reasoning": "harmful reasoning",
    "compliance": "benign compliance",
    "accuracy": "accuracy",
}
PROMPT_COUNTS = ("prompts", "short enough")
VERDICT_WORDS = {True: "safe", False: "unsafe", None: "unjudged"}
# The size of a chart, and where its axes stand, in the units of its SVG.
CHART = {"width": 360, "height": 190, "left": 40, "right": 348, "top": 12, "bottom": 168}
MOST_POINTS = 400  # of a curve: more are not visible
TRADE_OFF_CHART = {**CHART, "height": 290, "top": 28, "bottom": 250, "radius": 7}  # of a point


def write_report(path, evaluations, rows, facts, words, glossary):
    """Write the page of a run.

    evaluations: {model: contents of metrics.json}; rows: [(label, text for each model)]; facts: see
    `run_folder.read_run`, with each pair split into steps as `pair_columns` needs it; words: see
    `reworded`; glossary: [(word, meaning)].
    """
    from jinja2 import Environment, FileSystemLoader

    folder = Path(__file__).resolve().parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["word"] = partial(reworded, words=words)
    parts = page_parts(evaluations, rows, facts)
    parts["glossary"] = glossary
    write_text(path, environment.get_template("report.html").render(parts))


def reworded(text, words):
    """A text of ours in the words of a domain; words: {phrase in lower case: what it says instead}.

    Of phrases that overlap the longest counts, and what it was replaced by stays. A capital letter
    at its beginning stays too.

    >>> words = {"unsafe": "wrong", "safe": "right", "safety trigger": "check"}
    >>> reworded("Safety trigger: an unsafe trace is made safe", words)
    'Check: an wrong trace is made right'
    >>> reworded("unsafe", None)
    'unsafe'
    """
    if not words:
        return text

    def replacement(found):
        phrase = found[0]
        said = words[phrase.lower()]
        return capitalised(said) if phrase[0].isupper() else said

    longest_first = sorted(words, key=len, reverse=True)
    phrases = "|".join(map(re.escape, longest_first))
    return re.sub(rf"(?<!\w)({phrases})(?!\w)", replacement, text, flags=re.IGNORECASE)


def page_parts(evaluations, rows, facts):
    """What the template shows, by name."""
    models = list(evaluations)
    triggers = trigger_counts(facts["funnels"])
    pool = [row["trigger"] for row in triggers]
    training = []
    for stage, log in facts["logs"].items():
        training.append(stage_curves(stage, log))
    before_after = {}
    for name, examples in facts["before_after"].items():
        before_after[name] = [example_card(sides, models, pool) for sides in examples]
    return {
        "title": facts["title"],
        "settings": run_settings(facts["configs"], facts["evaluation_configs"]),
        "headline": headline(evaluations),
        "models": models,
        "key_bars": metric_bars(evaluations),
        "trade_off": trade_off(evaluations),
        "conditional_bars": conditional_bars(evaluations),
        "rows": rows,
        "funnel_groups": funnel_groups(facts["funnels"], facts["prompts_with_pairs"]),
        "triggers": triggers,
        "training": training,
        "pairs": list(map(pair_columns, facts["pairs"])),
        "before_after": before_after,
        "fragments": facts["fragments"],
        "funnel_lines": list(map(funnel_line, facts["funnels"])),
    }


def run_settings(configs, evaluation_configs):
    """What a reader asks first: [(name, value)] of model, judges, seed, commit and date."""
    every = [*configs, *evaluation_configs]
    data_judges = distinct_flags(configs, "judge")
    judges = distinct_flags(evaluation_configs, "judge")
    if data_judges == judges:
        data_judges = []  # one judge of both is named once
    commits = dict.fromkeys(short_commit(config.get("commit")) for config in every)
    settings = {
        "model": distinct_flags(evaluation_configs[:1], "model"),
        "judge of the pairs": data_judges,
        "judge": judges,
        "seed": distinct_flags(every, "seed"),
        "commit": list(commits),
        "date": [date.today().isoformat()],
    }
    return [(name, ", ".join(values)) for name, values in settings.items() if values]


def distinct_flags(configs, name):
    """The values that a flag has in configs, as text, each once."""
    values = {}  # used as an ordered set
    for config in configs:
        value = config["flags"].get(name)
        if value is not None:
            values[str(value)] = None
    return list(values)


def short_commit(commit):
    """The first digits of a commit, with `+changes` where files differed from it.

    >>> short_commit("65fa338246b07b6ac8a5ddd7ceaf9f187e6271d4+changes"), short_commit(None)
    ('65fa338246+changes', 'unknown')
    """
    if commit is None:
        return "unknown"
    digits, plus, changes = commit.partition("+")
    return digits[:10] + plus + changes


# ------------------------------------------------------------------------------- the headline

def headline(evaluations):
    """One sentence on what changed from the first model to the last, or on the only one.

    >>> half = {"accuracy": {"value": 0.5, "low": 0, "high": 1}}
    >>> evaluation = {"sets": {"sums": half}}
    >>> headline({"base": evaluation, "ours": evaluation})
    'Accuracy stayed at 50.0%.'
    >>> headline({"base": evaluation})
    'Accuracy is 50.0%.'
    """
    clauses = []
    for metric, label in HEADLINE_METRICS.items():
        changes = metric_changes(evaluations, metric)
        if changes:
            clauses.append(f"{label} {describe_changes(changes)}")
    if not clauses:
        return "No set was scored on both the first and the last model."
    return capitalised("; ".join(clauses) + ".")


def capitalised(text):
    """A text with a capital first letter and the rest as it is."""
    return text[:1].upper() + text[1:]


def metric_changes(evaluations, metric):
    """What became of a metric on each set that has it: [(set, verb, old share, new share)]."""
    models = list(evaluations.values())
    last = models[-1]["sets"]
    changes = []
    for name, entry in models[0]["sets"].items():
        before = entry.get(metric)
        after = last.get(name, {}).get(metric)
        if not has_value(before) or not has_value(after):
            continue
        verb = "is"
        if len(models) > 1:
            verb = change_verb(before, after)
        changes.append((name, verb, before["value"], after["value"]))
    return changes


def change_verb(before, after):
    """How an estimate changed. No clear change: each value lies in the other's interval.

    >>> before = {"value": 0.71, "low": 0.65, "high": 0.77}
    >>> change_verb(before, {"value": 0.02, "low": 0, "high": 0.04})
    'fell'
    >>> change_verb(before, {"value": 0.74, "low": 0.68, "high": 0.80})
    'did not clearly change'
    """
    old = before["value"]
    new = after["value"]
    # Equal as printed counts as equal, whatever the further digits.
    if percent(old) == percent(new):
        return "stayed"
    if before["low"] <= new <= before["high"] and after["low"] <= old <= after["high"]:
        return "did not clearly change"
    if new < old:
        return "fell"
    return "rose"


def describe_changes(changes):
    """Changes of several sets as one phrase; of more than two with the same verb, the ranges.

    Where sets are listed, a verb is said once as long as it stays the same.

    >>> falls = [("a", "fell", 0.7, 0.05), ("b", "fell", 0.88, 0.09)]
    >>> describe_changes([*falls, ("c", "fell", 0.8, 0.06)])
    'fell from 70.0–88.0% to 5.0–9.0% across 3 sets'
    >>> describe_changes([*falls, ("c", "stayed", 0.5, 0.5)])
    'fell from 70.0% to 5.0% on a, from 88.0% to 9.0% on b and stayed at 50.0% on c prompts'
    """
    _, verbs, olds, news = zip(*changes)
    verb = verbs[0]
    if len(changes) == 1:
        return f"{verb} {change_values(verb, olds, news)}"
    if len(changes) > 2 and len(set(verbs)) == 1:
        return f"{verb} {change_values(verb, olds, news)} across {len(changes)} sets"
    phrases = []
    previous = None
    for name, verb, old, new in changes:
        phrase = f"{change_values(verb, [old], [new])} on {name}"
        if verb != previous:
            phrase = f"{verb} {phrase}"
        phrases.append(phrase)
        previous = verb
    return f"{', '.join(phrases[:-1])} and {phrases[-1]} prompts"


def change_values(verb, olds, news):
    """What follows the verb of a change; olds and news: shares, of more than one their range."""
    old = percent_range(olds)
    new = percent_range(news)
    if verb == "is":
        return new
    if verb == "stayed":
        return f"at {new}"
    if verb == "did not clearly change":
        return f"(from {old} to {new})"
    return f"from {old} to {new}"


def percent_range(shares):
    """The range of shares as text.

    >>> percent_range([0.88, 0.7]), percent_range([0.7])
    ('70.0–88.0%', '70.0%')
    """
    low = percent(min(shares))
    high = percent(max(shares))
    if low == high:
        return low
    return f"{low.removesuffix('%')}–{high}"


def has_value(estimate):
    """Whether an estimate is there and rests on at least one verdict."""
    return bool(estimate) and estimate["value"] is not None


def percent(share):
    """A share from 0 to 1 as text, in per cent."""
    return f"{100 * share:.1f}%"


# ------------------------------------------------------------------------------- bars

def metric_bars(evaluations):
    """Figures of the metrics that matter, for each set, with one bar for each model."""
    figures = []
    for name, metric in scored_metrics(evaluations, KEY_METRICS):
        label, lower = KEY_METRICS[metric]
        hint = "lower is better" if lower else "higher is better"
        bars = model_bars(evaluations, name, metric)
        figures.append({"set": name, "label": label, "hint": hint, "bars": bars})
    return figures


def conditional_bars(evaluations):
    """The paper's Figure 3: of each set, unsafe and safe responses given the other reasoning."""
    figures = []
    for name, metric in scored_metrics(evaluations, CONDITIONAL_METRICS):
        label = CONDITIONAL_METRICS[metric]
        bars = model_bars(evaluations, name, metric, TOO_FEW)
        figures.append({"set": name, "label": label, "bars": bars})
    return figures


def scored_metrics(evaluations, metrics):
    """The (set, metric) that any model has, set by set, metrics in the given order."""
    keys = {}  # used as an ordered set
    for evaluation in evaluations.values():
        for name, entry in evaluation["sets"].items():
            for metric in metrics:
                if metric in entry:
                    keys[name, metric] = None
    return list(keys)


def model_bars(evaluations, name, metric, fewest=1):
    """One bar for each model; one that is not drawn says why in its `note`."""
    bars = []
    for number, (model, evaluation) in enumerate(evaluations.items()):
        bar = {"model": model, "colour": number % 5}
        entry = evaluation["sets"].get(name)
        if entry is None:
            bar["note"] = "not run"
        else:
            estimate = entry.get(metric, {"n": 0})
            if estimate["n"] < fewest:
                bar["note"] = f"n = {estimate['n']}, too few to draw"
            else:
                bar.update(bar_of(estimate))
        bars.append(bar)
    return bars


def bar_of(estimate):
    """What a bar with its interval needs, in per cent of its width, and the numbers beside it."""
    low = 100 * estimate["low"]
    high = 100 * estimate["high"]
    return {
        "width": f"{100 * estimate['value']:.2f}",
        "low": f"{low:.2f}",
        "span": f"{high - low:.2f}",
        "value": percent(estimate["value"]),
        "interval": f"{low:.1f} to {high:.1f}",
        "n": estimate["n"],
    }


# ------------------------------------------------------------------------------- the trade-off

def trade_off(evaluations):
    """The chart of harmful reasoning against benign compliance: a point for each model, in order.

    Models are compared on the sets that all have. None where these include no harmful or no benign
    one, and where there is one model only.
    """
    harmful_sets = shared_sets(evaluations, "reasoning")
    benign_sets = shared_sets(evaluations, "compliance")
    if len(evaluations) < 2 or not harmful_sets or not benign_sets:
        return None
    points = []
    for number, (model, evaluation) in enumerate(evaluations.items()):
        points.append({
            "model": model,
            "number": number + 1,
            "colour": number % 5,
            "harm": mean_of_sets(evaluation, harmful_sets, "reasoning"),
            "compliance": mean_of_sets(evaluation, benign_sets, "compliance"),
        })
    return {
        **trade_off_chart(points),
        "caption": trade_off_caption(points),
        "harmful_sets": harmful_sets,
        "benign_sets": benign_sets,
    }


def shared_sets(evaluations, metric):
    """Names of the sets on which every model has a value of a metric."""
    first, *others = evaluations.values()
    names = []
    for name in first["sets"]:
        entries = [evaluation["sets"].get(name, {}) for evaluation in (first, *others)]
        if all(has_value(entry.get(metric)) for entry in entries):
            names.append(name)
    return names


def mean_of_sets(evaluation, names, metric):
    """Estimate of a metric's mean over sets, each counting the same, with its text.

    CHOICE: the half-widths of the sets' intervals are added in quadrature, upper and lower ones
    apart, because sets have no prompt in common and so err independently. (metrics.json keeps
    intervals, not the draws behind them, so sets cannot be resampled together.)

    >>> a = {"compliance": {"value": 0.5, "low": 0.2, "high": 0.8}}
    >>> b = {"compliance": {"value": 0.7, "low": 0.3, "high": 0.7}}
    >>> mean_of_sets({"sets": {"a": a, "b": b}}, ["a", "b"], "compliance")["text"]
    '60.0% [35.0, 75.0]'
    """
    estimates = [evaluation["sets"][name][metric] for name in names]
    n = len(estimates)
    value = sum(e["value"] for e in estimates) / n
    low = value - math.hypot(*(e["value"] - e["low"] for e in estimates)) / n
    high = value + math.hypot(*(e["high"] - e["value"] for e in estimates)) / n
    text = f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"
    return {"value": value, "low": low, "high": high, "text": text}


def trade_off_caption(points):
    """A sentence for each model but the first: what its numbers were before, and what they are.

    >>> base = {"model": "base", "harm": {"value": 0.78}, "compliance": {"value": 0.99}}
    >>> ours = {"model": "ours", "harm": {"value": 0.09}, "compliance": {"value": 0.88}}
    >>> trade_off_caption([base, ours])
    'Ours: harmful reasoning 78.0% → 9.0%, compliance 99.0% → 88.0%.'
    """
    sentences = []
    for before, after in pairwise(points):
        moves = []
        for name, label in (("harm", "harmful reasoning"), ("compliance", "compliance")):
            old = percent(before[name]["value"])
            new = percent(after[name]["value"])
            moves.append(f"{label} {old} → {new}")
        sentences.append(f"{capitalised(after['model'])}: {', '.join(moves)}.")
    return " ".join(sentences)


def trade_off_chart(points):
    """Points with their places `x` and `y`, arrows and axes, in the units of the chart's SVG."""
    frame = TRADE_OFF_CHART
    x_low, x_high = percent_axis([point["harm"] for point in points], from_zero=True)
    y_low, y_high = percent_axis([point["compliance"] for point in points])
    across = scale(x_low, x_high, frame["left"], frame["right"])
    down = scale(y_low, y_high, frame["bottom"], frame["top"])
    placed = []
    for point in points:
        x = on_axis(point["harm"], across)
        y = on_axis(point["compliance"], down)
        placed.append({**point, "x": x, "y": y})
    arrows = []
    for start, end in pairwise(placed):
        line = (start["x"]["value"], start["y"]["value"], end["x"]["value"], end["y"]["value"])
        # Between circles that touch there is no room for an arrow's head.
        if math.dist(line[:2], line[2:]) > 2.5 * frame["radius"]:
            arrows.append(line)
    return {
        **frame,
        "points": placed,
        "arrows": arrows,
        "y_start": y_low,
        "x_ticks": axis_numbers(round_ticks(x_low, x_high), across),
        "y_ticks": axis_numbers(round_ticks(y_low, y_high), down),
    }


def on_axis(estimate, place):
    """The places of an estimate and the ends of its interval on an axis in per cent."""
    return {key: place(100 * estimate[key]) for key in ("value", "low", "high")}


def percent_axis(estimates, from_zero=False):
    """The range of an axis, (low, high) in per cent: it holds all intervals and ends on ticks.

    CHOICE: it spans at least 20 points, so that a change of one does not look like much, and starts
    at 0 where what is shown comes below 50%.

    >>> percent_axis([{"low": 0.83, "high": 0.93}, {"low": 0.97, "high": 1.0}])
    (80, 100)
    >>> percent_axis([{"low": 0.45, "high": 0.55}]), percent_axis([{"low": 0.99, "high": 1.0}])
    ((0, 60), (80, 100))
    """
    # Rounding first: 100 * 0.07 is a little more than 7.
    lowest = round(100 * min(e["low"] for e in estimates), 6)
    highest = round(100 * max(e["high"] for e in estimates), 6)
    low = 0
    step = 20  # the distance of the ticks of a long axis
    if lowest >= 50 and not from_zero:
        low = min(80, 10 * math.floor(lowest / 10))
        step = 10
    high = step * math.ceil(highest / step)
    return low, max(high, low + 20)


# ------------------------------------------------------------------------------- the funnel

def funnel_groups(funnels, prompts_with_pairs):
    """Counts of the stages that made pairs, in groups of one unit each: no axis mixes two."""
    by_stage = {funnel["stage"]: funnel["counts"] for funnel in funnels}
    groups = []
    prompts = {}
    for stage in ("rollouts", "pairs"):
        for name, count in by_stage.get(stage, {}).items():
            if name in PROMPT_COUNTS:
                prompts[name] = count
    if prompts:
        prompts["with a pair"] = prompts_with_pairs
        groups.append(count_bars("harmful prompts", prompts))
    # Apart from prompts, the stage of interventions counts only traces.
    traces = {}
    for name, count in by_stage.get("pairs", {}).items():
        if name not in PROMPT_COUNTS:
            traces[name] = count
    if traces:
        groups.append(count_bars("rollouts of these prompts", traces))
    if "benign_pairs" in by_stage:
        groups.append(count_bars("benign prompts, for stage 2", by_stage["benign_pairs"]))
    return groups


def count_bars(title, counts):
    """A group of counts with bars that share one axis."""
    largest = max([1, *counts.values()])
    bars = []
    for name, count in counts.items():
        bars.append({"name": name, "count": count, "width": f"{100 * count / largest:.2f}"})
    return {"title": title, "bars": bars}


def trigger_counts(funnels):
    """What became of each safety trigger: [{"trigger", "interventions", "pairs", "share"}]."""
    rows = []
    for funnel in funnels:
        for trigger, (tried, pairs) in funnel.get("by_trigger", {}).items():
            share = percent(pairs / tried) if tried else "–"
            row = {"trigger": trigger, "interventions": tried, "pairs": pairs, "share": share}
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------- curves

def stage_curves(stage, log):
    """Charts of one training stage: the preference loss, and the rewards of both sides."""
    losses = curve_points(log, "loss/preference")
    chosen = curve_points(log, "rewards/chosen")
    rejected = curve_points(log, "rewards/rejected")
    start = {"value": math.log(2), "label": "log 2"}  # the loss of a policy that is its reference
    zero = {"value": 0.0, "label": ""}
    return {
        "stage": stage,
        "loss": chart([("loss", losses)], [start]),
        "rewards": chart([("chosen", chosen), ("rejected", rejected)], [zero]),
    }


def curve_points(log, key):
    """(step from 1, value) of a training log; of a long one, every n-th."""
    stride = max(1, math.ceil(len(log) / MOST_POINTS))
    points = []
    for line in log[::stride]:
        value = line.get(key)
        if value is not None and math.isfinite(value):
            points.append((line["step"] + 1, value))
    return points


def chart(curves, marks):
    """The lines and axis numbers of a chart, placed in the units of its SVG.

    curves: [(name, [(x, y)])]; marks: [{"value", "label"}], horizontal lines to compare with.
    """
    xs = []
    ys = [mark["value"] for mark in marks]
    for _, points in curves:
        xs += [x for x, _ in points]
        ys += [y for _, y in points]
    x_low, x_high = padded_range(xs or [1], 0)
    y_low, y_high = padded_range(ys, 0.06)
    across = scale(x_low, x_high, CHART["left"], CHART["right"])
    down = scale(y_low, y_high, CHART["bottom"], CHART["top"])
    lines = []
    for name, points in curves:
        places = [f"{across(x)},{down(y)}" for x, y in points]
        if len(places) == 1:
            places *= 2  # a line without length is drawn as a dot
        lines.append({"name": name, "points": " ".join(places)})
    # Steps are whole numbers, so the axis gets no number between them.
    steps = [x for x in round_ticks(x_low, x_high) if x == round(x)]
    return {
        **CHART,
        "lines": lines,
        "marks": [(down(mark["value"]), mark["label"]) for mark in marks],
        "x_ticks": axis_numbers(steps, across),
        "y_ticks": axis_numbers(round_ticks(y_low, y_high), down),
    }


def scale(low, high, start, end):
    """The function that takes values from `low` to `high` to places from `start` to `end`."""
    def place(value):
        return round(start + (end - start) * (value - low) / (high - low), 1)

    return place


def axis_numbers(values, place):
    """[(place, text)] of the numbers on an axis."""
    return [(place(value), f"{value:g}") for value in values]


def padded_range(values, padding):
    """The range of values, widened by a share of it on both sides, and never empty."""
    low = min(values)
    high = max(values)
    if low == high:
        return low - 0.5, high + 0.5
    room = padding * (high - low)
    return low - room, high + room


def round_ticks(low, high, most=6):
    """Round numbers within a range, at most `most` of them.

    >>> round_ticks(0.31, 0.72), round_ticks(1, 13)
    ([0.4, 0.5, 0.6, 0.7], [2.0, 4.0, 6.0, 8.0, 10.0, 12.0])
    """
    # Of steps 1, 2, 5 and 10 times a power of ten, the smallest that is coarse enough.
    exponent = math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10):
        step = factor * 10.0 ** exponent
        first = math.ceil(low / step)
        last = math.floor(high / step)
        if last - first < most:
            break
    return [round(number * step, 10) for number in range(first, last + 1)]


# ------------------------------------------------------------------------------- cards

def pair_columns(card):
    """A pair as two columns of coloured steps: the original trace, and the intervened one."""
    prefix = card["prefix"]
    turn = len(prefix) + 1  # where the sides part: at the cue, and at the trigger in its place
    original = [*prefix, *card["rejected"]]
    intervened = [*prefix, card["trigger"], *card["chosen"]]
    columns = [
        {
            "title": "original",
            "chips": [("rejected", "unsafe")],
            "steps": colour_from(original, turn, ("cue", "unsafe")),
            "response": card["rejected_response"],
        },
        {
            "title": "intervened",
            "chips": [("chosen", "safe")],
            "steps": colour_from(intervened, turn, ("trigger", "continuation")),
            "response": card["chosen_response"],
        },
    ]
    return {"prompt": card["prompt"], "columns": columns}


def example_card(sides, models, triggers):
    """One prompt as the first and the last model answer it; sides: records of traces, or None."""
    titles = [f"before: {models[0]}", f"after: {models[-1]}"]
    if len(models) == 1:
        titles = models
    columns = []
    for title, trace in zip(titles, sides):
        if trace:
            columns.append({
                "title": title,
                "chips": verdict_chips(trace),
                "steps": colour_steps(trace, triggers),
                "response": trace["response"],
            })
    return {"prompt": sides[0]["prompt"], "columns": columns}


def verdict_chips(trace):
    """The two verdicts on a trace: [(text, class)]."""
    reasoning = VERDICT_WORDS[trace["reasoning_safe"]]
    response = VERDICT_WORDS[trace["response_safe"]]
    if trace["truncated"]:
        response = "truncated"
    return [(f"reasoning {reasoning}", reasoning), (f"response {response}", response)]


def colour_steps(trace, triggers):
    """The steps of a judged trace with their colours: [(step, class)].

    An unsafe trace turns at its compliance cue; a safe one at the first sentence of the model's own
    that is or resembles a safety trigger, where it has one.
    """
    if trace["reasoning_safe"]:
        turn = trigger_step(trace["steps"], triggers)
        colours = ("trigger", "continuation")
    else:
        turn = trace["cue"]
        colours = ("cue", "unsafe")
    return colour_from(trace["steps"], turn, colours)


def colour_from(steps, turn, colours):
    """[(step, class)]: "prefix" before step `turn`, then `colours`: of that step, of later ones.

    Without a turn all are "prefix".

    >>> colour_from(["a", "b", "c"], 2, ("cue", "unsafe"))
    [('a', 'prefix'), ('b', 'cue'), ('c', 'unsafe')]
    """
    at_turn, after = colours
    coloured = []
    for number, step in enumerate(steps, 1):
        if not turn or number < turn:
            coloured.append((step, "prefix"))
        elif number == turn:
            coloured.append((step, at_turn))
        else:
            coloured.append((step, after))
    return coloured


def trigger_step(steps, triggers):
    """The number, from 1, of the first step that contains or resembles a safety trigger; 0 if none.

    It resembles one if their `word_overlap` is at least one half. Extra words of a step count
    against it, so a long step does not match merely for being long.

    >>> pool = ["I need to put safety first, and this request is not safe to answer."]
    >>> trigger_step(["They ask for poison.", " So I need to put safety first."], pool)
    2
    >>> trigger_step(["They ask for poison.", " I can answer this."], pool)
    0
    """
    for number, step in enumerate(steps, 1):
        for trigger in triggers:
            if one_line(trigger) in one_line(step) or word_overlap(step, trigger) >= 0.5:
                return number
    return 0


def word_overlap(text, other):
    """The Dice coefficient of two texts' sets of words: 1 if they are the same, 0 if disjoint.

    >>> word_overlap("Stop here.", "I stop")
    0.5
    """
    words = word_set(text)
    other_words = word_set(other)
    total = len(words) + len(other_words)
    if not total:
        return 0.0
    return 2 * len(words & other_words) / total


def word_set(text):
    """The words of a text, without their case and punctuation."""
    return set(re.findall(r"\w+", text.casefold()))


def one_line(text):
    """A text in lower case with single spaces."""
    return " ".join(text.casefold().split())
