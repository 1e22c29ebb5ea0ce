"""OPSA: the model learns to do without an instruction what it does with it (self-distillation).

    python -m studies.opsa train --model MODEL --prompts prompts.jsonl --out runs/my/opsa
    python -m studies.opsa flips --model MODEL --prompts prompts.jsonl --out runs/my/flips

On-Policy Self-distillation for safety Alignment is Fu et al., 2026 (arXiv 2605.15239). Each step
samples rollouts from the current policy. A frozen copy of the start model, the teacher, reads the
same rollouts behind a prompt with an instruction in front. The loss of each sampled token is the KL
divergence of the two distributions that predict it. No judge is needed.

It can only work where the instruction makes the start model safer. The paper measures that by the
teacher flip rate: the share of unsafe rollouts that are safe with the instruction. `flips` samples
both and prints it, beside the share that are safe when they are only sampled again: temperature
flips some by itself.

Everything else is as in studies/grpo.py: one process on one device, rollouts kept by step, restarts
that end with the same weights.
"""
import argparse
import functools
import os
import shutil
import time
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from data import collate, global_batches, load_prompts
from intervene import (
    add_judge_flags,
    add_sampler_flags,
    judge_from_flags,
    judge_traces,
    recorded_flags,
    sample_traces,
    sampler_from_flags,
    segment,
    trace_jobs,
)
from ipo import learning_rate, load_or_start, log_step, take_step
from model import pick_device, save_model, stored_dtype
from studies.common import load_instruction, with_instruction
from studies.grpo import (
    add_learning_flags,
    count_tokens,
    jobs_of_step,
    load_to_learn,
    refuse_torchrun,
    sample_step,
)
from support.checkpoint import save_checkpoint
from support.errors import InputError, exit_cleanly
from support.files import write_json
from support.flags import refuse_below
from support.fused_head import chunk_sizes, logit_shape
from support.judges import require_questions
from support.model_card import write_card
from support.progress import ProgressLines
from support.ranks import with_hands
from support.stages import add_stage_flags, run_stage
from support.statistics import format_estimate, mean_estimate

INSTRUCTION = Path(__file__).resolve().parents[1] / "prompts" / "instruction.txt"
DIRECTIONS = ("forward", "reverse")
PARTS = ("reasoning", "response")


# --------------------------------------------------------------------------------------- the loss

def chunk_kl(policy_lm, teacher_lm, states, teacher_states, temperature, direction):
    """KL divergence of two distributions over the vocabulary, for N tokens.

    states, teacher_states: (N, H), from which each model predicts the token. Returns float32 (N,),
    nats: KL(teacher || policy) for "forward", KL(policy || teacher) for "reverse".
    """
    ours = log_distribution(policy_lm, states, temperature)              # (N, V)
    with torch.no_grad():
        theirs = log_distribution(teacher_lm, teacher_states, temperature)
    if direction == "forward":
        return (theirs.exp() * (theirs - ours)).sum(-1)
    return (ours.exp() * (ours - theirs)).sum(-1)


def log_distribution(lm, states, temperature):
    """The distribution that is sampled from: float32 (N, V), nats, with a gradient to `states`."""
    logits = lm.get_output_embeddings()(states).float()
    scale, cap = logit_shape(lm.config, temperature)
    logits = logits * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)


