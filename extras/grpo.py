"""GRPO, the paper's baseline: rollouts of one prompt compete in groups, and the judge's verdicts are their rewards.

    python ipo.py grpo --model M --prompts prompts.jsonl --reward reasoning --judge rules --out runs/my/grpo

Group Relative Policy Optimization is Shao et al., 2024 (arXiv 2402.03300). Each step samples a group of rollouts for a
few prompts from the policy as it is, has them judged and makes one update, or `--inner-epochs` of them, on all. It runs
in one process on one device, because the sampler needs whole weights: for a model of several billion parameters use
`--lora-rank`. Left out: a learned reward, packed trees (rollouts are padded rows), servers (the weights change).

Below `--out` lie the rollouts and verdicts of every step, by id. Killed and started again, it goes on from its last
checkpoint, finds the rollouts made since, and ends with the same weights.
"""
import argparse
import functools
import os
import shutil
import time
from pathlib import Path

import torch

import data
import intervene
import ipo
import model as lm_code
from extras import client

REWARDS = {"response": {"response": 1}, "gap": {"reasoning": 1, "response": -1}, "reasoning": {"reasoning": 1}}


# ------------------------------------------------------------------------------------------------------- the loss

def group_advantages(rewards, eps=1e-4):
    """How much better a rollout is than its group: (r - mean) / (std + eps).

    rewards: float (groups, size), nan where there is no verdict. Returns float (groups, size): 0 for groups without
    variety, which teach nothing, and for rollouts without a verdict, which do not enter mean and std either.

    >>> group_advantages(torch.tensor([[1.0, 0.0], [0.1, 0.1], [1.0, torch.nan]])).round(decimals=3).tolist()
    [[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]
    """
    mean = rewards.nanmean(1, keepdim=True)
    # CHOICE: the group's own (population) deviation; some libraries divide by n - 1 instead.
    std = (rewards - mean).square().nanmean(1, keepdim=True).sqrt()
    # A test of equality, because the mean of equal rewards need not be equal to them in floating point.
    equal = (rewards == rewards.nan_to_num(-torch.inf).amax(1, keepdim=True)).logical_or(rewards.isnan()).all(1, keepdim=True)
    return ((rewards - mean) / (std + eps)).masked_fill(equal, 0.0).nan_to_num(0.0)


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, clip_ratio=0.2, kl=0.04):
    """The clipped objective of GRPO with its KL term, for each rollout, summed over its tokens.

    logps, old_logps, ref_logps: float (B, T), nats, of each sampled token under the policy, the policy that sampled it
    and the reference; advantages (B,); mask (B, T), 1 on sampled tokens. Returns (losses (B,), metrics, each (B,) and
    a sum over tokens): to be divided by the number of tokens. Only `logps` carries a gradient to the losses.

    Two tokens of advantage 1: the first is 1.5 times as likely as when it was sampled, which counts as 1.2; the second
    is as likely as then and half as likely as under the reference, so its KL term is 2 - log 2 - 1 = 0.3069.

    >>> logps = torch.tensor([[-1.0, -2.0]])
    >>> old, ref = logps - torch.tensor([[1.5, 1.0]]).log(), logps + torch.tensor([[1.0, 2.0]]).log()
    >>> losses, metrics = grpo_loss(logps, old, ref, torch.ones(1), torch.ones(1, 2), clip_ratio=0.2, kl=0.1)
    >>> round(losses.item(), 4), round(metrics["kl"].item(), 4), metrics["clip_fraction"].item()  # -1.2 - 1 + 0.0307
    (-2.1693, 0.3069, 1.0)
    """
    ratio, gain = (logps - old_logps).exp(), advantages[:, None]             # (B, T), (B, 1)
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    to_ref = ref_logps - logps
    divergence = to_ref.exp() - to_ref - 1                                   # k3: unbiased for KL(policy, ref), never < 0
    losses = -torch.minimum(ratio * gain, clipped * gain) + kl * divergence
    held = (clipped * gain < ratio * gain).float()                           # where clipping takes the gradient away
    return (losses * mask).sum(1), {"kl": (divergence * mask).sum(1).detach(), "clip_fraction": (held * mask).sum(1)}


