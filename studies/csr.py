"""Continuation safety ratio along traces (Section 3, Eq. 1).

    python -m studies.csr --model M --traces ... --steps ... --verdicts ... --judge ... --out FILE

S_i(x, z) = P[z[:i] || the model's own continuation of it is safe]. Positions are numbers of tokens:
i stands for the prefix z[:i] = `trace["ids"][:i]`.

CHOICE: a continuation that follows the trace up to the next position is a continuation of that
position too, so only continuations that leave the trace are sampled. Where each leaves is drawn
from the model's distributions along the trace, which take one forward pass. This costs about a
tenth of sampling all of them.
"""
import argparse
from collections import Counter, defaultdict
from itertools import islice
from typing import NamedTuple

import torch

from data import Appender, Completion, Request, decode, split_reasoning
from intervene import (
    add_judge_flags,
    add_sampler_flags,
    judge_from_flags,
    recorded_flags,
    sampler_from_flags,
)
from model import next_token, request_uniforms
from studies.common import (
    prompt_ids_of,
    reasoning_only,
    safety_by_trace,
    step_starts,
    steps_by_trace,
    study_parser,
)
from support.errors import InputError, exit_cleanly
from support.files import digest, read_jsonl, stream_jsonl
from support.fused_head import output_logits
from support.judges import require_questions
from support.ranks import with_hands, world
from support.stages import run_stage
from support.statistics import wilson

VERDICT_LETTERS = {True: "1", False: "0", None: "?"}  # a verdict as it stands in a record


# ------------------------------------------------------------------------------- what to measure

def uncertain_traces(traces, verdicts, prompts, per_prompt):
    """Complete traces of prompts with uncertain outcome: some rollouts safe and some not.

    prompts: how many, 0 = all; per_prompt: how many safe and how many unsafe traces of each, 0 =
    all. CHOICE: the paper names 30 such prompts; here they are those whose share of safe rollouts
    is closest to one half, ties in an arbitrary, fixed order. Raises InputError if there is none.
    """
    reasoning_safe = safety_by_trace(verdicts)
    safe_traces = defaultdict(list)  # by prompt
    unsafe_traces = defaultdict(list)
    for trace in traces:
        safe = reasoning_safe[trace["id"]]
        if trace["truncated"] or safe is None:
            continue
        group = safe_traces if safe else unsafe_traces
        group[trace["prompt_id"]].append(trace)

    def certainty(prompt):
        safe = len(safe_traces[prompt])
        share = safe / (safe + len(unsafe_traces[prompt]))
        return abs(share - 0.5), digest(prompt)

    mixed = sorted(safe_traces.keys() & unsafe_traces.keys(), key=certainty)
    if not mixed:
        raise InputError("csr: no prompt has both safe and unsafe rollouts. "
                         "Sample more of them (rollouts --samples).")
    chosen = []
    for prompt in mixed[:prompts or None]:
        chosen += safe_traces[prompt][:per_prompt or None]
        chosen += unsafe_traces[prompt][:per_prompt or None]
    return chosen


def positions_of(starts, at):
    """The prefixes at which CSR is measured, from nothing of the reasoning to all of it.

    starts: the token at which each step begins and, last, the end of the reasoning.

    >>> positions_of([1, 4, 9], "step"), positions_of([1, 4, 9], "every:3")
    ([1, 4, 9], [1, 4, 7, 9])
    >>> positions_of([0, 2, 3], "token")
    [0, 1, 2, 3]
    """
    if at == "step":
        return sorted(set(starts))
    stride = 1
    if at.startswith("every:"):
        stride = int(at.removeprefix("every:"))
    end = starts[-1]
    return [*range(starts[0], end, stride), end]


# ------------------------------------------------------------------ where continuations part ways

class Position(NamedTuple):
    """One position of one trace, and where each of its continuations leaves the trace."""
    id: str          # "TRACE@i"
    trace: dict
    i: int           # the prefix is z[:i]
    following: int | None  # the next position measured; None at the last one
    departures: list  # ids up to and including the first that differs; None: it reaches `following`

    def departing(self):
        """The continuations that leave the trace: {"TRACE@i:k": ids to continue from}."""
        found = {}
        for k, ids in enumerate(self.departures):
            if ids is not None:
                found[f"{self.id}:{k}"] = ids
        return found


@torch.no_grad()
def predicting_states(sampler, trace):
    """Hidden states that predict each token of a trace, (tokens, H), from a local sampler."""
    model = sampler.load()
    ids = torch.tensor([trace["prompt_ids"] + trace["ids"]], device=model.device)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    return hidden[len(trace["prompt_ids"]) - 1:]


