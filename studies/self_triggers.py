"""Safety triggers that the model writes itself, trace by trace, without any pool.

    python -m studies.self_triggers pairs --model M --traces ... --steps ... --verdicts ... \\
        --judge ... --write instruction --out runs/my/self_written.jsonl
    python -m studies.self_triggers compare --mined mined_triggers.txt ... --out runs/my/self.jsonl

Section 4 of the paper takes its triggers from a pool. Here, at the cue of an unsafe trace, the
model writes what comes instead, in one of two ways (--write):

    instruction   it is asked to think of safety first: "INSTRUCTION PROMPT" + z[:h] + ...
    resample      nobody asks it for anything: PROMPT + z[:h] + ..., as often as it takes

The first sentences of these continuations are candidates, of resampling only where the continuation
turned out safe. Each is tried in the place of the cue under the plain prompt, and the one that
corrects the trace most often becomes its trigger. `pairs` makes preference pairs so, in the form of
`intervene.py pairs`. `compare` measures how often self-written, hand-written and mined triggers
correct the same traces; choose for it traces of prompts that no trigger was mined from.
"""
import argparse
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Appender, decode, load_triggers, render_prompt
from intervene import (
    DEFAULT_TRIGGERS,
    FILES,
    HERE,
    add_judge_flags,
    add_sampler_flags,
    count_rollouts,
    intervention_job,
    is_safe,
    judge_from_flags,
    judged_traces,
    make_pair,
    needs_intervention,
    outcome_of,
    recorded_flags,
    require_questions,
    sample_continuations,
    sample_traces,
    sampler_from_flags,
    split_steps,
)
from studies.common import (
    load_instruction,
    prompt_ids_of,
    reasoning_only,
    unsafe_traces_in_turn,
)
from studies.triggers import trigger_text, words_of
from support.errors import InputError, exit_cleanly
from support.files import read_jsonl, write_json, write_jsonl
from support.flags import refuse_below
from support.ranks import with_hands
from support.stages import add_stage_flags, run_stage, sidecar
from support.statistics import DIFFERENCE, column_estimates, format_estimate
from support.unanswered import AnsweredRecords, answers_so_far

DEFAULT_INSTRUCTION = str(HERE / "prompts" / "instruction.txt")
WAYS = ("instruction", "resample")
SENTENCE = 64  # tokens that are enough for a sentence
EXAMPLES = 10  # triggers to show of each source


# ------------------------------------------------------------------------------ asking the judge

def judge_field(path, field, traces, judge, chunk=256):
    """Whether the "reasoning" or the "response" of each trace is safe: {id: True, False or None}.

    Fewer questions than `intervene.judge_traces` asks: nobody needs the cue of a corrected trace
    here. Answers are appended to `path` after each `chunk` of traces; a second call picks up where
    the first left off. Raises Unanswered where an answer has not come, once all others are written.
    """
    records = AnsweredRecords(Appender(path))
    missing = [trace for trace in traces if trace["id"] not in records.done]
    for start in range(0, len(missing), chunk):
        part = missing[start:start + chunk]
        items = [{"prompt": trace["prompt"], "text": trace[field]} for trace in part]
        answers = answers_so_far(judge.ask(field, items))
        for trace, answer in zip(part, answers):
            records.write({"id": trace["id"], "safe": answer})
    records.close()
    found = records.read([trace["id"] for trace in traces])
    return {record["id"]: record["safe"] for record in found}


# -------------------------------------------------------------------------- writing candidates

@contextmanager
def short_samples(sampler, longest=None):
    """Within it a sampler stops at `</think>`, and after `longest` tokens if that is given."""
    eos = sampler.eos
    before = sampler.max_new_tokens
    reasoning_only(sampler)
    _set_longest(sampler, min(longest or before, before))
    try:
        yield sampler
    finally:
        sampler.eos = eos
        _set_longest(sampler, before)


def _set_longest(sampler, tokens):
    sampler.max_new_tokens = tokens
    options = getattr(sampler, "options", {})
    if "max_new_tokens" in options:  # the local sampler's own copy
        options["max_new_tokens"] = tokens