def token_logps(lm, input_ids, attention_mask, completion_mask, temperature=1.0):
    """Log-probabilities of single tokens, of padded rows as `data.collate` makes them, all (B, T).

    Returns float32 (B, T - 1), nats, at [b, t] that of token t + 1 where `completion_mask` is 1 and 0 elsewhere, under
    the distribution that is sampled from at `temperature` (with top-p 1).
    """
    scored = completion_mask[:, 1:].bool()
    hidden = lm.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    flat = lm_code.head_logps(lm, hidden[:, :-1][scored] / temperature, input_ids[:, 1:][scored])  # (N,)
    return flat.new_zeros(scored.shape).masked_scatter(scored, flat)


def micro_losses(policy, micros, reference, temperature, clip_ratio, kl):
    """`grpo_loss` of one micro-batch for `ipo.take_step`, which the list `micros` holds (see `micro_batches`).

    At its first visit the policy is still the one that sampled, so these log-probabilities are the old ones, and they
    are kept for later inner epochs with the reference's.
    """
    (micro,) = micros
    logps = token_logps(policy.lm, **micro["rows"], temperature=temperature)
    if "old" not in micro:
        micro["old"] = micro["ref"] = logps.detach()
        if reference is not None:
            with torch.no_grad():
                micro["ref"] = token_logps(reference.lm, **micro["rows"], temperature=temperature)
    losses, metrics = grpo_loss(logps, micro["old"], micro["ref"], micro["advantages"], micro["rows"]["completion_mask"][:, 1:],
                                clip_ratio, kl)
    return losses, {k: v for k, v in metrics.items() if k != "kl" or reference is not None}


