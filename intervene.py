"""From prompts to preference pairs: rollouts, steps, verdicts, interventions (Section 4, Algorithm 1).

    python intervene.py rollouts --model M --prompts prompts.jsonl --out runs/my/rollouts.jsonl
    python intervene.py {steps,judge,pairs,benign} --help         # run.sh calls them in order; the others are analysis

A *trace* is everything a model produced after a prompt. Its record holds the token ids (`prompt_ids`, `ids`), of which
the first `forced` were put there by an intervention and the rest sampled; all cutting is done on those ids, and no
prefix is ever encoded again. Judges and triggers are the two seams for forks: `make_judge` and `prompts/triggers.txt`.
"""
import argparse
import json
import re
from collections import Counter
from pathlib import Path

import data
import model as lm_code
from extras import client
from extras.server import ServerSampler

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------- steps

# One scan from left to right. Code and maths come first, so that no boundary can be found inside them.
# Every branch stops at the next delimiter of its own kind: that is what keeps the scan linear.
_SCAN = re.compile(r"""
    (?<!`)(?P<fence>`{3,})(?:[^`\s]*[ \t]*|(?<=^```)[^`\n]*)\r?\n   # a block, opened by ```word or a ``` line
        (?s:.*?)(?:^[ \t>]*(?P=fence)`*(?=[ \t\r]*$)|\Z)            # generation may end before it is closed
  | (?<!`)(?P<ticks>`{1,3})(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`)        # `code`
  | \\[\\$`]                                                        # \$ is a dollar sign, it opens no maths
  | (?:(?P<dollars>\$\$)|\\[(\[])                                   # $$x$$, \(x\), \[x\]; no blank line inside,
        (?:[^\\$\n]|\\[^()\[\]]|\n(?!\s*\n))+(?(dollars)\$\$|\\[)\]])   # so an unclosed one cannot swallow more
  | \$(?!\s)(?:[^\\$\n]|\\.)+(?<!\s)\$(?!\d)                        # $x$, but neither "$5 and $6" nor "$5-$6"
  | (?P<always>(?<=\S)\s*[\r\n]                                     # blanks, then newlines: one token in BPE
      | (?<![。！？])[。！？]+["'”’」』）》】)\]]*                     # CJK writes no space between sentences
        (?![。！？"'”’」』）》】)\].!?…,;:，、；：]|\s*[\r\n]))
  | (?P<stop>[.!?…]+)["'”’»)\]}*_]*
        (?=(?P<gap>[ \t\xa0\u3000]*)["'“‘«(\[{*_]*(?P<next>\w{1,15}\.?|\S?))
""", re.VERBOSE | re.MULTILINE)
_MARKER = re.compile(r"[\s>#*+-]*\(?(?:\d{1,3}(?:\.\d+)*|[A-Za-z]|[ivxIVX]+)[.)]+[*_]*")  # 1. - 2.1. **(a).
_LAST_WORD = re.compile(r"[\w.]*\Z")
_INITIALS = re.compile(r"(?:[A-Z]\.)*[A-Z]")  # "J", "U.S"

# Case matters: "Ms. Hill", but "it took 5 ms. Then". "etc" is missing: CHOICE, before a capital it ends a step.
_NEVER_LAST = frozenset("e.g E.g i.e I.e vs cf Cf al viz approx Approx fig figs Fig Figs eq eqs Eq Eqs "
                        "Dr Mr Mrs Ms Prof St Mt Gen Sen Gov Capt Lt Col Sgt Rev".split())
_BEFORE_NUMBER = frozenset("No Nos p pp ch Ch vol Vol sec Sec Art ca "
                           "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec".split())
_SOMETIMES_LAST = frozenset("a.m p.m v Inc Co Corp Ltd Jr Sr Ph.D".split())
# "the U.S. The", "is C. Let", "at 5 p.m. But": the word after an ambiguous full stop decides.
_OPENERS = frozenset("A Actually After Again Also Alternatively An And Another Any As At Because Both But By "
                     "Each First For From Given He Hence Here Hmm How However I If In Instead It Let Maybe "
                     "My Next No Not Now Okay On One Or Perhaps Second She Since So That The Their Then "
                     "There Therefore These They This Those Thus To Wait We What When Where Which While Why "
                     "With Yes You".split())


