"""The planner's figures against measured memory."""
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from model import empty_model
from studies import plan
from tests.conftest import random_model

ROOT = Path(__file__).resolve().parents[1]
MEASURE = """
import re, sys, torch
sys.path[:0] = [{root!r}]
import ipo
torch.set_num_threads(1)
def peak():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) * 1024
def step(folder):
    policy, _ = ipo.load_policy(folder, torch.device("cpu"), 0, 1, torch.float32, lora_rank={lora})
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    g = torch.Generator().manual_seed(0)
    for _ in range(2):
        ids = torch.randint(3, 300, (4, {tokens} // 4), generator=g).tolist()
        sequences = [(i[:len(i) // 2], i[len(i) // 2:]) for i in ids]
        policy(**policy.rows(sequences, "cpu")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
step({tiny!r})
base = peak()
step({folder!r})
print(peak() - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak memory")
@pytest.mark.parametrize("vocab, tokens, lora", [(32000, 64, 0), (16000, 1024, 4)])
def test_plan_agrees_with_measured_memory(vocab, tokens, lora, tmp_path):
    """Peak memory of two steps in a process of its own, over that of a tiny model.

    Bound by the weights, and by the activations.
    """
    tiny, folder = tmp_path / "tiny", tmp_path / "model"
    random_model(400, tie_word_embeddings=True, spread=0.15).save_pretrained(tiny)
    config = LlamaConfig(vocab_size=vocab, hidden_size=256, intermediate_size=704,
                         num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    lm = empty_model(folder, lora_rank=lora)
    needs = plan.training_needs(lm, 1, tokens, torch.float32, False, lora, "cpu")
    script = MEASURE.format(root=str(ROOT), tiny=str(tiny), folder=str(folder), lora=lora,
                            tokens=tokens)
    # The threshold makes glibc give back what is freed.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True, env=environment)
    weights = load_file(folder / "model.safetensors")
    adapters = 6 * lora * (256 * 2 * 2 + 2 * (256 + 128) + 3 * (256 + 704))
    assert needs.parameters == sum(w.numel() for w in weights.values()) + adapters
    assert needs.trained == (adapters if lora else needs.parameters)
    planned = sum(needs.memory.values())
    assert planned == pytest.approx(float(done.stdout), rel=0.25), needs.memory


def test_plan_of_an_8b_model_reads_the_config_only(tmp_path, capsys):
    config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                         num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                         tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdicts = []
    for more in (["--gpus", "8", "--checkpoint-activations"],
                 ["--gpus", "1", "--checkpoint-activations"],
                 ["--gpus", "1", "--lora-rank", "16", "--checkpoint-activations"]):
        plan.main(["--model", str(tmp_path), *more])
        shown = capsys.readouterr().out
        assert "8.0" in shown.splitlines()[0]
        verdicts.append("does NOT fit" not in shown)
    assert verdicts == [True, False, True]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, "in kB: nothing of 32 GB was made"
