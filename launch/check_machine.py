"""GPUs, memory, disk, folders, programs and ports: is this machine enough for a run?"""
import importlib.util
import os
import shutil
import socket
import tempfile
from pathlib import Path

from launch.outputs import output_of
from launch.plan import disk_needed, stage_memory
from support.engine import command_template, fill_command, find_program
from support.errors import InputError
from support.gpus import visible_gpus

GIGABYTE = 1e9
IN_USE = 0.05  # of a GPU's memory: less is its screen, not another program
ON_OTHER_MACHINES = ("srun", "mpirun", "--nnodes", "--rdzv-endpoint")  # words of a launcher


def check_folders(stages, planned, findings):
    """Report folders that cannot be written and, if `planned`, a disk too small for the rest."""
    folders = {}  # used as an ordered set
    for stage in stages:
        out = output_of(stage)
        if out is not None:
            folders[_existing_folder(out.absolute().parent)] = None
    for folder in folders:
        problem = _cannot_write(folder)
        if problem:
            findings.problem(f"RUN: {folder}: {problem}. Give RUN=..., a folder of yours.")
            return
    if not folders or not planned:
        return
    needed = disk_needed(stages)
    folder = next(iter(folders))
    free = shutil.disk_usage(folder).free
    if free < needed:
        findings.problem(f"RUN: about {_size(needed)} will be written, but the disk of {folder} "
                         f"has {_size(free)} left. Free some, or give RUN=... on another disk.")


def _existing_folder(path):
    """The folder itself, or the nearest one above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def _cannot_write(folder):
    """Why nothing can be written into a folder; None where it can."""
    if not folder.is_dir():
        return "this is a file, and a folder is needed"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return f"nothing can be written there ({error.strerror})"
    return None


def check_programs(stages, findings):
    """Report programs that start the stages and are not there."""
    for stage in stages:
        program = stage.command[0]
        name = "PYTHON" if "python" in Path(program).name else "LAUNCH"
        if not shutil.which(program):
            findings.problem(f"{name}: {program}: no such program. Install it, or check its "
                             "spelling.")


def check_gpus(stages, unfinished, options, planned, findings):
    """Report too few GPUs, too little memory, and servers that cannot be started.

    planned: whether the flags are such that the memory of a stage can be estimated.
    """
    gpus = visible_gpus()
    for stage in unfinished:
        with findings.reporting("NPROC"):
            processes = processes_of(stage.command)
            if processes is not None:
                _refuse_missing_gpus(processes, gpus)
                if planned:
                    _check_memory(stage, stages, gpus[:processes], findings)
    _check_engines(unfinished, options, gpus, findings)


def processes_of(command):
    """How many processes a stage's command starts on this machine; None: unknown.

    Raises InputError for a number that is none.

    >>> processes_of(["python3", "intervene.py", "steps"])
    1
    >>> processes_of(["torchrun", "--nproc-per-node=8", "ipo.py", "train"])
    8
    >>> processes_of(["srun", "torchrun", "--nproc-per-node", "8", "ipo.py"])
    """
    if any(word.partition("=")[0] in ON_OTHER_MACHINES for word in command):
        return None
    for i, word in enumerate(command):
        flag, _, value = word.partition("=")
        if flag.replace("_", "-") != "--nproc-per-node":
            continue
        value = value or command[i + 1]
        if value in ("auto", "gpu", "cpu"):
            return None
        if not value.isdigit() or int(value) == 0:
            raise InputError(f"{value!r} is no number of processes. Give NPROC=1 or more.")
        return int(value)
    return 1


def _refuse_missing_gpus(processes, gpus):
    """Raise InputError where processes would have to share GPUs, or the cores of a CPU."""
    if gpus and processes > len(gpus):
        raise InputError(f"{processes} processes, but this machine has {_count(gpus)}. "
                         f"Give NPROC={len(gpus)}, or look at CUDA_VISIBLE_DEVICES.")
    cores = os.cpu_count() or 1
    if not gpus and processes > cores:
        raise InputError(f"{processes} processes, but no GPU was found and {cores} CPU cores. "
                         f"Give NPROC=1, or see why `nvidia-smi` finds none.")


def _check_memory(stage, stages, gpus, findings):
    """Report GPUs that cannot hold what a stage needs on each of them."""
    if not gpus or getattr(stage.flags, "device", "auto").startswith("cpu"):
        return
    try:
        needed = stage_memory(stage, stages)
    except InputError:  # no such model, which is reported by itself
        return
    smallest = min(gpus, key=lambda gpu: gpu.total)
    fullest = min(gpus, key=lambda gpu: gpu.free)
    if needed > smallest.total:
        remedy = "Give a smaller BATCH or TOKENS"
        if stage.trains:
            remedy = "Give more GPUs (NPROC), LORA=16, or TRAIN_ARGS=--checkpoint-activations"
        findings.problem(f"{stage.title}: about {_size(needed)} are needed on each GPU, but GPU "
                         f"{smallest.index} ({smallest.name}) has {_size(smallest.total)}. "
                         f"{remedy}.")
    elif needed > fullest.free and fullest.free < (1 - IN_USE) * fullest.total:
        findings.problem(f"{stage.title}: about {_size(needed)} are needed on each GPU, but GPU "
                         f"{fullest.index} has {_size(fullest.free)} free. Stop what else is on "
                         "it (see `nvidia-smi`), or leave it out by CUDA_VISIBLE_DEVICES.")


def _check_engines(stages, options, gpus, findings):
    """Report what is missing for the servers that the runner is to start."""
    values = set()
    for stage in stages:
        values.update(str(value) for value in vars(stage.flags).values())
    wanted = {}
    if "{engine}" in values:
        wanted["ENGINE"] = options.engine
    if "{judge}" in values:
        wanted["JUDGE_ENGINE"] = options.judge_engine
    for name, template in wanted.items():
        with findings.reporting(name):
            _refuse_missing_program(template)
    if not wanted:
        return
    if "JUDGE_ENGINE" in wanted and options.judge_gpus < 1:
        findings.problem(f"JUDGE_GPUS: {options.judge_gpus}: it must be at least 1.")
    if not gpus:
        findings.warning("no GPU was found, so the servers will have to do without (`nvidia-smi`)")
    # Those that a killed run has left are stopped by the runner.
    if any(Path(options.run).glob(".*.json")):
        return
    for port in range(options.port, options.port + max(1, len(gpus)) + 1):
        if not _is_free(port):
            findings.problem(f"PORT: port {port} is taken by another program. Give PORT=..., the "
                             "first of some that are free.")
            return


def _refuse_missing_program(template):
    """Raise InputError where a server's program, or its Python module, is not installed."""
    words = fill_command(command_template(template))
    find_program(words[0])
    if words[1:2] == ["-m"]:
        package = words[2].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the Python package {package} is not installed. Install it, or give "
                             "a command that starts a server, with {model} and {port} in it.")


def _is_free(port):
    with socket.socket() as probe:
        # A port is free although connections of the server before are still being closed.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        except OverflowError:  # above 65535
            return False
    return True


def _count(gpus):
    return f"{len(gpus)} GPU" + ("s" if len(gpus) > 1 else "")


def _size(number):
    """
    >>> _size(16_060_522_496), _size(350_000_000)
    ('16 GB', '0.35 GB')
    """
    return f"{number / GIGABYTE:.2g} GB" if number < 10e9 else f"{number / GIGABYTE:.0f} GB"