def split_steps(text: str) -> list[str]:
    r"""Split a reasoning trace into steps (Section 4 / Alg. 1: a step is one sentence of the reasoning).

    The steps concatenate to `text` exactly. A step owns its trailing newlines and the next one its leading
    spaces: with byte-level BPE (Qwen2, Llama 3) those cuts never fall inside a token, except after CJK stops.

    >>> split_steps("Mr. Hill has 3.5 kg, i.e. a lot. Is it?  Yes!\n\n1. Weigh it.\n")
    ['Mr. Hill has 3.5 kg, i.e. a lot.', ' Is it?', '  Yes!\n\n', '1. Weigh it.\n']
    >>> split_steps(r"Let \(x = 1. Y\) hold. ok... wait, 'Stop!' he said, `a. B` is wrong.")
    ["Let \\(x = 1. Y\\) hold. ok... wait, 'Stop!' he said, `a. B` is wrong."]
    """
    end = len(text.rstrip())  # a cut behind this would leave a step of blanks
    cuts = [0]
    for match in _SCAN.finditer(text):
        if match.end() < end and (match["always"] or match["stop"] and _ends_step(text, cuts[-1], match)):
            cuts.append(match.end())
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)]) if a < b]


def _ends_step(text: str, start: int, match: re.Match) -> bool:
    """Whether the punctuation in `match` ends the step that began at `start`."""
    following = match["next"]
    # CHOICE: a lower-case word continues the sentence, even after a full stop.
    if not match["gap"] or not following or following[0].islower() or following[0] in ".!?…,;:)]}":
        return False
    if match["stop"] == ".":
        # A short slice, because looking back without a bound would be quadratic.
        word = _LAST_WORD.search(text[max(0, match.start() - 10):match.start()])[0]
        if word in _NEVER_LAST or word in _BEFORE_NUMBER and following[0].isdigit():
            return False
        if (word in _SOMETIMES_LAST or _INITIALS.fullmatch(word)) and following not in _OPENERS:
            return False
    return not _MARKER.fullmatch(text, start, match.end())  # a list marker stays with its item


# --------------------------------------------------------------------------------------------------------- judges
#
# A judge answers questions about texts in batches:
#
#     judge.ask(question, items) -> iterator of answers, in the order of the items
#
#   question       item                                     answer
#   "reasoning"    {"prompt": str, "text": str}             True = safe, False = unsafe
#   "response"     {"prompt": str, "text": str}             True = safe, False = unsafe
#   "cue"          {"prompt": str, "steps": [str, ...]}     number of the first compliance cue, from 2 on; 0 = none
#   "compliance"   {"prompt": str, "text": str}             "full", "partial" or "refusal"
#   "strongreject" {"prompt": str, "text": str}             refusal 0/1, convincing and specific 1..5 as digits: "034"
#
# An answer of None means that there is no valid verdict. It is counted and never turned into a label. A judge also has a
# `name`, which goes into the books, and a `summary()` of what came of its questions. The toy world's is in toy/world.py.

LABELS = {"reasoning": {"safe": True, "unsafe": False}, "response": {"safe": True, "unsafe": False},
          "compliance": {a: a for a in ("full", "partial", "refusal")},
          "strongreject": {r + c + s: r + c + s for r in "01" for c in "12345" for s in "12345"}}
JUDGE_KEYS = ("JUDGE_API_KEY", "OPENAI_API_KEY")


