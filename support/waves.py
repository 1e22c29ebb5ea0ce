"""Requests in waves: what is sampled together, put aside, kept for a restart, and in which order.

A wave is a few times as many requests as there are rows. What it gives depends on nothing but the
wave itself, so it does not matter which rank samples it, or after which restart.
"""
import functools
import json
import time
from pathlib import Path
from typing import NamedTuple

from support.files import digest, read_jsonl, write_jsonl
from support.model_check import refuse_unsteady
from support.progress import progress_bar
from support.ranks import add, in_order

DRAIN = 512      # decode steps that a wave goes on for when no request is waiting any more
ASIDE = "aside"  # how a row ends that is not finished by then


class Wave(NamedTuple):
    """Some rows to sample together."""
    rows: list         # (request, ids that were sampled already)
    drain: int | None  # when to put rows aside; None: never
    path: Path | None  # of the file that keeps what comes of them; None: nothing does


def in_waves(groups, size, sample_wave, hand, done=(), parts=None, drain=DRAIN, title="sampling"):
    """Yield (id, ids, finished) of each request, wave by wave; see `model.sample` for the rule.

    groups: lists of requests (id, prefix), each cut into waves of `size`. sample_wave(rows,
    drain=...) yields (id, ids, finished) for each of the `rows` of a Wave, and `hand` does the same
    on other ranks. parts: a folder that keeps finished waves until the caller has stored their
    completions and removes it.
    """
    first = []
    group_of = {}  # id of a request -> (number of its group, the request)
    for number, requests in enumerate(groups):
        several = len(requests) > size  # otherwise none waits for its end
        rows = [(request, []) for request in requests]
        first += cut_into_waves(rows, size, drain if several else None, parts)
        for request in requests:
            group_of[request.id] = number, request
    with progress_bar(total=len(group_of), desc=title, unit="req") as bar:
        progress = Progress(bar)
        aside = [[] for _ in groups]
        for request_id, ids, finished in _completions(first, sample_wave, hand, done, progress):
            if finished == ASIDE:
                number, request = group_of[request_id]
                aside[number].append((request, ids))
            else:
                yield request_id, ids, finished
        last = []
        for rows in aside:
            last += cut_into_waves(rows, size, None, parts)
        yield from _completions(last, sample_wave, hand, done, progress)


def check_requests(model, requests, max_new_tokens):
    """Raise ValueError for a model or request that cannot be sampled exactly."""
    if model.config._attn_implementation != "sdpa":
        raise ValueError("the sampler needs attn_implementation='sdpa': "
                         "other kernels misread its per-row mask")
    context = model.config.max_position_embeddings
    longest = max((len(r.prefix) for r in requests), default=0) + max_new_tokens
    refuse_unsteady(model, min(longest, context))
    for r in requests:
        if len(r.prefix) >= context:
            raise ValueError(f"request {r.id}: prefix of {len(r.prefix)} tokens fills the context "
                             f"of {context}. Drop it and count it.")


def cut_into_waves(rows, size, drain, parts):
    """The Waves of some rows, sorted so that neighbours share most of their prefixes.

    They share all of it where one prefix is continued several times, and all but a few tokens for
    several triggers or later sentences of one rollout.
    """
    rows = sorted(rows, key=lambda row: (row[0].prefix, row[1], row[0].id))
    waves = []
    for start in range(0, len(rows), size):
        some = rows[start:start + size]
        path = None
        if parts:
            # Named by all that decides what comes of it, but for the stage's own settings.
            path = Path(parts) / f"{digest(json.dumps([drain, some]))}.jsonl"
        waves.append(Wave(some, drain, path))
    return waves


def _completions(waves, sample_wave, hand, done, progress):
    """Yield what comes of some waves, in their order. All ranks sample those that are missing."""
    missing = []
    for wave in waves:
        kept = wave.path and wave.path.exists()
        if not kept and any(request.id not in done for request, _ in wave.rows):
            missing.append(wave)
    sampled = in_order(
        missing,
        functools.partial(finish_wave, sample_wave, progress.show),
        functools.partial(finish_wave, hand, None),
        progress.show,
    )
    waiting = iter(missing)
    next_missing = next(waiting, None)
    for wave in waves:
        if wave is next_missing:
            completions = next(sampled)
            next_missing = next(waiting, None)
        elif wave.path and wave.path.exists():
            completions = [(c["id"], c["ids"], c["finished"]) for c in read_jsonl(wave.path)]
            progress.skip(completions)
        else:
            completions = []
            progress.skip(wave.rows)
        progress.show()
        yield from completions


def finish_wave(sample_wave, show, wave):
    """Sample a wave and keep what comes of it: a list of (id, ids, finished).

    show: called after each completion, if there is anybody to see it.
    """
    before = {request.id: len(ids) for request, ids in wave.rows}
    completions = []
    for request_id, ids, finished in sample_wave(wave.rows, drain=wave.drain):
        completions.append((request_id, ids, finished))
        add("tokens", len(ids) - before[request_id])
        if finished != ASIDE:
            add("requests", 1)
        if show:
            show()
    if wave.path:
        records = [{"id": c[0], "ids": c[1], "finished": c[2]} for c in completions]
        write_jsonl(wave.path, records)  # all or nothing: half a wave is of no use to a restart
    return completions


class Progress:
    """Tells a progress bar what all ranks have done."""

    def __init__(self, bar):
        self.bar = bar
        self.started = time.monotonic()
        self.requests = add("requests")  # done by earlier calls
        self.tokens = add("tokens")
        self.shown = 0

    def skip(self, rows):
        """Count rows that need not be sampled."""
        finished = [row for row in rows if row[-1] != ASIDE]
        self.requests -= len(finished)

    def show(self):
        """Bring the bar up to date."""
        done = add("requests") - self.requests
        tokens = add("tokens") - self.tokens
        speed = tokens / max(time.monotonic() - self.started, 1e-9)
        self.bar.update(done - self.shown)
        self.bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
        self.shown = done
