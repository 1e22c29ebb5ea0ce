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
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor

import data
import model as lm_code
from extras import checkpoint, plan


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


# ------------------------------------------------------------------------------------------- the model in training

class Policy(nn.Module):
    """The language model with log-probabilities as its `forward`, the form in which FSDP can wrap it whole.

    `share` computes each prefix once for all sequences that begin with it; without it every sequence is a padded row.
    """

    def __init__(self, lm, share=False):
        super().__init__()
        self.lm, self.share = lm, share
        if share:
            lm_code.grow_trees(lm)

    def rows(self, sequences, device):
        """The input of `forward` for (prefix, completion) sequences."""
        if not self.share:
            return data.collate(sequences, device)
        return {k: v if k == "tree" else torch.tensor(v, device=device) for k, v in data.pack(sequences).items()}

    def forward(self, **rows):
        """The `rows` of B sequences -> float32 (B,), nats, summed over completion tokens."""
        return (lm_code.tree_logps if self.share else lm_code.completion_logps)(self.lm, **rows)


class LoRA(nn.Module):
    """A frozen linear layer W with an adapter of low rank (Hu et al., 2021): y = W x + 2 B A x; B = 0 at first."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, device="meta", dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.empty(base.out_features, rank, device="meta", dtype=torch.float32))

    def forward(self, x):
        """(..., in) -> (..., out)."""
        return self.base(x) + 2 * F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


def skeleton(path, attn="sdpa", lora_rank=0, frozen_dtype=torch.float32):
    """The model that `path` describes, on the meta device: shapes without memory. Only what it trains wants gradients.

    Trainable weights are always float32: at these learning rates an update is smaller than bfloat16 can resolve.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    config = AutoConfig.from_pretrained(path)
    config.attention_dropout = 0.0  # CHOICE: the reference pass and the training pass must agree
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=frozen_dtype if lora_rank else torch.float32,
                                              attn_implementation=attn)
    with contextlib.suppress(OSError):  # some models ship none
        lm.generation_config = GenerationConfig.from_pretrained(path)
    if lora_rank:
        lm.requires_grad_(False)
        for name, module in list(lm.get_decoder().layers.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(lm.get_decoder().layers.get_submodule(parent), child, LoRA(module, lora_rank))
    return lm


def start_distributed(device_name):
    """Join the process group under torchrun; alone otherwise. Returns (device, rank, world)."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = lm_code.pick_device(device_name)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device, rank, world


def load_policy(path, device, rank, world, dtype, attn="sdpa", checkpoint_activations=False, share=True, lora_rank=0,
                compiled=False):
    """Build, shard and fill the policy; no rank ever holds more than its own part of the weights.

    Trained weights are float32, computed with in `dtype`. FSDP by hand: each block is sharded, then the rest, so that
    one block at a time is gathered. Returns (policy, context manager factory for the forward).
    """
    lm = skeleton(path, attn, lora_rank, dtype)
    if checkpoint_activations:
        lm.activation_checkpointing_enable()
    policy = Policy(lm, share).train()
    if world > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in lm.get_decoder().layers:
            fully_shard(block, mp_policy=precision)
        fully_shard(policy, mp_policy=precision)
    read_weights(lm, path, device, rank, world)
    if compiled:  # not the attention: its shapes change with every tree
        for block in lm.get_decoder().layers:
            block.mlp.compile(dynamic=True)
    if world > 1 or dtype == torch.float32:
        return policy, contextlib.nullcontext
    return policy, lambda: torch.autocast(device.type, dtype)


@torch.no_grad()
def read_weights(lm, path, device, rank, world):
    """Give a (sharded) skeleton memory and fill each rank's rows from the safetensors files; adapters start afresh.

    Raises SystemExit when the files and the architecture do not name the same weights.
    """
    lm.to_empty(device=device)
    lm.tie_weights()  # to_empty has parted tied weights
    decoder = lm.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(lm.config).to(device)  # its buffers are in no checkpoint
    missing = {name.replace(".base.", "."): p for name, p in lm.named_parameters()}
    known = {name.replace(".base.", ".") for name in lm.state_dict()}
    for file in data.weight_files(path):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if name in missing:
                    own, rows = own_rows(missing.pop(name), rank, world)
                    own.copy_(weights.get_slice(name)[rows] if len(own) else own)
                elif name not in known and not name.endswith("rotary_emb.inv_freq"):
                    raise SystemExit(f"{file}: {name} has no place in a {type(lm).__name__}.")
    for i, name in enumerate(name for name in list(missing) if "lora_" in name):
        own, rows = own_rows(p := missing.pop(name), rank, world)
        start = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / p.shape[1] ** 0.5
        own.copy_(start[rows] if name.endswith("lora_a") else torch.zeros_like(own))
    if missing:
        raise SystemExit(f"{path}: the safetensors files lack {', '.join(sorted(missing)[:5])}.")


def own_rows(p, rank, world):
    """A parameter's local tensor and the rows of the whole that it holds; FSDP cuts as `torch.chunk` does."""
    n = math.ceil(len(p) / world)
    return p.to_local() if isinstance(p, DTensor) else p, slice(min(rank * n, len(p)), min((rank + 1) * n, len(p)))


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
    sequences = [pair_sequences(p, score_from)[i] for i in (0, 1) for p in pairs]
    chosen, rejected = policy(**policy.rows(sequences, device)).split(len(pairs))            # (B,), (B,)
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
    logps = policy(**policy.rows([(e["prefix_ids"], e["chosen_ids"]) for e in examples], device))
    return -logps / torch.tensor([len(e["chosen_ids"]) for e in examples], device=device), {}


@torch.no_grad()
def reference_logps(policy, pairs, batches, device, autocast, score_from="h"):
    """Fill `pair["ref"]` with [chosen, rejected] log-probabilities under the policy as it stands now.

    `batches` are micro-batches of the first epoch, so that each pair is computed in the company in which training
    will first meet it: in bfloat16 another shape alone would move the first margins away from 0.
    """
    for micro in batches:
        group = [pairs[i] for i in micro] or pairs[:1]
        sequences = [pair_sequences(p, score_from)[i] for i in (0, 1) for p in group]
        with autocast():
            values = policy(**policy.rows(sequences, device)).tolist()
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


def step_line(title, line, steps):
    """One step as one line for people."""
    shown = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy", "reward": "reward",
             "no_variety": "groups without variety", "kl": "KL", "grad_norm": "grad norm", "tokens_per_s": "tokens/s"}
    return f"{title} {line['step'] + 1}/{steps}: " + ", ".join(
        f"{name} {line[key]:.4g}" for key, name in shown.items() if key in line)


