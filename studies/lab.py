"""What a method of the leaderboard is given: one seed, one learning rate, and the stages to call.

A method is a function in a file of `studies/methods/` that returns the model it has made:

    @method("IPO, stage 1")
    def ipo(lab):
        return lab.train(lab.pairs())

Every call of the lab is a command that anyone could run. It is skipped where its output is there,
and what it costs (generations, judge calls, time) counts for each method that asks for it. Files
that do not depend on the learning rate belong to the seed, and are made once for all methods.
"""
import contextlib
import fcntl
import functools
import importlib
import importlib.util
import os
import pkgutil
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from intervene import judged_traces
from model import load_tokenizer
from studies import methods as methods_folder
from support.code_hash import code_hashes
from support.errors import InputError, ServiceError
from support.files import digest, json_line, read_json, read_jsonl, write_json, write_jsonl
from support.lock import flock
from support.stages import sidecar

COUNTS = ("generations", "judge_calls")
TIMES = ("seconds", "cpu_seconds")
# Programs that start on all GPUs; all others sample from a server, or in one process.
ON_ALL_GPUS = ("intervene", "ipo", "evaluate", "studies.sft")


# ------------------------------------------------------------------------------------ the methods

class Method(NamedTuple):
    """A row of the leaderboard."""
    name: str           # on the command line
    title: str
    make: Callable      # lab -> folder of the model
    paper: str          # where it comes from
    claims: str         # what that reports, in a sentence
    trains: bool        # whether it has a learning rate
    needs_benign: bool  # whether it needs benign prompts,
    needs_teacher: bool  # or a teacher's traces
    file: Path          # where it is written
    code: dict          # hashes of that file and of what it imports, when it was imported


METHODS = {}  # name: Method, see `load_methods`


def method(title, paper="", claims="", trains=True, needs_benign=False, needs_teacher=False):
    """Decorator: make a function a method of the leaderboard, under its name with - for _.

    Raises InputError where another function has that name.
    """
    def register(function):
        name = function.__name__.replace("_", "-")
        if name in METHODS or name == "base":
            raise InputError(f"{function.__module__}: there is another method {name}; rename it.")
        module = sys.modules[function.__module__]
        METHODS[name] = Method(
            name, title, function, paper, claims, trains, needs_benign, needs_teacher,
            file=Path(module.__file__),
            code=imported_code(module),
        )
        return function

    return register


def code_of(method, programs):
    """The hash of a method's file and of the programs that it runs, with all that these import.

    It is that of the code which this process runs, whatever has been edited since. A program that
    is gone has none.
    """
    hashes = dict(method.code)
    for program in programs:
        if find_program(program):
            hashes |= imported_code(importlib.import_module(program))
    return digest(json_line(dict(sorted(hashes.items()))))


def find_program(program):
    """Whether there is such a module, as "studies.sft"."""
    try:
        return importlib.util.find_spec(program) is not None
    except ModuleNotFoundError:  # not even its folder
        return False


@functools.cache
def imported_code(module):
    """{file: hash} of a module and of all that it imports; call it when that is imported."""
    return code_hashes(module.__file__)


def load_methods():
    """Import all files of `studies/methods/`; returns {name: Method}, in the order of the files.

    Raises InputError for a file that cannot be imported.
    """
    for module in pkgutil.iter_modules(methods_folder.__path__):
        try:
            importlib.import_module(f"studies.methods.{module.name}")
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"studies/methods/{module.name}.py cannot be imported: {error}. Mend it, or move "
                "it out of that folder."
            ) from None
    return METHODS


# ----------------------------------------------------------------------------------- the settings

