"""Run the stages of run.sh in order, each as its own command line would.

    python -m launch.run [--run RUN] [--separate] "TITLE: python3 FILE.py ..." ...

Stages of the tiny model run in this one process, because starting Python and importing torch
for each would take longer than most of them. With --separate each is a process of its own, so that
a large model gives all its memory back. Meanwhile no other such command can start in the same RUN.
"""
import argparse
import functools
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.errors import exit_cleanly
from support.lock import lock

# What a process of a stage's own does: unlike the stage's file, torchrun does not end in one line.
APART = "import sys; from launch import run; run.run_cleanly(sys.argv)"


def run_cleanly(command):
    """Run a command in this process, as `run_here` does; Ctrl-C ends it in one line."""
    exit_cleanly(functools.partial(run_here, command))


def run_here(command):
    """Run `python FILE.py ...` or `python -m MODULE ...` as if this process had been started so."""
    try:
        _run(command)
    except Exception as error:
        # What torchrun raises when it gets a signal.
        if getattr(error, "sigval", None) == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise


def _run(command):
    program, *arguments = command[1:]
    if program == "-m":
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")


def run_apart(command):
    """Run the same in a process of its own. Returns its exit status, 130 after Ctrl-C."""
    process = subprocess.Popen([command[0], "-c", APART, *command[1:]])
    # Ctrl-C reaches the stage too, which says so and ends; this process waits until it has.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = process.wait()
    signal.signal(signal.SIGINT, handler)
    return status


def main(argv=None):
    """Run the stages that the command line lists; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="+", help="TITLE: COMMAND, quoted as for a shell")
    parser.add_argument("--run", help="the run folder, of which this command is then the one owner")
    parser.add_argument("--separate", action="store_true", help="a process for each stage")
    args = parser.parse_args(argv)
    if args.run:
        lock(Path(args.run) / ".lock", args.run, "Wait until that ends, or use another RUN=...")
    started = time.monotonic()
    for stage in args.stages:
        title, _, line = stage.partition(": ")
        print(f"--- {title} ({time.monotonic() - started:.0f}s)", flush=True)
        command = shlex.split(line)
        if not args.separate:
            run_here(command)
            continue
        status = run_apart(command)
        if status:
            sys.exit(status)
    print(f"finished in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    exit_cleanly(main)
