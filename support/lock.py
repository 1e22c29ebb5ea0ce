"""One owner at a time: locks on a run and on an output, which the kernel releases with the process.
"""
import atexit
import errno
import fcntl
import os
import socket
import sys
from pathlib import Path

from support.errors import InputError

NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held = {}  # path of the lock file -> (open file, pid): a forked child has this dict too


def lock(path, what, remedy):
    """Make this process the owner of `what`, until `unlock` or its end. Again is no error.

    path: of the lock file, whose text says who owns it. Raises InputError with the owner's process
    id and host if there is another.
    """
    path = Path(os.path.abspath(path))
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+")
        if not _owned(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise InputError(f"{what} is in use by {owner}. {remedy}")
        if _is_at(path, file):
            break
        file.close()  # its owner has removed it since it was opened
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[path] = file, os.getpid()


def _owned(file):
    """Take the lock of an open file; returns False where another process has it."""
    try:
        problem = flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if problem:
        print(f"note: {file.name} cannot be locked on this file system ({problem}); "
              "see to it that nothing else runs in that folder", file=sys.stderr)
    return True


def flock(file, operation):
    """`fcntl.flock`; returns why it did nothing on a file system without locks, else None."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
        return error.strerror
    return None


def _is_at(path, file):
    """Whether an open file is still the one with that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def unlock(path):
    """Give up a lock, if this process holds it, and remove its file."""
    path = Path(os.path.abspath(path))
    file, pid = _held.get(path, (None, None))
    if pid != os.getpid():
        return  # a forked child leaves it to its parent
    path.unlink(missing_ok=True)  # before it is released, so that nobody owns a removed file
    file.close()
    del _held[path]


@atexit.register
def _unlock_all():
    for path in list(_held):
        unlock(path)
