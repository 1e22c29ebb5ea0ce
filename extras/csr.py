"""Continuation safety ratio, Eq. 1 of the paper: S_i(x, z) = P[z[:i] and the model's own continuation of it are safe].

    python intervene.py csr --model M --traces ... --steps ... --verdicts ... --judge ... --out runs/my/csr.jsonl

Positions are numbers of tokens: i stands for the prefix z[:i] = `trace["ids"][:i]`. CHOICE: a continuation that goes on
as the trace does, up to the next position, is a continuation of that one too. Only where it leaves the trace is anything
sampled, from the next token's distribution along the trace, which takes one forward pass: about a tenth of the cost.
"""
import argparse
from itertools import accumulate

import torch

import data
import intervene
import model as lm_code
from extras import client
from extras.estimates import wilson


def reasoning_only(sampler):
    """Let a sampler of this process stop at `</think>` (a server's goes on): only reasoning is judged here, and the
    response would be half of all tokens. Such traces have no `closing` and count as truncated elsewhere."""
    close = sampler.tokenizer.encode(lm_code.CLOSE, add_special_tokens=False)
    sampler.eos = {*sampler.eos, *(close if len(close) == 1 else ())}
    return sampler


def step_starts(tokenizer, trace, steps):
    """The token at which each step begins and, last, the end of the reasoning: len(steps) + 1 positions."""
    return [lm_code.token_index(tokenizer, trace["ids"], len(trace["opening"]) + n)
            for n in accumulate(map(len, steps), initial=0)]


def positions(starts, at):
    """The prefixes at which CSR is measured, from nothing of the reasoning to all of it.

    >>> positions([1, 4, 9], "step"), positions([1, 4, 9], "every:3"), positions([0, 2, 3], "token")
    ([1, 4, 9], [1, 4, 7, 9], [0, 1, 2, 3])
    """
    if at == "step":
        return sorted(set(starts))
    return sorted({*range(starts[0], starts[-1] + 1, 1 if at == "token" else int(at[6:])), starts[-1]})


def uncertain(traces, verdicts, prompts, per_prompt):
    """Complete traces of prompts with uncertain outcome, some rollouts safe and some not: `per_prompt` of either kind.

    CHOICE: the paper names 30 such prompts; here they are those whose share of safe rollouts is closest to one half, ties
    in an arbitrary, fixed order. 0 = all. Raises SystemExit if there is none.
    """
    safe, found = {v["id"]: v["reasoning_safe"] for v in verdicts}, {}
    for t in traces:
        if not t["truncated"] and safe[t["id"]] is not None:
            found.setdefault(t["prompt_id"], {True: [], False: []})[safe[t["id"]]].append(t)
    certain = lambda p: abs(len(found[p][True]) / len(found[p][True] + found[p][False]) - 0.5)
    mixed = sorted((p for p in found if all(found[p].values())), key=lambda p: (certain(p), data.digest(p)))
    if not mixed:
        raise SystemExit("csr: no prompt has both safe and unsafe rollouts. Sample more of them (rollouts --samples).")
    return [t for p in mixed[:prompts or None] for safe in (True, False) for t in found[p][safe][:per_prompt or None]]


def states(sampler, trace):
    """Hidden states that predict each token of a trace, float (tokens, H), from a sampler of this process."""
    model = sampler.load()
    ids = torch.tensor([trace["prompt_ids"] + trace["ids"]], device=model.device)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    return hidden[len(trace["prompt_ids"]) - 1:]


@torch.no_grad()
def branch(sampler, trace, hidden, i, following, continuations):
    """Where each continuation of z[:i] leaves the trace: the ids up to there; None where it goes on to z[:following].

    The tokens that decide this are drawn from `states`, as the sampler draws them. Without these, and at the last position
    measured (`following` None), all continuations leave at once.
    """
    ids, left = trace["ids"], [None] * continuations
    if hidden is None or following is None:
        return [ids[:i]] * continuations
    head, o = sampler.model.get_output_embeddings(), sampler.options
    uniforms = lm_code.request_uniforms(o["seed"], f"{trace['id']}@{i}", (following - i) * continuations)
    for j, uniform in zip(range(i, following), uniforms.view(-1, continuations)):
        logits = head(hidden[j]).expand(continuations, -1)
        drawn = lm_code.next_token(logits, o["temperature"], o["top_p"], uniform.to(logits.device)).tolist()
        left = [ids[:j] + [v] if prefix is None and v != ids[j] else prefix for prefix, v in zip(left, drawn)]
    return left


def parts(chosen, sampler, continuations, size, share):
    """Points in groups of at least `size` continuations to sample: {"TRACE@i": (trace, i, following, left)}.

    chosen: [(trace, positions)]. The positions of a trace come from last to first, `following` being the one before.
    """
    part, count = {}, 0
    for trace, at in chosen:
        hidden = states(sampler, trace) if share else None
        for i, following in zip(at[::-1], [None, *at[:0:-1]]):
            left = branch(sampler, trace, hidden, i, following, continuations)
            part[f"{trace['id']}@{i}"] = trace, i, following, left
            count += continuations - left.count(None)
            if count >= size:
                yield part
                part, count = {}, 0
    if part:
        yield part


