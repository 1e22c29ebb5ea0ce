"""GRPO: advantages, loss and gradient by hand, rewards, restarts, and the stage as a command."""
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ipo
from data import Appender
from model import LocalSampler, save_model
from studies import grpo
from support import checkpoint
from support.errors import InputError
from support.files import read_jsonl
from tests.conftest import random_model

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "toy" / "model"
CPU = torch.device("cpu")


# -------------------------------------------------------------------------- advantages and the loss

def test_advantages_by_hand_and_none_without_variety():
    nan = math.nan
    rewards = [[1.0, 0, 0, 0], [1, 1, 1, 1], [-1, 1, nan, nan], [nan, 1, nan, 1], [nan] * 4]
    got = grpo.group_advantages(torch.tensor(rewards), eps=0.0)
    one = math.sqrt(3) / 4  # standard deviation of 1, 0, 0, 0
    assert got[0].tolist() == pytest.approx([0.75 / one] + [-0.25 / one] * 3)
    no_verdict = "no advantage, and no share in the group's mean"
    assert got[2].tolist() == [-1, 1, 0, 0], no_verdict
    assert (got[[1, 3, 4]] == 0).all()
    same = torch.tensor([[0.3] * 7, [0.3] * 6 + [nan]])
    assert same.nanmean(1)[0] != same[0, 0], "the mean is inexact, or this shows nothing"
    assert (grpo.group_advantages(same, eps=1e-9) == 0).all()


def test_loss_by_hand():
    """Every case of the clip, and the mask.

    Advantage up or down, ratio inside, above or below 0.8 to 1.2.
    """
    ratios = torch.tensor([[1.5, 0.5, 1.1, 9.0], [1.5, 0.5, 0.9, 9.0]], dtype=torch.float64)
    # Reference over policy:
    to_ref = torch.tensor([[2.0, 1.0, 1.0, 9.0], [1.0, 0.5, 1.0, 9.0]], dtype=torch.float64)
    old = torch.full((2, 4), -3.0, dtype=torch.float64)
    logps = (old + ratios.log()).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0]] * 2)
    ref = logps.detach() + to_ref.log()
    advantages = torch.tensor([2.0, -1.0])
    losses, metrics = grpo.grpo_loss(logps, old, ref, advantages, mask, 0.2, 0.5)
    k3 = [2 - math.log(2) - 1, 0.5 + math.log(2) - 1]
    expected = [-2 * (1.2 + 0.5 + 1.1) + 0.5 * k3[0], 1.5 + 0.8 + 0.9 + 0.5 * k3[1]]
    assert losses.tolist() == pytest.approx(expected)
    assert metrics["kl"].tolist() == pytest.approx(k3)
    assert metrics["clip_fraction"].tolist() == [1, 1]
    losses.sum().backward()
    # d(-ratio A)/dlogp = -ratio A unless clipped; d k3/dlogp = 1 - ref / policy
    expected = [[0 + 0.5 * -1, -1.0, -2.2, 0], [1.5, 0 + 0.5 * 0.5, 0.9, 0]]
    torch.testing.assert_close(logps.grad, torch.tensor(expected, dtype=torch.float64))


ROLLOUTS = [([5, 6, 7], [8, 9, 10, 1]), ([5, 6, 7], [11, 12, 1]), ([3, 4], [20, 21, 22, 23, 24])]


def naive_logps(model, temperature):
    """For each rollout its tokens' log-probabilities, one forward pass and one softmax a token."""
    rollouts = []
    for prompt, completion in ROLLOUTS:
        logps = []
        for i, token in enumerate(completion):
            logits = model(torch.tensor([prompt + completion[:i]])).logits[0, -1]
            logps.append((logits / temperature).log_softmax(-1)[token])
        rollouts.append(logps)
    return rollouts


