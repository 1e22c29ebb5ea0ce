"""Throwaway models for the tests: a byte-level tokenizer trained in-process and random two-layer models."""
import os
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # several processes run at once here, and more threads than cores slow each other ten-fold

# A fork may delete these rooms; their tests then have nothing to test.
ROOT = Path(__file__).resolve().parent.parent
collect_ignore_glob = []
for room in ("studies", "benchmarks"):
    if not (ROOT / room / "__init__.py").exists():
        collect_ignore_glob += [f"test_{room}_*.py", "measure_scoring.py"]

TEXT = ("The user asks how to brew duskwort. Wait, this could hurt someone. I can explain the recipe. "
        "First take two drops of moonleaf oil. So I will decline.\n\nIt is 3.5 kg, i.e. a lot! <think>\n</think>\n\n ")
TEMPLATE = ("{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")


@pytest.fixture(scope="session")
def tokenizer():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator([TEXT] * 20, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<|pad|>", eos_token="<|end|>")
    fast.add_tokens(["<think>", "</think>"])
    fast.chat_template = TEMPLATE
    return fast


def random_model(vocab, seed=0, spread=0.3, config=LlamaConfig, cls=LlamaForCausalLM, **more):
    """A two-layer model with grouped-query attention whose random weights are large enough to prefer some tokens."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=spread,
                    pad_token_id=0, bos_token_id=None, eos_token_id=1)
    return cls(config(**{**settings, **more})).eval()


@pytest.fixture(scope="session")
def model(tokenizer):
    return random_model(len(tokenizer))


@pytest.fixture(scope="session")
def model_dir(tokenizer, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def killed():
    """Run a function in a forked child that dies by SIGKILL when `owner.name` is called for the `after`-th time."""
    def run(function, owner, name, after, half_done=None):
        pid = os.fork()
        if pid == 0:
            real, calls = getattr(owner, name), [0]

            def counted(*args, **keywords):
                calls[0] += 1
                if calls[0] == after:
                    if half_done:
                        half_done(*args)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **keywords)
            setattr(owner, name, counted)
            try:
                function()
            finally:
                os._exit(0)  # reached only when the kill did not come
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the child ended before the kill"
    return run
