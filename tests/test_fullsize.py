"""Training at full size, on a small scale: ranks against one process, restarts, files, adapters."""
import contextlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ipo
from model import save_model
from support.errors import InputError
from support.files import read_jsonl, write_jsonl
from tests.conftest import random_model
from tests.test_support_trees import FAMILIES, some_ids, some_trees, separately

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def fork_ranks(world, function, timeout=60):
    """Run `function()` in `world` forked processes as torchrun would.

    Returns their exit codes (negative: killed).
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                function()
                code = 0
            except BaseException:  # a child must never run the parent's tests
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    codes, end = {}, time.monotonic() + timeout
    while len(codes) < world:
        for pid in set(children) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for pid in set(children) - set(codes):
                os.kill(pid, 9)
        time.sleep(0.02)
    return [codes[pid] for pid in children]


# ------------------------------------------------------------------------------------ several ranks

@pytest.fixture(scope="module")
def directories(tokenizer, tmp_path_factory):
    """Directories of a tied Llama, an untied Qwen2 (in several files) and a tied Qwen3."""
    paths = {}
    for family, settings in FAMILIES.items():
        paths[family] = tmp_path_factory.mktemp("models") / family
        random_model(len(tokenizer), spread=0.15, **settings).save_pretrained(
            paths[family], max_shard_size="20KB" if family == "qwen2" else "5GB")
        tokenizer.save_pretrained(paths[family])
    assert (paths["qwen2"] / "model.safetensors.index.json").exists()
    return paths


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """21 ragged pairs in trees of 3, 1, 3, 1, ...: batches of 4 divide evenly by nothing here."""
    g = torch.Generator().manual_seed(3)
    pairs = []
    while len(pairs) < 21:
        prefix, rejected = some_ids(g, 3, 14), some_ids(g, 2, 12)
        for _ in range(3 if len(pairs) % 4 == 0 else 1):
            pairs.append({"id": f"p{len(pairs)}", "n_prompt": 2, "prefix_ids": prefix,
                          "rejected_ids": rejected, "chosen_ids": some_ids(g, 2, 12) + [1]})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_jsonl(path, pairs[:21])
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_trees_equal_separate_passes_and_no_rank_holds_the_model(family, directories,
                                                                         tmp_path):
    sequences = some_trees()
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(len(sequences), generator=g) / len(sequences)

    def rank_main():
        device, rank, world = ipo.start_distributed("cpu")
        policy, _ = ipo.load_policy(directories[family], device, rank, world, torch.float32,
                                    checkpoint_activations=True)
        held = sum(p.to_local().numel() for p in policy.parameters())
        assert held < 0.55 * sum(p.numel() for p in policy.parameters())
        logps = policy(**policy.rows(sequences, device))
        # Both ranks compute the same, so FSDP's average is the gradient itself.
        (logps * weights).sum().backward()
        gradients = {n: p.grad.full_tensor() for n, p in policy.lm.named_parameters()}
        if rank == 0:
            torch.save((logps.detach(), gradients), tmp_path / "got.pt")

    assert fork_ranks(2, rank_main) == [0, 0]
    got, gradients = torch.load(tmp_path / "got.pt")
    model = AutoModelForCausalLM.from_pretrained(directories[family])
    expected, wanted = separately(model, sequences, weights)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-6)
    assert gradients.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(gradients[name], wanted[name], atol=1e-5, rtol=1e-5)


def train(model, pairs, out, *more, after=None):
    """Run `ipo.py train` for 24 steps here; `after` kills this process at that step."""
    if after is not None:
        real, calls = ipo.step_line, []

        def line(*arguments):
            calls.append(0)
            if len(calls) == after:
                os.kill(os.getpid(), 9)
            return real(*arguments)
        ipo.step_line = line
    ipo.main(["train", "--model", str(model), "--pairs", str(pairs), "--out", str(out),
              "--lr", "3e-4", "--batch-size", "4", "--epochs", "4", "--micro-tokens", "60",
              "--save-every", "5", "--device", "cpu", *map(str, more)])


def log_of(out):
    log = read_jsonl(out / "metrics.jsonl")
    for line in log:
        del line["tokens_per_s"]
    return log


def assert_same_run(a, b, steps=24):
    """Losses to 1e-5 and weights to 1e-4, of runs that really moved."""
    one, two = log_of(a), log_of(b)
    assert len(one) == len(two) == steps
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], abs=1e-5)
    assert [x["grad_norm"] for x in two] == pytest.approx([x["grad_norm"] for x in one], rel=1e-3)
    weights, others = (load_file(p / "model.safetensors") for p in (a, b))
    assert weights.keys() == others.keys()
    for key in weights:
        torch.testing.assert_close(weights[key], others[key], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(directories, pairs_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    train(directories["qwen3"], pairs_file, out)
    log = log_of(out)
    start, end = (load_file(p / "model.safetensors") for p in (directories["qwen3"], out))
    margin = log[0]["rewards/margins"]
    assert margin == 0, "the reference pass and the first step are the same computation"
    assert log[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] < log[0]["loss"]
    assert max((end[k] - start[k]).abs().max() for k in end) > 2e-3
    return out


@pytest.mark.parametrize("more", [
    ["--micro-tokens", 1], ["--micro-tokens", 10 ** 6, "--checkpoint-activations"]], ids=str)
def test_accumulation_and_checkpointing_do_not_change_the_result(directories, pairs_file,
                                                                 undisturbed, tmp_path, more):
    train(directories["qwen3"], pairs_file, tmp_path / "other", *more)
    assert_same_run(undisturbed, tmp_path / "other")


def test_padded_rows_learn_the_same_pairs(directories, pairs_file, undisturbed, tmp_path):
    """They draw other batches, where every pair is a tree, so no step can be compared."""
    train(directories["qwen3"], pairs_file, tmp_path / "other", "--no-share")
    plain, trees = log_of(tmp_path / "other"), log_of(undisturbed)
    assert plain[0]["rewards/margins"] == 0 and len(plain) == len(trees)
    for lines in (plain, trees):
        assert sum(x["loss"] for x in lines[-6:]) < sum(x["loss"] for x in lines[:6])


@pytest.mark.parametrize("more", [[], ["--defer-sync"]], ids=str)
def test_two_ranks_equal_one(directories, pairs_file, undisturbed, tmp_path, more):
    two = tmp_path / "two"
    assert fork_ranks(2, lambda: train(directories["qwen3"], pairs_file, two, *more)) == [0, 0]
    assert_same_run(undisturbed, two)


@pytest.mark.parametrize("before, later", [(2, 1), (1, 2), (2, 3)])
def test_killed_and_restarted_on_another_number_of_ranks(directories, pairs_file, undisturbed,
                                                         tmp_path, before, later):
    out, model = tmp_path / "killed", directories["qwen3"]
    codes = fork_ranks(before, lambda: train(model, pairs_file, out, after=13))
    assert codes[0] == -9 and all(codes), "rank 0 was killed, and no rank finished without it"
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-10"]
    assert len(log_of(out)) == 13
    reference = tmp_path / "killed.reference.json"
    stamp = reference.stat().st_mtime_ns
    assert fork_ranks(later, lambda: train(model, pairs_file, out)) == [0] * later
    assert_same_run(undisturbed, out)
    assert reference.stat().st_mtime_ns == stamp, "it was not computed again"


def test_bfloat16_keeps_float32_masters_and_agrees(directories, pairs_file, undisturbed, tmp_path):
    def rank_main():
        device, rank, world = ipo.start_distributed("cpu")
        policy, _ = ipo.load_policy(directories["qwen3"], device, rank, world, torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in policy.parameters())
    assert fork_ranks(2, rank_main) == [0, 0]

    def train_in_bfloat16(name):
        train(directories["qwen3"], pairs_file, tmp_path / name, "--dtype", "bfloat16")
    assert fork_ranks(2, lambda: train_in_bfloat16("two")) == [0, 0]
    train_in_bfloat16("one")
    expected = [line["loss"] for line in log_of(undisturbed)]
    for name in ("one", "two"):
        log = log_of(tmp_path / name)
        assert log[0]["rewards/margins"] == 0
        assert [line["loss"] for line in log] == pytest.approx(expected, abs=0.05)


def test_a_rank_that_dies_ends_the_job_with_its_own_error(directories, pairs_file, tmp_path):
    (tmp_path / "job.py").write_text(f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}]
import ipo, torch
from tests.test_fullsize import train
torch.set_num_threads(1)
real = ipo.pair_losses
def fail(*args, **keywords):
    if os.environ["RANK"] == "1":
        raise RuntimeError("rank one is out of luck")
    return real(*args, **keywords)
ipo.pair_losses = fail
ipo.record(train)({str(directories["llama"])!r}, {str(pairs_file)!r}, {str(tmp_path / "out")!r})
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(tmp_path / "job.py")], capture_output=True, text=True,
                          timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    error = re.compile(r"^(?:\[rank\d\]: )?\w+(?:Error|Exception): .*", re.MULTILINE)
    errors = error.findall(done.stderr)
    assert errors[0].endswith("RuntimeError: rank one is out of luck"), errors


# -------------------------------------------------------------------------------------------- files

def weights_of(folder):
    """All the weights in the safetensors files of a folder, by name."""
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights.update(load_file(path))
    return weights


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_directory_opens_and_has_the_same_keys(family, directories, tokenizer, tmp_path):
    """What two untrained ranks save in small files is what was loaded, bit for bit."""
    out = tmp_path / "out"

    def rank_main():
        device, rank, world = ipo.start_distributed("cpu")
        policy, _ = ipo.load_policy(directories[family], device, rank, world, torch.float32)
        out.mkdir(exist_ok=True)
        save_model(policy.lm, tokenizer, out, rank, torch.float32, limit=20_000)

    assert fork_ranks(2, rank_main) == [0, 0]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    start, end = weights_of(directories[family]), weights_of(out)
    assert start.keys() == end.keys() == index["weight_map"].keys()
    assert all(torch.equal(start[k], end[k]) for k in start)
    assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in end.values())
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == FAMILIES[family].get("tie_word_embeddings", False)


def test_weights_that_do_not_match_the_architecture_are_named(directories, tmp_path):
    weights = load_file(directories["qwen3"] / "model.safetensors")
    lacking = {k: v for k, v in weights.items() if k != "model.norm.weight"}
    extended = {**weights, "extra": torch.zeros(1)}
    bad = tmp_path / "bad"
    shutil.copytree(directories["qwen3"], bad)
    for wrong, message in ((lacking, "lack model.norm.weight"),
                           (extended, "extra has no place in a Qwen3ForCausalLM")):
        save_file(wrong, bad / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=message):
            ipo.load_policy(bad, CPU, 0, 1, torch.float32)


# --------------------------------------------------------------------------------------------- LoRA

def test_lora_starts_as_the_model_and_trains_only_its_adapters(directories):
    policy, _ = ipo.load_policy(directories["qwen2"], CPU, 0, 1, torch.float32, lora_rank=2)
    sequences = some_trees()
    model = AutoModelForCausalLM.from_pretrained(directories["qwen2"])
    expected, _ = separately(model, sequences, torch.zeros(1))
    logps = policy(**policy.rows(sequences, CPU)).detach()
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-6)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7, "two layers of seven linear layers"
    assert all("lora_" in n for n in trained)


def test_lora_is_merged_on_saving_and_ranks_and_restarts_do_not_matter(directories, pairs_file,
                                                                       tmp_path):
    model, more = directories["qwen2"], ["--lora-rank", 4, "--lr", "1e-2"]
    one, two = tmp_path / "one", tmp_path / "two"
    train(model, pairs_file, one, *more)
    assert fork_ranks(2, lambda: train(model, pairs_file, two, *more, after=8))[0] == -9
    assert fork_ranks(2, lambda: train(model, pairs_file, two, *more)) == [0, 0]
    log = log_of(one)
    assert log[0]["rewards/margins"] == 0 and log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert_same_run(one, two)
    start, end = weights_of(model), weights_of(one)
    assert start.keys() == end.keys()
    for key in start:  # what was merged has the rank of the adapters; everything else is untouched
        change = end[key] - start[key]
        if key.endswith("proj.weight"):
            assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-4) <= 4
        else:
            assert not change.any(), key
    pairs = read_jsonl(pairs_file)[:4]  # the merged model is the model that was trained
    before, after = (ipo.Policy(AutoModelForCausalLM.from_pretrained(p)) for p in (model, one))
    ipo.reference_logps(before, pairs, [range(4)], CPU, contextlib.nullcontext)
    _, metrics = ipo.pair_losses(after, pairs, CPU, 0.1, 0.2)
    assert metrics["rewards/margins"].mean() > 5 * abs(log[0]["rewards/margins"]) + 0.1