@pytest.mark.parametrize("forced", [(0, 0, 0), (2, 0, 3)])
def test_gradient_agrees_with_a_loop_over_tokens(forced):
    """Also: the old log-probabilities are those of the first visit, the reference's are its own.

    forced: how many tokens of each rollout were put there: context, and nothing else.
    """
    start, reference = (ipo.Policy(random_model(60, seed=s)) for s in (0, 1))
    policy = ipo.Policy(random_model(60, seed=0))
    traces = []
    for (p, c), n in zip(ROLLOUTS, forced):
        traces.append({"prompt_ids": p, "ids": c, "forced": n})
    advantages, tokens = [1.5, -1.0, 0.5], 4 + 3 + 5 - sum(forced)
    assert grpo.count_tokens(traces) == tokens
    micros = grpo.padded_micro_batches(traces, advantages, 16, CPU)
    assert [len(m["advantages"]) for m in micros] == [2, 1], "rows padded to 7 tokens, 16 at most"

    def losses_of(micro):
        return grpo.rollout_losses(policy, [micro], reference, 0.7, 0.2, 0.3)
    for micro in micros:
        _, metrics = losses_of(micro)
        assert metrics["clip_fraction"].sum() == 0, "the first update is never clipped"
    with torch.no_grad():
        for p, other in zip(policy.parameters(), random_model(60, seed=2).parameters()):
            p.add_(0.2 * other)
    total = sum(losses_of(m)[0].sum() for m in micros) / tokens
    total.backward()

    twin, clipped = random_model(60), 0
    twin.load_state_dict(policy.lm.state_dict())
    loss = 0.0
    with torch.no_grad():
        old, ref = naive_logps(start.lm, 0.7), naive_logps(reference.lm, 0.7)
    for now, then, there, a, n in zip(naive_logps(twin, 0.7), old, ref, advantages, forced):
        for x, o, r in zip(now[n:], then[n:], there[n:]):
            ratio = math.exp(x.item() - o.item())
            outside = ratio > 1.2 and a > 0 or ratio < 0.8 and a < 0
            clipped += outside
            gain = min(max(ratio, 0.8), 1.2) * a if outside else torch.exp(x - o) * a
            loss = loss - gain + 0.3 * (torch.exp(r - x) - (r - x) - 1)
    (loss / tokens).backward()
    assert 0 < clipped < tokens, "some tokens clipped and some not, or the test shows little"
    assert total.item() == pytest.approx((loss / tokens).item(), rel=1e-4)
    for (name, p), q in zip(policy.lm.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=2e-5, rtol=1e-3, msg=name)


# -------------------------------------------------------------------------------------- the rewards