def start_or_resume(policy, out, lr, weight_decay, rank=0):
    """(AdamW, the metrics so far): both fresh, or policy and all as they were at the newest checkpoint in `out`."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr,
                                  weight_decay=weight_decay, betas=(0.9, 0.95), fused=True)
    first = checkpoint.load(out, policy, optimizer)
    lines = (out / "metrics.jsonl").read_text().splitlines()[:first] if first else []  # a torn last line is beyond
    log = [json.loads(line) for line in lines]
    if rank == 0:
        data.write_jsonl(out / "metrics.jsonl", log)  # lines after the checkpoint are made again
    return optimizer, log


def take_step(policy, optimizer, rate, groups, spare, total, losses_of, autocast, clip=1.0, world=1, defer_sync=False):
    """One update at learning rate `rate` down the gradient of sum(losses) / `total`, over all groups and ranks.

    groups: this rank's micro-batches, lists of examples, each for `losses_of(policy, group) -> (losses, metrics)`;
    `spare` takes the place of an empty one. Returns (metrics: sums / `total`, gradient norm before clipping).
    """
    sums = {}
    for k, group in enumerate(groups):
        if world > 1:
            policy.set_requires_gradient_sync(not defer_sync or k + 1 == len(groups))
        with autocast():
            losses, metrics = losses_of(policy, group or spare)
        weight = len(group) > 0  # an empty micro-batch takes part with weight 0
        # FSDP averages gradients over ranks; times world makes it the sum, over the global count the mean.
        (losses.sum() * weight * world / total).backward()
        for name, values in {"loss": losses, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + values.detach().float().sum() * weight
    norm = nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # on every rank: it communicates
    for part in optimizer.param_groups:
        part["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    values = torch.stack(list(sums.values())) / total
    if world > 1:
        dist.all_reduce(values)
    return {k: round(v, 6) for k, v in zip(sums, values.tolist())}, round(norm.item(), 6)


def fit(policy, examples, losses_of, parts, *, out, rank, world, autocast, batches, lr, weight_decay=0.0,
        clip=1.0, micro_tokens=16384, save_every=50, defer_sync=False):
    """Minimise the mean of `losses_of(policy, examples)` over global batches; log, checkpoint and resume.

    examples: list; parts: the tokens that each costs (`data.tree_parts`); batches: from `data.global_batches`. Writes
    `out/metrics.jsonl`, one line a step. Killed and started again, it goes on from the last of its checkpoints
    (every `save_every` steps) and ends with the same weights. Returns the list of metrics.
    """
    optimizer, log = start_or_resume(policy, out, lr, weight_decay, rank)
    for step in range(len(log), len(batches)):
        started, rate = time.monotonic(), learning_rate(step, len(batches), lr)
        micros = data.micro_batches(batches[step], parts, micro_tokens, rank, world)
        values, norm = take_step(policy, optimizer, rate, [[examples[i] for i in micro] for micro in micros], examples[:1],
                                 len(batches[step]), losses_of, autocast, clip, world, defer_sync)
        log.append({"step": step, **values, "grad_norm": norm, "lr": rate,
                    "tokens_per_s": round(data.tokens_of(batches[step], parts) / (time.monotonic() - started))})
        end_step(policy, optimizer, out, log[-1], len(batches), save_every, rank)
    return log


def end_step(policy, optimizer, out, line, steps, save_every, rank=0):
    """Write a step's metrics to `out/metrics.jsonl` and for people, and a checkpoint if it is due."""
    if rank == 0:
        with open(out / "metrics.jsonl", "a") as f:
            f.write(data.dump(line) + "\n")
        print(step_line(out.name, line, steps), flush=True)
    step = line["step"] + 1
    if not math.isfinite(line["loss"]):
        raise SystemExit(f"step {step}: the loss is {line['loss']}. Lower --lr, or look for a broken pair.")
    if step % save_every == 0 and step < steps:
        checkpoint.save(out, policy, optimizer, step, rank)


