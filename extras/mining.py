"""Interventions without training, Section 3: where safety triggers come from, and what they do to unsafe traces.

    python intervene.py mine-triggers --points runs/my/turning_points.jsonl --model M --traces ... --out runs/my/mined.jsonl
    python intervene.py curve         --model M --traces ... --steps ... --verdicts ... --out runs/my/curve.jsonl

The first also writes a pool of triggers that the model itself gave away, mined_triggers.txt: with another RUN,
`TRIGGERS=runs/my/mined_triggers.txt bash run.sh` trains with it. The second is Figure 6 with two controls. Only
reasoning is sampled and judged. Records and summaries: see `extras/dynamics.py`.
"""
import re
from collections import Counter
from pathlib import Path

import numpy as np

import data
import intervene
import model as lm_code
from extras import client
from extras.csr import reasoning_only
from extras.estimates import average, means, shares, show

NEUTRAL = "Let me read the request once more."  # fits any prompt and says nothing for or against it


def unsafe_in_turn(traces, verdicts, limit=0):
    """Complete traces with unsafe reasoning: the first of each prompt, then the second, ...; `limit` of them, 0 = all.

    Prompts come in an arbitrary, fixed order.
    """
    safe, seen, keyed = {v["id"]: v["reasoning_safe"] for v in verdicts}, Counter(), []
    for t in traces:
        if safe[t["id"]] is False and not t["truncated"]:
            keyed.append((seen[t["prompt_id"]], data.digest(t["prompt_id"]), t))
            seen[t["prompt_id"]] += 1
    return [t for *_, t in sorted(keyed, key=lambda key: key[:2])][:limit or None]


def replace_cues(tries, sampler, judge, path):
    """Put a text in a step's place, let the model go on and judge its reasoning; resumes from the files at `path`.

    tries: [(id, trace, steps, number of the step, text)]; the text None stands for nothing, so that the model goes on
    from z[:h] itself. Returns {id: (trace, steps, verdict)}, without those for which the context has no room.
    """
    jobs = []
    for id, trace, steps, number, text in tries:
        job, h = intervene.intervention_job(sampler, trace, steps, number, text or "", id)
        if job:
            jobs.append(job if text is not None else {**job, "forced_ids": trace["ids"][:h]})
    traces = intervene.sample_traces(f"{path}.traces.jsonl", jobs, sampler, path.name)
    traces = [{**t, "truncated": True} for t in traces]  # where a server wrote a response, it is not judged either
    steps = intervene.segment(traces)
    verdicts = intervene.judge_traces(f"{path}.verdicts.jsonl", traces, steps, judge)
    return {t["id"]: (t, s["steps"], v) for t, s, v in zip(traces, steps, verdicts)}


# ---------------------------------------------------------------------------------------------------- mining triggers

def words(text):
    """The words of a text, without case or punctuation."""
    return re.findall(r"\w+", text.casefold())


def normalise(step):
    """A step as a trigger: on one line, without list marker, emphasis or quotes around it.

    >>> normalise(" 2. **Wait,\\n  this is wrong.**\\n"), normalise('- "No."')
    ('Wait, this is wrong.', 'No.')
    """
    text = re.sub(r"""^[\s>#*+\-"'“‘(]*(\d{1,3}[.)]\s)?[\s*_"'“‘(]*""", "", " ".join(step.split()))
    return re.sub(r"""[\s*_"'”’)]+$""", "", text)


def candidates(curves, prompts):
    """The steps at the safety turning points of safe traces, equal ones once: ({trigger: times found}, reasons dropped).

    curves: records of stage turning-points; prompts: {id: text} of the run. CHOICE: a step is dropped if it has a word
    of its own prompt that no more than a tenth of the prompts has, because it would fit no other.
    """
    shared = Counter(w for p in prompts.values() for w in set(words(p)))
    texts, found, dropped = {}, Counter(), Counter()
    for r in curves:
        if r["safe"] is not True:
            continue
        if not r["trigger"]:
            dropped["no turning point"] += 1
            continue
        text = normalise(r["steps"][r["trigger"] - 1])
        own = {w for w in words(prompts[r["prompt_id"]]) if shared[w] <= len(prompts) / 10}
        if not words(text) or own & set(words(text)):
            dropped["names its prompt" if words(text) else "no words"] += 1
        else:
            found[texts.setdefault(" ".join(words(text)), text)] += 1
    return found, dropped


