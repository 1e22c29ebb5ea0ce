"""Requests to OpenAI-compatible servers: retries, limits, and keys that nothing shows.

Nothing here knows what is asked: judges and samplers give a payload and a function that reads the
reply.
"""
import json
import os
import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from urllib.parse import unquote, urlsplit

from support.errors import InputError, ServiceError
from support.progress import progress_bar

TRANSIENT = (408, 409, 429)  # and all from 500 on: the same request may succeed a moment later
# Kinds of failure, by the names under which they are counted. All but the last are the server's
# word on this very request.
UNUSABLE = "unparsed"  # it replied as it should, but each time with something that means nothing
REFUSED = "refusals"  # a filter of contents turned the request down
REJECTED = "rejected"  # another status from 400 to 499
PASSING = "unanswered"  # anything else: the same request may succeed later
# What reading a reply raises where the server sent something other than was expected.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class UnusableReply(Exception):
    """What `read` raises where a reply is as it should be, but what it says cannot be used."""


class RequestFailed(Exception):
    """A request that failed, of the kind UNUSABLE, REFUSED, REJECTED or PASSING.

    `status` is that of the last reply (0 if none came), `text` is what that reply said.
    """

    def __init__(self, url, kind, status, problem, text=""):
        message = f"{url}: {problem}"
        if text:
            message += f": {text[:300]!r}"
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.text = text


class _AttemptFailed(Exception):
    """An attempt that failed; `pause` is how many seconds the server asked to wait, if it did."""

    def __init__(self, kind, status, problem, text="", pause=None):
        super().__init__(problem)
        self.kind = kind
        self.status = status
        self.problem = problem
        self.text = text
        self.pause = pause


