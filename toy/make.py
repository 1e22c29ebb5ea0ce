"""Rebuild the embedded model and its prompt sets from scratch, with the project's own fine-tuning code:

    python toy/make.py                  # 10 to 20 minutes on two CPU cores; writes toy/model, toy/prompts, toy/rules.json

Everything is drawn from the seeds below (corpus and weights: --seed, 1). The corpus itself is not kept: it is made again
from `toy/world.py`. The committed weights were trained by this command on another order of the same examples, so a new run
gives a model of the same kind, not the same bits: one had 65.5% and 85.0% harmful reasoning on the two held-out harmful
sets (the committed one 71.0% and 87.5%), benign compliance 100% (100%) and addition 97% (100%).
"""
import argparse
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

import data  # noqa: E402
import ipo  # noqa: E402
from toy import world as toy_world  # noqa: E402

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
# Like R1-Distill's, the template ends inside the reasoning.
TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")


def make_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer with single digits, in the form that transformers loads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1],
                                   additional_special_tokens=SPECIAL[2:])
    fast.add_tokens(["<think>", "</think>"], special_tokens=False)  # like the real families: not special, so kept
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer, seed, layers=4, hidden=128):
    """A Llama of about a million parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 11 // 4,
                         num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
                         eos_token_id=tokenizer.eos_token_id, dtype="float32")
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0, do_sample=True,
                                               temperature=0.6, top_p=0.95)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(HERE), help="where to write model, prompts and rules.json")
    parser.add_argument("--examples", type=int, default=80000, help="exchanges in the corpus")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data-only", action="store_true", help="write prompts and rules.json, keep the model")
    args = parser.parse_args()
    out, world = Path(args.out), toy_world.make_world()
    for name, prompts in toy_world.prompt_sets(world).items():
        data.write_jsonl(out / "prompts" / f"{name}.jsonl", prompts)
    data.write_json(out / "rules.json", toy_world.rules(world))
    if args.data_only:
        return
    triggers = data.load_triggers(HERE.parent / "prompts" / "triggers.txt")
    examples = list(toy_world.corpus(world, args.examples, triggers, args.seed))
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        data.write_jsonl(scratch / "corpus.jsonl",
                         [{"prompt": e.prompt, "completion": toy_world.text(e)} for e in examples])
        tokenizer = make_tokenizer((e.prompt + "\n" + toy_world.text(e) for e in examples[:20000]), vocab_size=1024)
        model = make_model(tokenizer, args.seed)
        print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
        model.save_pretrained(scratch / "init")
        tokenizer.save_pretrained(scratch / "init")
        ipo.main(["sft", "--model", str(scratch / "init"), "--data", str(scratch / "corpus.jsonl"),
                  "--out", str(scratch / "model"), "--lr", "2e-3", "--batch-size", "32", "--epochs", str(args.epochs),
                  "--seed", str(args.seed), "--save-every", "1000000", "--dtype", "float32", "--device", "cpu"])
        keep = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                "tokenizer_config.json", "chat_template.jinja"]
        (out / "model").mkdir(parents=True, exist_ok=True)
        for name in keep:
            shutil.copy(scratch / "model" / name, out / "model" / name)


if __name__ == "__main__":
    main()
