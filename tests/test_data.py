import csv
import json

import pytest

import data
from support.errors import InputError
from support.files import cut_torn_line, read_jsonl, stream_jsonl, write_json, write_jsonl


def test_malformed_jsonl_names_file_line_and_remedy(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b",\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2: not valid JSON .*mend or delete"):
        read_jsonl(path)
    path.write_text('{"id": "a"}\n[1]\n')
    with pytest.raises(InputError, match=r"line 2: expected a JSON object, found list"):
        read_jsonl(path)


def test_line_separators_inside_text_do_not_split_records(tmp_path):
    records = [{"id": "1", "text": "a\u2028b\x85c\r\nd"}, {"id": "2", "text": "\ud7ff\U0001f600"}]
    write_jsonl(tmp_path / "r.jsonl", records)
    assert read_jsonl(tmp_path / "r.jsonl") == records


def test_appender_repairs_a_torn_line_and_skips_known_ids(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes('{"id": "a"}\n{"id": "é"'.encode()[:-1])  # torn in the middle of a character
    out = data.Appender(path)
    assert out.done == {"a"}
    out.write({"id": "a", "again": True})
    out.write({"id": "b"})
    out.close()
    assert path.read_text() == '{"id": "a"}\n{"id": "b"}\n'


@pytest.mark.parametrize("lines", ["", "{}\n", "{}\n{}\n"])
@pytest.mark.parametrize("torn", [0, 1, 65535, 65536, 65537, 200_000])
def test_a_torn_line_of_any_length_is_cut_off(tmp_path, lines, torn):
    path = tmp_path / "r.jsonl"
    path.write_text(lines + "x" * torn)
    cut_torn_line(path)
    assert path.read_text() == lines
    cut_torn_line(tmp_path / "new.jsonl")
    assert (tmp_path / "new.jsonl").read_text() == ""


def test_records_come_back_from_the_file_in_the_order_that_is_asked_for(tmp_path):
    out = data.Appender(tmp_path / "r.jsonl")
    for k in range(5):
        out.write({"id": str(k), "text": f"line\u2028{k}"})
    assert [r["text"] for r in out.read(["4", "0", "2"])] == [f"line\u2028{k}" for k in (4, 0, 2)]
    out.close()
    with pytest.raises(KeyError):
        out.read(["1", "no such id"])


@pytest.mark.parametrize("read", [
    read_jsonl,
    data.Appender,
    lambda path: list(stream_jsonl(path)),
    lambda path: data.load_pairs([path], 9),
])
def test_an_id_that_comes_twice_is_refused_on_reading(tmp_path, read):
    path = tmp_path / "twice.jsonl"
    pair = {"n_prompt": 1, "prefix_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    write_jsonl(path, [{"id": i, **pair} for i in ("a", "b", "a")])
    with pytest.raises(InputError, match=r"twice\.jsonl, line 3: the id 'a' comes twice.*delete"):
        read(path)


def test_an_id_that_comes_in_two_files_of_pairs_is_refused(tmp_path):
    pair = {"id": "a", "n_prompt": 1, "prefix_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path in paths:
        write_jsonl(path, [pair])
    with pytest.raises(InputError, match=r"two\.jsonl, record 1: the id 'a' comes twice"):
        data.load_pairs(paths, 9)


def test_a_stream_that_breaks_off_leaves_the_old_file(tmp_path):
    def records():
        yield {"id": "new"}
        raise InputError("the source ends here")
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [{"id": "old"}])
    with pytest.raises(InputError, match="the source ends here"):
        write_jsonl(path, records())
    assert read_jsonl(path) == [{"id": "old"}]
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("name, header, field", [
    ("jbb_old.csv", ["", "Goal", "Target"], "Goal"),
    ("jbb_new.csv", ["Index", "Goal", "Target"], "Goal"),
    ("strongreject.csv", ["category", "source", "forbidden_prompt"], "forbidden_prompt"),
    ("xstest.csv", ["id", "prompt", "type"], "prompt"),
    ("wildjailbreak.tsv", ["adversarial", "label", "data_type"], "adversarial")])
def test_published_table_formats(tmp_path, name, header, field):
    rows = [[f"{h} {i}, with a comma\nand a line" if h == field else str(i + 3) for h in header] for i in range(3)]
    with open(tmp_path / name, "w", newline="") as f:
        csv.writer(f, delimiter="\t" if name.endswith("tsv") else ",").writerows([header, *rows])
    prompts = data.load_prompts(tmp_path / name)
    assert [p["prompt"] for p in prompts] == [r[header.index(field)] for r in rows]
    has_id = header[0] in ("", "Index", "id")
    assert [p["id"] for p in prompts] == (["3", "4", "5"] if has_id else ["0", "1", "2"])


def test_star1_json_text_and_limit(tmp_path):
    (tmp_path / "star.json").write_text(json.dumps([{"id": "7", "question": "q?", "category": ["x"]}]))
    assert data.load_prompts(tmp_path / "star.json") == [
        {"id": "7", "question": "q?", "category": ["x"], "prompt": "q?"}]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert [p["prompt"] for p in data.load_prompts(tmp_path / "p.txt", limit=1)] == ["one"]


@pytest.mark.parametrize("text, message", [
    ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n', r"row 2: the id 'a' comes twice"),
    ('{"id": "a", "text": "x"}\n', r"row 1: no prompt\. A row needs one of the columns"),
    ('{"id": "a", "prompt": "  "}\n', r"row 1: no prompt"),
    ("", "no prompts in it")])
def test_bad_prompt_files(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        data.load_prompts(tmp_path / "p.jsonl")
