"""Training: the preference loss of Intervened Preference Optimization and the loop that minimises it.

    python ipo.py train --model MODEL --pairs pairs.jsonl --out runs/my/stage1
    torchrun --nproc-per-node 8 ipo.py train ...          # the same, sharded over 8 GPUs

(Not *Identity* Preference Optimization, which other libraries call IPO; hence `preference_loss`, never `ipo_loss`.)

The loop is plain: global batches drawn from a seed, each rank's share cut into micro-batches, AdamW, cosine schedule.
There is no resident reference model: its log-probabilities are computed once, before the first update, by the same
code on the same weights, so the first loss is log 2 and the first margins are 0. Several processes shard the model
with `fully_shard`, one block at a time; every sum is divided by the *global* count, so the result depends neither on
the number of ranks nor on the size of the micro-batches.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
import model as lm_code


# ------------------------------------------------------------------------------------------------------- the loss

def preference_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """L_pref of Eq. 4 for each pair, from summed log-probabilities of the two suffixes.

    Arguments: float (B,), nats, summed over the tokens from h to EOS, given the shared prefix; beta: a float.
    Returns (losses, chosen_rewards, rejected_rewards), each (B,); the rewards carry no gradient.

    >>> zero = torch.zeros(1)
    >>> losses, chosen, rejected = preference_loss(zero, zero, zero, zero, beta=0.1)
    >>> round(losses.item(), 4)                                                    # log 2: no preference yet
    0.6931
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps        # (B,) log pi(z~[h:]) - log ref(z~[h:])
    rejected_logratios = policy_rejected_logps - ref_rejected_logps  # (B,) log pi(z[h:])  - log ref(z[h:])
    # PAPER: Eq. 4 as printed leaves the reference out of its first term; this is what its text and ablation describe.
    losses = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


# -------------------------------------------------------------------------------------------------------- batches

def collate(sequences, device="cpu"):
    """Right-pad (prefix_ids, completion_ids) sequences into the three (B, T) tensors of `completion_logps`.

    >>> batch = collate([([5, 6], [7]), ([5], [8, 9, 1])])
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[5, 6, 7, 0], [5, 8, 9, 1]], [[0, 0, 1, 0], [0, 1, 1, 1]])
    """
    shape = len(sequences), max(len(p) + len(c) for p, c in sequences)
    batch = {k: torch.zeros(shape, dtype=torch.long) for k in ("input_ids", "attention_mask", "completion_mask")}
    for row, (prefix, completion) in enumerate(sequences):
        end = len(prefix) + len(completion)
        batch["input_ids"][row, :end] = torch.tensor(list(prefix) + list(completion))
        batch["attention_mask"][row, :end] = 1
        batch["completion_mask"][row, len(prefix):end] = 1
    return {k: v.to(device) for k, v in batch.items()}