class Settings(NamedTuple):
    """What all methods have in common; the lists are words of command lines."""
    model: str
    out: Path            # folder of everything
    prompts: str
    benign: str          # "" where the domain has no second stage
    limit: int
    samples: int         # rollouts of a harmful prompt
    triggers: str
    instruction: str     # file with a sentence that asks to think of safety first
    teacher: str         # file with somebody else's traces
    sampling: list       # to every command that samples
    served: list         # to those that may sample from a server: `--server URL`, or none
    judging: list        # to those that build the data, for their judge
    train_args: list     # to every training
    grpo_epochs: int
    stage_flags: tuple = ()  # to all commands
    launch: tuple = ()   # what starts a training, or a sampling without a server, on all GPUs
    runner: tuple = ()   # flags of `launch.run`, which then starts each command


class Command(NamedTuple):
    """A command line: `python -m PROGRAM WORDS`."""
    program: str
    words: list

    @property
    def out(self):
        """The path that it makes."""
        return Path(self.words[self.words.index("--out") + 1])


class Lab:
    """One method at one learning rate with one seed. Paths are those of `Settings`."""

    def __init__(self, settings, name, lr, seed, costs=None):
        self.settings = settings
        self.name = name
        self.lr = lr      # as it is written in the flag; "-" where nothing is trained
        self.seed = seed
        self.costs = {} if costs is None else costs  # output of a command: its program and cost
        self.shared = settings.out / f"seed{seed}"
        self.out = self.shared / (name if lr == "-" else f"{name}-{lr}")
        self.model = settings.model
        self.prompts = settings.prompts
        self.benign = settings.benign
        self.limit = settings.limit
        self.samples = settings.samples
        self.triggers = settings.triggers
        self.instruction = settings.instruction
        self.teacher = settings.teacher
        self.sampling = settings.sampling
        self.judging = settings.judging
        self.train_args = settings.train_args

    def as_method(self, name):
        """The lab of another method at the same rate and seed; its costs count for this one."""
        return Lab(self.settings, name, self.lr, self.seed, self.costs)

    # ---------------------------------------------------------------------------- any command

    def run(self, program, *words):
        """Run a command unless it is done, and count its cost; returns the path that it makes.

        program: a module with `main(argv)`, as in "studies.sft"; words: flags, --out among them.
        """
        words = [str(word) for word in (*words, *self.settings.stage_flags)]
        command = Command(program, words)
        cost = run_once(self.settings, command)
        self.costs[command.out] = {"program": program, **cost}
        return command.out

    def write(self, name, records):
        """Write records of one's own into the seed's folder; returns the path."""
        path = self.shared / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, records)
        return path

    def tokenizer(self, model=None):
        """The tokenizer of a model, of the base model by default."""
        return load_tokenizer(str(model or self.model))

    def cost(self):
        """The cost of all commands so far: COUNTS, TIMES and "killed_before"."""
        costs = self.costs.values()
        total = {}
        for name in COUNTS:
            total[name] = sum(cost[name] for cost in costs)
        for name in TIMES:
            total[name] = round(sum(cost[name] for cost in costs), 1)
        total["killed_before"] = any(cost["killed_before"] for cost in costs)
        return total

    def programs(self):
        """The programs of all commands so far."""
        return sorted({cost["program"] for cost in self.costs.values()})

    # ------------------------------------------------------------------------------- the data

    @property
    def sampling_flags(self):
        """The words of every command that samples, by a server where there is one."""
        return [*self.sampling, *self.settings.served, "--seed", self.seed]

    def rollouts(self, folder=None, model=None, prompts=None, samples=None):
        """Rollouts of a model in `folder`; without arguments those that all methods share.

        Returns the path of the traces. prompts: a file, by default the harmful ones.
        """
        return self.run(
            "intervene", "rollouts", "--model", model or self.model, *self.sampling_flags,
            "--samples", samples or self.samples, "--prompts", prompts or self.prompts,
            "--limit", self.limit, "--out", (folder or self.shared) / "rollouts.jsonl",
        )

    def benign_rollouts(self, folder=None, model=None):
        """One rollout for each benign prompt, by the base model without arguments."""
        if not self.benign:
            raise InputError(f"{self.name} needs benign prompts (BENIGN=file).")
        return self.rollouts((folder or self.shared) / "benign", model, self.benign, samples=1)

    def judge(self, rollouts, judging=None, name="verdicts"):
        """Verdicts and cues of rollouts; returns {flag: path} of traces, steps and verdicts."""
        steps = self.run(
            "intervene", "steps", "--traces", rollouts, "--out", rollouts.with_name("steps.jsonl")
        )
        verdicts = self.run(
            "intervene", "judge", *(judging or self.judging), "--traces", rollouts,
            "--steps", steps, "--out", rollouts.parent / f"{name}.jsonl",
        )
        return {"--traces": rollouts, "--steps": steps, "--verdicts": verdicts}

    def judged(self, rollouts, judging=None, name="verdicts"):
        """The judged rollouts themselves: trace records with their steps and verdicts."""
        files = self.judge(rollouts, judging, name).values()
        return judged_traces(*map(read_jsonl, files))

    def pairs(self, folder=None, model=None, prompts=None, triggers=None, rounds=1, judging=None,
              name="pairs"):
        """Pairs by intervention (Algorithm 1) on the rollouts in `folder`; returns their path.

        Without arguments they are those of the base model, for all methods. A method that makes
        others gives them a name such as "NAME/pairs" with its own, so that AGAIN removes them.
        """
        rollouts = self.rollouts(folder, model, prompts)
        verdicts = "verdicts"
        if judging:
            verdicts = f"{name}_verdicts"
        files = self.judge(rollouts, judging, verdicts)
        return self.run(
            "intervene", "pairs", "--model", model or self.model, *self.sampling_flags,
            *(judging or self.judging), "--triggers", triggers or self.triggers,
            "--max-interventions", rounds, *words_of(files),
            "--out", rollouts.parent / f"{name}.jsonl",
        )

    # --------------------------------------------------------------------------- the training

    def train(self, pairs, *flags, model=None, out=None):
        """Preference training (Eq. 4) on pairs, a path or a list of paths; returns the model."""
        files = pairs if isinstance(pairs, list) else [pairs]
        return self.run("ipo", "train", *self._training(model, out), *flags, "--pairs", *files)

    def sft(self, data, *flags, model=None, out=None):
        """Supervised fine-tuning (studies.sft) on a file or a list of files; returns the model."""
        files = data if isinstance(data, list) else [data]
        return self.run("studies.sft", *self._training(model, out), *flags, "--data", *files)

    def _training(self, model, out):
        """The words that all trainings have."""
        return [
            "--model", model or self.model, *self.train_args, "--lr", self.lr,
            "--seed", self.seed, "--out", out or self.out / "model",
        ]


