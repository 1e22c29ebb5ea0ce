"""Files of prompts as users write them: byte-order marks, CRLF, huge cells, gzip, tables that do not add up."""
import gzip

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