class ChatJudge:
    """A chat model behind an OpenAI-compatible `/chat/completions` endpoint; its prompts are `prompts/judge_*.txt`.

    Valid verdicts go to the file `cache`, under the hash of all that determines them. `http`: see client.Endpoint.
    """

    def __init__(self, url, model, concurrency=8, cache=None, keys=JUDGE_KEYS, **http):
        self._setup(model)
        self.chat = client.Chat(url, model, keys, concurrency, cache, **http)

    def _setup(self, name):
        self.prompts = {p.stem[6:]: p.read_text(encoding="utf-8") for p in sorted((HERE / "prompts").glob("judge_*.txt"))}
        self.name, self.counts = f"{name}:" + data.digest("".join(self.prompts.values())), Counter()

    def ask(self, question, items):
        """See the table above; None where it refused or all tries gave no valid reply. Equal items are asked once."""
        keys, verdicts = [data.dump(item) for item in items], {}
        note = lambda: ", ".join(f"{n} {name}" for name, n in self.summary().items())
        asked = client.in_parallel(lambda key: self._ask(question, json.loads(key)), dict.fromkeys(keys),
                                   self.chat.endpoint.concurrency, f"judging: {question}", "verdict", note)
        for key in keys:
            if key not in verdicts:
                verdicts[key] = next(asked)
            answer, outcome = verdicts[key]
            self.counts[outcome] += 1
            yield answer

    def _ask(self, question, item):
        answer = {"type": "string", "enum": list(LABELS[question])} if question in LABELS else {"type": "integer"}
        return self.chat.verdict([self.content(question, item, structured) for structured in (False, True)],
            {"type": "object", "additionalProperties": False, "required": ["reason", "answer"],
             "properties": {"reason": {"type": "string"}, "answer": answer}},
            lambda text, structured: parse_answer(question, text, len(item.get("steps", ())), structured), self.name, question)

    def content(self, question, item, structured):
        """The question as the judge reads it. What is judged stands between markers that it cannot contain."""
        # A sentence stays on its line, lest a list inside it be taken for the numbers.
        text = item["text"] if "text" in item else "\n".join(f"{i}. {' '.join(s.split())}" for i, s in enumerate(item["steps"], 1))
        mark = "#####"
        while mark in text or mark in item["prompt"]:
            mark += "#"
        answers = {"cue": "the number", "strongreject": "the three digits, in quotes" if structured else "the three digits"}.get(
            question) or " or ".join(f'"{a}"' if structured else a for a in LABELS[question])
        values = {"MARK": mark, "PROMPT": item["prompt"], "TEXT": text, "ANSWERS": answers}
        template = self.prompts[question] + self.prompts["json" if structured else "text"]
        return re.sub(r"\{(MARK|PROMPT|TEXT|ANSWERS)\}", lambda m: values[m[1]], template)  # one pass: data is not searched

    def summary(self):
        """What came of the questions so far, and what the server charged (dollars with those of the cache)."""
        missing = {k: self.counts[k] for k in ("refusals", "unparsed", "failed") if self.counts[k]}
        return {"asked": self.counts["asked"], "from cache": self.counts["from cache"], "unjudged": sum(missing.values()),
                **missing, **self.chat.bill()}


class LocalJudge(ChatJudge):
    """A chat model in this process: the same prompts in text form, temperature 0 (the paper's ablation of detectors)."""

    def __init__(self, path, batch_size=8, max_new_tokens=4096):
        self._setup(f"local:{Path(path).name}:{data.fingerprint(path)}")
        self.sampler = lm_code.LocalSampler(path, temperature=0, top_p=1, max_new_tokens=max_new_tokens, seed=0,
                                            batch_size=batch_size)

    def ask(self, question, items):
        """See the table above; None also where the question does not fit into the model's context."""
        prompts = [lm_code.render_prompt(self.sampler.tokenizer, self.content(question, item, False)) for item in items]
        requests = [lm_code.Request(str(i), ids) for i, ids in enumerate(prompts) if len(ids) < self.sampler.context]
        answers = [None] * len(items)
        for done in self.sampler(requests, title=f"judging: {question}"):
            if done.finished == "stop":
                i, text = int(done.id), lm_code.decode(self.sampler.tokenizer, done.ids, self.sampler.eos)
                answers[i] = parse_answer(question, text, len(items[i].get("steps", ())), structured=False)
        self.counts.update("unjudged" if a is None else "asked" for a in answers)
        return iter(answers)

    def summary(self):
        """What came of the questions so far."""
        return dict(self.counts)


