"""Tokens per second of a decode step against what the memory's bandwidth allows. By hand, on a GPU:

    python tests/bench_decode.py                                # 1.5B, in bfloat16
    python tests/bench_decode.py --shape 8B --rows 1 16 64
    python tests/bench_decode.py --shape toy --rows 1 4         # on a CPU, to try the script

Weights are random, of the shapes of R1-Distill-Qwen-1.5B and R1-Distill-Llama-8B. A step is what
`sample` does for each token: the decoder, the output layer and the choice of tokens. `graph` and
`eager` are the same slots (support/graph_slots.py) with and without CUDA graphs, `plain` those of a
CPU. The limit is the time that it takes to read all weights and all keys and values once, at the
bandwidth of a large copy; on a CPU, whose caches hold a small model, it means nothing.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from model import next_token, pick_device, pick_dtype  # noqa: E402
from support.fused_head import output_logits  # noqa: E402
from support.graph_slots import GraphSlots  # noqa: E402
from support.kv_cache import PlainSlots  # noqa: E402

SHAPES = {
    "toy": ("llama", {
        "vocab_size": 1026,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }),
    "1.5B": ("qwen2", {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }),
    "8B": ("llama", {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }),
}


def make_model(shape, device, dtype):
    """A random model in eval mode."""
    family, settings = SHAPES[shape]
    config = AutoConfig.for_model(family, max_position_embeddings=32_768, **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def make_slots(way, model, rows, longest):
    """The slots that a way of decoding uses."""
    decoder = model.get_decoder()
    if way == "plain":
        return PlainSlots(decoder, rows)
    return GraphSlots(decoder, rows, longest, graphs=way == "graph")


def wait(device):
    """Wait until the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device, dtype=torch.float32, tries=5):
    """Bytes per second that the memory moves in a copy of 1 GiB (64 MiB on a CPU)."""
    n = 2 ** 28 if device.type == "cuda" else 2 ** 24
    source = torch.zeros(n, dtype=dtype, device=device)
    target = torch.empty_like(source)
    best = 0
    for _ in range(tries):
        wait(device)
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds = time.perf_counter() - started
        best = max(best, 2 * source.nbytes / seconds)  # read and written
    return best


def bytes_per_step(model, rows, length):
    """(weights, keys and values) that a step reads of the memory, in bytes."""
    weights = sum(p.nbytes for p in model.parameters())
    embeddings = model.get_input_embeddings().weight
    if embeddings is not model.get_output_embeddings().weight:
        weights -= embeddings.nbytes  # only a few rows of it are read
    config = model.config
    d = config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * d
    return weights, rows * length * numbers * embeddings.element_size()


@torch.no_grad()
def measure(way, model, rows, prefix, steps):
    """(seconds for the first step, median seconds for a later one), each with a token chosen."""
    slots = make_slots(way, model, rows, prefix + steps + 1)
    vocabulary = model.config.vocab_size
    g = torch.Generator().manual_seed(rows)
    prefixes = torch.randint(vocabulary, (rows, prefix), generator=g).tolist()
    uniforms = torch.rand(steps + 1, rows, generator=g).to(model.device)
    hidden = slots.fill(range(rows), prefixes)
    tokens = next_token(output_logits(model, hidden), 0.6, 0.95, uniforms[0]).tolist()
    seconds = []
    for i in range(steps):
        wait(model.device)
        started = time.perf_counter()
        hidden = slots.step(tokens)
        tokens = next_token(output_logits(model, hidden), 0.6, 0.95, uniforms[i + 1]).tolist()
        seconds.append(time.perf_counter() - started)
    later = sorted(seconds[1:])
    return seconds[0], later[len(later) // 2]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="1.5B", help="whose shapes the weights have")
    add("--rows", type=int, nargs="+", default=[1, 16, 64], help="active rows")
    add("--prefix", type=int, default=1024, help="tokens that each row has before")
    add("--steps", type=int, default=100, help="tokens to decode; the median counts")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--dtype", default="auto", help="auto, float32, bfloat16")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = make_model(args.shape, device, dtype)
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{args.shape} in {dtype} on {name}; a copy moves {bandwidth / 1e9:.0f} GB/s; "
          f"rows of {args.prefix} to {args.prefix + args.steps} tokens")
    print(f"{'rows':>4} {'way':6} {'first s':>8} {'ms/step':>8} {'tokens/s':>9} "
          f"{'limit ms':>9} {'of limit':>8}")
    ways = ["plain", "eager"]
    if device.type == "cuda":
        ways.append("graph")
    for rows in args.rows:
        length = args.prefix + args.steps // 2
        limit = sum(bytes_per_step(model, rows, length)) / bandwidth
        for way in ways:
            first, later = measure(way, model, rows, args.prefix, args.steps)
            print(f"{rows:4} {way:6} {first:8.2f} {1000 * later:8.2f} {rows / later:9.0f} "
                  f"{1000 * limit:9.2f} {limit / later:8.0%}", flush=True)


if __name__ == "__main__":
    main()
