"""The language model: loading, prompts and think tags, sampling, log-probabilities, saving.

Any Hugging Face causal language model works whose decoder follows the Llama layout (Llama, Qwen2, Qwen3, ...);
there is no line per model. Weights come and go as safetensors only.

Left out on purpose: beam search, repetition penalties, top-k (the paper samples at temperature 0.6, top-p 0.95).
"""
import functools
import hashlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm


OPEN, CLOSE = "<think>", "</think>"


# ------------------------------------------------------------------------------------------------ loading, saving

def pick_device(name="auto"):
    """`auto` is the first CUDA GPU where there is one, else the CPU (Apple's `mps` only by name: it is untested here).

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name, device):
    """`auto` is bfloat16 on a GPU and float32 elsewhere; other names are torch's own."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def round_trips(tokenizer):
    """Whether text survives encoding and decoding. Releases of transformers 5 lose the spaces of R1-Distill-Llama."""
    texts = ("hello world", " Wait,  two  spaces\n\n\tand a tab \n", "naïve façade: «où?»", "漢字かな。 한국어")
    return all(decode(tokenizer, tokenizer.encode(t, add_special_tokens=False)) == t for t in texts)


def load_tokenizer(path):
    """Load the model's own fast tokenizer, or the plain form of its tokenizer.json where its class spoils text.

    Raises SystemExit when there is none, when neither keeps text as it is, or when there is no chat template.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.is_fast:
        raise SystemExit(f"{path}: needs a fast tokenizer (tokenizer.json).")
    if not round_trips(tokenizer):
        print(f"{path}: {type(tokenizer).__name__} does not give text back as it was; using PreTrainedTokenizerFast")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        if not round_trips(tokenizer):
            raise SystemExit(f"{path}: its tokenizer loses spaces or characters (decode(encode(text)) != text), so no "
                             "trace could be continued exactly. Try another version of transformers.")
    if not tokenizer.chat_template:
        raise SystemExit(f"{path}: the tokenizer has no chat template, so prompts can't be rendered. "
                         "Add a chat_template.jinja to the model directory.")
    return tokenizer


def load_model(path, device, dtype=torch.float32, attn="sdpa"):
    """Load a causal language model from a directory or the hub, weights from safetensors only, in eval mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()  # a bar for every shard drowns the stage's own
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, attn_implementation=attn)
    return model.to(device).eval()


def stored_dtype(path):
    """The dtype in which a checkpoint's weights are stored; trained weights are saved in the same."""
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(path).dtype or torch.float32


def eos_ids(path, tokenizer):
    """The set of token ids that end a generation: the generation config's, else the tokenizer's."""
    from transformers import GenerationConfig
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # some models ship none
        ids = None
    ids = tokenizer.eos_token_id if ids is None else ids
    return set(ids if isinstance(ids, (list, tuple)) else [ids])


def context_length(path):
    """How many tokens a model can attend to, prompt and completion together."""
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(path).max_position_embeddings


# ------------------------------------------------------------------------------------------ prompts and think tags

def render_prompt(tokenizer, prompt):
    """Token ids of one user turn up to the place where the model starts to write, by the model's own chat template.

    No system prompt. R1-Distill templates end with `<think>\\n`, so the model's output begins inside the reasoning;
    Qwen3's end before it, and the model opens the tag itself.
    """
    return list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                              tokenize=True, return_dict=False))


class Trace(NamedTuple):
    """A generation taken apart; the first four joined give its text back exactly. `response` is "" if truncated."""
    opening: str    # "<think>\n" where the model wrote it, else ""
    reasoning: str  # z of the paper
    closing: str    # "</think>" and the white space after it
    response: str   # y of the paper
    truncated: bool  # no </think>: the reasoning never ended, so there is no response to judge


def split_reasoning(text):
    """Split a generation once, at the first `</think>`.

    >>> split_reasoning("<think>\\nIs it safe? Yes.\\n</think>\\n\\nDone.")
    Trace(opening='<think>\\n', reasoning='Is it safe? Yes.\\n', closing='</think>\\n\\n', response='Done.', truncated=False)
    >>> split_reasoning("It goes on and")
    Trace(opening='', reasoning='It goes on and', closing='', response='', truncated=True)
    """
    body = text.lstrip()
    opening = ""
    if body.startswith(OPEN):
        body = body[len(OPEN):].lstrip("\n")
        opening, body = text[:len(text) - len(body)], body
    else:
        body = text
    reasoning, tag, rest = body.partition(CLOSE)
    response = rest.lstrip()
    return Trace(opening, reasoning, tag + rest[:len(rest) - len(response)], response, not tag)


