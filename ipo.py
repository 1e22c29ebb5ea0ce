"""Training: the loss of Intervened Preference Optimization and the loop that minimises it.

    python ipo.py train --model MODEL --pairs pairs.jsonl --out runs/my/stage1
    torchrun --nproc-per-node 8 ipo.py train ...          # the same, sharded over 8 GPUs

(Not *Identity* Preference Optimization, which other libraries call IPO; hence `preference_loss`,
never `ipo_loss`.)

The loop is plain: global batches drawn from a seed, each rank's share cut into micro-batches,
AdamW, cosine schedule. There is no resident reference model: its log-probabilities are computed
once, before the first update, by the same code. Without `--reference` it is the policy itself
before that update, so `loss/preference` starts at log 2 and the margins at 0. Several processes
shard the model with `fully_shard`, one block at a time; every sum is divided by the *global* count,
so the result depends neither on the number of ranks nor on the size of the micro-batches.
"""
import argparse
import contextlib
import functools
import math
import os
import shutil
import sys
import time
from pathlib import Path

from support.errors import InputError, exit_cleanly  # first, for Ctrl-C while torch is imported

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data import batch_tokens, collate, global_batches, load_pairs, micro_batches
from model import (completion_logps, empty_model, load_tokenizer, pick_device, pick_dtype,
                   read_weights, save_model, stored_dtype, tree_logps)
from support.checkpoint import load_checkpoint, merge_over_ranks, save_checkpoint
from support.files import (json_line, parse_jsonl, read_json, read_text, write_json, write_jsonl,
                           writing)
from support.flags import add_size_flags, add_training_flags, refuse_below
from support.model_card import write_card
from support.model_check import blocks_of, check_policy, guard_length
from support.plugins import load_object, source_file
from support.progress import ProgressLines, progress_bar
from support.record import fingerprint
from support.stages import close_stage, funnel_line, open_stage, sidecar
from support.trees import pack, tree_parts, use_tree_attention


# -------------------------------------------------------------------------------------- the loss

def preference_loss(policy_chosen_logps, policy_rejected_logps,
                    ref_chosen_logps, ref_rejected_logps, beta):
    """L_pref of Eq. 4 for each pair, from summed log-probabilities of the two suffixes.

    Arguments: float (B,), nats, summed over the tokens from h to EOS, given the shared prefix;
    beta: a float. Returns (losses, chosen_rewards, rejected_rewards), each (B,); the rewards carry
    no gradient.

    >>> zero = torch.zeros(1)
    >>> losses, chosen, rejected = preference_loss(zero, zero, zero, zero, beta=0.1)
    >>> round(losses.item(), 4)                                           # log 2: no preference yet
    0.6931
    """
    # With z the original trace, z~ the intervened one and h where they part, Eq. 4 is
    # -log sigmoid(beta * (log pi(z~[h:])/ref(z~[h:]) - log pi(z[h:])/ref(z[h:]))), each
    # probability given the prompt and z[:h].
    # (B,) log pi(z~[h:]) - log ref(z~[h:])
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    # (B,) log pi(z[h:]) - log ref(z[h:])
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    # PAPER: Eq. 4 as printed leaves the reference out of its first term; this is what its text and
    # ablation describe.
    losses = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))
    chosen_rewards = (beta * chosen_logratios).detach()
    rejected_rewards = (beta * rejected_logratios).detach()
    return losses, chosen_rewards, rejected_rewards


# -------------------------------------------------------------------------- the model in training

