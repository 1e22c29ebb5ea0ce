"""What every stage of a run does around its work: check, note its settings, skip what is finished.

Two files stand beside an output NAME (a .jsonl file or a folder). `NAME.config.json` holds the
flags, the hashes of the inputs and the versions that it is made with. `NAME.funnel.json`, written
once the stage is finished, counts what came in, what was dropped and why, and what went out.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from support.errors import InputError
from support.files import ROW_FORMATS, write_json
from support.http import without_password

# Flags that say where or how fast a stage runs, never what it computes.
VOLATILE_FLAGS = {
    "device", "out", "command", "save_every", "judge_concurrency", "compile", "defer_sync",
    "judge_cache", "judge_price_in", "judge_price_out", "max_cost",
}
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")  # their versions decide results
MEGABYTE = 1 << 20


def sidecar(out, kind):
    """The path of the `config`, `funnel` or `summary` file that stands beside an output.

    >>> sidecar("runs/toy/rollouts.jsonl", "funnel").as_posix()
    'runs/toy/rollouts.funnel.json'
    """
    out = Path(out)
    stem = out.stem if out.suffix == ".jsonl" else out.name
    return out.with_name(f"{stem}.{kind}.json")


# ------------------------------------------------------------------------------ open, work, close

def run_stage(out, flags, inputs, work):
    """Call `work` unless the output is finished already, and print the funnel as one line.

    out, flags, inputs: see `open_stage`. work() makes the output and returns (counts, further
    entries of the funnel).
    """
    finished = open_stage(out, flags, inputs)
    if finished:
        print(funnel_line(finished), "(finished before)")
        return
    counts, more = work()
    close_stage(out, counts, **more)


def open_stage(out, flags, inputs):
    """Write the config of a stage beside `out`; return its funnel if it is finished, else None.

    `flags` is a dict of everything that decides the result, `inputs` the files that it reads.
    Raises InputError when an input is missing, and when `out` was made with other flags or inputs,
    because its records must not be mixed with new ones. Where `out` is gone, its old funnel is
    removed, so that it is made again; intermediate rounds of other settings are removed too.
    """
    _check_inputs(inputs)
    config = {
        "flags": _comparable(flags),
        "inputs": {str(path): fingerprint(path) for path in inputs},
    }
    out = Path(out)
    config_path = sidecar(out, "config")
    funnel_path = sidecar(out, "funnel")
    changes = []
    if config_path.exists():
        changes = _changes(json.loads(config_path.read_text(encoding="utf-8")), config)
    if changes and out.exists():
        raise InputError(
            f"{out} was made with other settings ({'; '.join(changes)}). "
            f"Use another run folder (RUN=...), or delete {out} to make it again."
        )
    if not out.exists():
        funnel_path.unlink(missing_ok=True)
    if changes or not config_path.exists():
        shutil.rmtree(out.with_suffix(".rounds"), ignore_errors=True)
        write_json(config_path, {**config, "versions": package_versions(), "commit": git_commit()})
    if funnel_path.exists():
        return json.loads(funnel_path.read_text(encoding="utf-8"))
    return None


def close_stage(out, counts, **more):
    """Store the funnel of a stage beside its output, print it as one line, and return it.

    more: further entries of the funnel; empty ones are left out.
    """
    name = Path(out).name.removesuffix(".jsonl")
    kept = {key: value for key, value in more.items() if value}
    funnel = {"stage": name, "counts": counts, **kept}
    write_json(sidecar(out, "funnel"), funnel)
    print(funnel_line(funnel), flush=True)
    return funnel


def funnel_line(funnel):
    """A funnel as one readable line.

    >>> funnel_line({"stage": "pairs", "counts": {"unsafe": 40, "cue found": 38, "pairs": 30}})
    'pairs: 40 unsafe -> 38 cue found -> 30 pairs'
    """
    counts = [f"{number} {name}" for name, number in funnel["counts"].items()]
    line = f"{funnel['stage']}: " + " -> ".join(counts)
    if funnel.get("judge"):
        bill = [f"{number} {name}" for name, number in funnel["judge"].items()]
        line += f" (judge: {', '.join(bill)})"
    return line


# ------------------------------------------------------------------------ what decides a result

def _check_inputs(inputs):
    """Raise InputError for a missing data file. (A model may be a name on the hub.)"""
    for path in map(Path, inputs):
        if path.suffix in ROW_FORMATS and not path.is_file():
            raise InputError(
                f"{path}: no such file. (Published sets: `python -m benchmarks.fetch NAME`.)"
            )


def _comparable(flags):
    """The flags that decide the result, as they will come back from JSON, without passwords."""
    kept = {}
    for name, value in flags.items():
        if name not in VOLATILE_FLAGS:
            kept[name] = without_password(value) if isinstance(value, str) else value
    return json.loads(json.dumps(kept))


def _changes(old, new):
    """What differs between two configs, as phrases that name the flag or file."""
    phrases = []
    for part in ("flags", "inputs"):
        for name in {**old[part], **new[part]}:
            before = old[part].get(name)
            now = new[part].get(name)
            if before != now:
                phrases.append(f"{name}: {before!r} then, {now!r} now")
    return phrases


def fingerprint(path):
    """16 hex digits of the SHA-256 of a file, or of a model directory's weights and settings.

    A name that is no local path (a model on the hub) is returned as it is. Of a file over 64 MB the
    name, the size, and the first and last megabyte are hashed: that suffices because training
    changes every weight, and hashing 16 GB would take a minute at each stage.
    """
    path = Path(path)
    if not path.exists():
        return str(path)
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json"))
    hashed = hashlib.sha256()
    for file_path in files:
        size = file_path.stat().st_size
        with open(file_path, "rb") as file:
            if size > 64 * MEGABYTE:
                hashed.update(f"{file_path.name} {size}".encode())
                hashed.update(file.read(MEGABYTE))
                file.seek(-MEGABYTE, os.SEEK_END)
            hashed.update(file.read())
    return hashed.hexdigest()[:16]


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
    root = str(Path(__file__).resolve().parent.parent)
    return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
