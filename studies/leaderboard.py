"""Methods of safe reasoning side by side: every one at several learning rates, with several seeds.

    bash run.sh leaderboard                   # all of it; it picks up where it left off
    python -m studies.leaderboard --help

A method trades safety against help and ability, and its learning rate says how much. So each method
of `studies/methods/` trains at several rates with several seeds, and each of these models is
measured on two groups of sets: validation sets (`--valid`), to choose a rate by, and held-out sets
(`--set`), to report. A seed decides the base model's rollouts, the order of training and the
evaluation's samples. Models are appended to `results.jsonl` as they are done;
`python -m studies.frontier` makes the tables and the figure from it.
"""
import argparse
import contextlib
import os
import shlex
import shutil
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

import evaluate
import intervene
from data import Appender, load_prompts, load_triggers
from ipo import refuse_below
from studies.axes import AXES, complete_share, mean_over_sets
from studies.common import load_instruction
from studies.lab import METHODS, Lab, Settings, code_of, load_methods
from studies.workers import Job, run_jobs
from support.errors import InputError, ServiceError, exit_cleanly
from support.files import cut_torn_line, digest, read_json, read_jsonl, write_jsonl
from support.stages import add_stage_flags, open_stage

# CHOICE: the papers' rates are those of large models. These suit the tiny one: from little effect
# to damage.
DEFAULT_RATES = ["6e-5", "9e-5", "1.3e-4"]
# Flags that may change: a finished sweep can grow, its results are kept by their values; and how
# its commands are started decides none of them.
FREE_FLAGS = ("methods", "again", "lrs", "seeds", "workers", "launch", "runner")
SERVED_JUDGE = "{judge}"  # stands for the address of a server that launch.run starts


class Sets(NamedTuple):
    """What every model is measured on, each as NAME=KIND:FILE, and the words for its judge."""
    valid: list
    held_out: list
    judging: list


class Trial(NamedTuple):
    """One model: its method, learning rate (as written in the flag, or "-") and seed."""
    method: str
    lr: str
    seed: int

    @property
    def id(self):
        return f"{self.method} lr={self.lr} seed={self.seed}"


# ------------------------------------------------------------------------- in a worker's process

