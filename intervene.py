"""From prompts to preference pairs: rollouts, steps, verdicts, interventions (Algorithm 1).

    python intervene.py rollouts --model M --prompts prompts.jsonl --out runs/my/rollouts.jsonl
    python intervene.py {steps,judge,pairs,benign} --help        # run.sh calls them in this order

A *trace* is everything that follows a prompt: z, the reasoning, and y, the response. Its record
holds token ids, of which an intervention gave the first `forced` (z[:h] and the trigger) and the
model sampled the rest. All cutting is done on those ids, and no prefix is ever encoded again.

Where to change things: for another judge, write a class `Judge` (the table above `LABELS` says
what it answers; domains/arithmetic.py has one) and pass --judge python:MODULE, or edit the prompts
of the chat judge, prompts/judge_*.txt; for other triggers, edit prompts/triggers.txt or pass
--triggers FILE; for another source of samples, add a branch to `sampler_from_flags`.
"""
import argparse
import json
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

from data import (
    Appender,
    Request,
    decode,
    load_prompts,
    load_triggers,
    render_prompt,
    split_reasoning,
    token_index,
)
from support.batch_size import with_batch_size
from support.compact import RecordFile, chunks_with_steps
from support.errors import InputError, exit_cleanly
from support.files import digest, read_jsonl, stream_jsonl, write_jsonl
from support.flags import add_judge_flags, add_sampler_flags, refuse_wrong_sampling
from support.guards import GuardForm, ServerGuard, judge_kind, local_name
from support.http import REFUSED, RequestFailed, UnusableReply
from support.hub import model_folder
from support.judges import (
    ASKED,
    FROM_CACHE,
    HARMLESS,
    CombinedJudge,
    Form,
    LocalJudge,
    ServerJudge,
    read_reply,
    render_chat,
    require_questions,
    verdict_schema,
)
from support.plugins import load_object
from support.ranks import with_hands
from support.record import fingerprint
from support.stages import add_stage_flags, run_stage
from support.unanswered import AnsweredRecords, answers_so_far

HERE = Path(__file__).resolve().parent
DEFAULT_TRIGGERS = str(HERE / "prompts" / "triggers.txt")


# -------------------------------------------------------------------------------------------- steps

# One scan from left to right. Code and maths come first, so that no step ends inside them.
# Every branch stops at the next delimiter of its own kind: that keeps the scan linear in time.
_SCAN = re.compile(r"""
    # A code block, opened by ```word or by a line that starts with ```.
    # It may be unclosed, because generation can end inside it.
    (?<!`)(?P<fence>`{3,})(?:[^`\s]*[ \t]*|(?<=^```)[^`\n]*)\r?\n
        (?s:.*?)(?:^[ \t>]*(?P=fence)`*(?=[ \t\r]*$)|\Z)

    # Inline code: `x`, ``x`` or ```x```.
  | (?<!`)(?P<ticks>`{1,3})(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`)

    # \$ is a dollar sign and opens no maths.
  | \\[\\$`]

    # $$x$$, \(x\) or \[x\]. No blank line inside, so that an unclosed one swallows no more.
  | (?:(?P<dollars>\$\$)|\\[(\[])
        (?:[^\\$\n]|\\[^()\[\]]|\n(?!\s*\n))+(?(dollars)\$\$|\\[)\]])

    # $x$, but neither "$5 and $6" nor "$5-$6".
  | \$(?!\s)(?:[^\\$\n]|\\.)+(?<!\s)\$(?!\d)

    # What always ends a step: newlines with the blanks before them (one token in BPE),
    # or a CJK full stop, because CJK writes no space between sentences.
  | (?P<always>(?<=\S)\s*[\r\n]
      | (?<![。！？])[。！？]+["'”’」』）》】)\]]*
        (?![。！？"'”’」』）》】)\].!?…,;:，、；：]|\s*[\r\n]))

    # What may end a step: . ! ? … with closing quotes and brackets; what follows decides.
  | (?P<stop>[.!?…]+)["'”’»)\]}*_]*
        (?=(?P<gap>[ \t\xa0\u3000]*)["'“‘«(\[{*_]*(?P<next>\w{1,15}\.?|\S?))
""", re.VERBOSE | re.MULTILINE)
# Markers of list items: "1.", "- 2.1.", "**(a)."
_MARKER = re.compile(r"[\s>#*+-]*\(?(?:\d{1,3}(?:\.\d+)*|[A-Za-z]|[ivxIVX]+)[.)]+[*_]*")
_LAST_WORD = re.compile(r"[\w.]*\Z")
_INITIALS = re.compile(r"(?:[A-Z]\.)*[A-Z]")  # "J", "U.S"

# Abbreviations that never end a step. Case matters: "Ms. Hill", but "it took 5 ms. Then".
# CHOICE: "etc" is missing, so before a capital letter it ends a step.
_NEVER_LAST = frozenset(
    "e.g E.g i.e I.e vs cf Cf al viz approx Approx fig figs Fig Figs eq eqs Eq Eqs "
    "Dr Mr Mrs Ms Prof St Mt Gen Sen Gov Capt Lt Col Sgt Rev".split())
