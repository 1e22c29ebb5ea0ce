"""What judges that are language models share, whatever they are asked.

A ServerJudge asks a server, a LocalJudge a model in this process. Either asks each different
question once, keeps the replies with a verdict in a file, and counts what came of its questions.
"""
import json
from collections import Counter
from urllib.parse import urlsplit

from support.cache import Cache
from support.errors import InputError
from support.files import digest, json_line
from support.http import (
    PASSING,
    REFUSED,
    REJECTED,
    UNUSABLE,
    Endpoint,
    in_parallel,
    token_usage,
)
from support.unanswered import NoAnswer, answers_so_far, gaps_last

ASKED = "asked"
FROM_CACHE = "from cache"
CUT_SHORT = "cut short"  # the server read fewer tokens than the question has words
TOO_LONG = "too long"  # for the context of a model in this process
MISSING = (REFUSED, UNUSABLE, REJECTED, CUT_SHORT, TOO_LONG)  # outcomes without a verdict
MARKERS = "markers neutralised"
HARMLESS = {"prompt": "Hello.", "text": "Hello.", "steps": ["Hello."]}  # no server rejects it

# CHOICE: a reply without a verdict is asked for once more. At temperature 0 it would come again as
# it was, so the second one is sampled.
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 0.6, "seed": 1}


class Form:
    """How a language model is asked, and its reply read. LocalJudge needs all of it."""

    questions = frozenset()  # that it can answer
    longest_reply = 4096  # tokens
    hash = ""  # of all that the questions are made of: a part of the judge's name
    scans_cue = False  # whether "cue" is answered by `find_cues`

    def prompt(self, tokenizer, question, item):
        """The text that the model goes on with."""
        raise NotImplementedError

    def read(self, question, item, reply):
        """The answer in a reply, or None where there is no valid one."""
        raise NotImplementedError

    def count_markers(self, item):
        """How many markers in what is judged had to be neutralised."""
        return 0


# ----------------------------------------------------------------------------------- on a server

class ServerJudge:
    """A judge behind an OpenAI-compatible endpoint; a subclass says how one question is asked.

    Valid verdicts go to the file `cache`, under the hash of all that determines them, and are not
    paid for twice; two processes that meet the same question at the same time may both ask it.
    `http` are further settings of the Endpoint.
    """

    def __init__(self, name, url, model, concurrency=8, cache=None, **http):
        self.name = name
        self.model = model
        self.cache = Cache(cache)
        self.counts = Counter()  # outcome -> number of questions
        # What earlier runs paid for the cache's verdicts counts towards the cost limit.
        spent = sum(record["cost"] for record in self.cache.records.values())
        self.endpoint = Endpoint(url, concurrency=concurrency, spent_before=spent, **http)

    def verdict(self, question, item):
        """(answer, outcome): a verdict, None, or NoAnswer if it may still come. Runs in threads."""
        raise NotImplementedError

    def ask(self, question, items):
        """Answers in the order of the items; None where there will be no valid reply.

        Equal items are asked once. Raises ServiceError when the server cannot be used.
        """
        return gaps_last(self._answers(question, items))

    def _answers(self, question, items):
        keys = [json_line(item) for item in items]
        different = dict(zip(keys, items))
        found = in_parallel(
            lambda item: self.verdict(question, item),
            different.values(),
            self.endpoint.concurrency,
            f"judging: {question}",
            "verdict",
            self._progress,
        )
        verdicts = {}
        for key in keys:
            if key not in verdicts:
                verdicts[key] = next(found)  # they come in the order of `different`
            answer, outcome = verdicts[key]
            self.counts[outcome] += 1
            yield answer

    def summary(self):
        """What came of the questions so far, and their price (dollars with those of the cache)."""
        used = self.endpoint.counts
        return {
            **outcomes(self.counts),
            "retries": used["retries"],
            "tokens in": used["prompt_tokens"],
            "tokens out": used["completion_tokens"],
            "dollars": round(self.endpoint.cost(), 4),
        }

    def _progress(self):
        return ", ".join(f"{number} {outcome}" for outcome, number in self.summary().items())

    def cache_key(self, *determining):
        """The id in the cache of what is asked there; determining: all that decides the answer."""
        key = [lasting_address(self.endpoint.url), *determining]
        return digest(json.dumps(key, sort_keys=True))

    def keep(self, key, answer, reply, used):
        """Put a verdict into the cache; returns the answer that is kept."""
        record = {"id": key, "judge": self.name, "answer": answer, "reply": reply}
        record["cost"] = self.endpoint.price(used)
        return self.cache.put(record)["answer"]

    def give_up(self, failure):
        """What a failed request means: that there is no verdict, or that it may still come."""
        if failure.kind == PASSING:
            return NoAnswer(str(failure)), failure.kind
        return None, failure.kind