def save_model(policy, tokenizer, out, rank, dtype, limit=5 * 10 ** 9):
    """Write a Hugging Face directory (safetensors, config, tokenizer, generation config) into `out`, adapters merged.

    Weights are gathered one at a time and written in files of about `limit` bytes, first into a temporary folder,
    from which the files are renamed one by one. All ranks must call it: gathering communicates.
    """
    def whole(p):
        return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()

    params = dict(policy.lm.named_parameters())  # tied weights come once
    sizes = {name: p.numel() * dtype.itemsize for name, p in params.items() if "lora_" not in name}
    files = data.in_files(sizes, limit)
    temporary, index = out / ".model.tmp", {}
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        weights = {}
        for name in names:
            value, stem = whole(params[name]), name.removesuffix("base.weight")
            if stem + "lora_a" in params:
                value = value.float() + 2 * whole(params[stem + "lora_b"]) @ whole(params[stem + "lora_a"])
            if rank == 0:
                weights[name.replace(".base.", ".")] = value.to("cpu", dtype, copy=True)
        if rank == 0:
            save_file(weights, temporary / file, {"format": "pt"})
            index |= dict.fromkeys(weights, file)
    if rank == 0:
        policy.lm.config.dtype = dtype
        for part in (policy.lm.config, policy.lm.generation_config, tokenizer):
            part.save_pretrained(temporary)
        if len(files) > 1:
            data.write_json(temporary / "model.safetensors.index.json",
                            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index})
        for path in temporary.iterdir():
            os.replace(path, out / path.name)
        temporary.rmdir()


# ------------------------------------------------------------------------------------------------------- the stages

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
        for number, r in enumerate(data.read_jsonl(path), 1):
            if "chosen_ids" not in r:
                if not all(isinstance(r.get(k), str) for k in ("prompt", "completion")):
                    raise data.BadInput(f"{path}, record {number}: needs the texts `prompt` and `completion`, "
                                     "or the ids of a pair.")
                ids = tokenizer.encode(r["completion"], add_special_tokens=False) + [tokenizer.eos_token_id]
                r = {"prefix_ids": lm_code.render_prompt(tokenizer, r["prompt"]), "chosen_ids": ids}
            if len(r["prefix_ids"]) + len(r["chosen_ids"]) > max_length:
                dropped += 1
            else:
                examples.append(r)
    return examples, dropped


def refuse_below_1(args, *flags):
    """Raise SystemExit for a flag that counts something and is below 1."""
    for flag in flags:
        if getattr(args, flag) < 1:
            raise SystemExit(f"--{flag.replace('_', '-')} must be at least 1.")


