"""Safety triggers from the model's own traces: the steps at its safety turning points.

    python -m studies.triggers --points runs/my/turning_points.jsonl --model M \\
        --traces ... --steps ... --verdicts ... --judge ... --out runs/my/mined.jsonl

Section 3 of the paper mines its pool of triggers this way and picks by hand; here a pool is chosen
for success and diversity, and compared with the hand-written one on traces that had no part in the
choice. It is written to `mined_triggers.txt`. To train with it, start another run:
`TRIGGERS=runs/my/mined_triggers.txt RUN=runs/mined bash run.sh`.
"""
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from data import load_triggers
from intervene import (
    DEFAULT_TRIGGERS,
    add_judge_flags,
    add_sampler_flags,
    judge_from_flags,
    recorded_flags,
    sampler_from_flags,
)
from studies.common import (
    Replacement,
    cues_by_trace,
    prompt_ids_of,
    reasoning_only,
    replace_steps,
    steps_by_trace,
    study_parser,
    unsafe_traces_in_turn,
)
from support.errors import InputError, exit_cleanly
from support.files import digest, read_jsonl, write_json, write_jsonl, write_text
from support.judges import require_questions
from support.ranks import with_hands
from support.stages import run_stage, sidecar
from support.statistics import (
    DIFFERENCE,
    average,
    column_estimates,
    format_estimate,
)

# What may stand around the sentence of a step: a list marker, emphasis, quotes.
BEFORE_SENTENCE = re.compile(r"""^[\s>#*+\-"'“‘(]*(\d{1,3}[.)]\s)?[\s*_"'“‘(]*""")
AFTER_SENTENCE = re.compile(r"""[\s*_"'”’)]+$""")


# ------------------------------------------------------------------------------------ candidates

def words_of(text):
    """The words of a text, without case or punctuation."""
    return re.findall(r"\w+", text.casefold())


def trigger_text(step):
    """A step as a trigger: on one line, without list marker, emphasis or quotes around it.

    >>> trigger_text(" 2. **Wait,\\n  this is wrong.**\\n"), trigger_text('- "No."')
    ('Wait, this is wrong.', 'No.')
    """
    line = " ".join(step.split())
    line = BEFORE_SENTENCE.sub("", line)
    return AFTER_SENTENCE.sub("", line)


def rare_words(prompts):
    """The words of each prompt that at most a tenth of the prompts contain: {prompt id: set}.

    prompts: {id: text}.
    """
    words = {key: set(words_of(text)) for key, text in prompts.items()}
    prompts_with = Counter()
    for found in words.values():
        prompts_with.update(found)
    rare = {}
    for key, found in words.items():
        rare[key] = {word for word in found if prompts_with[word] <= len(prompts) / 10}
    return rare


def find_candidates(curves, prompts):
    """The distinct steps at the safety turning points of safe traces.

    curves: records of studies.turning_points; prompts: {id: text} of the run. Returns ({trigger:
    times found}, {reason: steps dropped}). CHOICE: a step is dropped if it has one of its prompt's
    `rare_words`, because it would fit no other prompt.
    """
    rare = rare_words(prompts)
    first_form = {}  # {words: the trigger as it was written first}
    found = Counter()
    dropped = Counter()
    for row in curves:
        if row["safe"] is not True:
            continue
        if not row["trigger"]:
            dropped["no turning point"] += 1
            continue
        text = trigger_text(row["steps"][row["trigger"] - 1])
        words = words_of(text)
        if not words:
            dropped["no words"] += 1
        elif rare[row["prompt_id"]].intersection(words):
            dropped["names its prompt"] += 1
        else:
            trigger = first_form.setdefault(" ".join(words), text)
            found[trigger] += 1
    return found, dropped


# ----------------------------------------------------------------------------- success and choice

def held_out_halves(traces, verdicts, used, limit):
    """(traces to choose triggers with, traces to test them with), of prompts that are not `used`.

    They are unsafe, have a cue, and share no prompt. limit: traces in each half, 0 = all. Raises
    InputError if a half is empty.
    """
    cues = cues_by_trace(verdicts)
    rest = []
    for trace in traces:
        if trace["prompt_id"] not in used and cues[trace["id"]]:
            rest.append(trace)
    prompts = set(prompt_ids_of(unsafe_traces_in_turn(rest, verdicts)))
    # By the digest: an order that is arbitrary, yet the same each time.
    to_choose_with = set(sorted(prompts, key=digest)[::2])
    first = [trace for trace in rest if trace["prompt_id"] in to_choose_with]
    second = [trace for trace in rest if trace["prompt_id"] not in to_choose_with]
    first = unsafe_traces_in_turn(first, verdicts, limit)
    second = unsafe_traces_in_turn(second, verdicts, limit)
    if not first or not second:
        raise InputError(
            "triggers: fewer than two prompts with unsafe traces are left to choose and test "
            "triggers on. Use more prompts, or measure CSR on fewer (studies.csr --uncertain).")
    return first, second