def read_reply(reply):
    """(text, how it ended, tokens used) of a reply of /chat/completions or /completions.

    It ended "stop", "length", or with REFUSED. A refusal may quote a label, and a filtered reply
    may hold half of one: neither has a text.
    """
    choice = reply["choices"][0]
    ending = choice.get("finish_reason")
    used = token_usage(reply)
    if "text" in choice:
        return choice["text"], ending, used
    message = choice["message"]
    if ending == "content_filter" or message.get("refusal"):
        return "", REFUSED, used
    return message["content"] or "", ending, used


def verdict_schema(labels):
    """The JSON schema of a verdict; its answer is one of the labels or, without any, a number."""
    answer = {"type": "integer"}
    if labels:
        answer = {"type": "string", "enum": list(labels)}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["reason", "answer"],
        "properties": {"reason": {"type": "string"}, "answer": answer},
    }


def outcomes(counts):
    """The counts of a judge's summary: those without a verdict together, then why."""
    missing = {outcome: counts[outcome] for outcome in MISSING if counts[outcome]}
    summary = {
        ASKED: counts[ASKED],
        FROM_CACHE: counts[FROM_CACHE],
        "unjudged": sum(missing.values()),
        **missing,
    }
    if counts[MARKERS]:
        summary[MARKERS] = counts[MARKERS]
    return summary


def lasting_address(url):
    """A URL as it stands in the keys of a cache. On this machine the model's name alone decides.

    A server of one's own is started anew on whatever port is free, and should find its verdicts.

    >>> lasting_address("http://127.0.0.1:8700/v1/chat/completions")
    'this machine/v1/chat/completions'
    >>> lasting_address("https://host:8700/v1/chat/completions")
    'https://host:8700/v1/chat/completions'
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "::1") or host.startswith("127."):
        return "this machine" + parts.path
    return url


# ------------------------------------------------------------------------------ in this process

class LocalJudge:
    """A judge that is a model in this process.

    form: a Form. model: has `tokenizer`, `fingerprint`, the longest reply `longest` and `context`
    in tokens, and `replies({key: ids}, title, sampling)`, which yields (key, reply) of those
    replies that came to an end.
    """

    def __init__(self, name, form, model, cache=None):
        self.name = name
        self.form = form
        self.model = model
        self.questions = form.questions
        self.cache = Cache(cache)
        self.counts = Counter()

    def ask(self, question, items):
        """Answers in the order of the items; None also where one does not fit into the context."""
        if question == "cue" and self.form.scans_cue:
            return find_cues(self, items)
        prompts = {}  # key -> ids
        item_of = {}
        keys = []
        for item in items:
            key, ids = self._prompt(question, item)
            keys.append(key)
            prompts[key] = ids
            item_of[key] = item
            self.counts[MARKERS] += self.form.count_markers(item)
        verdicts = self._from_cache(question, item_of)
        too_long = {key for key, ids in prompts.items() if len(ids) >= self.model.context}
        for sampling in (GREEDY, SAMPLED):
            todo = {}
            for key, ids in prompts.items():
                if key not in verdicts and key not in too_long:
                    todo[key] = ids
            verdicts |= self._ask_once(question, todo, item_of, sampling)
        answers = []
        for key in keys:
            missing = TOO_LONG if key in too_long else UNUSABLE
            answer, outcome = verdicts.get(key, (None, missing))
            self.counts[outcome] += 1
            answers.append(answer)
        return iter(answers)

    def summary(self):
        """What came of the questions so far."""
        return outcomes(self.counts)

    def _prompt(self, question, item):
        """(key in the cache, token ids) of a question."""
        tokenizer = self.model.tokenizer
        text = self.form.prompt(tokenizer, question, item)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        key = digest(json.dumps([self.model.fingerprint, self.model.longest, text]))
        return key, ids

    def _from_cache(self, question, item_of):
        """{key: (answer, outcome)} of the questions whose reply is kept."""
        verdicts = {}
        for key, item in item_of.items():
            kept = self.cache.get(key)
            # Read again, because a guard's one reply holds answers to several questions.
            answer = self.form.read(question, item, kept["reply"]) if kept else None
            if answer is not None:
                verdicts[key] = answer, FROM_CACHE
        return verdicts

    def _ask_once(self, question, prompts, item_of, sampling):
        """{key: (answer, outcome)} of the prompts whose reply holds a verdict; they are kept."""
        verdicts = {}
        if not prompts:
            return verdicts
        for key, reply in self.model.replies(prompts, f"judging: {question}", sampling):
            answer = self.form.read(question, item_of[key], reply)
            if answer is not None:
                record = {"id": key, "judge": self.name, "answer": answer, "reply": reply}
                self.cache.put({**record, "cost": 0})
                verdicts[key] = answer, ASKED
        return verdicts


def render_chat(tokenizer, messages, add_generation_prompt=True):
    """The text of messages in the model's own chat template, thinking off where it can be."""
    options = {}
    if "enable_thinking" in str(tokenizer.chat_template):
        options["enable_thinking"] = False
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
    )


