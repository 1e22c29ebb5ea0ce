"""Supervised fine-tuning: the same training loop on completions alone, without a reference.

    python -m studies.sft --model MODEL --data pairs.jsonl --out runs/my/sft

`--data` takes JSON lines with the texts `prompt` and `completion`, or pairs, whose chosen side is
learned. The paper's Figure 7 compares the result with preference training.
"""
import argparse
import functools

import torch

from data import global_batches, render_prompt
from ipo import (
    add_size_flags,
    add_training_flags,
    close_training,
    dtype_to_save,
    fit,
    load_policy,
    open_training,
    start_distributed,
    token_parts,
    training_settings,
)
from model import load_tokenizer, pick_dtype, save_model
from support.compact import compact_record
from support.errors import InputError, exit_cleanly
from support.files import stream_jsonl


def completion_losses(policy, examples, device):
    """Losses (B,): the mean negative log-likelihood of each completion's tokens, and no metrics."""
    sequences = [(e["prefix_ids"], e["chosen_ids"]) for e in examples]
    logps = policy(**policy.rows(sequences, device))  # (B,)
    lengths = [len(completion) for _, completion in sequences]
    return -logps / torch.tensor(lengths, device=device), {}


def load_completions(paths, tokenizer, max_length):
    """Read the examples to learn from; returns (examples, number dropped as too long).

    An example is the chosen side of a pair record, or a record with the texts `prompt` and
    `completion`. Raises InputError for a record that is neither.
    """
    examples = []
    dropped = 0
    for path in paths:
        for number, record in enumerate(stream_jsonl(path), 1):
            place = f"{path}, record {number}"
            if "chosen_ids" not in record:
                record = encode_texts(record, tokenizer, place)
            example = compact_record(record, ("prefix_ids", "chosen_ids"), (), place)
            length = len(example["prefix_ids"]) + len(example["chosen_ids"])
            if length > max_length:
                dropped += 1
            else:
                examples.append(example)
    return examples, dropped


def encode_texts(record, tokenizer, place):
    """Token ids of a record's `prompt`, as the chat template renders it, and `completion`."""
    for field in ("prompt", "completion"):
        if not isinstance(record.get(field), str):
            raise InputError(
                f"{place}: needs the texts `prompt` and `completion`, or the ids of a pair."
            )
    ids = tokenizer.encode(record["completion"], add_special_tokens=False)
    return {
        "prefix_ids": render_prompt(tokenizer, record["prompt"]),
        "chosen_ids": ids + [tokenizer.eos_token_id],
    }


def train_on_completions(
    files, *, model, out, flags, device, dtype, share, loading, batch_size, epochs, seed,
    max_length, micro_tokens, fitting, save_dtype,
):
    """Supervised fine-tuning from files to a saved model; the settings are those of `ipo.train`."""
    device, rank, world = start_distributed(device)
    if open_training(__file__, out, flags, [model, *files], rank, world):
        return

    tokenizer = load_tokenizer(model)
    examples, dropped = load_completions(files, tokenizer, max_length)
    rows = ([(e["prefix_ids"], e["chosen_ids"])] for e in examples)
    parts = token_parts(rows, share)
    # CHOICE: unlike pairs, completions of one prompt are not kept in one batch, because they may be
    # so many that a batch would hold that prompt alone. So no two examples share a part.
    unshared = [{i: 1} for i in range(len(examples))]
    batches = global_batches(unshared, batch_size, epochs, seed)

    dtype = pick_dtype(dtype, device)
    policy, autocast = load_policy(model, device, rank, world, dtype, share=share, **loading)
    losses_of = functools.partial(completion_losses, device=device)
    log = fit(
        policy, examples, losses_of, parts, out=out, rank=rank, world=world, autocast=autocast,
        batches=batches, micro_tokens=micro_tokens, **fitting,
    )
    save_model(policy.lm, tokenizer, out, rank, dtype_to_save(save_dtype, model))
    counts = {
        "examples": len(examples) + dropped,
        "short enough": len(examples),
        "steps": len(log),
    }
    close_training(out, counts, rank, world)


def build_parser():
    """The command line of this study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.sft",
        description="Supervised fine-tuning on completions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_size_flags(parser)
    parser.add_argument("--out", required=True, help="directory for the trained model")
    parser.add_argument(
        "--data", required=True, nargs="+",
        help="JSONL with prompt and completion, or pairs",
    )
    add_training_flags(parser, lr=1e-5)
    return parser


def main(argv=None):
    """Run the study from the command line."""
    args = build_parser().parse_args(argv)
    train_on_completions(args.data, **training_settings(args))


if __name__ == "__main__":
    exit_cleanly(main)
