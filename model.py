"""The language model: loading, sampling, log-probabilities, saving.

Served and tested (tests/test_model_families.py) are Llama, Qwen2, Qwen3, Mistral, OLMo 2, SmolLM3,
GLM, Granite, Gemma, and Phi-3 without longrope; there is no model-specific code. Every other causal
language model of Hugging Face works or is refused: each is compared with its own logits when it is
loaded (support/model_check.py). Weights come and go as safetensors only. What makes this fast is in
support/: kv_cache.py for sampling, trees.py and fused_head.py for log-probabilities.

Left out on purpose: beam search, repetition penalties, top-k (the paper samples at temperature
0.6, top-p 0.95).
"""
import contextlib
import functools
import hashlib
import math
import os
import shutil
from collections import deque
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from data import (Completion, Request, decode, load_triggers, render_prompt, split_reasoning,
                  token_index)
from support.chat import Chat, chat_flags, read_triggers, talk
from support.errors import InputError, exit_cleanly
from support.files import read_json, write_json, writing
from support.fused_head import TokenLogps, chunk_sizes, logit_shape, output_logits
from support.hub import load_config, model_folder
from support.kv_cache import check_sampling, make_slots
from support.lora import add_adapters, initial_adapter, merged_weight, plain_name
from support.model_check import (PLAIN_WAY, SERVE_IT, make_buffers, refuse_bad_loading,
                                 refused_if_it_fails, remove_dropout, stored_tensors)
from support.waves import ASIDE, DRAIN, check_requests, in_waves


# -------------------------------------------------------------------------------------- loading

