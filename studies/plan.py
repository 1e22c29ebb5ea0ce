"""How much memory training will need and how fast it will be, from the model's config alone.

    python -m studies.plan --model MODEL --gpus 8 --gpu-memory 80
"""
import argparse
from typing import NamedTuple

import torch

from ipo import add_size_flags
from model import empty_model, pick_dtype
from support.errors import exit_cleanly
from support.fused_head import chunk_sizes


class Needs(NamedTuple):
    """What training takes: of the model, and of one rank at its peak."""
    parameters: int        # of the model, adapters included
    trained: int           # of these, how many are trained
    memory: dict           # kind of memory -> bytes per rank
    operations: int        # arithmetic operations per token


def numbers_in(parameters):
    """How many numbers some parameters hold in all."""
    return sum(p.numel() for p in parameters)


def training_needs(
    lm, gpus, micro_tokens, dtype, checkpointed, lora_rank=0, device="cuda"
):
    """The `Needs` of training `lm`, a model on the meta device (`model.empty_model`).

    Activations are what a Llama block keeps for its backward pass; the frameworks' own memory,
    about 1 GB on a GPU, is not in it.
    """
    config = lm.config
    layers = lm.get_decoder().layers
    itemsize = dtype.itemsize
    total = numbers_in(lm.parameters())
    trained = numbers_in(p for p in lm.parameters() if p.requires_grad)
    blocks = numbers_in(layers.parameters())
    embeddings = numbers_in(lm.get_input_embeddings().parameters())
    outside = total - blocks

    # FSDP holds the root and two blocks gathered; autocast holds a cast copy of what is trained.
    gathered = 0
    if gpus > 1:
        gathered = itemsize * (outside + 2 * blocks / len(layers))
    elif itemsize < 4:
        gathered = itemsize * trained

    gradients = 4 * trained / gpus
    if not lora_rank and gpus == 1:
        gradients += 4 * embeddings  # `TokenLogps` sums the head's gradient in float32
    elif not lora_rank:
        # Of the root before sharding: as computed, and in float32 to be summed over ranks.
        gradients += (itemsize + 4) * outside

    chunk, waiting = chunk_sizes(device, config.vocab_size)
    scored = micro_tokens // 2  # CHOICE: half of the tokens are suffixes
    logits = 8 * config.vocab_size * min(chunk, scored)
    logits += 4 * min(waiting, scored * config.vocab_size)

    memory = {
        "weights": (4 * trained + (total - trained) * itemsize) / gpus,
        "gathered": gathered,
        "gradients": gradients,
        "optimizer": 8 * trained / gpus,
        "activations": micro_tokens * token_bytes(config, itemsize, checkpointed),
        "logits": logits,
    }
    multiplied = total if config.tie_word_embeddings else total - embeddings
    passes = 4 if lora_rank else 6  # frozen weights need no gradient of their own
    return Needs(total, trained, memory, passes * multiplied)


def token_bytes(config, itemsize, checkpointed):
    """Bytes that the blocks of a model keep of one token for the backward pass."""
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    keys_and_values = config.num_key_value_heads * head_dim
    numbers = 9 * config.hidden_size + 4 * keys_and_values + 4 * config.intermediate_size
    one_block = itemsize * numbers
    if itemsize < 4:
        one_block += 8 * config.hidden_size  # the norms compute in float32
    all_blocks = one_block * config.num_hidden_layers
    if checkpointed:
        # Each block's input, and one block at a time in full.
        all_blocks = itemsize * config.hidden_size * config.num_hidden_layers + one_block
    return all_blocks + 2 * itemsize * config.intermediate_size


def print_plan(needs, name, gpus, gpu_memory, tflops, mfu):
    """Print what training `name` needs of each rank, and whether it fits."""
    print(
        f"{name}: {needs.parameters / 1e9:.3f} B parameters, "
        f"{needs.trained / 1e9:.3f} B trained, {gpus} GPU(s)"
    )
    together = sum(needs.memory.values())
    for kind, size in {**needs.memory, "together": together}.items():
        print(f"  {kind:12}{size / 1e9:8.2f} GB per rank")
    verdict = "does NOT fit"
    if together < 0.92 * gpu_memory * 1e9:  # CHOICE: 8% for kernels and fragmentation
        verdict = "fits"
    speed = gpus * tflops * 1e12 * mfu / needs.operations
    print(f"  {verdict} in {gpu_memory:g} GB; about {speed:,.0f} tokens/s")


def build_parser():
    """The command line of this study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.plan",
        description="Memory and speed of training, from the model's config alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_size_flags(parser)
    add = parser.add_argument
    add("--gpus", type=int, default=1, help="ranks")
    add("--gpu-memory", type=float, default=80, help="GB of each")
    add(
        "--tflops", type=float, default=989,
        help="peak of each in the compute dtype (H100: 989)",
    )
    add("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    return parser


def main(argv=None):
    """Print the plan for one model."""
    args = build_parser().parse_args(argv)
    dtype = pick_dtype(args.dtype, torch.device("cuda"))
    lm = empty_model(args.model, lora_rank=args.lora_rank, frozen_dtype=dtype)
    needs = training_needs(
        lm, args.gpus, args.micro_tokens, dtype, args.checkpoint_activations, args.lora_rank
    )
    print_plan(needs, args.model, args.gpus, args.gpu_memory, args.tflops, args.mfu)


if __name__ == "__main__":
    exit_cleanly(main)