def micro_batches(traces, advantages, micro_tokens, device):
    """Rollouts as padded micro-batches of at most `micro_tokens` tokens: [{"rows", "advantages"}]."""
    order = sorted(range(len(traces)), key=lambda i: len(traces[i]["prompt_ids"]) + len(traces[i]["ids"]))
    longest = len(traces[order[-1]]["prompt_ids"]) + len(traces[order[-1]]["ids"])
    size = max(1, micro_tokens // longest)
    return [{"rows": data.collate([(traces[i]["prompt_ids"], traces[i]["ids"]) for i in part], device),
             "advantages": torch.tensor([advantages[i] for i in part], device=device)}
            for part in (order[i:i + size] for i in range(0, len(order), size))]


# ------------------------------------------------------------------------------------------------------- the loop

def judged_rewards(path, traces, judge, kind):
    """Rewards of rollouts: I[y safe], I[z safe] - I[y safe] or I[z safe] (z reasoning, y response), None without verdict.

    Appends verdict records to `path`; resumes. Returns (rewards, number of questions asked).
    """
    out, questions = data.Appender(path), REWARDS[kind]
    # CHOICE: a truncated rollout has no response, so nothing of it counts as safe: its reward is 0, unasked.
    todo = [t for t in traces if t["id"] not in out.done and not t["truncated"]]
    answers = {q: list(judge.ask(q, [{"prompt": t["prompt"], "text": t[q]} for t in todo])) for q in questions}
    for i, t in enumerate(todo):
        out.write({"id": t["id"], **{f"{q}_safe": answers[q][i] for q in questions}})
    out.close()
    rewards = []
    for t in traces:
        safe = [False if t["truncated"] else out.done[t["id"]][f"{q}_safe"] for q in questions]
        rewards.append(None if None in safe else float(sum(w * s for w, s in zip(questions.values(), safe))))
    return rewards, len(questions) * sum(not t["truncated"] for t in traces)


def learn(policy, reference, sampler, prompts, reward_of, out, *, device, autocast, lr, group_size=8, prompts_per_step=8,
          epochs=1, inner_epochs=1, clip_ratio=0.2, kl=0.04, weight_decay=0.0, clip=1.0, micro_tokens=16384, save_every=10,
          seed=0):
    """Train `policy` in place; log, checkpoint and resume (see the top). Returns (metrics of each step, counts).

    Metrics: loss, kl and clip_fraction are means over tokens in the last inner epoch; reward a mean over judged rollouts,
    no_variety the share of groups without advantages, length in tokens; generations and judge_calls are what they cost.
    sampler: an `lm_code.LocalSampler` whose model this function sets to the policy; reward_of(path, traces) -> (rewards,
    questions asked); reference: a policy, or None where `kl` is 0.
    """
    jobs, dropped = intervene.trace_jobs(prompts, group_size, sampler)
    groups = [jobs[i:i + group_size] for i in range(0, len(jobs), group_size)]
    steps = data.global_batches([{i: 1} for i in range(len(groups))], prompts_per_step, epochs, seed)
    optimizer, log = ipo.start_or_resume(policy, out, lr, weight_decay)
    losses_of = functools.partial(micro_losses, reference=reference, temperature=sampler.options["temperature"],
                                  clip_ratio=clip_ratio, kl=kl)
    sampler.model = policy.lm
    for step in range(len(log), len(steps)):
        started, books = time.monotonic(), out / "rollouts" / f"{step:05}"
        # Sampled in the weights' own dtype: autocast mixes dtypes, and the sampler's cache has one. In eval mode, because
        # recomputed activations and a cache do not go together.
        policy.eval()
        traces = intervene.sample_traces(books.with_suffix(".traces.jsonl"), [
            {**job, "id": f"{job['id']}@{step}"} for g in steps[step] for job in groups[g]], sampler, f"rollouts {step}")
        policy.train()
        rewards, asked = reward_of(books.with_suffix(".verdicts.jsonl"), traces)
        rewards = torch.tensor([torch.nan if r is None else r for r in rewards]).view(-1, group_size)
        if rewards.isnan().all():
            raise SystemExit(f"No rollout has a verdict. Mend the judge, delete {books}.verdicts.jsonl and start again.")
        advantages = group_advantages(rewards)
        micros = micro_batches(traces, advantages.flatten().tolist(), micro_tokens, device)
        # CHOICE: one mean over all tokens of the step, so that every token counts alike; the paper cited above averages
        # within each rollout first, which lets the tokens of long ones count less.
        tokens = sum(len(t["ids"]) for t in traces)
        rate = ipo.learning_rate(step, len(steps), lr)  # CHOICE: the schedule of the other methods here
        for _ in range(inner_epochs):
            values, norm = ipo.take_step(policy, optimizer, rate, [[m] for m in micros], None, tokens, losses_of, autocast, clip)
        log.append({"step": step, **values, "reward": round(rewards.nanmean().item(), 6),
                    "no_variety": round((advantages == 0).all(1).float().mean().item(), 6), "length": tokens / len(traces),
                    "truncated": sum(t["truncated"] for t in traces), "unjudged": int(rewards.isnan().sum()),
                    "generations": len(traces), "judge_calls": asked, "grad_norm": norm, "lr": rate,
                    "seconds": round(time.monotonic() - started, 3)})
        ipo.end_step(policy, optimizer, out, log[-1], len(steps), save_every)
    return log, {"prompts": len(prompts), "short enough": len(prompts) - dropped, "steps": len(log),
                 **{k.replace("_", " "): sum(line[k] for line in log) for k in ("generations", "judge_calls", "unjudged")}}


# ------------------------------------------------------------------------------------------------------- the stage

def run(args):
    """The stage `grpo`: load, learn, save; returns its counts."""
    device, out = lm_code.pick_device(args.device), Path(args.out)
    dtype = lm_code.pick_dtype(args.dtype, device)
    out.mkdir(parents=True, exist_ok=True)
    load = functools.partial(ipo.load_policy, args.model, device, 0, 1, dtype, share=False, lora_rank=args.lora_rank,
                             checkpoint_activations=args.checkpoint_activations)
    policy, autocast = load()
    reference = load()[0].eval().requires_grad_(False) if args.kl else None  # in the same precision, so KL begins at 0
    sampler = lm_code.LocalSampler(args.model, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                                   max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    own = ("group_size", "prompts_per_step", "epochs", "inner_epochs", "clip_ratio", "kl", "lr", "weight_decay", "clip",
           "micro_tokens", "save_every", "seed")
    _, counts = learn(policy, reference, sampler, data.load_prompts(args.prompts, args.limit),
                      functools.partial(judged_rewards, judge=args.judge, kind=args.reward), out, device=device,
                      autocast=autocast, **{k: getattr(args, k) for k in own})
    ipo.save_model(policy, sampler.tokenizer, out, 0, lm_code.stored_dtype(args.model))
    return counts, {"judge": args.judge.summary()}


def build_parser():
    """The command line of this stage."""
    p = argparse.ArgumentParser(prog="ipo.py grpo", formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=
                                "The paper's baseline: GRPO with the judge as reward. One process on one device; it holds the "
                                "policy with its optimizer and, unless --kl is 0, the frozen reference.")
    p.add_argument("--out", required=True, help="directory for the trained model")
    p.add_argument("--prompts", required=True, help=intervene.FILES["prompts"])
    p.add_argument("--limit", type=int, default=0, help="use only the first prompts; 0 = all")
    p.add_argument("--reward", required=True, choices=REWARDS, help="response: I[y safe]; gap: I[z safe] - I[y safe]; "
                   "reasoning: I[z safe] (y response, z reasoning; the paper names the first two)")
    # CHOICE: but for the group's size the paper gives none of these; KL and its weight are those of Shao et al.
    p.add_argument("--group-size", type=int, default=8, help="rollouts of a prompt that are compared")
    p.add_argument("--prompts-per-step", type=int, default=8, help="groups a step")
    p.add_argument("--epochs", type=int, default=1, help="passes over the prompts; 5 make 40 generations a prompt")
    p.add_argument("--inner-epochs", type=int, default=1, help="updates on the same rollouts; clipping acts from the second on")
    p.add_argument("--clip-ratio", type=float, default=0.2, help="how far the probability ratio counts")
    p.add_argument("--kl", type=float, default=0.04, help="weight of the KL divergence from the reference")
    p.add_argument("--lr", type=float, default=1e-6, help="peak learning rate")
    p.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's weight decay")
    p.add_argument("--clip", type=float, default=1.0, help="largest global gradient norm")
    p.add_argument("--micro-tokens", type=int, default=16384, help="tokens a forward pass")
    p.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank only")
    p.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass")
    p.add_argument("--save-every", type=int, default=10, help="steps between checkpoints")
    lm_code.add_sampler_flags(p)
    # CHOICE: the gradient is that of the distribution sampled from only where the nucleus is all of it.
    p.set_defaults(temperature=1.0, top_p=1.0)
    client.add_judge_flags(p)
    return p


def main(argv=None):
    """Run the stage from the command line."""
    args = build_parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("grpo runs in one process: its sampler needs whole weights. Start it with python, not torchrun.")
    ipo.refuse_below_1(args, "prompts_per_step", "epochs", "inner_epochs", "micro_tokens", "save_every", "batch_size")
    if args.server or args.temperature <= 0 or args.group_size < 2:
        raise SystemExit("grpo samples in this process (no --server), at a --temperature above 0, in groups of at least 2.")
    args.judge = intervene.judge_of(args)
    data.stage(args.out, {**vars(args), "judge": args.judge.name}, [args.model, args.prompts], lambda: run(args))
    for old in Path(args.out).glob("checkpoint-*"):
        shutil.rmtree(old)


if __name__ == "__main__":
    main()
