"""Rebuild the tiny model and its prompt sets from scratch, with the project's own code.

    python toy/make.py                                # 12 minutes on one core: model and prompts
    python toy/make.py --base MODEL --out runs/base   # teach another model the same world

Everything is drawn from the seeds below (corpus and weights: --seed, 1). The corpus itself is not
kept: it is made again from `toy/world.py`. The tiny model trains with one thread, so that the
number of cores changes nothing: on the same versions and kind of processor its weights are the
committed ones, bit for bit.
"""
import argparse
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROMPTS = ROOT / "prompts"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import GenerationConfig, LlamaConfig  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from data import load_triggers, render_prompt  # noqa: E402
from model import load_tokenizer  # noqa: E402
from support.errors import exit_cleanly  # noqa: E402
from support.files import write_json, write_jsonl  # noqa: E402
from toy.commands import run  # noqa: E402
from toy.world import corpus, make_world, prompt_sets, rules, teacher_traces, text  # noqa: E402

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
# Like R1-Distill's, the template ends inside the reasoning.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "<|user|>{{ m['content'] }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# Another model is taught with few exchanges: they are kept for the domain `safety`.
NOT_TAUGHT = ("columns", "sentence")
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def make_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer with single digits, in the form that transformers loads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:],
    )
    # Like the real families: not special, so decoding keeps them.
    fast.add_tokens(["<think>", "</think>"], special_tokens=False)
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer, seed, layers=4, hidden=128):
    """A Llama of about a million parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
    )
    return model


def write_corpus(world, path, count, seed, opening="", without=()):
    """Write `count` exchanges as the records that `studies.sft` reads; returns them.

    opening: what stands before the reasoning; without: kinds of exchange to leave out.
    """
    pools = {name: load_triggers(PROMPTS / f"{name}.txt") for name in ("triggers", "checks")}
    (instruction,) = load_triggers(PROMPTS / "instruction.txt")
    records = []
    for example in corpus(world, count, pools, instruction, seed, without):
        completion = opening + text(example)
        records.append({"prompt": example.prompt, "completion": completion})
    write_jsonl(path, records)
    return records


def fine_tune(model, examples, out, *flags):
    """Train a model on the corpus with the command that anyone would use."""
    run(
        "-m", "studies.sft", "--model", model, "--data", examples, "--out", out,
        "--save-every", 1000000, *flags,
    )


def build_model(world, folder, count, seed):
    """Write the corpus, a tokenizer learned from it and the model trained on it into `folder`.

    Returns the directory of the trained model.
    """
    records = write_corpus(world, folder / "corpus.jsonl", count, seed)
    texts = [f"{r['prompt']}\n{r['completion']}" for r in records[:20000]]
    tokenizer = make_tokenizer(texts, vocab_size=1024)
    model = make_model(tokenizer, seed)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
    model.save_pretrained(folder / "init")
    tokenizer.save_pretrained(folder / "init")
    os.environ["OMP_NUM_THREADS"] = "1"  # sums are rounded in another order with more
    fine_tune(
        folder / "init", folder / "corpus.jsonl", folder / "model", "--lr", 2e-3,
        "--batch-size", 32, "--seed", seed, "--dtype", "float32", "--device", "cpu",
    )
    return folder / "model"


def teach(world, base, out, count, seed, more):
    """Fine-tune a pre-trained model on the corpus: it learns the world, and to think before it
    answers. more: further words of the command line of `studies.sft`."""
    tokenizer = load_tokenizer(base)
    prompt = tokenizer.decode(render_prompt(tokenizer, "Hello."))
    opening = "<think>\n"
    if prompt.endswith(opening):  # the chat template has opened the reasoning already
        opening = ""
    corpus_file = out.with_name(out.name + ".corpus.jsonl")
    write_corpus(world, corpus_file, count, seed, opening, NOT_TAUGHT)
    fine_tune(base, corpus_file, out, "--lr", 5e-4, "--batch-size", 16, "--seed", seed, *more)


def main():
    """Write prompts and rules and, unless --data-only, the model; or teach the world to --base."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", help="where to write model, prompts and rules.json (default: toy/); "
                      "with --base, the folder of the taught model")
    add("--examples", type=int, help="exchanges in the corpus (default: 53000; with --base 1600)")
    add("--seed", type=int, default=1)
    add("--data-only", action="store_true", help="write prompts and rules.json, keep the model")
    add("--base", help="teach the world to this model (directory or hub name) instead of "
                       "training one from scratch")
    add("--train-args", default="", help="with --base: more flags for studies.sft, as in "
                                         "'--lr 3e-4 --dtype bfloat16'")
    args = parser.parse_args()
    if args.examples is not None and args.examples < 1:
        parser.error("--examples: at least 1")
    if args.train_args and not args.base:
        parser.error("--train-args needs --base; the tiny model is trained as it always was")
    if args.base and args.data_only:
        parser.error("--base has no data of its own; leave out --data-only")

    world = make_world()
    if args.base:
        if not args.out:
            parser.error("--base also needs --out, a folder for the model")
        teach(world, args.base, Path(args.out), args.examples or 1600, args.seed,
              shlex.split(args.train_args))
        return
    out = Path(args.out or HERE)
    for name, prompts in prompt_sets(world).items():
        write_jsonl(out / "prompts" / f"{name}.jsonl", prompts)
    triggers = load_triggers(PROMPTS / "triggers.txt")
    write_jsonl(out / "prompts" / "train_teacher.jsonl", teacher_traces(world, triggers))
    write_json(out / "rules.json", rules(world))
    if args.data_only:
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = build_model(world, Path(scratch), args.examples or 53000, args.seed)
        (out / "model").mkdir(parents=True, exist_ok=True)
        for name in MODEL_FILES:
            shutil.copy(model / name, out / "model" / name)


if __name__ == "__main__":
    exit_cleanly(main)