def run(args):
    """The stages `train` (preference pairs) and `sft` (completions): read, train, save, one funnel line."""
    refuse_below_1(args, "batch_size", "micro_tokens", "max_length", "epochs", "save_every")
    device, rank, world = start_distributed(args.device)
    out, files = Path(args.out), args.pairs if args.command == "train" else args.data
    reference = getattr(args, "reference", None) or args.model
    inputs = [args.model, *files] + [reference] * (reference != args.model)
    box = [data.begin(out, vars(args), inputs) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(box)
    if box[0]:
        return print(data.funnel_line(box[0]), "(finished before)") if rank == 0 else None
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = lm_code.load_tokenizer(args.model)
    dtype = lm_code.pick_dtype(args.dtype, device)
    load = functools.partial(load_policy, device=device, rank=rank, world=world, dtype=dtype, attn=args.attn,
                             checkpoint_activations=args.checkpoint_activations, share=not args.no_share,
                             lora_rank=args.lora_rank, compiled=args.compile)
    policy, autocast = load(reference)
    if args.command == "train":
        examples, dropped = data.load_pairs(files, args.max_length)
        rows = [pair_sequences(p, args.score_from) for p in examples]
        losses_of = functools.partial(pair_losses, device=device, beta=args.beta, sft_weight=args.sft_weight,
                                      score_from=args.score_from)
    else:
        examples, dropped = load_completions(files, tokenizer, args.max_length)
        rows = [[(e["prefix_ids"], e["chosen_ids"])] for e in examples]
        losses_of = functools.partial(sft_losses, device=device)
    if args.no_share:  # padded rows: every example for itself, and as long as the longest that it may be padded to
        longest = max((len(p) + len(c) for r in rows for p, c in r), default=0)
        parts = [{i: len(r) * longest} for i, r in enumerate(rows)]
    else:
        parts = [data.tree_parts(r) for r in rows]
    # CHOICE: only pairs meet by trees; completions of one prompt may be so many that a batch would be of that prompt alone.
    order = parts if args.command == "train" else [{i: 1} for i in range(len(parts))]
    batches, log = data.global_batches(order, args.batch_size, args.epochs, args.seed), []
    if not examples and rank == 0:
        print(f"{out.name}: nothing to train on, so the model is passed on unchanged")
    if examples and args.command == "train":
        epoch = [m for b in batches[:math.ceil(len(examples) / args.batch_size)]
                 for m in data.micro_batches(b, parts, args.micro_tokens, rank, world)]
        key = [data.fingerprint(p) for p in (reference, *files)] + [str(dtype), args.score_from, args.no_share, args.max_length]
        cached_reference(data.beside(out, "reference"), key, policy, examples, epoch, device, autocast, rank, world,
                         args.score_from)
    if reference != args.model:
        del policy  # never two models at once
        policy, autocast = load(args.model)
    if examples:
        log = fit(policy, examples, losses_of, parts, out=out, rank=rank, world=world, autocast=autocast, batches=batches,
                  lr=args.lr, weight_decay=args.weight_decay, clip=args.clip, micro_tokens=args.micro_tokens,
                  save_every=args.save_every, defer_sync=args.defer_sync)
    dtype = lm_code.stored_dtype(args.model) if args.save_dtype == "auto" else getattr(torch, args.save_dtype)
    save_model(policy, tokenizer, out, rank, dtype)
    if rank == 0:
        data.finish(out, out.name, {"examples": len(examples) + dropped, "short enough": len(examples),
                                    "steps": len(log)})
        for old in out.glob("checkpoint-*"):
            shutil.rmtree(old)
    if world > 1:
        dist.destroy_process_group()


def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="ipo.py", description="Train on preference pairs (or completions).")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("grpo", help="the paper's baseline GRPO (extras/grpo.py)", add_help=False)  # see `main`
    for name, text, lr in (("train", "preference training, Eq. 4", 1e-6), ("sft", "supervised fine-tuning", 1e-5),
                           ("plan", "memory and speed of training, from the model's config alone", None)):
        p = commands.add_parser(name, help=text, description=text,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--model", required=True, help="model to start from: directory or hub name")
        p.add_argument("--micro-tokens", type=int, default=16384, help="tokens a forward pass, a rank")
        p.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank only; try --lr 1e-4")
        p.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass")
        p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="compute dtype")
        if name == "plan":
            plan.add_flags(p)
            continue
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
        p.add_argument("--max-length", type=int, default=16384, help="longer examples are dropped and counted")
        p.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's weight decay")
        p.add_argument("--clip", type=float, default=1.0, help="largest global gradient norm")
        p.add_argument("--seed", type=int, default=0, help="order of the examples")
        p.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
        p.add_argument("--save-dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                       help="dtype of the saved weights; auto: that of --model")
        p.add_argument("--no-share", action="store_true", help="the plain way: padded rows, prefixes computed anew")
        p.add_argument("--defer-sync", action="store_true",
                       help="reduce gradients once a step; each rank then holds them whole, in float32")
        p.add_argument("--compile", action="store_true", help="compile the feed-forward layers")
        p.add_argument("--attn", default="sdpa", choices=("sdpa", "eager", "flash_attention_2"), help="kernel of --no-share")
        p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return parser


def main(argv=None):
    """Run one stage from the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["grpo"]:
        from extras import grpo  # it needs this module, so it can't be imported above
        return grpo.main(argv[1:])
    args = build_parser().parse_args(argv)
    if args.command != "plan":
        return run(args)
    dtype = lm_code.pick_dtype(args.dtype, torch.device("cuda"))
    plan.show(args, skeleton(args.model, lora_rank=args.lora_rank, frozen_dtype=dtype), dtype)


if __name__ == "__main__":
    record(main)()  # torchrun then shows the traceback of the rank that failed first
