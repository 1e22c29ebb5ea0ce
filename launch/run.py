"""Run the stages of run.sh in order, each as its own command line would.

    python -m launch.run [--run RUN] [--separate] "TITLE: python3 FILE.py ..." ...

Everything that could stop a stage is checked before the first one starts. Stages of the tiny model
run in this one process, because starting Python and importing torch for each would take longer than
most of them. With --separate each is a process of its own, so that a large model gives all its
memory back. Meanwhile no other such command can start in the same RUN.

Where a stage's command says {engine} or {judge}, a server is started that holds the stage's model
or judge. It is kept for the stages that follow, and stopped before any that needs another model or
trains one.
"""
import argparse
import functools
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

from launch.stages import (
    ALONE,
    ENGINE,
    ENGINE_BESIDE_JUDGE,
    JUDGE,
    JUDGE_BESIDE_ENGINE,
    JUDGE_PORT,
    JUDGES,
    is_finished,
    read_stages,
)
from support.engine import (
    Engine,
    command_template,
    reach_directly,
    split_gpus,
    stop_left_over,
)
from support.errors import InputError, exit_cleanly
from support.gpus import visible_gpus
from support.lock import lock

# What a process of a stage's own does: unlike the stage's file, torchrun does not end in one line.
APART = "import sys; from launch import run; run.run_cleanly(sys.argv)"

NOTICED = 0.5  # seconds, in which a server's end is noticed


# -------------------------------------------------------------------------------- one stage

def run_cleanly(command):
    """Run a command in this process, as `run_here` does; Ctrl-C ends it in one line."""
    _end_with(os.getppid())
    exit_cleanly(functools.partial(run_here, command))


def _end_with(parent):
    """End this process by SIGTERM once its parent is gone, so that no stage outlives its run."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=watch, daemon=True).start()


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
        # Its flags have been read before, so it has been imported.
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")


def run_apart(command):
    """Run the same in a process of its own. Returns its exit status, 130 after Ctrl-C."""
    process = subprocess.Popen([command[0], "-c", APART, *command[1:]])

    def pass_on(number, _):
        process.send_signal(number)

    # Ctrl-C reaches the stage too, which says so and ends; this process waits until it has.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    on_terminate = signal.signal(signal.SIGTERM, pass_on)
    status = process.wait()
    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGTERM, on_terminate)
    return status if status >= 0 else 128 - status


# ------------------------------------------------------------------------------ its servers

class Servers:
    """The engine and the judge's server, as the stages need them.

    Raises InputError where a stage needs one of which the options or its own flags say too little.
    """

    def __init__(self, stages, options):
        self.engine = None
        self.judge = None
        needs_engine = any(ENGINE in stage.command for stage in stages)
        needs_judge = any(JUDGE in stage.command for stage in stages)
        if not (needs_engine or needs_judge):
            return
        self._check(stages, options, needs_engine, needs_judge)
        for_judge = options.judge_gpus if needs_judge else 0
        gpus, judge_gpus, shared = split_gpus(visible_gpus(), for_judge)
        if not needs_engine:
            shared = bool(gpus)  # with the stages, which sample themselves
        add = functools.partial(Engine, run=options.run, wait=options.engine_wait)
        if needs_engine:
            self.engine = add(
                name="engine",
                template=command_template(options.engine, shared=shared),
                gpus=gpus,
                port=options.port,
                memory=ENGINE_BESIDE_JUDGE if shared else ALONE,
            )
        if needs_judge:
            self.judge = add(
                name="judge",
                template=command_template(options.judge_engine, judge=True, shared=shared),
                gpus=judge_gpus,
                port=options.port + JUDGE_PORT,
                memory=JUDGE_BESIDE_ENGINE if shared else ALONE,
                single=True,
            )
        reach_directly()

    def _check(self, stages, options, needs_engine, needs_judge):
        if not options.run:
            raise InputError("a stage needs a server, whose log goes into the run: give --run.")
        if needs_engine and not options.engine:
            raise InputError(f"--server {ENGINE} needs --engine (run.sh: ENGINE=vllm).")
        if needs_judge and not options.judge_engine:
            raise InputError(f"--judge {JUDGE} needs --judge-engine (run.sh: JUDGE_ENGINE=vllm).")
        for stage in stages:
            if JUDGE in stage.command:
                judge_model(stage)

    def all(self):
        """Those that some stage needs, whether they run now or not."""
        return [server for server in (self.engine, self.judge) if server]

    def prepare(self, stage):
        """Start and stop what a stage needs; returns its command with the servers' addresses."""
        needed = needs_server(stage)
        if needed and stage.trains:
            self.stop()
        command = stage.command
        if ENGINE in command:
            if needed:
                self.engine.hold(stage.flags.model)
            command = _replaced(command, ENGINE, self.engine.urls())
        if JUDGE in command:
            if needed:
                self.judge.hold(judge_model(stage))
            command = _replaced(command, JUDGE, self.judge.urls())
        return command

    def stop(self):
        """Stop all."""
        for server in self.all():
            server.stop()

    def died(self):
        """What there is to say of those that have ended by themselves, also a moment ago."""
        if self.all():
            time.sleep(NOTICED)
        return list(filter(None, [server.died() for server in self.all()]))