def words_of(files):
    """{flag: path} as the words of a command line."""
    words = []
    for flag, path in files.items():
        words += [flag, path]
    return words


# --------------------------------------------------------------------------------- running commands

def run_once(settings, command):
    """Run a command unless it is done, and wait if another worker is at it; returns its cost."""
    path = sidecar(command.out, "cost")
    with waiting_lock(settings.out / "locks" / digest(str(command.out))):
        finished = command.out.exists() and sidecar(command.out, "funnel").exists()
        killed_before = sidecar(command.out, "config").exists()
        wall = time.monotonic()
        cpu = cpu_seconds()
        run_command(settings, command)
        if finished and path.exists():
            return read_json(path, *COUNTS)
        cost = {
            **count_cost(command),
            "seconds": round(time.monotonic() - wall, 2),
            "cpu_seconds": round(cpu_seconds() - cpu, 2),
            "killed_before": killed_before,  # then only the time since the last start is known
        }
        write_json(path, cost)
    return cost


@contextlib.contextmanager
def waiting_lock(path):
    """Hold a lock file; wait as long as another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        flock(file, fcntl.LOCK_EX)
        yield


def cpu_seconds():
    """Processor time of this process and of those that it has started and waited for."""
    return sum(os.times()[:4])


def run_command(settings, command):
    """Run one command; an error that has more to it than a message becomes a plain one."""
    print(f"--- {command.out}", flush=True)
    if settings.runner:
        run_by_runner(settings, command)
        return
    program = importlib.import_module(command.program)
    imported_code(program)  # its hashes now, for `code_of`: later it may have been edited
    try:
        program.main(command.words)
    except ServiceError as error:
        raise ServiceError(str(error)) from None
    except SystemExit:
        raise InputError(
            f"{command.program} refused its flags: {shlex.join(command.words)}. "
            "The log of the model says why."
        ) from None


def run_by_runner(settings, command):
    """Run one command as run.sh runs a stage: on all GPUs, or from a server started for it."""
    line = f"{command.out}: {shlex.join(start_words(settings, command))}"
    runner = [
        sys.executable, "-m", "launch.run", "--separate", "--with-parent",
        "--run", str(settings.out),
    ]
    # Not the log that stands in for sys.stdout: a child needs a file of the system.
    log = sys.stdout
    status = subprocess.run([*runner, *settings.runner, line], stdout=log, stderr=log).returncode
    if status:
        raise ServiceError(f"{command.out}: status {status}; the log of the model says why.")


def start_words(settings, command):
    """A command as the words of a shell, with what starts it on all GPUs if it can use them.

    >>> command = Command("studies.sft", ["--out", "x"])
    >>> settings = Settings(*[None] * len(Settings._fields))._replace(launch=("torchrun",))
    >>> start_words(settings, command)
    ['torchrun', '-m', 'studies.sft', '--out', 'x']
    """
    program = [f"{command.program}.py"]
    if "." in command.program:
        program = ["-m", command.program]
    start = [sys.executable]
    if settings.launch and command.program in ON_ALL_GPUS and "--server" not in command.words:
        start = list(settings.launch)
    return [*start, *program, *command.words]


# -------------------------------------------------------------------------------------- the costs

def count_cost(command):
    """Generations and judge calls of a finished command, counted from what it wrote.

    So a kill loses none. A stage that counts them in its funnel is taken at its word.
    """
    counts = read_json(sidecar(command.out, "funnel"), "counts")["counts"]
    if "generations" in counts:
        return {"generations": counts["generations"], "judge_calls": counts["judge calls"]}
    generations = 0
    judge_calls = 0
    stage = command.words[0] if command.program == "intervene" else ""
    if stage == "rollouts":
        generations = count_lines(command.out)
    if stage == "judge":
        judge_calls = count_questions(word_after(command, "--traces"), command.out)
    if stage == "pairs":
        for traces in command.out.with_suffix(".rounds").glob("round*.traces.jsonl"):
            verdicts = traces.with_name(traces.name.replace("traces", "verdicts"))
            generations += count_lines(traces)
            judge_calls += count_questions(traces, verdicts)
    if stage == "benign":
        generations = counts["reversed"]
        judge_calls = count_benign_questions(command, counts)
    return {"generations": generations, "judge_calls": judge_calls}


def word_after(command, flag):
    """The value of a command's flag."""
    return command.words[command.words.index(flag) + 1]


def count_lines(path):
    """The number of records in a file."""
    return len(read_jsonl(path))


def count_complete(path):
    """The number of traces in a file that have a response."""
    return sum(not trace["truncated"] for trace in read_jsonl(path))


def count_questions(traces_path, verdicts_path):
    """What a judge was asked about traces: reasoning, responses, and cues of unsafe reasoning."""
    verdicts = read_jsonl(verdicts_path)
    cues = sum(verdict["reasoning_safe"] is False for verdict in verdicts)
    return len(verdicts) + count_complete(traces_path) + cues


def count_benign_questions(command, counts):
    """Questions behind the benign pairs of stage 2; see `intervene.benign_pairs`."""
    complete = count_complete(word_after(command, "--base"))
    complete += count_complete(word_after(command, "--traces"))
    # Compliance of all complete traces, the cue where the model does not refuse by itself, and
    # compliance again after the intervention.
    cues = counts["answered"] - counts["refused now"]
    return complete + cues + counts["reversed"]
