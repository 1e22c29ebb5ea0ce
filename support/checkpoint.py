"""Checkpoints of an unfinished training, which any number of ranks can pick up.

A checkpoint is written under a temporary name and renamed, so a killed run leaves no partial one.
"""
import os
import shutil

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)


def training_state(policy, optimizer):
    """The trained weights and the optimizer's moments: all that a restart needs.

    Training draws no random numbers, and learning rate and batch follow from the step.
    """
    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(policy, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def save_checkpoint(out, policy, optimizer, step, rank):
    """Write `out/checkpoint-STEP`, one shard per rank, and remove older ones. All ranks call it."""
    temporary = out / "checkpoint.tmp"
    final = out / f"checkpoint-{step}"
    # Overwrites what a kill has left there, and returns when all ranks have written.
    dcp.save(training_state(policy, optimizer), checkpoint_id=temporary)
    if rank != 0:
        return
    os.replace(temporary, final)
    for folder in out.glob("checkpoint-*"):
        if folder != final:
            shutil.rmtree(folder)


def load_checkpoint(out, policy, optimizer):
    """Restore the newest checkpoint in `out`; returns its step, or 0 where there is none."""
    steps = [int(folder.name.split("-")[1]) for folder in out.glob("checkpoint-*")]
    if not steps:
        return 0
    newest = max(steps)
    state = training_state(policy, optimizer)
    dcp.load(state, checkpoint_id=out / f"checkpoint-{newest}")
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),  # frozen weights are not in it
    )
    return newest
