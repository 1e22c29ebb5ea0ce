import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ipo
from data import collate, load_pairs, micro_batches
from support.errors import InputError
from support.files import read_jsonl, write_json, write_jsonl
from support.trees import tree_parts
from tests.conftest import random_model

ROOT = Path(__file__).resolve().parents[1]


def some_pairs(n=10, vocab=60, seed=0):
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(2, vocab, (length,), generator=g).tolist()
    pairs = []
    for i in range(n):
        prompt, prefix = ids(3, 6), ids(0, 9)
        pairs.append({"id": f"p{i}", "n_prompt": len(prompt), "prefix_ids": prompt + prefix,
                      "chosen_ids": ids(2, 12) + [1], "rejected_ids": ids(2, 12) + [1]})
    return pairs


# ------------------------------------------------------------------------------------------- loss

def test_preference_loss_by_hand():
    t = torch.tensor
    losses, chosen, rejected = ipo.preference_loss(
        t([-10.0, -4.0]), t([-20.0, -4.0]), t([-12.0, -4.0]), t([-15.0, -4.0]), beta=0.1)
    # pair 1: log-ratios +2 and -5, so the logit is 0.1 * 7; pair 2: no difference
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-0.7)), math.log(2)], abs=1e-6)
    assert chosen.tolist() == pytest.approx([0.2, 0.0])
    assert rejected.tolist() == pytest.approx([-0.5, 0.0])


def test_preference_loss_equals_dpo_and_pushes_the_right_way():
    g = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(7, generator=g, requires_grad=True) for _ in range(4))
    losses, chosen, rejected = ipo.preference_loss(a, b, c, d, beta=0.3)
    torch.testing.assert_close(losses, -torch.log(torch.sigmoid(0.3 * ((a - b) - (c - d)))))
    losses.sum().backward()
    assert (a.grad < 0).all() and (b.grad > 0).all(), "descent must raise chosen and lower rejected"
    assert not chosen.requires_grad and not rejected.requires_grad


def with_reference(pairs, model, device="cpu"):
    reference = ipo.Policy(model)
    one_by_one = [[i] for i in range(len(pairs))]
    ipo.reference_logps(reference, pairs, one_by_one, device, contextlib.nullcontext)
    return reference


def test_step_0_is_log_2_plus_the_sft_term_and_margins_are_0():
    pairs = some_pairs()
    policy = with_reference(pairs, random_model(60))
    losses, metrics = ipo.pair_losses(policy, pairs, "cpu", beta=0.1, sft_weight=0.2)
    assert metrics["loss/preference"].tolist() == pytest.approx([math.log(2)] * 10, abs=1e-4)
    assert metrics["rewards/margins"].abs().max() < 1e-4
    nll = []  # oracle for L_sft: torch's own mean cross-entropy over the chosen suffix
    for p in pairs:
        ids = torch.tensor([p["prefix_ids"] + p["chosen_ids"]])
        n = len(p["prefix_ids"])
        logits = policy.lm(ids).logits[0, n - 1:-1]
        nll.append(torch.nn.functional.cross_entropy(logits, ids[0, n:]).item())
    assert metrics["loss/sft"].tolist() == pytest.approx(nll, abs=1e-5)
    assert losses.tolist() == pytest.approx([math.log(2) + 0.2 * x for x in nll], abs=1e-4)


