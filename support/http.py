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

from tqdm import tqdm

from support.errors import InputError, ServiceError

TRANSIENT = (408, 409, 429)  # and all from 500 on: the same request may succeed a moment later
LONGEST_WAIT = 120  # seconds: where a server asks for a longer pause, the request fails instead
# What reading a reply raises where the server sent something other than was expected.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class RequestFailed(Exception):
    """A request that failed for good.

    `status` is that of the last reply (0 if none came), `text` is what that reply said.
    """

    def __init__(self, url, status, problem, text=""):
        message = f"{url}: {problem}"
        if text:
            message += f": {text[:300]!r}"
        super().__init__(message)
        self.status = status
        self.text = text


class _AttemptFailed(Exception):
    """An attempt that may succeed when repeated, after `pause` seconds if the server said so."""

    def __init__(self, status, problem, text="", pause=None):
        super().__init__(problem)
        self.status = status
        self.problem = problem
        self.text = text
        self.pause = pause


class Endpoint:
    """One URL of an OpenAI-compatible server: connections that threads share, retries, and counts.

    The key is taken from the first environment variable of `keys` that is set. It goes into the
    header and nowhere else: redirects are not followed, and if a server repeats the key, it is cut
    out of the reply. A user and password in the URL are sent in its place and not shown either.

    `timeout` and `longest_pause` are in seconds, `prices` in dollars per million tokens (in, out).
    With `spent_before` dollars spent earlier, no request is sent once `max_cost` is reached (0: no
    limit). Raises InputError for a URL or a key that cannot be used.
    """

    def __init__(
        self,
        url,
        keys,
        concurrency=8,
        tries=6,
        timeout=600,
        max_bytes=1 << 20,
        longest_pause=60,
        prices=(0, 0),
        max_cost=0,
        spent_before=0,
    ):
        self.url = without_password(url)
        self.keys = keys
        self.concurrency = concurrency
        self.tries = tries
        self.timeout = timeout
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

        self._check_url(parts)
        key = self._read_key()
        password = unquote(parts.password or "")
        headers = {"Content-Type": "application/json"}
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
        self._connections = requests.adapters.HTTPAdapter(pool_maxsize=self.concurrency)

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

    def post(self, payload, read=dict):
        """POST a JSON payload and return `read(reply)` of the JSON object that came back.

        Tried again, as openai-python does: timeouts, connection errors, 408, 409, 429, 5xx; and
        replies that are no JSON object, are too long, or make `read` raise. Raises RequestFailed
        when the tries are used up or the server rejects this request, and ServiceError when it
        would reject every other one too, too many in a row have failed, or the money is spent.
        """
        for attempt in range(1, self.tries + 1):
            self._check_allowed()
            self._count({"requests": 1, "retries": int(attempt > 1)})
            try:
                result = self._attempt(payload, read)
            except _AttemptFailed as error:
                failed = error
            else:
                self.failures = 0
                return result
            if attempt == self.tries or (failed.pause or 0) > LONGEST_WAIT:
                break
            self._pause(attempt, failed.pause)
        self._stop_if_server_is_down(failed)
        problem = f"{failed.problem}, tried {attempt} times"
        raise RequestFailed(self.url, failed.status, problem, failed.text)

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

    def _attempt(self, payload, read):
        """Send one request; raises _AttemptFailed where another attempt may succeed."""
        import requests

        try:
            status, headers, body = self._exchange(payload)
        except (requests.RequestException, *UNREADABLE) as error:
            raise _AttemptFailed(0, f"no reply ({type(error).__name__})") from None
        text = body.decode("utf-8", "replace")
        if status != 200:
            self._reject(status, headers, text)
        try:
            reply = json.loads(body)
            self._count(token_usage(reply))  # charged for, whether it can be used or not
            return read(reply)
        except UNREADABLE as error:
            raise _AttemptFailed(status, f"bad reply ({type(error).__name__})", text) from None

    def _exchange(self, payload):
        """Send a payload and read the reply: (status, headers, body without any secret)."""
        deadline = time.monotonic() + self.timeout
        request = self._request.copy()
        request.prepare_body(json.dumps(payload).encode(), None)
        body = bytearray()
        with self._connections.send(request, timeout=self.timeout, **self._settings) as reply:
            for piece in reply.iter_content(1 << 16):
                body += piece
                # The `timeout` above is for one piece, and a reply may have no end.
                if len(body) > self.max_bytes or time.monotonic() > deadline:
                    raise ValueError("the reply is too long or too slow")
        # Error messages repeat keys. Nothing else sees the body before they are gone.
        for secret in self._secrets:
            body = body.replace(secret, b"[key]")
        return reply.status_code, reply.headers, bytes(body)

    def _reject(self, status, headers, text):
        """Raise the error of a status other than 200; it ends the attempt, the request, or all."""
        remedy = self._remedy(status, text)
        if remedy:
            self.stop(f"{self.url}: status {status}: {text[:300]!r}. {remedy}")
        if status in TRANSIENT or status >= 500:
            raise _AttemptFailed(status, f"status {status}", text, retry_after(headers))
        raise RequestFailed(self.url, status, f"status {status}", text)

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
        """Wait before the next attempt: as long as the server asked, else longer each time."""
        if seconds is None:
            backoff = min(self.longest_pause, 0.5 * 2 ** (attempt - 1))
            # A random part, so that threads that failed together do not come back together.
            seconds = backoff * random.uniform(0.75, 1)
        self.stopping.wait(seconds)

    def _stop_if_server_is_down(self, failed):
        if failed.status != 200:  # a reply that cannot be read still shows that the server is up
            with self.lock:
                self.failures += 1
        if self.failures > max(10, self.concurrency):
            self.stop(
                f"{self.url}: {self.failures} requests in a row failed, "
                f"the last with: {failed.problem}. Is the server up?"
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
        progress = tqdm(futures, desc=title, unit=unit, disable=None)
        for future in progress:
            yield future.result()
            if note:
                progress.set_postfix_str(note(), refresh=False)
    finally:
        pool.shutdown(cancel_futures=True)
