"""Checkpoints of an unfinished training, which any number of ranks can pick up.

A checkpoint is written under a temporary name and renamed, so a killed run leaves no partial one.
It holds the CRC-32 of each of its files, so that a damaged one is not trained on.
"""
import errno
import os
import shutil
import zlib

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from support.errors import InputError
from support.files import read_json, write_json

CHECKSUMS = "checksums.json"
BLOCK = 1 << 24  # bytes


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
    if rank == 0:
        # What a kill has left there may be of other ranks. The others come after this, because
        # saving begins with an exchange.
        shutil.rmtree(temporary, ignore_errors=True)
    _write(training_state(policy, optimizer), temporary)
    checksums = file_checksums(temporary)
    if rank != 0:
        return
    write_json(temporary / CHECKSUMS, checksums)
    os.replace(temporary, final)
    for folder in out.glob("checkpoint-*"):
        if folder != final:
            shutil.rmtree(folder)


def _write(state, folder):
    """Write a state into a folder; returns when all ranks have written."""
    try:
        dcp.save(state, checkpoint_id=folder)
    except CheckpointException as failed:
        for error, _ in failed.failures.values():
            number = getattr(error, "errno", None)
            # torch's own writer does not say that the disk is full.
            if number is None and shutil.disk_usage(folder).free < BLOCK:
                number = errno.ENOSPC
            if number is not None:
                raise OSError(number, os.strerror(number), str(folder)) from failed
        raise


def load_checkpoint(out, policy, optimizer):
    """Restore the newest checkpoint in `out`; returns its step, or 0 where there is none.

    Raises InputError for a damaged one. All ranks call it.
    """
    steps = [int(folder.name.split("-")[1]) for folder in out.glob("checkpoint-*")]
    if not steps:
        return 0
    newest = max(steps)
    folder = out / f"checkpoint-{newest}"
    refuse_damaged(folder)
    state = training_state(policy, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),  # frozen weights are not in it
    )
    return newest


def refuse_damaged(folder):
    """Raise InputError unless a checkpoint's files are as they were written."""
    remedy = (f"Delete {folder} and run the same command again: training continues from an older "
              "checkpoint, or starts again where there is none.")
    path = folder / CHECKSUMS
    if not path.exists():
        raise InputError(f"{path} is missing, so {folder} may be damaged. {remedy}")
    written = read_json(path)
    found = file_checksums(folder)
    for name, checksum in written.items():
        if found.get(name) != checksum:
            raise InputError(f"{folder / name} is damaged or missing. {remedy}")


def file_checksums(folder):
    """{name: CRC-32} of the files in a checkpoint, on every rank; each reads its share of them."""
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
    mine = {name: crc32(folder / name) for name in names[rank::world]}
    return merge_over_ranks(mine, world)


def merge_over_ranks(mine, world):
    """The entries of every rank's dict in one, on every rank."""
    if world == 1:
        return mine
    shares = [None] * world
    dist.all_gather_object(shares, mine)
    merged = {}
    for share in shares:
        merged.update(share)
    return merged


def crc32(path):
    """The CRC-32 of a file: any flipped bit changes it, and reading takes longer than computing."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