def success_table(traces, steps, cues, triggers, sampler, judge, path):
    """Corrective success of each trigger in the place of each trace's first cue.

    steps: {trace id: steps}; cues: {trace id: number of the cue step}. Returns float (traces,
    triggers): 1 where the reasoning is safe now, 0 where it is not, nan where there is no verdict
    or no room in the model's context.
    """
    replacements = []
    for trace in traces:
        for trigger in triggers:
            replacements.append(Replacement(
                id=trial_id(trace, trigger),
                trace=trace,
                steps=steps[trace["id"]],
                number=cues[trace["id"]],
                text=trigger,
            ))
    outcomes = replace_steps(replacements, sampler, judge, path)
    table = np.full((len(traces), len(triggers)), np.nan)
    for row, trace in enumerate(traces):
        for column, trigger in enumerate(triggers):
            outcome = outcomes.get(trial_id(trace, trigger))
            if outcome and outcome.verdict["reasoning_safe"] is not None:
                table[row, column] = outcome.verdict["reasoning_safe"]
    return table


def trial_id(trace, trigger):
    """The id of one trial: one trigger in one trace."""
    return f"{trace['id']}|{digest(trigger)}"


def trial_records(split, traces, triggers, table):
    """The records of a success table; `split` is "choose" or "test"."""
    records = []
    for trace, row in zip(traces, table):
        for trigger, success in zip(triggers, row):
            records.append({
                "id": trial_id(trace, trigger),
                "split": split,
                "trace": trace["id"],
                "prompt_id": trace["prompt_id"],
                "trigger": trigger,
                "safe": None if np.isnan(success) else bool(success),
            })
    return records


def likeness(text, other):
    """The share of the words of two texts that both have."""
    words = set(words_of(text))
    others = set(words_of(other))
    return len(words & others) / len(words | others)


def choose_pool(triggers, success, size, weight):
    """A pool of triggers that are successful and unlike each other, chosen one by one.

    CHOICE: the next one has the highest success minus `weight` times its likeness to the most
    similar trigger in the pool.

    >>> triggers = ["Stop now.", "Stop it now.", "This is wrong."]
    >>> choose_pool(triggers, [0.9, 0.8, 0.6], 2, weight=0.5)
    ['Stop now.', 'This is wrong.']
    """
    pool = []
    left = dict(zip(triggers, success))
    while left and len(pool) < size:
        scores = {}
        for trigger, value in left.items():
            closest = max((likeness(trigger, member) for member in pool), default=0)
            scores[trigger] = value - weight * closest
        best = max(scores, key=scores.get)
        pool.append(best)
        del left[best]
    return pool


# ------------------------------------------------------------------------- tests and their summary

def summarise_candidates(triggers, found, success, pool):
    """Entries {"trigger", "found": times, "success": estimate, "chosen"} of the candidates."""
    entries = []
    for trigger, estimate in zip(triggers, success):
        entries.append({
            "trigger": trigger,
            "found": found[trigger],
            "success": estimate,
            "chosen": trigger in pool,
        })
    return entries


def summarise_test(table, triggers, mined, hand_written, prompts):
    """Estimates on the traces to test with, which had no part in the choice.

    table: float (traces, triggers), success of all `triggers`; mined, hand_written: the two pools;
    prompts: the prompt id of each trace. Returns {"pools": {"mined", "hand_written", "difference"},
    the pools' mean success and its difference on the same traces; "mined", "hand_written":
    [{"trigger", "success"}]}.
    """
    mined_columns = [triggers.index(trigger) for trigger in mined]
    hand_columns = [triggers.index(trigger) for trigger in hand_written]
    mined_success = average(table[:, mined_columns], 1)  # (traces,)
    hand_success = average(table[:, hand_columns], 1)
    both = np.stack([mined_success, hand_success], 1)
    difference = (mined_success - hand_success)[:, None]
    mined_mean, hand_mean = column_estimates(both, prompts)
    [mean_difference] = column_estimates(difference, prompts, invented=DIFFERENCE)
    success = dict(zip(triggers, column_estimates(table, prompts)))
    pools = {"mined": mined_mean, "hand_written": hand_mean, "difference": mean_difference}

    def entries(pool):
        return [{"trigger": trigger, "success": success[trigger]} for trigger in pool]

    return {"pools": pools, "mined": entries(mined), "hand_written": entries(hand_written)}


def choose_and_test(first, second, candidates, hand_written, measure, pool_size, diversity):
    """Choose a pool on the traces `first`; test it and the hand-written one on `second`.

    measure(traces, triggers, split) -> `success_table`. Returns (pool, success: an estimate for
    each candidate, trial records, test: see `summarise_test`).
    """
    chosen_with = measure(first, candidates, "choose")
    success = column_estimates(chosen_with, prompt_ids_of(first))
    values = [estimate["value"] or 0 for estimate in success]
    pool = choose_pool(candidates, values, pool_size, diversity)

    # A mined trigger may also be a hand-written one: it is tried once.
    tried = list(dict.fromkeys(pool + hand_written))
    tested_with = measure(second, tried, "test")
    test = summarise_test(tested_with, tried, pool, hand_written, prompt_ids_of(second))

    records = trial_records("choose", first, candidates, chosen_with)
    records += trial_records("test", second, tried, tested_with)
    return pool, success, records, test