def decode(tokenizer, ids, eos=()):
    """Text of generated ids, without the end-of-sequence token and with nothing else cleaned up or skipped."""
    ids = ids[:-1] if ids and ids[-1] in eos else ids
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_index(tokenizer, ids, char):
    """How many of `ids` lie wholly before character `char` of their decoded text.

    This maps a sentence to its token without encoding anything again: sampled ids need not be the canonical
    tokenisation of their text. Where a token straddles `char` it is not counted, so `decode(ids[:i])` is always
    a prefix of the text and at most `char` long.
    """
    text = decode(tokenizer, ids)
    low, high = 0, len(ids)
    while low < high:  # the decoded length grows with the ids, but for a few broken characters, put right below
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(decode(tokenizer, ids[:middle])) <= char else (low, middle - 1)
    for i in range(min(low + 4, len(ids)), -1, -1):
        head = decode(tokenizer, ids[:i])
        if len(head) <= char and text.startswith(head):
            return i
    return 0


# ------------------------------------------------------------------------------------------------------- sampling

class Request(NamedTuple):
    """One generation to make. `id` names it and seeds its own random generator."""
    id: str
    prefix: list  # token ids: prompt, or prompt + z[:h] + trigger


class Completion(NamedTuple):
    """What the model wrote after a prefix. `ids` end with EOS unless `finished` is "length"."""
    id: str
    ids: list
    finished: str  # "stop" or "length"