def test_the_shared_prefix_cancels_in_the_preference_loss():
    """Scoring the whole trajectory, z[:h] too, gives the same L_pref and gradient."""
    pairs = some_pairs()
    with_reference(pairs, random_model(60))
    suffix_ref = [p["ref"] for p in pairs]
    policy = ipo.Policy(random_model(60, seed=1))  # not the reference, so the log-ratios are not 0
    results = []
    for score_from in ("h", "prompt"):
        if score_from == "prompt":
            one_by_one = [[i] for i in range(10)]
            ipo.reference_logps(ipo.Policy(random_model(60)), pairs, one_by_one, "cpu",
                                contextlib.nullcontext, "prompt")
            assert [p["ref"] for p in pairs] != suffix_ref
        _, metrics = ipo.pair_losses(policy, pairs, "cpu", 0.1, 0.2, score_from)
        policy.zero_grad()
        metrics["loss/preference"].sum().backward()
        results.append((metrics, [p.grad.clone() for p in policy.parameters()]))
    (suffix, g1), (full, g2) = results
    assert (suffix["rewards/margins"].abs() > 0.05).any()
    torch.testing.assert_close(suffix["loss/preference"], full["loss/preference"],
                               atol=1e-5, rtol=1e-5)
    for a, b in zip(g1, g2):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    difference = (suffix["loss/sft"] - full["loss/sft"]).abs().max()
    assert difference > 0.01, "L_sft is where the two readings differ"


def test_trigger_tokens_are_scored_and_prefix_tokens_are_not():
    pair = {"prefix_ids": [5, 6, 7], "chosen_ids": [20, 21, 8, 1], "rejected_ids": [9, 1],
            "n_prompt": 2}
    batch = collate(ipo.pair_sequences(pair))
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0, 0]]
    assert ipo.pair_sequences(pair, "prompt") == [([5, 6], [7, 20, 21, 8, 1]), ([5, 6], [7, 9, 1])]


# ---------------------------------------------------------------------------------------- batches

def test_micro_batches_partition_the_batch_and_keep_ranks_in_step():
    parts = []
    for i, n in enumerate([3, 50, 7, 8, 20, 5, 9]):
        parts.append({f"trunk {i % 4}": 6, f"branch {i}": n})
    for world in (1, 2, 3):
        shares = [micro_batches([6, 0, 3, 1, 4, 2, 5], parts, 24, r, world) for r in range(world)]
        assert len({len(s) for s in shares}) == 1
        assert sorted(i for s in shares for m in s for i in m) == list(range(7))
        for micro in (m for s in shares for m in s if len(m) > 1):
            assert sum({k: n for i in micro for k, n in parts[i].items()}.values()) <= 24


