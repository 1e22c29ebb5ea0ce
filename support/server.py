"""Sampling from a server, for models that this process does not hold."""
import hashlib
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed

from support.errors import InputError, ServiceError
from support.http import Endpoint, RequestFailed, token_usage, without_password
from support.progress import progress_bar

REASONING_STARTS = "<think>"  # OPEN in data.py, which nothing in support/ imports
PROBE_TOKENS = 16  # enough to see whether the reasoning comes back


class ServerSampler:
    """Samples from an OpenAI-compatible `/v1/completions` server, one request for each prefix.

    Token ids are sent and the ids that come back are kept, so that a prefix is continued exactly. A
    server that takes no ids gets the text, with `add_special_tokens` off if it knows that field.
    Before anything else a short probe finds the form that each server takes, and checks how many
    prompt tokens it counted and that reasoning comes back.

    `name` is the model's name at the server; `url` may be several, separated by commas, of servers
    that all hold it; `tokenizer`, `eos` (set of ids that end a text) and `context` (its length in
    tokens) are that model's own. `concurrency`: requests in flight at each server.
    `http`: see Endpoint.
    """

    FORMS = ("ids", "text", "plain")  # of a prompt, the most exact first

    def __init__(
        self,
        name,
        url,
        tokenizer,
        eos,
        context,
        *,
        temperature,
        top_p,
        max_new_tokens,
        seed,
        concurrency=64,
        **http,
    ):
        self.name = str(name)
        self.tokenizer = tokenizer
        self.eos = eos
        self.end = closing_token(tokenizer, eos)
        self.context = context
        self.temperature = temperature
        self.top_p = top_p
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.form_of = {}  # endpoint -> one of FORMS, once the probe has found it
        limits = {"timeout": 3600, "patience": 7200, "max_bytes": 1 << 28}
        limits.update(http)
        addresses = [address.strip() for address in url.split(",")]
        if not all(addresses):
            shown = without_password(url)
            raise InputError(f"--server {shown}: an address is missing before or after a comma.")
        self.endpoints = []
        for address in addresses:
            address = address.rstrip("/") + "/completions"
            self.endpoints.append(Endpoint(address, ("SERVER_API_KEY",), concurrency, **limits))
        self.concurrency = concurrency * len(addresses)

    def __call__(self, requests, done=(), parts=None, title="sampling"):
        """Yield (id, ids, finished) for each request (id, prefix) not in `done`, as they come.

        `finished` is "stop", and the ids end with EOS, or "length". Raises ServiceError if a
        request fails, or if the probe finds that the server changes what it is sent.
        """
        groups = {}  # prefix: ids of the requests that continue it
        for request_id, prefix in requests:
            if request_id not in done:
                groups.setdefault(tuple(prefix), []).append(request_id)
        # Neighbours share the most of their prefixes, which a server need not compute again.
        groups = sorted(groups.items())
        if groups and not self.form_of:
            self._probe(*groups[0])
        count = sum(len(request_ids) for _, request_ids in groups)
        work = Shares(groups, self.endpoints)
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = [pool.submit(self._complete_next, work) for _ in groups]
            with progress_bar(total=count, desc=title, unit="req") as progress:
                for future in as_completed(futures):
                    for completion in future.result():
                        progress.update()
                        yield completion
        finally:
            pool.shutdown(cancel_futures=True)

    def _complete_next(self, work):
        """Complete the requests of the next prefix, at the server that has the fewest in flight."""
        endpoint, (prefix, request_ids) = work.take()
        try:
            return self._complete(endpoint, list(prefix), request_ids)
        finally:
            work.give_back(endpoint)

    def payload(self, prefix, request_ids, form, limit):
        """The JSON that is sent for requests of one prefix: at most `limit` new tokens each."""
        payload = {
            "model": self.name,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": min(limit, self.context - len(prefix)),
            "prompt": prefix if form == "ids" else self._decode(prefix),
        }
        if form == "plain":  # only what OpenAI's first API knew, and one sample at a time
            return payload
        payload["n"] = len(request_ids)
        payload["seed"] = request_seed(self.seed, request_ids[0])
        # Servers would fill in a top-k and penalties of their own.
        payload["top_k"] = -1
        payload["min_p"] = 0.0
        payload["repetition_penalty"] = 1.0
        payload["skip_special_tokens"] = False
        if form == "ids":
            payload["return_token_ids"] = True
        else:
            payload["add_special_tokens"] = False
        return payload

    def _complete(self, endpoint, prefix, request_ids):
        """Completions (id, ids, finished) of all requests of one prefix."""
        form = self.form_of[endpoint]
        completions = []
        waiting = request_ids
        while waiting:  # a server may return fewer samples than it was asked for
            payload = self.payload(prefix, waiting, form, self.max_new_tokens)
            try:
                reply = endpoint.post(payload, require_finished)
            except RequestFailed as error:
                endpoint.stop(f"request {waiting[0]}: {error}.")
            for request_id, choice in zip(waiting, reply["choices"]):
                completions.append(self._read_choice(request_id, choice))
            waiting = request_ids[len(completions):]
        return completions

    def _read_choice(self, request_id, choice):
        """The completion (id, ids, finished) of one choice."""
        ids = choice.get("token_ids")
        finished = choice["finish_reason"]
        if ids is None:  # the server gives text only, so these may not be the ids that it sampled
            ids = self._encode(choice["text"])
        # Text comes without EOS, and some servers leave it out of the ids.
        if finished == "stop" and (not ids or ids[-1] not in self.eos):
            ids = ids + [self.end]
        return request_id, ids, finished

    def _encode(self, text):
        # JSON may hold half of a surrogate pair, which no tokenizer takes: U+FFFD in its place.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _decode(self, ids):
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    # ------------------------------------------------------------------------------------ the probe

    def _probe(self, prefix, request_ids):
        """Find the form that each server takes; ServiceError if one changes what it is sent."""
        prefix = list(prefix)
        forms = {}
        for endpoint in self.endpoints:
            form, reply = self._find_form(endpoint, prefix, request_ids[:2])
            where = f"{endpoint.url} (prompt sent as {form})"
            self._check_prompt_tokens(where, prefix, form, reply)
            self._check_reasoning(where, prefix, reply)
            forms[endpoint] = form
        self.form_of = forms

    def _find_form(self, endpoint, prefix, request_ids):
        """The first of FORMS that a server takes, and its reply."""
        for form in self.FORMS:
            payload = self.payload(prefix, request_ids, form, PROBE_TOKENS)
            try:
                return form, endpoint.post(payload, require_finished)
            except RequestFailed as error:
                may_be_the_form = error.status in (400, 422, 500, 501)
                if not may_be_the_form or form == self.FORMS[-1]:
                    endpoint.stop(f"{error}. Neither token ids nor text are taken as a prompt.")

    def _check_prompt_tokens(self, where, prefix, form, reply):
        """Raise ServiceError unless the server has read as many prompt tokens as it was sent."""
        expected = len(prefix)
        if form != "ids":
            expected = len(self._encode(self._decode(prefix)))
        counted = token_usage(reply)["prompt_tokens"]
        if counted == expected:
            return
        if counted == expected + 1:
            remedy = (
                "It puts a second BOS in front: turn that off (llama.cpp: --override-kv "
                "tokenizer.ggml.add_bos_token=bool:false)."
            )
        elif counted == 0:
            remedy = "It must report usage.prompt_tokens."
        else:
            remedy = (
                "It strips white space from the prompt, or its tokenizer is not that of --model."
            )
        raise ServiceError(
            f"{where}: {expected} prompt tokens were sent, the server counted {counted}. {remedy}"
        )

    def _check_reasoning(self, where, prefix, reply):
        """Raise ServiceError if the server takes the reasoning out of the text."""
        choices = reply["choices"]
        first = choices[0]
        taken_out = first.get("reasoning") or first.get("reasoning_content")
        if taken_out or self._reasoning_is_lost(prefix, choices, token_usage(reply)):
            raise ServiceError(
                f"{where}: the reasoning is missing from the text that came back. A reasoning "
                "parser took it out: start the server without one (vLLM, SGLang: no "
                "--reasoning-parser)."
            )

    def _reasoning_is_lost(self, prefix, choices, used):
        """Whether only text came back, shorter than what was generated, and not reasoning."""
        reasons = REASONING_STARTS in self.tokenizer.get_vocab()
        if not reasons or choices[0].get("token_ids") is not None:
            return False
        returned = 0
        for choice in choices:
            returned += len(self._encode(choice.get("text") or ""))
        # Two tokens per choice: EOS, and one more that encoding the text again may save.
        if used["completion_tokens"] - returned <= 2 * len(choices):
            return False
        text = choices[0].get("text") or ""
        prompt_opens_reasoning = REASONING_STARTS in self._decode(prefix[-8:])
        starts_reasoning = prompt_opens_reasoning or text.startswith(REASONING_STARTS)
        return not text.strip() or not starts_reasoning