def measure_csr(path, chosen, sampler, judge, continuations, size, share=True):
    """Append the CSR record of each position of each trace to `path`, from the last position to the first; resumes.

    chosen: [(trace, positions)]. Record: {"id": "TRACE@i", "trace", "prompt_id", "i", "verdicts": a character for each
    continuation, 1 safe, 0 unsafe, ? unjudged; "csr": share of 1 among 0 and 1, None without any; "low", "high": its Wilson
    interval; "sampled": how many left the trace before the next position and were sampled and judged; "truncated": how many
    of these never ended}. Any other takes over a verdict of the next position, each at most once: so the continuations
    of a position are independent and distributed as Eq. 1 asks, while neighbouring positions resemble each other more
    than independent ones would. With `share` off (a server gives no probabilities) all are sampled at each position.
    The texts are not kept: they would be hundreds of times the traces. A part is sampled whole, so that a restart has
    the same batches.
    """
    out, letter = data.Appender(path), {True: "1", False: "0", None: "?"}
    for part in parts(chosen, sampler, continuations, size, share):
        if all(id in out.done for id in part):
            continue
        fresh = {f"{id}:{k}": (t, ids) for id, (t, _, _, left) in part.items()
                 for k, ids in enumerate(left) if ids is not None}
        requests = [lm_code.Request(key, t["prompt_ids"] + ids) for key, (t, ids) in fresh.items()
                    if not ids or ids[-1] not in sampler.eos]
        found = {c.id: c for c in sampler(requests, title=f"csr, {len(out.done)} positions done")}
        texts = {}
        for key, (t, ids) in fresh.items():
            text = lm_code.decode(sampler.tokenizer, ids + (found[key].ids if key in found else []), sampler.eos)
            texts[key] = t["prompt"], lm_code.split_reasoning(text).reasoning
        distinct = list(dict.fromkeys(texts.values()))
        safe = dict(zip(distinct, judge.ask("reasoning", [{"prompt": p, "text": text} for p, text in distinct])))
        for id, (t, i, following, left) in part.items():
            taken = iter(out.done[f"{t['id']}@{following}"]["verdicts"] if following is not None else "")
            verdicts = "".join(next(taken) if ids is None else letter[safe[texts[f"{id}:{k}"]]]
                               for k, ids in enumerate(left))
            cut = sum(f"{id}:{k}" in found and found[f"{id}:{k}"].finished == "length" for k in range(continuations))
            out.write({"id": id, "trace": t["id"], "prompt_id": t["prompt_id"], "i": i, "verdicts": verdicts,
                       "sampled": continuations - left.count(None), "truncated": cut, **ratio(verdicts)})
    out.close()
    return [out.done[f"{t['id']}@{i}"] for t, at in chosen for i in at]


def ratio(verdicts):
    """A position's estimate from its verdicts.

    >>> ratio("110?")["csr"].__round__(4), ratio("??")
    (0.6667, {'csr': None, 'low': 0.0, 'high': 1.0})
    """
    safe, judged = verdicts.count("1"), len(verdicts) - verdicts.count("?")
    low, high = wilson(safe, judged)
    return {"csr": safe / judged if judged else None, "low": low, "high": high}


def run_csr(args):
    """Stage `csr`. Records: see `measure_csr`."""
    if args.continuations < 1:
        raise SystemExit(f"--continuations {args.continuations}: use 1 or more.")
    sampler = reasoning_only(intervene.make_sampler(args))
    steps = {s["id"]: s["steps"] for s in data.read_jsonl(args.steps)}
    chosen = [(t, positions(step_starts(sampler.tokenizer, t, steps[t["id"]]), args.at)) for t in
              uncertain(data.read_jsonl(args.traces), data.read_jsonl(args.verdicts), args.uncertain, args.per_prompt)]
    # A part is about a wave of the local sampler; a server takes the continuations of one prefix in one request.
    size, share = 4 * args.batch_size * (args.continuations if args.server else 1), not (args.server or args.no_share)
    records = measure_csr(args.out, chosen, sampler, args.judge, args.continuations, size, share)
    return {"prompts": len({t["prompt_id"] for t, _ in chosen}), "traces": len(chosen), "positions": len(records),
            "continuations": sum(len(r["verdicts"]) for r in records), "sampled": sum(r["sampled"] for r in records),
            "truncated": sum(r["truncated"] for r in records),
            "unjudged": sum(r["verdicts"].count("?") for r in records)}, {}


def at_flag(text):
    """`token`, `step` or `every:K`."""
    if text not in ("token", "step") and not (text.startswith("every:") and text[6:].isdecimal() and int(text[6:])):
        raise argparse.ArgumentTypeError(f"{text!r}: write token, step or every:K, such as every:5")
    return text


def csr_flags(p):
    lm_code.add_sampler_flags(p)
    client.add_judge_flags(p)
    p.add_argument("--at", type=at_flag, default="token", help="where to measure: token, step or every:K tokens")
    p.add_argument("--continuations", type=int, default=32, help="continuations of each prefix")
    p.add_argument("--no-share", action="store_true", help="sample all of them at each position (about ten times the cost)")
    p.add_argument("--uncertain", type=int, default=30, help="prompts, the most uncertain first; 0 = all mixed ones")
    p.add_argument("--per-prompt", type=int, default=1, help="safe traces of each of them, and unsafe ones; 0 = all")


STAGES = {  # as in intervene.py, and the function that adds more flags
    "csr": (run_csr, "continuation safety ratio along traces of prompts with uncertain outcome (Eq. 1)",
            ("traces", "steps", "verdicts"), csr_flags)}
