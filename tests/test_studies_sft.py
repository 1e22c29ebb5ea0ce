"""Supervised fine-tuning with the training loop of preference training."""
import pytest

from studies import sft
from support.errors import InputError
from support.files import read_jsonl, write_jsonl


def train(model_dir, examples, out, *more):
    """Fine-tune the random model on a file of records; returns the metrics of each step."""
    path = out.with_suffix(".jsonl")
    write_jsonl(path, examples)
    sft.main(["--model", str(model_dir), "--data", str(path), "--out", str(out), "--lr", "3e-3",
              "--batch-size", "4", "--device", "cpu", *more])
    return read_jsonl(out / "metrics.jsonl")


def test_sft_lowers_the_loss_of_completions(model_dir, tmp_path):
    examples = [{"prompt": "How?", "completion": "So.\n</think>\n\nLike this."}] * 8
    log = train(model_dir, examples, tmp_path / "o", "--epochs", "5")
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


def test_the_chosen_side_of_a_pair_and_its_texts_are_the_same_example(model_dir, tokenizer,
                                                                      tmp_path):
    texts = [{"prompt": "How?", "completion": "Like this."}]
    prefix = sft.render_prompt(tokenizer, "How?")
    ids = tokenizer.encode("Like this.", add_special_tokens=False) + [tokenizer.eos_token_id]
    pairs = [{"id": "a", "prefix_ids": prefix, "chosen_ids": ids, "rejected_ids": [5]}]
    from_texts = train(model_dir, texts, tmp_path / "texts")
    from_pairs = train(model_dir, pairs, tmp_path / "pairs")
    assert from_texts[0]["loss"] == from_pairs[0]["loss"]


def test_records_that_are_neither_are_named_and_long_ones_counted(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    write_jsonl(path, [{"prompt": "How?", "completion": "So. " * n} for n in (1, 50)])
    examples, dropped = sft.load_completions([path], tokenizer, max_length=40)
    assert len(examples) == dropped == 1
    write_jsonl(path, [{"prompt": "How?", "completion": "So."}, {"prompt": "How?"}])
    with pytest.raises(InputError, match=r"c\.jsonl, record 2: needs the texts"):
        sft.load_completions([path], tokenizer, max_length=40)