def run_trial(settings, sets, trial):
    """The job that makes and evaluates one model; returns its record.

    What its commands print goes to a file. Raises errors that another process can be told of.
    """
    lab = Lab(settings, trial.method, trial.lr, trial.seed)
    lab.out.mkdir(parents=True, exist_ok=True)
    with (
        open(lab.out / "log.txt", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        model = settings.model
        described = {"title": "base", "paper": "", "claims": ""}
        code = ""
        if trial.method != "base":
            method = load_methods()[trial.method]
            model = make_model(method, lab)
            described = {field: getattr(method, field) for field in described}
            code = code_of(method, lab.programs())
        cost = lab.cost()
        programs = lab.programs()
        evaluation = evaluate_model(lab, sets, model)
    return {
        "id": trial.id,
        **trial._asdict(),
        **described,
        **split_metrics(read_metrics(evaluation), sets.valid),
        **cost,
        "code": code,
        "programs": programs,
        "evaluation": evaluation.relative_to(settings.out).as_posix(),
    }


def make_model(method, lab):
    """The model of a method. Raises InputError for whatever goes wrong in the method's own code."""
    try:
        return method.make(lab)
    except InputError as error:
        raise InputError(
            f"{method.name}: {error} (For the leaderboard: AGAIN={method.name} makes its models "
            "again, METHODS=... can leave it out.)"
        ) from None
    except ServiceError:
        raise
    except Exception as error:
        traceback.print_exc()  # into the log
        raise InputError(
            f"{method.name}: {type(error).__name__}: {error}. {lab.out}/log.txt has the traceback."
        ) from None


def evaluate_model(lab, sets, model):
    """Validation and held-out sets in one command, so that the model is loaded once."""
    return lab.run(
        "evaluate", "run", "--model", model, *lab.sampling_flags, *sets.judging,
        "--set", *sets.valid, *sets.held_out, "--out", lab.out / "eval",
    )


def split_metrics(metrics, valid):
    """Metrics of validation sets and of the others: {"validation": ..., "test": ...}."""
    valid_names = {name for name, _, _ in evaluate.parse_sets(valid)}
    parts = {"validation": {}, "test": {}}
    for key, value in metrics.items():
        name = key.partition("/")[0]
        part = "validation" if name in valid_names else "test"
        parts[part][key] = value
    return parts


def read_metrics(folder):
    """The values of the metrics of AXES in a finished evaluation: {"SET/METRIC": value}.

    They are of all traces, the truncated ones among them. Raises InputError where there is no
    value for another reason than that a model of too high a learning rate never comes to a
    response.
    """
    sets = read_json(folder / "metrics.json", "sets")["sets"]
    metrics = {}
    for name, entry in sets.items():
        for metric in AXES.values():
            if metric not in entry:
                continue
            estimate = entry[metric]
            value = estimate["value"]
            if value is None and (estimate["n_unjudged"] or not estimate["n_truncated"]):
                raise InputError(
                    f"{folder}: {name}/{metric} has no verdicts at all. Check the judge and "
                    "--max-new-tokens, delete the folder, and start again."
                )
            # Reasoning and accuracy have the values of truncated traces already.
            metrics[f"{name}/{metric}"] = (value or 0.0) * complete_share(estimate, metric)
    return metrics


# ---------------------------------------------------------------------------- edited methods

def drop_methods(out, names):
    """Remove the results and the models of some methods, so that they are made again."""
    # The models first: after a kill in between, the next call still finds the method edited.
    for folder in sorted(out.glob("seed*/*")):
        if method_of_folder(folder.name, METHODS) in names:
            print(f"removed, to be made again: {folder}", flush=True)
            shutil.rmtree(folder)
    path = out / "results.jsonl"
    kept = [record for record in read_jsonl(path) if record["method"] not in names]
    write_jsonl(path, kept)


def method_of_folder(name, methods):
    """The one of some methods that a model's folder belongs to, None if it is of none of them.

    A folder is called NAME-RATE, or NAME where nothing is trained.

    >>> methods = ["ipo", "ipo-both", "safepath-zero-shot"]
    >>> [method_of_folder(name, methods) for name in ("ipo-both-1.3e-4", "safepath-zero-shot")]
    ['ipo-both', 'safepath-zero-shot']
    """
    if name in methods:
        return name
    for method in methods:
        if name.startswith(f"{method}-") and is_number(name.removeprefix(f"{method}-")):
            return method
    return None


def is_number(text):
    """Whether a text is a number, as a learning rate is written."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def refuse_edited(path):
    """Raise InputError where a method, or a program that it runs, was edited after its models.

    Methods whose file is gone are left alone.
    """
    edited = set()
    codes = {}  # of a method and its programs: all its models have the same
    for record in read_jsonl(path):
        method = METHODS.get(record["method"])
        if not method:
            continue
        key = (method.name, *record["programs"])
        if key not in codes:
            codes[key] = code_of(method, record["programs"])
        if codes[key] != record["code"]:
            edited.add(method.name)
    if edited:
        names = " ".join(sorted(edited))
        raise InputError(
            f"{path}: {names}: the code was edited since these models were made. Make them again "
            f"with --again {names} (run.sh: AGAIN=\"{names}\"), or keep them with "
            "--accept-code-change (run.sh: ACCEPT_CODE_CHANGE=1)."
        )


# ------------------------------------------------------------------------------------- the sweep

def all_trials(methods, lrs, seeds):
    """The trials of a sweep in order: after a kill, whole seeds and rates are there to compare."""
    trials = []
    for seed in seeds:
        trials.append(Trial("base", "-", seed))
        for name in methods:
            if not METHODS[name].trains:
                trials.append(Trial(name, "-", seed))
        for lr in lrs:
            for name in methods:
                if METHODS[name].trains:
                    trials.append(Trial(name, lr, seed))
    return trials


def run_sweep(settings, sets, trials, workers):
    """Run the trials that are not in `results.jsonl` yet, and add them as they are done.

    Only this process writes to that file.
    """
    results = Appender(settings.out / "results.jsonl")
    todo = [trial for trial in trials if trial.id not in results.done]
    jobs = [Job(trial.id, (), run_trial, (settings, sets, trial)) for trial in todo]
    started = time.monotonic()
    done = len(trials) - len(todo)
    print(f"{done} of {len(trials)} models are done", flush=True)
    with contextlib.closing(run_jobs(jobs, workers)) as finished:
        for number, (_, record) in enumerate(finished, 1):
            results.write(record)
            left = (time.monotonic() - started) / number * (len(jobs) - number)
            print(f"[{done + number}/{len(trials)}] {describe(record)} ({left / 60:.0f} min left)",
                  flush=True)
    results.close()


def describe(record):
    """A trial and its means over held-out sets as one line.

    >>> trial = {"id": "ipo lr=1e-4 seed=1"}
    >>> describe({**trial, "test": {"a/reasoning": 0.1, "b/reasoning": 0.2, "c/compliance": 1}})
    'ipo lr=1e-4 seed=1: harm 15.0%, compliance 100.0%'
    """
    figures = []
    for axis in ("harm", "compliance", "capability"):
        value = mean_over_sets(record["test"], AXES[axis])
        if value is not None:
            figures.append(f"{axis} {100 * value:.1f}%")
    return f"{record['id']}: {', '.join(figures)}"


# -------------------------------------------------------------------------------- the command line

def build_parser():
    """The command line of this study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.leaderboard",
        description="Methods of safe reasoning side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_stage_flags(parser)
    add = parser.add_argument
    add("--model", required=True, help="base model: directory or hub name")
    add("--prompts", required=True, help="harmful " + intervene.FILES["prompts"])
    add("--benign", default="", help="benign prompts, for methods that need them")
    add("--limit", type=int, default=0, help="use only the first of --prompts; 0 = all")
    for flag, purpose in (("valid", "to choose learning rates by"), ("set", "held out")):
        add(
            f"--{flag}", nargs="+", required=True, metavar="NAME=KIND:FILE",
            help=f"sets {purpose}, as for `evaluate.py run`",
        )
    add(
        "--limit-sets", type=int, default=0,
        help="use only this many prompts of each set, picked by the hash of their ids; 0 = all",
    )
    add("--out", required=True, help="folder for everything")
    add("--methods", nargs="+", default=[], help="methods to compare (default: all)")
    add(
        "--again", nargs="+", default=[],
        help="methods whose models are removed, at all rates and seeds, and made again",
    )
    add("--lrs", nargs="+", type=learning_rate, default=DEFAULT_RATES, help="learning rates")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds to repeat everything with")
    add(
        "--samples", type=int, default=0,
        help="rollouts of a harmful prompt; 0 = one for each trigger",
    )
    add(
        "--grpo-epochs", type=int, default=1,
        help="passes of GRPO over the prompts, 12 generations each",
    )
    for flag, default, purpose in (
        ("sampling", "", "whatever samples"),
        ("served", "", "what may sample from a server, as in --server URL"),
        ("judging", "--judge rules", "the judge that builds the data"),
        ("eval-judging", "--judge rules", "`evaluate.py run` for its judge"),
        ("train-args", "", "every training"),
        ("runner", "", "launch.run, which then starts every command"),
    ):
        add(
            f"--{flag}", type=shlex.split, default=default,
            help=f"flags of {purpose}, as one word: --{flag}='--x 1'",
        )
    add("--triggers", default=intervene.DEFAULT_TRIGGERS, help="safety triggers, one per line")
    add(
        "--instruction", default="prompts/instruction.txt",
        help="file with a sentence that asks to think of safety first",
    )
    add(
        "--teacher", default="",
        help="JSON lines with prompt and completion: somebody else's safe traces",
    )
    add(
        "--launch", type=shlex.split, default="",
        help="with --runner: words that start a program on all GPUs, as in 'torchrun ...'",
    )
    add(
        "--workers", type=int, default=default_workers(),
        help="processes that train and evaluate at the same time, with one thread each",
    )
    return parser


def default_workers():
    """One for each GPU, or for each core where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # a container may have fewer cores than its machine
    else:
        return os.cpu_count()


def learning_rate(text):
    """A value of --lrs: the text as it is written, because it names folders and records."""
    float(text)  # argparse turns its ValueError into a line
    return text


def methods_of(names, benign, teacher):
    """The names of the methods to compare; without names all that these files are enough for.

    Raises InputError for a name that no file of studies/methods/ has, and for a named method that
    lacks a file.
    """
    known = load_methods()
    for name in names:
        if name not in known:
            raise InputError(
                f"--methods {name}: there is no such method. There are: {', '.join(known)}."
            )
    chosen = []
    for name, method in known.items():
        lacks = []
        if method.needs_benign and not benign:
            lacks.append("benign prompts (--benign)")
        if method.needs_teacher and not teacher:
            lacks.append("a teacher's traces (--teacher)")
        if name in names and lacks:
            raise InputError(f"--methods {name} needs {' and '.join(lacks)}.")
        if not lacks:
            chosen.append(name)
    return list(dict.fromkeys(names)) or chosen


def refuse_repeated(flags, *names):
    """Raise InputError where one of the named flags has a number twice, as in 1e-4 and 0.0001."""
    for name in names:
        seen = set()
        for value in flags[name]:
            number = float(value)
            if number in seen:
                raise InputError(f"--{name}: {value} comes twice; give each value once.")
            seen.add(number)


def thin_sets(specs, limit, folder):
    """The same sets with at most `limit` prompts (0: all of them), written to files in a folder.

    The hash of the id picks them, so that no kind of prompt is left out because of its place.
    """
    if not limit:
        return specs
    thinned = []
    for name, kind, path in evaluate.parse_sets(specs):
        in_any_order = sorted(load_prompts(path), key=lambda prompt: digest(prompt["id"]))
        thin_path = folder / f"{name}.jsonl"
        write_jsonl(thin_path, in_any_order[:limit])
        thinned.append(f"{name}={kind}:{thin_path}")
    return thinned


def judge_names(judging, eval_judging, out):
    """Names of the judge that the data is built with and of the one that evaluates.

    They hold a hash of rules or prompts, so that results by different ones are never mixed. Of a
    judge that launch.run serves there is none: its model is among the flags.
    """
    if SERVED_JUDGE in judging:
        return None
    parser = argparse.ArgumentParser(prog="--judging", add_help=False)
    intervene.add_judge_flags(parser)
    evaluate.add_eval_judge_flags(parser)
    parser.set_defaults(out=f"{out}/results.jsonl")  # its cache of replies lies beside that
    builds = intervene.judge_from_flags(parser.parse_args(judging))
    evaluates = evaluate.eval_judge_from_flags(parser.parse_args(eval_judging), f"{out}/eval")
    return [builds.name, evaluates.name]


def main(argv=None):
    """Run the sweep, or what is left of it."""
    args = build_parser().parse_args(argv)
    refuse_below(1, vars(args), "workers", "grpo_epochs")
    refuse_below(0, vars(args), "limit", "limit_sets", "samples")
    refuse_repeated(vars(args), "lrs", "seeds")
    methods = methods_of(args.methods, args.benign, args.teacher)
    for name in args.again:
        if name not in methods:
            raise InputError(
                f"--again {name}: not among the methods to make ({', '.join(methods)})."
            )
    load_instruction(args.instruction)
    both = evaluate.parse_sets([*args.valid, *args.set])  # together, as they are evaluated
    evaluate.load_sets(both)

    flags = intervene.recorded_flags(args)
    for name in FREE_FLAGS:
        del flags[name]
    flags["served"] = bool(args.served)
    flags["judges"] = judge_names(args.judging, args.eval_judging, args.out)
    files = [args.prompts, args.benign, args.triggers, args.instruction, args.teacher]
    inputs = [args.model, *filter(None, files), *(path for *_, path in both)]
    open_stage(__file__, args.out, flags, inputs)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    cut_torn_line(out / "results.jsonl")
    if args.again:
        drop_methods(out, args.again)
    if not args.accept_code_change:
        refuse_edited(out / "results.jsonl")
    settings = Settings(
        model=args.model,
        out=out,
        prompts=args.prompts,
        benign=args.benign,
        limit=args.limit,
        samples=args.samples or len(load_triggers(args.triggers)),
        triggers=args.triggers,
        instruction=args.instruction,
        teacher=args.teacher,
        sampling=args.sampling,
        served=args.served,
        judging=args.judging,
        train_args=args.train_args,
        grpo_epochs=args.grpo_epochs,
        stage_flags=("--accept-code-change",) if args.accept_code_change else (),
        launch=tuple(args.launch),
        runner=tuple(args.runner),
    )
    sets = Sets(
        valid=thin_sets(args.valid, args.limit_sets, out / "sets"),
        held_out=thin_sets(args.set, args.limit_sets, out / "sets"),
        judging=args.eval_judging,
    )
    workers = 1 if args.runner else args.workers  # else they would share GPUs and ports
    run_sweep(settings, sets, all_trials(methods, args.lrs, args.seeds), workers)


if __name__ == "__main__":
    exit_cleanly(main)
