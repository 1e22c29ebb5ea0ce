"""The published sets: files of their formats with invented rows, downloads from a server that misbehaves, leakage."""
import csv
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import socket
import time
from collections import Counter

import pytest

from benchmarks import fetch, leakage, sets
from data import load_prompts
from support.errors import InputError, ServiceError
from support.files import read_jsonl
from tests import loopback

OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


# ------------------------------------------------------------------------------------------------- files of each set

def table(columns, rows, delimiter=","):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([columns, *rows])
    return text.getvalue().encode()


def lines(rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def star(rows, **more):
    return json.dumps([{"id": str(3 * i), "question": f"q {i}?", "response": "<think>\nno\n</think>\n\nNo.", "source": "s",
                        "score": {}, **more} for i in range(rows)]).encode()


def jbb(first):
    return table([first, "Goal", "Target", "Behavior", "Category", "Source"],
                 [[i, f"Brew potion {i},\nnow", "Sure", f"b{i}", "Potions", "Original"] for i in range(100)])


def gpqa_rows(count):
    return [[f"rec{i}", f"Which is\nnumber {i}? ", f"right {i}\n", f"wrong {i}", "x", "y", "note"] for i in range(count)]


HEAD = 'import math\n\n\ndef f(x):\n    """Half."""\n'
FILES = {
    "star1": star(1000, category=["Potions"]),
    "star-benign-915": star(915),
    "jbb": jbb("Index"),
    "jbb-benign": jbb(""),  # as in older revisions
    "strongreject": b"\xef\xbb\xbf" + table(["category", "source", "forbidden_prompt"],
                                            [["c", "s", f"p {i}"] for i in range(313)]),
    "wildjailbreak": table(["adversarial", "label", "data_type"],
                           [["NA" if i == 1631 else f"story {i} " + "x" * (300_000 * (i == 0)), 1, "adversarial_harmful"]
                            for i in range(2000)] + [["kind", 0, "adversarial_benign"]] * 210, "\t"),
    "xstest": table(["id", "prompt", "type", "label", "focus", "note"],
                    [[i + 1, f"p {i}?", "homonyms", "safe" if i < 250 else "unsafe", "f", ""] for i in range(450)]),
    "math500": lines({"problem": f"What is ${i}$?", "solution": "", "answer": f"\\frac{{{i}}}{{2}}", "subject": "a",
                      "level": 1, "unique_id": f"test/a/{i}.json"} for i in range(500)),
    "aime24": lines({"id": 60 + i, "problem": f"{i}?", "solution": "", "answer": "025", "url": "", "question": ""}
                    for i in range(30)),
    "gpqa-diamond": table(["Record ID", "Question", *OPTIONS, "Explanation"], gpqa_rows(198)),
    "humaneval": gzip.compress(lines({"task_id": f"HumanEval/{i}", "prompt": HEAD, "entry_point": "f",
                                      "canonical_solution": "    return x / 2\n", "test": "def check(c): ..."}
                                     for i in range(164))),
}
FIELDS = {  # what the first record holds besides id and prompt
    "star1": ("0", "q 0?", {"category": ["Potions"], "source": "s", "response": "<think>\nno\n</think>\n\nNo."}),
    "star-benign-915": ("0", "q 0?", {"source": "s", "response": "<think>\nno\n</think>\n\nNo."}),
    "jbb": ("0", "Brew potion 0,\nnow", {"behavior": "b0", "category": "Potions", "source": "Original"}),
    "jbb-benign": ("0", "Brew potion 0,\nnow", {"behavior": "b0", "category": "Potions", "source": "Original"}),
    "strongreject": ("0", "p 0", {"category": "c", "source": "s"}),
    "wildjailbreak": ("1631", "NA", {"category": "adversarial_harmful"}),
    "xstest": ("1", "p 0?", {"label": "safe", "type": "homonyms"}),
    "math500": ("test/a/0.json", "What is $0$?\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
                {"problem": "What is $0$?", "answer": "\\frac{0}{2}"}),
    "aime24": ("60", "0?\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
               {"problem": "0?", "answer": "025"}),
    "gpqa-diamond": ("rec0", None, {"question": "Which is\nnumber 0?", "answer": None}),
    "humaneval": ("HumanEval/0", None, {"code_prompt": HEAD, "entry_point": "f", "test": "def check(c): ...",
                                        "canonical_solution": "    return x / 2\n"}),
}


def put(folder, name, content):
    """Lay a published file down where a user would, by hand."""
    path = sets.published_file(name, folder)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def without_hash(monkeypatch, name, **changes):
    """The invented rows of a set's file have another hash than the published ones."""
    monkeypatch.setitem(sets.SETS, name, sets.SETS[name]._replace(sha256=None, **changes))


@pytest.mark.parametrize("name", sets.SETS)
def test_every_set_is_converted_to_records_of_ours(tmp_path, monkeypatch, name, capsys):
    put(tmp_path, name, FILES[name])
    without_hash(monkeypatch, name)
    fetch.main([name, "--data-dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"{tmp_path}/{name}.jsonl" in said and "nothing was downloaded" in said
    records = load_prompts(tmp_path / f"{name}.jsonl")
    assert records == read_jsonl(tmp_path / f"{name}.jsonl")
    assert records == sets.read_published(name, sets.published_file(name, tmp_path))
    assert len(records) == (250 if name == "wildjailbreak" else sets.SETS[name].rows)
    assert len({r["id"] for r in records}) == len(records)
    record_id, prompt, more = FIELDS[name]
    assert records[0]["id"] == record_id and records[0].keys() == {"id", "prompt", *more}
    assert prompt in (None, records[0]["prompt"])
    assert all(value in (None, records[0][key]) for key, value in more.items())
    assert load_prompts(tmp_path / f"{name}.jsonl", 7) == records[:7]


def test_the_table_of_sets_is_pinned_and_complete():
    assert len({s.file for s in sets.SETS.values()}) == len(sets.SETS) == 11
    for name, s in sets.SETS.items():
        assert re.search(r"^https://[\w./-]*/[0-9a-f]{40}/", s.url), name
        assert s.sha256 is None or re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", s.sha256), name
        assert s.kind in ("harmful", "benign", "xstest", "math", "choice", "code", "train")
        assert bool(s.gated) == (name in ("wildjailbreak", "gpqa-diamond"))
        assert s.plain == {"math": "problem", "choice": "question", "code": "code_prompt"}.get(s.kind, "prompt")


def test_the_250_of_wildjailbreak_are_those_of_numpys_permutation():
    rows = [{"adversarial": str(i), "label": "1", "data_type": "adversarial_harmful"} for i in range(2000)]
    records = sets.read_wildjailbreak([{"adversarial": "kind", "label": "0", "data_type": "adversarial_benign"}, *rows])
    assert [r["prompt"] for r in records[:8]] == "1631 285 1268 747 390 166 656 260".split()  # default_rng(42), any release


def test_options_stand_in_an_order_that_only_the_question_decides():
    assert sets.option_order("Which metal is liquid at room temperature?") == [3, 2, 0, 1]  # by hand, with sha256sum
    random.seed(1)
    rows = [dict(zip(("Record ID", "Question", *OPTIONS), row)) for row in gpqa_rows(2000)]
    records = sets.read_gpqa(rows)
    random.seed(2)
    assert sets.read_gpqa(rows[::-1])[::-1] == records
    for number, record in enumerate(records):
        assert f"\n{record['answer']}) right {number}\n" in record["prompt"]
        assert re.findall(r"\n([A-D])\) ", record["prompt"]) == list("ABCD") and record["prompt"].endswith("\nAnswer: X")
    counts = Counter(r["answer"] for r in records)
    assert all(abs(counts[letter] - 500) < 4 * math.sqrt(2000 * 3 / 16) for letter in "ABCD")


def test_the_code_prompt_asks_for_the_whole_function(tmp_path):
    path = put(tmp_path, "humaneval", FILES["humaneval"])
    prompt = sets.read_published("humaneval", path)[0]["prompt"]
    assert prompt.endswith('```python\nimport math\n\n\ndef f(x):\n    """Half."""\n```') and "complete function" in prompt


def test_ids_that_repeat_become_row_numbers(tmp_path, monkeypatch):
    without_hash(monkeypatch, "star-benign-915", rows=2)
    put(tmp_path, "star-benign-915", json.dumps(json.loads(star(1)) * 2).encode())
    fetch.fetch("star-benign-915", tmp_path)
    assert [r["id"] for r in load_prompts(tmp_path / "star-benign-915.jsonl")] == ["0", "1"]


def test_missing_sets_name_the_command_that_gets_them(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=f"no such file. Get it with: python -m benchmarks.fetch jbb --data-dir {tmp_path}"):
        sets.find_prompts("jbb", tmp_path)
    monkeypatch.setenv("IPO_DATA", str(tmp_path / "elsewhere"))
    assert sets.records_file("jbb") == tmp_path / "elsewhere" / "jbb.jsonl"
    assert sets.published_file("jbb") == tmp_path / "elsewhere" / "published" / "jbb_harmful-behaviors.csv"
    monkeypatch.delenv("IPO_DATA")
    assert sets.records_file("jbb").as_posix() == "data-sets/jbb.jsonl"
    assert sets.published_file("jbb").as_posix() == "data-sets/published/jbb_harmful-behaviors.csv"
    assert sets.find_prompts("some/file.csv").as_posix() == "some/file.csv"


@pytest.mark.parametrize("name, content, message", [
    ("jbb", FILES["jbb"].replace(b"Goal", b"Aim", 1), "row 1: no Goal; its columns are Index, Aim, .* not the file of jbb"),
    ("jbb", FILES["jbb"][:3000], r"line \d+: fewer cells than the header's 6"),
    ("jbb", b"".join(FILES["jbb"].splitlines(True)[:101]), "50 rows where jbb has 100. It was cut short"),
    ("jbb", b"\n<!DOCTYPE html><html>404</html>", "line 1: a web page, not data"),
    ("jbb", FILES["jbb"].replace(b"potion 7,", b"potion \xe97,"), "line 16: not UTF-8"),
    ("jbb", b"", "0 rows where jbb has 100"),
    ("star1", FILES["star1"][:-500], r"line 1: not valid JSON .* cut short"),
    ("star1", b'{"error": "none"}', "expected a JSON list of objects"),
    ("aime24", FILES["aime24"][:-30], "line 30: not valid JSON"),
    ("humaneval", FILES["humaneval"][:-30], "not a complete gzip file"),
    ("humaneval", b"<html>", "not a complete gzip file")])
def test_damaged_files_name_place_and_remedy(tmp_path, name, content, message):
    path = put(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as error:
        fetch.fetch(name, tmp_path)
    command = f"python -m benchmarks.fetch {name} --data-dir {tmp_path}"
    assert str(error.value).startswith(str(path)) and command in str(error.value)
    assert f"Move {path} away" in str(error.value) and names(tmp_path) == ["published"] and path.read_bytes() == content


def test_a_jailbreak_template_goes_around_the_prompts(tmp_path, monkeypatch, capsys):
    put(tmp_path, "jbb", FILES["jbb"])
    without_hash(monkeypatch, "jbb")
    (tmp_path / "film.txt").write_text("In a film: {prompt}, {y}\n")
    fetch.main(["jbb", "--data-dir", str(tmp_path), "--template", str(tmp_path / "film.txt")])
    assert f"{tmp_path}/jbb.film.jsonl, 100 records" in capsys.readouterr().out and not (tmp_path / "jbb.jsonl").exists()
    fetch.main(["jbb", "--data-dir", str(tmp_path), "--template", "In a film: {prompt}, {y}"])
    asked = load_prompts(tmp_path / "jbb.film.jsonl")
    assert asked == load_prompts(tmp_path / "jbb.template.jsonl")
    goal = "Brew potion 0,\nnow"
    assert asked[0] == {"id": "0", "goal": goal, "prompt": f"In a film: {goal}, {{y}}", "behavior": "b0", "category": "Potions", "source": "Original"}
    (tmp_path / "empty.txt").write_text("In a film")
    for wrong in ("In a film", str(tmp_path / "empty.txt")):
        with pytest.raises(InputError, match="has no {prompt} in it"):
            fetch.main(["jbb", "--data-dir", str(tmp_path), "--template", wrong])


# ------------------------------------------------------------------------------------------------------------- fetch

@pytest.fixture
def served(monkeypatch):
    """`served(respond, **changes)`: the set jbb comes from a loopback server that answers with `respond(handler, log)`."""
    def do_GET(self):
        loop = self.server.loopback
        loop.log.append({k.lower(): v for k, v in self.headers.items()})
        try:
            loop.respond(self, loop.log)
        except OSError:
            self.close_connection = True
    monkeypatch.setattr(loopback.Handler, "do_GET", do_GET, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    servers = []

    def serve(respond, **changes):
        server = loopback.Loopback(respond=respond).__enter__()
        servers.append(server)
        monkeypatch.setitem(sets.SETS, "jbb", sets.SETS["jbb"]._replace(**{
            "url": server.url + "/jbb.csv", "sha256": hashlib.sha256(FILES["jbb"]).hexdigest(), **changes}))
        return server
    yield serve
    for server in servers:
        server.__exit__()


def whole(handler, log):
    handler.reply(200, FILES["jbb"], "text/csv")


def cut(handler, body, at, status=200, **headers):
    """Promise the whole body and hang up before its end."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body[:at])
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_WR)


def from_range(handler, log):
    start = int(re.fullmatch(r"bytes=(\d+)-", log[-1]["range"])[1])
    handler.reply(206, FILES["jbb"][start:], Content_Range=f"bytes {start}-{len(FILES['jbb']) - 1}/{len(FILES['jbb'])}")


def names(path):
    return sorted(p.name for p in path.iterdir())


def arrived(folder):
    """Whether the published file and its records are there, and nothing else is."""
    published = folder / "published"
    return (names(folder) == ["jbb.jsonl", "published"] and names(published) == ["jbb_harmful-behaviors.csv"]
            and (published / "jbb_harmful-behaviors.csv").read_bytes() == FILES["jbb"]
            and read_jsonl(folder / "jbb.jsonl") == sets.read_published("jbb", published / "jbb_harmful-behaviors.csv"))


def nothing_kept(folder):
    return names(folder) == ["published"] and names(folder / "published") == []


def test_what_is_there_and_right_needs_no_network(tmp_path, served, capsys):
    server = served(whole)
    fetch.main(["jbb", "--data-dir", str(tmp_path / "new")])
    server.httpd.shutdown()
    server.httpd.server_close()
    fetch.main(["jbb", "--data-dir", str(tmp_path / "new")])
    assert len(server.log) == 1 and arrived(tmp_path / "new")
    assert len(load_prompts(tmp_path / "new" / "jbb.jsonl")) == 100
    said = capsys.readouterr().out
    assert said.count("100 rows") == 2 and said.count("nothing was downloaded") == 1


def test_a_cut_download_goes_on_where_it_was(tmp_path, served):
    def respond(handler, log):
        if len(log) == 1:
            return cut(handler, FILES["jbb"], 2000)
        from_range(handler, log)
    server = served(respond)
    fetch.fetch("jbb", tmp_path, pause=0)
    assert len(server.log) == 2 and 900 < int(server.log[1]["range"][6:-1]) <= 2000
    assert arrived(tmp_path)


@pytest.mark.parametrize("fault", ["no ranges", "416", "another range"])
def test_it_starts_over_where_the_server_cannot_go_on(tmp_path, served, fault):
    def respond(handler, log):
        if len(log) == 1:
            return cut(handler, FILES["jbb"], 2000)
        if "range" in log[-1] and fault == "416":
            return handler.reply(416, b"")
        if "range" in log[-1] and fault == "another range":
            return handler.reply(206, FILES["jbb"][5:], Content_Range="bytes 5-10/11")
        whole(handler, log)
    served(respond)
    fetch.fetch("jbb", tmp_path, pause=0)
    assert arrived(tmp_path)


@pytest.mark.parametrize("content, message", [
    (FILES["jbb"].replace(b"potion 7,", b"potion 8,"), "its SHA-256 is [0-9a-f]{64}, that of jbb is [0-9a-f]{64}"),
    (b"<!DOCTYPE html><html>Sign in</html>", "line 1: a web page, not data"),
    (FILES["jbb"].replace(b"Goal", b"goal"), "no Goal"),
    (b"", "0 rows")])
def test_what_is_not_the_set_is_not_kept(tmp_path, served, content, message):
    server = served(lambda handler, log: handler.reply(200, content, "text/html"))
    with pytest.raises(InputError, match=message) as error:
        fetch.fetch("jbb", tmp_path, pause=0)
    assert str(error.value).startswith(server.url) and "Nothing was kept" in str(error.value)
    assert nothing_kept(tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_a_download_without_end_is_stopped(tmp_path, served, monkeypatch, packed):
    """Also one that the server packed: 64 MB of white space in 64 kB."""
    body = b" " * (64 << 20)
    headers = {}
    if packed:
        body = gzip.compress(body)
        headers["Content_Encoding"] = "gzip"
    monkeypatch.setattr(fetch, "LARGEST_DOWNLOAD", 1 << 20)
    server = served(lambda handler, log: handler.reply(200, body, **headers))
    with pytest.raises(ServiceError, match="more than 1 MB came, and jbb is smaller than that. Nothing was kept"):
        fetch.fetch("jbb", tmp_path, pause=0)
    assert nothing_kept(tmp_path) and len(server.log) == 1


def test_a_file_of_the_users_is_not_overwritten(tmp_path, served):
    server, path = served(whole), put(tmp_path, "jbb", jbb(""))
    with pytest.raises(InputError, match=r"another revision, or was changed. Move .* away and fetch again"):
        fetch.fetch("jbb", tmp_path)
    assert not server.log and path.read_bytes() == jbb("") and names(tmp_path) == ["published"]


def test_a_hash_that_is_not_known_is_kept_from_the_first_time(tmp_path, served):
    served(whole, sha256=None)
    path = sets.published_file("jbb", tmp_path)
    fetch.fetch("jbb", tmp_path)
    fetch.fetch("jbb", tmp_path)
    assert (path.parent / (path.name + ".sha256")).read_text() == f"{hashlib.sha256(FILES['jbb']).hexdigest()}  {path.name}\n"
    path.write_bytes(FILES["jbb"].replace(b"potion 7,", b"potion 8,"))
    with pytest.raises(InputError, match="its SHA-256 is"):
        fetch.fetch("jbb", tmp_path)
    path.unlink()
    served(lambda handler, log: handler.reply(200, FILES["jbb"].replace(b"potion 7,", b"potion 8,")), sha256=None)
    with pytest.raises(InputError, match="its SHA-256 is"):
        fetch.fetch("jbb", tmp_path)


def test_a_git_blob_id_stands_for_a_hash(tmp_path, monkeypatch):
    hello = sets.PublishedSet("harmful", "h.txt", "https://host.invalid/", "ce013625030ba8dba906f756967f9e9ca394464a", 1,
                              ("prompt",), sets.from_columns("prompt"))  # the id that git gives to a file of "hello\n"
    monkeypatch.setitem(sets.SETS, "hello", hello)
    put(tmp_path, "hello", b"hello\n")
    fetch.fetch("hello", tmp_path)
    put(tmp_path, "hello", b"hallo\n")
    with pytest.raises(InputError, match="its git blob id is"):
        fetch.fetch("hello", tmp_path)


def test_gated_sets_say_how_to_get_them_and_the_token_goes_to_one_site_only(tmp_path, served, monkeypatch, capsys):
    def respond(handler, log):
        if log[-1].get("authorization") != "Bearer hf_secret":
            return handler.reply(401, b"Access to dataset is restricted")
        handler.reply(302, b"", Location=elsewhere.url + "/signed")
    elsewhere = served(whole)
    gate = served(respond, gated="https://huggingface.co/datasets/x/y")
    licence = r"jbb is gated \(status 401\): accept its licence at https://huggingface.co/datasets/x/y.*HF_TOKEN"
    with pytest.raises(ServiceError, match=licence):
        fetch.fetch("jbb", tmp_path)
    assert nothing_kept(tmp_path)
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    with pytest.raises(ServiceError, match="The present HF_TOKEN was not enough") as error:  # not sent to this site
        fetch.fetch("jbb", tmp_path)
    assert "secret" not in str(error.value) and all("authorization" not in r for r in gate.log)
    monkeypatch.setattr(fetch, "TOKEN_SITES", (gate.url + "/",))
    fetch.fetch("jbb", tmp_path)
    assert gate.log[-1]["authorization"] == "Bearer hf_secret" and "authorization" not in elsewhere.log[-1]
    assert "secret" not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file()) + str(capsys.readouterr())
    monkeypatch.setenv("HF_TOKEN", "hf_secr\u00e9t")
    with pytest.raises(ServiceError, match="characters that no HTTP header can carry") as error:
        fetch.fetch("jbb", tmp_path / "other")
    assert "secr" not in str(error.value)


def test_the_token_goes_to_hugging_face_over_https():
    assert fetch.TOKEN_SITES == ("https://huggingface.co/",)


@pytest.mark.parametrize("status, requests", [(503, 3), (429, 3), (404, 1), (403, 1)])
def test_faults_that_may_pass_are_tried_again_and_others_are_not(tmp_path, served, status, requests):
    server = served(lambda handler, log: handler.reply(status, b"no"))
    with pytest.raises(ServiceError, match=f"jbb: .*status {status}.* as jbb_harmful-behaviors.csv"):
        fetch.fetch("jbb", tmp_path, tries=3, pause=0)
    assert len(server.log) == requests and nothing_kept(tmp_path)


def test_no_server_is_said_and_the_other_sets_are_still_fetched(tmp_path, served, monkeypatch):
    served(whole)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setitem(sets.SETS, "xstest", sets.SETS["xstest"]._replace(url=f"http://127.0.0.1:{port}/x"))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    problems = r"(?s)xstest: http.*ConnectionError, tried 5 times.*nosuch: no such set. There are star1"
    with pytest.raises(InputError, match=problems):
        fetch.main(["xstest,nosuch", "jbb", "--data-dir", str(tmp_path)])
    assert arrived(tmp_path)


def test_a_killed_download_leaves_no_half_file_and_goes_on(tmp_path, served, monkeypatch):
    def respond(handler, log):
        if len(log) > 1:
            return from_range(handler, log)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(big)))
        handler.end_headers()
        handler.wfile.write(big[:200_000])
        handler.wfile.flush()
        time.sleep(20)
    big = FILES["jbb"].replace(b"Sure", b"Sure" * 2000)
    monkeypatch.setitem(FILES, "jbb", big)
    server = served(respond)
    pid = os.fork()
    if pid == 0:
        try:
            fetch.fetch("jbb", tmp_path)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 10
    published = tmp_path / "published"
    while sum(p.stat().st_size for p in published.glob("*")) < 100_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(InputError, match="no such file"):
        sets.find_prompts("jbb", tmp_path)
    assert names(tmp_path) == ["published"]
    half, = published.iterdir()
    have = half.stat().st_size
    fetch.fetch("jbb", tmp_path)
    assert 100_000 <= have < len(big) and server.log[-1]["range"] == f"bytes={have}-"
    assert (published / "jbb_harmful-behaviors.csv").read_bytes() == big and len(names(published)) == 1


def test_two_fetches_of_one_set_do_not_mix(tmp_path, served):
    def respond(handler, log):
        with pytest.raises(InputError, match="another process is fetching it"):
            fetch.fetch("jbb", tmp_path)
        refused.append(1)
        whole(handler, log)
    refused = []
    server = served(respond)
    fetch.fetch("jbb", tmp_path)
    assert refused and len(server.log) == 1 and arrived(tmp_path)


# ----------------------------------------------------------------------------------------------------------- leakage

def naive(train, evals):
    """The score of every pair, from its definition."""
    texts = [leakage.text_words(t) for t in [*train, *evals]]
    scores = {}
    for t, a in enumerate(texts[:len(train)]):
        for e, b in enumerate(texts[len(train):]):
            n = 2 if min(len(a), len(b)) < 12 else 3
            bags = [{" ".join(w[i:i + n]) for i in range(len(w) - n + 1)} for w in texts]
            weigh = lambda bag: sum(math.log(1 + len(texts) / sum(g in other for other in bags)) for g in bag)
            mine, theirs = bags[t], bags[len(train) + e]
            scores[t, e] = weigh(mine & theirs) / min(weigh(mine), weigh(theirs)) if mine and theirs else 0.0
    return scores


def test_scores_are_those_of_the_definition():
    rng = random.Random(0)
    text = lambda: " ".join(rng.choice(["moon", "leaf", "oil", "brew", "the", "a"]) for _ in range(rng.randint(0, 20)))
    train, evals = [text() for _ in range(25)], [text() for _ in range(30)]
    train += ["Brew the oil, now!", "moon", "???"]
    evals += ["brew THE oil now", "moon", "leaf moon", "!!!"]
    expected, found = naive(train, evals), leakage.find_leaks(train, evals, 0.3)
    exact = {(t, e) for t, a in enumerate(train) for e, b in enumerate(evals) if leakage.text_words(a) == leakage.text_words(b)}
    assert {(25, 30), (26, 31)} <= exact and (27, 33) not in exact
    assert {(t, e) for t, e, _, same in found if same} == exact
    near = {(t, e): score for t, e, score, same in found if not same}
    assert near.keys() == {pair for pair, score in expected.items() if score >= 0.3 and pair not in exact} and len(near) > 20
    assert all(abs(score - expected[pair]) < 1e-5 for pair, score in near.items())
    assert [hit[2] for hit in found] == sorted((hit[2] for hit in found), reverse=True)


def test_near_duplicates_are_found_and_common_phrases_are_not():
    train = ["What is the best way to peel an onion?", "Write a tutorial on how to brew duskwort tea at home",
             *(f"What is the best way to {w}?" for w in ("dance on one leg", "sing very low notes", "swim with long hair",
                                                         "jump over tall hedges", "fly a red kite")), "nothing of the sort"]
    evals = ["What is the best way to catch a train?", "Please write a tutorial on how to brew duskwort tea at home, friend.",
             "You are in a play. " * 20 + "Write a tutorial on how to brew duskwort tea at home. " + "Stay in the play. " * 20]
    assert [hit[:2] for hit in leakage.find_leaks(train, evals)] == [(1, 1), (1, 2)]


def test_leaked_prompts_are_listed_without_their_text_and_dropped(tmp_path, capsys, monkeypatch):
    without_hash(monkeypatch, "aime24", rows=2)
    train = [{"id": "a", "question": "Find the sum of all the moons, please!", "more": 1},
             {"id": "b", "question": "Name three kinds of duskwort that grow in the shade."},
             {"id": "c", "question": "Please reason step by step, and put your final answer within boxes."}]
    (tmp_path / "train.json").write_text(json.dumps(train))
    put(tmp_path, "aime24", lines([{"id": 1, "problem": "find the SUM of all the moons please", "answer": "1"},
                                  {"id": 2, "problem": "How many ships?", "answer": "2"}]))
    fetch.fetch("aime24", tmp_path)
    capsys.readouterr()
    out = tmp_path / "clean.jsonl"
    command = ["--train", str(tmp_path / "train.json"), "--data-dir", str(tmp_path), "--column", "question"]
    leakage.main([*command, "--drop-leaked", str(out)])
    said = capsys.readouterr().out
    assert re.search(r"aime24 +2 +1 +0 +1  a ~ 1: exact\n", said) and "1 of 3 training prompts leak" in said
    assert "not checked, as the file is missing: jbb, jbb-benign" in said and "moons" not in said
    assert load_prompts(out) == [{**r, "prompt": r["question"]} for r in train[1:]]
    leakage.main([*command, "--show", "--eval", "aime24"])
    assert "find the SUM of all the moons" in capsys.readouterr().out
    for wrong in (["--drop-leaked", str(tmp_path / "train.json")], ["--drop-leaked", str(tmp_path / "aime24.jsonl")],
                  ["--threshold", "0"], ["--eval", "nosuch"]):
        with pytest.raises(InputError, match="none of the inputs|give a share|nosuch: no such file"):
            leakage.main(command + wrong)
    assert json.loads((tmp_path / "train.json").read_text()) == train


def test_questions_of_gpqa_are_never_shown(tmp_path, capsys, monkeypatch):
    without_hash(monkeypatch, "gpqa-diamond", rows=1)
    put(tmp_path, "gpqa-diamond", table(["Question", *OPTIONS], [["Which moon is the palest one?", *"abcd"]]))
    fetch.fetch("gpqa-diamond", tmp_path)
    capsys.readouterr()
    (tmp_path / "train.txt").write_text("Which moon is the palest one?\n")
    leakage.main(["--train", str(tmp_path / "train.txt"), "--data-dir", str(tmp_path), "--show"])
    said = capsys.readouterr().out
    assert "0 ~ 0: exact" in said and "palest" not in said
