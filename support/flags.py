"""The flags that several command lines share (argparse)."""
import argparse

from support.errors import InputError
from support.stages import add_stage_flags


def refuse_below(least, flags, *names):
    """Raise InputError for one of the named flags that is below `least`; flags: a dict."""
    for name in names:
        if flags[name] != "auto" and not flags[name] >= least:  # not a number is below, too
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}.")


def refuse_wrong_sampling(args):
    """Raise InputError for sampler flags that no distribution or no completion has."""
    flags = vars(args)
    refuse_below(0, flags, "temperature")
    refuse_below(1, flags, "max_new_tokens", "in_flight")
    if not 0 < args.top_p <= 1:
        raise InputError("--top-p must be above 0 and at most 1.")
    for name, least in (("samples", 1), ("limit", 0)):
        if isinstance(flags.get(name), int):  # benchmarks.run has words for samples too
            refuse_below(least, flags, name)


def rows_flag(text):
    """The value of --batch-size: `auto`, or a number."""
    if text == "auto":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: write auto or a number from 1 on")


def add_sampler_flags(parser):
    """Add the flags of whatever samples; `sampler_from_flags` reads them."""
    add = parser.add_argument
    add("--model", required=True, help="model: directory or hub name")
    add("--server", help="sample from this OpenAI-compatible server (http://HOST:PORT/v1) that has "
        "the model, or from several, separated by commas; their key, if any, is in SERVER_API_KEY")
    add("--in-flight", type=int, default=64, help="requests sent to each server at once")
    add("--temperature", type=float, default=0.6,
        help="sampling temperature; 0 takes the most probable token")
    add("--top-p", type=float, default=0.95, help="nucleus of the distribution to sample from")
    add("--max-new-tokens", type=int, default=8192, help="longest completion, in tokens")
    add("--batch-size", type=rows_flag, default=16,
        help="rows sampled together in one process; auto: what fits into the GPU, 16 on a CPU")
    add("--seed", type=int, default=0, help="seed of every request's own generator")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="dtype of the model")
    add("--no-graph", action="store_true",
        help="on a GPU: no CUDA graphs, and memory only as rows grow; slower, for models that "
        "cannot be captured")


def add_judge_flags(parser):
    """Add the flags of whatever judges; `judge_from_flags` reads them."""
    add = parser.add_argument
    add("--judge", default="rules",
        help="`rules` (toy world), `rules:FILE`, `python:MODULE` (its class `Judge`), `local:PATH` "
        "(a model in this process), or a server https://HOST/v1, whose key is in JUDGE_API_KEY or OPENAI_API_KEY; docs/judges.md")
    add("--judge-model", help="model name to send to the server")
    add("--judge-kind", default="auto",
        choices=("auto", "chat", "qwen3guard", "llamaguard3", "wildguard"),
        help="a chat model or a guard model; auto: by the model's name")
    add("--judge-no-thinking", action="store_true",
        help="tell a chat model behind a server not to think (enable_thinking=false)")
    add("--guard-controversial", default="unsafe", choices=("unsafe", "safe"),
        help="what Qwen3Guard's verdict `Controversial` counts as")
    add("--cue-judge",
        help="another judge, a chat model, which finds the cues and answers what --judge cannot; "
        "its key: CUE_JUDGE_API_KEY; default: a guard finds the first unsafe prefix")
    add("--cue-judge-model", help="model name to send to it")
    add("--judge-concurrency", type=int, default=8,
        help="questions in flight at once; local: batch size")
    add("--judge-cache", help="file of paid verdicts, shared by processes; "
        "default: judge_cache.jsonl beside --out")
    add("--judge-price-in", type=float, default=0, help="dollars per million tokens sent")
    add("--judge-price-out", type=float, default=0, help="dollars per million tokens received")
    add("--max-cost", type=float, default=0,
        help="stop when the cache's verdicts have cost that many dollars; questions in flight may "
        "exceed it; 0 = no limit")


def add_size_flags(parser):
    """The flags that decide how much memory training takes."""
    add = parser.add_argument
    add("--model", required=True,
        help="model to start from: directory or hub name")
    add("--micro-tokens", type=int, default=16384,
        help="tokens per forward pass and rank")
    add("--lora-rank", type=int, default=0,
        help="train adapters of this rank only; try --lr 1e-4")
    add("--checkpoint-activations", action="store_true",
        help="recompute blocks in the backward pass")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="compute dtype")


def add_training_flags(parser, lr):
    """The flags of preference training that supervised fine-tuning has too."""
    add_stage_flags(parser)
    add = parser.add_argument
    # CHOICE: learning rate, batch, epochs and schedule are not in the paper; these suit an 8B
    # model.
    add("--lr", type=float, default=lr,
        help="peak learning rate")
    add("--epochs", type=int, default=1,
        help="passes over the examples")
    add("--batch-size", type=int, default=32,
        help="examples per update, over all ranks")
    add("--max-length", type=int, default=16384,
        help="longer examples are dropped and counted")
    add("--weight-decay", type=float, default=0.0,
        help="AdamW's weight decay")
    add("--clip", type=float, default=1.0,
        help="largest global gradient norm")
    add("--seed", type=int, default=0,
        help="order of the examples")
    add("--save-every", type=int, default=50,
        help="steps between checkpoints")
    add("--save-dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="dtype of the saved weights; auto: that of --model")
    add("--no-share", action="store_true",
        help="the plain way: padded rows, prefixes computed anew")
    add("--defer-sync", action="store_true",
        help="reduce gradients once per update; each rank then holds all of them, in float32")
    add("--compile", action="store_true",
        help="compile the feed-forward layers")
    add("--attn", default="sdpa", choices=("sdpa", "eager", "flash_attention_2"),
        help="kernel of --no-share")
    add("--device", default="auto",
        help="auto, cpu, cuda, ...")
