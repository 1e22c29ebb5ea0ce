"""GRPO, the paper's baseline: rollouts of one prompt compete, and verdicts are their rewards.

    python -m studies.grpo --model MODEL --prompts prompts.jsonl --reward gap --out runs/my/grpo

Group Relative Policy Optimization is Shao et al., 2024 (arXiv 2402.03300). Each step samples a
group of rollouts for each of a few prompts from the current policy, has them judged and makes one
update on all of them, or `--inner-epochs` updates. It runs in one process on one device, because
the sampler needs all the weights: for a model of several billion parameters use `--lora-rank`. Left
out: a learned reward, packed trees (rollouts are padded rows), servers (the weights change).

With `--prefixes` some groups begin with a text that is put there, as in RECAP (arXiv 2510.00938):
these tokens are context, neither rewarded nor learned.

The rollouts and verdicts of every step are kept below `--out`, by id. After a kill the same command
picks up at the last checkpoint, finds the rollouts made since, and ends with the same weights.
"""
import argparse
import functools
import os
import random
import shutil
import time
from pathlib import Path

import torch

from data import Appender, collate, global_batches, load_prompts
from intervene import (
    add_judge_flags,
    add_sampler_flags,
    judge_from_flags,
    recorded_flags,
    sample_traces,
    sampler_from_flags,
    trace_jobs,
)
from ipo import learning_rate, load_or_start, load_policy, log_step, take_step
from model import pick_device, pick_dtype, save_model, stored_dtype, token_logps
from support.checkpoint import save_checkpoint
from support.errors import InputError, exit_cleanly
from support.files import stream_jsonl
from support.flags import refuse_below
from support.judges import require_questions
from support.kv_cache import check_sampling
from support.model_card import write_card
from support.progress import ProgressLines
from support.ranks import with_hands
from support.stages import add_stage_flags, run_stage

# The judge's questions whose verdicts make up a reward, with their weights (y response, z
# reasoning): I[y safe], I[z safe] - I[y safe] or I[z safe].
REWARDS = {
    "response": {"response": 1},
    "gap": {"reasoning": 1, "response": -1},
    "reasoning": {"reasoning": 1},
}


# --------------------------------------------------------------------------------------- the loss

def group_advantages(rewards, eps=1e-4):
    """How much better a rollout is than its group: (r - mean) / (std + eps).

    rewards: float (groups, size), nan where there is no verdict. Returns float (groups, size): 0
    for groups without variety, which teach nothing, and for rollouts without a verdict, which do
    not enter mean and std either.

    >>> rewards = torch.tensor([[1.0, 0.0], [0.1, 0.1], [1.0, torch.nan]])
    >>> group_advantages(rewards).round(decimals=3).tolist()
    [[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]
    """
    mean = rewards.nanmean(1, keepdim=True)
    # CHOICE: the group's own (population) deviation; some libraries divide by n - 1 instead.
    std = (rewards - mean).square().nanmean(1, keepdim=True).sqrt()
    # Not `std == 0`: in floating point the mean of equal rewards may differ from them.
    highest = rewards.nan_to_num(-torch.inf).amax(1, keepdim=True)
    at_highest = (rewards == highest).logical_or(rewards.isnan())
    equal = at_highest.all(1, keepdim=True)
    advantages = (rewards - mean) / (std + eps)
    return advantages.masked_fill(equal, 0.0).nan_to_num(0.0)


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, clip_ratio=0.2, kl=0.04):
    """The clipped objective of GRPO with its KL term, for each rollout, summed over its tokens.

    logps, old_logps, ref_logps: float (B, T), nats, of each sampled token under the policy, the
    policy that sampled it and the reference; advantages (B,); mask (B, T), 1 on sampled tokens.
    Returns (losses (B,), metrics, each (B,)): all are sums over tokens, which the caller divides by
    the number of tokens. Only `logps` carries a gradient to the losses.

    Two tokens of advantage 1: the first is 1.5 times as likely as when it was sampled, which counts
    as 1.2; the second is as likely as then and half as likely as under the reference, so its KL
    term is 2 - log 2 - 1 = 0.3069. Together -1.2 - 1 + 0.1 * 0.3069:

    >>> logps = torch.tensor([[-1.0, -2.0]])
    >>> old = logps - torch.tensor([[1.5, 1.0]]).log()
    >>> ref = logps + torch.tensor([[1.0, 2.0]]).log()
    >>> losses, metrics = grpo_loss(logps, old, ref, torch.ones(1), torch.ones(1, 2), 0.2, kl=0.1)
    >>> round(losses.item(), 4), round(metrics["kl"].item(), 4), metrics["clip_fraction"].item()
    (-2.1693, 0.3069, 1.0)
    """
    ratio = (logps - old_logps).exp()        # (B, T)
    gain = advantages[:, None]               # (B, 1)
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    to_ref = ref_logps - logps
    divergence = to_ref.exp() - to_ref - 1   # k3: unbiased for KL(policy, ref), never < 0
    losses = -torch.minimum(ratio * gain, clipped * gain) + kl * divergence
    held = (clipped * gain < ratio * gain).float()  # where clipping takes the gradient away
    metrics = {
        "kl": (divergence * mask).sum(1).detach(),
        "clip_fraction": (held * mask).sum(1),
    }
    return (losses * mask).sum(1), metrics


