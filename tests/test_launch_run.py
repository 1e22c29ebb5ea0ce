"""The stages of run.sh in one process and in separate ones."""
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.lock import lock, unlock

ROOT = Path(__file__).resolve().parents[1]


RUNNER = """
import argparse, sys
from launch.run import Servers, build_parser, run_stages
from launch.stages import Stage
from support.errors import exit_cleanly
def main():
    separate, script, *words = sys.argv[1:]
    stages = []
    for word in words:
        stages.append(Stage(word, [sys.executable, script, word], "", argparse.Namespace()))
    options = build_parser().parse_args(["a stage"])
    run_stages(stages, Servers(stages, options), separate == "True")
exit_cleanly(main)
"""


@pytest.mark.parametrize("separate", [False, True])
def test_stages_run_in_order_and_stop_at_the_first_that_fails(tmp_path, separate):
    script = tmp_path / "say it.py"
    script.write_text("import sys\n"
                      "print(sys.argv[1:], __name__, flush=True)\n"
                      "sys.exit(2 if sys.argv[1] == 'fail' else 0)\n")
    done = subprocess.run([sys.executable, "-c", RUNNER, str(separate), script, "a b", "fail", "c"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "--- a b (0s)\n['a b'] __main__\n--- fail (0s)\n['fail'] __main__\n"


def test_accept_code_change_goes_to_every_stage_but_the_report():
    environment = {**os.environ, "PYTHON": sys.executable, "ACCEPT_CODE_CHANGE": "1"}
    listed = subprocess.run(["bash", "run.sh", "stages"], cwd=ROOT, env=environment, capture_output=True, text=True)
    commands = listed.stdout.splitlines()[1::2]
    assert ["--accept-code-change" in command for command in commands] == [True] * 12 + [False]


def started(argv, marker, cwd=ROOT):
    """A process that runs until it is killed, once the file `marker` shows that it is on its way."""
    process = subprocess.Popen(argv, cwd=cwd, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if marker.exists() and marker.read_text():
            return process
        assert process.poll() is None
        time.sleep(0.05)
    raise AssertionError("it did not start")


def test_a_second_run_in_the_same_folder_ends_at_once_and_names_the_owner(tmp_path):
    run = tmp_path / "run"
    environment = {**os.environ, "PYTHON": sys.executable, "RUN": str(run), "LIMIT": "1"}

    def runner(instead_of_checks):
        code = f"import time\nfrom launch import run\nrun.check = lambda *_: {instead_of_checks}\nrun.main()"
        return [sys.executable, "-c", code, "--run", run, "a stage"]

    first = started(runner("time.sleep(600)"), run / ".lock")
    begin = time.monotonic()
    second = subprocess.run(["bash", "run.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert time.monotonic() - begin < 5
    first.kill()
    first.wait()
    owner = f"process {first.pid} on {socket.gethostname()}"
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr == f"error: {run} is in use by {owner}. Wait until that ends, or use another RUN=...\n"
    # The kernel has released the lock of the killed process, although its file is still there.
    assert (run / ".lock").exists()
    done = subprocess.run(runner("[]"), cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("finished in 0 s\n", "") and not (run / ".lock").exists()


@pytest.mark.parametrize("flags", [["--with-parent"], []])
def test_a_runner_ends_with_the_process_that_started_it_where_that_is_asked_for(tmp_path, flags):
    code = "import time\nfrom launch import run\nrun.check = lambda *_: time.sleep(600)\nrun.main()"
    runner = [sys.executable, "-c", code, *flags, "--run", str(tmp_path), "a stage"]
    parent = started(["bash", "-c", f"{shlex.join(runner)} & wait"], tmp_path / ".lock")
    pid = int((tmp_path / ".lock").read_text().split()[1])
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (20 if flags else 3)
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert is_running(pid) == (not flags)
    if not flags:  # as with nohup
        os.kill(pid, signal.SIGKILL)


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


def test_two_processes_cannot_make_one_output(tmp_path):
    out = tmp_path / "out.jsonl"
    slow = ("import sys, time\n"
            "from support.errors import exit_cleanly\n"
            "from support.stages import run_stage\n"
            "def work():\n"
            "    time.sleep(float(sys.argv[1]))\n"
            f"    open({str(out)!r}, 'w').close()\n"
            "    return {}, {}\n"
            f"exit_cleanly(lambda: run_stage('data.py', {str(out)!r}, {{}}, [], work))\n")
    first = started([sys.executable, "-c", slow, "600"], tmp_path / ".out.lock")
    second = subprocess.run([sys.executable, "-c", slow, "0"], cwd=ROOT, capture_output=True, text=True)
    first.kill()
    first.wait()
    assert second.returncode == 2 and f"{out} is in use by process {first.pid} on" in second.stderr
    assert second.stderr.count("\n") == 1 and not out.exists()
    assert subprocess.run([sys.executable, "-c", slow, "0"], cwd=ROOT).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.config.json", "out.funnel.json", "out.jsonl"]


def test_a_lock_is_taken_again_by_its_owner_and_left_alone_by_its_children(tmp_path):
    path = tmp_path / ".lock"
    lock(path, "it", "")
    lock(path, "it", "")
    if os.fork() == 0:
        unlock(path)  # not the child's
        os._exit(0)
    os.wait()
    other = subprocess.run([sys.executable, "-c", f"from support.lock import lock; lock({str(path)!r}, 'it', '')"],
                           cwd=ROOT, capture_output=True, text=True)
    assert "it is in use by process" in other.stderr
    unlock(path)
    assert not path.exists()


def test_run_sh_lists_its_stages_and_explains_every_variable_it_reads():
    text = (ROOT / "run.sh").read_text()
    listed = subprocess.run(["bash", "run.sh", "stages"], cwd=ROOT, capture_output=True, text=True,
                            env={"PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin"})
    lines = listed.stdout.splitlines()
    assert listed.returncode == 0 and len(lines) == 26
    assert [line.split()[1] for line in lines[1::2]] == [
        "intervene.py", "intervene.py", "intervene.py", "intervene.py", "intervene.py", "evaluate.py", "ipo.py",
        "intervene.py", "intervene.py", "evaluate.py", "ipo.py", "evaluate.py", "evaluate.py"]
    usage = text[text.index("HELP'\n"):text.index("\nHELP\n")]
    read = set(re.findall(r"\$\{([A-Z][A-Z0-9_]+):?[-+]", text))
    internal = {"OMP_WAIT_POLICY", "OMP_NUM_THREADS"}
    explained = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", usage))
    assert read - internal <= explained, read - internal - explained
    assert subprocess.run(["bash", "run.sh", "nosuch"], cwd=ROOT, capture_output=True).returncode == 2


def test_torchrun_takes_none_of_our_flags_for_its_own():
    from torch.distributed.run import get_args_parser
    environment = {"PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin", "NPROC": "2", "SETS": "jbb"}
    listed = subprocess.run(["bash", "run.sh", "stages"], cwd=ROOT, capture_output=True, text=True, env=environment)
    commands = [shlex.split(line) for line in listed.stdout.splitlines()[1::2]]
    started = [words[3:] for words in commands if "torch.distributed.run" in words]
    assert len(started) == 10  # eight that sample and two that train
    figures = "--standalone --nproc-per-node 2 -m studies.figures --run-folder x --model m".split()
    for words in (*started, figures):
        taken = get_args_parser().parse_args(words)  # exits where one is ambiguous
        own = words[words.index(taken.training_script) + 1:]
        assert taken.training_script_args == own