def global_batches(n, batch_size, epochs, seed):
    """Index lists, one a step: every example once an epoch, in an order that depends on the seed and epoch alone.

    >>> [sorted(b) for b in global_batches(5, 5, 2, seed=0)]
    [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    """
    batches = []
    for epoch in range(epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
        batches += [order[i:i + batch_size] for i in range(0, n, batch_size)]
    return batches


def micro_batches(indices, lengths, budget, rank=0, world=1):
    """This rank's share of a global batch, cut so that no padded micro-batch exceeds `budget` tokens.

    Every rank gets the same number of lists (some may be empty), because sharded ranks that make different numbers
    of forward passes wait for each other for ever.

    >>> micro_batches([0, 1, 2], lengths=[4, 2, 3], budget=8, rank=0, world=2)   # rank 0 holds examples 0 and 2
    [[2, 0]]
    >>> micro_batches([0, 1, 2], lengths=[4, 2, 3], budget=4, rank=1, world=2)
    [[1], []]
    """
    shares = []
    for r in range(world):
        share = [[]]
        for i in sorted(indices[r::world], key=lambda i: (lengths[i], i)):  # like lengths together: less padding
            if share[-1] and lengths[i] * (len(share[-1]) + 1) > budget:    # sorted, so this one is the longest
                share.append([])
            share[-1].append(i)
        shares.append(share)
    return shares[rank] + [[]] * (max(map(len, shares)) - len(shares[rank]))


# ------------------------------------------------------------------------------------------- the model in training

class Policy(nn.Module):
    """The language model with log-probabilities as its `forward`, the form in which FSDP can wrap it whole."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids, attention_mask, completion_mask):
        """(B, T) three times -> float32 (B,), nats, summed over completion tokens."""
        return lm_code.completion_logps(self.lm, input_ids, attention_mask, completion_mask)


def start_distributed(device_name):
    """Join the process group under torchrun; alone otherwise. Returns (device, rank, world)."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = lm_code.pick_device(device_name)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world


def shard(policy, dtype):
    """FSDP by hand: shard each block, then the rest, so that one block at a time is gathered."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in policy.lm.get_decoder().layers:
        fully_shard(block, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)


def load_policy(path, device, world, dtype, attn="sdpa", checkpoint_activations=False):
    """Load float32 master weights; compute in `dtype`. Returns (policy, context manager factory for the forward)."""
    lm = lm_code.load_model(path, device, torch.float32, attn)
    if checkpoint_activations:
        lm.activation_checkpointing_enable()
    policy = Policy(lm).train()
    if world > 1:
        shard(policy, dtype)
    if world > 1 or dtype == torch.float32:
        return policy, contextlib.nullcontext
    return policy, lambda: torch.autocast(device.type, dtype)


# --------------------------------------------------------------------------------------------------- what is learnt

def pair_sequences(pair, score_from="h"):
    """The two sequences of a pair, as (prefix, completion): scored from h, or from the end of the prompt."""
    n = len(pair["prefix_ids"]) if score_from == "h" else pair["n_prompt"]
    whole = [pair["prefix_ids"] + pair[side] for side in ("chosen_ids", "rejected_ids")]
    return [(ids[:n], ids[n:]) for ids in whole]


def pair_losses(policy, pairs, device, beta, sft_weight, score_from="h"):
    """Losses (B,) of some pairs with their metrics (each a (B,) tensor): L_pref + sft_weight * L_sft.

    A pair carries `ref`, its two reference log-probabilities. L_sft is the negative log-likelihood of the chosen
    suffix over its number of tokens. Chosen and rejected go through one forward pass.
    """
    sequences = [s for i in (0, 1) for s in (pair_sequences(p, score_from)[i] for p in pairs)]
    chosen, rejected = policy(**collate(sequences, device)).split(len(pairs))                # (B,), (B,)
    ref_chosen, ref_rejected = torch.tensor([p["ref"] for p in pairs], device=device).T      # (B,), (B,)
    losses, chosen_rewards, rejected_rewards = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    sft = -chosen / torch.tensor([len(c) for _, c in sequences[:len(pairs)]], device=device)
    return losses + sft_weight * sft, {
        "loss/preference": losses, "loss/sft": sft,
        "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "logps/chosen": chosen, "logps/rejected": rejected}


def sft_losses(policy, examples, device):
    """Losses (B,) of supervised fine-tuning: mean negative log-likelihood of each completion's tokens."""
    logps = policy(**collate([(e["prefix_ids"], e["chosen_ids"]) for e in examples], device))
    return -logps / torch.tensor([len(e["chosen_ids"]) for e in examples], device=device), {}


@torch.no_grad()
def reference_logps(policy, pairs, batches, device, autocast, score_from="h"):
    """Fill `pair["ref"]` with [chosen, rejected] log-probabilities under the policy as it stands now.

    `batches` are micro-batches of the first epoch, so that each pair is computed in the company in which training
    will first meet it: in bfloat16 another padding alone would move the first margins away from 0.
    """
    for micro in batches:
        group = [pairs[i] for i in micro] or pairs[:1]
        sequences = [s for i in (0, 1) for s in (pair_sequences(p, score_from)[i] for p in group)]
        with autocast():
            values = policy(**collate(sequences, device)).tolist()
        for k, i in enumerate(micro):
            pairs[i]["ref"] = [values[k], values[k + len(group)]]
    if hasattr(policy, "reshard"):  # FSDP leaves the root gathered after a forward; an optimizer made now would miss it
        policy.reshard()


# ------------------------------------------------------------------------------------------------------- the loop

def learning_rate(step, steps, peak, warmup=0.1):
    """Linear warm-up over the first tenth of the steps, then a cosine to 0.

    >>> [round(learning_rate(s, 20, 1.0), 2) for s in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    rise = max(1, round(steps * warmup))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def fit(policy, examples, losses_of, lengths, *, out, rank, world, autocast, batches, lr, weight_decay=0.0,
        clip=1.0, micro_tokens=16384, save_every=50):
    """Minimise the mean of `losses_of(policy, examples)` over global batches; log, checkpoint and resume.

    examples: list; lengths: padded cost of each in tokens; batches: index lists from `global_batches`. Writes
    `out/metrics.jsonl`, one line a step. Killed and started again, it goes on from the last of its checkpoints
    (every `save_every` steps) and ends with the same weights. Returns the list of metrics.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95))
    first = load_checkpoint(out, policy, optimizer)
    log = data.read_jsonl(out / "metrics.jsonl")[:first] if first else []
    if rank == 0:
        data.write_jsonl(out / "metrics.jsonl", log)  # lines after the checkpoint are made again
    for step in range(first, len(batches)):
        started = time.monotonic()
        rate = learning_rate(step, len(batches), lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums, tokens = {}, sum(lengths[i] for i in batches[step])
        for micro in micro_batches(batches[step], lengths, micro_tokens, rank, world):
            group = [examples[i] for i in micro] or examples[:1]
            with autocast():
                losses, metrics = losses_of(policy, group)
            weight = len(micro) > 0  # an empty micro-batch takes part with weight 0
            # FSDP averages gradients over ranks; times world makes it the sum, over the global count the mean.
            (losses.sum() * weight * world / len(batches[step])).backward()
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + values.detach().double().sum() * weight
        norm = nn.utils.clip_grad_norm_(policy.parameters(), clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # on every rank: it communicates
        optimizer.step()
        optimizer.zero_grad()
        values = all_sum(torch.stack(list(sums.values())) / len(batches[step]), world)
        line = {"step": step, **{k: round(v, 6) for k, v in zip(sums, values.tolist())},
                "grad_norm": round(norm.item(), 6), "lr": rate,
                "tokens_per_s": round(tokens / (time.monotonic() - started))}
        log.append(line)
        if rank == 0:
            with open(out / "metrics.jsonl", "a") as f:
                f.write(data.dump(line) + "\n")
            print(step_line(out.name, line, len(batches)), flush=True)
        if not math.isfinite(line["loss"]):
            raise SystemExit(f"step {step}: the loss is {line['loss']}. Lower --lr, or look for a broken pair.")
        if (step + 1) % save_every == 0 and step + 1 < len(batches):
            save_checkpoint(out, policy, optimizer, step + 1, rank)
    return log


def all_sum(tensor, world):
    """Sum a tensor over the ranks."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def step_line(title, line, steps):
    """One step as one line for people."""
    shown = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy", "grad_norm": "grad norm",
             "tokens_per_s": "tokens/s"}
    return f"{title} {line['step'] + 1}/{steps}: " + ", ".join(
        f"{name} {line[key]:.4g}" for key, name in shown.items() if key in line)


def save_checkpoint(out, policy, optimizer, step, rank):
    """Store weights and optimizer (a shard a rank) under a temporary name, then rename; keep the newest only."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    weights, moments = get_state_dict(policy, optimizer)
    temporary, final = out / "checkpoint.tmp", out / f"checkpoint-{step}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary)
    barrier()
    if rank == 0:
        os.replace(temporary, final)
        for old in out.glob("checkpoint-*"):
            if old != final:
                shutil.rmtree(old)


def load_checkpoint(out, policy, optimizer):
    """Restore the newest checkpoint in place; returns the step to go on from, 0 where there is none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    steps = [int(p.name.split("-")[1]) for p in out.glob("checkpoint-*")]
    if not steps:
        return 0
    weights, moments = get_state_dict(policy, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=out / f"checkpoint-{max(steps)}")
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return max(steps)


def barrier():
    """Wait for the other ranks, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def save_model(policy, tokenizer, out, rank, dtype):
    """Write a Hugging Face directory (safetensors, config, tokenizer, generation config) into `out`.

    Files are written to a temporary folder and renamed one by one. All ranks must call it: gathering communicates.
    """
    weights = {}
    for name, p in policy.lm.named_parameters():  # tied weights come once
        p = p.detach()
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        if rank == 0:
            weights[name] = p.to("cpu", dtype)
    if rank == 0:
        temporary = out / ".model.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        policy.lm.config.dtype = dtype
        policy.lm.save_pretrained(temporary, state_dict=weights, max_shard_size="5GB")
        tokenizer.save_pretrained(temporary)
        for path in temporary.iterdir():
            os.replace(path, out / path.name)
        temporary.rmdir()
        for old in out.glob("checkpoint-*"):
            shutil.rmtree(old)
    barrier()


# ------------------------------------------------------------------------------------------------------- the stages

def load_pairs(paths, max_length):
    """Read pair records, drop those longer than `max_length` tokens; returns (pairs, number dropped).

    Raises ValueError for a record that lacks a field, has an empty side, or whose id comes twice.
    """
    pairs, seen, dropped = [], set(), 0
    for path in paths:
        for number, pair in enumerate(data.read_jsonl(path), 1):
            for key in ("prefix_ids", "chosen_ids", "rejected_ids"):
                if not pair.get(key) or not all(isinstance(t, int) for t in pair[key]):
                    raise ValueError(f"{path}, record {number}: {key} must be a non-empty list of token ids. "
                                     "Make the file with `intervene.py pairs` or `intervene.py benign`.")
            if pair["id"] in seen:
                raise ValueError(f"{path}, record {number}: the id {pair['id']!r} comes twice.")
            seen.add(pair["id"])
            if pair_cost(pair) > 2 * max_length:
                dropped += 1
            else:
                pairs.append(pair)
    return pairs, dropped


def pair_cost(pair):
    """Tokens that a pair costs when its two rows are padded to the longer one."""
    return 2 * (len(pair["prefix_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])))


def cached_reference(path, key, policy, pairs, batches, device, autocast, rank, world, score_from):
    """Reference log-probabilities from `path` if they were made with `key`, else from one pass, which is stored."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    if stored.get("key") != key:
        reference_logps(policy, pairs, batches, device, autocast, score_from)
        shares = [None] * world
        mine = {p["id"]: p["ref"] for p in pairs if "ref" in p}
        dist.all_gather_object(shares, mine) if world > 1 else shares.__setitem__(0, mine)
        stored = {"key": key, "logps": {id: ref for share in shares for id, ref in share.items()}}
        if rank == 0:
            data.write_json(path, stored)
    for pair in pairs:
        pair["ref"] = stored["logps"][pair["id"]]


def load_completions(paths, tokenizer, max_length):
    """Examples for `sft`: the chosen side of pair records, or records with the texts `prompt` and `completion`."""
    examples, dropped = [], 0
    for path in paths:
        for number, record in enumerate(data.read_jsonl(path), 1):
            if "chosen_ids" not in record:
                if not all(isinstance(record.get(k), str) for k in ("prompt", "completion")):
                    raise ValueError(f"{path}, record {number}: needs the texts `prompt` and `completion`, "
                                     "or the ids of a pair.")
                ids = tokenizer.encode(record["completion"], add_special_tokens=False) + [tokenizer.eos_token_id]
                record = {"prefix_ids": lm_code.render_prompt(tokenizer, record["prompt"]), "chosen_ids": ids}
            if len(record["prefix_ids"]) + len(record["chosen_ids"]) > max_length:
                dropped += 1
            else:
                examples.append(record)
    return examples, dropped


def run(args):
    """The stages `train` (preference pairs) and `sft` (completions): read, train, save, one funnel line."""
    device, rank, world = start_distributed(args.device)
    out, files = Path(args.out), args.pairs if args.command == "train" else args.data
    inputs = [args.model, *files] + ([args.reference] if getattr(args, "reference", None) else [])
    finished = data.begin(out, vars(args), inputs) if rank == 0 else None
    if world > 1:
        dist.broadcast_object_list(box := [finished])
        finished = box[0]
    if finished:
        return print(data.funnel_line(finished), "(finished before)") if rank == 0 else None
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = lm_code.load_tokenizer(args.model)
    dtype = lm_code.pick_dtype(args.dtype, device)
    load = functools.partial(load_policy, device=device, world=world, dtype=dtype, attn=args.attn,
                             checkpoint_activations=args.checkpoint_activations)
    reference = getattr(args, "reference", None) or args.model
    policy, autocast = load(reference)
    if args.command == "train":
        examples, dropped = load_pairs(files, args.max_length)
        lengths = [pair_cost(p) for p in examples]
        losses_of = functools.partial(pair_losses, device=device, beta=args.beta, sft_weight=args.sft_weight,
                                      score_from=args.score_from)
    else:
        examples, dropped = load_completions(files, tokenizer, args.max_length)
        lengths = [len(e["prefix_ids"]) + len(e["chosen_ids"]) for e in examples]
        losses_of = functools.partial(sft_losses, device=device)
    batches, log = global_batches(len(examples), args.batch_size, args.epochs, args.seed), []
    if not examples and rank == 0:
        print(f"{out.name}: nothing to train on, so the model is passed on unchanged")
    if examples:
        if args.command == "train":
            epoch = [m for b in batches[:math.ceil(len(examples) / args.batch_size)]
                     for m in micro_batches(b, lengths, args.micro_tokens, rank, world)]
            key = [data.fingerprint(p) for p in (reference, *files)] + [str(dtype), args.score_from]
            cached_reference(data.beside(out, "reference"), key, policy, examples, epoch, device, autocast, rank,
                             world, args.score_from)
        if reference != args.model:
            del policy  # never two models at once
            policy, autocast = load(args.model)
        log = fit(policy, examples, losses_of, lengths, out=out, rank=rank, world=world, autocast=autocast,
                  batches=batches, lr=args.lr, weight_decay=args.weight_decay, clip=args.clip,
                  micro_tokens=args.micro_tokens, save_every=args.save_every)
    save_model(policy, tokenizer, out, rank, lm_code.stored_dtype(args.model))
    if rank == 0:
        data.finish(out, out.name, {"examples": len(examples) + dropped, "short enough": len(examples),
                                    "steps": len(log)})
    if world > 1:
        dist.destroy_process_group()


def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="ipo.py", description="Train on preference pairs (or completions).")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, lr in (("train", "preference training, Eq. 4", 1e-6), ("sft", "supervised fine-tuning", 1e-5)):
        p = commands.add_parser(name, help=text, description=text,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--model", required=True, help="model to start from: directory or hub name")
        p.add_argument("--out", required=True, help="directory for the trained model")
        if name == "train":
            p.add_argument("--pairs", required=True, nargs="+", help="files of pair records")
            # CHOICE: beta is not in the paper; 0.1 is the usual value.
            # CHOICE: stage 2 keeps the base model as reference, so that harmful pairs, which stage 1 has learned, hardly
            # pull any more; with stage 1 as reference they start again at log 2 and wear the language down.
            p.add_argument("--reference", help="the frozen model of Eq. 4; default: --model as it is before training")
            p.add_argument("--beta", type=float, default=0.1, help="weight of the log-ratios in Eq. 4")
            p.add_argument("--sft-weight", type=float, default=0.2, help="weight of L_sft")
            p.add_argument("--score-from", choices=("h", "prompt"), default="h",
                           help="first token scored: h as in the paper, or the whole trajectory (its ablation)")
        else:
            p.add_argument("--data", required=True, nargs="+", help="JSONL with prompt and completion, or pairs")
        # CHOICE: learning rate, batch, epochs and schedule are not in the paper; these suit an 8B model.
        p.add_argument("--lr", type=float, default=lr, help="peak learning rate")
        p.add_argument("--epochs", type=int, default=1, help="passes over the examples")
        p.add_argument("--batch-size", type=int, default=32, help="examples a step, over all ranks")
        p.add_argument("--micro-tokens", type=int, default=16384, help="padded tokens a forward pass, a rank")
        p.add_argument("--max-length", type=int, default=16384, help="longer examples are dropped and counted")
        p.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's weight decay")
        p.add_argument("--clip", type=float, default=1.0, help="largest global gradient norm")
        p.add_argument("--seed", type=int, default=0, help="order of the examples")
        p.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
        p.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass")
        p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="compute dtype")
        p.add_argument("--attn", default="sdpa", choices=("sdpa", "eager", "flash_attention_2"), help="attention")
        p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return parser


def main(argv=None):
    """Run one stage from the command line."""
    run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