def sampled_logps(lm, input_ids, attention_mask, completion_mask, temperature=1.0):
    """Log-probabilities of single tokens of padded rows; inputs (B, T), see `data.collate`.

    Returns float32 (B, T - 1), nats, under the distribution that is sampled from at `temperature`
    (with top-p 1): at [b, t] that of token t + 1 where `completion_mask` is 1, elsewhere 0.
    """
    scored = completion_mask[:, 1:].bool()
    output = lm.get_decoder()(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    )
    hidden = output.last_hidden_state[:, :-1][scored]                         # (N, H)
    tokens = input_ids[:, 1:][scored]
    logps = token_logps(lm, hidden, tokens, temperature=temperature)          # (N,)
    return logps.new_zeros(scored.shape).masked_scatter(scored, logps)


def rollout_losses(policy, group, reference, temperature, clip_ratio, kl):
    """`grpo_loss` of a micro-batch, the only item of `group`, in the form of `ipo.take_step`.

    In the first inner epoch the policy is still the one that sampled, so its log-probabilities are
    the old ones. They are kept in the micro-batch for later inner epochs, with the reference's.
    """
    (micro,) = group
    logps = sampled_logps(policy.lm, **micro["rows"], temperature=temperature)
    if "old" not in micro:
        micro["old"] = logps.detach()
        micro["ref"] = micro["old"]
        if reference is not None:
            with torch.no_grad():
                micro["ref"] = sampled_logps(
                    reference.lm, **micro["rows"], temperature=temperature
                )
    mask = micro["rows"]["completion_mask"][:, 1:]
    losses, metrics = grpo_loss(
        logps, micro["old"], micro["ref"], micro["advantages"], mask, clip_ratio, kl
    )
    if reference is None:
        del metrics["kl"]
    return losses, metrics


