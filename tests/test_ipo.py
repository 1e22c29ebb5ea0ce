import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import data
import ipo
from tests.conftest import random_model

ROOT = Path(__file__).resolve().parents[1]


def some_pairs(n=10, vocab=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    def ids(low, high):
        return torch.randint(2, vocab, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()
    pairs = []
    for i in range(n):
        prompt, prefix = ids(3, 6), ids(0, 9)
        pairs.append({"id": f"p{i}", "n_prompt": len(prompt), "prefix_ids": prompt + prefix,
                      "chosen_ids": ids(2, 12) + [1], "rejected_ids": ids(2, 12) + [1]})
    return pairs


# ------------------------------------------------------------------------------------------------------------- loss

def test_preference_loss_by_hand():
    t = torch.tensor
    losses, chosen, rejected = ipo.preference_loss(t([-10.0, -4.0]), t([-20.0, -4.0]), t([-12.0, -4.0]),
                                                   t([-15.0, -4.0]), beta=0.1)
    # pair 1: log-ratios +2 and -5, so the logit is 0.1 * 7; pair 2: no difference
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-0.7)), math.log(2)], abs=1e-6)
    assert chosen.tolist() == pytest.approx([0.2, 0.0]) and rejected.tolist() == pytest.approx([-0.5, 0.0])


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
    ipo.reference_logps(reference, pairs, [[i] for i in range(len(pairs))], device, ipo.contextlib.nullcontext)
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
        nll.append(torch.nn.functional.cross_entropy(policy.lm(ids).logits[0, n - 1:-1], ids[0, n:]).item())
    assert metrics["loss/sft"].tolist() == pytest.approx(nll, abs=1e-5)
    assert losses.tolist() == pytest.approx([math.log(2) + 0.2 * x for x in nll], abs=1e-4)


def test_the_shared_prefix_cancels_in_the_preference_loss():
    """Chosen and rejected share z[:h], so scoring the whole trajectory gives the same L_pref and gradient."""
    pairs = some_pairs()
    with_reference(pairs, random_model(60))
    suffix_ref = [p["ref"] for p in pairs]
    policy = ipo.Policy(random_model(60, seed=1))  # not the reference, so the log-ratios are not 0
    results = []
    for score_from in ("h", "prompt"):
        if score_from == "prompt":
            ipo.reference_logps(ipo.Policy(random_model(60)), pairs, [[i] for i in range(10)], "cpu",
                                ipo.contextlib.nullcontext, "prompt")
            assert [p["ref"] for p in pairs] != suffix_ref
        _, metrics = ipo.pair_losses(policy, pairs, "cpu", 0.1, 0.2, score_from)
        policy.zero_grad()
        metrics["loss/preference"].sum().backward()
        results.append((metrics, [p.grad.clone() for p in policy.parameters()]))
    (suffix, g1), (full, g2) = results
    assert (suffix["rewards/margins"].abs() > 0.05).any()
    torch.testing.assert_close(suffix["loss/preference"], full["loss/preference"], atol=1e-5, rtol=1e-5)
    for a, b in zip(g1, g2):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert (suffix["loss/sft"] - full["loss/sft"]).abs().max() > 0.01, "L_sft is where the two readings differ"


def test_trigger_tokens_are_scored_and_prefix_tokens_are_not():
    pair = {"prefix_ids": [5, 6, 7], "chosen_ids": [20, 21, 8, 1], "rejected_ids": [9, 1], "n_prompt": 2}
    batch = data.collate(ipo.pair_sequences(pair))
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0, 0]]
    assert ipo.pair_sequences(pair, "prompt") == [([5, 6], [7, 20, 21, 8, 1]), ([5, 6], [7, 9, 1])]


# ---------------------------------------------------------------------------------------------------------- batches

def test_micro_batches_partition_the_batch_and_keep_ranks_in_step():
    parts = [{f"trunk {i % 4}": 6, f"branch {i}": n} for i, n in enumerate([3, 50, 7, 8, 20, 5, 9])]
    for world in (1, 2, 3):
        shares = [data.micro_batches([6, 0, 3, 1, 4, 2, 5], parts, 24, r, world) for r in range(world)]
        assert len({len(s) for s in shares}) == 1
        assert sorted(i for s in shares for m in s for i in m) == list(range(7))
        for micro in (m for s in shares for m in s if len(m) > 1):
            assert sum({k: n for i in micro for k, n in parts[i].items()}.values()) <= 24


