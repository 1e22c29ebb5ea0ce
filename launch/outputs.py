"""What there is already of a run: was it made with the same settings and code?"""
import importlib
from pathlib import Path

from intervene import STAGES
from launch.check_judges import judges_of
from launch.stages import BENCHMARKS, EVALUATION, own_program
from support.code_hash import code_hashes
from support.files import read_json
from support.record import changed_code, changed_settings, deciding_flags, fingerprint
from support.stages import sidecar

# Flags that a record holds in another form than the command line.
RECORDED_OTHERWISE = (
    "judge",
    "judge_model",
    "judge_kind",
    "judge_concurrency",
    "cue_judge",
    "cue_judge_model",
    "eval_judge",
    "eval_judge_model",
    "data_dir",
    "allow_code_execution",
    "in_flight",
)


def place(path):
    """A path in the one form in which two of them can be compared."""
    return Path(path).absolute()


def changes_since(stage, sets, pending):
    """What has changed since a stage made what is there of its output, for which it would refuse
    to add to it: (settings, source files) as lists of phrases.

    sets: of an evaluation, [(name, kind, file)]; pending: what unfinished stages write, so that
    nobody knows yet what will be in it.
    """
    out = stage.out
    if out is None or not _holds_something(out) or not sidecar(out, "config").exists():
        return [], []
    old = read_json(sidecar(out, "config"), "flags", "inputs")
    inputs = _inputs(stage, sets)
    if inputs is None or len(inputs) != len(old["inputs"]):
        return [], []
    hashes = {}
    for path, then in zip(inputs, old["inputs"].values()):
        hashes[str(path)] = then if place(path) in pending else fingerprint(path)
    new = {"made by": old.get("made by"), "flags": _compared_flags(stage), "inputs": hashes}
    settings = changed_settings(old, new)
    if settings or stage.flags.accept_code_change:
        return settings, []
    program = importlib.import_module(own_program(stage.command)[0]).__file__
    return [], list(changed_code(old, {"code": code_hashes(program)}))


def report_changes(changes, findings):
    """Report outputs that are there already, but that a stage would refuse to add to.

    changes: {output: (settings, source files)}, see `changes_since`.
    """
    for number, what in enumerate(("settings", "code")):
        changed = {}  # phrases: outputs
        for out, phrases in changes.items():
            if phrases[number]:
                changed.setdefault("; ".join(phrases[number]), []).append(out)
        for phrases, outs in changed.items():
            more = f" and {len(outs) - 1} more" if len(outs) > 1 else ""
            remedy = f"Use another run folder (RUN=...), or delete {'them' if more else outs[0]}"
            if what == "code":
                remedy += ", or keep what is there with ACCEPT_CODE_CHANGE=1"
            findings.problem(f"RUN: {outs[0]}{more}, made with other {what} ({phrases}). {remedy}.")


def _holds_something(out):
    if out.is_dir():
        return any(out.iterdir())
    return out.exists() and out.stat().st_size > 0


def _inputs(stage, sets):
    """The inputs that a stage records, in its order; None for other programs."""
    flags = vars(stage.flags)
    if stage.program.startswith("intervene.py"):
        files = STAGES[flags["command"]][1]
        return [flags[name] for name in ("model", "triggers", *files) if name in flags]
    if stage.program in EVALUATION:
        return [flags["model"], *(path for _, _, path in sets)]
    if stage.program == "ipo.py train":
        inputs = [flags["model"], *flags["pairs"]]
        if flags["reference"] not in (None, flags["model"]):
            inputs.append(flags["reference"])
        return inputs
    return None


def _compared_flags(stage):
    """The flags that a record holds as they stand on the command line."""
    flags = deciding_flags(vars(stage.flags))
    for name in RECORDED_OTHERWISE:
        flags.pop(name, None)
    if stage.judges:
        main, other = judges_of(stage)
        if other is None and not main.path:  # else its name says what is in the model's files
            flags["judge"] = main.make().name
    if stage.program == BENCHMARKS:
        flags.pop("samples", None)  # recorded set by set
    if flags.get("batch_size") == "auto":
        del flags["batch_size"]  # recorded as the number that it came to
    return flags