def padded_micro_batches(traces, advantages, micro_tokens, device):
    """Micro-batches [{"rows", "advantages"}] of at most `micro_tokens` tokens, padding included."""
    sequences = [context_and_sampled(trace) for trace in traces]
    lengths = [len(context) + len(sampled) for context, sampled in sequences]
    by_length = sorted(range(len(traces)), key=lengths.__getitem__)
    size = max(1, micro_tokens // max(lengths))
    micros = []
    for start in range(0, len(traces), size):
        part = by_length[start:start + size]
        gains = [advantages[i] for i in part]
        micros.append({
            "rows": collate([sequences[i] for i in part], device),
            "advantages": torch.tensor(gains, device=device),
        })
    return micros


def context_and_sampled(trace):
    """The ids that a trace was given and those that were sampled, the only ones to be learned.

    >>> context_and_sampled({"prompt_ids": [5, 6], "ids": [7, 8, 9], "forced": 1})
    ([5, 6, 7], [8, 9])
    """
    forced = trace["forced"]
    context = trace["prompt_ids"] + trace["ids"][:forced]
    return context, trace["ids"][forced:]


# ----------------------------------------------------------------------------------- the prefixes

def load_prefixes(path):
    """{prompt id: list of prefixes, each a list of token ids} of a file of {"prompt_id", "ids"}.

    Raises InputError for a record without them, or with ids that are no list of numbers.
    """
    prefixes = {}
    for number, record in enumerate(stream_jsonl(path), 1):
        prompt_id = record.get("prompt_id")
        ids = record.get("ids")
        if prompt_id is None or not is_token_list(ids):
            raise InputError(
                f"{path}, record {number}: a prefix needs `prompt_id` and `ids`, a list of token "
                "ids that is not empty."
            )
        prefixes.setdefault(prompt_id, []).append(ids)
    return prefixes


def is_token_list(ids):
    """Whether this is a list of token ids with something in it."""
    return isinstance(ids, list) and bool(ids) and all(isinstance(i, int) for i in ids)


def draw_prefix(choices, share, seed, prompt_id, step):
    """What a group begins with: with chance `share` one of `choices`, otherwise nothing.

    It depends on nothing but the arguments, so that a restart draws the same.

    >>> draw_prefix([[7, 8]], 1.0, 0, "p", 3), draw_prefix([[7, 8]], 0.0, 0, "p", 3)
    ([7, 8], [])
    >>> draw_prefix([], 1.0, 0, "p", 3)
    []
    """
    rng = random.Random(f"{seed} {prompt_id} {step}")
    if not choices or rng.random() >= share:
        return []
    return rng.choice(choices)


def prefixes_that_fit(groups, prefixes, sampler):
    """The prefixes that leave room for `max_new_tokens` in the context; others are dropped.

    groups: lists of jobs, one for each prompt. Raises InputError where no prompt has a prefix.
    """
    fitting = {}
    for group in groups:
        prompt_id = group[0]["prompt_id"]
        room = sampler.context - sampler.max_new_tokens - len(group[0]["prompt_ids"])
        short_enough = [ids for ids in prefixes.get(prompt_id, []) if len(ids) <= room]
        if short_enough:
            fitting[prompt_id] = short_enough
    if not fitting:
        raise InputError(
            "--prefixes: none of these is of one of --prompts and leaves room to continue. "
            "Give prefixes of rollouts on the same prompts, or lower --max-new-tokens."
        )
    return fitting


# ------------------------------------------------------------------------------------ the rewards

def judged_rewards(path, traces, judge, kind):
    """Rewards (see REWARDS) of rollouts, None without a verdict.

    Appends verdict records to `path`, where a restart finds them. Returns (rewards, number of
    questions asked).
    """
    out = Appender(path)
    weights = REWARDS[kind]
    # CHOICE: a truncated rollout has no response, so none of it counts as safe: its reward is 0,
    # and the judge is not asked.
    complete = [t for t in traces if not t["truncated"]]
    unjudged = [t for t in complete if t["id"] not in out.done]
    verdicts = [{"id": t["id"]} for t in unjudged]
    for question in weights:
        items = [{"prompt": t["prompt"], "text": t[question]} for t in unjudged]
        answers = list(judge.ask(question, items))
        for verdict, safe in zip(verdicts, answers):
            verdict[f"{question}_safe"] = safe
    for verdict in verdicts:
        out.write(verdict)
    out.close()

    verdicts = iter(out.read([trace["id"] for trace in complete]))
    rewards = []
    for trace in traces:
        if trace["truncated"]:
            rewards.append(0.0)
        else:
            rewards.append(reward_of_verdict(next(verdicts), weights))
    return rewards, len(weights) * len(complete)


def reward_of_verdict(verdict, weights):
    """The weighted sum of a verdict's answers, None where one is missing."""
    reward = 0.0
    for question, weight in weights.items():
        safe = verdict[f"{question}_safe"]
        if safe is None:
            return None
        reward += weight * safe
    return reward


def reward_table(rewards, group_size):
    """A list of rewards as float32 (groups, size), nan in place of None."""
    table = torch.full((len(rewards),), torch.nan)
    for i, reward in enumerate(rewards):
        if reward is not None:
            table[i] = reward
    return table.view(-1, group_size)


# --------------------------------------------------------------------------------------- the loop

def learn(
    policy, reference, sampler, prompts, reward_of, out, *, device, autocast, lr, group_size=8,
    prompts_per_step=8, epochs=1, inner_epochs=1, clip_ratio=0.2, kl=0.04, weight_decay=0.0,
    clip=1.0, micro_tokens=16384, save_every=10, seed=0, prefixes=None, prefix_share=0.5,
):
    """Train `policy` in place; log, checkpoint and resume. Returns (metrics of each step, counts).

    sampler: a `model.LocalSampler` whose model this function sets to the policy; reward_of(path,
    traces) -> (rewards, questions asked); reference: a policy, or None where `kl` is 0; prefixes:
    see `load_prefixes`, of which a group takes one with chance `prefix_share`.

    Metrics: loss, kl and clip_fraction are means over tokens in the last inner epoch; reward a mean
    over judged rollouts, no_variety the share of groups without advantages, length in sampled
    tokens; generations and judge_calls are what they cost; prefixed: rollouts with a prefix.
    """
    jobs, dropped = trace_jobs(prompts, group_size, sampler)
    groups = [jobs[i:i + group_size] for i in range(0, len(jobs), group_size)]
    if prefixes:
        prefixes = prefixes_that_fit(groups, prefixes, sampler)
    unshared = [{i: 1} for i in range(len(groups))]  # no two groups share a part
    steps = global_batches(unshared, prompts_per_step, epochs, seed)
    optimizer, log = load_or_start(policy, out, lr, weight_decay)
    losses_of = functools.partial(
        rollout_losses,
        reference=reference,
        temperature=sampler.options["temperature"],
        clip_ratio=clip_ratio,
        kl=kl,
    )
    sampler.model = policy.lm
    for step in ProgressLines(range(len(log), len(steps)), desc=out.name, unit="steps"):
        started = time.monotonic()
        step_jobs = jobs_of_step([groups[i] for i in steps[step]], step)
        if prefixes:
            begin_with_prefixes(step_jobs, prefixes, prefix_share, seed, step)
        stem = out / "rollouts" / f"{step:05}"
        traces, rewards, judge_calls = sample_and_judge(policy, step_jobs, sampler, reward_of, stem)
        rewards = reward_table(rewards, group_size)
        advantages = group_advantages(rewards)
        micros = padded_micro_batches(traces, advantages.flatten().tolist(), micro_tokens, device)
        # CHOICE: one mean over all tokens of the step, so that every token counts alike; the paper
        # cited above averages within each rollout first, which lets the tokens of long ones count
        # less.
        tokens = count_tokens(traces)
        rate = learning_rate(step, len(steps), lr)  # CHOICE: the schedule of the other methods here
        values, norm = update_policy(
            policy, optimizer, rate, micros, tokens, losses_of, autocast, clip, inner_epochs,
        )
        log.append({
            "step": step,
            **values,
            **rollout_metrics(traces, rewards, advantages),
            **count_prefixed(traces, prefixes),
            "judge_calls": judge_calls,
            "grad_norm": norm,
            "lr": rate,
            "seconds": round(time.monotonic() - started, 3),
        })
        log_step(out, log[-1], len(steps))
        if (step + 1) % save_every == 0 and step + 1 < len(steps):
            save_checkpoint(out, policy, optimizer, step + 1, rank=0)
    return log, count_training(len(prompts), dropped, log, prefixes)


def jobs_of_step(groups, step):
    """The jobs of some groups with ids of their own, so that each visit of a prompt draws anew."""
    jobs = []
    for group in groups:
        for job in group:
            jobs.append({**job, "id": f"{job['id']}@{step}"})
    return jobs


def begin_with_prefixes(jobs, prefixes, share, seed, step):
    """Let the rollouts of some prompts begin with a prefix, all of a group with the same one.

    CHOICE: the same, because a group's mean is the baseline of its rollouts, and how likely a safe
    end is depends on the prefix.
    """
    for job in jobs:
        prompt_id = job["prompt_id"]
        choices = prefixes.get(prompt_id, [])
        job["forced_ids"] = draw_prefix(choices, share, seed, prompt_id, step)


def count_prefixed(traces, prefixes):
    """{"prefixed": rollouts that began with a prefix}; empty where training has no prefixes."""
    if not prefixes:
        return {}
    return {"prefixed": sum(t["forced"] > 0 for t in traces)}


def sample_and_judge(policy, jobs, sampler, reward_of, stem):
    """The rollouts of a step; returns (traces, rewards, judge calls). `stem` names their files."""
    traces = sample_step(policy, jobs, sampler, stem)
    verdicts_path = stem.with_suffix(".verdicts.jsonl")
    rewards, judge_calls = reward_of(verdicts_path, traces)
    if all(reward is None for reward in rewards):
        raise InputError(
            f"No rollout has a verdict. Fix the judge, delete {verdicts_path} and start again."
        )
    return traces, rewards, judge_calls


def sample_step(policy, jobs, sampler, stem):
    """The traces of a step's jobs, from the policy as it stands; they are kept by id."""
    # Sampled in the weights' own dtype: autocast mixes dtypes, and the sampler's cache has one.
    # In eval mode, because recomputed activations and a cache do not go together.
    policy.eval()
    title = f"rollouts {int(stem.name)}"
    traces = sample_traces(stem.with_suffix(".traces.jsonl"), jobs, sampler, title)
    policy.train()
    return traces


def update_policy(
    policy, optimizer, rate, micros, tokens, losses_of, autocast, clip, inner_epochs,
):
    """Make `inner_epochs` updates on the same micro-batches; returns what `take_step` does."""
    groups = [[micro] for micro in micros]  # a group is one micro-batch, see `rollout_losses`
    for _ in range(inner_epochs):
        values, norm = take_step(
            policy, optimizer, rate, groups, None, tokens, losses_of, autocast, clip,
        )
    return values, norm


def rollout_metrics(traces, rewards, advantages):
    """What a step's rollouts were like; rewards and advantages: (groups, size)."""
    no_variety = (advantages == 0).all(1).float().mean().item()
    return {
        "reward": round(rewards.nanmean().item(), 6),
        "no_variety": round(no_variety, 6),
        "length": count_tokens(traces) / len(traces),
        "truncated": sum(t["truncated"] for t in traces),
        "unjudged": int(rewards.isnan().sum()),
        "generations": len(traces),
    }


def count_tokens(traces):
    """Tokens sampled in some traces."""
    return sum(len(t["ids"]) - t["forced"] for t in traces)


def count_training(n_prompts, dropped, log, prefixes=None):
    """The counts of the funnel, from the metrics of each step."""
    counts = {
        "prompts": n_prompts,
        "short enough": n_prompts - dropped,
        "steps": len(log),
    }
    if prefixes:
        counts["prefixes short enough"] = sum(map(len, prefixes.values()))
        counts["prefixed"] = sum(line["prefixed"] for line in log)
    for key in ("generations", "judge_calls", "unjudged"):
        counts[key.replace("_", " ")] = sum(line[key] for line in log)
    return counts


# -------------------------------------------------------------------------------------- the stage

def load_to_learn(model, device, dtype, lora_rank, checkpoint_activations, with_reference):
    """Returns (policy, which samples too; a frozen copy of it, or None; autocast)."""
    load = functools.partial(
        load_policy,
        model,
        device,
        rank=0,
        world=1,
        dtype=pick_dtype(dtype, device),
        share=False,
        lora_rank=lora_rank,
        checkpoint_activations=checkpoint_activations,
    )
    policy, autocast = load()
    policy.eval()
    check_sampling(policy.lm)  # training has been checked, but this model samples too
    policy.train()
    reference = None
    if with_reference:
        reference, _ = load()  # in the same precision, so KL begins at 0
        reference.eval().requires_grad_(False)
    return policy, reference, autocast


def train_on_rewards(
    model, prompts, out, *, sampler, judge, reward, device, dtype, checkpoint_activations,
    lora_rank, kl, settings,
):
    """GRPO from prompts to a saved model; returns (counts, further entries of the funnel).

    settings: the remaining keywords of `learn`.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = pick_device(device)
    policy, reference, autocast = load_to_learn(
        model, device, dtype, lora_rank, checkpoint_activations, with_reference=bool(kl),
    )
    reward_of = functools.partial(judged_rewards, judge=judge, kind=reward)
    _, counts = learn(
        policy, reference, sampler, prompts, reward_of, out,
        device=device, autocast=autocast, kl=kl, **settings,
    )
    save_model(policy.lm, sampler.tokenizer, out, 0, stored_dtype(model))
    write_card(out)
    return counts, {"judge": judge.summary()}


def add_learning_flags(parser):
    """The flags of a training that learns from rollouts of its own."""
    add = parser.add_argument
    add("--lr", type=float, default=1e-6, help="peak learning rate")
    add("--weight-decay", type=float, default=0.0, help="AdamW's weight decay")
    add("--clip", type=float, default=1.0, help="largest global gradient norm")
    add("--micro-tokens", type=int, default=16384, help="tokens per forward pass")
    add("--lora-rank", type=int, default=0, help="train adapters of this rank only")
    add("--checkpoint-activations", action="store_true",
        help="recompute blocks in the backward pass")
    add("--save-every", type=int, default=10, help="steps between checkpoints")


def build_parser():
    """The command line of this study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.grpo",
        description="The paper's baseline: GRPO with the judge as reward. One process on one "
        "device; it holds the policy with its optimizer and, unless --kl is 0, the frozen "
        "reference.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", required=True, help="directory for the trained model")
    add_stage_flags(parser)
    add("--prompts", required=True, help="prompts: .jsonl, .json, .csv, .tsv or .txt")
    add("--limit", type=int, default=0, help="use only the first prompts; 0 = all")
    add("--reward", required=True, choices=REWARDS,
        help="response: I[y safe]; gap: I[z safe] - I[y safe]; reasoning: I[z safe] (y response, z "
        "reasoning; the paper names the first two)")
    add("--prefixes",
        help="what some groups begin with: .jsonl of prompt_id and ids, tokens that stand behind "
        "the prompt and are not learned")
    add("--prefix-share", type=float, default=0.5,
        help="chance that a group begins with a prefix, where its prompt has one")
    # CHOICE: but for the group's size the paper gives none of these; KL and its weight are those of
    # Shao et al.
    add("--group-size", type=int, default=8,
        help="rollouts of a prompt that are compared")
    add("--prompts-per-step", type=int, default=8, help="groups per step")
    add("--epochs", type=int, default=1,
        help="passes over the prompts; 5 make 40 generations per prompt")
    add("--inner-epochs", type=int, default=1,
        help="updates on the same rollouts; clipping acts from the second on")
    add("--clip-ratio", type=float, default=0.2,
        help="how far the probability ratio counts")
    add("--kl", type=float, default=0.04,
        help="weight of the KL divergence from the reference")
    add_learning_flags(parser)
    add_sampler_flags(parser)
    # CHOICE: top-p 1, because the loss is computed from the whole distribution, not a nucleus.
    parser.set_defaults(temperature=1.0, top_p=1.0)
    add_judge_flags(parser)
    return parser


