"""What several studies share: flags, choosing traces, and replacing a step and continuing."""
import argparse
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from math import inf
from typing import NamedTuple

from data import CLOSE, decode, load_triggers
from intervene import FILES, intervention_job, judge_traces, sample_traces, segment
from support.errors import InputError
from support.files import digest
from support.stages import add_stage_flags

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character
SPAN = 30  # tokens that curves show on either side of a cue or a trigger


def study_parser(name, description, files):
    """A parser with `--out` and a flag for each of `files`, names of intervene.FILES."""
    parser = argparse.ArgumentParser(
        prog=f"python -m studies.{name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="file to write (.jsonl)")
    add_stage_flags(parser)
    for file in files:
        parser.add_argument(f"--{file}", required=True, help=FILES[file])
    return parser


# ------------------------------------------------------------------------------- reading records

def load_instruction(path):
    """The sentence that asks to think of safety first; InputError unless the file holds one."""
    sentences = load_triggers(path)
    if len(sentences) != 1:
        raise InputError(f"--instruction {path}: {len(sentences)} lines. Write one sentence.")
    return sentences[0]


def with_instruction(prompts, instruction):
    """Prompts with the instruction in front, under the same ids.

    >>> with_instruction([{"id": "a", "prompt": "How?"}], "Think first.")
    [{'id': 'a', 'prompt': 'Think first. How?'}]
    """
    return [{**prompt, "prompt": f"{instruction} {prompt['prompt']}"} for prompt in prompts]


class ByTrace(dict):
    """Something of each trace, by the trace's id. Raises InputError for a trace that has none."""

    def __missing__(self, trace_id):
        raise InputError(
            f"{trace_id}: a trace without its steps, or without a verdict record. Give --steps and "
            "--verdicts that were made from these --traces."
        )


def steps_by_trace(steps):
    """{trace id: its steps} of step records."""
    return ByTrace({record["id"]: record["steps"] for record in steps})


def cues_by_trace(verdicts):
    """{trace id: number of the step with the first compliance cue; 0 or None if there is none}."""
    return ByTrace({verdict["id"]: verdict["cue"] for verdict in verdicts})


def safety_by_trace(verdicts):
    """{trace id: whether its reasoning is safe, None without a verdict}."""
    return ByTrace({verdict["id"]: verdict["reasoning_safe"] for verdict in verdicts})


def prompt_ids_of(records):
    """The prompt id of each record."""
    return [record["prompt_id"] for record in records]


def step_starts(tokenizer, trace, steps):
    """[int], len(steps) + 1: the token at which each step begins, and where the reasoning ends.

    Each is the `data.token_index` of the step's first character, in one pass for all.
    """
    lengths = prefix_lengths(tokenizer, trace["ids"])
    # The shortest of all prefixes from each one on: it rises, even where the lengths do not.
    lengths.reverse()
    shortest = list(accumulate(lengths, min))
    shortest.reverse()
    characters = accumulate(map(len, steps), initial=len(trace["opening"]))
    return [bisect_right(shortest, n) - 1 for n in characters]


def prefix_lengths(tokenizer, ids):
    """For each i from 0 on the characters of ids[:i] decoded; inf where it ends inside a character.

    Each token is decoded once or twice, together with a few before it.
    """
    text = decode(tokenizer, ids)
    lengths = [0]
    first = 0    # the window decoded is ids[first:i]
    head = 0     # characters of the window that are known
    whole = 0    # ids[:whole] ends with a whole character,
    end = 0      # which is the text up to here
    for i in range(1, len(ids) + 1):
        added = decode(tokenizer, ids[first:i])[head:]
        if not text.startswith(added, end):
            lengths.append(inf)
            continue
        lengths.append(end + len(added))
        if added.endswith(BROKEN):
            continue  # perhaps half a character, and the rest is another broken one
        # Some tokenizers drop a space from the first token that they decode, so that the next
        # window begins with one that is known.
        first = whole
        whole = i
        head = len(decode(tokenizer, ids[first:whole]))
        end += len(added)
    return lengths


def unsafe_traces_in_turn(traces, verdicts, limit=0):
    """Complete traces with unsafe reasoning: the first of each prompt, then the second, ...

    So a `limit` (0 = all) keeps as many prompts as it can. They come in an arbitrary, fixed order.
    """
    reasoning_safe = safety_by_trace(verdicts)
    seen = Counter()
    keyed = []
    for trace in traces:
        if trace["truncated"] or reasoning_safe[trace["id"]] is not False:
            continue
        prompt = trace["prompt_id"]
        keyed.append((seen[prompt], digest(prompt), trace))
        seen[prompt] += 1
    keyed.sort(key=lambda entry: entry[:2])
    chosen = [trace for _, _, trace in keyed]
    return chosen[:limit or None]


# --------------------------------------------------------------------------- sampling reasoning

def reasoning_only(sampler):
    """Make a sampler of this process stop at `</think>`; a server does not stop there.

    Only reasoning is judged in these studies, and the response would be half of all tokens. Such
    traces have no `closing`, and they count as truncated elsewhere.
    """
    close = sampler.tokenizer.encode(CLOSE, add_special_tokens=False)
    if len(close) == 1:
        sampler.eos = {*sampler.eos, *close}
    return sampler


class Replacement(NamedTuple):
    """A text to put in the place of one step of a trace."""
    id: str
    trace: dict
    steps: list  # of the trace
    number: int  # of the step to replace, from 1
    text: str    # None stands for nothing: the model continues from z[:h] itself


class Outcome(NamedTuple):
    """What became of a replacement: the new trace, its steps and its verdict record."""
    trace: dict
    steps: list
    verdict: dict


def replace_steps(replacements, sampler, judge, path):
    """Put texts in the place of steps, let the model continue, and judge its reasoning.

    Picks up where it left off from the files `PATH.traces.jsonl` and `PATH.verdicts.jsonl`. Returns
    {id: Outcome}; replacements that leave no room to continue in the model's context are left out.
    """
    jobs = []
    for key, trace, steps, number, text in replacements:
        job, h = intervention_job(sampler, trace, steps, number, text or "", key)
        if job is None:
            continue
        if text is None:
            job["forced_ids"] = trace["ids"][:h]
        jobs.append(job)
    traces = sample_traces(f"{path}.traces.jsonl", jobs, sampler, path.name)
    # Not judged here: the response, which a server writes too.
    traces = [{**trace, "truncated": True} for trace in traces]
    steps = segment(traces)
    verdicts = judge_traces(f"{path}.verdicts.jsonl", traces, steps, judge)
    outcomes = {}
    for trace, record, verdict in zip(traces, steps, verdicts):
        outcomes[trace["id"]] = Outcome(trace, record["steps"], verdict)
    return outcomes
