"""The cache of paid replies: torn lines, broken lines, several processes."""
import os

from support.cache import Cache
from support.files import read_jsonl


def test_the_cache_mends_a_torn_line_and_passes_over_a_broken_one(tmp_path):
    path = tmp_path / "c.jsonl"
    good = b'{"id": "a", "answer": true, "cost": 0}\n'
    path.write_bytes(good + b'\x00\x00\xff\n["no record"]\n{"id": "b", "answer"')
    cache = Cache(path)
    assert list(cache.records) == ["a"]
    assert cache.get("b") is None
    cache.put({"id": "c", "answer": "\ud83d"})  # half a surrogate pair, as a reply may hold
    end = b'["no record"]\n{"id": "c", "answer": "\\ud83d"}\n'
    assert path.read_bytes().endswith(end)
    assert set(Cache(path).records) == {"a", "c"}


def put_200(path, child, start):
    """Put the same 200 ids as the others, once `start` is closed."""
    cache = Cache(path)
    os.read(start, 1)
    for i in range(200):
        cache.put({"id": f"k{i}", "by": child, "filler": "x" * 500})


def test_processes_share_a_cache(tmp_path):
    path = tmp_path / "c.jsonl"
    children = []
    start, hold = os.pipe()
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                os.close(hold)
                put_200(path, child, start)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    os.close(hold)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    records = read_jsonl(path)
    assert len(records) == len({r["id"] for r in records}) == 200
    first = Cache(path)
    second = Cache(path)
    kept = first.put({"id": "new", "by": 1})
    assert second.put({"id": "new", "by": 2}) == kept == second.get("new")
