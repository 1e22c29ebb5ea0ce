"""GPUs, memory, disk, folders, programs and ports: is this machine enough for a run?"""
import importlib.util
import os
import shutil
import socket
import tempfile
from pathlib import Path

from launch.estimate import disk_needed, stage_memory
from launch.stages import ENGINE, JUDGE, JUDGE_PORT, processes_of
from support.engine import command_template, fill_command, find_program, split_gpus
from support.errors import InputError
from support.gpus import visible_gpus

GIGABYTE = 1e9
UNSURE = 1.1  # times its memory: what an estimate may say of something that fits
IN_USE = 0.05  # of a GPU's memory: less is its screen, not another program
ON_OTHER_MACHINES = ("srun", "mpirun", "--nnodes", "--rdzv-endpoint")  # words of a launcher


def check_folders(stages, planned, findings):
    """Report folders that cannot be written and, if `planned`, a disk too small for the rest."""
    folders = {}  # used as an ordered set
    for stage in stages:
        if stage.out is not None:
            folders[_existing_folder(stage.out.absolute().parent)] = None
    for folder in folders:
        problem = _cannot_write(folder)
        if problem:
            findings.problem(f"RUN: {folder}: {problem}. Give RUN=..., a folder of yours.")
            return
    if not folders or not planned:
        return
    # A run that was stopped has written some of it.
    needed = disk_needed(stages) - sum(_bytes_in(stage.out) for stage in stages if stage.out)
    folder = next(iter(folders))
    free = shutil.disk_usage(folder).free
    if free < needed:
        findings.problem(f"RUN: about {_size(needed)} are still to be written, but the disk of "
                         f"{folder} has {_size(free)} left. Free some, or give RUN=... on another "
                         "disk.")


def _bytes_in(path):
    """Bytes of a file, or of all files below a folder; 0 where there is none."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


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
            if _starts_elsewhere(stage.command):
                continue
            _, processes = processes_of(stage.command, len(gpus))
            _refuse_missing_gpus(processes, gpus)
            if planned:
                _check_memory(stage, stages, gpus[:processes], findings)
    _check_engines(unfinished, options, gpus, findings)


def _starts_elsewhere(command):
    """Whether a stage's processes may run on other machines, of which nothing is known here."""
    return any(word.partition("=")[0] in ON_OTHER_MACHINES for word in command)


def _refuse_missing_gpus(processes, gpus):
    """Raise InputError where processes would have to share GPUs, or the cores of a CPU."""
    if gpus and processes > len(gpus):
        raise InputError(f"{processes} processes, but this machine has {_count(gpus)}. "
                         f"Give NPROC={len(gpus)}, or look at CUDA_VISIBLE_DEVICES.")
    cores = os.cpu_count() or 1
    if not gpus and processes > 2 * cores:  # CHOICE: up to two a core are slow, but no mistake
        raise InputError(f"{processes} processes, but no GPU was found and {cores} CPU cores. "
                         f"Give NPROC={cores}, or see why `nvidia-smi` finds none.")


def _check_memory(stage, stages, gpus, findings):
    """Report GPUs that cannot hold what a stage needs on each of them."""
    if not gpus or getattr(stage.flags, "device", "auto").startswith("cpu"):
        return
    try:
        needed = stage_memory(stage, stages, gpus)
    except InputError:  # no such model, which is reported by itself
        return
    smallest = min(gpus, key=lambda gpu: gpu.total)
    fullest = min(gpus, key=lambda gpu: gpu.free)
    if needed > UNSURE * smallest.total:
        remedy = "Give a smaller BATCH or TOKENS"
        if stage.trains:
            remedy = "Give more GPUs (NPROC), LORA=16, or TRAIN_ARGS=--checkpoint-activations"
        findings.problem(f"{stage.title}: about {_size(needed)} are needed on each GPU, but GPU "
                         f"{smallest.index} ({smallest.name}) has {_size(smallest.total)}. "
                         f"{remedy}.")
    elif needed > UNSURE * fullest.free and fullest.free < (1 - IN_USE) * fullest.total:
        findings.problem(f"{stage.title}: about {_size(needed)} are needed on each GPU, but GPU "
                         f"{fullest.index} has {_size(fullest.free)} free. Stop what else is on "
                         "it (see `nvidia-smi`), or leave it out by CUDA_VISIBLE_DEVICES.")
    elif needed > fullest.free:
        findings.warning(f"{stage.title}: about {_size(needed)} are needed on each GPU, and GPU "
                         f"{fullest.index} has {_size(fullest.free)} free, so it may not fit")


def _check_engines(stages, options, gpus, findings):
    """Report what is missing for the servers that the runner is to start."""
    values = set()
    for stage in stages:
        values.update(str(value) for value in vars(stage.flags).values())
    wanted = {}
    ports = []
    if ENGINE in values:
        wanted["ENGINE"] = options.engine
        ports += _engine_ports(options, gpus, JUDGE in values)
    if JUDGE in values:
        wanted["JUDGE_ENGINE"] = options.judge_engine
        ports.append(options.port + JUDGE_PORT)
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
    if options.run and any(Path(options.run).glob(".*.json")):
        return
    for port in ports:
        if not _is_free(port):
            findings.problem(f"PORT: port {port} is taken by another program. Give PORT=..., the "
                             "first of some that are free.")
            return


def _engine_ports(options, gpus, judge_served):
    """The ports of the engine's servers, as `support.engine.Engine` numbers them."""
    own, _, _ = split_gpus(gpus, options.judge_gpus if judge_served else 0)
    count = max(1, len(own))
    if "{gpus}" in (options.engine or ""):
        count = 1
    return range(options.port, options.port + count)


def _refuse_missing_program(template):
    """Raise InputError where a server's program, or its Python module, is not installed."""
    if not template:
        raise InputError("no command that starts the server is given, as in ENGINE=vllm.")
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
