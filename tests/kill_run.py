"""Kill a small job at random moments, start it again, and compare what it ends with.

    python tests/kill_run.py [--kills 30] [--interrupts 10] [--at-once 2] [--seed 0]

By hand, not in the suite: it takes a quarter of an hour on two cores. The job is `bash run.sh` on
the embedded model, with few prompts and a checkpoint at every step. It runs once undisturbed.
Then it gets `kill -9`, or Ctrl-C, for its whole process group, at moments that are spread over its
length and random within each part, and is started again until it ends. Every time it must end with
the same bytes: traces, verdicts, pairs, weights, metrics without `tokens_per_s`, the report. No log
may hold a traceback, and after Ctrl-C the exit status must be 130, with one line that says so. The
script exits with 1 where that does not hold, and keeps the folders of the trials that failed.
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = {"direct": "harmful", "jailbreak": "harmful", "remedies": "benign", "sums": "task"}
TEMPORARY = ("checkpoint", ".")  # a kill may leave some; what they hold is made again


class Job:
    """One run of the small job, in a folder of its own."""

    def __init__(self, folder, inputs):
        self.folder = Path(folder)
        self.run = self.folder / "run"
        self.inputs = inputs
        self.starts = 0

    def start(self):
        """Start the job, or what is left of it, as the leader of a process group."""
        self.starts += 1
        self.folder.mkdir(exist_ok=True)
        sets = []
        for name, kind in SETS.items():
            sets.append(f"{name}={kind}:{self.inputs / f'eval_{name}.jsonl'}")
        settings = {
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "LIMIT": "14",
            "SAMPLES": "3",
            "BENIGN": str(self.inputs / "train_benign.jsonl"),
            "EVAL": " ".join(sets),
            "TRAIN_ARGS": "--batch-size 8 --save-every 1",
            "RUN": str(self.run),
        }
        with open(self.log(), "w") as log:
            return subprocess.Popen(
                ["bash", "run.sh"],
                cwd=ROOT,
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_interrupts,
            )

    def log(self):
        """The log of the latest start."""
        return self.folder / f"log{self.starts}.txt"

    def finish(self):
        """Start the job and wait for its end; returns what is wrong."""
        status = self.start().wait()
        if status or "Traceback" in self.log().read_text():
            return [f"exit status {status}, see {self.log()}"]
        return []

    def disturb(self, number, after):
        """Start the job and send it a signal after so many seconds.

        Returns (whether it was still running, what is wrong).
        """
        process = self.start()
        try:
            process.wait(after)
            return False, []
        except subprocess.TimeoutExpired:
            pass
        os.killpg(process.pid, number)
        status = process.wait()
        text = self.log().read_text()
        wrong = []
        if "Traceback" in text:
            wrong.append(f"a traceback in {self.log()}")
        if number == signal.SIGINT:
            # bash itself, before it has become Python, dies by the signal: 130 for a shell.
            if status not in (130, -signal.SIGINT):
                wrong.append(f"exit status {status} after Ctrl-C, see {self.log()}")
            if status == 130 and text.count("interrupted.") != 1:
                wrong.append(f"not one line that says so in {self.log()}")
        return True, wrong

    def hashes(self):
        """{file: hash of its contents}, without what differs from run to run."""
        found = {}
        for path in sorted(self.run.rglob("*")):
            name = path.relative_to(self.run)
            temporary = any(part.startswith(TEMPORARY) for part in name.parts)
            if path.is_file() and not temporary:
                found[str(name)] = hashlib.sha256(self.content(path)).hexdigest()
        return found

    def content(self, path):
        """The bytes of a file, but for speeds and for the folder's name."""
        content = path.read_bytes().replace(bytes(self.folder), b"FOLDER")
        if path.name != "metrics.jsonl":
            return content
        lines = []
        for line in content.splitlines():
            metrics = json.loads(line)
            del metrics["tokens_per_s"]
            lines.append(json.dumps(metrics))
        return "\n".join(lines).encode()


def heed_interrupts():
    """Undo what a shell does to commands in its background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def make_inputs(folder):
    """Small files of prompts: the first of those of the toy world."""
    folder.mkdir()
    for name in ("train_benign", *(f"eval_{name}" for name in SETS)):
        lines = (ROOT / "toy" / "prompts" / f"{name}.jsonl").read_text().splitlines(True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:12]))
    return folder


def compare(found, expected):
    """Phrases that name the files which two runs do not share."""
    wrong = []
    for name in sorted({*found, *expected}):
        if name not in found:
            wrong.append(f"{name} is missing")
        elif name not in expected:
            wrong.append(f"{name} is new")
        elif found[name] != expected[name]:
            wrong.append(f"{name} differs")
    return wrong


def trial(job, number, after, expected):
    """Disturb a job once, run it to its end, and compare; returns what is wrong."""
    running, wrong = job.disturb(number, after)
    while not running:  # it has finished first: the machine is less busy than it was
        shutil.rmtree(job.folder)
        after /= 2
        running, wrong = job.disturb(number, after)
    moment = f"{signal.Signals(number).name} after {after:4.1f} s"
    lines = job.log().read_text().splitlines()
    stage = [line for line in lines if line.startswith("--- ")][-1:]
    wrong += job.finish()
    wrong += compare(job.hashes(), expected)
    result = "; ".join(wrong) or f"{len(expected)} files the same"
    print(f"{job.folder.name}: {moment}, {''.join(stage) or 'before the first stage'}: {result}",
          flush=True)
    if not wrong:
        shutil.rmtree(job.folder)
    return wrong


def main():
    """Run all trials; exit with 1 if one of them went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="trials with kill -9")
    parser.add_argument("--interrupts", type=int, default=10, help="trials with Ctrl-C")
    parser.add_argument("--at-once", type=int, default=2, help="jobs side by side")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_run."))
    inputs = make_inputs(folder / "inputs")
    undisturbed = Job(folder / "undisturbed", inputs)
    started = time.monotonic()
    wrong = undisturbed.finish()
    if wrong:
        sys.exit(f"the undisturbed job: {wrong}")
    length = time.monotonic() - started
    expected = undisturbed.hashes()
    print(f"undisturbed: {length:.1f} s, {len(expected)} files, in {folder}", flush=True)

    draw = random.Random(args.seed)
    plan = []
    for number, count in ((signal.SIGKILL, args.kills), (signal.SIGINT, args.interrupts)):
        for part in range(count):
            plan.append((number, length * (part + draw.random()) / count))
    with ThreadPoolExecutor(args.at_once) as pool:
        trials = []
        for index, (number, after) in enumerate(plan):
            job = Job(folder / f"trial{index:02}", inputs)
            trials.append(pool.submit(trial, job, number, after, expected))
        results = [future.result() for future in trials]
    failed = sum(map(bool, results))
    print(f"{len(results) - failed} of {len(results)} trials ended with the same bytes, "
          "without a traceback")
    if failed:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
