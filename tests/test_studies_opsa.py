"""OPSA: its divergence by a loop over tokens, what the teacher reads, restarts, the flip rate."""
import json

import pytest
import torch

import ipo
from model import LocalSampler, load_tokenizer, save_model
from studies import opsa
from studies.grpo import load_to_learn
from support.errors import InputError
from support.files import read_jsonl
from tests.conftest import random_model

CPU = torch.device("cpu")
ROLLOUTS = [  # the policy's prompt, the teacher's, the completion
    ([5, 6, 7], [30, 31, 5, 6, 7], [8, 9, 10, 1]),
    ([5, 6], [5, 6], [11, 12, 1]),
    ([3, 4], [30, 31, 32, 33, 3, 4], [20, 21, 22, 23, 24]),
]


# --------------------------------------------------------------------------------------- the loss

def naive_logps(model, prefix, temperature, cap):
    """The distribution of the token after `prefix`, by one forward pass."""
    logits = model(torch.tensor([prefix])).logits[0, -1] / temperature
    if cap:
        # The cap belongs to the logits before they are divided by the temperature.
        logits = cap * torch.tanh(logits * temperature / cap) / temperature
    return logits.log_softmax(-1)


@pytest.mark.parametrize("direction,cap", [("forward", None), ("reverse", None), ("forward", 2.0)])
def test_losses_and_gradient_agree_with_a_loop_over_tokens(direction, cap):
    policy = ipo.Policy(random_model(60, seed=0))
    teacher = ipo.Policy(random_model(60, seed=1)).requires_grad_(False)
    if cap:
        for each in (policy, teacher):
            each.lm.config.final_logit_softcapping = cap
    traces = []
    teacher_ids = {}
    for number, (prompt, teacher_prompt, completion) in enumerate(ROLLOUTS):
        traces.append({"prompt_id": number, "prompt_ids": prompt, "ids": completion})
        teacher_ids[number] = teacher_prompt
    micros = opsa.paired_micro_batches(traces, teacher_ids, 14, CPU)
    assert [micro["lengths"] for micro in micros] == [[3, 4], [5]], "shortest first"
    losses = []
    for micro in micros:
        values, _ = opsa.distillation_losses(policy, [micro], teacher, 0.7, direction)
        losses += values
    sum(losses).backward()

    twin = random_model(60, seed=0).double()
    naive_teacher = random_model(60, seed=1).double()
    expected = []
    for prompt, teacher_prompt, completion in ROLLOUTS:
        total = 0.0
        for i in range(len(completion)):
            p = naive_logps(twin, prompt + completion[:i], 0.7, cap)
            with torch.no_grad():
                q = naive_logps(naive_teacher, teacher_prompt + completion[:i], 0.7, cap)
            if direction == "reverse":
                p, q = q, p
            for v in range(60):
                total = total + q[v].exp() * (q[v] - p[v])
        expected.append(total)
    by_length = [expected[1], expected[0], expected[2]]
    assert [x.item() for x in losses] == pytest.approx([x.item() for x in by_length], rel=1e-4)
    sum(expected).backward()
    for (name, p), q in zip(policy.lm.named_parameters(), twin.named_parameters()):
        torch.testing.assert_close(p.grad.double(), q[1].grad, atol=2e-4, rtol=2e-3, msg=name)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_size_of_the_chunks_changes_nothing():
    policy, teacher = random_model(60, seed=0), random_model(60, seed=1)
    trace = {"prompt_id": 0, "prompt_ids": [3, 4], "ids": [20, 21, 22, 23, 24]}
    (micro,) = opsa.paired_micro_batches([trace], {0: [9, 3, 4]}, 100, CPU)
    rows = (micro["rows"], micro["teacher_rows"])
    whole = opsa.token_kl(policy, teacher, *rows)
    assert whole.shape == (5,)
    torch.testing.assert_close(opsa.token_kl(policy, teacher, *rows, chunk=2), whole)


# --------------------------------------------------------------------------------------- the loop

PROMPTS = [{"id": str(i), "prompt": f"How {i}?"} for i in range(6)]


def tiny(model_dir, out, instruction="Think first.", **more):
    """Some steps on the random model; returns (metrics, counts)."""
    policy, teacher, autocast = load_to_learn(model_dir, CPU, "float32", 0, False, True)
    sampler = LocalSampler(model_dir, temperature=1.0, top_p=1.0, max_new_tokens=8, seed=0,
                           batch_size=16)
    out.mkdir(exist_ok=True)
    teacher_prompts = opsa.with_instruction(PROMPTS, instruction) if instruction else PROMPTS
    settings = {"lr": 5e-3, "samples": 2, "prompts_per_step": 3, "epochs": 4, "save_every": 2}
    settings.update(more)
    log, counts = opsa.learn(policy, teacher, sampler, PROMPTS, teacher_prompts, out,
                             device=CPU, autocast=autocast, **settings)
    save_model(policy.lm, sampler.tokenizer, out, 0, torch.float32)
    return log, counts


