"""Checkpoints of an unfinished training: stored under a temporary name and renamed, resumed by any number of ranks."""
import os
import shutil

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict


def training_state(policy, optimizer):
    """Weights and optimizer state. Nothing draws random numbers, and rate and data position follow from the step."""
    weights, moments = get_state_dict(policy, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": weights, "optimizer": moments}


def save(out, policy, optimizer, step, rank):
    """Store the training state (a shard a rank) under a temporary name, then rename; keep the newest only."""
    temporary, final = out / "checkpoint.tmp", out / f"checkpoint-{step}"
    dcp.save(training_state(policy, optimizer), checkpoint_id=temporary)  # overwrites a torn one; returns when all have
    if rank == 0:
        os.replace(temporary, final)
        for old in out.glob("checkpoint-*"):
            if old != final:
                shutil.rmtree(old)


def load(out, policy, optimizer):
    """Restore the newest checkpoint, of any number of ranks; returns the step to go on from, 0 where there is none."""
    steps = [int(p.name.split("-")[1]) for p in out.glob("checkpoint-*")]
    if not steps:
        return 0
    dcp.load(state := training_state(policy, optimizer), checkpoint_id=out / f"checkpoint-{max(steps)}")
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                   options=StateDictOptions(strict=False))  # frozen weights are not in it
    return max(steps)
