"""The clock, the disk, the keyboard: what ends a command ends it in one line, with no traceback."""
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import intervene
import support.hub
from data import Appender, load_prompts
from intervene import make_judge
from model import LocalSampler, Request, load_tokenizer
from launch.run import APART
from support.cache import Cache
from support.errors import InputError, exit_cleanly
from support.files import read_json, read_jsonl, write_json, write_jsonl, write_text, writing
from support.server import ServerSampler
from tests.loopback import Loopback, chat

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "toy" / "model"
PROMPTS = ROOT / "toy" / "prompts" / "train_harmful.jsonl"
STEPS = [sys.executable, "intervene.py", "steps"]
HALF = "\ud83d"  # half of a surrogate pair, as JSON lets it through
TINY_DISK = 'mount -t tmpfs -o "$0" tmpfs "$1" && shift && exec "$@"'


@pytest.fixture(autouse=True)
def handler_of_pytest():
    """`exit_cleanly` takes Ctrl-C over for the rest of its process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C


def start(command, **environment):
    """A command as the leader of a process group, as a shell starts one."""
    command = [str(word) for word in command]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                            preexec_fn=heed_interrupts, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def one_line(process, status, *parts):
    """Wait for a process to end in one line on stderr that has these parts; returns it."""
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr
    return check_line(stderr, status, *parts)


def check_line(stderr, status, *parts):
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: " if status == 2 else "interrupted."), stderr
    for part in parts:
        assert str(part) in lines[0], stderr
    return lines[0]


def ends_with(main, capsys, *parts):
    """Run a command line in this process, which must end with status 2 and one line."""
    with pytest.raises(SystemExit) as ended:
        exit_cleanly(main)
    assert ended.value.code == 2
    return check_line(capsys.readouterr().err, 2, *parts)


def traces(path, n=1, size=10):
    """A file of traces, as far as `steps` reads it."""
    write_jsonl(path, [{"id": f"{i}#0", "reasoning": "It is so. " * size} for i in range(n)])
    return path


# -------------------------------------------------------------------------------------- the disk

@pytest.fixture(scope="module")
def tiny_disk():
    """A function that starts a command with a small file system mounted on a folder."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    command = [*unshare, "sh", "-c", TINY_DISK]
    if not shutil.which("unshare") or subprocess.run([*command, "size=4k", "/mnt", "true"],
                                                     capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    return lambda options, folder, words, **more: start([*command, options, folder, *words], **more)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def test_a_full_disk_names_the_file_that_a_stage_writes(tiny_disk, disk, tmp_path):
    command = [*STEPS, "--traces", traces(tmp_path / "t.jsonl", 50, 300)]
    command += ["--out", disk / "steps.jsonl"]
    one_line(tiny_disk("size=64k", disk, command), 2,
             f"{disk}/steps.jsonl: No space left on device. Free some space")


def test_a_full_disk_names_the_file_of_rollouts(tiny_disk, disk):
    command = [sys.executable, "intervene.py", "rollouts", "--model", TOY, "--prompts", PROMPTS]
    command += ["--samples", 4, "--max-new-tokens", 160, "--out", disk / "rollouts.jsonl"]
    one_line(tiny_disk("size=128k", disk, command), 2,
             f"{disk}/rollouts.jsonl: No space left on device")


def training(out, pairs, *flags):
    return [sys.executable, "ipo.py", "train", "--model", TOY, "--pairs", pairs, "--out", out,
            *flags]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    records = []
    for i in range(40):
        records.append({"id": f"{i}#0@1", "prompt_id": str(i), "h": 1, "n_prompt": 2,
                        "prefix_ids": [5, 6 + i, 7], "chosen_ids": [8, 9, 1],
                        "rejected_ids": [10, 11, 1]})
    write_jsonl(path, records)
    return path


@pytest.mark.parametrize("flags,file", [
    ([], "model.safetensors: No space left on device"),
    (["--batch-size", 4, "--save-every", 1], "checkpoint"),
])
def test_a_full_disk_names_weights_and_checkpoints(tiny_disk, disk, pairs, flags, file):
    command = training(disk / "out", pairs, *flags)
    process = tiny_disk("size=600k", disk, command)
    _, stderr = process.communicate(timeout=120)
    stderr = "\n".join(line for line in stderr.splitlines() if "Warning" not in line
                       and not line.startswith("  "))
    assert process.returncode == 2
    check_line(stderr, 2, f"{disk}/out/{file}")


def test_a_read_only_disk_and_a_folder_that_may_not_be_written(tiny_disk, disk, tmp_path):
    command = [*STEPS, "--traces", traces(tmp_path / "t.jsonl"), "--out", disk / "a" / "s.jsonl"]
    one_line(tiny_disk("size=4k,ro", disk, command), 2,
             f"{disk}/a: Read-only file system. Name another place")
    if os.getuid():
        disk.chmod(0o555)
        one_line(start(command), 2, f"{disk}/a: Permission denied. Change its permissions")


def test_a_full_disk_under_standard_output(tmp_path):
    command = [*STEPS, "--traces", traces(tmp_path / "t.jsonl"), "--out", tmp_path / "s.jsonl"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(list(map(str, command)), cwd=ROOT, stdout=full, text=True,
                              stderr=subprocess.PIPE)
    assert done.returncode == 2
    check_line(done.stderr, 2, "standard output: No space left on device")


PRINTS = """
from support.errors import exit_cleanly

def main():
    {}
    print("a line", flush=True)

exit_cleanly(main)
"""


def end_without_reader(code):
    """Run code whose standard output nobody reads; returns its exit status and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", PRINTS.format(code)], cwd=ROOT, stdout=writer,
                          stderr=subprocess.PIPE, text=True)
    os.close(writer)
    return done.returncode, done.stderr


def test_a_reader_that_has_seen_enough_ends_a_command_silently():
    assert end_without_reader("pass") == (141, "")  # as `bash run.sh plan | head -1`


def test_another_broken_pipe_is_a_bug():
    broken = subprocess.run([sys.executable, "-c", PRINTS.format("raise BrokenPipeError")],
                            cwd=ROOT, capture_output=True, text=True)
    assert broken.returncode == 1
    assert broken.stderr.endswith("\nBrokenPipeError\n")


def test_whatever_cannot_be_written_is_named(tmp_path, monkeypatch):
    no_space = OSError(28, "No space left on device")

    def fail(*_, **__):
        raise no_space

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError) as raised:
        write_json(tmp_path / "a.json", {})
    assert raised.value.filename == str(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []  # not even the temporary file

    cache = Cache(tmp_path / "cache.jsonl")
    monkeypatch.setattr(cache, "_read_new_lines", lambda: False)
    cache.file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError) as raised:
        cache.put({"id": "a"})
    assert raised.value.filename == str(tmp_path / "cache.jsonl")

    with pytest.raises(OSError, match="model.safetensors"):  # as libraries in Rust say it
        with writing("model.safetensors"):
            raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(ZeroDivisionError):
        with writing("x"):
            1 / 0


def test_a_file_where_a_folder_is_needed_and_the_other_way_round(tmp_path, capsys):
    run = tmp_path / "run"
    run.write_text("")
    command = ["bash", "run.sh"]
    environment = {"RUN": str(run), "PYTHON": sys.executable}
    one_line(start(command, **environment), 2, f"{run}: ", "A file stands where a folder is needed")

    def rollouts(prompts):
        return functools.partial(intervene.main, [
            "rollouts", "--model", str(TOY), "--prompts", str(prompts),
            "--out", str(tmp_path / "r.jsonl")])

    folder = tmp_path / "prompts.jsonl"
    folder.mkdir()
    ends_with(rollouts(folder), capsys, f"{folder}: a folder")
    ends_with(rollouts(tmp_path), capsys, f"{tmp_path}: a folder")
    steps = functools.partial(intervene.main, ["steps", "--traces", str(tmp_path), "--out",
                                               str(tmp_path / "s.jsonl")])
    ends_with(steps, capsys, tmp_path, "A file is needed here, not a folder")


def test_bugs_keep_their_traceback():
    def bug():
        raise KeyError("a bug")

    def nameless():
        raise OSError("something of a library's")

    with pytest.raises(KeyError):
        exit_cleanly(bug)
    with pytest.raises(OSError, match="something of"):
        exit_cleanly(nameless)


# ---------------------------------------------------------------------------------- the keyboard

def interrupt(process):
    os.killpg(process.pid, signal.SIGINT)
    started = time.monotonic()
    line = one_line(process, 130, "run the same command again")
    assert time.monotonic() - started < 20
    return line


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to that")


def test_ctrl_c_while_a_server_keeps_a_judge_waiting(tmp_path):
    reached = threading.Event()

    def respond(handler, body):
        reached.set()
        time.sleep(60)

    write_jsonl(tmp_path / "t.jsonl", [
        {"id": "a#0", "prompt": "p", "reasoning": "r.", "response": "y", "truncated": False}])
    write_jsonl(tmp_path / "s.jsonl", [{"id": "a#0", "steps": ["r."]}])
    with Loopback(respond=respond) as server:
        command = [sys.executable, "intervene.py", "judge", "--judge", server.url, "--judge-model",
                   "m", "--traces", tmp_path / "t.jsonl", "--steps", tmp_path / "s.jsonl", "--out",
                   tmp_path / "v.jsonl"]
        process = start(command)
        assert reached.wait(60)
        interrupt(process)


def test_ctrl_c_while_a_server_keeps_a_sampler_waiting(tmp_path):
    reached = threading.Event()

    def respond(handler, body):
        reached.set()
        time.sleep(60)

    with Loopback(respond=respond) as server:
        command = [sys.executable, "intervene.py", "rollouts", "--model", TOY, "--server",
                   server.url, "--prompts", PROMPTS, "--max-new-tokens", 20, "--out",
                   tmp_path / "r.jsonl"]
        process = start(command)
        assert reached.wait(60)
        interrupt(process)


@pytest.mark.parametrize("separate", [[], ["--separate"]])
def test_ctrl_c_in_training(tmp_path, pairs, separate):
    command = training(tmp_path / "out", pairs, "--batch-size", 1, "--epochs", 1000)
    stage = "training: " + " ".join(map(str, command))
    process = start([sys.executable, "-m", "launch.run", *separate, stage])
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size)
    interrupt(process)


def test_ctrl_c_under_torchrun(tmp_path, pairs):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "2"]
    command = training(tmp_path / "out", pairs, "--batch-size", 2, "--epochs", 1000)
    stage = "training: " + " ".join(map(str, [*torchrun, *command[1:]]))
    process = start([sys.executable, "-m", "launch.run", "--separate", stage])
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert stderr.count("interrupted.") == 1


def test_ctrl_c_while_modules_are_imported_and_between_stages(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("from support.errors import exit_cleanly\n"
                      "import sys, time\n"
                      "print('here', flush=True)\n"
                      "time.sleep(60)\n")
    environment = {"PYTHONPATH": str(ROOT)}
    for command in ([sys.executable, script], [sys.executable, "-c", APART, script]):
        process = start(command, **environment)
        lines = iter(process.stdout.readline, "")
        assert any("here" in line for line in lines)
        interrupt(process)


# --------------------------------------------------------------------------------- damaged files

DEEP = "[" * 100_000
DAMAGED = ["", '{"flags": {', DEEP, '{"flags": ' + "1" * 5000 + "}", "[]", "null", b"\xff\xfe{"]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("name", ["s.config.json", "s.funnel.json"])
def test_damaged_files_beside_an_output(tmp_path, capsys, name, content):
    run = functools.partial(intervene.main, ["steps", "--traces", str(traces(tmp_path / "t.jsonl")),
                                             "--out", str(tmp_path / "s.jsonl")])
    run()
    capsys.readouterr()
    write = Path.write_bytes if isinstance(content, bytes) else Path.write_text
    write(tmp_path / name, content)
    ends_with(run, capsys, tmp_path / name, "elete")


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_metrics_of_an_evaluation(tmp_path, capsys, content):
    metrics = tmp_path / "base" / "metrics.json"
    write_json(metrics, {"sets": {}})
    write = Path.write_bytes if isinstance(content, bytes) else Path.write_text
    write(metrics, content)
    report = functools.partial(evaluate.main, ["report", "--run", str(tmp_path), "--out",
                                               str(tmp_path / "r.html"), "--evals",
                                               f"base={tmp_path}/base"])
    ends_with(report, capsys, metrics, "Was it cut short?")


@pytest.mark.parametrize("content", ['{"step": 0}\n{"st', DEEP, "\xff", "{}\n"],
                         ids=["cut", "deep", "bytes", "short"])
def test_damaged_metrics_of_a_training(tmp_path, monkeypatch, content):
    import ipo
    (tmp_path / "metrics.jsonl").write_text(content, encoding="latin-1")
    monkeypatch.setattr(ipo, "load_checkpoint", lambda *_: 2)
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        ipo.load_or_start(torch.nn.Linear(1, 1), tmp_path, 1e-3, 0.0)


def test_damaged_records(tmp_path):
    path = tmp_path / "r.jsonl"
    for content in ('{"id": "a"}\n{"id"\n', '{"id": "a"}\n' + DEEP + "\n", '{"id": "a"}\n[]\n'):
        path.write_text(content)
        for read in (read_jsonl, Appender, load_prompts):
            with pytest.raises(InputError, match=r"r\.jsonl, line 2: .*(mend|Write)"):
                read(path)
    path.write_bytes(b'{"id": "a"}\n{"id": "\xff"}\n')
    with pytest.raises(InputError, match=r"r\.jsonl, line 2: not UTF-8"):
        read_jsonl(path)
    path.write_text('{"id": "a"}\n{}\n')
    with pytest.raises(InputError, match=r"r\.jsonl, line 2: a record without an id"):
        Appender(path)
    cache = tmp_path / "cache.jsonl"
    cache.write_text(DEEP + '\n{"id": "a"}\n')
    assert list(Cache(cache).records) == ["a"]  # a cache is no result: what it lacks is asked again


def test_prompts_that_are_no_text_or_too_deep(tmp_path):
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    (tmp_path / "latin.txt").write_bytes("fine\nna\xefve\n".encode("latin-1"))
    (tmp_path / "wide.csv").write_bytes("prompt\nhello\n".encode("utf-16"))
    (tmp_path / "deep.json").write_text(DEEP)
    (tmp_path / "deep.jsonl").write_text(DEEP)
    expected = {
        "binary.jsonl": "line 2: not UTF-8",
        "latin.txt": "line 2: not UTF-8",
        "wide.csv": "line 1: not UTF-8",
        "deep.json": "nested too deeply",
        "deep.jsonl": "nested too deeply",
    }
    for name, problem in expected.items():
        with pytest.raises(InputError, match=rf"{name}, .*{problem}"):
            load_prompts(tmp_path / name)
    with pytest.raises(InputError, match=r"latin\.txt, line 2: not UTF-8"):
        from data import load_triggers
        load_triggers(tmp_path / "latin.txt")


# ------------------------------------------------------------------------ half of a surrogate pair

def test_half_a_surrogate_pair_in_records_passes_through(tmp_path):
    record = {"id": "a", "text": f"one {HALF} and {HALF}\ude00x"}
    write_jsonl(tmp_path / "w.jsonl", [record])
    appender = Appender(tmp_path / "a.jsonl")
    appender.write(record)
    appender.close()
    # Where two halves stand side by side they are one character in any JSON.
    expected = [json.loads(json.dumps(record))]
    assert read_jsonl(tmp_path / "w.jsonl") == read_jsonl(tmp_path / "a.jsonl") == expected
    write_json(tmp_path / "w.json", record)
    assert read_json(tmp_path / "w.json") == expected[0]
    write_text(tmp_path / "w.html", f"<p>{HALF}</p>")
    assert (tmp_path / "w.html").read_text() == "<p>\\ud83d</p>"


def test_half_a_surrogate_pair_in_a_prompt_is_refused_by_name(tmp_path):
    for row in ({"id": "a", "prompt": f"how {HALF}"}, {"id": f"a{HALF}", "prompt": "how"}):
        (tmp_path / "p.jsonl").write_text('{"id": "0", "prompt": "fine"}\n' + json.dumps(row))
        with pytest.raises(InputError, match=r"p\.jsonl, row 2: half of a surrogate pair"):
            load_prompts(tmp_path / "p.jsonl")


def test_half_a_surrogate_pair_from_a_judge(tmp_path):
    def respond(handler, body):
        handler.reply(200, chat(json.dumps({"reason": HALF, "answer": "safe"})))

    def respond_raw(handler, body):
        handler.reply(200, chat(f'{{"reason": "{HALF}", "answer": "safe"}}'))

    for number, answer in enumerate((respond, respond_raw)):
        with Loopback(respond=answer) as server:
            cache = tmp_path / f"cache{number}.jsonl"
            judge = make_judge(server.url, "m", cache=cache)
            items = [{"prompt": "p", "text": f"text {HALF}"}]
            assert list(judge.ask("reasoning", items)) == [True]
            # Written, read again, and found again.
            again = make_judge(server.url, "m", cache=cache)
            assert list(again.ask("reasoning", items)) == [True]
            assert len(server.log) == 1


def test_half_a_surrogate_pair_from_a_server_that_samples(tmp_path):
    tokenizer = load_tokenizer(TOY)

    def respond(handler, body):
        sent = body["prompt"]
        if not isinstance(sent, str):
            return handler.reply(400, {})
        count = len(tokenizer.encode(sent, add_special_tokens=False))
        choice = {"text": f"so {HALF}it is", "finish_reason": "stop"}
        handler.reply(200, {"choices": [choice], "usage": {"prompt_tokens": count,
                                                           "completion_tokens": 4}})

    with Loopback(respond=respond) as server:
        sampler = ServerSampler(TOY, server.url, tokenizer, {tokenizer.eos_token_id}, 500,
                                temperature=1, top_p=1, max_new_tokens=9, seed=0)
        prompt = tokenizer.encode("How are you?", add_special_tokens=False)
        [(_, ids, finished)] = sampler([Request("a", prompt)])
    expected = tokenizer.encode("so \ufffdit is", add_special_tokens=False)
    assert (ids[:-1], finished) == (expected, "stop")


# --------------------------------------------------------------------------------------- the model

def test_weights_that_are_not_numbers_are_reported_with_the_models_name(tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(TOY, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    sampler = LocalSampler(broken, temperature=0.6, top_p=0.95, max_new_tokens=4, seed=0)
    with pytest.raises(InputError, match=re.escape(str(broken)) + ".*(not finite|nan)"):
        list(sampler([Request("a", [5, 6])]))


def test_a_model_whose_numbers_break_later_is_reported_too(tmp_path):
    sampler = LocalSampler(TOY, temperature=0.6, top_p=0.95, max_new_tokens=4, seed=0)
    model = sampler.load()
    model.get_input_embeddings().weight.data[5] = float("nan")
    with pytest.raises(InputError, match=re.escape(str(TOY)) + ": its logits are not finite"):
        list(sampler([Request("a", [5, 6])]))


@pytest.mark.parametrize("name", ["nosuch", "toy/modell", "./no/such", "/no/such", "runs/a/stage1"])
def test_a_mistyped_path_of_a_model_is_a_missing_path(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(support.hub, "_hub_answers", lambda: 1 / 0)  # nobody asks there
    out = str(tmp_path / "out.jsonl")
    traces(tmp_path / "t.jsonl")
    commands = [
        ["rollouts", "--model", name, "--prompts", str(PROMPTS), "--out", out],
        ["judge", "--judge", f"local:{name}", "--traces", str(tmp_path / "t.jsonl"), "--steps",
         str(tmp_path / "t.jsonl"), "--out", out],
    ]
    for command in commands:
        line = ends_with(functools.partial(intervene.main, command), capsys, name, "no such")
        assert "hub" not in line.lower() and "hugging" not in line.lower()
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(name)
    assert not Path(out).exists() and not (tmp_path / "out.config.json").exists()


def test_a_mistyped_model_ends_run_sh_in_seconds(tmp_path):
    started = time.monotonic()
    environment = {"MODEL": "nosuch", "RUN": str(tmp_path / "run"), "PYTHON": sys.executable}
    one_line(start(["bash", "run.sh"], **environment), 2, "MODEL=nosuch: no such directory")
    assert time.monotonic() - started < 30  # a hub that is asked again and again takes minutes


def test_a_name_on_the_hub_without_a_connection(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(support.hub, "_hub_answers", lambda: False)
    with pytest.raises(InputError, match="no such directory, and there is no connection") as raised:
        load_tokenizer("org/name")
    assert "hub" not in str(raised.value).lower()


def test_a_hub_that_does_not_answer_costs_seconds(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert support.hub.PATIENCE <= 5
    monkeypatch.setattr(support.hub, "PATIENCE", 1)
    with Loopback(respond=lambda handler, body: time.sleep(60)) as server:
        silent = server.httpd.RequestHandlerClass
        monkeypatch.setattr(silent, "do_HEAD", lambda self: time.sleep(20), raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        started = time.monotonic()
        with pytest.raises(InputError, match="no such directory, and there is no connection"):
            support.hub.model_folder("org/name")
        assert time.monotonic() - started < 5


def test_a_name_that_the_hub_does_not_have(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    class Response:
        status_code = 404
        headers = {}
        request = None

    def fetch(*_, **__):
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        error.response = Response()
        raise error

    monkeypatch.setattr(support.hub, "_hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(InputError, match=r"org/name: .* does not give it \(status 404\)"):
        support.hub.model_folder("org/name")
    # What is there already is used, also without a connection.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: "/some/folder")
    assert support.hub.model_folder("org/other") == Path("/some/folder")