def pick_device(name="auto"):
    """The device of that name; `auto` is the first CUDA GPU if there is one, else the CPU.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name == "auto":  # never Apple's `mps`, which is untested here
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # under torchrun each process has its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(name)


def pick_dtype(name, device):
    """`auto` is bfloat16 on a GPU and float32 elsewhere; other names are torch's own."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def round_trips(tokenizer):
    """Whether text survives encoding and decoding."""
    spaces = " Wait,  two  spaces\n\n\tand a tab \n"
    for text in ("hello world", spaces, "naïve façade: «où?»", "漢字かな。 한국어"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if decode(tokenizer, ids) != text:
            return False
    return True


def load_tokenizer(path):
    """Load the model's own fast tokenizer; where its class spoils text, its tokenizer.json alone.

    Raises InputError when there is none, when neither keeps text as it is, or when there is no
    chat template.
    """
    folder = model_folder(path, weights=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise InputError(f"{path}: needs a fast tokenizer (tokenizer.json).")
    # Some releases of transformers 5 lose the spaces of R1-Distill-Llama: their class for it puts
    # another pre-tokenizer in the place of the one that tokenizer.json names.
    if not round_trips(tokenizer):
        print(f"{path}: {type(tokenizer).__name__} does not give text back as it was; "
              "using PreTrainedTokenizerFast")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if not round_trips(tokenizer):
            raise InputError(f"{path}: its tokenizer loses spaces or characters "
                             "(decode(encode(text)) != text), so no trace could be continued "
                             "exactly. Try another version of transformers.")
    if not tokenizer.chat_template:
        raise InputError(f"{path}: the tokenizer has no chat template, so prompts can't be "
                         "rendered. Add a chat_template.jinja to the model directory.")
    return tokenizer


def load_model(path, device, dtype=torch.float32, to_sample=True, graphs=True):
    """Load a causal language model from a directory or the hub, in eval mode, for inference.

    graphs: whether `sample` may use CUDA graphs. Raises InputError for a model that lacks weights
    or, `to_sample`, that `sample` would not sample from exactly.
    """
    disable_progress_bar()  # a bar for every shard drowns the stage's own
    folder = model_folder(path)
    with refused_if_it_fails(path, "sampling", SERVE_IT):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    refuse_bad_loading(path, report)
    model = model.to(device).eval()
    model.decode_graphs = graphs
    if to_sample:
        check_sampling(model)
    return model


def stored_dtype(path):
    """The dtype of a checkpoint's stored weights; trained weights are saved in the same."""
    return load_config(path).dtype or torch.float32


def eos_ids(path, tokenizer):
    """The set of token ids that end a generation.

    They are the generation config's, or the tokenizer's where that names none.
    """
    ids = None
    with contextlib.suppress(OSError):  # some models ship no generation config
        ids = GenerationConfig.from_pretrained(model_folder(path, weights=False)).eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if isinstance(ids, (list, tuple)):  # Llama 3 has several
        return set(ids)
    return {ids}


def context_length(path):
    """How many tokens a model can attend to, prompt and completion together."""
    try:
        return load_config(path).max_position_embeddings
    except AttributeError:
        raise InputError(f"{path}: its config.json names no max_position_embeddings, so nobody "
                         "knows how long a text may be. Add it.") from None


# --------------------------------------------------- loading for training, a part on each rank

def empty_model(path, attn="sdpa", lora_rank=0, frozen_dtype=torch.float32):
    """The model that `path` describes, to be trained, on the meta device: shapes without memory.

    With `lora_rank` only adapters want gradients, and everything else is of `frozen_dtype`.
    """
    config = load_config(path)
    remove_dropout(config)  # CHOICE: the reference pass and the training pass must agree
    # What is trained is float32: at these learning rates bfloat16 cannot resolve an update.
    dtype = frozen_dtype if lora_rank else torch.float32
    with torch.device("meta"), refused_if_it_fails(path, f"--attn {attn}", PLAIN_WAY):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
    with contextlib.suppress(OSError):  # some models ship no generation config
        settings = model_folder(path, weights=False)
        model.generation_config = GenerationConfig.from_pretrained(settings)
    if lora_rank:
        add_adapters(model, lora_rank)
    return model


@torch.no_grad()
def read_weights(model, path, device, rank, world):
    """Give an `empty_model`, sharded or not, memory and the weights of the safetensors files.

    Each rank reads its own rows only. Adapters start afresh. Raises InputError when the files and
    the architecture do not name the same weights.
    """
    model.to_empty(device=device)
    model.tie_weights()  # to_empty has untied them
    make_buffers(model)
    missing = {plain_name(name): tensor for name, tensor in stored_tensors(model).items()}
    known = {plain_name(name) for name in model.state_dict()}  # tied weights under both names
    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if name in missing:
                    local, rows = local_rows(missing.pop(name), rank, world)
                    if local.numel():  # a small weight leaves the last ranks without rows
                        local.copy_(weights.get_slice(name)[rows])
                elif name not in known and not name.endswith("rotary_emb.inv_freq"):
                    raise InputError(f"{file}: {name} has no place in a {type(model).__name__}.")

    # Every rank draws the whole adapter and keeps its rows: any number of ranks starts alike.
    adapters = [name for name in missing if "lora_" in name]
    for seed, name in enumerate(adapters):
        parameter = missing.pop(name)
        local, rows = local_rows(parameter, rank, world)
        local.copy_(initial_adapter(name, parameter.shape, seed)[rows])
    if missing:
        names = ", ".join(sorted(missing)[:5])  # a wrong file lacks hundreds
        raise InputError(f"{path}: the safetensors files lack {names}.")


def weight_files(path):
    """The safetensors files of a model: a directory, or a name on the hub, fetched first."""
    folder = model_folder(path)
    index = folder / "model.safetensors.index.json"
    if not index.exists():  # the model fits into one file
        return [folder / "model.safetensors"]
    names = read_json(index, "weight_map")["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def local_rows(p, rank, world):
    """A parameter's local tensor, and the rows that it holds; FSDP cuts as `torch.chunk` does."""
    if not isinstance(p, DTensor):  # a buffer, or there is one process only
        return p, ...
    n = math.ceil(len(p) / world)  # the last ranks may hold fewer rows, or none
    start = min(rank * n, len(p))
    end = min((rank + 1) * n, len(p))
    return p.to_local(), slice(start, end)


# ------------------------------------------------------------------------------------- sampling

def next_token(logits, temperature, top_p, uniform):
    """Choose one token a row by inverting its cumulative distribution at its uniform number.

    logits (B, V); uniform float (B,) in [0, 1); returns long (B,). Temperature 0 is the arg max.
    Top-p keeps the most probable tokens up to and including the one that reaches `top_p`.

    >>> logits = torch.tensor([[0.0, 1.0, 2.0]]).log_softmax(-1)  # p = .09 .24 .67
    >>> [next_token(logits, 1.0, 0.9, torch.tensor([u])).item() for u in (0.1, 0.7, 0.99)]
    [2, 2, 1]
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)  # (B, V)
    vocabulary = logits.shape[-1]
    # The nucleus is nearly always among the first few, so the rest is sorted only if it is not.
    for k in (min(64, vocabulary), vocabulary):
        p, order = probabilities.topk(k)  # (B, k) each, the most probable first
        if (p.sum(-1) >= top_p).all():
            break
    p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)
    cdf = p.cumsum(-1)  # ends at the nucleus's total, not at 1
    chosen = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1)  # the first with cdf > u * total
    last_kept = (p > 0).sum(-1) - 1
    chosen = torch.minimum(chosen, last_kept)  # rounding must not reach past it
    return order.gather(-1, chosen[:, None])[:, 0]


def request_uniforms(seed, request_id, n):
    """The n uniform numbers of one request, float32 (n,).

    They depend on the seed and the request's id alone, so neither a restart nor another order of
    the requests changes what is drawn.
    """
    digest = hashlib.sha256(f"{seed} {request_id}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits
    generator = torch.Generator().manual_seed(number)
    return torch.rand(n, generator=generator)


@torch.no_grad()
def sample(model, requests, *, eos, max_new_tokens, temperature=0.6, top_p=0.95, seed=0,
           batch_size=16, done=(), parts=None, drain=DRAIN, hand=None, title="sampling",
           groups=None):
    """Sample one completion for each request; yield those of a wave once it is finished.

    Decoding is batched with a KV cache: finished rows leave at once and waiting requests take
    their slots. Requests are sorted by prefix, and each prefix is computed only from where it
    parts from the one before.

    Requests are handled in waves of `4 * batch_size`. Once none of a wave is waiting, it goes on
    for `drain` steps more; rows that are unfinished then are put aside with the tokens they have.
    After all waves, these rows are finished in waves of their own. (A single wave puts nothing
    aside.) So a few very long rows don't hold up the others.

    A wave depends on nothing but itself. All ranks share the waves: on others `hand` samples them,
    see `in_waves`. A restart skips those whose ids are all in `done` or that the folder `parts`
    keeps, and samples any other from its start. So neither restarts nor the number of ranks change
    a bit: batches are the same, hence also the rounding.

    requests: list of Request; groups: the same in lists that are cut into waves by themselves.
    eos: set of ids that end a row. A row also ends after `max_new_tokens`, or where the model's
    context is full. Raises ValueError for a prefix that leaves no room in the context: callers
    drop those.
    """
    check_requests(model, requests, max_new_tokens)
    wave = functools.partial(_sample_wave, model, eos=eos, max_new_tokens=max_new_tokens,
                             temperature=temperature, top_p=top_p, seed=seed,
                             batch_size=batch_size, kept={})
    for completion in in_waves(groups or [requests], 4 * batch_size, wave, hand, done, parts,
                               drain, title):
        yield Completion(*completion)


@dataclass
class _Row:
    """A request that is being sampled, and a uniform number for each token that it may get."""
    request: Request
    uniforms: list
    ids: list = field(default_factory=list)

    def finished(self, eos, max_new_tokens, context):
        """How the row has ended, "stop" or "length"; None while it has not."""
        if self.ids[-1] in eos:
            return "stop"
        length = len(self.request.prefix) + len(self.ids)
        if len(self.ids) == max_new_tokens or length >= context:
            return "length"
        return None


def _append_tokens(model, rows, hidden, temperature, top_p):
    """Choose each row's next token from the hidden state (rows, H) that predicts it."""
    logits = output_logits(model, hidden)  # (rows, V)
    if not logits.amax(-1).isfinite().all():  # NaN where any of a row is
        raise InputError(f"{model.name_or_path}: its logits are not finite, so there is nothing to "
                         "sample. Are its weights damaged, or did its training diverge?")
    uniforms = torch.tensor([row.uniforms[len(row.ids)] for row in rows], device=logits.device)
    tokens = next_token(logits, temperature, top_p, uniforms).tolist()
    for row, token in zip(rows, tokens):
        row.ids.append(token)


def _sample_wave(model, wave, eos, max_new_tokens, temperature, top_p, seed, batch_size,
                 kept=None, drain=None):
    """Yield the completions of some requests, at most `batch_size` of them active at a time.

    wave: (Request, ids that it has already); kept: see `make_slots`. Rows that are unfinished
    `drain` steps after the last request has got a slot end as "aside", with the ids they have.
    """
    context = model.config.max_position_embeddings
    longest = min(max(len(request.prefix) for request, _ in wave) + max_new_tokens, context)
    slots = make_slots(model, min(batch_size, len(wave)), longest, kept)
    waiting = deque(wave)
    rows = []  # the active ones: rows[i] has slot i, without gaps
    drained = 0  # steps since none has been waiting
    while waiting or rows:
        # Waiting requests take the free slots. The hidden states (n, H) of their prefixes' last
        # tokens give them their first new tokens.
        active = len(rows)
        while waiting and len(rows) < slots.rows:
            request, ids = waiting.popleft()
            uniforms = request_uniforms(seed, request.id, max_new_tokens).tolist()
            rows.append(_Row(request, uniforms, list(ids)))
        new = rows[active:]
        if new:
            prefixes = [row.request.prefix + row.ids for row in new]
            hidden = slots.fill(range(active, len(rows)), prefixes)
            _append_tokens(model, new, hidden, temperature, top_p)

        # Finished rows leave. The last active row takes the slot of each, to leave no gap.
        slot = 0
        while slot < len(rows):
            row = rows[slot]
            finished = row.finished(eos, max_new_tokens, context)
            if finished is None:
                slot += 1
                continue  # otherwise the row moved here is next
            yield Completion(row.request.id, row.ids, finished)
            slots.move(len(rows) - 1, slot)
            rows[slot] = rows[-1]
            rows.pop()
        if not rows or waiting and len(rows) < slots.rows:
            continue  # fill the free slots first

        if not waiting:
            if drained == drain:
                break
            drained += 1
        # Every active row goes through the model with its last token, and gets the next.
        hidden = slots.step([row.ids[-1] for row in rows])
        _append_tokens(model, rows, hidden, temperature, top_p)
    for row in rows:
        yield Completion(row.request.id, row.ids, ASIDE)


def load_to_sample(path, device, dtype, graphs):
    """The model of a `LocalSampler`'s arguments."""
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise every rank would take some memory of the first
    return load_model(path, device, pick_dtype(dtype, device), graphs=graphs)


# On a rank that samples for rank 0: its models, and its slots, see `make_slots`.
_load_once = functools.cache(load_to_sample)
_kept = {}


@torch.no_grad()
def sample_for_rank_0(source, wave, drain, options):
    """`_sample_wave` on another rank, whose models stay loaded."""
    model = _load_once(*source)
    yield from _sample_wave(model, wave, kept=_kept, drain=drain, **options)


class LocalSampler:
    """Samples from a model in this process.

    The model is loaded when the first request is sampled, so a stage that finds everything done
    needs no memory. The arguments are those of `sample`, `pick_device` and `pick_dtype`.
    """

    def __init__(self, path, *, temperature, top_p, max_new_tokens, seed, batch_size=16,
                 device="auto", dtype="auto", graphs=True):
        self.source = (path, device, dtype, graphs)
        self.model = None
        self.tokenizer = load_tokenizer(path)
        self.eos = eos_ids(path, self.tokenizer)
        self.context = context_length(path)
        self.max_new_tokens = max_new_tokens
        self.options = dict(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
        )

    def load(self):
        """The model, loaded at the first call."""
        if self.model is None:
            self.model = load_to_sample(*self.source)
        return self.model

    def __call__(self, requests, done=(), parts=None, title="sampling", groups=None):
        """Yield a Completion for each request that is not in `done`.

        Perhaps also for some that are: `sample` makes unfinished waves again.
        """
        if all(r.id in done for r in requests):
            return
        options = {"eos": self.eos, **self.options}
        hand = functools.partial(sample_for_rank_0, self.source, options=options)
        yield from sample(self.load(), requests, done=done, parts=parts, hand=hand, title=title,
                          groups=groups, **options)


# ---------------------------------------------------------------------------- log-probabilities

def completion_logps(model, input_ids, attention_mask, completion_mask, chunk=0):
    """Log-probability of each completion given what stands before it (the terms of Eq. 4).

    input_ids, attention_mask, completion_mask: (B, T), right-padded; completion_mask is 1 on the
    tokens to score. Returns float32 (B,), nats, summed over those tokens.

    This is the plain way, a row for each sequence; `tree_logps` computes the same with each
    prefix once. The hidden state at t predicts the token at t + 1, so states and tokens are
    shifted by one:

        tokens    The   user  asks  No    .     <eos>
        scored                      1     1     1         completion_mask
        hidden                1     1     1               the states that predict them
    """
    decoder = model.get_decoder()  # without the head: logits are made for scored tokens only
    output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    hidden = output.last_hidden_state[:, :-1]  # (B, T - 1, H): no token follows the last state
    tokens = input_ids[:, 1:]                  # (B, T - 1): no state precedes the first token
    scored = completion_mask[:, 1:].bool()     # (B, T - 1)
    logps = token_logps(model, hidden[scored], tokens[scored], chunk)  # (N,), row by row
    rows = scored.nonzero()[:, 0]                                      # (N,): each token's row
    return logps.new_zeros(len(input_ids)).index_add(0, rows, logps)


def tree_logps(model, input_ids, position_ids, tree, scored, targets, branch, branch_of, chunk=0):
    """Log-probability of each completion given its prefix (the terms of Eq. 4), each prefix once.

    The arguments are what `support.trees.pack` makes of B sequences, as tensors: input_ids and
    position_ids (1, T), one long row of trunks and branches; tree, the list of their lengths;
    scored, targets and branch (N,), for each scored token the position that predicts it, its id and
    its branch; branch_of (B,), for each sequence its branch. Returns float32 (B,), nats, summed
    over each completion's tokens. The model's attention must be
    `support.trees.use_tree_attention`'s.
    """
    decoder = model.get_decoder()
    output = decoder(input_ids=input_ids, position_ids=position_ids, tree=tree, use_cache=False)
    hidden = output.last_hidden_state[0, scored]        # (N, H)
    logps = token_logps(model, hidden, targets, chunk)  # (N,)
    branches = sum(len(lengths) - 1 for lengths in tree)  # the first length is the trunk's
    totals = logps.new_zeros(branches).index_add(0, branch, logps)
    return totals[branch_of]  # equal sequences share a branch


def token_logps(model, hidden, targets, chunk=0, temperature=1.0):
    """Log-probabilities of targets (N,) from the hidden states (N, H) that predict them.

    Returns float32 (N,), nats. It equals `-F.cross_entropy(logits.float() / temperature, targets,
    reduction="none")`, with the logits that the model makes of the states, but these (N, V) never
    exist at once: a vocabulary of 128,000 would need gigabytes.
    """
    head = model.get_output_embeddings()
    weight = head.weight  # (V, H)
    bias = getattr(head, "bias", None)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):  # it does not reach TokenLogps' backward
        dtype = torch.get_autocast_dtype(device_type)
        hidden = hidden.to(dtype)
        weight = weight.to(dtype)
    largest, keep = chunk_sizes(device_type, len(weight))
    scale, cap = logit_shape(model.config, temperature)
    return TokenLogps.apply(hidden, weight, bias, targets, chunk or largest, keep, scale, cap)


# --------------------------------------------------------------------------------------- saving

def save_model(model, tokenizer, folder, rank, dtype, limit=5 * 10 ** 9):
    """Write a Hugging Face directory: safetensors, config, tokenizer, generation config.

    Adapters are merged. Weights are gathered one at a time and written in files of about `limit`
    bytes, first into a temporary folder, from which the files are renamed one by one. All ranks
    must call it: gathering communicates.
    """
    parameters = stored_tensors(model)  # tied weights come once
    sizes = {}
    for name, p in parameters.items():
        if "lora_" not in name:
            sizes[name] = p.numel() * dtype.itemsize
    files = split_into_files(sizes, limit)

    temporary = folder / ".model.tmp"
    weight_map = {}  # name of a weight -> its file
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while it saved
        temporary.mkdir(parents=True)
    for number, names in enumerate(files, 1):
        weights = {}
        for name in names:
            weight = _gather(parameters, name)
            if rank == 0:  # the others give their rows and keep nothing
                weights[plain_name(name)] = weight.to("cpu", dtype, copy=True)
        if rank == 0:
            file = "model.safetensors"
            if len(files) > 1:
                file = f"model-{number:05}-of-{len(files):05}.safetensors"
            with writing(folder / file):
                save_file(weights, temporary / file, {"format": "pt"})
            weight_map |= dict.fromkeys(weights, file)
    if rank != 0:
        return

    model.config.dtype = dtype
    for part in (model.config, model.generation_config, tokenizer):
        with writing(folder):
            part.save_pretrained(temporary)
    if len(files) > 1:  # whoever loads the model finds its files by this index
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(temporary / "model.safetensors.index.json", index)
    for path in temporary.glob("*.safetensors"):
        shutil.copymode(temporary / "config.json", path)  # safetensors lets only the owner read
    for path in temporary.iterdir():
        os.replace(path, folder / path.name)
    temporary.rmdir()


def _gather(parameters, name):
    """One weight from all ranks, with its adapter merged into it."""
    def full(p):
        return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()

    weight = full(parameters[name])
    stem = name.removesuffix("base.weight")  # the layer that has the adapter, if any
    if stem + "lora_a" not in parameters:
        return weight
    a = full(parameters[stem + "lora_a"])
    b = full(parameters[stem + "lora_b"])
    return merged_weight(weight, a, b)


def split_into_files(sizes, limit):
    """Which weights go to which file: names in lists, each of about `limit` bytes at most.

    >>> split_into_files({"a": 5, "b": 3, "c": 3}, limit=6)
    [['a'], ['b', 'c']]
    """
    files = []
    room = 0  # bytes left in the last file
    for name, size in sizes.items():
        if size > room:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files


# --------------------------------------------------------------------------------- command line

def main(argv=None):
    """`python model.py chat --model MODEL`: talk to a model (support/chat.py)."""
    path, trigger, settings = chat_flags(argv)
    triggers = read_triggers(trigger, load_triggers)
    sampler = LocalSampler(path, **settings)
    talk(Chat(sampler, triggers, render_prompt=render_prompt, split_reasoning=split_reasoning,
              token_index=token_index, decode=decode, next_token=next_token,
              request_uniforms=request_uniforms))


if __name__ == "__main__":
    exit_cleanly(main)
