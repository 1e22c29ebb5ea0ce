"""What every stage of a run does around its work: check, note its settings, skip what is finished.

Two files stand beside an output NAME (a .jsonl file or a folder). `NAME.config.json` is the record
of all that decides the result: flags, hashes of inputs and code, versions. `NAME.funnel.json`,
written once the stage is finished, counts what came in, what was dropped and why, and what went
out, and holds the hashes of the output. While a stage works, `.NAME.lock` says who owns the output.
"""
import shutil
from pathlib import Path

from support.errors import InputError
from support.files import ROW_FORMATS, read_json, write_json
from support.hub import is_hub_name
from support.lock import lock, unlock
from support.record import (
    changed_code,
    changed_settings,
    fingerprint,
    git_commit,
    new_record,
    package_versions,
    result_files,
)

ACCEPTED = "accepted code changes"  # in a config: a list of {file: [hash then, hash now]}


def sidecar(out, kind):
    """The path of the `config`, `funnel` or `summary` file that stands beside an output.

    >>> sidecar("runs/toy/rollouts.jsonl", "funnel").as_posix()
    'runs/toy/rollouts.funnel.json'
    """
    out = Path(out)
    if not out.name:
        out = out.absolute()  # "." has no name
    return out.with_name(f"{_stem(out)}.{kind}.json")


def _stem(out):
    return out.stem if out.suffix == ".jsonl" else out.name


def _lock_path(out):
    return out.with_name(f".{_stem(out)}.lock")


def add_stage_flags(parser):
    """The flag that every stage has; `open_stage` finds it among the flags."""
    parser.add_argument(
        "--accept-code-change",
        action="store_true",
        help="keep what was made before the code was edited; the output's config notes it",
    )


# ------------------------------------------------------------------------------ open, work, close

def run_stage(program, out, flags, inputs, work):
    """Call `work` unless the output is finished already, and print the funnel as one line.

    program, out, flags, inputs: see `open_stage`. work() makes the output and returns (counts,
    further entries of the funnel).
    """
    finished = open_stage(program, out, flags, inputs)
    if finished:
        print(funnel_line(finished), "(finished before)")
        return
    try:
        counts, more = work()
        close_stage(out, counts, **more)
    finally:
        unlock(_lock_path(Path(out)))


def open_stage(program, out, flags, inputs):
    """Own `out` and write its record beside it; return its funnel if it is finished, else None.

    `program` is the stage's source file, `flags` a dict of everything that decides the result,
    `inputs` the files that it reads. Raises InputError when an input is missing or damaged, when
    another process works on `out`, and when `out` was made with other flags, inputs or code,
    because its records must not be mixed with new ones. Where `out` is gone, its old funnel is
    removed, so that it is made again; intermediate rounds of other settings are removed too.
    """
    out = Path(out)
    for path in inputs:
        _check_input(path)
    lock(_lock_path(out), str(out), "Wait until that ends, or write to another place.")
    funnel = None
    try:
        _note_settings(out, new_record(program, flags, inputs), flags.get("accept_code_change"))
        funnel = _finished_funnel(out)
    except Exception:
        unlock(_lock_path(out))
        raise
    if funnel:
        unlock(_lock_path(out))
    return funnel


def close_stage(out, counts, **more):
    """Store the funnel of a stage beside its output, print it as one line, and return it.

    more: further entries of the funnel; empty ones are left out.
    """
    out = Path(out)
    kept = {key: value for key, value in more.items() if value}
    funnel = {"stage": _stem(out), "counts": counts, **kept, "output": _output_hashes(out)}
    write_json(sidecar(out, "funnel"), funnel)
    print(funnel_line(funnel), flush=True)
    unlock(_lock_path(out))
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


# ------------------------------------------------------------------ made with the same settings?

def _note_settings(out, record, accept_code_change):
    """Write the config of `out`; raises InputError where `out` was made with another one."""
    config_path = sidecar(out, "config")
    made = what_is_made(out)
    if not made:
        sidecar(out, "funnel").unlink(missing_ok=True)
    if not config_path.exists():
        if made:
            raise InputError(
                f"{made}: {config_path.name} is missing, so what it was made with is not known. "
                f"Use another run folder (RUN=...), or delete {made} to make it again."
            )
        _start_anew(out, record)
        sidecar(out, "reference").unlink(missing_ok=True)  # of unknown code
        return
    old = read_json(config_path, "flags", "inputs")
    settings = changed_settings(old, record)
    code = changed_code(old, record)
    if made and settings:
        raise InputError(
            f"{made} was made with other settings ({'; '.join(settings)}). "
            f"{_batch_remedy(old, record)}"
            f"Use another run folder (RUN=...), or delete {made} to make it again."
        )
    if made and code and not accept_code_change:
        raise InputError(
            f"{made} was made with other code ({', '.join(code)}). Use another run folder "
            "(RUN=...), keep it with --accept-code-change (run.sh: ACCEPT_CODE_CHANGE=1), "
            f"or delete {made} to make it again."
        )
    if code and not accept_code_change:
        sidecar(out, "reference").unlink(missing_ok=True)  # it knows its settings, not its code
        _start_anew(out, record)
    elif settings:
        _start_anew(out, record)
    elif code:
        accepted = [*old.get(ACCEPTED, []), code]
        _write_config(out, {**record, ACCEPTED: accepted})


