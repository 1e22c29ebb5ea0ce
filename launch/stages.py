"""The stages of a run as run.sh lists them: one command line each, taken apart by its own parser."""
import argparse
import contextlib
import importlib
import io
import shlex
from pathlib import Path
from typing import NamedTuple

from support.errors import InputError

# What starts other processes of a stage, before the stage's own program.
TORCHRUN = "torch.distributed.run"


class Stage(NamedTuple):
    """One stage: its command line as words, and the flags that its own parser makes of them."""
    title: str
    command: list             # ["python3", "intervene.py", "rollouts", "--model", ...]
    program: str              # "intervene.py rollouts", "benchmarks.run", ...
    flags: argparse.Namespace

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
    module = importlib.import_module(name)
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
    return Stage(title, command, program, flags)


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