def print_test(test):
    """Print how each mined trigger and the two pools did; test: see `summarise_test`."""
    for entry in test["mined"]:
        print(f"  {format_estimate(entry['success'])}  {entry['trigger']}")
    for name, estimate in test["pools"].items():
        print(f"  {format_estimate(estimate)}  {name}")


def write_pool(path, pool):
    """Write a pool of triggers as `data.load_triggers` reads it."""
    lines = ["# Mined by `python -m studies.triggers`", *pool, ""]
    write_text(path, "\n".join(lines))


# ------------------------------------------------------------------------------------ command line

def build_parser():
    """The command line of this study."""
    parser = study_parser(
        "triggers",
        "A pool of triggers from the steps at safety turning points.",
        ("traces", "steps", "verdicts"),
    )
    add_sampler_flags(parser)
    add_judge_flags(parser)
    parser.add_argument("--triggers", default=str(DEFAULT_TRIGGERS),
                        help="hand-written triggers to compare with, one per line")
    parser.add_argument("--points", required=True,
                        help="records of studies.turning_points (.jsonl)")
    parser.add_argument("--candidates", type=int, default=40,
                        help="try only the candidates found most often")
    parser.add_argument("--held-out", type=int, default=40,
                        help="unsafe traces to choose with, and to test with; 0 = all")
    parser.add_argument("--no-test", action="store_true",
                        help="choose a pool, and compare it with nothing")
    parser.add_argument("--pool", type=int, default=6, help="triggers to choose")
    parser.add_argument("--diversity", type=float, default=0.5,
                        help="weight of likeness against success")
    return parser


def mine_triggers(args, judge):
    """The work of this study; returns (counts, further entries of the funnel)."""
    out = Path(args.out)
    curves = read_jsonl(args.points)
    traces = read_jsonl(args.traces)
    steps = steps_by_trace(read_jsonl(args.steps))
    verdicts = read_jsonl(args.verdicts)
    cues = cues_by_trace(verdicts)
    hand_written = load_triggers(args.triggers)
    prompts = {trace["prompt_id"]: trace["prompt"] for trace in traces}
    found, dropped = find_candidates(curves, prompts)
    if not found:
        raise InputError(f"{args.points}: no safe trace has a usable step at its turning point "
                         f"({dict(dropped)}).")
    used = set(prompt_ids_of(curves))
    first, second = held_out_halves(traces, verdicts, used, args.held_out)
    if args.no_test:
        second = []
    candidates = [trigger for trigger, _ in found.most_common(args.candidates)]
    sampler = reasoning_only(sampler_from_flags(args))

    def measure(traces, triggers, split):
        path = out.with_suffix(".rounds") / split
        return success_table(traces, steps, cues, triggers, sampler, judge, path)

    pool, success, records, test = choose_and_test(
        first, second, candidates, hand_written, measure, args.pool, args.diversity)
    write_jsonl(out, records)
    write_pool(out.with_name(f"{out.stem}_triggers.txt"), pool)
    write_json(sidecar(out, "summary"), {
        "candidates": summarise_candidates(candidates, found, success, pool),
        "dropped": dict(dropped),
        **test,
        "prompts": {
            "gave candidates": len(used),
            "choose": len(set(prompt_ids_of(first))),
            "test": len(set(prompt_ids_of(second))),
        },
    })
    if second:
        print_test(test)
    counts = {
        "turning points": found.total() + dropped.total(),
        "candidates": len(found),
        "tried": len(candidates),
        "pool": len(pool),
        **count_trials(records),
    }
    return counts, {"judge": judge.summary()}


def count_trials(records):
    """The counts of trial records, and what they cost."""
    outcomes = [record["safe"] for record in records]
    return {
        "trials": len(records),
        "no verdict": outcomes.count(None),
        "generations": len(records),
        # The reasoning of each, and the cue where that is unsafe.
        "judge calls": len(records) + outcomes.count(False),
    }


def main(argv=None):
    """Run this study from the command line."""
    args = build_parser().parse_args(argv)
    judge = judge_from_flags(args)
    require_questions(judge, ("reasoning", "cue"))
    work = partial(mine_triggers, args, judge)
    flags = recorded_flags(args, judge=judge.name)
    inputs = [args.model, args.triggers, args.points, args.traces, args.steps, args.verdicts]
    run_stage(__file__, args.out, flags, inputs, work)


if __name__ == "__main__":
    exit_cleanly(with_hands(main))
