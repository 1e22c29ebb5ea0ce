"""Jobs on other processes: their order, and that none outlives its parent or an error."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studies.workers import Job, receive, run_jobs, send
from support.errors import ServiceError

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import os, time
from tqdm import tqdm
from studies.workers import Job, run_jobs
from support.errors import exit_cleanly

def main():
    # Like every stage, the second has to do with progress bars, whose lock would be left behind.
    jobs = [Job("pid", (), os.getpid, ()), Job("bar", (), tqdm.write, ("text",)),
            Job("sleep", (), time.sleep, (120,))]
    for name, result in run_jobs(jobs, 1):
        print(result, flush=True)

if __name__ == "__main__":
    exit_cleanly(main)
"""


def test_a_job_waits_for_those_that_it_needs_and_else_they_keep_their_order():
    jobs = [Job("late", ("early",), int, ("1",)), Job("first", ("elsewhere",), int, ("2",)),
            Job("early", (), int, ("3",)), Job("last", (), int, ("4",))]
    done = list(run_jobs(jobs, 1))
    assert done == [("first", 2), ("early", 3), ("late", 1), ("last", 4)]


def test_a_circle_is_a_bug_and_not_waited_for():
    with pytest.raises(AssertionError, match="a waits for a job that waits for it"):
        list(run_jobs([Job("a", ("b",), int, ()), Job("b", ("a",), int, ())], 1))


def test_an_error_ends_the_other_jobs():
    jobs = [Job("long", (), time.sleep, (120,)), Job("wrong", (), int, ("x",))]
    started = time.monotonic()
    with pytest.raises(ValueError, match="invalid literal"):
        list(run_jobs(jobs, 2))
    assert time.monotonic() - started < 60
    assert multiprocessing.active_children() == []


def test_a_job_whose_process_dies_is_named():
    with pytest.raises(ServiceError, match="hungry: its process has died"):
        list(run_jobs([Job("hungry", (), os._exit, (9,))], 1))


def test_a_process_that_dies_before_it_reads_its_job_is_named():
    ours, theirs = multiprocessing.Pipe()
    ours.send("a job")
    theirs.close()  # with something unread in it
    with pytest.raises(ServiceError, match="hungry: its process has died"):
        receive(ours, "hungry")
    with pytest.raises(ServiceError, match="hungry: its process has died"):
        send(ours, Job("hungry", (), os._exit, (9,)))


def is_alive(pid):
    """Whether a process runs; a zombie, which nobody has waited for, does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_no_worker_outlives_its_parent(tmp_path, how):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    parent = subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and what they start does too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        # Unbuffered, because a worker that sleeps does not flush what it has printed.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"})
    worker = int(parent.stdout.readline())
    assert worker != parent.pid and is_alive(worker)
    assert {parent.stdout.readline(), parent.stdout.readline()} == {"text\n", "None\n"}
    if how == "killed":
        parent.kill()
    else:
        os.killpg(parent.pid, signal.SIGINT)  # as the terminal does: to parent and workers
    _, errors = parent.communicate(timeout=60)  # until both have let go of the pipes
    deadline = time.monotonic() + 30
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)
    if how == "killed":
        assert errors == ""
    else:
        assert parent.returncode == 130
        assert errors.splitlines() == [
            "interrupted. What is finished is kept; run the same command again to continue."]
