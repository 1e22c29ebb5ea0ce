"""Run the stages of run.sh in order, each as its own command line would.

    python -m support.run_stages [--separate] "TITLE: python3 FILE.py ..." ...

Stages of the tiny model run in this one process, because starting Python and importing torch
for each would take longer than most of them. With --separate each is a process of its own, so that
a large model gives all its memory back.
"""
import argparse
import runpy
import shlex
import subprocess
import sys
import time


def run_here(command):
    """Run `python FILE.py ...` or `python -m MODULE ...` as if this process had been started so."""
    program, *arguments = command[1:]
    if program == "-m":
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")


def main(argv=None):
    """Run the stages that the command line lists; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="+", help="TITLE: COMMAND, quoted as for a shell")
    parser.add_argument("--separate", action="store_true", help="a process for each stage")
    args = parser.parse_args(argv)
    started = time.monotonic()
    for stage in args.stages:
        title, _, line = stage.partition(": ")
        print(f"--- {title} ({time.monotonic() - started:.0f}s)", flush=True)
        command = shlex.split(line)
        if not args.separate:
            run_here(command)
            continue
        status = subprocess.run(command).returncode
        if status:
            sys.exit(status)
    print(f"finished in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