def with_instruction(tokenizer, trace, instruction):
    """A trace as if its prompt had been "INSTRUCTION PROMPT"."""
    prompt = f"{instruction} {trace['prompt']}"
    return {**trace, "prompt": prompt, "prompt_ids": render_prompt(tokenizer, prompt)}


def continue_before_cues(path, asked, count, sampler):
    """Let the model continue each trace from where its cue begins, `count` times.

    asked: traces with their `steps` and `cue`. Returns {trace id: [new trace]}; traces whose
    context leaves no room are left out. The new traces are written to `path`.
    """
    jobs = []
    origins = {}
    for trace in asked:
        for k in range(count):
            new_id = f"{trace['id']}|{k}"
            job, h = intervention_job(sampler, trace, trace["steps"], trace["cue"], "", new_id)
            if job is None:
                continue
            job["forced_ids"] = trace["ids"][:h]  # and nothing in the place of the cue
            jobs.append(job)
            origins[new_id] = trace["id"]
    found = {}
    for new in sample_traces(path, jobs, sampler, "candidates"):
        found.setdefault(origins[new["id"]], []).append(new)
    return found


def first_sentence(tokenizer, new):
    """The first sentence that the model wrote after the forced tokens, as a trigger; "" if none.

    A sentence that the limit on tokens cut short is none.
    """
    prefix = decode(tokenizer, new["ids"][:new["forced"]])
    reasoning = new["opening"] + new["reasoning"]
    steps = split_steps(reasoning[len(prefix):])
    if not steps:
        return ""
    cut_short = new["finished"] == "length" and len(steps) == 1
    return "" if cut_short else trigger_text(steps[0])


def distinct_sentences(sentences, cue):
    """The different sentences, the most frequent first, without those that repeat the cue.

    Sentences with equal words are equal.

    >>> distinct_sentences(["No.", "Wait, no.", "", "wait no", "I can help."], " I can help.")
    ['Wait, no.', 'No.']
    """
    first_form = {}
    times = Counter()
    cue_words = words_of(cue)
    for sentence in sentences:
        words = words_of(sentence)
        if words and words != cue_words:
            form = first_form.setdefault(" ".join(words), sentence)
            times[form] += 1
    return [sentence for sentence, _ in times.most_common()]


def write_candidates(way, unsafe, count, instruction, sampler, judge, folder):
    """What the model would write in the place of each trace's cue, in `count` continuations each.

    way: one of WAYS; unsafe: traces with their `steps` and `cue`. The files go to `folder`. Returns
    ({trace id: candidates}, cost: {"generations", "judge calls"}, {trace id: whether each of its
    continuations is safe}, the last one empty for "instruction", which asks no judge).
    """
    asked = unsafe
    longest = None
    if way == "instruction":
        asked = [with_instruction(sampler.tokenizer, trace, instruction) for trace in unsafe]
        longest = SENTENCE
    with short_samples(sampler, longest):
        written = continue_before_cues(folder / f"{way}.traces.jsonl", asked, count, sampler)
    every = []
    for trace in unsafe:
        every += written.get(trace["id"], [])
    cost = Counter({"generations": len(every)})
    safe = {}
    if way == "resample":
        safe = judge_field(folder / f"{way}.verdicts.jsonl", "reasoning", every, judge)
        cost["judge calls"] += len(every)

    candidates = {}
    outcomes = {}
    for trace in unsafe:
        news = written.get(trace["id"], [])
        if way == "resample":
            outcomes[trace["id"]] = [safe[new["id"]] for new in news]
            # Reasoning that never ended has not turned out safe.
            news = [new for new in news if safe[new["id"]] and new["finished"] == "stop"]
        sentences = [first_sentence(sampler.tokenizer, new) for new in news]
        cue = trace["steps"][trace["cue"] - 1]
        candidates[trace["id"]] = distinct_sentences(sentences, cue)
    return candidates, cost, outcomes


# --------------------------------------------------------------------------- trying candidates

