"""What a run will take, from its stages' flags and the number of prompts: hours, memory, cost.

    bash run.sh plan

Nothing is loaded but config.json of each model, and files of prompts to count them. What the models
will write is assumed (launch/assumptions.py); so are the speeds, unless `bash run.sh plan
--measure` has measured them on this machine.
"""
import textwrap

from launch import assumptions as assumed
from launch.costs import added, gpus_as_text, judge_count, judge_of, machine_of
from launch.estimate import estimates
from launch.speed import MACHINE_FILE, read_measurements
from launch.stages import processes_of
from launch.world import World
from support.engine import split_gpus
from support.progress import duration

# ------------------------------------------------------------------------------------- the table

COLUMNS = ("stage", "GPUs x rows", "sampled", "read", "asked", "time", "GB", "$", "disk")


def table_rows(planned, machine):
    """Rows of text: a stage each, then their sum."""
    rows = [cells(one.title, one.cost, machine) for one in planned]
    total = added([one.cost for one in planned])
    rows.append(cells("together", total._replace(where=""), machine))
    return rows


def cells(title, cost, machine):
    """One row of the table."""
    memory = ""
    if cost.memory and machine.gpus:
        memory = f"{cost.memory / 1e9:.0f}"
    return (
        _shortened(title, 29),
        _shortened(cost.where, 30),
        short(cost.sampled),
        short(cost.read),
        short(cost.calls),
        duration(sum(cost.seconds.values())),
        memory,
        f"{cost.dollars:.2f}" if cost.dollars else "",
        short(cost.disk + cost.passing),
    )


def _shortened(text, width):
    return text if len(text) <= width else text[:width - 3] + "..."


def short(number):
    """A number in four characters or so.

    >>> [short(n) for n in (0, 7, 950, 86_000, 6_900_000, 96e9)]
    ['', '7', '950', '86k', '6.9M', '96G']
    """
    if number < 1:
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            value = number / size
            return f"{value:.0f}{letter}" if value >= 9.95 else f"{value:.1f}{letter}"
    return f"{number:.0f}"


def in_columns(rows):
    """Rows of cells as text; the first two columns to the left, numbers to the right."""
    rows = [list(row) for row in rows]
    used = []  # columns that are not empty below their heading
    for i in range(len(rows[0])):
        if any(row[i] for row in rows[1:]):
            used.append(i)
    lines = []
    for row in rows:
        cells = []
        for i in used:
            width = max(len(other[i]) for other in rows)
            cells.append(row[i].ljust(width) if i < 2 else row[i].rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def dominating(planned, most=3):
    """Lines about what takes most of the time."""
    shares = []
    total = sum(one.seconds for one in planned)
    for one in planned:
        for activity, seconds in one.cost.seconds.items():
            shares.append((seconds, one.title, activity))
    shares.sort(reverse=True)
    lines = []
    for seconds, title, activity in shares[:most]:
        if seconds > 0.03 * total:
            lines.append(f"  {100 * seconds / total:3.0f}%  {title}: {activity}, "
                         f"{duration(seconds)}")
    return lines


def idle_gpus(machine, stages):
    """A line where training leaves GPUs unused that sampling has."""
    for stage in stages:
        _, each = processes_of(stage.command, machine.gpus)
        if stage.trains and each < machine.gpus:
            return [f"training uses {each} of {gpus_as_text(machine.gpus)}; NPROC={machine.gpus} "
                    "would use all."]
    return []


def doubts(planned, machine, stages):
    """Lines about what will not fit, or is not known."""
    lines = []
    if machine.gpus:
        limit = assumed.FREE_SHARE * machine.memory
        for one in planned:
            if one.cost.memory > limit:
                lines.append(f"{one.title}: does NOT fit: {one.cost.memory / 1e9:.0f} GB of "
                             f"{machine.memory / 1e9:.0f} on each GPU.")
    lines += idle_gpus(machine, stages)
    for stage in stages:
        nodes, each = processes_of(stage.command, machine.gpus)
        if machine.gpus and each > machine.gpus:
            lines.append(f"{stage.title}: {each} processes, {gpus_as_text(machine.gpus)} on a "
                         "machine.")
    lines += slow_judging(planned, stages)
    total = added([one.cost for one in planned]).dollars
    limits = [stage.flags.max_cost for stage in stages if getattr(stage.flags, "max_cost", 0)]
    if limits and total > min(limits):
        lines.append(f"--max-cost {min(limits):g} would stop the run: about {total:.0f} dollars "
                     "are needed.")
    asks = any(judge_of(stage.flags).kind == "api" for stage in stages if stage.judges)
    if asks and not total:
        lines.append("The judge's price is not known: give --judge-price-in and --judge-price-out "
                     "(JUDGE_ARGS=...).")
    return lines


def slow_judging(planned, stages):
    """A line where much of the time is spent waiting for a judge that is asked little at once."""
    total = sum(one.seconds for one in planned)
    judging = sum(one.cost.seconds.get("judging", 0) for one in planned)
    for stage in stages:
        if not stage.judges or judge_of(stage.flags).kind not in ("api", "served"):
            continue
        at_once = stage.flags.judge_concurrency
        if judging > 0.15 * total and at_once < 32:
            return [f"judging takes {100 * judging / total:.0f}% of the time, {at_once} calls at "
                    "a time; JUDGE_ARGS=\"--judge-concurrency 32\" would be faster."]
    return []


def speed_source(world):
    """Where the speeds of the plan come from, as text."""
    if not world.used:
        return "assumed (launch/assumptions.py); `bash run.sh plan --measure` measures this machine"
    devices = {f"{one.device}, torch {one.torch}" for one in world.used}
    text = f"of this process, measured on {' and '.join(sorted(devices))} ({MACHINE_FILE})"
    if any(max(one.layers) < one.shape[1] for one in world.used):
        text += ", from fewer layers"
    return text


def print_plan(stages, options):
    """Print what the stages will take: a table, what dominates it, and what is doubtful."""
    machine = machine_of(options)
    world = World(stages, machine, read_measurements())
    planned = estimates(stages, world)
    kind = gpus_as_text(machine.gpus) if machine.gpus else "no GPU"
    if machine.gpus and judge_count(world):
        _, own, shared = split_gpus(list(range(machine.gpus)), machine.judge_gpus)
        kind += ", shared with the judge" if shared else f", the last {len(own)} for the judge"
    print(f"plan for {machine.name} ({kind}); nothing is run")
    print(f"lengths and shares: {world.profile.source}")
    print(f"speeds: {speed_source(world)}")
    print()
    for line in in_columns([COLUMNS, *table_rows(planned, machine)]):
        print(line)
    print("(sampled, read: tokens; asked: calls to judges; GB: on each GPU; disk: bytes)")
    print()
    seconds = sum(one.seconds for one in planned)
    held = ""
    if machine.gpus:
        machines = max(processes_of(stage.command)[0] for stage in stages)
        held = f", {seconds / 3600 * machines * machine.gpus:.1f} GPU-hours"
    print(f"about {duration(seconds)}{held}; most of it:")
    for line in dominating(planned):
        print(line)
    for line in [*doubts(planned, machine, stages), *world.notes, *missing_files(world)]:
        print(textwrap.fill(f"note: {line}", 110, subsequent_indent="      ",
                            break_on_hyphens=False))


def missing_files(world):
    """A line about files of prompts that are not here."""
    if not world.missing:
        return []
    files = ", ".join(f"{name} ({count:,})" for name, count in world.missing.items())
    return [f"not here yet, taken as published (prompts): {files}. "
            f"Get them with: python -m benchmarks.fetch {' '.join(world.missing)}"]
