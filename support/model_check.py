"""Is a model computed here as its own class computes it?

A class of models may scale its logits, look at a window of tokens only, or mix neighbouring tokens
in a way of its own. What this project does with hidden states, caches and packed rows is then
silently wrong. So every model is tried once when it is loaded: log-probabilities of a few short
sequences, computed in our ways, against the logits of the model's own `forward`.
"""
import contextlib
import os
import sys

import torch
import torch.nn as nn

from support.errors import InputError

SERVE_IT = "sample from a server instead (--server)"  # remedies
PLAIN_WAY = "train it with --no-share --attn eager"
FLASH = "flash_attention_2"
PROBE_WINDOW = 4  # tokens that a sliding window is narrowed to while a model is tried
EXACT = 1e-3  # nats a token that float32 may differ by
ROUNDED = 0.3  # the same of shorter dtypes, by which most models differ less
CHANGING_ROPE = {  # kinds whose angles depend on the longest row: up to where they do not
    "longrope": "original_max_position_embeddings",
    "dynamic": "max_position_embeddings",
}


# ------------------------------------------------------------------------------------- the probe

def probe_sequences(vocabulary):
    """Three (prefix, completion) sequences, the longest first; the others branch from one prefix.

    That prefix begins as the first one does, so the sampler computes it from its middle on. The
    ids are fixed and spread over the vocabulary.

    >>> probe_sequences(1000)[2]
    ([103, 340, 577, 814, 51], [236, 473])
    """
    ids = [(103 + 237 * i) % vocabulary for i in range(23)]
    return [
        (ids[:3] + ids[11:17], ids[17:23]),
        (ids[:5], ids[5:9]),
        (ids[:5], ids[9:11]),
    ]


@torch.no_grad()
def check_model(model, ways, remedy):
    """Compare our ways of scoring a model with its own logits.

    ways: {what it is for: function of (prefix, completion) sequences that returns the summed
    log-probabilities (B,) of the completions}. They run in the mode that the model is in, so live
    dropout shows. Raises InputError where one fails or differs. Random state stays as it is.
    """
    sequences = probe_sequences(model.config.get_text_config().vocab_size)
    lengths = torch.tensor([len(completion) for _, completion in sequences])
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), narrow_window(model):
        results = {}
        for use, logps_of in ways.items():
            with refused_if_it_fails(type(model).__name__, use, remedy):
                results[use] = logps_of(sequences).float().cpu()
        expected, dtype = own_logps(model, sequences)
    if not expected.isfinite().all():
        raise InputError(f"{model.name_or_path}: its logits are not finite. Are its weights "
                         "damaged, or did its training diverge?")
    rounded = dtype != torch.float32 or model.config._attn_implementation == FLASH
    tolerance = ROUNDED if rounded else EXACT
    for use, logps in results.items():
        figure = ((logps - expected) / lengths).abs().max().item()
        if figure <= tolerance:  # a NaN is not
            continue
        problem = (f"{type(model).__name__}: {use} would be {figure:.2g} nats a token "
                   "off the model's own logits")
        if not rounded:
            raise InputError(f"{problem}; {remedy}.")
        # Rounding alone can go that far where a model's weights are large, so this is no proof.
        warn(f"{problem} in this dtype. If --dtype float32 is refused too, {remedy}.")


def warn(message):
    """Print a warning, under torchrun once."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def own_logps(model, sequences):
    """The oracle: the model's own logits, each sequence alone, no cache.

    The plainest attention computes them, and no dropout is live. Returns log-probabilities float32
    (B,) of the completions, and the logits' dtype.
    """
    training = model.training
    attention = model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")
    logps = []
    for prefix, completion in sequences:
        ids = torch.tensor([prefix + completion], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1:-1]
        at_target = logits.float().log_softmax(-1).gather(-1, ids[0, len(prefix):, None])
        logps.append(at_target.sum())
    model.set_attn_implementation(attention)
    model.train(training)
    return torch.stack(logps).cpu(), logits.dtype


@contextlib.contextmanager
def refused_if_it_fails(name, use, remedy):
    """Turn an error of a model's own code into one line that names the model."""
    try:
        yield
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a strange model may fail anywhere and in any way
        reason = str(error).partition("\n")[0]
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise InputError(f"{name} does not fit {use} ({reason[:120]}); {remedy}.") from error


@contextlib.contextmanager
def narrow_window(model):
    """Narrow a sliding window to a few tokens, so that short sequences reach beyond it."""
    config = model.get_decoder().config
    window = getattr(config, "sliding_window", None)
    # Flash attention reads each layer's own copy of the number, which stays as it is.
    if window is None or model.config._attn_implementation == FLASH:
        yield
        return
    config.sliding_window = min(window, PROBE_WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window


@contextlib.contextmanager
def in_float32(model):
    """Let a model compute in float32, whatever it is stored in, one module's weights at a time.

    In a shorter dtype two right ways can be further apart than a right one and a wrong one.
    """
    stored = {}

    def widen(module, *_):
        for p in module.parameters(recurse=False):
            stored[p] = p.data
            p.data = p.data.float()

    def restore(module, *_):
        for p in module.parameters(recurse=False):
            p.data = stored.pop(p)

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(widen))
        hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def check_policy(policy, device):
    """`check_model` for an `ipo.Policy`, sharded or not, in the form in which it is trained."""
    attention = policy.lm.config._attn_implementation
    if policy.share:
        remedy = "train it with --no-share"
    elif attention != "eager":
        remedy = "train it with --attn eager"
    else:
        remedy = "it can't be trained here"
    context = contextlib.nullcontext()
    if attention == FLASH:  # which takes no float32
        context = torch.autocast(device.type, torch.bfloat16)
    sharded = hasattr(policy, "unshard")

    def logps_of(sequences):
        with context:
            logps = policy(**policy.rows(sequences, device))
        if sharded:
            policy.unshard()  # for the model's own logits, which go past the policy's `forward`
        return logps

    check_model(policy.lm, {"training": logps_of}, remedy)
    if sharded:
        policy.reshard()  # an optimizer made now must see the shards