class Trial(NamedTuple):
    """A sentence that was put in the place of a trace's cue, and what the model made of it."""
    trace: dict
    h: int       # tokens before the cue
    trigger: str
    new: dict    # the new trace, with `reasoning_safe` and `response_safe`


def run_trials(path, requests, sampler, judge, response=False):
    """Put sentences in the place of cues, let the model continue, judge its reasoning.

    requests: [(trace with `steps` and `cue`, sentence, id of the new trace)]; response: judge the
    response too, where the reasoning is safe. Returns ([Trial], cost). Picks up where it left off
    from the files `PATH.*.jsonl`; those that leave no room in the context are left out.
    """
    substitutions = []
    for trace, text, new_id in requests:
        substitutions.append((trace, trace["steps"], trace["cue"], text, new_id))
    continued = sample_continuations(f"{path}.traces.jsonl", substitutions, sampler, path.name)
    news = [new for *_, new in continued]
    reasoning_safe = judge_field(f"{path}.reasoning.jsonl", "reasoning", news, judge)
    cost = Counter({"generations": len(news), "judge calls": len(news)})
    response_safe = {}
    if response:
        worth_asking = []
        for new in news:
            if reasoning_safe[new["id"]] and not new["truncated"]:
                worth_asking.append(new)
        response_safe = judge_field(f"{path}.response.jsonl", "response", worth_asking, judge)
        cost["judge calls"] += len(worth_asking)
    trials = []
    for trace, h, trigger, new in continued:
        verdict = {
            "reasoning_safe": reasoning_safe[new["id"]],
            "response_safe": response_safe.get(new["id"]),
        }
        trials.append(Trial(trace, h, trigger, {**new, **verdict}))
    return trials, cost


def trial_requests(traces, candidates, tries):
    """The requests of `run_trials` that try each candidate of each trace `tries` times."""
    requests = []
    for trace in traces:
        for number, text in enumerate(candidates[trace["id"]]):
            for k in range(tries):
                requests.append((trace, text, f"{trace['id']}@{number}.{k}"))
    return requests


def best_triggers(trials, succeeded):
    """The trigger of each trace that succeeded most often: {trace id: trigger}.

    succeeded(trial) -> bool. CHOICE: of equal ones the first, which the model wrote most often; a
    trace that none corrected has no trigger.
    """
    wins = {}  # {trace id: {trigger: successes}}
    for trial in trials:
        by_trigger = wins.setdefault(trial.trace["id"], Counter())
        by_trigger[trial.trigger] += succeeded(trial)
    best = {}
    for trace_id, by_trigger in wins.items():
        trigger, most = by_trigger.most_common(1)[0]
        if most:
            best[trace_id] = trigger
    return best


def reasoning_corrected(trial):
    """Corrective success: the reasoning is safe now."""
    return trial.new["reasoning_safe"] is True


# ----------------------------------------------------------------------------------------- pairs

def gives_pair(trial):
    """Whether a trial may be the chosen side of a pair: the response must be safe as well."""
    return outcome_of(trial.trace, trial.h, trial.new) == "pairs"


def self_written_pairs(rollouts, way, count, tries, instruction, sampler, judge, folder):
    """Algorithm 1 with triggers that the model wrote for each trace itself.

    rollouts: traces with their `steps` and verdict fields. Returns (pairs, counts, more), as
    `intervene.intervene` does: at most one pair of each trace, its first complete and safe trial
    with its best trigger.
    """
    unsafe = [trace for trace in rollouts if needs_intervention(trace)]
    candidates, cost, _ = write_candidates(
        way, unsafe, count, instruction, sampler, judge, folder)
    requests = trial_requests(unsafe, candidates, tries)
    trials, more_cost = run_trials(folder / "trials", requests, sampler, judge, response=True)
    cost.update(more_cost)
    best = best_triggers(trials, gives_pair)

    pairs = {}
    for trial in trials:
        trace_id = trial.trace["id"]
        chosen = best.get(trace_id) == trial.trigger
        if chosen and trace_id not in pairs and gives_pair(trial):
            pairs[trace_id] = make_pair(
                sampler.tokenizer, sampler.eos, trial.trace, trial.new, trial.h, trial.trigger,
                source="harmful", interventions=1)

    counts = count_rollouts(rollouts)
    counts["with a candidate"] = sum(map(bool, candidates.values()))
    counts["candidates"] = sum(map(len, candidates.values()))
    counts["interventions"] = len(trials)
    counts["safe continuations"] = len([trial for trial in trials if is_safe(trial.new)])
    counts["pairs"] = len(pairs)
    counts.update(cost)
    outcomes = Counter(outcome_of(trial.trace, trial.h, trial.new) for trial in trials)
    used = Counter(pair["trigger"] for pair in pairs.values())
    return list(pairs.values()), counts, {
        "outcomes": dict(outcomes),
        "triggers": dict(used.most_common(EXAMPLES)),
    }


