"""Files of prompts as users write them: byte-order marks, CRLF, huge cells, gzip, tables that do not add up."""
import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from data import load_prompts
from support.errors import InputError


def test_files_of_the_users_own(tmp_path):
    (tmp_path / "own.csv").write_bytes(b'\xef\xbb\xbfask,id\r\n"a ""b"",\r\nc",1\r\n' + b"x" * 200_000 + b",2\r\n")
    rows = load_prompts(tmp_path / "own.csv", column="ask")
    assert [(r["id"], r["prompt"]) for r in rows] == [("1", 'a "b",\r\nc'), ("2", "x" * 200_000)]
    with pytest.raises(InputError, match="row 1: no prompt. A row needs one of the columns question with"):
        load_prompts(tmp_path / "own.csv", column="question")
    (tmp_path / "own.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"prompt": "p\xe2\x80\xa8q"}\n'))
    assert load_prompts(tmp_path / "own.jsonl.gz") == [{"id": "0", "prompt": "p\u2028q"}]
    (tmp_path / "own.tsv").write_text("prompt\tid\nfine\t1\ntoo\tmany\tcells\n")
    with pytest.raises(InputError, match=r"own.tsv, line 3: more cells than the header's 2"):
        load_prompts(tmp_path / "own.tsv")


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_in_bounded_memory(tmp_path):
    """4 GB of white space in 4 MB: read in a process of its own, whose peak is its own."""
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b" " * (64 << 20)) * 64)
    # Growth, because the peak that the kernel reports begins at the size of the process that forked.
    code = ("import resource, sys\nfrom support.errors import InputError\nfrom support.files import read_rows\n"
            "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak()\n"
            "try:\n    read_rows(sys.argv[1])\nexcept InputError as error:\n    print(error)\n"
            "print((peak() - before) // (1 << (20 if sys.platform == 'darwin' else 10)))")
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run([sys.executable, "-c", code, bomb], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == (f"{bomb}: it unpacks to more than 256 MB. If that is what it should hold, unpack it with `gunzip -k {bomb}` "
                      "and give the unpacked file.")
    assert int(out[1]) < 450, "MB"


def test_packed_files_of_several_members_and_cut_ones(tmp_path, monkeypatch):
    path = tmp_path / "two.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n') + gzip.compress(b'{"prompt": "b"}\n' * 9000))
    assert [r["prompt"] for r in load_prompts(path)] == ["a"] + ["b"] * 9000
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="two.jsonl.gz: not a complete gzip file"):
        load_prompts(path)
    monkeypatch.setattr("support.files.LARGEST_UNPACKED", 16)
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    assert len(load_prompts(path)) == 1, "just as large as it may be"
    path.write_bytes(gzip.compress(b'{"prompt": "ab"}\n'))
    with pytest.raises(InputError, match="it unpacks to more than 0 MB"):
        load_prompts(path)
