"""Requests to OpenAI-compatible servers, as judges and samplers make them: retries, limits, a cache of paid replies.

Nothing here knows the method: see `intervene.ChatJudge` and `model.ServerSampler` for what is asked.
"""
import fcntl
import json
import os
import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from data import digest, public


class Fault(Exception):
    """A request that failed for good. `status` is the last reply's (0 if there was none), `text` what it said."""

    def __init__(self, url, status, problem, text=""):
        super().__init__(f"{url}: {problem}" + (f": {text[:300]!r}" if text else ""))
        self.status, self.text = status, text


def retry_after(headers):
    """Seconds that a server asks to wait, given in milliseconds, in seconds or as a date; None if it does not ask.

    >>> retry_after({"retry-after-ms": "250"}), retry_after({"retry-after": "3"}), retry_after({"retry-after": "soon"})
    (0.25, 3.0, None)
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            pass
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


class Endpoint:
    """One URL of an OpenAI-compatible server: keep-alive connections that threads share, retries, and counts of both.

    The key is that of the first variable in `keys` that is set. It goes into the header and nowhere else: redirects
    are not followed, and should a server repeat the key, it is cut out of the reply. `timeout` is in seconds, `prices`
    in dollars per million tokens in and out; with `before` spent earlier, no request begins once `max_cost` is reached.
    """

    def __init__(self, url, keys, concurrency=8, tries=6, timeout=600, max_bytes=1 << 20, longest_pause=60,
                 prices=(0, 0), max_cost=0, before=0):
        import requests
        parts, self.url, self.keys = urlsplit(url), public(url), keys
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise SystemExit(f"{self.url.partition('?')[0]}: write http(s)://HOST/v1; the key belongs into {keys[0]}.")
        key = next((os.environ[k].strip() for k in keys if os.environ.get(k)), "")
        if not (key.isascii() and key.isprintable()):
            raise SystemExit(f"The key in {' or '.join(keys)} holds characters that no HTTP header can carry.")
        self.tries, self.timeout, self.max_bytes, self.longest_pause = tries, timeout, max_bytes, longest_pause
        self.counts, self.lock, self.failures, self.halt, self.stopped = Counter(), threading.Lock(), 0, threading.Event(), ""
        self.prices, self.max_cost, self.before = prices, max_cost, before
        self.concurrency, session = concurrency, requests.Session()
        # All that is the same for each request is prepared once: it costs more than the request itself.
        self._settings = session.merge_environment_settings(self.url, {}, True, None, None)  # proxies, certificates
        session.trust_env = False  # ~/.netrc would replace the key
        login = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key and not login else {})}
        self._request = session.prepare_request(requests.Request("POST", self.url, headers=headers, auth=login))
        self._connections = requests.adapters.HTTPAdapter(pool_maxsize=concurrency)
        self._secrets = [s.encode() for s in (key, unquote(parts.password or "")) if s]

    def post(self, payload, read=dict):
        """POST JSON and return `read(reply)`, a function of the JSON object that came back.

        Tried again, as openai-python does: timeouts, connection errors, 408, 409, 429, 5xx; and replies that are no
        JSON object, are too long, or make `read` raise. Raises Fault when the tries are used up or the server
        rejects this request, SystemExit when it would reject every other one too, or too many in a row have failed.
        """
        import requests
        for attempt in range(self.tries):
            if self.stopped:
                raise SystemExit(self.stopped)
            if self.max_cost and self.cost() >= self.max_cost:
                self.stop(f"--max-cost {self.max_cost:g} is reached, ${self.cost():.2f} are spent. Give a higher one.")
            self.count({"requests": 1, "retries": int(attempt > 0)})
            status, pause, said = 0, None, ""
            try:
                status, headers, body = self._exchange(payload)
                said, problem = body.decode("utf-8", "replace"), f"status {status}"
                if status == 200:
                    reply = json.loads(body)
                    self.count(usage(reply))
                    result, self.failures = read(reply), 0
                    return result
                self._stop_if_hopeless(status, said)
                if status not in (408, 409, 429) and status < 500:
                    raise Fault(self.url, status, problem, said)
                pause = retry_after(headers)
            except (requests.RequestException, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                problem = f"{'bad reply' if status else 'no reply'} ({type(error).__name__})"
            if attempt + 1 == self.tries or (pause or 0) > 120:
                break
            backoff = min(self.longest_pause, 0.5 * 2 ** attempt) * random.uniform(0.75, 1)
            self.halt.wait(backoff if pause is None else pause)
        with self.lock:
            self.failures += status != 200
        if self.failures > max(10, self.concurrency):
            self.stop(f"{self.url}: {self.failures} requests in a row failed, the last with: {problem}. Is the server up?")
        raise Fault(self.url, status, f"{problem}, tried {attempt + 1} times", said)

    def stop(self, message):
        """End this and every other request of the endpoint with SystemExit(message)."""
        self.stopped = self.stopped or message + " What came back so far is kept; run the same command again to go on."
        self.halt.set()
        raise SystemExit(self.stopped)

    def price(self, used):
        """Dollars for the tokens of a `usage`."""
        return (used["prompt_tokens"] * self.prices[0] + used["completion_tokens"] * self.prices[1]) / 1e6

    def cost(self):
        """Dollars spent before and since."""
        return self.before + self.price(self.counts)

    def count(self, numbers):
        """Add to the counts."""
        with self.lock:
            self.counts.update(numbers)

    def _exchange(self, payload):
        deadline, body = time.monotonic() + self.timeout, bytearray()
        request = self._request.copy()
        request.prepare_body(json.dumps(payload).encode(), None)
        with self._connections.send(request, timeout=self.timeout, **self._settings) as reply:
            for piece in reply.iter_content(1 << 16):
                body += piece
                if len(body) > self.max_bytes or time.monotonic() > deadline:
                    raise ValueError("the reply is too long or too slow")
        for secret in self._secrets:
            body = body.replace(secret, b"[key]")
        return reply.status_code, reply.headers, bytes(body)

    def _stop_if_hopeless(self, status, said):
        remedies = {401: f"Set {' or '.join(self.keys)} to a key that it accepts.", 402: "Is the account paid up?",
                    404: "Check the model's name, and that the URL ends before /chat/completions or /completions.",
                    405: "Check the URL.", 429: "The account's quota is used up, so waiting does not help: top it up."}
        remedies[403] = remedies[401]
        if 300 <= status < 400 or (status in remedies and (status != 429 or "insufficient_quota" in said)
                                   and (status != 403 or not self.counts["prompt_tokens"])):  # 403: also moderation
            self.stop(f"{self.url}: status {status}: {said[:300]!r}. {remedies.get(status, 'Give the URL it leads to.')}")


class Chat:
    """A chat model that gives verdicts, each with a JSON schema or, where the server rejects that, in plain text.

    Valid ones go to the file `cache`, under the hash of all that determines them, and are never paid for twice.
    """

    def __init__(self, url, model, keys, concurrency=8, cache=None, **http):
        self.model, self.cache = model, Cache(cache)
        self.endpoint = Endpoint(url.rstrip("/") + "/chat/completions", keys, concurrency, **http,
                                 before=sum(r["cost"] for r in self.cache.records.values()))
        self.structured = None  # whether the server takes a JSON schema; not known yet

    def body(self, content, schema=None):
        """The JSON that is sent."""
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        return {**body, "response_format": {"type": "json_schema", "json_schema": {
            "name": "verdict", "strict": True, "schema": schema}}} if schema else body

    def verdict(self, contents, schema, parse, judge, question):
        """(answer, what came of it: "asked", "from cache", "refusals", "unparsed" or "failed"); None if there is none.

        contents: the message for a reply in plain text, and for one by the schema. parse: (text, structured) -> an
        answer or None. judge, question: names that go into the cache.
        """
        bodies = [self.body(contents[0]), self.body(contents[1], schema)]
        ids = [digest(json.dumps([self.endpoint.url, question, body], sort_keys=True)) for body in bodies]
        kept = self.cache.get(ids[True]) or self.cache.get(ids[False])
        if kept:
            return kept["answer"], "from cache"
        for structured in (True, False) if self.structured is not False else (False,):
            try:
                answer, text, used = self.endpoint.post(
                    bodies[structured], lambda reply: _read_reply(reply, lambda text: parse(text, structured)))
            except Fault as fault:
                if fault.status >= 400 and re.search("content_filter|content_policy", fault.text):
                    return None, "refusals"
                if structured and (fault.status in (400, 422) and not self.structured
                                   or fault.status >= 400 and re.search("response_format|json_schema", fault.text)):
                    continue
                return None, "unparsed" if fault.status == 200 else "failed"
            if answer is None:
                return None, "refusals"
            self.structured = structured
            return self.cache.put({"id": ids[structured], "judge": judge, "answer": answer, "reply": text,
                                   "cost": self.endpoint.price(used)})["answer"], "asked"

    def bill(self):
        """Retries, tokens and dollars so far (dollars with those of the cache)."""
        counts = self.endpoint.counts
        return {"retries": counts["retries"], "tokens in": counts["prompt_tokens"], "tokens out": counts["completion_tokens"],
                "dollars": round(self.endpoint.cost(), 4)}


def _read_reply(reply, parse):
    """(answer, text, tokens) of a reply; the answer is None if the model refused. Raises ValueError without a verdict."""
    choice = reply["choices"][0]
    message, used = choice["message"], usage(reply)
    if choice.get("finish_reason") == "content_filter" or message.get("refusal"):
        return None, "", used
    answer = parse(message["content"])
    if answer is None or choice.get("finish_reason") == "length":
        raise ValueError("no valid verdict")
    return answer, message["content"], used


def usage(reply):
    """Tokens that a reply was charged for, `{"prompt_tokens": int, "completion_tokens": int}`; 0 where not told."""
    told = reply.get("usage") or {}
    return {k: told[k] if isinstance(told.get(k), int) else 0 for k in ("prompt_tokens", "completion_tokens")}


def in_parallel(function, items, concurrency, title, unit, note=lambda: ""):
    """Yield `function(item)` for each item, in order, with a progress bar; raises what the function raises."""
    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = [pool.submit(function, item) for item in items]
        for future in (bar := tqdm(futures, desc=title, unit=unit, disable=None)):
            yield future.result()
            bar.set_postfix_str(note(), refresh=False)
    finally:
        pool.shutdown(cancel_futures=True)


def add_judge_flags(p):
    """Flags of whatever judges."""
    p.add_argument("--judge", default="rules", help="`rules` (toy world), `rules:FILE`, `local:PATH` (a chat model in this "
                   "process), or a chat endpoint https://HOST/v1, whose key is in JUDGE_API_KEY or OPENAI_API_KEY")
    p.add_argument("--judge-model", help="model name to send to the endpoint")
    p.add_argument("--judge-concurrency", type=int, default=8, help="questions in flight at once; local: batch size")
    p.add_argument("--judge-cache", help="file of paid verdicts, shared by processes; default: judge_cache.jsonl beside --out")
    p.add_argument("--judge-price-in", type=float, default=0, help="dollars per million tokens sent")
    p.add_argument("--judge-price-out", type=float, default=0, help="dollars per million tokens received")
    p.add_argument("--max-cost", type=float, default=0, help="stop when the cache's verdicts have cost that many dollars; "
                   "questions in flight may exceed it; 0 = no limit")


class Cache:
    """Append-only JSON lines `{"id", ...}` that threads and processes share: what it holds is never paid for twice.

    A record is one write under a file lock, so a kill can tear no line but the last, and the next writer cuts that off.
    Lines that are no records are passed over. Without a path the cache lives in memory.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "cache.jsonl"
    >>> mine, other = Cache(path), Cache(path)
    >>> _ = path.write_text('{"id": "a", "answer": 1}\\n{"id": "b", "ans')
    >>> mine.put({"id": "c", "answer": 3}), mine.put({"id": "a", "answer": 2})  # the first answer stays
    ({'id': 'c', 'answer': 3}, {'id': 'a', 'answer': 1})
    >>> other.get("c"), other.get("b"), path.read_text().count("\\n")
    ({'id': 'c', 'answer': 3}, None, 2)
    """

    def __init__(self, path=None):
        self.path, self.records, self.offset, self.lock, self.file = path, {}, 0, threading.Lock(), None
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab+", buffering=0)
            self.get("")

    def get(self, id):
        """The record of that id, or None; what other processes have written since is seen."""
        with self.lock:
            if self.file and id not in self.records:
                self._read()
            return self.records.get(id)

    def put(self, record):
        """Add a record, unless its id is there already; returns the one that is kept."""
        with self.lock:
            if self.file:
                fcntl.flock(self.file, fcntl.LOCK_EX)  # let go by the kernel if this process dies
                try:
                    if self._read():
                        self.file.truncate(self.offset)
                    line = (json.dumps(record) + "\n").encode()  # ASCII: a reply may hold half a surrogate pair
                    if record["id"] not in self.records and self.file.write(line) != len(line):
                        raise OSError(f"{self.path}: a record could not be written whole. Is the disk full?")
                finally:
                    fcntl.flock(self.file, fcntl.LOCK_UN)
            return self.records.setdefault(record["id"], record)

    def _read(self):
        """Take in the whole lines that are new; returns whether a torn one stands behind them."""
        self.file.seek(self.offset)
        new = self.file.readall()
        whole = new.rfind(b"\n") + 1
        for line in new[:whole].splitlines():
            try:
                record = json.loads(line)
                self.records.setdefault(record["id"], record)
            except (ValueError, KeyError, TypeError):
                continue
        self.offset += whole
        return whole < len(new)