def parse_answer(question, text, n_steps=0, structured=True):
    """Read one reply strictly: a JSON object with a valid `answer`, or text whose last line is `ANSWER: x`; else None.

    >>> parse_answer("reasoning", '{"reason": "it refuses", "answer": "safe"}')
    True
    >>> parse_answer("cue", '{"reason": "", "answer": 3}', n_steps=5), parse_answer("cue", '{"answer": 9}', n_steps=5)
    (3, None)
    >>> parse_answer("reasoning", "It says ANSWER: safe, but plans harm.\\nANSWER: unsafe\\n", structured=False)
    False
    """
    try:
        if structured:
            answer = json.loads(text)["answer"]
        else:  # reasoning is no part of the reply, and unfinished reasoning is none
            trace = lm_code.split_reasoning(text)
            line = (trace.response if trace.closing else "" if trace.opening else text).rstrip().rpartition("\n")[2]
            answer = re.fullmatch(r"ANSWER: (\w+)", line)[1]
            answer = int(answer) if question == "cue" and re.fullmatch("[0-9]{1,6}", answer) else answer
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if question == "cue":
        valid = isinstance(answer, int) and not isinstance(answer, bool) and (answer == 0 or 2 <= answer <= n_steps)
        return answer if valid else None
    return LABELS[question].get(answer) if isinstance(answer, str) else None


def make_judge(spec, model=None, concurrency=8, **options):
    """A judge from its flag: `rules` (the toy world's), `rules:FILE`, `local:PATH`, or a chat endpoint's URL (.../v1)."""
    if spec == "rules" or spec.startswith("rules:"):
        from toy.world import RulesJudge
        return RulesJudge(spec[6:] or HERE / "toy" / "rules.json", split_steps)
    if spec.startswith("local:"):
        return LocalJudge(spec[6:], concurrency)
    if spec.startswith(("http://", "https://")):
        if not model:
            raise SystemExit("--judge URL also needs --judge-model NAME.")
        return ChatJudge(spec, model, concurrency, **options)
    raise SystemExit(f"--judge {spec}: use `rules`, `rules:FILE`, `local:PATH` or the URL of a chat endpoint, https://HOST/v1.")


def judge_of(args, keys=JUDGE_KEYS):
    """The judge of the flags."""
    if args.max_cost and not (args.judge_price_in or args.judge_price_out):
        raise SystemExit("--max-cost needs --judge-price-in and --judge-price-out, in dollars per million tokens.")
    return make_judge(args.judge, args.judge_model, args.judge_concurrency, keys=keys, max_cost=args.max_cost,
                      cache=args.judge_cache or Path(args.out).parent / "judge_cache.jsonl",
                      prices=(args.judge_price_in, args.judge_price_out))


# ------------------------------------------------------------------------------------------------ traces and verdicts

def trace_jobs(prompts, samples, sampler):
    """Jobs for `samples` rollouts of each prompt; prompts too long for the model's context are dropped, never cut.

    Returns (jobs, number of prompts dropped). A job is a trace record without what the model writes.
    """
    jobs, dropped = [], 0
    for p in prompts:
        ids = lm_code.render_prompt(sampler.tokenizer, p["prompt"])
        if len(ids) + sampler.max_new_tokens > sampler.context:
            dropped += 1
        else:
            jobs += [{"id": f"{p['id']}#{k}", "prompt_id": p["id"], "sample": k, "prompt": p["prompt"],
                      "prompt_ids": ids, "forced_ids": []} for k in range(samples)]
    return jobs, dropped


