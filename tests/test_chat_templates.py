"""Tokenizers and chat templates of the model families: nothing is lost, one <think> is there."""
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import render_prompt, split_reasoning
from model import load_tokenizer, round_trips
from support.errors import InputError

# ------------------------------------------------------------------------------ the tokenizer guard


def without_spaces(path):
    """What releases of transformers 5 make of R1-Distill-Llama: Metaspace instead of byte level."""
    tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    tokenizer.__init__(tokenizer_file=str(path / "tokenizer.json"))
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.backend_tokenizer.pre_tokenizer = metaspace
    return tokenizer


def test_a_tokenizer_that_loses_spaces_is_replaced_or_refused(model_dir, monkeypatch, capsys):
    assert round_trips(AutoTokenizer.from_pretrained(model_dir))
    assert not round_trips(without_spaces(model_dir))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", without_spaces)
    assert round_trips(load_tokenizer(model_dir))
    assert "does not give text back" in capsys.readouterr().out
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", without_spaces)
    with pytest.raises(InputError, match="loses spaces"):
        load_tokenizer(model_dir)


# ----------------------------------------------------------------------------------- chat templates

# Written from the documented behaviour of the families' templates, cut down to what a single-turn
# prompt meets.
TEMPLATES = {
    # The generation prompt ends inside the reasoning; of earlier answers what stands before
    # </think> is dropped.
    "R1-Distill": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
        "{% elif m['role'] == 'assistant' %}"
        "<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    ),
    # The model opens <think> itself; with enable_thinking=False an empty block is put in.
    "Qwen3": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    # No reasoning at all.
    "plain": (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    ),
}
RENDERED = {
    "R1-Distill": "<|pad|><｜User｜>Hi there<｜Assistant｜><think>\n",
    "Qwen3": "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "plain": "[user] Hi there\n[assistant] ",
}
OUTPUTS = {  # what the model writes, and how it is taken apart
    "R1-Distill": (
        "It greets.\n</think>\n\nHello.",
        ("", "It greets.\n", "</think>\n\n", "Hello.", False),
    ),
    "Qwen3": (
        "<think>\nIt greets.\n</think>\n\nHello.",
        ("<think>\n", "It greets.\n", "</think>\n\n", "Hello.", False),
    ),
    "plain": ("Hello.", ("", "Hello.", "", "", True)),
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompts_and_reasoning_of_the_families(tokenizer, family):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|pad|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATES[family]
    rendered = tokenizer.decode(render_prompt(tokenizer, "Hi there"))
    assert rendered == RENDERED[family]
    text, expected = OUTPUTS[family]
    trace = split_reasoning(text)
    assert trace == expected
    assert "".join(trace[:4]) == text
    # Inside the reasoning there is exactly one opening tag, whoever wrote it.
    assert (rendered + text).count("<think>") == (family != "plain")


@pytest.mark.parametrize("text, expected", [
    # Qwen3 that skips its thinking
    ("<think>\n\n</think>\n\nNo.", ("<think>\n\n", "", "</think>\n\n", "No.", False)),
    ("a</think>b</think>c", ("", "a", "</think>", "b</think>c", False)),
    ("<think>\nand so on", ("<think>\n", "and so on", "", "", True)),
    ("I write <think> here</think>x", ("", "I write <think> here", "</think>", "x", False)),
    ("", ("", "", "", "", True)),
    ("</think>", ("", "", "</think>", "", False)),
    ("  \n</think>\n y \n", ("", "  \n", "</think>\n ", "y \n", False)),
])
def test_reasoning_is_split_once_at_its_end(text, expected):
    trace = split_reasoning(text)
    assert trace == expected
    assert "".join(trace[:4]) == text
