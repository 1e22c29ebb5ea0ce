"""Several processes for one stage: the first one is the stage, the others are its hands.

    python -m torch.distributed.run --standalone --nproc-per-node 8 intervene.py rollouts ...

Rank 0 alone locks, reads, judges and writes the outputs. Every other rank waits for work, does it,
and ends when rank 0 ends. They talk through torchrun's own store of keys and values, which unlike
a process group lets rank 0 be silent for hours, while a judge answers.
"""
import contextlib
import functools
import os
import pickle
import sys
import time
from collections import Counter
from itertools import count

from support.errors import ServiceError

PIECE = 4 << 20  # bytes; the store refuses values of over 8 MiB
PAUSE = 0.05     # seconds between two looks at the store
FAILED = "failed"  # a key: who has failed

_jobs = count()      # numbers of the jobs that this process has handed out or seen
_totals = Counter()  # see `add`, where there is only one process


def rank():
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def with_hands(main):
    """A function that runs `main` on rank 0, and on every other rank works for it until it ends."""
    @functools.wraps(main)
    def start():
        if world() == 1:
            main()
        elif rank() == 0:
            try:
                main()
            finally:
                _dismiss_hands()
        else:
            _work_for_rank_0()
    return start


def in_order(items, function, hand, meanwhile=None):
    """Yield function(item) for each item, in the order of the items, which all ranks share.

    `hand` does the same on the other ranks. It travels as a pickle, as items and results do. Every
    rank takes the next free item, so a slow one holds up nobody. meanwhile: called again and again
    while this rank waits for the others. Raises ServiceError where another rank has failed.
    """
    if world() == 1:
        yield from map(function, items)
        return
    job = next(_jobs)
    for n, item in enumerate(items):
        _put(f"{job}/item/{n}", item)
    _put(f"{job}", (hand, len(items)))
    mine = _claimed_items(job, len(items))
    results = {}  # of this rank, until it is their turn
    for n in range(len(items)):
        while n not in results and not _is_there(f"{job}/result/{n}"):
            taken = next(mine, None)
            if taken is None:
                break  # the others are still at the rest
            number, item = taken
            results[number] = function(item)
        if n in results:
            yield results.pop(n)
        else:
            yield _take(f"{job}/result/{n}", meanwhile=meanwhile)


def add(name, n=0):
    """Add to a total of all ranks; returns it.

    >>> add("in this example", 5), add("in this example", 2), add("in this example")
    (5, 7, 7)
    """
    if world() > 1:
        return _store().add(name, n)
    _totals[name] += n
    return _totals[name]


# ----------------------------------------------------------------------------------- the hands

def _work_for_rank_0():
    from torch.distributed import DistError
    sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    try:
        for job in _jobs:
            work = _take(f"{job}", keep=True)  # the other hands need it too
            if work is None:
                return
            hand, n_items = work
            for number, item in _claimed_items(job, n_items):
                _put(f"{job}/result/{number}", hand(item))
    except (DistError, ServiceError):
        return  # rank 0 has gone, and the store with it, or another has failed: that one says why
    except BaseException:
        with contextlib.suppress(RuntimeError):
            _store().set(FAILED, f"rank {rank()} on {os.uname().nodename}")
        raise


def _dismiss_hands():
    with contextlib.suppress(RuntimeError):  # torchrun has ended them already
        _put(f"{next(_jobs)}", None)


def _claimed_items(job, n_items):
    """Yield (number, item) of the items of a job that this rank is to work on."""
    while True:
        number = _store().add(f"{job}/claimed", 1) - 1  # no two ranks get the same
        if number >= n_items:
            return
        yield number, _take(f"{job}/item/{number}")


# ----------------------------------------------------------------------------------- the store

@functools.cache
def _store():
    from torch.distributed import PrefixStore, rendezvous  # here, because it takes a second
    store, _, _ = next(rendezvous("env://"))
    # torchrun keeps its store when it starts the ranks again (--max-restarts).
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _put(key, value):
    """Store any value that can be pickled. It is there once all of it is."""
    pickled = pickle.dumps(value)
    starts = range(0, len(pickled), PIECE)
    for number, start in enumerate(starts):
        _store().set(f"{key}/{number}", pickled[start:start + PIECE])
    _store().set(key, str(len(starts)))


def _is_there(key):
    return _store().check([key])


def _take(key, keep=False, meanwhile=None):
    """Wait for a value, for days if need be, and take it out of the store unless `keep`."""
    while not _is_there(key):
        if meanwhile:
            meanwhile()
        if _is_there(FAILED):
            who = _store().get(FAILED).decode()
            raise ServiceError(f"{who} has failed, see its message. Then run the same again.")
        time.sleep(PAUSE)
    pieces = []
    for number in range(int(_store().get(key))):
        pieces.append(_store().get(f"{key}/{number}"))
        if not keep:
            _store().delete_key(f"{key}/{number}")
    if not keep:
        _store().delete_key(key)
    return pickle.loads(b"".join(pieces))
