"""Servers for the stages of a run: when they start and stop, and that nothing is left running."""
import argparse
import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluate import EVAL_KEYS
from intervene import CUE_KEYS, JUDGE_KEYS
from launch.run import JUDGE_PORT, Servers, build_parser, judge_model, run_stages
from launch.stages import Stage
from support import engine as engine_module
from support.engine import Engine, ask_for_a_token, stop_left_over
from support.errors import InputError, ServiceError
from support.files import write_json
from support.gpus import Gpu

ROOT = Path(__file__).resolve().parents[1]
FAKE = Path(__file__).with_name("fake_engine.py")

# A stage that notes that it runs and asks each server for something.
STAGE = '''
import sys
from support.engine import ask_for_a_token
log, name, prompt, *addresses = sys.argv[1:]
with open(log, "a") as file:
    file.write(f"stage {name}\\n")
for address in addresses:
    import http.client, json
    port = int(address.rpartition(":")[2].removesuffix("/v1"))
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request("POST", "/v1/completions", json.dumps({"model": name, "prompt": prompt}))
        connection.getresponse().read()
    except OSError:
        print("error: no reply", file=sys.stderr)
        sys.exit(2)
if prompt == "wait":
    import time
    time.sleep(60)
'''

# A run of its own, to be killed: one stage that waits, or none.
RUNNER = '''
import argparse, sys
from launch.run import Servers, build_parser, check, run_stages, stop_left_over
from launch.stages import Stage
from support.errors import exit_cleanly
def main():
    run, separate, *command = sys.argv[1:]
    options = build_parser().parse_args(["--run", run, "--engine", command.pop(0), "--port",
                                         command.pop(0), "a stage"])
    stop_left_over(run)
    stages = [Stage("one", command, "", argparse.Namespace(model="A", server="{engine}"))]
    run_stages(stages, Servers(stages, options), separate == "separate")
exit_cleanly(main)
'''


class Bench:
    """A run folder, a log of what happened, and a free port."""

    def __init__(self, folder):
        self.run = folder / "run"
        self.log = folder / "log.txt"
        self.script = folder / "stage.py"
        self.script.write_text(STAGE)
        self.port = free_ports()

    def template(self, *flags):
        words = [sys.executable, "-I", str(FAKE), "--log", str(self.log), *flags]
        return shlex.join(words) + " --model {model} --port {port}"

    def engine(self, *flags, **settings):
        keywords = {"gpus": [], "port": self.port, "memory": 0.9, **settings}
        return Engine("engine", self.template(*flags), self.run, **keywords)

    def stage(self, name, prompt="go", engine=False, judge=False, **flags):
        command = [sys.executable, str(self.script), str(self.log), name, prompt]
        if engine:
            command.append("{engine}")
        if judge:
            command.append("{judge}")
            flags.update(judge="{judge}", judge_model="J")
        return Stage(name, command, "", argparse.Namespace(model=name, **flags))

    def servers(self, stages, *flags):
        options = ["--engine", self.template(), "--judge-engine", self.template(), "--port",
                   str(self.port), "--run", str(self.run), *flags, "a stage"]
        return Servers(stages, build_parser().parse_args(options))

    def start_runner(self, separate, prompt="wait", *flags):
        stage = self.stage("A", prompt, engine=True)
        words = [self.run, separate, self.template(*flags), str(self.port), *stage.command]
        return subprocess.Popen([sys.executable, "-c", RUNNER, *words], cwd=ROOT,
                                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def events(self, *kinds):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.split()[0] in kinds]

    def wait_for(self, event, count=1):
        for _ in range(400):
            if self.events(*event.split()[:1]).count(event) >= count:
                return
            time.sleep(0.02)
        raise AssertionError(f"no {event!r} in {self.events('start', 'stage', 'ask', 'end')}")

    def pids(self):
        return [int(line.split()[2]) for line in self.events("start")]

    def wait_until_gone(self):
        for _ in range(400):
            if not any(map(is_running, self.pids())):
                return
            time.sleep(0.02)
        raise AssertionError("a server is left running")