class Policy(nn.Module):
    """The language model with log-probabilities as its `forward`.

    FSDP gathers the root's weights in `forward` only, so everything that reads a weight, the output
    head too, has to happen inside it. With `share` each prefix is computed once for all sequences
    that begin with it; without it every sequence is a padded row.
    """

    def __init__(self, lm, share=False):
        super().__init__()
        self.lm = lm
        self.share = share
        if share:
            use_tree_attention(lm)

    def rows(self, sequences, device):
        """The keywords of `forward` for some (prefix, completion) sequences of token ids."""
        if not self.share:
            return collate(sequences, device)
        packed = pack(sequences)
        # All but `tree` are indices on the device; `tree`, lists of lengths, steers the attention.
        tree = packed.pop("tree")
        tensors = {key: torch.tensor(values, device=device) for key, values in packed.items()}
        return {"tree": tree, **tensors}

    def forward(self, **rows):
        """The `rows` of B sequences -> float32 (B,), nats, summed over completion tokens."""
        if self.share:
            return tree_logps(self.lm, **rows)
        return completion_logps(self.lm, **rows)


def start_distributed(device_name):
    """Join the process group under torchrun; alone otherwise. Returns (device, rank, world)."""
    world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these variables
    rank = int(os.environ.get("RANK", 0))
    device = pick_device(device_name)
    if world == 1:
        return device, rank, world
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo gathers Python objects, nccl gradients and weights
    dist.init_process_group(backend)
    return device, rank, world


def load_policy(path, device, rank, world, dtype, attn="sdpa", checkpoint_activations=False,
                share=True, lora_rank=0, compiled=False):
    """Build, shard and fill the policy; loading never allocates more than a rank's own shard.

    Trained weights are float32: at these learning rates an update is smaller than bfloat16 can
    resolve. Forward and backward passes compute in `dtype`. Returns (policy, autocast), where
    `autocast()` is the context manager for every forward pass.
    """
    # On the meta device, so shapes without memory: a rank never allocates what it won't hold.
    lm = empty_model(path, attn, lora_rank, dtype)
    blocks = blocks_of(lm)
    if checkpoint_activations:
        lm.activation_checkpointing_enable()  # before sharding, which hooks into the same blocks
    policy = Policy(lm, share).train()
    if world > 1:
        # FSDP by hand: each block is sharded by itself, then the root with all that is left
        # (embeddings, head), so that a forward or backward pass gathers one block at a time.
        # Blocks compute in `dtype`; gradients are summed over ranks in float32.
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in blocks:
            fully_shard(block, mp_policy=precision)
        fully_shard(policy, mp_policy=precision)
    read_weights(lm, path, device, rank, world)  # only now: each rank reads its rows of each weight
    check_policy(policy, device)
    guard_length(lm)
    if compiled:
        for block in blocks:  # not the attention: its shapes change with every tree
            block.mlp.compile(dynamic=True)
    if world > 1 or dtype == torch.float32:
        return policy, contextlib.nullcontext  # FSDP casts by itself; float32 needs no cast
    return policy, functools.partial(torch.autocast, device.type, dtype)


# -------------------------------------------------------------------------------- what is learned

def pair_sequences(pair, score_from="h"):
    """Chosen and rejected of a pair as (prefix, completion): scored from h or after the prompt.

    >>> pair = {"prefix_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "n_prompt": 1}
    >>> pair_sequences(pair), pair_sequences(pair, "prompt")
    ([([5, 6], [7]), ([5, 6], [8, 9])], [([5], [6, 7]), ([5], [6, 8, 9])])
    """
    start = len(pair["prefix_ids"]) if score_from == "h" else pair["n_prompt"]
    sequences = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = pair["prefix_ids"] + pair[side]
        sequences.append((ids[:start], ids[start:]))
    return sequences


def all_sides(pairs, score_from):
    """The chosen sequences of some pairs and their rejected ones, as two lists."""
    sequences = [pair_sequences(pair, score_from) for pair in pairs]
    chosen = [sides[0] for sides in sequences]
    rejected = [sides[1] for sides in sequences]
    return chosen, rejected