def _replaced(command, placeholder, value):
    return [word.replace(placeholder, value) for word in command]


def judge_model(stage):
    """The model of a stage's served judge; raises InputError unless the flags name just one."""
    models = set()
    for name in JUDGES:
        model = getattr(stage.flags, f"{name}_model", None)
        if getattr(stage.flags, name, None) == JUDGE and model:
            models.add(model)
    if len(models) != 1:
        named = " and ".join(sorted(models)) or "none"
        raise InputError(
            f"{stage.title}: a judge that is served here needs one model, its flags name {named}."
        )
    return models.pop()


def needs_server(stage):
    """Whether a stage has work left for a server to do."""
    try:
        return not is_finished(stage)
    except InputError:
        return False  # the stage says what is wrong


# --------------------------------------------------------------------------------- all stages

def run_stages(stages, servers, separate):
    """Run stages in order with the servers they need; exits at the first that fails."""
    started = time.monotonic()
    try:
        for stage in stages:
            print(f"--- {stage.title} ({time.monotonic() - started:.0f}s)", flush=True)
            command = servers.prepare(stage)
            try:
                _run_stage(command, separate)
            except SystemExit as end:
                if end.code:
                    for message in servers.died():
                        print(f"error: {message}", file=sys.stderr)
                    raise
    finally:
        servers.stop()
    print(f"finished in {time.monotonic() - started:.0f} s")


def _run_stage(command, separate):
    if not separate:
        run_here(command)
        return
    status = run_apart(command)
    if status:
        sys.exit(status)


# -------------------------------------------------------------------------------- command line

def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stages", nargs="+", help="TITLE: COMMAND, quoted as for a shell")
    add("--run", help="the run folder, of which this command is then the one owner")
    add("--separate", action="store_true", help="a process for each stage")
    add("--with-parent", action="store_true", help="end when the process that started this one does")
    add("--engine", metavar="TEMPLATE",
        help="server for {engine} in a stage: vllm, sglang or a command with {model} and {port}; "
             "with {gpus} one server on all GPUs, else one on each, at successive ports; {memory} "
             "is the part of a GPU's memory that it may take")
    add("--judge-engine", metavar="TEMPLATE", help="the same for {judge}; one server in any case")
    add("--judge-gpus", type=int, default=1,
        help="GPUs of the judge, the last ones; where there are no more, both share them")
    add("--port", type=int, default=8700,
        help=f"first port of the engine's servers; the judge's is {JUDGE_PORT} higher")
    add("--engine-wait", type=float, default=1800, metavar="SECONDS",
        help="how long a server may take to start")
    add("--gpu", metavar="NAME", help="plan for this kind of GPU instead, as in H100")
    add("--gpus", type=int, metavar="N", help="plan for so many GPUs of a machine")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="check everything, run nothing")
    instead.add_argument("--plan", action="store_true", help="print hours, memory and cost")
    instead.add_argument("--measure", action="store_true", help="measure this machine's speed")
    return parser


def check(lines, options):
    """The stages of the command line; exits with 2 after a line for each problem of any."""
    from launch.preflight import check_lines

    started = time.monotonic()
    stages, problems = check_lines(lines, options)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)
    print(f"checked everything in {time.monotonic() - started:.0f} s", flush=True)
    return stages


def main(argv=None):
    """Run the stages that the command line lists; stop at the first that fails."""
    options = build_parser().parse_args(argv)
    if options.with_parent:
        _end_with(os.getppid())
    if options.plan:
        from launch.plan import print_plan
        print_plan(read_stages(options.stages), options)
        return
    if options.measure:
        from launch.measure import measure
        measure(read_stages(options.stages), options)
        return
    if options.check:
        Servers(check(options.stages, options), options)
        return
    if options.run:
        lock(Path(options.run) / ".lock", options.run,
             "Wait until that ends, or use another RUN=...")
        stop_left_over(options.run)
    stages = check(options.stages, options)
    run_stages(stages, Servers(stages, options), options.separate)


if __name__ == "__main__":
    exit_cleanly(main)