@torch.no_grad()
def departures_from(sampler, trace, hidden, i, following, continuations):
    """Where each continuation of z[:i] leaves the trace: `departures` of a Position.

    hidden: the trace's `predicting_states`, from which the next tokens are drawn as the sampler
    draws them. Without it, or at the last position, all continuations leave at once.
    """
    ids = trace["ids"]
    if hidden is None or following is None:
        return [ids[:i]] * continuations
    model = sampler.load()
    options = sampler.options
    count = (following - i) * continuations
    uniforms = request_uniforms(options["seed"], position_id(trace, i), count)
    uniforms = uniforms.view(-1, continuations)  # a row for each token from i on
    departures = [None] * continuations
    for j, row in zip(range(i, following), uniforms):
        logits = output_logits(model, hidden[j]).expand(continuations, -1)  # (continuations, V)
        row = row.to(logits.device)
        drawn = next_token(logits, options["temperature"], options["top_p"], row)
        for k, token in enumerate(drawn.tolist()):
            if departures[k] is None and token != ids[j]:
                departures[k] = ids[:j] + [token]
    return departures


def position_id(trace, i):
    """The id of a CSR record."""
    return f"{trace['id']}@{i}"


def position_batches(chosen, sampler, continuations, size, share):
    """Lists of Positions that need at least `size` continuations to be sampled (the last: fewer).

    chosen: [(trace, positions)]. The positions of a trace come from last to first, because each
    takes over verdicts of the position after it.
    """
    batch = []
    count = 0
    for trace, positions in chosen:
        hidden = None
        if share:
            hidden = predicting_states(sampler, trace)
        following = None
        for i in reversed(positions):
            departures = departures_from(sampler, trace, hidden, i, following, continuations)
            batch.append(Position(position_id(trace, i), trace, i, following, departures))
            count += continuations - departures.count(None)
            following = i
            if count >= size:
                yield batch
                batch = []
                count = 0
    if batch:
        yield batch


# --------------------------------------------------------------------------- sampling and judging

def measure_csr(path, chosen, sampler, judge, continuations, size, share=True, together=1):
    """Append the CSR record of each position of each trace to `path`, last positions first.

    chosen: [(trace, positions)]. Record: {"id": "TRACE@i", "trace", "prompt_id", "i", "verdicts": a
    character for each continuation, 1 safe, 0 unsafe, ? unjudged; "sampled": how many left the
    trace before the next position; "truncated": how many of these never ended; "csr": share of 1
    among 0 and 1, None without any; "low", "high": its Wilson interval}.

    A continuation that is not sampled takes over a verdict of the next position, each at most once.
    So the continuations of one position are independent and distributed as Eq. 1 asks, while
    neighbouring positions resemble each other more than independent ones would. With `share` off (a
    server gives no probabilities) all are sampled at each position.

    The texts are not kept: they would take hundreds of times the space of the traces. The batches
    follow from the arguments alone, so a restart makes the same ones and skips the finished.
    together: how many batches are sampled at the same time, which changes none of them.
    """
    records = Appender(path)
    verdicts = {record["id"]: record["verdicts"] for record in stream_jsonl(path)}
    batches = position_batches(chosen, sampler, continuations, size, share)
    missing = unfinished_batches(batches, records.done)
    while several := list(islice(missing, together)):
        title = f"csr, {len(records.done)} positions done"
        completions = sample_departing(several, sampler, title)
        for batch in several:
            judge_batch(batch, completions, sampler, judge, records, verdicts)
    records.close()
    ids = []
    for trace, positions in chosen:
        ids += [position_id(trace, i) for i in positions]
    return records.read(ids)


def unfinished_batches(batches, done):
    """Those batches of Positions of which some have no record yet."""
    for batch in batches:
        if any(position.id not in done for position in batch):
            yield batch


def judge_batch(batch, completions, sampler, judge, records, verdicts):
    """Judge the continuations of a batch of Positions, and write their records.

    completions: see `sample_departing`; verdicts: those of every position so far, {"TRACE@i":
    letters}; the batch's are added.
    """
    texts = {}
    for position in batch:
        for key, ids in position.departing().items():
            if key in completions:
                ids = ids + completions[key].ids
            text = decode(sampler.tokenizer, ids, sampler.eos)
            texts[key] = position.trace["prompt"], split_reasoning(text).reasoning
    letters = judge_texts(texts, judge)
    for position in batch:
        following = ""
        if position.following is not None:
            following = verdicts[position_id(position.trace, position.following)]
        found = position_verdicts(position, letters, following)
        verdicts[position.id] = found
        records.write(csr_record(position, found, completions))


def sample_departing(batches, sampler, title):
    """Completions of the continuations that leave the trace: {"TRACE@i:k": Completion}.

    Those whose differing token is EOS have ended there, so they need none.
    """
    groups = []
    for batch in batches:
        requests = []
        for position in batch:
            for key, ids in position.departing().items():
                if not ids or ids[-1] not in sampler.eos:
                    requests.append(Request(key, position.trace["prompt_ids"] + ids))
        groups.append(requests)
    together = {}
    if len(groups) > 1:
        together["groups"] = groups
    completions = {}
    for key, ids, finished in sampler(sum(groups, []), title=title, **together):
        completions[key] = Completion(key, ids, finished)
    return completions