# ------------------------------------------------------------------------------------ comparison

def fresh_requests(traces, candidates, chosen, count):
    """Requests to measure with: {"any": [request], "best": [request]}, `count` for each trace.

    "any" takes a trace's candidates in turn, "best" the one `chosen` for it. Their ids differ from
    those of `trial_requests`, and so do their random numbers: the success that chose a trigger is
    not the one that is reported.
    """
    requests = {"any": [], "best": []}
    for row, trace in enumerate(traces):
        texts = candidates[trace["id"]]
        if not texts:
            continue
        for k in range(count):
            in_turn = texts[(row + k) % len(texts)]
            requests["any"].append((trace, in_turn, f"{trace['id']}@any.{k}"))
            requests["best"].append((trace, chosen[trace["id"]], f"{trace['id']}@best.{k}"))
    return requests


def success_rates(traces, trials):
    """Share of each trace's trials after which the reasoning is safe, float (traces,).

    CHOICE: a trace that has no trial was not corrected, 0; nan where no trial has a verdict.
    """
    verdicts = {trace["id"]: [] for trace in traces}
    tried = set()
    for trial in trials:
        tried.add(trial.trace["id"])
        safe = trial.new["reasoning_safe"]
        if safe is not None:
            verdicts[trial.trace["id"]].append(safe)
    return np.array([share_safe(verdicts[t["id"]], t["id"] in tried) for t in traces])


def share_safe(verdicts, tried):
    """The share of True; without verdicts nan, or 0 if nothing was tried."""
    if verdicts:
        return np.mean(verdicts)
    return np.nan if tried else 0.0


class Source(NamedTuple):
    """What one source of triggers achieves on some traces."""
    candidates: dict  # {trace id: [sentence]}
    chosen: dict      # {trace id: sentence}, of those that have a candidate
    rates: dict       # {"any", "best"}: float (traces,), success in fresh continuations
    cost: Counter     # of writing and trying the candidates


def measure_source(traces, candidates, tries, count, sampler, judge, folder):
    """Choose a trigger for each trace by trials, and measure it in fresh continuations.

    Returns (Source, cost of the measurement).
    """
    requests = trial_requests(traces, candidates, tries)
    trials, cost = run_trials(folder / "trials", requests, sampler, judge)
    best = best_triggers(trials, reasoning_corrected)
    chosen = {}
    for trace_id, texts in candidates.items():
        if texts:
            # Where no candidate succeeded, the first one is as good as any.
            chosen[trace_id] = best.get(trace_id, texts[0])
    rates = {}
    measuring = Counter()
    for kind, requests in fresh_requests(traces, candidates, chosen, count).items():
        fresh, used = run_trials(folder / kind, requests, sampler, judge)
        rates[kind] = success_rates(traces, fresh)
        measuring.update(used)
    return Source(candidates, chosen, rates, cost), measuring