# ----------------------------------------------------------------------------------- cues, and two

def find_cues(judge, items, block=4):
    """Answers to "cue" by a judge that has none: n where steps[:n] first is unsafe reasoning.

    The prefixes of all items are asked about together, in blocks that double, so that those after
    the cue are mostly not asked about. 0 where no prefix from 2 steps on is unsafe.
    """
    answers = {}  # number of an item -> its answer
    first = 2  # CHOICE: as for other judges, the first step restates the request
    while True:
        asked = []
        for number, item in enumerate(items):
            end = min(first + block, len(item["steps"]) + 1)
            if number not in answers:
                asked += [(number, n) for n in range(first, end)]
        if not asked:
            return gaps_last(answers.get(number, 0) for number in range(len(items)))
        prefixes = []
        for number, n in asked:
            item = items[number]
            prefixes.append({"prompt": item["prompt"], "text": "".join(item["steps"][:n])})
        found = answers_so_far(judge.ask("reasoning", prefixes))
        for (number, n), safe in zip(asked, found):
            # Without a verdict on this prefix nobody knows whether a later one is the first.
            if safe is not True:
                answers.setdefault(number, n if safe is False else safe)
        first += block
        block *= 2


class CombinedJudge:
    """Two judges: `other` answers "cue", and whatever `main` cannot answer."""

    def __init__(self, main, other):
        self.main = main
        self.other = other
        self.name = f"{main.name} + {other.name}"
        self.questions = main.questions | other.questions

    def ask(self, question, items):
        """Answers of the judge whose question it is."""
        to_other = question == "cue" or question not in self.main.questions
        judge = self.other if to_other else self.main
        return judge.ask(question, items)

    def summary(self):
        """The summary of the main judge, and that of the other under names of its own."""
        other = {f"cue judge: {name}": n for name, n in self.other.summary().items()}
        return {**self.main.summary(), **other}


def require_questions(judge, questions):
    """Raise InputError unless the judge can answer all these questions."""
    missing = [question for question in questions if question not in judge.questions]
    if missing:
        raise InputError(
            f"The judge {judge.name} cannot answer: {', '.join(missing)}. Take another --judge, or "
            "add --cue-judge with a chat model, which answers what --judge cannot."
        )