def choose(triggers, success, size, weight):
    """A pool for success and diversity: again and again the trigger with the highest success minus `weight` times its
    likeness to the most similar one chosen, where likeness is the share of their words that both have (CHOICE).

    >>> choose(["Stop now.", "Stop it now.", "This is wrong."], [0.9, 0.8, 0.6], 2, weight=0.5)
    ['Stop now.', 'This is wrong.']
    """
    pool, left = [], dict(zip(triggers, success))
    like = lambda a, b: len(a & b) / len(a | b)
    while left and len(pool) < size:
        score = {t: s - weight * max((like(set(words(t)), set(words(p))) for p in pool), default=0) for t, s in left.items()}
        pool.append(max(score, key=score.get))
        del left[pool[-1]]
    return pool


def success_table(traces, steps, cues, triggers, sampler, judge, path):
    """Corrective success of each trigger in the place of each trace's first cue: float (traces, triggers), 1 where the
    reasoning is safe now, 0 where it is not, nan where there is no verdict or no room."""
    id = lambda t, trigger: f"{t['id']}|{data.digest(trigger)}"
    done = replace_cues([(id(t, trigger), t, steps[t["id"]], cues[t["id"]], trigger)
                         for t in traces for trigger in triggers], sampler, judge, path)
    safe = {key: v["reasoning_safe"] for key, (_, _, v) in done.items()}
    return np.array([[np.nan if safe.get(id(t, trigger)) is None else float(safe[id(t, trigger)]) for trigger in triggers]
                     for t in traces])


def held_out(traces, verdicts, used, limit):
    """Unsafe traces with a cue of prompts that are not `used`, in two halves by prompt: to choose with, to test with."""
    cue = {v["id"]: v["cue"] for v in verdicts}
    rest = [t for t in traces if t["prompt_id"] not in used and cue[t["id"]]]
    first = set(sorted({t["prompt_id"] for t in unsafe_in_turn(rest, verdicts)}, key=data.digest)[::2])
    halves = [unsafe_in_turn([t for t in rest if (t["prompt_id"] in first) is side], verdicts, limit)
              for side in (True, False)]
    if not all(halves):
        raise SystemExit("mine-triggers: fewer than two prompts with unsafe traces are left to choose and test triggers on. "
                         "Use more prompts, or measure CSR on fewer (csr --uncertain).")
    return halves


def trials(split, traces, triggers, table):
    """The records of a success table."""
    return [{"id": f"{t['id']}|{data.digest(trigger)}", "split": split, "trace": t["id"], "prompt_id": t["prompt_id"],
             "trigger": trigger, "safe": None if np.isnan(x) else bool(x)}
            for t, row in zip(traces, table) for trigger, x in zip(triggers, row)]


