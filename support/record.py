"""What decides a result, as it stands in NAME.config.json: flags, inputs, code and versions."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from support.code_hash import ROOT, code_hashes
from support.http import without_password

# Flags that change no result, and why. All others are recorded, and another value is refused.
# "Rounding" is that of sums whose order the number of ranks changes too, which is free as well.
# Sampling is not so patient: there another rounding is another token, and then another text.
NOT_RECORDED = {
    "out": "where the result goes",
    "command": "an output is made by one command",
    "accept_code_change": "what was accepted is recorded by itself",
    "save_every": "how much a kill loses",
    "checkpoint_activations": "computes the same numbers twice",
    "micro_tokens": "rounding: sums are divided by counts of the whole batch",
    "compile": "rounding",
    "defer_sync": "rounding",
    "judge_kind": "in the judge's name",
    "cue_judge": "its name is in the judge's",
    "cue_judge_model": "its name is in the judge's",
    "in_flight": "how many requests a server has at once",
    "judge_concurrency": "how many questions are in flight (a judge in this process: see below)",
    "judge_cache": "where replies are kept; each has its question and judge in its key",
    "judge_price_in": "counts dollars",
    "judge_price_out": "counts dollars",
    "max_cost": "where to stop, not what to say",
}
# Where a server samples, it alone knows its device, its dtype and its rows.
NOT_RECORDED_WITH_SERVER = ("device", "dtype", "batch_size", "no_graph")

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")  # their versions decide results
MEGABYTE = 1 << 20
# A model's weights and settings, its tokenizer and its chat template.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt",
               "merges.txt")
LOG = "metrics.jsonl"  # of a training: it holds times


def new_record(program, flags, inputs):
    """The record of a stage: everything that decides its result, but for versions.

    program: the stage's source file; flags: dict; inputs: the files and models that it reads.
    """
    program = Path(program).resolve()
    name = program.relative_to(ROOT).as_posix() if program.is_relative_to(ROOT) else program.name
    command = flags.get("command")
    return {
        "made by": f"{name} {command}" if command else name,
        "flags": deciding_flags(flags),
        "inputs": {str(path): fingerprint(path) for path in inputs},
        "code": code_hashes(program),
    }


# -------------------------------------------------------------------------------------- flags

def deciding_flags(flags):
    """The flags that decide the result, as they will come back from JSON, without passwords."""
    kept = {name: value for name, value in flags.items() if name not in NOT_RECORDED}
    if "local:" in str(flags.get("judge")):
        kept["judge_concurrency"] = flags.get("judge_concurrency")  # its rows in a batch
    if flags.get("server"):
        kept["server"] = True  # at whatever address
        for name in NOT_RECORDED_WITH_SERVER:
            kept.pop(name, None)
    if "device" in kept:
        kept["device"] = device_kind(kept["device"])
    return json.loads(json.dumps(_without_passwords(kept)))


def device_kind(name):
    """`cpu` or `cuda`, whichever of the GPUs it is: they round alike, and `--dtype auto` too."""
    if name != "auto":
        return name.partition(":")[0]
    import torch  # here, because it takes a second
    return "cuda" if torch.cuda.is_available() else "cpu"


def _without_passwords(value):
    if isinstance(value, str):
        return without_password(value)
    if isinstance(value, (list, tuple)):
        return [_without_passwords(part) for part in value]
    if isinstance(value, dict):
        return {name: _without_passwords(part) for name, part in value.items()}
    return value


# ------------------------------------------------------------------------------ two of them

def changed_settings(old, new):
    """What differs in flags and inputs of two records, as phrases that name the flag or file.

    Inputs are compared by what is in them, wherever they are. A flag that one of them lacks is
    new or was removed: that is a change of code, see `changed_code`.
    """
    phrases = []
    if old.get("made by", new["made by"]) != new["made by"]:
        phrases.append(f"{old['made by']} then, {new['made by']} now")
    before = _with_numbered_inputs(old)
    now = _with_numbered_inputs(new)
    for name in before:
        if name in now and before[name] != now[name]:
            phrases.append(f"{name}: {old['flags'][name]!r} then, {new['flags'][name]!r} now")
    old_inputs = list(old["inputs"].items())
    new_inputs = list(new["inputs"].items())
    for (_, then), (path, value) in zip(old_inputs, new_inputs):
        if then != value:
            phrases.append(f"{path}: {then!r} then, {value!r} now")
    if len(old_inputs) != len(new_inputs):
        phrases.append(f"{len(old_inputs)} inputs then, {len(new_inputs)} now")
    return phrases


def _with_numbered_inputs(record):
    """The flags of a record, with `input 0`, `input 1`, ... for the paths of inputs."""
    numbers = {path: f"input {n}" for n, path in enumerate(record["inputs"])}

    def numbered(value):
        if isinstance(value, list):
            return [numbered(part) for part in value]
        if not isinstance(value, str):
            return value
        kind, colon, path = value.rpartition(":")  # a set is NAME=KIND:FILE
        if colon and path in numbers:
            return kind + colon + numbers[path]
        return numbers.get(value, value)

    return {name: numbered(value) for name, value in record["flags"].items()}


def changed_code(old, new):
    """{file: [hash then, hash now]} of the source files that differ between two records."""
    before = old.get("code", {})
    now = new["code"]
    changed = {}
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            changed[name] = [before.get(name), now.get(name)]
    return changed


# ------------------------------------------------------------------------- files and folders

def fingerprint(path):
    """16 hex digits of the SHA-256 of a file, or of all that decides what a model folder does.

    A name that is no local path (a model on the hub) is returned as it is. Of a file over 64 MB the
    name, the size, and the first and last megabyte are hashed: that suffices because training
    changes every weight, and hashing 16 GB would take a minute at each stage.
    """
    path = Path(path)
    if not path.exists():
        return str(path)
    if path.is_file():
        return _hash_files([path])
    return _hash_files(model_files(path))


def model_files(folder):
    """The files in a folder that decide what its model does; those of an evaluation among them."""
    files = set()
    for pattern in MODEL_FILES:
        files.update(folder.glob(pattern))
    return sorted(files)


def result_files(out):
    """The files of a finished output: the file itself, or those of its folder that hold results."""
    if not out.is_dir():
        return [out]
    records = [path for path in sorted(out.glob("*.jsonl")) if path.name != LOG]
    return model_files(out) + records


def _hash_files(paths):
    hashed = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if size > 64 * MEGABYTE:
                hashed.update(f"{Path(path).name} {size}".encode())
                hashed.update(file.read(MEGABYTE))
                file.seek(-MEGABYTE, os.SEEK_END)
            hashed.update(file.read())
    return hashed.hexdigest()[:16]


# ----------------------------------------------------------------------------------- versions

def package_versions():
    """Versions of Python and of the packages that decide results."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        versions[name] = metadata.version(name)
    return versions


def git_commit():
    """The commit of this checkout, plus `+changes` if files differ; None outside a repository."""
    if not shutil.which("git"):
        return None
    head = _git("rev-parse", "HEAD")
    if head.returncode:
        return None
    changed = _git("status", "--porcelain").stdout
    commit = head.stdout.strip()
    return commit + "+changes" if changed else commit


def _git(*command):
    return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