class Shares:
    """Work for several servers, to each a run of neighbours as its own share.

    So those that share a prefix go to the same server. One that has finished its own share takes
    over from the end of the largest that is left.
    """

    def __init__(self, items, servers):
        self.lock = threading.Lock()
        self.in_flight = {server: 0 for server in servers}
        self.left = {}
        for i, server in enumerate(servers):
            first = i * len(items) // len(servers)
            last = (i + 1) * len(items) // len(servers)
            self.left[server] = deque(items[first:last])

    def take(self):
        """(server, item): the next for the server that has the fewest in flight."""
        with self.lock:
            server = min(self.in_flight, key=self.in_flight.get)
            self.in_flight[server] += 1
            if self.left[server]:
                return server, self.left[server].popleft()
            largest = max(self.left.values(), key=len)
            return server, largest.pop()

    def give_back(self, server):
        """Note that what a server took is done."""
        with self.lock:
            self.in_flight[server] -= 1


def closing_token(tokenizer, eos):
    """The id out of the set `eos` that a model writes where its turn ends.

    It is what the chat template puts after an assistant's turn (<|im_end|> of Qwen3, <|eot_id|> of
    Llama 3), or else the tokenizer's own.
    """
    turn = "REPLY"
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": turn}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    following = text.rpartition(turn)[2]
    for token in tokenizer.encode(following, add_special_tokens=False):
        if token in eos:
            return token
    if tokenizer.eos_token_id in eos:
        return tokenizer.eos_token_id
    return min(eos)


def request_seed(seed, request_id):
    """The seed of one request, below 2 ** 31, from the run's seed and the request's id alone."""
    hashed = hashlib.sha256(f"{seed} {request_id}".encode()).digest()
    return int.from_bytes(hashed[:4], "big") >> 1


def require_finished(reply):
    """The reply, if each of its choices is a finished generation; else ValueError, to ask again."""
    if not reply["choices"]:
        raise ValueError("no choices")
    for choice in reply["choices"]:
        content = choice.get("token_ids")
        if content is None:
            content = choice.get("text")
        finished = choice.get("finish_reason") in ("stop", "length")
        if not finished or not isinstance(content, (str, list)):
            raise ValueError("an unfinished choice")
    return reply