def sample_traces(path, jobs, sampler, title):
    """Sample what follows `prompt_ids + forced_ids` of each job and append trace records to `path`; resumes."""
    out, jobs = data.Appender(path), {job["id"]: job for job in jobs}
    requests = [lm_code.Request(id, job["prompt_ids"] + job["forced_ids"]) for id, job in jobs.items()]
    for completion in sampler(requests, done=out.done, title=title):
        job = dict(jobs[completion.id])
        forced = job.pop("forced_ids")
        ids = forced + completion.ids
        trace = lm_code.split_reasoning(lm_code.decode(sampler.tokenizer, ids, sampler.eos))
        out.write({**job, **trace._asdict(), "finished": completion.finished, "forced": len(forced), "ids": ids,
                   "truncated": trace.truncated or completion.finished == "length"})
    out.close()
    return [out.done[id] for id in jobs]


def complied(judge, traces):
    """Whether each trace's response answers its benign prompt in full: a list of True, False or None."""
    return [a and a == "full" for a in judge.ask("compliance", [{"prompt": t["prompt"], "text": t["response"]} for t in traces])]


def segment(traces):
    """Step records `{"id", "steps"}` of traces."""
    return [{"id": t["id"], "steps": split_steps(t["reasoning"])} for t in traces]


def judge_traces(path, traces, steps, judge, chunk=256):
    """Append verdict records `{"id", "reasoning_safe", "response_safe", "cue"}` to `path`; resumes.

    A truncated trace has no response, so `response_safe` is None without being asked; `cue` is asked of unsafe
    reasoning only.
    """
    out = data.Appender(path)
    todo = [t for t in traces if t["id"] not in out.done]
    steps = {s["id"]: s["steps"] for s in steps}
    for i in range(0, len(todo), chunk):
        part = todo[i:i + chunk]
        reasoning = list(judge.ask("reasoning", [{"prompt": t["prompt"], "text": t["reasoning"]} for t in part]))
        whole = [t for t in part if not t["truncated"]]
        unsafe = [t for t, safe in zip(part, reasoning) if safe is False]
        response = dict(zip((t["id"] for t in whole), judge.ask("response", [
            {"prompt": t["prompt"], "text": t["response"]} for t in whole])))
        cue = dict(zip((t["id"] for t in unsafe), judge.ask("cue", [
            {"prompt": t["prompt"], "steps": steps[t["id"]]} for t in unsafe])))
        for t, safe in zip(part, reasoning):
            out.write({"id": t["id"], "reasoning_safe": safe, "response_safe": response.get(t["id"]),
                       "cue": cue.get(t["id"])})
    out.close()
    return [out.done[t["id"]] for t in traces]


# ---------------------------------------------------------------------------------------- interventions and pairs

def substitute(tokenizer, trace, steps, number, trigger):
    """Put a trigger in the place of step `number` (from 1): the ids before the step, and the trigger's ids.

    The trigger takes over the white space around the step that it replaces, so that it begins and ends where a
    token does. Where a token straddles the step's beginning (CJK punctuation can be glued to the next word), the
    cut falls before that token and its lost characters are written again in front of the trigger.
    Returns (h, trigger_ids): z[:h] is `trace["ids"][:h]`.
    """
    step = steps[number - 1]
    start = len(trace["opening"]) + sum(map(len, steps[:number - 1]))
    h = lm_code.token_index(tokenizer, trace["ids"], start)
    text = trace["opening"] + trace["reasoning"]
    lost = text[len(lm_code.decode(tokenizer, trace["ids"][:h])):start]
    lead = step[:len(step) - len(step.lstrip())]
    tail = step[len(step.rstrip()):] if number < len(steps) else ""  # what ends the last step belongs to </think>
    return h, tokenizer.encode(lost + lead + trigger + tail, add_special_tokens=False)


def intervention_job(sampler, trace, steps, number, trigger, id):
    """A job that goes on from z[:h] + trigger, and h; the job is None where the context has no room left to go on in."""
    h, trigger_ids = substitute(sampler.tokenizer, trace, steps, number, trigger)
    forced = trace["ids"][:h] + trigger_ids
    if len(trace["prompt_ids"]) + len(forced) >= sampler.context:
        return None, h
    return {**{k: trace[k] for k in ("prompt_id", "sample", "prompt", "prompt_ids")}, "id": id, "forced_ids": forced}, h


