"""Sampling from a server: the other side of the seam whose first is `model.LocalSampler`."""
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

import model as lm_code
from extras import client


class ServerSampler:
    """Samples from an OpenAI-compatible `/v1/completions` server, all samples of one prefix in one request.

    Token ids are sent and the ids that come back are kept, so that a prefix is continued exactly. To a server that
    takes no ids the text is sent, with `add_special_tokens` off or, where that is unknown, as it is. Before anything
    else a short probe finds the form that the server takes and checks how many prompt tokens it counted.
    """
    FORMS = ("ids", "text", "plain")

    def __init__(self, path, url, *, temperature, top_p, max_new_tokens, seed, concurrency=16, **http):
        self.tokenizer, self.concurrency, self.form = lm_code.load_tokenizer(path), concurrency, None
        self.endpoint = client.Endpoint(url.rstrip("/") + "/completions", ("SERVER_API_KEY",), concurrency,
                                      **{"timeout": 3600, "max_bytes": 1 << 28, **http})
        self.payload = dict(model=str(path), temperature=temperature, top_p=top_p)
        self.seed, self.max_new_tokens = seed, max_new_tokens
        self.eos, self.context = lm_code.eos_ids(path, self.tokenizer), lm_code.context_length(path)

    def __call__(self, requests, done=(), title="sampling"):
        """Yield a Completion for each request that is not in `done`, as they come; raises SystemExit if a request fails."""
        groups = {}
        for r in requests:
            if r.id not in done:
                groups.setdefault(tuple(r.prefix), []).append(r)
        if groups and self.form is None:
            self._probe(next(iter(groups.values())))
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            with tqdm(total=sum(map(len, groups.values())), desc=title, unit="req", disable=None) as bar:
                for future in as_completed([pool.submit(self._complete, group) for group in groups.values()]):
                    for completion in future.result():
                        bar.update()
                        yield completion
        except client.Fault as fault:
            self.endpoint.stop(f"{fault}.")
        finally:
            pool.shutdown(cancel_futures=True)

    def body(self, group, form, limit):
        """The JSON that is sent for requests of one prefix."""
        prefix = list(group[0].prefix)
        body = {**self.payload, "max_tokens": min(limit, self.context - len(prefix)),
                "prompt": prefix if form == "ids" else lm_code.decode(self.tokenizer, prefix)}
        if form != "plain":  # which is only what OpenAI's first API knew; servers fill in top-k and penalties of their own
            body |= {"n": len(group), "seed": int(lm_code.request_uniforms(self.seed, group[0].id, 1).item() * 2 ** 31),
                     "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
        return {**body, **{"ids": {"return_token_ids": True}, "text": {"add_special_tokens": False}}.get(form, {})}

    def _probe(self, group):
        for form in self.FORMS:
            try:
                reply = self.endpoint.post(self.body(group[:2], form, 16), lambda r: _choices(r) and r)
                break
            except client.Fault as fault:
                if fault.status not in (400, 422, 500, 501) or form == self.FORMS[-1]:
                    self.endpoint.stop(f"{fault}. Neither token ids nor text are taken as a prompt.")
        sent, choice, used = self.body(group, form, 16)["prompt"], reply["choices"][0], client.usage(reply)
        expected = len(sent) if form == "ids" else len(self.tokenizer.encode(sent, add_special_tokens=False))
        counted, text = used["prompt_tokens"], choice.get("text") or ""
        where, inside = f"{self.endpoint.url} (prompt sent as {form})", lm_code.OPEN in lm_code.decode(self.tokenizer, group[0].prefix[-8:])
        if counted != expected:
            raise SystemExit(f"{where}: {expected} prompt tokens were sent, the server counted {counted}. " + (
                "It puts a second BOS in front: turn that off (llama.cpp: --override-kv "
                "tokenizer.ggml.add_bos_token=bool:false)." if counted == expected + 1 else
                "It must report usage.prompt_tokens." if not counted else
                "It strips white space from the prompt, or its tokenizer is not that of --model."))
        thinks = lm_code.OPEN in self.tokenizer.get_vocab() and choice.get("token_ids") is None
        lost = used["completion_tokens"] - sum(
            len(self.tokenizer.encode(c.get("text") or "", add_special_tokens=False)) for c in reply["choices"]) > 2 * len(reply["choices"])
        if choice.get("reasoning") or choice.get("reasoning_content") or thinks and lost and (
                not text.strip() or not inside and not text.startswith(lm_code.OPEN)):
            raise SystemExit(f"{where}: the reasoning is missing from the text that came back. A reasoning parser took it "
                             "out: start the server without one (vLLM, SGLang: no --reasoning-parser).")
        self.form = form

    def _complete(self, group):
        done = []
        while group:  # a server may return fewer samples than it was asked for
            part = group[:1] if self.form == "plain" else group
            try:
                choices = self.endpoint.post(self.body(part, self.form, self.max_new_tokens), _choices)
            except client.Fault as fault:
                fault.args = (f"request {group[0].id}: {fault}",)
                raise
            done += map(self._completion, part, choices)
            group = group[min(len(part), len(choices)):]
        return done

    def _completion(self, request, choice):
        ids, stopped = choice.get("token_ids"), choice["finish_reason"] == "stop"
        if ids is None:
            ids = self.tokenizer.encode(choice["text"], add_special_tokens=False)
        if stopped and (not ids or ids[-1] not in self.eos):
            ids = ids + [min(self.eos)]
        return lm_code.Completion(request.id, ids, choice["finish_reason"])


def _choices(reply):
    """The choices of a completion. Raises ValueError where one is no finished generation, so that it is asked again."""
    if not reply["choices"] or not all(c.get("finish_reason") in ("stop", "length") and
                                       isinstance(c.get("text") if c.get("token_ids") is None else c["token_ids"], (str, list))
                                       for c in reply["choices"]):
        raise ValueError("no choices, or unfinished ones")
    return reply["choices"]