def compare_sources(traces, pools, count, tries, fresh, instruction, sampler, judge, folder):
    """Measure pools of triggers, {name: [trigger]}, and self-written ones on the same traces.

    traces: with `steps` and `cue`; count: continuations to write candidates in; tries: trials of
    each; fresh: continuations of each trace to measure with. Returns ({name: Source}, float
    (traces,): share of continuations that are safe with nothing in the place of the cue, cost).
    """
    sources = {}
    total = Counter()
    for name, pool in pools.items():
        candidates = {trace["id"]: pool for trace in traces}
        with short_samples(sampler):
            sources[name], used = measure_source(
                traces, candidates, tries, fresh, sampler, judge, folder / name)
        total.update(used)
        total.update(sources[name].cost)
    for way in WAYS:
        candidates, writing, alone = write_candidates(
            way, traces, count, instruction, sampler, judge, folder)
        with short_samples(sampler):
            sources[way], used = measure_source(
                traces, candidates, tries, fresh, sampler, judge, folder / way)
        sources[way].cost.update(writing)
        total.update(used)
        total.update(sources[way].cost)
    # The continuations that resampling wrote, with nothing in the place of the cue.
    nothing = []
    for trace in traces:
        judged = [safe for safe in alone[trace["id"]] if safe is not None]
        nothing.append(share_safe(judged, True))
    return sources, np.array(nothing), total


def summarise_comparison(sources, nothing, traces):
    """Estimates over prompts, and each source less the hand-written pool on the same traces.

    Returns {"traces", "prompts", "nothing": estimate, "sources": {name: {"any", "best": success,
    "any_difference", "best_difference": paired, "with_a_candidate": share of traces, "candidates",
    "generations": a trace's mean to find its trigger, "triggers": [[text, times chosen]]}}}.
    """
    prompts = prompt_ids_of(traces)
    reference = sources["hand_written"].rates
    entries = {}
    for name, source in sources.items():
        entry = {}
        for kind, rates in source.rates.items():
            difference = (rates - reference[kind])[:, None]  # (traces, 1)
            [entry[kind]] = column_estimates(rates[:, None], prompts)
            if name != "hand_written":
                [entry[f"{kind}_difference"]] = column_estimates(
                    difference, prompts, invented=DIFFERENCE)
        sizes = [len(source.candidates[trace["id"]]) for trace in traces]
        entry["with_a_candidate"] = float(np.mean([size > 0 for size in sizes]))
        entry["candidates"] = float(np.mean(sizes))
        entry["generations"] = source.cost["generations"] / len(traces)
        times = Counter(source.chosen.values())
        entry["triggers"] = times.most_common(EXAMPLES)
        entries[name] = entry
    [alone] = column_estimates(nothing[:, None], prompts)
    return {
        "traces": len(traces),
        "prompts": len(set(prompts)),
        "nothing": alone,
        "sources": entries,
    }


def print_comparison(summary):
    """Print a summary as a table: success, and the difference from the hand-written pool."""
    print(f"  {'nothing':13} {format_estimate(summary['nothing'])}")
    for name, entry in summary["sources"].items():
        for kind in ("any", "best"):
            line = f"  {name:13} {kind:4} {format_estimate(entry[kind])}"
            difference = entry.get(f"{kind}_difference")
            if difference:
                line += f"   minus hand_written: {format_estimate(difference)}"
            print(line)
        print(f"  {'':13} {entry['candidates']:.1f} candidates, {entry['generations']:.1f} "
              f"generations a trace to find them; {entry['with_a_candidate']:.0%} have one")


def comparison_records(sources, traces):
    """A record for each trace and source: its candidates, the chosen one and its success."""
    records = []
    for name, source in sources.items():
        for row, trace in enumerate(traces):
            record = {
                "id": f"{trace['id']}|{name}",
                "trace": trace["id"],
                "prompt_id": trace["prompt_id"],
                "source": name,
                "candidates": source.candidates[trace["id"]],
                "chosen": source.chosen.get(trace["id"]),
            }
            for kind, rates in source.rates.items():
                record[kind] = None if np.isnan(rates[row]) else float(rates[row])
            records.append(record)
    return records


# ------------------------------------------------------------------------------------ command line

def read_rollouts(args):
    """The traces of the flags with their `steps` and verdict fields."""
    files = (args.traces, args.steps, args.verdicts)
    records = [read_jsonl(path) for path in files]
    return judged_traces(*records)