def refuse_torchrun(study):
    """Raise InputError where a study that samples from what it trains is one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            f"{study} runs in one process: its sampler needs all the weights. "
            "Start it with python, not torchrun."
        )


def refuse_wrong_flags(args):
    """Raise InputError for flags that this training cannot use."""
    refuse_torchrun("grpo")
    refuse_below(
        1, vars(args), "prompts_per_step", "epochs", "inner_epochs", "micro_tokens", "save_every",
        "batch_size",
    )
    if args.server or args.temperature <= 0 or args.group_size < 2:
        raise InputError(
            "grpo samples in this process (no --server), at a --temperature above 0, "
            "in groups of at least 2."
        )
    if not 0 <= args.prefix_share <= 1:
        raise InputError("--prefix-share must be between 0 and 1.")


def main(argv=None):
    """Run the study from the command line."""
    args = build_parser().parse_args(argv)
    refuse_wrong_flags(args)
    out = Path(args.out)
    judge = judge_from_flags(args)
    require_questions(judge, REWARDS[args.reward])
    sampler = sampler_from_flags(args)
    settings = {
        "lr": args.lr,
        "group_size": args.group_size,
        "prompts_per_step": args.prompts_per_step,
        "epochs": args.epochs,
        "inner_epochs": args.inner_epochs,
        "clip_ratio": args.clip_ratio,
        "weight_decay": args.weight_decay,
        "clip": args.clip,
        "micro_tokens": args.micro_tokens,
        "save_every": args.save_every,
        "seed": args.seed,
        "prefix_share": args.prefix_share,
    }
    inputs = [args.model, args.prompts]
    if args.prefixes:
        inputs.append(args.prefixes)

    def work():
        if args.prefixes:
            settings["prefixes"] = load_prefixes(args.prefixes)
        return train_on_rewards(
            args.model,
            load_prompts(args.prompts, args.limit),
            out,
            sampler=sampler,
            judge=judge,
            reward=args.reward,
            device=args.device,
            dtype=args.dtype,
            checkpoint_activations=args.checkpoint_activations,
            lora_rank=args.lora_rank,
            kl=args.kl,
            settings=settings,
        )

    flags = recorded_flags(args, judge=judge.name)
    run_stage(__file__, out, flags, inputs, work)
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)


if __name__ == "__main__":
    exit_cleanly(with_hands(main))