def free_ports():
    """A port that is free, as well as the judge's."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("", port + JUDGE_PORT))
            except (OSError, OverflowError):
                continue
            return port


def is_running(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(shown.stdout.strip()) and not shown.stdout.startswith("Z")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "POLL", 0.02)
    bench = Bench(tmp_path)
    yield bench
    for pid in filter(is_running, bench.pids()):
        os.kill(pid, signal.SIGKILL)
        pytest.fail("a server is left running")


# ------------------------------------------------------------------------------------- in a run

def test_a_server_is_kept_for_its_model_and_none_runs_while_a_model_is_trained(bench, capfd):
    stages = [
        bench.stage("A", engine=True),
        bench.stage("no model", judge=True),
        bench.stage("A", engine=True, judge=True),
        bench.stage("training", lr=1),
        bench.stage("B", engine=True),
        bench.stage("report"),
    ]
    run_stages(stages, bench.servers(stages), separate=True)
    events = [line.rsplit(" ", 1)[0] if line.startswith("start") else line
              for line in bench.events("start", "stage", "ask", "end")]
    assert events[:8] == ["start A", "stage A", "ask A", "start J", "stage no model",
                          "ask no model", "stage A", "ask A"]
    assert events[8:] == ["ask A", "end A", "end J", "stage training", "start B", "stage B",
                          "ask B", "stage report", "end B"]
    assert not any(map(is_running, bench.pids()))
    assert not list(bench.run.glob(".*.json"))
    out = capfd.readouterr().out
    assert f"engine: A on 127.0.0.1:{bench.port}, ready in " in out


def test_another_model_takes_the_servers_place(bench):
    engine = bench.engine()
    engine.hold("A")
    engine.hold("A")
    engine.hold("B")
    assert [line.split()[:2] for line in bench.events("start", "end")] == [
        ["start", "A"], ["end", "A"], ["start", "B"]]
    assert ask_for_a_token(bench.port, "B")[0] == 200
    engine.stop()
    assert ask_for_a_token(bench.port, "B")[0] == 0


def test_a_finished_stage_starts_no_server(bench, tmp_path):
    out = tmp_path / "out.jsonl"
    out.touch()
    write_json(tmp_path / "out.funnel.json", {"stage": "out", "counts": {}})
    stage = bench.stage("A", engine=True, out=str(out))
    servers = bench.servers([stage])
    assert servers.prepare(stage)[-1] == f"http://127.0.0.1:{bench.port}/v1"
    assert not bench.events("start")


def test_a_server_that_dies_in_a_stage_is_named_with_its_log(bench, capfd):
    stages = [bench.stage("A", "die", engine=True), bench.stage("report")]
    with pytest.raises(SystemExit) as end:
        run_stages(stages, bench.servers(stages), separate=True)
    assert end.value.code == 2
    assert f"error: engine: the server at port {bench.port} ended with status 3" in (
        capfd.readouterr().err)
    assert not bench.events("stage")[1:]  # no stage after it
    # The same command goes on: another process of the server is started.
    stages = [bench.stage("A", engine=True)]
    run_stages(stages, bench.servers(stages), separate=True)
    assert len(bench.events("start")) == 2


# ------------------------------------------------------------------------------------ starting

def test_a_server_that_does_not_start_is_named_with_its_status_and_last_lines(bench):
    with pytest.raises(ServiceError) as error:
        bench.engine("--die").hold("A")
    log = bench.run / "logs" / f"engine-{bench.port}.log"
    assert "ended with status 1. Its last lines:" in str(error.value)
    assert f"  no memory for the model\nAll of them: {log}" in str(error.value)


def test_a_server_that_is_healthy_but_answers_nothing_is_not_waited_for_for_ever(bench):
    with pytest.raises(ServiceError, match="runs, but after .* one token of A: status 503"):
        bench.engine("--status", "503", wait=0.5).hold("A")
    bench.wait_until_gone()


def test_a_server_that_rejects_the_simplest_request_is_given_up(bench, monkeypatch):
    monkeypatch.setattr(engine_module, "REFUSAL", 0.1)
    with pytest.raises(ServiceError, match="status 404, .*not now"):
        bench.engine("--status", "404").hold("A")
    bench.wait_until_gone()


def test_a_slow_start_is_waited_for_and_told(bench, monkeypatch, capsys):
    monkeypatch.setattr(engine_module, "LINE", 0.2)
    engine = bench.engine("--slow", "0.6")
    engine.hold("A")
    engine.stop()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("engine: A is starting, 0 s so far (its output: ")
    assert lines[-1].endswith("ready in 1 s")


def test_a_port_of_another_program_is_not_taken(bench):
    with socket.socket() as other:
        other.bind(("127.0.0.1", bench.port))
        other.listen()
        with pytest.raises(InputError, match=f"port {bench.port} .*another program.*PORT="):
            bench.engine().hold("A")
    assert not bench.events("start")


def test_a_server_whose_number_cannot_be_noted_is_stopped(bench, monkeypatch):
    def full(path, state):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(engine_module, "write_json", full)
    engine = bench.engine()
    with pytest.raises(OSError, match="No space left"):
        engine.hold("A")
    engine.stop()
    bench.wait_until_gone()


def test_no_judges_key_reaches_a_server():
    assert {*JUDGE_KEYS, *CUE_KEYS, *EVAL_KEYS} == set(engine_module.KEYS)


def test_a_missing_program_is_named(bench):
    engine = Engine("engine", "no-such-server {model} {port}", bench.run, [], bench.port, 0.9)
    with pytest.raises(InputError, match="no-such-server: no such program"):
        engine.hold("A")


def gpus(*free):
    return [Gpu(i + 4, "some GPU", 100, memory) for i, memory in enumerate(free)]


def test_one_server_on_each_gpu_or_one_on_all(bench, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    monkeypatch.setenv("SERVER_API_KEY", "theirs")
    monkeypatch.setattr(engine_module, "visible_gpus", lambda: gpus(90, 90))
    engine = bench.engine(gpus=gpus(90, 90))
    urls = f"http://127.0.0.1:{bench.port}/v1,http://127.0.0.1:{bench.port + 1}/v1"
    assert engine.urls() == urls
    engine.hold("A")
    assert ask_for_a_token(bench.port + 1, "A")[0] == 200
    engine.stop()
    engine = Engine("engine", bench.template("--gpus", "{gpus}"), bench.run, gpus(90, 90),
                    bench.port, 0.9)
    engine.hold("B")
    engine.stop()
    assert sorted(bench.events("GPUs")) == ["GPUs A 4 ", "GPUs A 5 ", "GPUs B 4,5 2"]
    assert set(bench.events("keys")) == {"keys SERVER_API_KEY"}


def test_the_next_server_waits_until_memory_is_free_again(monkeypatch):
    readings = [gpus(10), gpus(60), gpus(88), gpus(90)]
    monkeypatch.setattr(engine_module, "visible_gpus", lambda: readings.pop(0))
    monkeypatch.setattr(engine_module.time, "sleep", lambda seconds: None)
    engine_module._wait_for_memory({"4": 90})
    assert readings == [gpus(90)]


def test_the_judge_gets_the_last_gpus_or_a_part_of_the_only_one(bench, monkeypatch):
    stages = [bench.stage("A", engine=True, judge=True)]
    for count, engine_has, judge_has, memory in (
        (4, [4, 5, 6], [7], (0.9, 0.9)),
        (1, [4], [4], (0.55, 0.35)),
        (0, [], [], (0.9, 0.9)),
    ):
        monkeypatch.setattr("launch.run.visible_gpus", lambda: gpus(*[90] * count))
        servers = bench.servers(stages, "--engine", "vllm", "--judge-engine", "vllm")
        assert [gpu.index for gpu in servers.engine.gpus] == engine_has
        assert [gpu.index for gpu in servers.judge.gpus] == judge_has
        assert (servers.engine.memory, servers.judge.memory) == memory
        assert len(servers.judge.ports) == 1
        shared = "--gpu-memory-utilization" in servers.engine.template
        assert shared == (count == 1)


@pytest.mark.parametrize("engine, judge_flags, words", [
    ("", {}, "needs --engine"),
    ("serve {model}", {}, "write vllm, sglang, or a command with"),
    ("vllm", {"judge": "{judge}"}, "its flags name none"),
    ("vllm", {"judge": "{judge}", "judge_model": "J", "eval_judge": "{judge}",
              "eval_judge_model": "K"}, "its flags name J and K"),
])
def test_what_a_server_needs_is_asked_for_before_the_first_stage(bench, engine, judge_flags, words):
    stage = bench.stage("A", engine=True)
    if judge_flags:
        vars(stage.flags).update(judge_flags)
        stage.command.append("{judge}")
    with pytest.raises(InputError, match=words):
        bench.servers([stage], "--engine", engine)


def test_a_judge_of_the_evaluation_alone():
    flags = argparse.Namespace(judge="rules", judge_model=None, eval_judge="{judge}",
                               eval_judge_model="J")
    assert judge_model(Stage("evaluation", [], "", flags)) == "J"


# ------------------------------------------------------------------------------------ stopping

@pytest.mark.parametrize("separate, number", [
    ("separate", signal.SIGTERM),
    ("separate", signal.SIGKILL),
    ("here", signal.SIGINT),
    ("here", signal.SIGKILL),
])
def test_no_server_outlives_its_run(bench, separate, number):
    runner = bench.start_runner(separate)
    bench.wait_for("ask A")
    runner.send_signal(number)
    err = runner.communicate()[1] if number != signal.SIGKILL else ""
    runner.wait()
    assert "Traceback" not in err
    bench.wait_until_gone()


def test_what_a_killed_run_has_left_is_stopped_by_the_next_one(bench):
    runner = bench.start_runner("here", "wait", "--slow-end", "0.7")
    bench.wait_for("ask A")
    runner.kill()
    runner.communicate()
    state = bench.run / ".engine.json"
    assert state.exists() and is_running(bench.pids()[0])
    again = bench.start_runner("here", "go")
    assert (again.wait(), again.communicate()[1]) == (0, "")
    assert [line.split()[0] for line in bench.events("start", "end")] == [
        "start", "end", "start", "end"]
    assert not state.exists()


def test_a_number_that_another_process_has_by_now_is_left_alone(bench):
    sleeper = subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(100)"])
    bench.run.mkdir()
    state = {"host": socket.gethostname(), "processes": [[sleeper.pid, "1"]], "free": {}}
    write_json(bench.run / ".engine.json", state)
    stop_left_over(bench.run)
    assert sleeper.poll() is None
    sleeper.kill()
    sleeper.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed watcher leaves its server")
def test_a_server_ends_with_its_watcher_too(bench):
    engine = bench.engine()
    engine.hold("A")
    engine.processes[0].kill()
    bench.wait_until_gone()
    engine.stop()


def test_workers_end_with_the_server_and_what_heeds_no_signal_is_killed(bench):
    watch = ("import sys, support.watcher as w\n"
             "w.ASK_GROUP, w.KILL_GROUP = 0.2, 0.6\n"
             "w.main()")
    words = shlex.split(bench.template("--worker", "--slow-end", "30")
                        .format(model="A", port=bench.port))
    watcher = subprocess.Popen([sys.executable, "-c", watch, str(os.getpid()), *words], cwd=ROOT)
    for _ in range(400):
        if ask_for_a_token(bench.port, "A")[0] == 200:
            break
        time.sleep(0.02)
    assert len(bench.pids()) == 2
    watcher.terminate()
    assert watcher.wait() == 128 + signal.SIGKILL
    assert not any(map(is_running, bench.pids()))