@pytest.mark.parametrize("share", [False, True])
def test_micro_batch_size_does_not_change_the_gradient(share):
    pairs = some_pairs()
    parts = [tree_parts(ipo.pair_sequences(p)) for p in pairs]
    norms = []
    for budget in (1, 60, 10_000):
        with_reference(pairs, random_model(60))
        policy = ipo.Policy(random_model(60), share)
        for micro in micro_batches(list(range(10)), parts, budget):
            losses, _ = ipo.pair_losses(policy, [pairs[i] for i in micro], "cpu", 0.1, 0.2)
            (losses.sum() / 10).backward()
        norms.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(norms[0], norms[2], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(norms[1], norms[2], atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------- whole runs

@pytest.fixture
def pairs_file(tmp_path, tokenizer):
    write_jsonl(tmp_path / "pairs.jsonl", some_pairs(14, len(tokenizer)))
    return tmp_path / "pairs.jsonl"


def arguments(model_dir, pairs_file, out, *more):
    return ["train", "--model", str(model_dir), "--pairs", str(pairs_file), "--out", str(out),
            "--lr", "1e-3", "--batch-size", "4", "--epochs", "3", "--micro-tokens", "128",
            "--save-every", "3", "--device", "cpu", *more]


def without_times(out):
    log = read_jsonl(out / "metrics.jsonl")
    for line in log:
        del line["tokens_per_s"]
    return log


def test_saved_weights_have_the_dtype_that_is_asked_for(model_dir, pairs_file, tmp_path):
    for dtype in ("auto", "float32", "bfloat16"):
        ipo.main(arguments(model_dir, pairs_file, tmp_path / dtype, "--epochs", "1",
                           "--save-dtype", dtype))
    auto, full, half = (load_file(tmp_path / d / "model.safetensors")
                        for d in ("auto", "float32", "bfloat16"))
    for key in full:
        assert torch.equal(auto[key], full[key]) and torch.equal(full[key].bfloat16(), half[key])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert saved.dtype == torch.bfloat16


def test_padded_rows_learn_the_same_batches_in_the_same_order(model_dir, tokenizer, tmp_path):
    """Trees of 3, 1, 3, 1, ... pairs: the plain layout is an oracle for the final weights."""
    pairs = some_pairs(24, len(tokenizer))
    for i, pair in enumerate(pairs):
        tree = pairs[i - i % 4]
        if i % 4 < 3:
            pair |= {key: tree[key] for key in ("prefix_ids", "rejected_ids", "n_prompt")}
    write_jsonl(tmp_path / "trees.jsonl", pairs)
    weights = []
    for name, more in (("trees", []), ("padded", ["--no-share"])):
        ipo.main(arguments(model_dir, tmp_path / "trees.jsonl", tmp_path / name, *more))
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    trees, padded = weights
    start = load_file(model_dir / "model.safetensors")
    difference = sum((trees[k] - padded[k]).square().sum() for k in start).sqrt()
    update = sum((trees[k] - start[k]).square().sum() for k in start).sqrt()
    assert update > 0.1
    assert difference < 1e-5 * update


@pytest.mark.parametrize(
    "flag", ["--save-every", "--batch-size", "--micro-tokens", "--epochs", "--max-length"])
def test_a_count_of_zero_is_refused(flag, model_dir, pairs_file, tmp_path):
    with pytest.raises(InputError, match=f"{flag} must be at least 1"):
        ipo.main(arguments(model_dir, pairs_file, tmp_path / "out", flag, "0"))
    assert not (tmp_path / "out").exists()


def test_training_learns_saves_and_is_not_repeated(model_dir, pairs_file, tmp_path, capsys):
    out = tmp_path / "trained"
    ipo.main(arguments(model_dir, pairs_file, out))
    log = without_times(out)
    assert len(log) == 12
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert log[0]["loss"] == pytest.approx(math.log(2) + 0.2 * log[0]["loss/sft"], abs=1e-4)
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["rewards/accuracies"] > 0.7
    model = AutoModelForCausalLM.from_pretrained(out)
    start = load_file(model_dir / "model.safetensors")
    end = load_file(out / "model.safetensors")
    assert start.keys() == end.keys() and all(start[k].dtype == end[k].dtype for k in start)
    assert model.generation_config.eos_token_id == 1
    assert not list(out.glob("checkpoint*")) and (out / "tokenizer.json").exists()
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    ipo.main(arguments(model_dir, pairs_file, out))
    assert "finished before" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("step", [2, 3, 4, 11, 12])
def test_killed_training_picks_up_and_ends_with_the_same_weights(model_dir, pairs_file, tmp_path,
                                                                 killed, step):
    undisturbed = tmp_path / "undisturbed"
    ipo.main(arguments(model_dir, pairs_file, undisturbed))
    out = tmp_path / "killed"
    killed(lambda: ipo.main(arguments(model_dir, pairs_file, out)), ipo, "step_line", after=step)
    ipo.main(arguments(model_dir, pairs_file, out))
    assert without_times(out) == without_times(undisturbed)
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (undisturbed / "model.safetensors").read_bytes()


def test_two_ranks_give_the_result_of_one(model_dir, pairs_file, tmp_path):
    ipo.main(arguments(model_dir, pairs_file, tmp_path / "one"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2"]
    command = arguments(model_dir, pairs_file, tmp_path / "two")
    subprocess.run([*torchrun, str(ROOT / "ipo.py"), *command], check=True, env=env, timeout=120)
    one, two = without_times(tmp_path / "one"), without_times(tmp_path / "two")
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], abs=1e-5)
    norms = [[line["grad_norm"] for line in log] for log in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    start = load_file(model_dir / "model.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=0)
    moved = max((a[k] - start[k]).abs().max() for k in a)
    assert moved > 1e-3, "training must have moved the weights"


@pytest.fixture
def other_dir(model_dir, tokenizer, tmp_path):
    random_model(len(tokenizer), seed=5).save_pretrained(tmp_path / "another")
    tokenizer.save_pretrained(tmp_path / "another")
    return tmp_path / "another"


def test_another_reference_is_used_and_not_trained(model_dir, other_dir, pairs_file, tmp_path):
    out = tmp_path / "out"
    ipo.main(arguments(model_dir, pairs_file, out, "--reference", str(other_dir)))
    pairs = read_jsonl(pairs_file)
    stored = json.loads((tmp_path / "out.reference.json").read_text())["logps"]
    # Oracle: padded rows, no cache.
    with_reference(pairs, AutoModelForCausalLM.from_pretrained(other_dir).eval())
    for p in pairs:
        assert stored[p["id"]] == pytest.approx(p["ref"], abs=1e-3)
    margin = without_times(out)[0]["rewards/margins"]
    assert abs(margin) > 1e-3, "model and reference differ, so the margin is not 0"
    start, end = (load_file(p / "model.safetensors") for p in (model_dir, out))
    moved = max((end[k] - start[k]).abs().max() for k in start)
    assert moved < 0.05, "training starts from --model, not from the reference"


def test_no_pairs_passes_the_model_on(model_dir, other_dir, tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("")
    ipo.main(arguments(model_dir, tmp_path / "none.jsonl", tmp_path / "out",
                       "--reference", str(other_dir)))
    assert "nothing to train on" in capsys.readouterr().out
    a, b = (load_file(p / "model.safetensors") for p in (model_dir, tmp_path / "out"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_long_pairs_are_dropped_and_counted(pairs_file):
    pairs = read_jsonl(pairs_file)
    sizes = []
    for p in pairs:
        sizes.append(len(p["prefix_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])))
    limit = sorted(sizes)[6]
    kept, dropped = load_pairs([pairs_file], limit)
    assert dropped == sum(size > limit for size in sizes) > 0
    assert len(kept) + dropped == len(pairs)


def test_bad_pairs_name_file_and_record(tmp_path):
    pair = {"id": "a", "prefix_ids": [1], "chosen_ids": [2], "rejected_ids": []}
    write_jsonl(tmp_path / "p.jsonl", [pair])
    message = r"p\.jsonl, record 1: rejected_ids must be a non-empty list"
    with pytest.raises(InputError, match=message):
        load_pairs([tmp_path / "p.jsonl"], 100)
    for wrong in ("text", [1, 2.5], [1, "2"], {"1": 2}, None, 7, [2 ** 31]):
        write_jsonl(tmp_path / "p.jsonl", [{**pair, "rejected_ids": wrong}])
        with pytest.raises(InputError, match=message):
            load_pairs([tmp_path / "p.jsonl"], 100)
    write_jsonl(tmp_path / "p.jsonl", [{**pair, "rejected_ids": [3]}])
    with pytest.raises(InputError, match=r"p\.jsonl, record 1: no n_prompt"):
        load_pairs([tmp_path / "p.jsonl"], 100)


def test_a_reference_of_other_weights_is_not_reused(model_dir, pairs_file, tmp_path):
    ipo.main(arguments(model_dir, pairs_file, tmp_path / "a"))
    stored = json.loads((tmp_path / "a.reference.json").read_text())
    out = tmp_path / "b"
    shutil.copytree(model_dir, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    scaled = {k: v * 1.1 for k, v in weights.items()}
    save_file(scaled, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    write_json(tmp_path / "b.reference.json", stored)  # left over from another model
    ipo.main(arguments(tmp_path / "other", pairs_file, out))
    assert abs(without_times(out)[0]["rewards/margins"]) < 1e-4