def run_pairs(args, sampler, judge):
    """Command `pairs`."""
    instruction = load_instruction(args.instruction)
    folder = Path(args.out).with_suffix(".rounds")
    pairs, counts, more = self_written_pairs(
        read_rollouts(args), args.write, args.candidates, args.tries, instruction, sampler, judge,
        folder)
    write_jsonl(args.out, pairs)
    for trigger, times in more["triggers"].items():
        print(f"  {times:4d} pairs: {trigger}")
    return counts, more


def run_compare(args, sampler, judge):
    """Command `compare`."""
    instruction = load_instruction(args.instruction)
    pools = {"hand_written": load_triggers(args.triggers)}
    if args.mined:
        pools["mined"] = load_triggers(args.mined)
    rollouts = [trace for trace in read_rollouts(args) if needs_intervention(trace)]
    traces = unsafe_traces_in_turn(rollouts, rollouts, args.held_out)
    if not traces:
        raise InputError(f"--traces {args.traces}: no unsafe trace with a cue. Sample more of them "
                         "(intervene.py rollouts --samples).")
    folder = Path(args.out).with_suffix(".rounds")
    sources, nothing, cost = compare_sources(
        traces, pools, args.candidates, args.tries, args.continuations, instruction, sampler, judge,
        folder)
    write_jsonl(args.out, comparison_records(sources, traces))
    summary = summarise_comparison(sources, nothing, traces)
    write_json(sidecar(args.out, "summary"), summary)
    print_comparison(summary)
    return {"traces": len(traces), "prompts": summary["prompts"], **cost}, {}


def build_parser():
    """The command line of this study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.self_triggers",
        description="Safety triggers that the model writes itself.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    purposes = {
        "pairs": "preference pairs with self-written triggers, without a pool",
        "compare": "corrective success of self-written, hand-written and mined triggers",
    }
    for name, purpose in purposes.items():
        command = commands.add_parser(name, help=purpose, description=purpose,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_common_flags(command)
        add = command.add_argument
        if name == "pairs":
            add("--write", required=True, choices=WAYS,
                help="what the model is asked to write the triggers after")
            add("--tries", type=int, default=1, help="trials of each candidate")
        else:
            add("--tries", type=int, default=2, help="trials of each candidate")
            add("--triggers", default=DEFAULT_TRIGGERS, help="hand-written triggers, one a line")
            add("--mined", help="mined triggers, one a line (of studies.triggers)")
            add("--held-out", type=int, default=40, help="unsafe traces to measure on; 0 = all")
            add("--continuations", type=int, default=4,
                help="fresh continuations of each trace to measure with")
    return parser


def add_common_flags(command):
    """The flags that both commands have."""
    command.add_argument("--out", required=True, help="file to write (.jsonl)")
    add_stage_flags(command)
    for file in ("traces", "steps", "verdicts"):
        command.add_argument(f"--{file}", required=True, help=FILES[file])
    add_sampler_flags(command)
    add_judge_flags(command)
    command.add_argument("--instruction", default=DEFAULT_INSTRUCTION,
                         help="a file with the sentence that asks to think of safety first")
    command.add_argument("--candidates", type=int, default=4,
                         help="continuations to take the candidates of a trace from")


def main(argv=None):
    """Run one command of this study."""
    args = build_parser().parse_args(argv)
    flags = recorded_flags(args)
    refuse_below(1, flags, "candidates", "tries")
    inputs = [args.model, args.instruction, args.traces, args.steps, args.verdicts]
    if args.command == "compare":
        refuse_below(1, flags, "continuations")
        inputs.append(args.triggers)
        if args.mined:
            inputs.append(args.mined)
    judge = judge_from_flags(args)
    require_questions(judge, ("reasoning", "response"))
    run = {"pairs": run_pairs, "compare": run_compare}[args.command]

    def work():
        counts, more = run(args, sampler_from_flags(args), judge)
        more["judge"] = judge.summary()
        return counts, more

    run_stage(__file__, args.out, recorded_flags(args, judge=judge.name), inputs, work)


if __name__ == "__main__":
    exit_cleanly(with_hands(main))