class Endpoint:
    """One URL of an OpenAI-compatible server: connections that threads share, retries, and counts.

    The key is taken from the first environment variable of `keys` that is set. It goes into the
    header and nowhere else: redirects are not followed, and if a server repeats the key, it is cut
    out of the reply. A user and password in the URL are sent in its place and not shown either.

    `timeout` is for one attempt, from connecting to the last byte, `patience` for all of a request,
    `longest_pause` for the pause between two, whatever the server asks for; all are in seconds.
    `prices` are in dollars per million tokens (in, out). With `spent_before` dollars spent earlier,
    no request is sent once `max_cost` is reached (0: no limit). Raises InputError for a URL or a
    key that cannot be used.
    """

    def __init__(
        self,
        url,
        keys,
        concurrency=8,
        tries=6,
        timeout=600,
        patience=1200,
        max_bytes=1 << 20,
        longest_pause=120,
        prices=(0, 0),
        max_cost=0,
        spent_before=0,
    ):
        self.url = without_password(url)
        self.keys = keys
        self.concurrency = concurrency
        self.tries = tries
        self.timeout = timeout
        self.patience = patience
        self.max_bytes = max_bytes
        self.longest_pause = longest_pause
        self.prices = prices
        self.max_cost = max_cost
        self.spent_before = spent_before

        self.counts = Counter()  # requests, retries, prompt_tokens, completion_tokens
        self.failures = 0  # in a row
        self.lock = threading.Lock()
        self.stop_message = ""  # once set, every request ends with it
        self.stopping = threading.Event()  # wakes the threads that pause before a retry
        self._prepare(urlsplit(url))

    def _prepare(self, parts):
        """Build once what all requests share: building it anew costs more than a request."""
        import requests

        from support.deadline import DeadlineAdapter

        self._check_url(parts)
        key = self._read_key()
        password = unquote(parts.password or "")
        headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
        login = None
        if parts.username:
            login = (unquote(parts.username), password)
        elif key:
            headers["Authorization"] = f"Bearer {key}"
        self._secrets = [secret.encode() for secret in (key, password) if secret]

        session = requests.Session()
        # Proxies and certificates come from the environment, but a ~/.netrc would replace the key.
        self._settings = session.merge_environment_settings(self.url, {}, True, None, None)
        session.trust_env = False
        request = requests.Request("POST", self.url, headers=headers, auth=login)
        self._request = session.prepare_request(request)
        # The adapter alone sends: unlike a session it follows no redirect, and so leaks no key.
        self._connections = DeadlineAdapter(pool_maxsize=self.concurrency)

    def _check_url(self, parts):
        known_scheme = parts.scheme in ("http", "https")
        if not known_scheme or not parts.hostname or parts.query:
            shown = self.url.partition("?")[0]  # a query may hold a key
            raise InputError(f"{shown}: write http(s)://HOST/v1; the key goes into {self.keys[0]}.")

    def _read_key(self):
        values = [os.environ[name].strip() for name in self.keys if os.environ.get(name)]
        if not values:
            return ""
        key = values[0]
        if not (key.isascii() and key.isprintable()):
            names = " or ".join(self.keys)
            raise InputError(f"The key in {names} holds characters that no HTTP header can carry.")
        return key

    def post(self, payload, read=dict, control=None):
        """POST a JSON payload and return `read(reply)` of the JSON object that came back.

        Tried again, as openai-python does: timeouts, connection errors, 408, 409, 429, 5xx; and
        replies that are no JSON object, are too long, or make `read` raise. Raises RequestFailed
        when tries or patience are used up or the server rejects this request, and ServiceError when
        it would reject every other one too, too many in a row have failed, or the money is spent.

        control: a harmless payload, sent after a rejection to see where the fault lies. If it is
        rejected as well, RequestFailed is PASSING. If not, the first one is tried again as after
        other failures, and RequestFailed is REJECTED if that is what the server says each time.
        """
        deadline = time.monotonic() + self.patience
        try:
            return self._try(payload, read, deadline)
        except RequestFailed as failure:
            if failure.kind != REJECTED or control is None:
                raise
        try:
            self._try(control, dict, deadline)
        except RequestFailed as failure:
            failure.kind = PASSING
            raise
        return self._try(payload, read, deadline, insist=True)

    def _try(self, payload, read, deadline, insist=False):
        """Post until it succeeds, see `post`; to insist is to try again what was rejected, too."""
        kinds = set()
        for attempt in range(1, self.tries + 1):
            self._check_allowed()
            self._count({"requests": 1, "retries": int(attempt > 1)})
            try:
                result = self._attempt(payload, read, deadline)
            except _AttemptFailed as error:
                failed = error
            else:
                self.failures = 0
                return result
            kinds.add(failed.kind)
            final = failed.kind == REFUSED or (failed.kind == REJECTED and not insist)
            pause = self._pause(attempt, failed.pause)
            if final or attempt == self.tries or time.monotonic() + pause >= deadline:
                break
            self.stopping.wait(pause)
        # Where it is tried again, the server's word on this request is what it says each time.
        kind = failed.kind if final or len(kinds) == 1 else PASSING
        self._stop_if_all_fail(kind, failed)
        problem = failed.problem
        if attempt > 1:
            problem += f", tried {attempt} times"
        raise RequestFailed(self.url, kind, failed.status, problem, failed.text)

    def stop(self, message):
        """End this and every other request of the endpoint with ServiceError(message)."""
        if not self.stop_message:
            what_now = "What came back so far is kept; run the same command again to continue."
            self.stop_message = f"{message} {what_now}"
        self.stopping.set()
        raise ServiceError(self.stop_message)

    def price(self, used):
        """Dollars for the tokens of a `token_usage`."""
        price_in, price_out = self.prices
        total = used["prompt_tokens"] * price_in + used["completion_tokens"] * price_out
        return total / 1e6

    def cost(self):
        """Dollars spent before and since."""
        return self.spent_before + self.price(self.counts)

    def _count(self, numbers):
        with self.lock:
            self.counts.update(numbers)

    def _check_allowed(self):
        """Raise ServiceError where no request may be sent any longer."""
        if self.stop_message:
            raise ServiceError(self.stop_message)
        if self.max_cost and self.cost() >= self.max_cost:
            self.stop(
                f"--max-cost {self.max_cost:g} is reached, ${self.cost():.2f} are spent. "
                "Give a higher one."
            )

    def _attempt(self, payload, read, deadline):
        """Send one request, to be answered before the deadline; raises _AttemptFailed."""
        from support.deadline import NO_REPLY

        timeout = min(self.timeout, max(deadline - time.monotonic(), 0.001))
        try:
            status, headers, body = self._exchange(payload, timeout)
        except NO_REPLY as error:
            problem = f"no reply ({type(error).__name__})"
            raise _AttemptFailed(PASSING, 0, problem) from None
        text = body.decode("utf-8", "replace")
        if status != 200:
            self._reject(status, headers, text)
        try:
            reply = json.loads(body)
            self._count(token_usage(reply))  # charged for, whether it can be used or not
            return read(reply)
        except UnusableReply as error:
            raise _AttemptFailed(UNUSABLE, status, f"unusable reply ({error})", text) from None
        except UNREADABLE as error:
            problem = f"bad reply ({type(error).__name__})"
            raise _AttemptFailed(PASSING, status, problem, text) from None

    def _exchange(self, payload, timeout):
        """Send a payload and read the reply: (status, headers, body without any secret)."""
        from support.deadline import read_body, whole_timeout

        request = self._request.copy()
        request.prepare_body(json.dumps(payload).encode(), None)
        timeout = whole_timeout(timeout)
        with self._connections.send(request, timeout=timeout, **self._settings) as reply:
            body = read_body(reply, self.max_bytes)
        # Error messages repeat keys. Nothing else sees the body before they are gone.
        for secret in self._secrets:
            body = body.replace(secret, b"[key]")
        return reply.status_code, reply.headers, bytes(body)

    def _reject(self, status, headers, text):
        """Raise the error of a status other than 200; it ends the attempt, the request, or all."""
        remedy = self._remedy(status, text)
        if remedy:
            self.stop(f"{self.url}: status {status}: {text[:300]!r}. {remedy}")
        kind = PASSING
        if 400 <= status < 500 and status not in TRANSIENT:
            filtered = re.search("content_filter|content_policy", text)
            kind = REFUSED if filtered else REJECTED
        raise _AttemptFailed(kind, status, f"status {status}", text, retry_after(headers))

    def _remedy(self, status, text):
        """What the user must do where every other request would be rejected too, else None."""
        if 300 <= status < 400:
            return "Give the URL it leads to."
        if status == 403 and self.counts["prompt_tokens"]:
            return None  # the key has been accepted before, so this is moderation of one text
        if status in (401, 403):
            return f"Set {' or '.join(self.keys)} to a key that it accepts."
        if status == 402:
            return "Is the account paid up?"
        if status == 404:
            return (
                "Check the model's name, "
                "and that the URL ends before /chat/completions or /completions."
            )
        if status == 405:
            return "Check the URL."
        if status == 429 and "insufficient_quota" in text:
            return "The account's quota is used up, so waiting does not help: top it up."
        return None

    def _pause(self, attempt, seconds):
        """Seconds to wait before the next attempt: what the server asks, else more each time."""
        if seconds is not None:
            return min(self.longest_pause, seconds)
        backoff = min(self.longest_pause, 0.5 * 2 ** (attempt - 1))
        # A random part, so that threads that failed together do not come back together.
        return backoff * random.uniform(0.75, 1)

    def _stop_if_all_fail(self, kind, failed):
        """Count a failed request, and stop if too many of all threads have failed in a row."""
        if kind in (UNUSABLE, REFUSED):
            return  # an answer, if a useless one: the server is up
        with self.lock:
            self.failures += 1
        # A judge's first questions may be rejected in one form, with a control each, and be taken
        # in another form.
        if self.failures > max(10, 2 * self.concurrency):
            said = f": {failed.text[:300]!r}" if failed.text else ""
            remedy = "Is the server up?"
            if kind == REJECTED:
                remedy = "Is it set up for such requests?"
            self.stop(
                f"{self.url}: {self.failures} requests in a row failed, "
                f"the last with: {failed.problem}{said}. {remedy}"
            )


