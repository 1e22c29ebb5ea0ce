"""The stages of a run as run.sh lists them: command lines, read by each program's own parser."""
import argparse
import contextlib
import io
import os
import shlex
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from evaluate import KINDS
from support.errors import InputError
from support.plugins import load_module
from support.stages import check_output, sidecar

# What starts other processes of a stage, before the stage's own program.
TORCHRUN = "torch.distributed.run"
BENCHMARKS = "benchmarks.run"  # evaluates on published sets too
EVALUATION = ("evaluate.py run", BENCHMARKS)  # the programs that evaluate

# In a stage's command: the addresses of servers that the runner starts.
ENGINE = "{engine}"
JUDGE = "{judge}"
JUDGES = ("judge", "eval_judge", "cue_judge")  # flags that may say {judge}
BY_RULES = ("rules", "python:")  # how a judge begins that is code of ours: it needs no server
# The judge's port after the engine's, however many GPUs that has: a judge's replies are kept under
# its address.
JUDGE_PORT = 100
# Parts of a GPU's memory: of an engine or judge with GPUs of its own, and of two on the same.
ALONE = 0.9
ENGINE_BESIDE_JUDGE = 0.55
JUDGE_BESIDE_ENGINE = 0.35


class Stage(NamedTuple):
    """One stage: its command line as words, and the flags that its own parser makes of them."""
    title: str
    command: list             # ["python3", "intervene.py", "rollouts", "--model", ...]
    program: str              # "intervene.py rollouts", "benchmarks.run", ...
    flags: argparse.Namespace
    # The program itself. What `launch` needs of benchmarks.run it asks here, where a run has that
    # stage: nothing imports it, because a fork may delete its folder.
    module: ModuleType = None

    @property
    def kinds(self):
        """The kinds of set that an evaluation knows: {name: evaluate.Kind}."""
        if self.program == BENCHMARKS:
            return self.module.BENCHMARK_KINDS
        return KINDS

    @property
    def out(self):
        """Path of what it writes; None for a stage that writes nothing of its own."""
        out = getattr(self.flags, "out", None)
        return Path(out) if out else None

    @property
    def samples(self):
        """Whether a model is sampled here."""
        return hasattr(self.flags, "temperature")

    @property
    def trains(self):
        """Whether a model is trained here."""
        return hasattr(self.flags, "lr")

    @property
    def judges(self):
        """Whether a judge is asked here."""
        return hasattr(self.flags, "judge")


def read_stages(lines):
    """The stages of lines "TITLE: COMMAND", quoted as for a shell.

    Raises InputError with every command's complaint about its flags, one a line.
    """
    stages = []
    problems = {}  # used as an ordered set: three evaluations complain of the same
    for line in lines:
        title, _, quoted = line.partition(": ")
        command = shlex.split(quoted)
        try:
            stages.append(_read_stage(title, command))
        except InputError as error:
            problems[str(error)] = None
    if problems:
        raise InputError("\n".join(problems))
    return stages


def _read_stage(title, command):
    name, words = own_program(command)
    module = load_module(name, title)
    parser = module.build_parser()
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            flags = parser.parse_args(words)
    except SystemExit:
        said = complaint.getvalue().strip().splitlines()
        raise InputError(f"{title}: {said[-1] if said else 'its flags cannot be read'}") from None
    program = Path(module.__file__).name
    if "." in name:
        program = name
    subcommand = getattr(flags, "command", None)
    if subcommand:
        program += f" {subcommand}"
    return Stage(title, command, program, flags, module)


def is_finished(stage):
    """Whether a stage has nothing left to do. Raises InputError for a damaged output."""
    out = stage.out
    if out is None or not out.exists() or not sidecar(out, "funnel").exists():
        return False
    return not check_output(out)


def processes_of(command, gpus=1):
    """(machines, processes on each) that a stage's command starts; gpus: those of a machine.

    Raises InputError for a word that is no number.

    >>> processes_of(["python3", "ipo.py", "train"])
    (1, 1)
    >>> processes_of(["srun", "torchrun", "--nnodes", "2", "--nproc-per-node=8", "ipo.py"])
    (2, 8)
    """
    machines = _number_after(command, "--nnodes", 1)
    return machines, _number_after(command, "--nproc-per-node", gpus)


def _number_after(command, flag, most):
    for number, word in enumerate(command):
        name, _, value = word.replace("_", "-", 2).partition("=")
        if name != flag:
            continue
        value = os.path.expandvars(value or command[number + 1])
        if value in ("auto", "gpu", "cpu"):
            return max(1, most)
        if not value.isdigit() or int(value) == 0:
            raise InputError(f"{flag} {value}: a number from 1 on is needed there.")
        return int(value)
    return 1


def own_program(command):
    """(module, its words) of a stage's command, whatever starts it.

    >>> own_program(["python3", "intervene.py", "steps", "--out", "x"])
    ('intervene', ['steps', '--out', 'x'])
    >>> own_program(["python3", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
    ...              "8", "ipo.py", "train"])
    ('ipo', ['train'])
    >>> own_program(["srun", "torchrun", "--nnodes", "2", "-m", "benchmarks.run", "--sets", "jbb"])
    ('benchmarks.run', ['--sets', 'jbb'])
    """
    for i, word in enumerate(command):
        if word.endswith(".py") and "/" not in word:
            return word.removesuffix(".py"), command[i + 1:]
        if word == "-m" and command[i + 1] != TORCHRUN:
            return command[i + 1], command[i + 2:]
    raise InputError(f"{shlex.join(command)}: no program of this project in it.")