# ------------------------------------------------------------------------------- what is missing

def refuse_bad_loading(path, report):
    """Raise InputError where files and model do not name the same weights.

    report: what `from_pretrained(output_loading_info=True)` returns. transformers only warns, and
    puts random numbers in the place of what is missing.
    """
    for problem, keys in (("lack", "missing_keys"), ("should not hold", "unexpected_keys")):
        names = sorted(report[keys])
        if names:
            raise InputError(f"{path}: the safetensors files {problem} {', '.join(names[:5])}.")


def blocks_of(model):
    """A model's blocks, in order; InputError where they are not where most models have them."""
    try:
        return model.get_decoder().layers
    except AttributeError:
        raise InputError(f"{type(model).__name__}: its decoder has no `layers`, so it can't be "
                         "trained here.") from None


# --------------------------------------------------------------------------------------- buffers

def stored_tensors(model):
    """What a checkpoint holds, {name: tensor}: parameters, tied ones once, and some buffers."""
    known = model.state_dict()
    stored = dict(model.named_parameters())
    for name, buffer in model.named_buffers():
        if name in known:
            stored[name] = buffer
    return stored


def make_buffers(model):
    """Compute the buffers that no checkpoint holds, after `to_empty` has left them undefined.

    transformers' own initialisation does it, as it does in `from_pretrained`. Raises InputError
    for a buffer that it leaves out.
    """
    stored = model.state_dict(keep_vars=True)
    for tensor in stored.values():
        tensor._is_hf_initialized = True  # these are read from the files instead
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    for buffer in computed.values():
        buffer.fill_(undefined(buffer.dtype))
    model.initialize_weights()
    for name, buffer in model.named_buffers():
        if name in computed and (buffer.isnan() | (buffer == undefined(buffer.dtype))).any():
            raise InputError(f"{type(model).__name__}: nothing computes its buffer {name}, so it "
                             "can't be trained here.")


def undefined(dtype):
    """A value that no buffer has by intention."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    if dtype == torch.bool:
        return False  # which a bool buffer may well have: then it is refused
    return torch.iinfo(dtype).min


# --------------------------------------------------------------------------------------- dropout

def remove_dropout(config):
    """Set every kind of dropout that a config names to 0, also in the configs inside it.

    >>> from transformers import GPT2Config
    >>> config = GPT2Config(resid_pdrop=0.1)
    >>> remove_dropout(config)
    >>> config.resid_pdrop
    0.0
    """
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    for name in config.sub_configs:
        inner = getattr(config, name)
        if inner is not None:
            remove_dropout(inner)


# ---------------------------------------------------------------------- windows and rotary angles

def layer_windows(config):
    """How far back the layers look: {kind of layer: window in tokens, None: everything}.

    Under the one key None where all layers are alike and the model takes one mask for all.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds == {"full_attention"}:
        return {None: None}
    if not kinds:
        return {None: window}
    known = {"full_attention": None, "sliding_attention": window}
    if not kinds <= known.keys():
        others = ", ".join(sorted(kinds - known.keys()))
        raise InputError(f"layers of the kind {others}")
    return {kind: known[kind] for kind in kinds}


def steady_length(config):
    """How long rows may be for a model to read each alike in any company; None: as they like.

    Some rotary embeddings switch to other angles for *all* rows, cached ones too, as soon as one
    of them is longer than this.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope] if "rope_type" in rope else rope.values()  # one, or one for each kind of layer
    limits = []
    for rope in ropes:
        field = CHANGING_ROPE.get(rope.get("rope_type"))
        if field:
            limits.append(rope.get(field) or getattr(config, field))
    return min(limits, default=None)


def refuse_unsteady(model, length):
    """Raise InputError for a row of `length` tokens, if it is beyond a model's steady length."""
    limit = steady_length(model.get_decoder().config)
    if limit is not None and length > limit:
        raise InputError(
            f"{type(model).__name__}: a row of {length} tokens would change the rotary angles of "
            f"all rows beside it, being longer than {limit}. Keep prompt and --max-new-tokens "
            f"within that, or --max-length {limit} in training, or sample from a server.")


def guard_length(model):
    """Have a model refuse rows beyond its `steady_length`."""
    decoder = model.get_decoder()
    if steady_length(decoder.config) is None:
        return

    def refuse(module, args, keywords):
        cache = keywords.get("past_key_values")
        positions = keywords.get("position_ids")
        if positions is not None:
            length = int(positions.max()) + 1
        else:
            length = keywords["input_ids"].shape[1]
            if cache is not None:
                length += cache.get_seq_length()
        refuse_unsteady(model, length)

    decoder.register_forward_pre_hook(refuse, with_kwargs=True)