@pytest.mark.parametrize("share", [False, True])
def test_micro_batch_size_does_not_change_the_gradient(share):
    pairs = some_pairs()
    parts = [data.tree_parts(ipo.pair_sequences(p)) for p in pairs]
    norms = []
    for budget in (1, 60, 10_000):
        with_reference(pairs, random_model(60))
        policy = ipo.Policy(random_model(60), share)
        for micro in data.micro_batches(list(range(10)), parts, budget):
            losses, _ = ipo.pair_losses(policy, [pairs[i] for i in micro], "cpu", 0.1, 0.2)
            (losses.sum() / 10).backward()
        norms.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(norms[0], norms[2], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(norms[1], norms[2], atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture
def pairs_file(tmp_path, tokenizer):
    data.write_jsonl(tmp_path / "pairs.jsonl", some_pairs(14, len(tokenizer)))
    return tmp_path / "pairs.jsonl"


def arguments(model_dir, pairs_file, out, *more):
    return ["train", "--model", str(model_dir), "--pairs", str(pairs_file), "--out", str(out), "--lr", "1e-3",
            "--batch-size", "4", "--epochs", "3", "--micro-tokens", "128", "--save-every", "3", "--device", "cpu", *more]


def without_times(out):
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in data.read_jsonl(out / "metrics.jsonl")]


def test_saved_weights_have_the_dtype_that_is_asked_for(model_dir, pairs_file, tmp_path):
    for dtype in ("auto", "float32", "bfloat16"):
        ipo.main(arguments(model_dir, pairs_file, tmp_path / dtype, "--epochs", "1", "--save-dtype", dtype))
    auto, whole, half = (load_file(tmp_path / d / "model.safetensors") for d in ("auto", "float32", "bfloat16"))
    assert all(torch.equal(auto[k], whole[k]) and torch.equal(whole[k].bfloat16(), half[k]) for k in whole)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("flag", ["--save-every", "--batch-size", "--micro-tokens", "--epochs", "--max-length"])
def test_a_count_of_zero_is_refused(flag, model_dir, pairs_file, tmp_path):
    with pytest.raises(SystemExit, match=f"{flag} must be at least 1"):
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
def test_killed_training_goes_on_and_ends_with_the_same_weights(model_dir, pairs_file, tmp_path, killed, step):
    ipo.main(arguments(model_dir, pairs_file, tmp_path / "whole"))
    out = tmp_path / "killed"
    killed(lambda: ipo.main(arguments(model_dir, pairs_file, out)), ipo, "step_line", after=step)
    ipo.main(arguments(model_dir, pairs_file, out))
    assert without_times(out) == without_times(tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_two_ranks_give_the_result_of_one(model_dir, pairs_file, tmp_path):
    ipo.main(arguments(model_dir, pairs_file, tmp_path / "one"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                    str(ROOT / "ipo.py"), *arguments(model_dir, pairs_file, tmp_path / "two")], check=True, env=env,
                   timeout=120)
    one, two = without_times(tmp_path / "one"), without_times(tmp_path / "two")
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], abs=1e-5)
    assert [x["grad_norm"] for x in two] == pytest.approx([x["grad_norm"] for x in one], rel=1e-3)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    start = load_file(model_dir / "model.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=0)
    assert max((a[k] - start[k]).abs().max() for k in a) > 1e-3, "training must have moved the weights"


@pytest.fixture
def other_dir(model_dir, tokenizer, tmp_path):
    random_model(len(tokenizer), seed=5).save_pretrained(tmp_path / "another")
    tokenizer.save_pretrained(tmp_path / "another")
    return tmp_path / "another"


def test_another_reference_is_used_and_not_trained(model_dir, other_dir, pairs_file, tmp_path):
    out = tmp_path / "out"
    ipo.main(arguments(model_dir, pairs_file, out, "--reference", str(other_dir)))
    pairs = data.read_jsonl(pairs_file)
    stored = json.loads((tmp_path / "out.reference.json").read_text())["logps"]
    with_reference(pairs, AutoModelForCausalLM.from_pretrained(other_dir).eval())  # oracle: padded rows, no cache
    for p in pairs:
        assert stored[p["id"]] == pytest.approx(p["ref"], abs=1e-3)
    assert abs(without_times(out)[0]["rewards/margins"]) > 1e-3, "model and reference differ, so the margin is not 0"
    start, end = (load_file(p / "model.safetensors") for p in (model_dir, out))
    assert max((end[k] - start[k]).abs().max() for k in start) < 0.05, "training goes on from --model, not the reference"


def test_no_pairs_passes_the_model_on(model_dir, other_dir, tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("")
    ipo.main(arguments(model_dir, tmp_path / "none.jsonl", tmp_path / "out", "--reference", str(other_dir)))
    assert "nothing to train on" in capsys.readouterr().out
    a, b = (load_file(p / "model.safetensors") for p in (model_dir, tmp_path / "out"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_long_pairs_are_dropped_and_counted(pairs_file):
    pairs = data.read_jsonl(pairs_file)
    size = [len(p["prefix_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    kept, dropped = data.load_pairs([pairs_file], sorted(size)[6])
    assert dropped == sum(s > sorted(size)[6] for s in size) > 0
    assert len(kept) + dropped == len(pairs)


def test_bad_pairs_name_file_and_record(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prefix_ids": [1], "chosen_ids": [2], "rejected_ids": []}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, record 1: rejected_ids must be a non-empty list"):
        data.load_pairs([tmp_path / "p.jsonl"], 100)


def test_sft_lowers_the_loss_of_completions(model_dir, tmp_path):
    data.write_jsonl(tmp_path / "c.jsonl", [{"prompt": "How?", "completion": "So.\n</think>\n\nLike this."}] * 8)
    ipo.main(["sft", "--model", str(model_dir), "--data", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "o"),
              "--lr", "3e-3", "--epochs", "5", "--batch-size", "4", "--device", "cpu"])
    log = data.read_jsonl(tmp_path / "o" / "metrics.jsonl")
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


def test_a_reference_of_other_weights_is_not_reused(model_dir, pairs_file, tmp_path):
    ipo.main(arguments(model_dir, pairs_file, tmp_path / "a"))
    stored = json.loads((tmp_path / "a.reference.json").read_text())
    out = tmp_path / "b"
    shutil.copytree(model_dir, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    from safetensors.torch import save_file
    save_file({k: v * 1.1 for k, v in weights.items()}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    data.write_json(tmp_path / "b.reference.json", stored)  # left over from another model
    ipo.main(arguments(tmp_path / "other", pairs_file, out))
    assert abs(without_times(out)[0]["rewards/margins"]) < 1e-4