def pair_losses(policy, pairs, device, beta, sft_weight, score_from="h"):
    """Losses (B,) of some pairs, L_pref + sft_weight * L_sft, with their metrics, each (B,).

    A pair carries `ref`, its two reference log-probabilities. L_sft is the negative log-likelihood
    of the chosen suffix over its number of tokens. Chosen and rejected go through one forward pass.
    """
    chosen, rejected = all_sides(pairs, score_from)
    # Both sides together, so that they and other pairs of their prompt share one trunk.
    rows = policy.rows(chosen + rejected, device)
    chosen_logps, rejected_logps = policy(**rows).split(len(pairs))               # (B,), (B,)
    reference = torch.tensor([pair["ref"] for pair in pairs], device=device)      # (B, 2)
    losses, chosen_rewards, rejected_rewards = preference_loss(
        chosen_logps, rejected_logps, reference[:, 0], reference[:, 1], beta)
    # A mean over tokens in each pair, then over pairs: independent of how pairs are batched.
    lengths = torch.tensor([len(suffix) for _, suffix in chosen], device=device)  # (B,)
    sft = -chosen_logps / lengths
    metrics = {
        "loss/preference": losses,
        "loss/sft": sft,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return losses + sft_weight * sft, metrics


# ------------------------------------------------------------------------------- the reference

@torch.no_grad()
def reference_logps(policy, pairs, batches, device, autocast, score_from="h"):
    """Fill `pair["ref"]` with [chosen, rejected] log-probabilities under the policy as it stands.

    `batches` are micro-batches (lists of indices) of the first epoch, so that each pair is computed
    in the company in which training will first meet it: in bfloat16 another shape alone would move
    the first margins away from 0.
    """
    for micro in progress_bar(batches, desc="reference", unit="batches"):
        # A rank with nothing to do computes some pair all the same: a pass of FSDP takes all ranks.
        group = [pairs[i] for i in micro] or pairs[:1]
        chosen, rejected = all_sides(group, score_from)
        with autocast():
            logps = policy(**policy.rows(chosen + rejected, device))  # (2 B,)
        by_pair = logps.view(2, len(group)).T.tolist()  # lists of [chosen, rejected]
        for i, ref in zip(micro, by_pair):
            pairs[i]["ref"] = ref
    if hasattr(policy, "reshard"):
        # FSDP leaves the root gathered after a forward. An optimizer made now would hold those
        # gathered weights instead of the shards that are trained.
        policy.reshard()


def cached_reference(path, key, policy, pairs, batches, device, autocast, rank, world, score_from):
    """Fill `pair["ref"]` from the file `path` if it was made with `key`, else by one pass.

    The pass is stored in `path` for restarts and further epochs. All ranks must call this.
    """
    stored = {}
    if path.exists():
        stored = read_json(path, "key", "logps")  # the very floats that were written
    if stored.get("key") != key:
        reference_logps(policy, pairs, batches, device, autocast, score_from)
        # Each rank has computed its own share of the pairs, and will need any of them.
        mine = {pair["id"]: pair["ref"] for pair in pairs if "ref" in pair}
        stored = {"key": key, "logps": merge_over_ranks(mine, world)}
        if rank == 0:
            write_json(path, stored)
    for pair in pairs:
        pair["ref"] = stored["logps"][pair["id"]]


# --------------------------------------------------------------------------------------- the loop

def learning_rate(step, steps, peak, warmup=0.1):
    """Linear warm-up over the first tenth of the steps, then a cosine to 0.

    >>> [round(learning_rate(s, 20, 1.0), 2) for s in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    rise = max(1, round(steps * warmup))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def load_or_start(policy, out, lr, weight_decay, rank=0):
    """AdamW and the metrics so far: from the newest checkpoint in `out`, weights too, or new."""
    trained = [p for p in policy.parameters() if p.requires_grad]  # with LoRA the adapters only
    optimizer = torch.optim.AdamW(
        trained, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95), fused=True)
    step = load_checkpoint(out, policy, optimizer)
    path = out / "metrics.jsonl"
    log = []
    if step:
        # Steps after the checkpoint are made again; a line that a kill has torn is one of them.
        lines = read_text(path).splitlines()[:step]
        log = [line for _, line in parse_jsonl(lines, path)]
        if len(log) < step:
            raise InputError(f"{path}: {len(log)} of the {step} steps before the checkpoint. "
                             f"Delete {out} to train again.")
    if rank == 0:
        write_jsonl(path, log)
    return optimizer, log


def take_step(policy, optimizer, rate, groups, spare, total, losses_of, autocast,
              clip=1.0, world=1, defer_sync=False):
    """One update at learning rate `rate` down the gradient of sum(losses) / `total`.

    The sum goes over all groups and ranks. groups: this rank's micro-batches, lists of examples,
    each for `losses_of(policy, group) -> (losses, metrics)`; `spare` takes the place of an empty
    one. Returns (metrics: sums / `total`, gradient norm before clipping).
    """
    sums = {}
    # Gradients of all micro-batches add up before the one update.
    for number, group in enumerate(groups, 1):
        if world > 1:
            # Reducing after every micro-batch costs time; deferring it costs memory, because a
            # rank then keeps the gradients of all weights, not of its part alone.
            policy.set_requires_gradient_sync(not defer_sync or number == len(groups))
        with autocast():
            losses, metrics = losses_of(policy, group or spare)
        weight = 1 if group else 0  # an empty micro-batch takes part with weight 0
        # FSDP averages gradients over ranks: times `world` turns that into their sum, and over the
        # global count `total` that sum is the mean over the batch.
        (losses.sum() * weight * world / total).backward()
        for name, values in {"loss": losses, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + values.detach().float().sum() * weight

    trained = [p for p in policy.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, clip)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # on every rank: it communicates
    for part in optimizer.param_groups:
        part["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()

    # One synchronisation with the device for all metrics of the step.
    means = torch.stack(list(sums.values())) / total
    if world > 1:
        dist.all_reduce(means)
    means = [round(mean, 6) for mean in means.tolist()]
    return dict(zip(sums, means)), round(norm.item(), 6)


def fit(policy, examples, losses_of, parts, *, out, rank, world, autocast, batches, lr,
        weight_decay=0.0, clip=1.0, micro_tokens=16384, save_every=50, defer_sync=False):
    """Minimise the mean of `losses_of(policy, examples)` over global batches.

    examples: list; parts: the tokens that each costs (`token_parts`); batches: from
    `data.global_batches`. Writes `out/metrics.jsonl`, one line per update, and a checkpoint every
    `save_every` updates. Killed and started again, it picks up at the last checkpoint and ends with
    the same weights. Returns the list of metrics.
    """
    if not examples:
        if rank == 0:
            print(f"{out.name}: nothing to train on, so the model is passed on unchanged")
        return []
    optimizer, log = load_or_start(policy, out, lr, weight_decay, rank)
    # Nothing here is random: rate and batch follow from the step, so a restart repeats them.
    # Lines, not a bar: each step prints a line of its own.
    for step in ProgressLines(range(len(log), len(batches)), desc=out.name, unit="steps"):
        started = time.monotonic()
        batch = batches[step]
        rate = learning_rate(step, len(batches), lr)
        groups = []
        for micro in micro_batches(batch, parts, micro_tokens, rank, world):
            groups.append([examples[i] for i in micro])
        values, norm = take_step(policy, optimizer, rate, groups, examples[:1], len(batch),
                                 losses_of, autocast, clip, world, defer_sync)
        speed = batch_tokens(batch, parts) / (time.monotonic() - started)
        log.append({"step": step, **values, "grad_norm": norm, "lr": rate,
                    "tokens_per_s": round(speed)})
        log_step(out, log[-1], len(batches), rank)
        if (step + 1) % save_every == 0 and step + 1 < len(batches):
            save_checkpoint(out, policy, optimizer, step + 1, rank)
    return log


def log_step(out, line, steps, rank=0):
    """Add one step's metrics to `out/metrics.jsonl` and print them.

    Raises InputError when the loss is not a finite number.
    """
    if rank == 0:
        path = out / "metrics.jsonl"
        with writing(path), open(path, "a") as file:
            file.write(json_line(line) + "\n")
        print(step_line(out.name, line, steps), flush=True)
    if not math.isfinite(line["loss"]):
        raise InputError(f"step {line['step'] + 1}: the loss is {line['loss']}. "
                         "Lower --lr, or look for a broken pair.")


SHOWN = {  # metrics that are printed, and how; some are those of studies/grpo.py
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "reward": "reward",
    "no_variety": "groups without variety",
    "kl": "KL",
    "grad_norm": "grad norm",
    "tokens_per_s": "tokens/s",
}


def step_line(title, line, steps):
    """One step as one line for people.

    >>> step_line("stage1", {"step": 0, "loss": 0.7654321, "lr": 1e-6}, 13)
    'stage1 1/13: loss 0.7654'
    """
    shown = [f"{SHOWN[key]} {line[key]:.4g}" for key in SHOWN if key in line]
    return f"{title} {line['step'] + 1}/{steps}: " + ", ".join(shown)


# -------------------------------------------------------------------------------------- the stage

def open_training(program, out, flags, inputs, rank, world):
    """Open the stage (rank 0 decides for all); returns whether it is finished already."""
    answer = [None]
    if rank == 0:
        answer = [open_stage(program, out, flags, inputs)]
    if world > 1:
        dist.broadcast_object_list(answer)  # in place; other ranks wait here for the first
    funnel = answer[0]
    if funnel is None:
        out.mkdir(parents=True, exist_ok=True)
        return False
    if rank == 0:
        print(funnel_line(funnel), "(finished before)")
    leave_ranks(world)
    return True


def close_training(out, counts, rank, world):
    """Write model card and funnel, remove the checkpoints and leave the other ranks."""
    if rank == 0:
        write_card(out)
        # In this order: killed in between, the stage is finished, and only space is wasted.
        close_stage(out, counts)
        for checkpoint in out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    leave_ranks(world)


def leave_ranks(world):
    """Leave the process group and end this process; does nothing where it is alone."""
    if world > 1:
        dist.barrier()  # a rank that leaves while another still talks to it can crash that one
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # threads of torch's that are still there would crash an ordinary exit


def token_parts(rows, share):
    """The tokens that each example costs, in the form that `data.micro_batches` adds up.

    rows: for each example its (prefix, completion) sequences; any iterable.
    """
    if share:
        return [tree_parts(sequences) for sequences in rows]
    longest = 0
    counts = []
    for sequences in rows:
        counts.append(len(sequences))
        for prefix, completion in sequences:
            longest = max(longest, len(prefix) + len(completion))
    # Padded rows: every example by itself, as long as the longest that it may be padded to.
    return [{i: count * longest} for i, count in enumerate(counts)]


def dtype_to_save(name, model):
    """The dtype of the saved weights; `auto` is that of the model that training starts from."""
    if name == "auto":
        return stored_dtype(model)
    return getattr(torch, name)


def train(pair_files, *, model, reference, loss, beta, sft_weight, score_from, out, flags, device,
          dtype, share, loading, batch_size, epochs, seed, max_length, micro_tokens, fitting,
          save_dtype):
    """The stage `train`: preference training (Eq. 4), from files of pairs to a saved model.

    loss: MODULE:FUNCTION in place of `pair_losses`, or None. flags: recorded beside `out`. loading:
    more keywords of `load_policy`; fitting: of `fit`.
    """
    device, rank, world = start_distributed(device)
    reference = reference or model
    inputs = [model, *pair_files]
    losses = pair_losses
    if loss:
        losses = load_object(loss, "--loss")
        inputs.append(source_file(losses, loss))  # edited, it is another loss
    if reference != model:
        inputs.append(reference)
    if open_training(__file__, out, flags, inputs, rank, world):
        return

    tokenizer = load_tokenizer(model)  # to be saved with the model
    pairs, dropped = load_pairs(pair_files, max_length)
    sequences_of = functools.partial(pair_sequences, score_from=score_from)
    parts = token_parts(map(sequences_of, pairs), share=True)
    # By trees also for padded rows, so that both ways learn the same batches in the same order.
    batches = global_batches(parts, batch_size, epochs, seed)
    if not share:
        parts = token_parts(map(sequences_of, pairs), share=False)

    dtype = pick_dtype(dtype, device)
    load = functools.partial(load_policy, device=device, rank=rank, world=world, dtype=dtype,
                             share=share, **loading)
    policy, autocast = load(reference)
    if pairs:
        first_epoch = []
        for batch in batches[:math.ceil(len(pairs) / batch_size)]:
            first_epoch += micro_batches(batch, parts, micro_tokens, rank, world)
        # All that the reference's numbers depend on, but for rounding.
        key = [fingerprint(path) for path in (reference, *pair_files)]
        key += [str(dtype), score_from, not share, max_length]
        cached_reference(sidecar(out, "reference"), key, policy, pairs, first_epoch, device,
                         autocast, rank, world, score_from)
    if reference != model:
        del policy  # never two models at once
        policy, autocast = load(model)

    losses_of = functools.partial(losses, device=device, beta=beta, sft_weight=sft_weight,
                                  score_from=score_from)  # (policy, pairs) -> (losses, metrics)
    log = fit(policy, pairs, losses_of, parts, out=out, rank=rank, world=world, autocast=autocast,
              batches=batches, micro_tokens=micro_tokens, **fitting)
    save_model(policy.lm, tokenizer, out, rank, dtype_to_save(save_dtype, model))
    counts = {"examples": len(pairs) + dropped, "short enough": len(pairs), "steps": len(log)}
    close_training(out, counts, rank, world)


# ------------------------------------------------------------------------------- the command line

def training_settings(args):
    """The keywords that all training stages share, from the flags above; called in `main` only.

    Raises InputError for a flag that counts something and is below 1.
    """
    refuse_below(
        1, vars(args), "batch_size", "micro_tokens", "max_length", "epochs", "save_every",
    )
    loading = {
        "attn": args.attn,
        "checkpoint_activations": args.checkpoint_activations,
        "lora_rank": args.lora_rank,
        "compiled": args.compile,
    }
    fitting = {
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "clip": args.clip,
        "save_every": args.save_every,
        "defer_sync": args.defer_sync,
    }
    return {
        "model": args.model,
        "out": Path(args.out),
        "flags": vars(args),
        "device": args.device,
        "dtype": args.dtype,
        "share": not args.no_share,
        "loading": loading,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "seed": args.seed,
        "max_length": args.max_length,
        "micro_tokens": args.micro_tokens,
        "fitting": fitting,
        "save_dtype": args.save_dtype,
    }


def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="ipo.py", description="Train on preference pairs.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "preference training, Eq. 4"
    train_parser = commands.add_parser("train", help=text, description=text,
                                       formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_size_flags(train_parser)
    add = train_parser.add_argument
    add("--out", required=True,
        help="directory for the trained model")
    add("--pairs", required=True, nargs="+",
        help="files of pair records")
    # CHOICE: stage 2 keeps the base model as reference, so that the harmful pairs, which stage 1
    # has learned, give little gradient. With stage 1 as reference they start again at log 2, and
    # the tiny model's language degraded.
    add("--reference",
        help="the frozen model of Eq. 4; default: --model as it is before training")
    # CHOICE: beta is not in the paper; 0.1 is the usual value.
    add("--beta", type=float, default=0.1,
        help="weight of the log-ratios in Eq. 4")
    add("--sft-weight", type=float, default=0.2,
        help="weight of L_sft")
    add("--score-from", choices=("h", "prompt"), default="h",
        help="first token scored: h as in the paper, or all of the trajectory (its ablation)")
    add("--loss", metavar="MODULE:FUNCTION",
        help="a loss of your own, of the form of `pair_losses`")
    add_training_flags(train_parser, lr=1e-6)
    return parser


def main(argv=None):
    """Run the stage from the command line."""
    args = build_parser().parse_args(argv)
    train(args.pairs, reference=args.reference, loss=args.loss, beta=args.beta,
          sft_weight=args.sft_weight, score_from=args.score_from, **training_settings(args))


if __name__ == "__main__":
    record(exit_cleanly)(main)  # torchrun then shows the traceback of the rank that failed first