class SlotCache:
    """Keys and values of the active rows, one slot a row, left-aligned, so that rows of any length share a batch.

    transformers calls `update` from every attention layer with one new token a row: it is written at the row's own
    length, and the slots up to the longest row are handed to attention (a mask hides what lies beyond each row).
    """

    def __init__(self, rows):
        self.rows, self.keys, self.values = rows, {}, {}
        self.lengths = torch.zeros(rows, dtype=torch.long)  # tokens held by each slot, on the CPU

    def put(self, slot, layers, length):
        """Copy the `length` positions of a prefilled cache of one row into a slot."""
        self.lengths[slot] = length
        for i, layer in enumerate(layers):
            for store, new in ((self.keys, layer.keys), (self.values, layer.values)):
                self._reserve(store, i, new, length)
                store[i][slot, :, :length] = new[0]

    def _reserve(self, store, i, like, length):
        held = store[i].shape[2] if i in store else 0
        if held < length:
            grown = like.new_zeros(self.rows, like.shape[1], max(length + 64, held * 3 // 2), like.shape[3])
            if held:
                grown[:, :, :held] = store[i]
            store[i] = grown

    def move(self, source, target):
        """Copy one slot over another: how the last active row takes a finished row's place."""
        self.lengths[target] = self.lengths[source]
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[target] = tensor[source]

    def begin_step(self, active):
        """Make room for one more token in the first `active` slots."""
        self.active, self.span = active, int(self.lengths[:active].max()) + 1
        device = next(iter(self.keys.values())).device
        self.rows_index = torch.arange(active, device=device)
        self.positions = self.lengths[:active].to(device)
        self.mask = (torch.arange(self.span, device=device) <= self.positions[:, None])[:, None, None]  # (B,1,1,span)
        for store in (self.keys, self.values):
            for i in store:
                self._reserve(store, i, store[i], self.span)

    def update(self, keys, values, layer, *_, **__):
        """(active, heads, 1, d) of the new token -> (active, heads, span, d) of all tokens so far."""
        out = []
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store[self.rows_index, :, self.positions] = new[:, :, 0]
            out.append(store[:self.active, :, :self.span])
        return tuple(out)

    def end_step(self):
        self.lengths[:self.active] += 1


def next_token(logits, temperature, top_p, uniform):
    """Choose one token a row by inverting the cumulative distribution at the row's own uniform number.

    logits (B, V); uniform float (B,) in [0, 1); returns long (B,). Temperature 0 is the arg max. Top-p keeps the
    most probable tokens up to and including the one that reaches `top_p`.

    >>> logits = torch.tensor([[0.0, 1.0, 2.0]]).log_softmax(-1)
    >>> [next_token(logits, 1.0, 0.9, torch.tensor([u])).item() for u in (0.1, 0.7, 0.99)]  # p = .09 .24 .67
    [2, 2, 1]
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    for k in (64, logits.shape[-1]):  # the nucleus is nearly always among the first few: sort the rest only if not
        p, order = probabilities.topk(min(k, logits.shape[-1]))
        if (p.sum(-1) >= top_p).all():
            break
    p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)
    cdf = p.cumsum(-1)
    chosen = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1)  # the first token whose cdf exceeds u * total
    chosen = torch.minimum(chosen, (p > 0).sum(-1) - 1)  # rounding must not reach past the last kept token
    return order.gather(-1, chosen[:, None])[:, 0]


def request_uniforms(seed, id, n):
    """The n uniform numbers of one request. They depend on the seed and the request's id alone, so neither a
    restart nor another order of the requests changes what is drawn."""
    digest = hashlib.sha256(f"{seed} {id}".encode()).digest()
    return torch.rand(n, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))


@dataclass
class _Row:
    request: Request
    uniforms: list
    ids: list = field(default_factory=list)


@torch.no_grad()
def sample(model, requests, *, eos, max_new_tokens, temperature=0.6, top_p=0.95, seed=0, batch_size=16, done=(),
           title="sampling"):
    """Sample one completion for each request and yield it as soon as it is finished.

    Batched decoding with a KV cache: finished rows leave at once and waiting ones take their slots. Requests are
    sorted by prefix, and each prefix is computed from where it parts from the one before: once for all continuations
    of it, and but for a few tokens for other triggers or later sentences of one rollout. Requests are handled in waves
    of `4 * batch_size`; a wave whose ids are all in `done` is skipped, and any other is sampled whole, so that a
    restarted run has the same batches, hence the same rounding, and gives bit for bit what an undisturbed run gives.

    requests: list of Request. eos: set of ids that end a row. A row also ends after `max_new_tokens`, or where the
    model's context is full. Raises ValueError for a prefix that leaves no room in the context: callers drop those.
    """
    if model.config._attn_implementation != "sdpa":
        raise ValueError("the sampler needs attn_implementation='sdpa': other kernels misread its per-row mask")
    context = model.config.max_position_embeddings
    for r in requests:
        if len(r.prefix) >= context:
            raise ValueError(f"request {r.id}: prefix of {len(r.prefix)} tokens fills the context of {context}. "
                             "Drop it and count it.")
    requests = sorted(requests, key=lambda r: (r.prefix, r.id))
    tokens, start = 0, time.monotonic()
    with tqdm(total=len(requests), desc=title, unit="req", disable=None) as bar:
        for i in range(0, len(requests), 4 * batch_size):
            wave = requests[i:i + 4 * batch_size]
            if all(r.id in done for r in wave):
                bar.update(len(wave))
                continue
            for completion in _sample_wave(model, wave, eos, max_new_tokens, temperature, top_p, seed, batch_size):
                tokens += len(completion.ids)
                bar.update()
                bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s", refresh=False)
                yield completion


def _sample_wave(model, wave, eos, max_new_tokens, temperature, top_p, seed, batch_size):
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    limit = model.config.max_position_embeddings
    waiting, rows, prefill = deque(wave), [], Prefill(decoder)
    cache = SlotCache(min(batch_size, len(wave)))

    def extend(group, hidden):  # hidden (len(group), H) of the last token: choose the next one
        uniforms = torch.tensor([row.uniforms[len(row.ids)] for row in group], device=hidden.device)
        for row, token in zip(group, next_token(head(hidden), temperature, top_p, uniforms).tolist()):
            row.ids.append(token)

    while waiting or rows:
        fresh = [_Row(r, request_uniforms(seed, r.id, max_new_tokens).tolist())
                 for r in (waiting.popleft() for _ in range(min(len(waiting), cache.rows - len(rows))))]
        if fresh:
            hidden = torch.stack([prefill(row.request.prefix, cache, len(rows) + k) for k, row in enumerate(fresh)])
            extend(fresh, hidden)
            rows += fresh
        slot = 0
        while slot < len(rows):
            row = rows[slot]
            stopped = row.ids[-1] in eos
            if stopped or len(row.ids) == max_new_tokens or len(row.request.prefix) + len(row.ids) >= limit:
                yield Completion(row.request.id, row.ids, "stop" if stopped else "length")
                cache.move(len(rows) - 1, slot)
                rows[slot] = rows[-1]
                rows.pop()
            else:
                slot += 1
        if rows and not (waiting and len(rows) < cache.rows):
            cache.begin_step(len(rows))
            hidden = decoder(input_ids=torch.tensor([[row.ids[-1]] for row in rows], device=model.device),
                             position_ids=cache.positions[:, None], attention_mask=cache.mask,
                             past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            cache.end_step()
            extend(rows, hidden)


class Prefill:
    """Computes prefixes one by one, each from where it parts from the one before, whose keys and values are kept."""

    def __init__(self, decoder):
        from transformers import DynamicCache
        self.decoder, self.prefix, self.kept, self.hidden = decoder, [], DynamicCache(), None

    def __call__(self, prefix, cache, slot):
        """Fill a slot of the cache; returns the hidden state (H,) of the prefix's last token."""
        if prefix != self.prefix:
            shared = next((i for i, (a, b) in enumerate(zip(self.prefix, prefix)) if a != b), min(len(self.prefix), len(prefix)))
            shared = min(shared, len(prefix) - 1)  # the last token is always computed: it chooses the next one
            if shared < len(self.prefix):
                self.kept.crop(shared - len(self.prefix))
            rest = torch.tensor([prefix[shared:]], device=self.decoder.device)
            self.hidden = self.decoder(input_ids=rest, past_key_values=self.kept, use_cache=True).last_hidden_state[0, -1]
            self.prefix = prefix
        cache.put(slot, self.kept.layers, len(prefix))
        return self.hidden


class LocalSampler:
    """Samples from a model in this process; it is loaded when the first request is really sampled."""

    def __init__(self, path, *, temperature, top_p, max_new_tokens, seed, batch_size=16, device="auto", dtype="auto"):
        self.path, self.device, self.dtype, self.model = path, device, dtype, None
        self.tokenizer = load_tokenizer(path)
        self.max_new_tokens = max_new_tokens
        self.options = dict(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed,
                            batch_size=batch_size)
        self.eos, self.context = eos_ids(path, self.tokenizer), context_length(path)

    def load(self):
        """The model, loaded at the first call."""
        if self.model is None:
            device = pick_device(self.device)
            self.model = load_model(self.path, device, pick_dtype(self.dtype, device))
        return self.model

    def __call__(self, requests, done=(), title="sampling"):
        """Yield a Completion for each request that is not in `done`, and perhaps for some that are (see `sample`)."""
        if all(r.id in done for r in requests):
            return
        yield from sample(self.load(), requests, eos=self.eos, done=done, title=title, **self.options)


def add_sampler_flags(p):
    """Flags of whatever samples (`argparse`)."""
    p.add_argument("--model", required=True, help="model: directory or hub name")
    p.add_argument("--server", help="sample from this OpenAI-compatible server (http://HOST:PORT/v1) that has the "
                   "model; its key, if any, is in SERVER_API_KEY")
    p.add_argument("--temperature", type=float, default=0.6, help="sampling temperature; 0 takes the most probable token")
    p.add_argument("--top-p", type=float, default=0.95, help="nucleus of the distribution to sample from")
    p.add_argument("--max-new-tokens", type=int, default=8192, help="longest completion, in tokens")
    p.add_argument("--batch-size", type=int, default=16, help="rows sampled together; requests in flight at a server")
    p.add_argument("--seed", type=int, default=0, help="seed of every request's own generator")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="dtype of the model")


# ----------------------------------------------------------------------------------------------- log-probabilities

def completion_logps(model, input_ids, attention_mask, completion_mask, chunk=0):
    """Log-probability of each row's completion given what stands before it (the terms of Eq. 4), the plain way.

    input_ids, attention_mask, completion_mask: (B, T), right-padded; completion_mask is 1 on the tokens to score.
    Returns float32 (B,), nats, summed over those tokens. `tree_logps` computes the same with each prefix once.
    """
    hidden = model.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    scored = completion_mask[:, 1:].bool()         # the token at t is predicted from position t - 1
    rows = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(scored)[scored]  # (N,)
    return _sum_logps(model, hidden[:, :-1][scored], input_ids[:, 1:][scored], rows, len(input_ids), chunk)


def tree_logps(model, input_ids, position_ids, tree, scored, targets, branch, branch_of, chunk=0):
    """Log-probability of each completion given its prefix (the terms of Eq. 4), each prefix computed once.

    The arguments are a row made by `data.pack`, as tensors: input_ids and position_ids (1, T), the rest (N,) but for
    branch_of (B,). Returns float32 (B,), nats, summed over each completion's tokens. See `grow_trees`.
    """
    hidden = model.get_decoder()(input_ids=input_ids, position_ids=position_ids, tree=tree, use_cache=False)
    branches = sum(len(t) - 1 for t in tree)
    return _sum_logps(model, hidden.last_hidden_state[0, scored], targets, branch, branches, chunk)[branch_of]


def grow_trees(model):
    """Give a model the attention that `tree_logps` needs. Only torch's fused kernels are used, so no T x T mask."""
    from transformers import AttentionInterface
    AttentionInterface.register("tree", tree_attention)
    model.set_attn_implementation("tree")


def tree_attention(module, query, key, value, attention_mask, scaling=None, tree=None, **options):
    """Attention within packed trees: a trunk is causal, a branch sees its trunk and, causally, itself.

    query (B, heads, T, d), key and value (B, kv heads, T, d); tree as `data.pack` makes it, None for rows without one.
    Returns (B, T, heads, d) and no weights, as transformers expects. Raises ValueError for a model with sliding
    windows or capped scores.
    """
    if options.get("sliding_window") or options.get("softcap"):
        raise ValueError("tree attention has no sliding window and no softcap; train this model with --no-share")
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    tree, out = tree or [[query.shape[2]]], []
    pieces = zip(*(x.split([n for t in tree for n in t], dim=2) for x in (query, key, value)))
    for t in tree:
        q, trunk_k, trunk_v = next(pieces)
        out.append(attend(q, trunk_k, trunk_v, is_causal=True) if t[0] else q)
        for length in t[1:]:
            q, k, v = next(pieces)
            out.append(attend(q, torch.cat([trunk_k, k], 2), torch.cat([trunk_v, v], 2),
                              attn_mask=causal_lower_right(length, t[0] + length)))
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def head_logps(model, hidden, targets, chunk=0):
    """Log-probabilities of targets (N,) from the hidden states (N, H) that predict them: float32 (N,), nats."""
    weight, kind = model.get_output_embeddings().weight, hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
    most, keep = head_chunk(kind, len(weight))
    return TokenLogps.apply(hidden, weight, targets, chunk or most, keep)


def _sum_logps(model, hidden, targets, rows, n, chunk):
    """`head_logps`, summed by row: float32 (n,)."""
    logps = head_logps(model, hidden, targets, chunk)
    return torch.zeros(n, dtype=torch.float32, device=hidden.device).index_add(0, rows, logps)


def head_chunk(kind, vocabulary):
    """Tokens whose logits exist at once on a kind of device, and how many of all numbers may wait for backward."""
    if kind == "cpu":
        return max(1, 2 ** 24 // vocabulary), 2 ** 26  # 64 MiB: pieces over 32 MiB glibc gives back at once
    return max(1, 2 ** 27 // vocabulary), 0


class TokenLogps(torch.autograd.Function):
    """Log-probabilities of tokens under `softmax(hidden @ weight.T)`, whose logits exist for `chunk` tokens at a time.

    hidden (N, H), weight (V, H), targets (N,) -> float32 (N,), nats. Forward keeps log Z of each token; backward
    computes a chunk's logits again, makes them d/dlogits = onehot - softmax in place, and sums the weight's gradient
    in float32. Memory does not grow with N times V: of all logits at most the first `keep` numbers wait for backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, keep=0):
        """Logits minus log Z, at the targets."""
        logps, log_z, kept = [], [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = (h @ weight.T).float()                                                             # (chunk, V)
            log_z.append(logits.logsumexp(-1))
            logps.append(logits.gather(-1, t[:, None])[:, 0] - log_z[-1])
            if (keep := keep - logits.numel()) >= 0:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_z))
        ctx.chunk, ctx.kept = chunk, kept
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        """Gradients of hidden and, unless it is frozen, of weight."""
        hidden, weight, targets, log_z = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for out, h, t, z, g in zip(*(x.split(ctx.chunk) for x in (grad_hidden, hidden, targets, log_z, grad))):
            d = ctx.kept.pop(0) if ctx.kept else (h @ weight.T).float()
            d.sub_(z[:, None]).exp_().mul_(-g[:, None])
            d.scatter_add_(1, t[:, None], g[:, None])
            d = d.to(weight.dtype)
            out.copy_(d @ weight)
            if grad_weight is not None:
                grad_weight.addmm_(d.T, h) if d.dtype == torch.float32 else grad_weight.add_(d.T @ h)
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