def make_pair(tokenizer, eos, trace, corrected, h, trigger, **origin):
    """The pair record of Algorithm 1: `corrected` preferred over `trace`, from token h on; None if they are equal.

    `prefix_ids` = prompt + z[:h] are shared to the token. Tokens that both go on sharing after h stay where they
    are: they cancel in the loss.
    """
    prefix, chosen, rejected = trace["ids"][:h], corrected["ids"][h:], trace["ids"][h:]
    assert corrected["prompt_ids"] == trace["prompt_ids"] and corrected["ids"][:h] == prefix, "prefix not shared"
    if chosen == rejected:
        return None
    return {"id": corrected["id"], "prompt_id": trace["prompt_id"], **origin, "h": h,
            "n_prompt": len(trace["prompt_ids"]), "prompt": trace["prompt"],
            "prefix": lm_code.decode(tokenizer, prefix), "trigger": trigger,
            "chosen": lm_code.decode(tokenizer, chosen, eos), "rejected": lm_code.decode(tokenizer, rejected, eos),
            "prefix_ids": trace["prompt_ids"] + prefix, "chosen_ids": chosen, "rejected_ids": rejected}


def intervene(traces, steps, verdicts, triggers, sampler, judge, folder, rounds=1):
    """Algorithm 1 on judged rollouts: replace the first cue, continue, judge, and again up to `rounds` times.

    The k-th rollout of a prompt takes the k-th trigger. Files of each round go to `folder`. Returns (pairs, counts,
    by_trigger), where by_trigger maps a trigger to [interventions, pairs].
    """
    steps, verdicts = {s["id"]: s["steps"] for s in steps}, {v["id"]: v for v in verdicts}
    whole = [t for t in traces if not t["truncated"]]
    unsafe = [t for t in whole if verdicts[t["id"]]["reasoning_safe"] is False]
    pending = [t for t in unsafe if verdicts[t["id"]]["cue"]]
    counts = {"prompts": len({t["prompt_id"] for t in traces}), "rollouts": len(traces), "complete": len(whole),
              "unsafe": len(unsafe), "cue found": len(pending), "interventions": 0, "safe continuations": 0}
    pairs, by_trigger, identical = [], {t: [0, 0] for t in triggers}, 0
    for n in range(1, rounds + 1):
        jobs, origins = [], {}
        for t in pending:
            trigger = triggers[t["sample"] % len(triggers)]
            job, h = intervention_job(sampler, t, steps[t["id"]], verdicts[t["id"]]["cue"], trigger,
                                      f"{t['prompt_id']}#{t['sample']}@{n}")
            if job:  # a trace without room left ends here, as one that stays unsafe does
                jobs.append(job)
                origins[job["id"]] = (t, h, trigger)
        corrected = sample_traces(folder / f"round{n}.traces.jsonl", jobs, sampler, f"interventions, round {n}")
        new_steps = segment(corrected)
        judged = judge_traces(folder / f"round{n}.verdicts.jsonl", corrected, new_steps, judge)
        pending = []
        for c, s, v in zip(corrected, new_steps, judged):
            trace, h, trigger = origins[c["id"]]
            by_trigger[trigger][0] += 1
            counts["interventions"] += 1
            # CHOICE: the response is learned too, so it must be judged safe as well, and the trace be complete.
            if v["reasoning_safe"] and v["response_safe"] and not c["truncated"]:
                counts["safe continuations"] += 1
                pair = make_pair(sampler.tokenizer, sampler.eos, trace, c, h, trigger, source="harmful", interventions=n)
                identical += pair is None
                by_trigger[trigger][1] += pair is not None
                pairs += [pair] if pair else []
            elif v["reasoning_safe"] is False and v["cue"] and not c["truncated"]:
                pending.append(c)
                steps[c["id"]], verdicts[c["id"]] = s["steps"], v
    counts.update({"identical": identical, "pairs": len(pairs)} if identical else {"pairs": len(pairs)})
    return pairs, counts, by_trigger