def retry_after(headers):
    """Seconds that a server asks to wait (it may say so in ms, in seconds or as a date), else None.

    >>> retry_after({"retry-after-ms": "250"}), retry_after({"retry-after": "3"})
    (0.25, 3.0)
    >>> retry_after({"retry-after": "soon"})
    """
    for name, units in (("retry-after-ms", 1000), ("retry-after", 1)):  # units in a second
        try:
            return max(0.0, float(headers[name]) / units)
        except (KeyError, ValueError):
            pass
    try:
        date = parsedate_to_datetime(headers["retry-after"])
        return max(0.0, date.timestamp() - time.time())
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def token_usage(reply):
    """Tokens that a reply was charged for: `{"prompt_tokens": int, "completion_tokens": int}`.

    >>> token_usage({"usage": {"prompt_tokens": 7}})  # what is not reported is 0
    {'prompt_tokens': 7, 'completion_tokens': 0}
    """
    reported = reply.get("usage") or {}
    used = {}
    for kind in ("prompt_tokens", "completion_tokens"):
        number = reported.get(kind)
        used[kind] = number if isinstance(number, int) else 0
    return used


def without_password(url):
    """A URL as it may be shown: without user and password.

    >>> without_password("https://me:sesame@host/v1")
    'https://host/v1'
    """
    return re.sub(r"(?<=://)[^/\s]*@", "", url)


def in_parallel(function, items, concurrency, title, unit, note=None):
    """Yield `function(item)` for each item, in order, with a progress bar; raises what it raises.

    `note()` is the text behind the bar. When the caller stops early, calls that have not started
    are dropped.
    """
    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = [pool.submit(function, item) for item in items]
        progress = progress_bar(futures, desc=title, unit=unit)
        for future in progress:
            yield future.result()
            if note:
                progress.set_postfix_str(note(), refresh=False)
    finally:
        pool.shutdown(cancel_futures=True)