def test_the_divergence_falls_and_without_an_instruction_there_is_none(model_dir, tmp_path):
    log, counts = tiny(model_dir, tmp_path / "out", epochs=10, samples=4)
    losses = [line["loss"] for line in log]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert counts == {"prompts": 6, "short enough": 6, "steps": 20, "generations": 240,
                      "judge calls": 0}
    log, _ = tiny(model_dir, tmp_path / "alone", instruction="", epochs=1)
    assert log[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_prompts_that_are_too_long_for_the_teacher_are_dropped(model_dir):
    sampler = LocalSampler(model_dir, temperature=1.0, top_p=1.0, max_new_tokens=8, seed=0)
    teacher_prompts = opsa.with_instruction(PROMPTS, "Think first.")
    teacher_prompts[4]["prompt"] *= 40
    jobs, teacher_ids, dropped = opsa.paired_jobs(PROMPTS, teacher_prompts, 2, sampler)
    assert [job["id"] for job in jobs] == ["0#0", "0#1", "1#0", "1#1", "2#0", "2#1", "3#0", "3#1",
                                           "5#0", "5#1"]
    assert set(teacher_ids) == {"0", "1", "2", "3", "5"} and dropped == 1


def test_killed_and_restarted_it_ends_with_the_same_weights(model_dir, tmp_path, killed):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    tiny(model_dir, undisturbed)
    killed(lambda: tiny(model_dir, out), ipo, "step_line", 6)
    tiny(model_dir, out)
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (undisturbed / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------ the commands

def arguments(command, model_dir, tmp_path, *more):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    instruction = tmp_path / "instruction.txt"
    instruction.write_text("Think first.\n")
    return [command, "--model", str(model_dir), "--prompts", str(prompts), "--instruction",
            str(instruction), "--max-new-tokens", "8", "--device", "cpu", "--samples", "2",
            "--out", str(tmp_path / "out"), *more]


def test_train_as_a_command(model_dir, tmp_path, capsys):
    benign = tmp_path / "benign.jsonl"
    benign.write_text('{"id": "0", "prompt": "Why?"}\n{"id": "1", "prompt": "Who?"}\n')
    words = arguments("train", model_dir, tmp_path, "--benign", str(benign), "--lr", "1e-3")
    opsa.main(words)
    opsa.main(words)
    assert "(finished before)" in capsys.readouterr().out
    counts = json.loads((tmp_path / "out.funnel.json").read_text())["counts"]
    assert counts["generations"] == (6 + 2) * 2 and counts["judge calls"] == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_flips_gives_the_teacher_the_instruction_and_nothing_else(model_dir, tmp_path, capsys):
    opsa.main(arguments("flips", model_dir, tmp_path, "--limit", "3"))
    tokenizer = load_tokenizer(model_dir)
    alone = read_jsonl(tmp_path / "out" / "alone" / "traces.jsonl")
    instructed = read_jsonl(tmp_path / "out" / "instructed" / "traces.jsonl")
    assert len(alone) == len(instructed) == 6
    for trace, other in zip(alone, instructed):
        # Another id has other random numbers: with the same ones fewer rollouts would flip.
        assert other["id"] == trace["id"] + "@instructed"
        assert tokenizer.decode(trace["prompt_ids"]).count("Think first. How") == 0
        assert tokenizer.decode(other["prompt_ids"]).count("Think first. How") == 1
    assert "teacher flip rate, response" in capsys.readouterr().out
    with pytest.raises(InputError, match="--samples must be at least 2"):
        opsa.main([*arguments("flips", model_dir, tmp_path), "--samples", "1"])


def test_wrong_flags_name_the_remedy(model_dir, tmp_path, monkeypatch):
    two = tmp_path / "two.txt"
    two.write_text("One.\nTwo.\n")
    for flags, message in ((["--instruction", str(two)], "two.txt: 2 lines"),
                           (["--temperature", "0"], "temperature above 0"),
                           (["--server", "http://x/v1"], "no --server"),
                           (["--samples", "0"], "--samples must be at least 1")):
        with pytest.raises(InputError, match=message):
            opsa.main(arguments("train", model_dir, tmp_path, *flags))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="with python, not torchrun"):
        opsa.main(arguments("train", model_dir, tmp_path))
    assert not (tmp_path / "out").exists()