_BEFORE_NUMBER = frozenset(
    "No Nos p pp ch Ch vol Vol sec Sec Art ca "
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec".split())
# Abbreviations that may end a step ("the U.S. The", "at 5 p.m. But"): the next word decides.
_SOMETIMES_LAST = frozenset("a.m p.m v Inc Co Corp Ltd Jr Sr Ph.D".split())
_OPENERS = frozenset(
    "A Actually After Again Also Alternatively An And Another Any As At Because Both But By "
    "Each First For From Given He Hence Here Hmm How However I If In Instead It Let Maybe "
    "My Next No Not Now Okay On One Or Perhaps Second She Since So That The Their Then "
    "There Therefore These They This Those Thus To Wait We What When Where Which While Why "
    "With Yes You".split())


def split_steps(text: str) -> list[str]:
    r"""Split a reasoning trace into steps (Section 4, Algorithm 1: a step is one sentence).

    The steps concatenate to `text` exactly. A step owns its trailing newlines and the next one its
    leading spaces: with byte-level BPE (Qwen2, Llama 3) those cuts never fall inside a token,
    except after CJK stops.

    >>> split_steps("Mr. Hill has 3.5 kg, i.e. a lot. Is it?  Yes!\n\n1. Weigh it.\n")
    ['Mr. Hill has 3.5 kg, i.e. a lot.', ' Is it?', '  Yes!\n\n', '1. Weigh it.\n']
    >>> split_steps(r"Let \(x = 1. Y\) hold. ok... wait, 'Stop!' he said, `a. B` is wrong.")
    ["Let \\(x = 1. Y\\) hold. ok... wait, 'Stop!' he said, `a. B` is wrong."]
    """
    steps = []
    start = 0
    end = len(text.rstrip())
    for match in _SCAN.finditer(text):
        if match.end() >= end:
            break  # a cut here would leave a step of blanks
        # Code and maths match too, with neither group set: that is how they are skipped.
        if match["always"] or (match["stop"] and _ends_step(text, start, match)):
            steps.append(text[start:match.end()])
            start = match.end()
    if start < len(text):
        steps.append(text[start:])
    return steps


def _ends_step(text: str, start: int, match: re.Match) -> bool:
    """Whether the punctuation in `match` ends the step that began at `start`."""
    following = match["next"]
    # "3.5", "main.c", or the end of a line, which the newline itself will end
    if not match["gap"] or not following:
        return False
    # CHOICE: a lower-case word continues the sentence, even after a full stop.
    if following[0].islower() or following[0] in ".!?…,;:)]}":
        return False
    if match["stop"] == ".":
        # A short slice, because looking back without a bound would be quadratic.
        before = text[max(0, match.start() - 10):match.start()]
        word = _LAST_WORD.search(before)[0]
        if word in _NEVER_LAST:
            return False
        if word in _BEFORE_NUMBER and following[0].isdigit():
            return False  # "No. 5", but "Is it? No. Bob did."
        ambiguous = word in _SOMETIMES_LAST or _INITIALS.fullmatch(word)
        if ambiguous and following not in _OPENERS:
            return False
    # A list marker stays with its item.
    return not _MARKER.fullmatch(text, start, match.end())


# ------------------------------------------------------------------------------------------- judges
#
# A judge answers questions about texts in batches:
#
#     judge.ask(question, items) -> iterator of answers, in the order of the items
#
#   question       item has        answer
#   "reasoning"    prompt, text    True = safe, False = unsafe
#   "response"     prompt, text    True = safe, False = unsafe
#   "cue"          prompt, steps   number of the first compliance cue; 0 = none
#   "compliance"   prompt, text    "full", "partial" or "refusal"
#   "strongreject" prompt, text    refusal 0/1, convincing and specific 1..5 as digits: "034"
#
# As in the paper a cue is never the first step, which restates the request: models are asked from 2
# on. A judge of another domain (domains/) may name the first one too.
# An item is {"prompt": str, "text": str} or {"prompt": str, "steps": [str, ...]}. An answer of
# None means that there is no valid verdict; it is counted and never turned into a label. Where no
# answer came for a reason that passes, the judge raises Unanswered once all others are there. A
# judge also has the set of `questions` that it can answer, a `name`, which is recorded with its
# verdicts, and a `summary()` of what came of its questions, a dict of numbers. Judges that are
# guard models stand in support/guards.py.

# The words that a reply may hold, and the answer that each stands for; a cue is a number.
LABELS = {
    "reasoning": {"safe": True, "unsafe": False},
    "response": {"safe": True, "unsafe": False},
    "compliance": {word: word for word in ("full", "partial", "refusal")},
    "strongreject": {r + c + s: r + c + s for r in "01" for c in "12345" for s in "12345"},
}
JUDGE_KEYS = ("JUDGE_API_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set
CUE_KEYS = ("CUE_JUDGE_API_KEY",)


class ChatPrompts(Form):
    """The questions to a chat model: the prompts in prompts/judge_*.txt."""

    questions = {"cue", *LABELS}

    def __init__(self):
        self.prompts = {}
        for path in sorted((HERE / "prompts").glob("judge_*.txt")):
            question = path.stem.removeprefix("judge_")
            self.prompts[question] = path.read_text(encoding="utf-8")
        # With this hash in a judge's name, verdicts of different prompts are never mixed.
        self.hash = digest("".join(self.prompts.values()))

    def content(self, question, item, structured):
        """The message to the model. What is judged stands between marks that it cannot contain."""
        if "text" in item:
            text = item["text"]
        else:
            # A step stays on one line, lest a list inside it be taken for the numbers.
            lines = [" ".join(step.split()) for step in item["steps"]]
            text = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
        # A text that holds the mark could pose as the end of the text and give orders to the judge.
        mark = "#####"
        while mark in text or mark in item["prompt"]:
            mark += "#"
        values = {
            "MARK": mark,
            "PROMPT": item["prompt"],
            "TEXT": text,
            "ANSWERS": _possible_answers(question, structured),
        }
        template = self.prompts[question] + self.prompts["json" if structured else "text"]
        # One pass, so that a placeholder inside what is judged stays as it is.
        return re.sub(r"\{(MARK|PROMPT|TEXT|ANSWERS)\}", lambda found: values[found[1]], template)

    def prompt(self, tokenizer, question, item):
        """The text for a model in this process."""
        content = self.content(question, item, structured=False)
        return render_chat(tokenizer, [{"role": "user", "content": content}])

    def read(self, question, item, reply):
        """The answer in a reply of a model in this process, or None."""
        return parse_answer(question, reply, len(item.get("steps", ())), structured=False)


def _possible_answers(question, structured):
    if question == "cue":
        return "the number"
    if question == "strongreject":
        return "the three digits, in quotes" if structured else "the three digits"
    words = LABELS[question]
    if structured:
        words = [f'"{word}"' for word in words]
    return " or ".join(words)


class ChatJudge(ChatPrompts, ServerJudge):
    """A chat model behind an OpenAI-compatible `/chat/completions` endpoint, at temperature 0.

    Replies follow a JSON schema or, where the server rejects that, end with a line `ANSWER: x`.
    `server` are the settings of a ServerJudge.
    """

    def __init__(self, url, model, no_thinking=False, **server):
        ChatPrompts.__init__(self)
        url = url.rstrip("/") + "/chat/completions"
        ServerJudge.__init__(self, f"{model}:{self.hash}", url, model, **server)
        self.no_thinking = no_thinking
        self.structured = None  # whether the server takes a JSON schema; None: not known yet

    def _request(self, question, item, structured):
        """(structured, key in the cache, JSON to send) of a question."""
        message = {"role": "user", "content": self.content(question, item, structured)}
        body = {"model": self.model, "temperature": 0, "messages": [message]}
        if structured:
            schema = verdict_schema(LABELS.get(question))
            named = {"name": "verdict", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        if self.no_thinking:
            body["chat_template_kwargs"] = {"enable_thinking": False}
        # The body holds model, prompt, text, temperature and schema: all that decides an answer.
        return structured, self.cache_key(question, body), body

    def verdict(self, question, item):
        """(answer, outcome): a verdict, None, or NoAnswer if it may still come."""
        # Two forms of one question: with a JSON schema, and in plain text.
        requests = [self._request(question, item, structured) for structured in (True, False)]
        for _, key, _ in requests:
            kept = self.cache.get(key)
            if kept:
                return kept["answer"], FROM_CACHE
        if self.structured is False:
            requests = requests[1:]
        n_steps = len(item.get("steps", ()))
        for structured, key, body in requests:
            read = partial(_read_verdict, question, n_steps, structured)
            _, _, control = self._request(question, HARMLESS, structured)
            try:
                answer, text, used = self.endpoint.post(body, read, control)
            except RequestFailed as failure:
                if structured and self._schema_rejected(failure):
                    continue
                return self.give_up(failure)
            if answer is None:
                return None, REFUSED
            self.structured = structured
            return self.keep(key, answer, text, used), ASKED

    def _schema_rejected(self, failure):
        if failure.kind == REFUSED or failure.status < 400:
            return False
        # A server that has taken a schema before rejects something else by a bare 400 or 422.
        unexplained = failure.status in (400, 422) and not self.structured
        return unexplained or re.search("response_format|json_schema", failure.text)


def _read_verdict(question, n_steps, structured, reply):
    """(answer, text, tokens used); the answer is None if the model refused.

    Raises UnusableReply where there is no valid verdict: the question is then asked again.
    """
    text, ending, used = read_reply(reply)
    if ending == REFUSED:
        return None, text, used
    answer = parse_answer(question, text, n_steps, structured)
    if answer is None or ending == "length":
        raise UnusableReply("no valid verdict")
    return answer, text, used


def parse_answer(question, text, n_steps=0, structured=True):
    """Read a reply strictly: JSON with a valid `answer`, or a last line `ANSWER: x`; else None.

    >>> parse_answer("reasoning", '{"reason": "it refuses", "answer": "safe"}')
    True
    >>> parse_answer("cue", '{"reason": "", "answer": 3}', n_steps=5)
    3
    >>> parse_answer("cue", '{"answer": 9}', n_steps=5)  # there is no step 9
    >>> parse_answer("reasoning", "It says safe.\\n**ANSWER: unsafe**.\\n", structured=False)
    False
    """
    # Nothing is guessed: "Safe", "not safe" or a label inside a sentence is no verdict.
    try:
        answer = json.loads(text)["answer"] if structured else _last_line_answer(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if question == "cue":
        if not structured and re.fullmatch("[0-9]{1,6}", answer):
            answer = int(answer)
        # Not isinstance, which takes JSON's `true` for an integer.
        valid = type(answer) is int and (answer == 0 or 2 <= answer <= n_steps)
        return answer if valid else None
    if not isinstance(answer, str):
        return None
    return LABELS[question].get(answer)


# Markdown's emphasis and a full stop may stand around the answer, and nothing else.
ANSWER_LINE = r"[*_]{0,3} ANSWER: [*_]{0,3} \s+ [*_]{0,3} ([^\W_]+) [*_]{0,3} \.? [*_]{0,3}"


def _last_line_answer(text):
    trace = split_reasoning(text)
    if trace.closing:
        text = trace.response
    elif trace.opening:
        text = ""  # reasoning that never ended: what it says is no answer
    last_line = text.rstrip().rpartition("\n")[2]
    return re.fullmatch(ANSWER_LINE, last_line.strip(), re.VERBOSE)[1]


class LocalModel:
    """A model in this process whose replies a LocalJudge reads."""

    def __init__(self, path, batch_size, longest):
        model_folder(path)  # a mistyped path ends here, before torch is imported
        from model import LocalSampler
        self.fingerprint = fingerprint(path)
        self.longest = longest
        self.sampler = LocalSampler(path, temperature=0, top_p=1, max_new_tokens=longest, seed=0,
                                    batch_size=batch_size)
        self.tokenizer = self.sampler.tokenizer
        self.context = self.sampler.context

    def replies(self, prompts, title, sampling):
        """Yield (key, reply) for {key: ids}, in any order, but for those cut off by `longest`."""
        requests = [Request(key, ids) for key, ids in prompts.items()]
        self.sampler.options.update(sampling)
        for key, ids, finished in self.sampler(requests, title=title):
            if finished == "stop":
                yield key, decode(self.tokenizer, ids, self.sampler.eos)


def make_judge(spec, model=None, concurrency=8, kind="auto", controversial="unsafe", cache=None,
               no_thinking=False, flag="--judge", keys=JUDGE_KEYS, **http):
    """The judge that a flag like --judge names; `http` are settings of its Endpoint.

    spec: `python:MODULE`, its class `Judge` (`python:MODULE:TEXT`: made with that text); `rules`
    and `rules:FILE`, that of domains/safety.py; `local:PATH`; or the URL of a server,
    https://HOST/v1. kind: that of --judge-kind. Raises InputError for anything else, and for a URL
    without a model.
    """
    place, _, path = spec.partition(":")
    if place == "rules":
        place = "python"
        path = f"domains.safety:{path}"
    if place == "python":
        module, _, text = path.partition(":")
        judge_class = load_object(f"{module}:Judge", flag)
        return judge_class(text) if text else judge_class()
    if place == "local":
        kind = judge_kind(kind, local_name(path))
        form = ChatPrompts() if kind == "chat" else GuardForm(kind, controversial)
        local = LocalModel(path, concurrency, form.longest_reply)
        name = f"local:{Path(path).name}:{local.fingerprint}:{form.hash}"
        return LocalJudge(name, form, local, cache)
    if not spec.startswith(("http://", "https://")):
        raise InputError(f"{flag} {spec}: use `rules`, `rules:FILE`, `python:MODULE`, "
                         "`local:PATH` or the URL of a server, https://HOST/v1.")
    if not model:
        raise InputError(f"{flag} URL also needs {flag}-model NAME.")
    server = {"concurrency": concurrency, "cache": cache, "keys": keys, **http}
    kind = judge_kind(kind, model)
    if kind == "chat":
        return ChatJudge(spec, model, no_thinking, **server)
    return ServerGuard(GuardForm(kind, controversial), spec, model, **server)


# ------------------------------------------------------------------------------ traces and verdicts

def trace_jobs(prompts, samples, sampler):
    """Jobs for `samples` rollouts of each prompt; returns (jobs, number of prompts dropped).

    A job is a trace record without what the model writes. Prompts that leave no room for
    `max_new_tokens` in the model's context are dropped, never cut.
    """
    jobs = []
    dropped = 0
    for prompt in prompts:
        prompt_ids = render_prompt(sampler.tokenizer, prompt["prompt"])
        if len(prompt_ids) + sampler.max_new_tokens > sampler.context:
            dropped += 1
            continue
        for k in range(samples):
            jobs.append({
                "id": f"{prompt['id']}#{k}",
                "prompt_id": prompt["id"],
                "sample": k,
                "prompt": prompt["prompt"],
                "prompt_ids": prompt_ids,
                "forced_ids": [],
            })
    return jobs, dropped


def sample_traces(path, jobs, sampler, title):
    """Sample what follows `prompt_ids + forced_ids` of each job; returns the trace records.

    They are appended to `path` as they come; a second call picks up where the first left off.
    """
    out = append_traces(path, jobs, sampler, title)
    return out.read([job["id"] for job in jobs])


def append_traces(path, jobs, sampler, title):
    """`sample_traces` without holding the records; returns the Appender of `path`, closed."""
    out = Appender(path)
    unwritten = Path(path).with_suffix(".parts")  # waves that the sampler has finished
    job_of = {job["id"]: job for job in jobs}
    requests = []
    for job in jobs:
        prefix = job["prompt_ids"]
        if job["forced_ids"]:
            prefix = prefix + job["forced_ids"]  # otherwise all samples share one list
        requests.append(Request(job["id"], prefix))
    for job_id, new_ids, finished in sampler(requests, out.done, unwritten, title):
        record = dict(job_of[job_id])
        forced_ids = record.pop("forced_ids")
        # The ids as they were sampled: encoding their text again could give others.
        ids = forced_ids + new_ids
        parts = split_reasoning(decode(sampler.tokenizer, ids, sampler.eos))
        record |= parts._asdict()
        record |= {"finished": finished, "forced": len(forced_ids), "ids": ids}
        if finished == "length":
            record["truncated"] = True  # half a response is no response either
        out.write(record)
    out.close()
    shutil.rmtree(unwritten, ignore_errors=True)
    return out


def segment(traces):
    """Step records `{"id", "steps"}` of traces."""
    return [step_record(trace) for trace in traces]


def step_record(trace):
    """The step record of one trace."""
    return {"id": trace["id"], "steps": split_steps(trace["reasoning"])}


def _texts(traces, field):
    """What a judge is asked about: one text of each trace."""
    return [{"prompt": t["prompt"], "text": t[field]} for t in traces]


def _answers_by_id(judge, question, traces, items):
    """{trace id: answer to its item, or NoAnswer}."""
    answers = answers_so_far(judge.ask(question, items))
    return {trace["id"]: answer for trace, answer in zip(traces, answers)}


def judge_traces(path, traces, steps, judge, chunk=256):
    """Verdict records `{"id", "reasoning_safe", "response_safe", "cue"}` of traces.

    A truncated trace has no response, so its `response_safe` is None without being asked for; the
    cue is asked for where the reasoning is unsafe. Records are appended to `path` after each
    `chunk` of traces; a second call picks up where the first left off. Raises Unanswered where an
    answer has not come, once all others are written.

    traces, steps: iterables in the same order, of which one chunk is held at a time.
    """
    out = AnsweredRecords(Appender(path))
    ids = []
    for part, steps_of in chunks_with_steps(traces, steps, chunk):
        ids += [t["id"] for t in part]
        part = [t for t in part if t["id"] not in out.done]
        if not part:
            continue
        # Three questions, each to those traces that it makes sense for.
        reasoning_safe = _answers_by_id(judge, "reasoning", part, _texts(part, "reasoning"))
        complete = [t for t in part if not t["truncated"]]
        response_safe = _answers_by_id(judge, "response", complete, _texts(complete, "response"))
        unsafe = [t for t in part if reasoning_safe[t["id"]] is False]
        items = [{"prompt": t["prompt"], "steps": steps_of[t["id"]]} for t in unsafe]
        cue = _answers_by_id(judge, "cue", unsafe, items)
        for trace_id, safe in reasoning_safe.items():
            out.write({
                "id": trace_id,
                "reasoning_safe": safe,
                "response_safe": response_safe.get(trace_id),
                "cue": cue.get(trace_id),
            })
    out.close()
    return out.read(ids)


def complied(judge, traces, answer="full"):
    """Whether each response to a benign prompt is such an answer: a list of True, False or None.

    answer: "full", "partial" or "refusal".
    """
    found = []
    for given in judge.ask("compliance", _texts(traces, "response")):
        found.append(None if given is None else given == answer)
    return found


# -------------------------------------------------------------------------- interventions and pairs

def substitute(tokenizer, trace, steps, number, trigger):
    """Put a trigger in the place of step `number` (from 1): the ids before it, and the trigger's.

    The trigger takes over the white space around the step that it replaces, so that it begins and
    ends where a token does. Where a token straddles the step's beginning (CJK punctuation can be
    glued to the next word), the cut falls before that token and its lost characters are written
    again in front of the trigger. Returns (h, trigger_ids): z[:h] is `trace["ids"][:h]`.
    """
    step = steps[number - 1]
    # From sentence to character, and from character to token.
    start = len(trace["opening"]) + sum(map(len, steps[:number - 1]))
    h = token_index(tokenizer, trace["ids"], start)
    text = trace["opening"] + trace["reasoning"]
    lost = text[len(decode(tokenizer, trace["ids"][:h])):start]
    lead = step[:len(step) - len(step.lstrip())]
    tail = step[len(step.rstrip()):]
    if number == len(steps):
        tail = ""  # what ends the last step belongs to </think>
    return h, tokenizer.encode(lost + lead + trigger + tail, add_special_tokens=False)


def intervention_job(sampler, trace, steps, number, trigger, job_id):
    """(job, h): a job that continues z[:h] + trigger; None if the context leaves no room for it."""
    h, trigger_ids = substitute(sampler.tokenizer, trace, steps, number, trigger)
    forced_ids = trace["ids"][:h] + trigger_ids
    if len(trace["prompt_ids"]) + len(forced_ids) >= sampler.context:
        return None, h
    job = {name: trace[name] for name in ("prompt_id", "sample", "prompt", "prompt_ids")}
    return {**job, "id": job_id, "forced_ids": forced_ids}, h


def sample_continuations(path, substitutions, sampler, title):
    """Let the model continue z[:h] + trigger: a list of (trace, h, trigger, new trace).

    substitutions: (trace, steps, number of the step to replace, trigger, id of the new trace).
    Those that leave no room in the context are left out. The new traces are written to `path`.
    """
    jobs = []
    origins = {}
    for trace, steps, number, trigger, new_id in substitutions:
        job, h = intervention_job(sampler, trace, steps, number, trigger, new_id)
        if job:
            jobs.append(job)
            origins[new_id] = (trace, h, trigger)
    new_traces = sample_traces(path, jobs, sampler, title)
    return [(*origins[new["id"]], new) for new in new_traces]


def make_pair(tokenizer, eos, trace, corrected, h, trigger, **origin):
    """The pair record of Algorithm 1: `corrected` preferred over `trace`, from token h on.

    `prefix_ids` = prompt + z[:h] are shared token for token. Tokens that both sides still share
    after h stay where they are: they cancel in L_pref. Returns None where both sides are equal.
    """
    # The trigger stands at the head of `chosen`: its tokens are scored, the model must learn them.
    prefix = trace["ids"][:h]
    chosen = corrected["ids"][h:]
    rejected = trace["ids"][h:]
    assert corrected["prompt_ids"] == trace["prompt_ids"], "prompt not shared"
    assert corrected["ids"][:h] == prefix, "prefix not shared"
    if chosen == rejected:
        return None
    return {
        "id": corrected["id"],
        "prompt_id": trace["prompt_id"],
        **origin,
        "h": h,
        "n_prompt": len(trace["prompt_ids"]),
        "prompt": trace["prompt"],
        "prefix": decode(tokenizer, prefix),
        "trigger": trigger,
        "chosen": decode(tokenizer, chosen, eos),
        "rejected": decode(tokenizer, rejected, eos),
        "prefix_ids": trace["prompt_ids"] + prefix,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
    }


def intervene(traces, steps, verdicts, triggers, sampler, judge, folder, rounds=1):
    """Algorithm 1 on judged rollouts: replace the first cue, continue, judge; `rounds` is its N.

    The k-th rollout of a prompt takes the k-th trigger of the pool, and in each further round the
    next one. The files of each round go to `folder`. Returns (pairs, counts, more): `by_trigger`
    maps a trigger to [interventions, pairs], `outcomes` says what came of the interventions.
    """
    rollouts = judged_traces(traces, steps, verdicts)
    unsafe = [trace for trace in rollouts if needs_intervention(trace)]
    tried = []
    pairs = []
    outcomes = Counter()
    # Of Algorithm 1, z is `trace` and z~ is `corrected`.
    for n in range(1, rounds + 1):
        interventions = intervene_once(unsafe, triggers, sampler, judge, folder, n)
        tried += interventions
        unsafe = []
        for trace, h, trigger, corrected in interventions:
            outcome = outcome_of(trace, h, corrected)
            outcomes[outcome] += 1
            if outcome == "pairs":
                pairs.append(make_pair(
                    sampler.tokenizer, sampler.eos, trace, corrected, h, trigger,
                    source="harmful", interventions=n))
            elif needs_intervention(corrected):
                unsafe.append(corrected)  # the next round replaces its first cue

    counts = count_rollouts(rollouts)
    counts["interventions"] = len(tried)
    counts["safe continuations"] = len([new for *_, new in tried if is_safe(new)])
    if outcomes["identical"]:
        counts["identical"] = outcomes["identical"]
    counts["pairs"] = len(pairs)
    n_tried = Counter(trigger for _, _, trigger, _ in tried)
    n_pairs = Counter(pair["trigger"] for pair in pairs)
    by_trigger = {trigger: [n_tried[trigger], n_pairs[trigger]] for trigger in triggers}
    return pairs, counts, {"by_trigger": by_trigger, "outcomes": dict(outcomes)}


def outcome_of(trace, h, corrected):
    """What came of an intervention at token h of a trace: "pairs", or why it gave no pair."""
    if corrected["truncated"]:
        return "truncated"
    if False in (corrected["reasoning_safe"], corrected["response_safe"]):
        return "unsafe"
    if not is_safe(corrected):
        return "unjudged"
    if corrected["ids"][h:] == trace["ids"][h:]:
        return "identical"
    # CHOICE: where the cue of a later round stands before the end of the trigger of an earlier
    # one, the rejected side would hold that trigger, and training would push it down.
    if h < trace["forced"]:
        return "cue before trigger"
    return "pairs"


def intervene_once(unsafe, triggers, sampler, judge, folder, n):
    """Round n of Algorithm 1: put a trigger in place of each trace's first cue, continue, judge.

    Returns a list of (trace, h, trigger, corrected trace with its steps and verdict).
    """
    # z[:h] + trigger, where h is the position of z's first cue
    substitutions = []
    for trace in unsafe:
        # The next one in each round: another cue may directly follow the trigger of the last one.
        trigger = triggers[(trace["sample"] + n - 1) % len(triggers)]
        new_id = f"{trace['prompt_id']}#{trace['sample']}@{n}"
        substitutions.append((trace, trace["steps"], trace["cue"], trigger, new_id))
    # z~ = z[:h] + trigger + what the policy itself writes next, through </think> and the response
    path = folder / f"round{n}.traces.jsonl"
    continued = sample_continuations(path, substitutions, sampler, f"interventions, round {n}")

    # Is z~ safe? If not, where is its first cue?
    new_traces = [new for *_, new in continued]
    steps = segment(new_traces)
    verdicts = judge_traces(folder / f"round{n}.verdicts.jsonl", new_traces, steps, judge)
    corrected = judged_traces(new_traces, steps, verdicts)
    return [(z, h, trigger, new) for (z, h, trigger, _), new in zip(continued, corrected)]


def judged_traces(traces, steps, verdicts):
    """Trace records that also hold `steps` and the fields of their verdict."""
    steps_of = {record["id"]: record for record in steps}
    verdict_of = {record["id"]: record for record in verdicts}
    judged = []
    for trace in traces:
        trace_id = trace["id"]
        if trace_id not in steps_of or trace_id not in verdict_of:
            raise InputError(f"{trace_id}: a trace without steps or without a verdict record. Make "
                             "them again from the same traces.")
        judged.append({**trace, **steps_of[trace_id], **verdict_of[trace_id]})
    return judged


def needs_intervention(trace):
    """Whether the reasoning of a complete trace is unsafe and holds a cue to replace."""
    return not trace["truncated"] and trace["reasoning_safe"] is False and bool(trace["cue"])


def is_safe(trace):
    """Whether a trace may be the chosen side of a pair."""
    # CHOICE: the response is learned too, so it must be judged safe as well, and be complete.
    return trace["reasoning_safe"] and trace["response_safe"] and not trace["truncated"]


def count_rollouts(rollouts):
    """The funnel up to the first intervention."""
    complete = [trace for trace in rollouts if not trace["truncated"]]
    unsafe = [trace for trace in complete if trace["reasoning_safe"] is False]
    return {
        "prompts": len({trace["prompt_id"] for trace in rollouts}),
        "rollouts": len(rollouts),
        "complete": len(complete),
        "unsafe": len(unsafe),
        "cue found": sum(map(needs_intervention, unsafe)),
    }


def benign_pairs(base, current, triggers, sampler, judge, folder):
    """Stage 2: pairs that prefer the base model's answer to a benign prompt over a refusal.

    CHOICE: rejected is the current (stage-1) model's own refusal where it refuses; elsewhere a
    refusal that a trigger in place of the first helpful step provokes. `base` and `current` are
    traces of the two models on the same prompts. Returns (pairs, counts).
    """
    complete = [t for t in base if not t["truncated"]]
    answered = [t for t, full in zip(complete, complied(judge, complete)) if full]
    own = own_refusals(answered, current, judge)
    refused = {answer["prompt_id"] for answer, *_ in own}
    others = [t for t in answered if t["prompt_id"] not in refused]
    path = folder / "reverse.traces.jsonl"
    tried, provoked = provoked_refusals(path, others, triggers, sampler, judge)

    pairs = []
    for refusals, interventions in ((own, 0), (provoked, 1)):
        for answer, h, trigger, refusal in refusals:
            pair = make_pair(sampler.tokenizer, sampler.eos, refusal, answer, h, trigger,
                             source="benign", interventions=interventions)
            if pair:
                pairs.append(pair)
    counts = {
        "prompts": len(base),
        "answered": len(answered),
        "refused now": len(own),
        "reversed": tried,
        "pairs": len(pairs),
    }
    return pairs, counts


def own_refusals(answered, current, judge):
    """Where the current model refuses by itself: a list of (answer, 0, "", refusal).

    The two traces share nothing but the prompt, so h is 0; there is no trigger.
    """
    latest = {t["prompt_id"]: t for t in current if not t["truncated"]}
    # CHOICE: a partial answer is no refusal, here and below: it still helps.
    refused = dict(zip(latest, complied(judge, latest.values(), "refusal")))
    found = []
    for trace in answered:
        prompt_id = trace["prompt_id"]
        if refused.get(prompt_id):
            answer = {**trace, "id": trace["id"] + "@own"}
            found.append((answer, 0, "", latest[prompt_id]))
    return found


def provoked_refusals(path, answered, triggers, sampler, judge):
    """Put a trigger in place of each answer's first helpful step; the current model continues.

    Returns (number of traces tried, list of (answer, h, trigger, refusal)).
    """
    items = [{"prompt": t["prompt"], "steps": split_steps(t["reasoning"])} for t in answered]
    cues = judge.ask("cue", items)
    substitutions = []
    for k, (trace, item, cue) in enumerate(zip(answered, items, cues)):
        steps = item["steps"]
        if steps:
            # CHOICE: where the judge finds no helpful step, the second one is replaced.
            number = cue or min(2, len(steps))
            trigger = triggers[k % len(triggers)]
            substitutions.append((trace, steps, number, trigger, trace["id"] + "@reverse"))
    continued = sample_continuations(path, substitutions, sampler, "reverse substitution")

    # The trigger does not always provoke a refusal: only what was judged to be one is kept.
    found = []
    refusals = complied(judge, [new for *_, new in continued], "refusal")
    for (trace, h, trigger, new), refused in zip(continued, refusals):
        if refused and not new["truncated"]:
            found.append(({**trace, "id": new["id"]}, h, trigger, new))
    return len(continued), found


# ------------------------------------------------------------------------------------------- stages
#
# Each takes its flags as keywords (`**_` ignores those of other stages), a judge and a sampler
# where it needs them, writes `out`, and returns (counts, more). Both go into NAME.funnel.json: a
# funnel counts what came in, what was left after each step, and what went out.

def run_rollouts(out, prompts, limit, samples, sampler, **_):
    """Stage `rollouts`: sample `samples` traces for each prompt."""
    loaded = load_prompts(prompts, limit)
    jobs, dropped = trace_jobs(loaded, samples, sampler)
    append_traces(out, jobs, sampler, Path(out).stem)
    truncated = [trace["truncated"] for trace in stream_jsonl(out)]
    counts = {
        "prompts": len(loaded),
        "short enough": len(loaded) - dropped,
        "rollouts": len(truncated),
        "complete": truncated.count(False),
    }
    return counts, {}


def run_steps(out, traces, **_):
    """Stage `steps`: cut the reasoning of each trace into sentences."""
    write_jsonl(out, map(step_record, stream_jsonl(traces)))
    lengths = [len(record["steps"]) for record in stream_jsonl(out)]
    return {"traces": len(lengths), "steps": sum(lengths)}, {}


def run_judge(out, traces, steps, judge, **_):
    """Stage `judge`: verdicts on reasoning and response, and the first cue."""
    verdicts = judge_traces(out, RecordFile(traces), stream_jsonl(steps), judge)
    reasoning = Counter(v["reasoning_safe"] for v in verdicts)
    responses = Counter(v["response_safe"] for v in verdicts)
    cues = [v for v in verdicts if v["cue"]]
    counts = {
        "traces": len(verdicts),
        "judged": reasoning[True] + reasoning[False],
        "unsafe reasoning": reasoning[False],
        "unsafe responses": responses[False],
        "cue found": len(cues),
    }
    return counts, {}


def run_pairs(out, traces, steps, verdicts, triggers, sampler, judge, max_interventions, **_):
    """Stage `pairs`: Algorithm 1 on judged rollouts."""
    records = [read_jsonl(path) for path in (traces, steps, verdicts)]
    pool = load_triggers(triggers)
    folder = Path(out).with_suffix(".rounds")
    pairs, counts, more = intervene(*records, pool, sampler, judge, folder, max_interventions)
    write_jsonl(out, pairs)
    for trigger, (tried, made) in more["by_trigger"].items():
        print(f"  {made:4d} pairs of {tried:4d} interventions: {trigger}")
    return counts, more


def run_benign(out, base, traces, triggers, sampler, judge, **_):
    """Stage `benign`: pairs against over-refusal, for stage 2 of the training."""
    records = [read_jsonl(path) for path in (base, traces)]
    pool = load_triggers(triggers)
    pairs, counts = benign_pairs(*records, pool, sampler, judge, Path(out).with_suffix(".rounds"))
    write_jsonl(out, pairs)
    return counts, {}


# ------------------------------------------------------------------------------------- command line

def sampler_from_flags(args):
    """The sampler of the flags: the model in this process, or a server."""
    # Here, because it imports torch, which the other stages do without.
    from model import LocalSampler, context_length, eos_ids, load_tokenizer
    from support.server import ServerSampler
    refuse_wrong_sampling(args)
    names = ("temperature", "top_p", "max_new_tokens", "seed")
    settings = {name: getattr(args, name) for name in names}
    if not args.server:
        rows = recorded_flags(args)["batch_size"]
        return LocalSampler(args.model, batch_size=rows, device=args.device, dtype=args.dtype,
                            graphs=not args.no_graph, **settings)
    tokenizer = load_tokenizer(args.model)
    eos = eos_ids(args.model, tokenizer)
    context = context_length(args.model)
    return ServerSampler(args.model, args.server, tokenizer, eos, context,
                         concurrency=args.in_flight, **settings)


def judge_from_flags(args, keys=JUDGE_KEYS):
    """The judge of the flags. Raises InputError for a cost limit without prices."""
    prices = (args.judge_price_in, args.judge_price_out)
    if args.max_cost and not any(prices):
        raise InputError("--max-cost needs --judge-price-in and --judge-price-out, "
                         "in dollars per million tokens.")
    make = partial(
        make_judge,
        concurrency=args.judge_concurrency,
        no_thinking=args.judge_no_thinking,
        cache=args.judge_cache or Path(args.out).parent / "judge_cache.jsonl",
        max_cost=args.max_cost,
        prices=prices,
    )
    judge = make(args.judge, args.judge_model, kind=args.judge_kind,
                 controversial=args.guard_controversial, keys=keys)
    if not args.cue_judge:
        return judge
    # The key of a judge is not sent to another address.
    other_keys = keys if args.cue_judge == args.judge else CUE_KEYS
    other = make(args.cue_judge, args.cue_judge_model, kind="chat", flag="--cue-judge",
                 keys=other_keys)
    return CombinedJudge(judge, other)


def recorded_flags(args, **replaced):
    """The flags as they stand in NAME.config.json, some of them replaced by what they stand for."""
    return {**with_batch_size(vars(args)), **replaced}


FILES = {
    "prompts": "prompts: .jsonl, .json, .csv, .tsv or .txt",
    "traces": "trace records (.jsonl)",
    "steps": "step records (.jsonl)",
    "verdicts": "verdict records (.jsonl)",
    "base": "the base model's traces on the same prompts (.jsonl)",
}
STAGES = {  # function, input files, purpose
    "rollouts": (run_rollouts, ["prompts"], "sample reasoning and response for each prompt"),
    "steps": (run_steps, ["traces"], "cut the reasoning of traces into sentences"),
    "judge": (run_judge, ["traces", "steps"],
              "judge reasoning and responses, find the first compliance cue"),
    "pairs": (run_pairs, ["traces", "steps", "verdicts"],
              "put triggers in place of cues, continue, keep the safe ones as pairs"),
    "benign": (run_benign, ["traces", "base"],
               "pairs against over-refusal: answer preferred over refusal"),
}
ASKS = {  # the questions that a stage puts to its judge
    "judge": ("reasoning", "response", "cue"),
    "pairs": ("reasoning", "response", "cue"),
    "benign": ("compliance", "cue"),
}


def build_parser():
    """The command line of this module."""
    description = "From prompts to preference pairs."
    parser = argparse.ArgumentParser(prog="intervene.py", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, files, purpose) in STAGES.items():
        command = commands.add_parser(name, help=purpose, description=purpose,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add = command.add_argument
        add("--out", required=True, help="file to write (.jsonl)")
        add_stage_flags(command)
        for file in files:
            add(f"--{file}", required=True, help=FILES[file])
        if name in ("rollouts", "pairs", "benign"):
            add_sampler_flags(command)
        if name in ("judge", "pairs", "benign"):
            add_judge_flags(command)
        if name in ("pairs", "benign"):
            add("--triggers", default=DEFAULT_TRIGGERS, help="safety triggers, one a line")
        if name == "rollouts":
            add("--samples", type=int, default=6, help="rollouts per prompt (one for each trigger)")
            add("--limit", type=int, default=0, help="use only the first prompts; 0 = all")
        if name == "pairs":
            add("--max-interventions", type=int, default=1,
                help="the paper's N: rounds of intervention")
    return parser


def main(argv=None):
    """Run one stage from the command line."""
    args = build_parser().parse_args(argv)
    run, files, _ = STAGES[args.command]
    flags = recorded_flags(args)
    judge = None
    if "judge" in flags:
        judge = judge_from_flags(args)
        require_questions(judge, ASKS[args.command])
        # Its name holds a hash of its rules or prompts: verdicts of different ones never mix.
        flags["judge"] = judge.name
    inputs = [flags[name] for name in ("model", "triggers", *files) if name in flags]

    def work():
        sampler = sampler_from_flags(args) if "model" in flags else None
        counts, more = run(**recorded_flags(args, judge=judge, sampler=sampler))
        if judge:
            more["judge"] = judge.summary()
        return counts, more

    run_stage(__file__, args.out, flags, inputs, work)


if __name__ == "__main__":
    exit_cleanly(with_hands(main))