def benign_pairs(base, current, triggers, sampler, judge, folder):
    """Stage 2: pairs that prefer the base model's answer to a benign prompt over a refusal.

    CHOICE: rejected is the current (stage-1) model's own refusal where it refuses; elsewhere the same substitution in
    reverse: a trigger in place of the first helpful step of the base model's trace, continued by the current model.
    `base` and `current` are traces of the two models on the same prompts. Returns (pairs, counts).
    """
    whole = [t for t in base if not t["truncated"]]
    answered = [t for t, a in zip(whole, complied(judge, whole)) if a]
    now = {t["prompt_id"]: t for t in current if not t["truncated"]}
    now_refuses = {id for id, a in zip(now, complied(judge, now.values())) if a is False}
    pairs = [make_pair(sampler.tokenizer, sampler.eos, now[t["prompt_id"]], {**t, "id": t["id"] + "@own"}, 0, "",
                       source="benign", interventions=0) for t in answered if t["prompt_id"] in now_refuses]
    own, jobs, origins = len(pairs), [], {}
    reverse = [t for t in answered if t["prompt_id"] not in now_refuses]
    steps = [s["steps"] for s in segment(reverse)]
    cues = judge.ask("cue", [{"prompt": t["prompt"], "steps": s} for t, s in zip(reverse, steps)])
    for k, (t, s, cue) in enumerate(zip(reverse, steps, cues)):
        if not s:
            continue
        trigger = triggers[k % len(triggers)]
        job, h = intervention_job(sampler, t, s, cue or min(2, len(s)), trigger, t["id"] + "@reverse")
        if job:
            jobs.append(job)
            origins[job["id"]] = (t, h, trigger)
    corrected = sample_traces(folder / "reverse.traces.jsonl", jobs, sampler, "reverse substitution")
    for r, a in zip(corrected, complied(judge, corrected)):
        if a is False and not r["truncated"]:
            t, h, trigger = origins[r["id"]]
            pairs.append(make_pair(sampler.tokenizer, sampler.eos, r, {**t, "id": r["id"]}, h, trigger,
                                   source="benign", interventions=1))
    pairs = [p for p in pairs if p]
    return pairs, {"prompts": len(base), "answered": len(answered), "refused now": own, "reversed": len(corrected),
                   "pairs": len(pairs)}


# ------------------------------------------------------------------------------------------------------- the stages

def make_sampler(args):
    """The sampler of the flags: this process, or a server."""
    common = dict(temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens, seed=args.seed)
    if args.server:
        return ServerSampler(args.model, args.server, concurrency=args.batch_size, **common)
    return lm_code.LocalSampler(args.model, batch_size=args.batch_size, device=args.device, dtype=args.dtype, **common)


def run_rollouts(args):
    """Stage `rollouts`. Like all of them it returns its counts, and what else goes into the books."""
    sampler, prompts = make_sampler(args), data.load_prompts(args.prompts, args.limit)
    jobs, dropped = trace_jobs(prompts, args.samples, sampler)
    traces = sample_traces(args.out, jobs, sampler, Path(args.out).stem)
    return {"prompts": len(prompts), "short enough": len(prompts) - dropped, "rollouts": len(traces),
            "complete": sum(not t["truncated"] for t in traces)}, {}


def run_steps(args):
    """Stage `steps`."""
    steps = segment(data.read_jsonl(args.traces))
    data.write_jsonl(args.out, steps)
    return {"traces": len(steps), "steps": sum(len(s["steps"]) for s in steps)}, {}


def run_judge(args):
    """Stage `judge`."""
    verdicts = judge_traces(args.out, data.read_jsonl(args.traces), data.read_jsonl(args.steps), args.judge)
    return {"traces": len(verdicts), "judged": sum(v["reasoning_safe"] is not None for v in verdicts),
            "unsafe reasoning": sum(v["reasoning_safe"] is False for v in verdicts),
            "unsafe responses": sum(v["response_safe"] is False for v in verdicts),
            "cue found": sum(bool(v["cue"]) for v in verdicts)}, {}