def run_mine(args):
    """Stage `mine-triggers`. Records: {"id", "split": "choose" or "test", "trace", "prompt_id", "trigger", "safe"}, one for
    each trial. The summary: `candidates`: [{"trigger", "found": times, "success": estimate, "chosen"}] measured on the first
    half; `dropped`: reasons; `mined`, `hand_written`: [{"trigger", "success"}] on the second half, which had no part in the
    choice; `pools`: {"mined", "hand_written", "difference"}: estimates of the pools' mean success, and of its difference
    on the same traces; `prompts`: how many gave candidates, chose, tested. The pool goes to NAME_triggers.txt."""
    curves, hand, out = data.read_jsonl(args.points), data.load_triggers(args.triggers), Path(args.out)
    traces, verdicts = data.read_jsonl(args.traces), data.read_jsonl(args.verdicts)
    steps, cues = {s["id"]: s["steps"] for s in data.read_jsonl(args.steps)}, {v["id"]: v["cue"] for v in verdicts}
    found, dropped = candidates(curves, {t["prompt_id"]: t["prompt"] for t in traces})
    if not found:
        raise SystemExit(f"{args.points}: no safe trace has a usable step at its turning point ({dict(dropped)}).")
    sampler, owners = reasoning_only(intervene.make_sampler(args)), lambda some: [t["prompt_id"] for t in some]
    used = set(owners(curves))
    first, second = held_out(traces, verdicts, used, args.held_out)
    measure = lambda some, triggers, name: success_table(some, steps, cues, triggers, sampler, args.judge,
                                                         out.with_suffix(".rounds") / name)
    texts = [t for t, _ in found.most_common(args.candidates)]
    chosen_with = measure(first, texts, "choose")
    success = shares(chosen_with, owners(first))
    pool = choose(texts, [e["value"] or 0 for e in success], args.pool, args.diversity)
    tried = list(dict.fromkeys(pool + hand))
    tested_with = measure(second, tried, "test")
    tested = dict(zip(tried, shares(tested_with, owners(second))))
    mine, theirs = (average(tested_with[:, [tried.index(t) for t in p]], 1) for p in (pool, hand))
    pools = means(np.stack([mine, theirs, mine - theirs], 1), owners(second))
    pools = dict(zip(("mined", "hand_written", "difference"), pools))
    records = trials("choose", first, texts, chosen_with) + trials("test", second, tried, tested_with)
    data.write_jsonl(out, records)
    data.write_text(out.with_name(f"{out.stem}_triggers.txt"),
                    "\n".join(["# Mined by `intervene.py mine-triggers`", *pool, ""]))
    data.write_json(data.beside(out, "summary"), {
        "candidates": [{"trigger": t, "found": found[t], "success": e, "chosen": t in pool} for t, e in zip(texts, success)],
        "dropped": dict(dropped), "pools": pools,
        "mined": [{"trigger": t, "success": tested[t]} for t in pool],
        "hand_written": [{"trigger": t, "success": tested[t]} for t in hand],
        "prompts": {"gave candidates": len(used), "choose": len(set(owners(first))), "test": len(set(owners(second)))}})
    for name, e in [(t, tested[t]) for t in pool] + list(pools.items()):
        print(f"  {show(e)}  {name}")
    return {"turning points": sum(found.values()) + sum(dropped.values()), "candidates": len(found), "tried": len(texts),
            "pool": len(pool), "trials": len(records), "no verdict": sum(r["safe"] is None for r in records)}, {}


# ----------------------------------------------------------------------------------------------- intervention curve

def intervention_curve(traces, steps, cues, texts, sampler, judge, folder, rounds):
    """Harmful or not after 0 to `rounds` interventions (Figure 6): float (texts, traces, rounds + 1).

    Each unsafe trace starts as harmful (1) under each text. Its first cue is replaced by the text, the model goes on;
    what is safe (0) stays so, what is unsafe is intervened upon again at its new first cue. Without a cue or room in
    the context a trace stays as it is; without a verdict it is nan from there on.
    """
    harmful = np.ones((len(texts), len(traces), rounds + 1))
    pending = {(a, k): (t, steps[t["id"]], cues[t["id"]]) for a in range(len(texts)) for k, t in enumerate(traces)}
    for n in range(1, rounds + 1):
        harmful[:, :, n] = harmful[:, :, n - 1]
        tries = {(a, k): (f"{traces[k]['id']}|{a}@{n}", *entry, texts[a]) for (a, k), entry in pending.items() if entry[2]}
        done, pending = replace_cues(tries.values(), sampler, judge, folder / f"round{n}"), {}
        for key, (id, *_) in tries.items():
            if id in done:
                trace, new_steps, verdict = done[id]
                safe = verdict["reasoning_safe"]
                harmful[(*key, n)] = np.nan if safe is None else not safe
                if safe is False:
                    pending[key] = trace, new_steps, verdict["cue"]
    return harmful


