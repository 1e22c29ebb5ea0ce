"""A file of paid replies that threads and processes share."""
import errno
import fcntl
import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path

from support.files import writing
from support.lock import flock


class Cache:
    """Append-only JSON lines `{"id", ...}`: what is in there is never paid for twice.

    Each record is a single write under a file lock, so a kill can tear only the last line, and the
    next writer cuts that one off. Lines that are not records are skipped. Without a path the cache
    is in memory only. `records` maps ids to records.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "cache.jsonl"
    >>> mine, other = Cache(path), Cache(path)
    >>> _ = path.write_text('{"id": "a", "answer": 1}\\n{"id": "b", "ans')
    >>> mine.put({"id": "c", "answer": 3})
    {'id': 'c', 'answer': 3}
    >>> mine.put({"id": "a", "answer": 2})  # the first answer stays
    {'id': 'a', 'answer': 1}
    >>> other.get("c"), other.get("b"), path.read_text().count("\\n")
    ({'id': 'c', 'answer': 3}, None, 2)
    """

    def __init__(self, path=None):
        self.path = path
        self.records = {}
        self.offset = 0  # bytes of the file that have been read
        self.lock = threading.Lock()
        self.file = None
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab+", buffering=0)
            self._read_new_lines()

    def get(self, record_id):
        """The record of that id, or None; it also finds what other processes have written since."""
        with self.lock:
            if self.file and record_id not in self.records:
                self._read_new_lines()
            return self.records.get(record_id)

    def put(self, record):
        """Add a record, unless its id is there already; returns the one that is kept.

        Raises OSError if the file cannot take it.
        """
        with self.lock:
            if self.file:
                with self._file_lock():
                    self._append(record)
            return self.records.setdefault(record["id"], record)

    @contextmanager
    def _file_lock(self):
        flock(self.file, fcntl.LOCK_EX)  # released by the kernel if this process dies
        try:
            yield
        finally:
            flock(self.file, fcntl.LOCK_UN)

    def _append(self, record):
        torn = self._read_new_lines()
        if torn:
            self.file.truncate(self.offset)
        if record["id"] in self.records:
            return
        line = json.dumps(record) + "\n"  # ASCII, because a reply may hold half a surrogate pair
        with writing(self.path):
            written = self.file.write(line.encode())
            if written != len(line):  # the space that was left was not enough
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _read_new_lines(self):
        """Read the complete lines that are new; returns whether a torn one follows them."""
        self.file.seek(self.offset)
        new = self.file.readall()
        end = new.rfind(b"\n") + 1
        for line in new[:end].splitlines():
            try:
                record = json.loads(line)
                self.records.setdefault(record["id"], record)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        self.offset += end
        return end < len(new)