def token_kl(policy_lm, teacher_lm, rows, teacher_rows, temperature=1.0, direction="forward",
             chunk=0):
    """`chunk_kl` of all completion tokens of a batch: float32 (N,), row by row.

    rows, teacher_rows: batches of `data.collate` with the same completions behind other prompts.
    Only the policy gets a gradient.
    """
    states = predicting_states(policy_lm, **rows)                        # (N, H)
    with torch.no_grad():
        teacher_states = predicting_states(teacher_lm, **teacher_rows)   # (N, H)
    if not chunk:
        vocabulary = len(policy_lm.get_output_embeddings().weight)
        most, _ = chunk_sizes(rows["input_ids"].device.type, vocabulary)
        chunk = max(1, most // 4)  # the logits of two models, and their gradients
    kl = []
    for part, teacher_part in zip(states.split(chunk), teacher_states.split(chunk)):
        # Computed again for the backward pass, so that logits exist for one chunk at a time.
        kl.append(checkpoint(
            chunk_kl, policy_lm, teacher_lm, part, teacher_part, temperature, direction,
            use_reentrant=False,
        ))
    return torch.cat(kl)


def predicting_states(lm, input_ids, attention_mask, completion_mask):
    """The last layer's states (N, H) from which the N completion tokens are predicted, row by row.

    The inputs are those of `data.collate`, (B, T). What is predicted at t is token t + 1.
    """
    output = lm.get_decoder()(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    )
    scored = completion_mask[:, 1:].bool()
    return output.last_hidden_state[:, :-1][scored]


def distillation_losses(policy, group, teacher, temperature, direction):
    """The KL of each rollout of a micro-batch, summed over its tokens, and no metrics.

    group: one micro-batch, in the form of `ipo.take_step`. Returns float32 (B,).
    """
    (micro,) = group
    kl = token_kl(
        policy.lm, teacher.lm, micro["rows"], micro["teacher_rows"], temperature, direction
    )
    by_rollout = kl.split(micro["lengths"])
    return torch.stack([values.sum() for values in by_rollout]), {}


def paired_micro_batches(traces, teacher_ids, micro_tokens, device):
    """Micro-batches of at most `micro_tokens` tokens with padding, the teacher's rows not counted.

    teacher_ids: {prompt id: the teacher's prompt, as ids}. Returns a list of {"rows",
    "teacher_rows": the same rollouts behind the two prompts, "lengths": their tokens}.
    """
    by_length = sorted(traces, key=length_with_prompt)
    size = max(1, micro_tokens // length_with_prompt(by_length[-1]))
    micros = []
    for start in range(0, len(by_length), size):
        part = by_length[start:start + size]
        sequences = [(trace["prompt_ids"], trace["ids"]) for trace in part]
        teacher_sequences = [(teacher_ids[trace["prompt_id"]], trace["ids"]) for trace in part]
        micros.append({
            "rows": collate(sequences, device),
            "teacher_rows": collate(teacher_sequences, device),
            "lengths": [len(trace["ids"]) for trace in part],
        })
    return micros


def length_with_prompt(trace):
    """Tokens of a trace with its prompt."""
    return len(trace["prompt_ids"]) + len(trace["ids"])


# ------------------------------------------------------------------------------------ the prompts

def benign_prompts(path, limit):
    """Benign prompts, with ids that no harmful one has."""
    prompts = []
    for prompt in load_prompts(path, limit):
        prompts.append({**prompt, "id": f"benign/{prompt['id']}"})
    return prompts


def paired_jobs(prompts, teacher_prompts, samples, sampler):
    """Jobs for the prompts that leave room in the context with the teacher's prompt too.

    Returns (jobs, {prompt id: the teacher's prompt as ids}, number of prompts dropped).
    """
    teacher_jobs, _ = trace_jobs(teacher_prompts, 1, sampler)
    teacher_ids = {job["prompt_id"]: job["prompt_ids"] for job in teacher_jobs}
    fitting = [prompt for prompt in prompts if prompt["id"] in teacher_ids]
    jobs, _ = trace_jobs(fitting, samples, sampler)
    dropped = len(prompts) - len(jobs) // samples
    return jobs, teacher_ids, dropped


# --------------------------------------------------------------------------------------- the loop

def learn(
    policy, teacher, sampler, prompts, teacher_prompts, out, *, device, autocast, lr, samples=2,
    prompts_per_step=8, epochs=1, direction="forward", weight_decay=0.0, clip=1.0,
    micro_tokens=16384, save_every=10, seed=0,
):
    """Train `policy` in place; log, checkpoint and resume. Returns (metrics of each step, counts).

    sampler: a `model.LocalSampler` whose model this function sets to the policy. Metrics: loss is
    the KL in nats, a mean over tokens; length is in tokens.
    """
    jobs, teacher_ids, dropped = paired_jobs(prompts, teacher_prompts, samples, sampler)
    groups = [jobs[i:i + samples] for i in range(0, len(jobs), samples)]
    unshared = [{i: 1} for i in range(len(groups))]  # no two groups share a part
    steps = global_batches(unshared, prompts_per_step, epochs, seed)
    optimizer, log = load_or_start(policy, out, lr, weight_decay)
    losses_of = functools.partial(
        distillation_losses,
        teacher=teacher,
        temperature=sampler.options["temperature"],
        direction=direction,
    )
    sampler.model = policy.lm
    for step in ProgressLines(range(len(log), len(steps)), desc=out.name, unit="steps"):
        started = time.monotonic()
        step_jobs = jobs_of_step([groups[i] for i in steps[step]], step)
        traces = sample_step(policy, step_jobs, sampler, out / "rollouts" / f"{step:05}")
        micros = paired_micro_batches(traces, teacher_ids, micro_tokens, device)
        rate = learning_rate(step, len(steps), lr)
        tokens = count_tokens(traces)
        values, norm = take_step(
            policy, optimizer, rate, [[micro] for micro in micros], None, tokens, losses_of,
            autocast, clip,
        )
        log.append({
            "step": step,
            **values,
            "length": tokens / len(traces),
            "truncated": sum(trace["truncated"] for trace in traces),
            "generations": len(traces),
            "grad_norm": norm,
            "lr": rate,
            "seconds": round(time.monotonic() - started, 3),
        })
        log_step(out, log[-1], len(steps))
        if (step + 1) % save_every == 0 and step + 1 < len(steps):
            save_checkpoint(out, policy, optimizer, step + 1, rank=0)
    counts = {
        "prompts": len(prompts),
        "short enough": len(prompts) - dropped,
        "steps": len(log),
        "generations": sum(line["generations"] for line in log),
        "judge calls": 0,
    }
    return log, counts


# --------------------------------------------------------------------------------------- training

def train_on_teacher(
    model, prompts, teacher_prompts, out, *, sampler, device, dtype, lora_rank,
    checkpoint_activations, settings,
):
    """OPSA from prompts to a saved model; returns (counts, nothing more for the funnel).

    settings: the remaining keywords of `learn`.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = pick_device(device)
    policy, teacher, autocast = load_to_learn(
        model, device, dtype, lora_rank, checkpoint_activations, with_reference=True,
    )
    _, counts = learn(
        policy, teacher, sampler, prompts, teacher_prompts, out,
        device=device, autocast=autocast, **settings,
    )
    save_model(policy.lm, sampler.tokenizer, out, 0, stored_dtype(model))
    write_card(out)
    return counts, {}


def run_train(args, sampler, instruction):
    """The work of `train`."""
    prompts = load_prompts(args.prompts, args.limit)
    teacher_prompts = with_instruction(prompts, instruction)
    if args.benign:
        # There the teacher is the start model without an instruction: it should stay as it is.
        benign = benign_prompts(args.benign, args.limit)
        prompts = prompts + benign
        teacher_prompts = teacher_prompts + benign
    names = (
        "lr", "samples", "prompts_per_step", "epochs", "direction", "weight_decay", "clip",
        "micro_tokens", "save_every", "seed",
    )
    return train_on_teacher(
        args.model,
        prompts,
        teacher_prompts,
        Path(args.out),
        sampler=sampler,
        device=args.device,
        dtype=args.dtype,
        lora_rank=args.lora_rank,
        checkpoint_activations=args.checkpoint_activations,
        settings={name: getattr(args, name) for name in names},
    )


# ---------------------------------------------------------------------------- the teacher flip rate

def flip_estimates(verdicts, teacher_verdicts, prompts):
    """{part: estimate of the share of unsafe traces that are safe with the instruction}.

    verdicts, teacher_verdicts: verdict records of the same rollouts without and with it; prompts:
    the prompt of each. Traces without one of the two verdicts do not count.

    >>> safe, unsafe, none = ({"reasoning_safe": value} for value in (True, False, None))
    >>> before = [unsafe, unsafe, unsafe, safe, unsafe]
    >>> after = [safe, safe, unsafe, unsafe, none]
    >>> flips = flip_estimates(before, after, "abcde")
    >>> round(flips["reasoning"]["value"], 4), flips["reasoning"]["n"], flips["response"]["n"]
    (0.6667, 3, 0)
    """
    estimates = {}
    for part in PARTS:
        field = f"{part}_safe"
        flipped = []
        unsafe_prompts = []
        for before, after, prompt in zip(verdicts, teacher_verdicts, prompts):
            if before.get(field) is False and after.get(field) is not None:
                flipped.append(after[field])
                unsafe_prompts.append(prompt)
        estimates[part] = mean_estimate(flipped, unsafe_prompts)
    return estimates


def next_of_prompt(records, samples):
    """For each record the next of its prompt, for the last one the first; a prompt has `samples`.

    >>> next_of_prompt(["a0", "a1", "a2", "b0", "b1", "b2"], 3)
    ['a1', 'a2', 'a0', 'b1', 'b2', 'b0']
    """
    others = []
    for start in range(0, len(records), samples):
        of_prompt = records[start:start + samples]
        others += of_prompt[1:] + of_prompt[:1]
    return others


def sample_and_judge(folder, jobs, sampler, judge):
    """Verdicts on the traces of some jobs, kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    traces = sample_traces(folder / "traces.jsonl", jobs, sampler, folder.name)
    return judge_traces(folder / "verdicts.jsonl", traces, segment(traces), judge)


def run_flips(args, sampler, instruction, judge):
    """The work of `flips`: the teacher flip rate of the instruction."""
    out = Path(args.out)
    prompts = load_prompts(args.prompts, args.limit)
    teacher_prompts = with_instruction(prompts, instruction)
    jobs, teacher_ids, dropped = paired_jobs(prompts, teacher_prompts, args.samples, sampler)
    teacher_jobs = []
    for job in jobs:
        # Its own id, because the id decides the random numbers: with the same ones more rollouts
        # would stay as they are than by chance.
        own_id = f"{job['id']}@instructed"
        prompt_ids = teacher_ids[job["prompt_id"]]
        teacher_jobs.append({**job, "id": own_id, "prompt_ids": prompt_ids})
    verdicts = sample_and_judge(out / "alone", jobs, sampler, judge)
    teacher_verdicts = sample_and_judge(out / "instructed", teacher_jobs, sampler, judge)
    prompt_ids = [job["prompt_id"] for job in jobs]
    flips = flip_estimates(verdicts, teacher_verdicts, prompt_ids)
    again = flip_estimates(verdicts, next_of_prompt(verdicts, args.samples), prompt_ids)
    write_json(out / "flips.json", {"instructed": flips, "sampled again": again})
    for part in PARTS:
        print(f"  teacher flip rate, {part}: {format_estimate(flips[part])}")
        print(f"      when only sampled again: {format_estimate(again[part])}")
    counts = {
        "prompts": len(prompts),
        "short enough": len(prompts) - dropped,
        "generations": 2 * len(jobs),
        "unsafe reasoning": flips["reasoning"]["n"],
        "unsafe responses": flips["response"]["n"],
    }
    return counts, {"judge": judge.summary()}


# ------------------------------------------------------------------------------------ command line

def build_parser():
    """The command line of this study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.opsa",
        description="OPSA: self-distillation from the model with an instruction in front.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose, add_flags in (
        ("train", "train on the divergence from the instructed model", add_train_flags),
        ("flips", "how often the instruction makes unsafe rollouts safe", add_flips_flags),
    ):
        command = commands.add_parser(
            name, help=purpose, description=purpose,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add = command.add_argument
        add("--out", required=True, help="directory to write")
        add_stage_flags(command)
        add("--prompts", required=True,
            help="harmful prompts: .jsonl, .json, .csv, .tsv or .txt")
        add("--limit", type=int, default=0, help="use only the first prompts; 0 = all")
        add("--instruction", default=str(INSTRUCTION),
            help="file with the sentence that stands in front of the teacher's prompt")
        add_sampler_flags(command)
        add_flags(command)
        # CHOICE: top-p 1, because the loss is computed from the whole distribution.
        command.set_defaults(temperature=1.0, top_p=1.0)
    return parser


def add_train_flags(parser):
    """The flags of `train` alone."""
    add = parser.add_argument
    add("--benign", help="benign prompts to sample from too; their teacher has no instruction")
    # CHOICE: the abstract says no more than KL. Forward, from the teacher's side, is what others
    # who describe the method say.
    add("--direction", default="forward", choices=DIRECTIONS,
        help="forward: KL(teacher || policy); reverse: KL(policy || teacher)")
    add("--samples", type=int, default=2, help="rollouts of a prompt in a step")
    add("--prompts-per-step", type=int, default=8, help="prompts per step")
    add("--epochs", type=int, default=1, help="passes over the prompts")
    add_learning_flags(parser)


def add_flips_flags(parser):
    """The flags of `flips` alone."""
    parser.add_argument("--samples", type=int, default=4, help="rollouts of a prompt")
    add_judge_flags(parser)


def refuse_wrong_training_flags(args):
    """Raise InputError for flags that training cannot use."""
    refuse_torchrun("opsa")
    refuse_below(
        1, vars(args), "prompts_per_step", "epochs", "micro_tokens", "save_every", "batch_size",
    )
    if args.server or args.temperature <= 0:
        raise InputError("opsa samples in this process (no --server), at a --temperature above 0.")


def main(argv=None):
    """Run the study from the command line."""
    args = build_parser().parse_args(argv)
    least = 1 if args.command == "train" else 2  # `flips` compares a rollout with the next
    refuse_below(least, vars(args), "samples")
    instruction = load_instruction(args.instruction)
    flags = recorded_flags(args)
    inputs = [args.model, args.prompts, args.instruction]
    if args.command == "train":
        refuse_wrong_training_flags(args)
        if args.benign:
            inputs.append(args.benign)
        work = functools.partial(run_train, args)
    else:
        judge = judge_from_flags(args)
        require_questions(judge, ("reasoning", "response", "cue"))
        flags["judge"] = judge.name
        work = functools.partial(run_flips, args, judge=judge)

    def sample_and_work():
        return work(sampler=sampler_from_flags(args), instruction=instruction)

    run_stage(__file__, args.out, flags, inputs, sample_and_work)
    for folder in Path(args.out).glob("checkpoint-*"):
        shutil.rmtree(folder)


if __name__ == "__main__":
    exit_cleanly(with_hands(main))
