"""`--batch-size auto`: how many rows of a model fit into a GPU."""
import functools
from pathlib import Path

from support.files import read_json
from support.gpus import visible_gpus
from support.hub import load_config
from support.record import device_kind
from support.stages import sidecar, what_is_made

ON_CPU = 16  # rows, where more gain nothing
FEWEST, STEP, MOST = 8, 8, 256
GIB = 1 << 30
PROMPT = 1024  # tokens that a prompt may have
JUDGES = ("judge", "cue_judge", "eval_judge")
LOCAL = "local:"  # a judge in the same process


def rows_that_fit(memory, weights, kv_per_token, span):
    """How many rows' keys and values fit beside the weights: a multiple of 8, from 8 to 256.

    memory: of the GPU, weights and kv_per_token: of the model, all in bytes; span: the most tokens
    of a row, because that much is reserved for each. CHOICE: an eighth of the memory and 2 GiB are
    left for logits, prefixes that are being computed, and whatever else holds the GPU.

    An 8B model in bfloat16 with rows of 9,216 tokens, on GPUs of 80 and of 24 GiB:

    >>> [rows_that_fit(gib << 30, 16 << 30, 1 << 17, 9216) for gib in (80, 24)]
    [40, 8]
    """
    room = memory * 7 // 8 - 2 * GIB - weights
    rows = room // (kv_per_token * span)
    return int(max(FEWEST, min(MOST, rows // STEP * STEP)))


def with_batch_size(flags):
    """The flags of a stage (a dict) with a number in place of `--batch-size auto`."""
    if flags.get("batch_size") != "auto":
        return flags
    rows = ON_CPU
    if not flags["server"] and device_kind(flags["device"]) == "cuda":
        judges = set()
        for name in JUDGES:
            spec = flags.get(name) or ""
            if spec.startswith(LOCAL):
                judges.add(spec.removeprefix(LOCAL))
        itemsize = 4 if flags["dtype"] == "float32" else 2
        rows = _rows_on_gpu(flags["model"], tuple(sorted(judges)), itemsize, longest_row(flags))
    return {**flags, "batch_size": _as_before(flags["out"], rows)}


def longest_row(flags):
    """The most tokens of a row that is sampled with some flags, a dict."""
    span = flags["max_new_tokens"] + PROMPT
    if "traces" in flags:  # a trace is continued, which may be as long already
        span += flags["max_new_tokens"]
    return span


def _as_before(out, rows):
    """The rows that an output was begun with, if they still fit: a restart gives the same bits."""
    if not out or not what_is_made(Path(out)):
        return rows  # the settings beside it, if any, may be those of a start that failed
    config = sidecar(out, "config")
    if not config.exists():
        return rows  # which `open_stage` refuses
    before = read_json(config, "flags")["flags"].get("batch_size", rows)
    return min(before, rows)


@functools.cache
def _rows_on_gpu(model, judges, itemsize, span):
    config = load_config(model)
    weights = itemsize * count_parameters(config)
    for judge in judges:
        weights += 3 * count_parameters(load_config(judge))  # 2 bytes each, and rows of its own
    span = min(span, config.max_position_embeddings)
    return rows_that_fit(free_memory(), weights, kv_bytes(config, itemsize), span)


def free_memory():
    """Bytes that are free on the GPU that has the least, with what this process can free itself."""
    import torch  # inside, because it takes a second
    free = [gpu.free for gpu in visible_gpus()]
    if not free:  # no nvidia-smi here
        free = [torch.cuda.mem_get_info(0)[0]]
    return min(free) + torch.cuda.memory_reserved()


def count_parameters(config):
    """Parameters of the model that a config describes; tied ones count once."""
    import torch
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def kv_bytes(config, itemsize):
    """Bytes of the keys and values of one token, in all layers; itemsize: bytes of a number.

    >>> from types import SimpleNamespace
    >>> llama_8b = SimpleNamespace(num_hidden_layers=32, num_attention_heads=32,
    ...                            num_key_value_heads=8, hidden_size=4096, head_dim=128)
    >>> kv_bytes(llama_8b, itemsize=2)
    131072
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * d * itemsize