def judge_texts(texts, judge):
    """Verdicts as letters, {key: "1", "0" or "?"}; texts: {key: (prompt, reasoning)}.

    Equal texts are asked once.
    """
    distinct = list(dict.fromkeys(texts.values()))
    items = [{"prompt": prompt, "text": text} for prompt, text in distinct]
    answers = dict(zip(distinct, judge.ask("reasoning", items)))
    return {key: VERDICT_LETTERS[answers[text]] for key, text in texts.items()}


def position_verdicts(position, letters, following):
    """The verdicts on a position's continuations, those not sampled taken from the next position.

    letters: {"TRACE@i:k": letter} of the sampled ones; following: the next position's verdicts.
    """
    shared = iter(following)
    verdicts = ""
    for k, ids in enumerate(position.departures):
        if ids is None:
            verdicts += next(shared)
        else:
            verdicts += letters[f"{position.id}:{k}"]
    return verdicts


def csr_record(position, verdicts, completions):
    """The record of a position; see `measure_csr`."""
    departing = position.departing()
    sampled = [completions[key] for key in departing if key in completions]
    return {
        "id": position.id,
        "trace": position.trace["id"],
        "prompt_id": position.trace["prompt_id"],
        "i": position.i,
        "verdicts": verdicts,
        "sampled": len(departing),
        "truncated": sum(completion.finished == "length" for completion in sampled),
        **safety_ratio(verdicts),
    }


def safety_ratio(verdicts):
    """A position's estimate of Eq. 1 from its verdicts, with its Wilson interval.

    >>> round(safety_ratio("110?")["csr"], 4), safety_ratio("??")
    (0.6667, {'csr': None, 'low': 0.0, 'high': 1.0})
    """
    safe = verdicts.count("1")
    judged = len(verdicts) - verdicts.count("?")
    low, high = wilson(safe, judged)
    csr = safe / judged if judged else None
    return {"csr": csr, "low": low, "high": high}


def count_csr(records):
    """The totals of the CSR records."""
    counts = Counter()
    for record in records:
        counts["continuations"] += len(record["verdicts"])
        counts["sampled"] += record["sampled"]
        counts["truncated"] += record["truncated"]
        counts["unjudged"] += record["verdicts"].count("?")
    # At most so many judge calls, since equal texts are asked once.
    cost = {"generations": counts["sampled"], "judge calls": counts["sampled"]}
    return {"positions": len(records), **counts, **cost}


# ------------------------------------------------------------------------------------ command line

def positions_flag(text):
    """The value of --at: `token`, `step` or `every:K`."""
    if text in ("token", "step"):
        return text
    word, _, stride = text.partition(":")
    if word == "every" and stride.isdecimal() and int(stride) > 0:
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r}: write token, step or every:K, such as every:5")


def build_parser():
    """The command line of this study."""
    parser = study_parser(
        "csr",
        "Continuation safety ratio along traces of prompts with uncertain outcome (Eq. 1).",
        ("traces", "steps", "verdicts"),
    )
    add_sampler_flags(parser)
    add_judge_flags(parser)
    parser.add_argument("--at", type=positions_flag, default="token",
                        help="where to measure: token, step or every:K tokens")
    parser.add_argument("--continuations", type=int, default=32,
                        help="continuations of each prefix")
    parser.add_argument("--no-share", action="store_true",
                        help="sample all of them at each position (about ten times the cost)")
    parser.add_argument("--uncertain", type=int, default=30,
                        help="prompts, the most uncertain first; 0 = all mixed ones")
    parser.add_argument("--per-prompt", type=int, default=1,
                        help="safe traces of each of them, and unsafe ones; 0 = all")
    return parser


def main(argv=None):
    """Run this study from the command line."""
    args = build_parser().parse_args(argv)
    if args.continuations < 1:
        raise InputError(f"--continuations {args.continuations}: use 1 or more.")
    judge = judge_from_flags(args)
    require_questions(judge, ("reasoning",))

    def work():
        sampler = reasoning_only(sampler_from_flags(args))
        steps = steps_by_trace(read_jsonl(args.steps))
        traces = uncertain_traces(
            read_jsonl(args.traces), read_jsonl(args.verdicts), args.uncertain, args.per_prompt)
        chosen = []
        for trace in traces:
            starts = step_starts(sampler.tokenizer, trace, steps[trace["id"]])
            chosen.append((trace, positions_of(starts, args.at)))
        # A batch is about a wave of the local sampler; a server takes all continuations of one
        # prefix in one request.
        size = 4 * recorded_flags(args)["batch_size"]
        if args.server:
            size = 4 * args.in_flight * args.continuations
        share = not args.server and not args.no_share
        together = 1
        if world() > 1 and not args.server:
            together = world()  # a batch is hardly more than a wave
        records = measure_csr(
            args.out, chosen, sampler, judge, args.continuations, size, share, together)
        prompts = set(prompt_ids_of(traces))
        counts = {"prompts": len(prompts), "traces": len(traces), **count_csr(records)}
        return counts, {"judge": judge.summary()}

    flags = recorded_flags(args, judge=judge.name)
    inputs = [args.model, args.traces, args.steps, args.verdicts]
    run_stage(__file__, args.out, flags, inputs, work)


if __name__ == "__main__":
    exit_cleanly(with_hands(main))