def run_pairs(args):
    """Stage `pairs`."""
    pairs, counts, by_trigger = intervene(
        data.read_jsonl(args.traces), data.read_jsonl(args.steps), data.read_jsonl(args.verdicts),
        data.load_triggers(args.triggers), make_sampler(args),
        args.judge, Path(args.out).with_suffix(".rounds"), args.max_interventions)
    data.write_jsonl(args.out, pairs)
    for trigger, (tried, made) in by_trigger.items():
        print(f"  {made:4d} pairs of {tried:4d} interventions: {trigger}")
    return counts, {"by_trigger": by_trigger}


def run_benign(args):
    """Stage `benign`."""
    pairs, counts = benign_pairs(
        data.read_jsonl(args.base), data.read_jsonl(args.traces), data.load_triggers(args.triggers), make_sampler(args),
        args.judge, Path(args.out).with_suffix(".rounds"))
    data.write_jsonl(args.out, pairs)
    return counts, {}


FILES = {"prompts": "prompts: .jsonl, .json, .csv, .tsv, .txt, or the name of a set (see data.py fetch)", "traces": "trace records (.jsonl)", "steps": "step records (.jsonl)",
         "verdicts": "verdict records (.jsonl)", "base": "the base model's traces on the same prompts (.jsonl)"}
STAGES = {  # function, purpose, input files
    "rollouts": (run_rollouts, "sample reasoning and response for each prompt", ("prompts",)),
    "steps": (run_steps, "cut the reasoning of traces into sentences", ("traces",)),
    "judge": (run_judge, "judge reasoning and responses, find the first compliance cue", ("traces", "steps")),
    "pairs": (run_pairs, "put triggers in place of cues, continue, keep the safe ones as pairs", ("traces", "steps", "verdicts")),
    "benign": (run_benign, "pairs against over-refusal: answer preferred over refusal", ("traces", "base"))}


def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="intervene.py", description="From prompts to preference pairs.")
    commands = parser.add_subparsers(dest="command", required=True)
    from extras import dynamics  # here, because the analysis of safety dynamics is made of this module's parts
    for name, (work, text, files, *more) in {**STAGES, **dynamics.STAGES}.items():
        p = commands.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(stage=(work, files))
        p.add_argument("--out", required=True, help="file to write (.jsonl)")
        for file in files:
            p.add_argument("--" + file, required=True, help=FILES[file])
        if name in ("rollouts", "pairs", "benign"):
            lm_code.add_sampler_flags(p)
        if name in ("judge", "pairs", "benign"):
            client.add_judge_flags(p)
        if name in ("pairs", "benign"):
            p.add_argument("--triggers", default=str(HERE / "prompts" / "triggers.txt"), help="safety triggers, one a line")
        if name == "rollouts":
            p.add_argument("--samples", type=int, default=6, help="rollouts a prompt (one for each trigger)")
            p.add_argument("--limit", type=int, default=0, help="use only the first prompts; 0 = all")
        if name == "pairs":
            p.add_argument("--max-interventions", type=int, default=1, help="the paper's N: rounds of intervention")
        for add_flags in more:
            add_flags(p)
    return parser


def main(argv=None):
    """Run one stage from the command line."""
    args = build_parser().parse_args(argv)
    flags, (work, files) = {k: v for k, v in vars(args).items() if k != "stage"}, args.stage
    if "judge" in flags:  # with a hash of its rules or prompts, so that verdicts of different ones are never mixed
        args.judge = judge_of(args)
        flags["judge"] = args.judge.name

    def books():
        counts, more = work(args)
        return counts, {**more, "judge": args.judge.summary() if "judge" in flags else {}}
    inputs = [flags[k] for k in ("model", "triggers", "reference", "csr", "points", *files) if k in flags]
    data.stage(args.out, flags, inputs, books)


if __name__ == "__main__":
    main()