class OneByOne:
    """Answers from a table, and remembers what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def ask(self, question, items):
        for item in items:
            self.asked.append((question, item["text"]))
            yield self.answers[item["text"]]


def test_rewards_are_the_papers_and_a_failed_verdict_is_no_reward(tmp_path):
    kinds = {"a": (True, True), "b": (True, False), "c": (False, True), "d": (False, False),
             "e": (None, True)}
    traces, table = [], {}
    for name, (z_safe, y_safe) in kinds.items():
        traces.append({"id": name, "prompt": "p", "reasoning": f"z{name}", "response": f"y{name}",
                       "truncated": False})
        table[f"z{name}"] = z_safe
        table[f"y{name}"] = y_safe
    traces.append({"id": "cut", "prompt": "p", "reasoning": "z", "response": "", "truncated": True})
    for kind, expected, questions in (("response", [1, 0, 1, 0, 1, 0], 5),
                                      ("gap", [0, 1, -1, 0, None, 0], 10),
                                      ("reasoning", [1, 1, 0, 0, None, 0], 5)):
        judge, path = OneByOne(table), tmp_path / f"{kind}.jsonl"
        assert grpo.judged_rewards(path, traces, judge, kind) == (expected, questions)
        assert len(judge.asked) == questions
        assert grpo.judged_rewards(path, traces, judge, kind) == (expected, questions)
        assert len(judge.asked) == questions, "stored verdicts are not asked for again"


# ----------------------------------------------------------------------------------------- the loop

def tiny(model_dir, out, reward_of, **more):
    """Some steps on the random model; returns (metrics, policy)."""
    policy, autocast = ipo.load_policy(model_dir, CPU, 0, 1, torch.float32, share=False)
    reference, _ = ipo.load_policy(model_dir, CPU, 0, 1, torch.float32, share=False)
    reference.eval().requires_grad_(False)
    sampler = LocalSampler(model_dir, temperature=1.0, top_p=1.0, max_new_tokens=8, seed=0,
                           batch_size=16)
    out.mkdir(exist_ok=True)
    settings = dict(lr=5e-3, group_size=4, prompts_per_step=3, epochs=4, save_every=2, device=CPU,
                    autocast=autocast)
    settings.update(more)
    prompts = [{"id": str(i), "prompt": f"How {i}?"} for i in range(6)]
    log, counts = grpo.learn(policy, reference, sampler, prompts, reward_of, out, **settings)
    assert counts["steps"] == len(log)
    assert counts["generations"] == sum(line["generations"] for line in log)
    save_model(policy.lm, sampler.tokenizer, out, 0, torch.float32)
    return log, policy


def low_tokens(path, traces):
    return [sum(i < 100 for i in t["ids"]) / len(t["ids"]) for t in traces], 0


def test_reward_rises(model_dir, tmp_path):
    log, _ = tiny(model_dir, tmp_path / "out", low_tokens, epochs=15, group_size=8, lr=1e-2,
                  save_every=50)
    rewards = [line["reward"] for line in log]
    assert len(log) == 30 and sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert log[0]["kl"] == 0, "the reference is the model before its first update"
    assert log[-1]["kl"] > 0.01
    one_update = "one update on each rollout: nothing to clip"
    assert all(line["clip_fraction"] == 0 for line in log), one_update


def test_equal_rewards_teach_nothing(model_dir, tmp_path):
    def reward_of(path, traces):
        return [0.1] * len(traces), 0
    log, policy = tiny(model_dir, tmp_path / "out", reward_of, epochs=2)
    traces = []
    for path in sorted((tmp_path / "out" / "rollouts").iterdir()):
        traces += read_jsonl(path)
    assert len({t["id"] for t in traces}) == len(traces) == 48
    different = {(t["prompt_id"], *t["ids"]) for t in traces}
    assert len(different) > 40, "from the same weights, each visit of a prompt draws anew"
    assert all(line["no_variety"] == 1 and line["grad_norm"] == 0 for line in log)
    start = AutoModelForCausalLM.from_pretrained(model_dir)
    assert all(torch.equal(a, b) for a, b in zip(policy.lm.parameters(), start.parameters()))


def test_later_inner_epochs_are_clipped_and_failed_verdicts_are_counted(model_dir, tmp_path):
    def reward_of(path, traces):
        return [None, *low_tokens(path, traces)[0][1:]], 0
    log, _ = tiny(model_dir, tmp_path / "out", reward_of, epochs=1, inner_epochs=4, lr=2e-2)
    assert log[-1]["clip_fraction"] > 0.05 and all(line["unjudged"] == 1 for line in log)

    def no_verdicts(path, traces):
        return [None] * len(traces), 0
    with pytest.raises(InputError, match="No rollout has a verdict"):
        tiny(model_dir, tmp_path / "none", no_verdicts)


@pytest.mark.parametrize("owner,name,after", [
    (Appender, "write", 31), (ipo, "step_line", 4), (checkpoint.os, "replace", 5)])
def test_killed_and_restarted_it_ends_with_the_same_weights(model_dir, tmp_path, killed, owner,
                                                            name, after):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    log, _ = tiny(model_dir, undisturbed, low_tokens)
    killed(lambda: tiny(model_dir, out, low_tokens), owner, name, after)
    assert not (out / "model.safetensors").exists()
    again, _ = tiny(model_dir, out, low_tokens)
    assert [{**line, "seconds": 0} for line in again] == [{**line, "seconds": 0} for line in log]
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (undisturbed / "model.safetensors").read_bytes()
    for path in (undisturbed / "rollouts").iterdir():
        assert (out / "rollouts" / path.name).read_bytes() == path.read_bytes()


# ------------------------------------------------------------------------------------- the prefixes

PREFIXES = {"0": [[40, 41, 42]], "1": [[50], [60, 61]], "2": [[70] * 240, [71] * 5],
            "no prompt": [[80]]}


def prefixed(model_dir, out, **more):
    return tiny(model_dir, out, low_tokens, prefixes=PREFIXES, prefix_share=0.6, **more)


def test_some_groups_begin_with_a_prefix_that_is_not_counted(model_dir, tmp_path):
    log, _ = prefixed(model_dir, tmp_path / "out", epochs=10)
    begun = {}
    for line in log:
        traces = read_jsonl(tmp_path / "out" / "rollouts" / f"{line['step']:05}.traces.jsonl")
        sampled = sum(len(t["ids"]) - t["forced"] for t in traces)
        assert line["length"] == sampled / 12
        assert line["prefixed"] == sum(t["forced"] > 0 for t in traces)
        beginnings = {}
        for t in traces:
            beginnings.setdefault(t["prompt_id"], set()).add(tuple(t["ids"][:t["forced"]]))
        for prompt_id, of_group in beginnings.items():
            assert len(of_group) == 1, "all of a group begin alike"
            begun.setdefault(prompt_id, []).append(of_group.pop())
    assert set(begun["0"]) == {(), (40, 41, 42)}
    assert set(begun["1"]) == {(), (50,), (60, 61)}, "each prefix in its turn"
    assert set(begun["2"]) == {(), (71,) * 5}, "the other leaves no room in the context"
    assert set(begun["3"]) == {()}, "it has none"
    drawn = begun["0"] + begun["1"] + begun["2"]
    assert 10 <= sum(len(ids) > 0 for ids in drawn) <= 26, "of 30, 18 expected"


def test_with_prefixes_a_restart_ends_with_the_same_weights(model_dir, tmp_path, killed):
    prefixed(model_dir, tmp_path / "undisturbed", epochs=2)
    killed(lambda: prefixed(model_dir, tmp_path / "out", epochs=2), ipo, "step_line", 4)
    prefixed(model_dir, tmp_path / "out", epochs=2)
    weights = [tmp_path / name / "model.safetensors" for name in ("out", "undisturbed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_unusable_prefixes_name_the_remedy(model_dir, tmp_path):
    path = tmp_path / "prefixes.jsonl"
    for record in ('{"prompt_id": "a"}', '{"prompt_id": "a", "ids": []}', '{"ids": [1]}',
                   '{"prompt_id": "a", "ids": "text"}'):
        path.write_text('{"prompt_id": "a", "ids": [1, 2]}\n' + record + "\n")
        with pytest.raises(InputError, match="prefixes.jsonl, record 2: a prefix needs"):
            grpo.load_prefixes(path)
    path.write_text('{"prompt_id": "a", "ids": [1, 2]}\n{"prompt_id": "a", "ids": [3]}\n')
    assert grpo.load_prefixes(path) == {"a": [[1, 2], [3]]}
    with pytest.raises(InputError, match="none of these is of one of --prompts"):
        tiny(model_dir, tmp_path / "out", low_tokens, prefixes={"another": [[1]]})
    with pytest.raises(InputError, match="--prefix-share must be between 0 and 1"):
        grpo.main(arguments(tmp_path / "o", "--prefix-share", "2"))


# ---------------------------------------------------------------------------------------- the stage

def arguments(out, *more):
    prompts = ROOT / "toy" / "prompts" / "train_harmful.jsonl"
    return ["--model", str(MODEL), "--prompts", str(prompts), "--limit", "4", "--reward", "gap",
            "--group-size", "4", "--prompts-per-step", "2", "--max-new-tokens", "240",
            "--lr", "1e-3", "--device", "cpu", "--out", str(out), *more]


@pytest.mark.parametrize("more", [
    [],
    ["--limit", "2", "--dtype", "bfloat16", "--checkpoint-activations", "--kl", "0"],
    ["--limit", "2", "--dtype", "bfloat16", "--lora-rank", "4"]])
def test_the_stage_on_the_tiny_model(tmp_path, capsys, more):
    out = tmp_path / "grpo"
    grpo.main(arguments(out, *more))
    grpo.main(arguments(out, *more))
    assert "(finished before)" in capsys.readouterr().out
    log = read_jsonl(out / "metrics.jsonl")
    funnel = json.loads((tmp_path / "grpo.funnel.json").read_text())["counts"]
    assert len(log) == funnel["steps"] == (1 if more else 2)
    assert funnel["generations"] == 8 * len(log)
    expected = None if "--kl" in more else 0
    assert log[0].get("kl") == expected, "the reference computes in the policy's precision"
    complete = 0
    for path in (out / "rollouts").glob("*.traces.jsonl"):
        complete += sum(not t["truncated"] for t in read_jsonl(path))
    assert funnel["judge calls"] == 2 * complete > 8
    start, end = (AutoModelForCausalLM.from_pretrained(p) for p in (MODEL, out))
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters()))
    assert not list(out.glob("checkpoint*")) and (out / "tokenizer.json").exists()


def test_wrong_flags_name_the_remedy(tmp_path, monkeypatch):
    for flags, message in ((["--temperature", "0"], "temperature above 0"),
                           (["--group-size", "1"], "at least 2"),
                           (["--server", "http://x/v1"], "no --server"),
                           (["--epochs", "0"], "--epochs must be at least 1")):
        with pytest.raises(InputError, match=message):
            grpo.main(arguments(tmp_path / "o", *flags))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="with python, not torchrun"):
        grpo.main(arguments(tmp_path / "o"))
    assert not (tmp_path / "o").exists()