def _batch_remedy(old, new):
    """What to do where `--batch-size auto` has found another GPU than then."""
    then = old["flags"].get("batch_size")
    samples = "temperature" in new["flags"]
    if not samples or then in (None, new["flags"].get("batch_size")):
        return ""
    return f"Go on with BATCH={then} (--batch-size {then}). "


def _start_anew(out, record):
    """Write a new config, and remove what other settings have left besides the output."""
    for folder in _unfinished_folders(out):
        shutil.rmtree(folder, ignore_errors=True)
    _write_config(out, record)


def _unfinished_folders(out):
    """Where a stage keeps what its output is made from: rounds, and waves that were sampled."""
    return [out.with_suffix(".rounds"), out.with_suffix(".parts")]


def _write_config(out, record):
    more = {"versions": package_versions(), "commit": git_commit()}
    write_json(sidecar(out, "config"), {**record, **more})


def what_is_made(out):
    """The path of the output as far as it is made, or of its folders; None before there is any."""
    if out.is_dir():
        return out if any(out.iterdir()) else None
    finished = sidecar(out, "funnel").exists()
    # A stage that fails at once leaves an empty file, which binds nobody.
    if out.exists() and (finished or out.stat().st_size):
        return out
    for folder in _unfinished_folders(out):
        # With a funnel the output was finished, and whoever deleted it wants it made again.
        if folder.exists() and not finished:
            return folder
    return None


# -------------------------------------------------------------------------- as it was finished?

def _output_hashes(out):
    """{file: fingerprint} of an output, by names in its folder."""
    hashes = {}
    for path in [*result_files(out), sidecar(out, "summary")]:
        if path.exists():
            hashes[path.relative_to(out.parent).as_posix()] = fingerprint(path)
    return hashes


def _finished_funnel(out):
    """The funnel of a finished output, None of another; raises InputError for a damaged one."""
    funnel_path = sidecar(out, "funnel")
    if not funnel_path.exists():
        return None
    missing = check_output(out)
    if missing:
        print(f"{out}: {', '.join(missing)} is missing and made again")
        funnel_path.unlink()
        return None
    return read_json(funnel_path, "stage", "counts")


def check_output(out):
    """Compare an output with the hashes in its funnel, if it has one.

    Returns the names of missing files that can be made again from what is there. Raises InputError
    with the remedy for files that have changed, and for missing records.
    """
    out = Path(out)
    funnel_path = sidecar(out, "funnel")
    if not funnel_path.exists():
        return []
    missing = []
    for name, then in read_json(funnel_path, "stage", "counts").get("output", {}).items():
        path = out.parent / name
        if not path.exists() and path.suffix != ".jsonl":
            missing.append(name)
        elif not path.exists():
            raise _damaged(out, f"{path} is missing, which `{_maker(out)}` made")
        elif fingerprint(path) != then:
            raise _damaged(out, f"{path} has changed since `{_maker(out)}` made it")
    return missing


def _damaged(out, problem):
    return InputError(f"{problem}. Delete {out} and run the same command again "
                      "(or that stage, if you run them one by one).")


def _maker(out):
    """The stage that made an output, as its record names it."""
    config_path = sidecar(out, "config")
    if not config_path.exists():
        return "its stage"
    return read_json(config_path).get("made by", "its stage")


def _check_input(name):
    """Raise InputError for a missing data file or a damaged output of another stage."""
    path = Path(name)
    if path.suffix in ROW_FORMATS and not path.is_file():
        problem = "a folder, not a file" if path.is_dir() else "no such file"
        raise InputError(
            f"{path}: {problem}. (Published sets: `python -m benchmarks.fetch NAME`.)"
        )
    if not path.exists() and not is_hub_name(name):
        raise InputError(f"{name}: no such file or directory. Check the path.")
    missing = check_output(path)
    if missing:
        raise _damaged(path, f"{path.parent / missing[0]} is missing, which `{_maker(path)}` made")