def run_curve(args):
    """Stage `curve`. Records: {"id": "TRACE|ARM", "trace", "prompt_id", "arm": "trigger", "neutral" or "removal", "text",
    "harmful": [1, 0 or None after 0, 1, ... interventions]}. The summary: `arms`: [{"arm", "text", "harmful": [estimate
    after 0, 1, ...]}]; `overall`: [estimates], the mean over the triggers; `neutral_minus_overall`,
    `removal_minus_overall`: [estimates] of the difference on the same traces."""
    verdicts, triggers = data.read_jsonl(args.verdicts), data.load_triggers(args.triggers)
    steps, cues = {s["id"]: s["steps"] for s in data.read_jsonl(args.steps)}, {v["id"]: v["cue"] for v in verdicts}
    traces = unsafe_in_turn(data.read_jsonl(args.traces), verdicts, args.limit)
    if not traces:
        raise SystemExit(f"{args.verdicts}: no complete trace with unsafe reasoning, so there is nothing to intervene upon.")
    arms = [*(("trigger", t) for t in triggers), ("neutral", args.neutral), ("removal", None)]
    owners = [t["prompt_id"] for t in traces]
    sampler = reasoning_only(intervene.make_sampler(args))
    harmful = intervention_curve(traces, steps, cues, [text for _, text in arms], sampler, args.judge,
                                 Path(args.out).with_suffix(".rounds"), args.interventions)
    overall, (neutral, removal) = average(harmful[:-2], 0), harmful[-2:]  # (traces, rounds + 1)
    curves = {"overall": means(overall, owners), "neutral_minus_overall": means(neutral - overall, owners),
              "removal_minus_overall": means(removal - overall, owners)}
    by_arm = [{"arm": arm, "text": text, "harmful": means(h[:, :1], owners) + shares(h[:, 1:], owners)}  # at 0 all are
              for (arm, text), h in zip(arms, harmful)]
    data.write_jsonl(args.out, [
        {"id": f"{t['id']}|{a}", "trace": t["id"], "prompt_id": t["prompt_id"], "arm": arm, "text": text,
         "harmful": [None if np.isnan(x) else int(x) for x in row]}
        for a, ((arm, text), h) in enumerate(zip(arms, harmful)) for t, row in zip(traces, h)])
    data.write_json(data.beside(args.out, "summary"),
                    {"interventions": list(range(args.interventions + 1)), **curves, "arms": by_arm})
    for name, row in (("all triggers", curves["overall"]),
                      *((a["text"] or "(the cue removed)", a["harmful"]) for a in by_arm)):
        print("  " + " ".join("  -  " if e["value"] is None else f"{100 * e['value']:5.1f}" for e in row) + f"  {name}")
    return {"prompts": len(set(owners)), "unsafe": len(traces), "cue found": sum(bool(cues[t["id"]]) for t in traces),
            "arms": len(arms), "unjudged": int(np.isnan(harmful[:, :, -1]).sum())}, {}


# ----------------------------------------------------------------------------------------------------------- flags

def _flags(p):
    lm_code.add_sampler_flags(p)
    client.add_judge_flags(p)
    p.add_argument("--triggers", default=str(intervene.HERE / "prompts" / "triggers.txt"), help="safety triggers, one a line")


def mine_flags(p):
    _flags(p)
    p.add_argument("--points", required=True, help="records of stage turning-points (.jsonl)")
    p.add_argument("--candidates", type=int, default=40, help="try only the candidates found most often")
    p.add_argument("--held-out", type=int, default=40, help="unsafe traces to choose with, and to test with; 0 = all")
    p.add_argument("--pool", type=int, default=6, help="triggers to choose")
    p.add_argument("--diversity", type=float, default=0.5, help="weight of likeness against success")


def curve_flags(p):
    _flags(p)
    p.add_argument("--interventions", type=int, default=5, help="interventions on each trace at most")
    p.add_argument("--neutral", default=NEUTRAL, help="a sentence that is no trigger: the first control")
    p.add_argument("--limit", type=int, default=100, help="unsafe traces to start from; 0 = all")


STAGES = {
    "mine-triggers": (run_mine, "a pool of triggers from the steps at safety turning points",
                      ("traces", "steps", "verdicts"), mine_flags),
    "curve": (run_curve, "harmful share after 0, 1, ... interventions, and two controls (Figure 6)",
              ("traces", "steps", "verdicts"), curve_flags)}
