"""The paper's baselines beside IPO, from one base model on the same prompts: Tables 1 to 3.

    bash run.sh baselines                     # all of it; it picks up where it left off
    python -m studies.baselines run --help
    python -m studies.baselines pairs --model M --traces T --verdicts V --out pairs.jsonl

A method trades safety against help and ability, and its learning rate says how much. So each method
trains at several rates with several seeds, and each of these models is measured on two groups of
sets: validation sets (`--valid`), to choose a rate by, and held-out sets (`--set`), to report. A
seed decides the base model's rollouts, the order of training and the evaluation's samples. Models
are appended to `results.jsonl` as they are done; `python -m studies.frontier` makes the table and
the figure from it. `pairs` makes pairs of independent rollouts.
"""
import argparse
import contextlib
import functools
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

import evaluate
import intervene
import ipo
from data import Appender, load_prompts, load_triggers
from model import eos_ids, load_tokenizer
from studies import grpo, sft
from studies.workers import Job, run_jobs
from support.errors import InputError, ServiceError, exit_cleanly
from support.files import digest, read_json, read_jsonl, write_jsonl
from support.stages import add_stage_flags, open_stage, run_stage, sidecar

METHODS = {
    "sft": "SFT on chosen",
    "dpo": "DPO, whole trajectory",
    "dpo-independent": "DPO, independent rollouts",
    "grpo-response": "GRPO, I[y safe]",
    "grpo-gap": "GRPO, I[z safe] - I[y safe]",
    "grpo-reasoning": "GRPO, I[z safe]",
    "ipo": "IPO, stage 1",
    "ipo-both": "IPO, both stages",
    "ipo-n2": "IPO, stage 1, two interventions",
}
DEFAULT_METHODS = [method for method in METHODS if method != "ipo-n2"]
# CHOICE: the paper gives no rates. These suit the tiny model: from hardly any effect to damage.
DEFAULT_RATES = ["4e-5", "6e-5", "9e-5", "1.3e-4", "2e-4"]
AXES = {  # what a point says: the mean of a metric over the sets that have it
    "harm": "reasoning",
    "compliance": "compliance",
    "capability": "accuracy",
    "response harm": "response",
}
TIMES = ("seconds", "cpu_seconds")  # of the data and the training, not the evaluation
# Flags that may change: a finished sweep can grow, its results are kept by their values; and how
# its commands are started decides none of them.
FREE_FLAGS = ("methods", "lrs", "seeds", "workers", "launch", "runner")


class Sweep(NamedTuple):
    """What all trainings and evaluations have in common; the lists are words to pass on."""
    model: str
    out: Path
    prompts: str
    benign: str
    limit: int
    samples: int         # rollouts of a harmful prompt
    triggers: str
    sampling: list       # to every command that samples
    served: list         # to those that may sample from a server: `--server URL`, or none
    judging: list        # to those that build the data, for their judge
    eval_judging: list   # to `evaluate.py run`, for its judge
    train_args: list     # to every training
    grpo_epochs: int
    valid: list          # NAME=KIND:FILE
    held_out: list
    stage_flags: tuple = ()  # to all commands
    launch: tuple = ()   # what starts a training, or a sampling without a server, on all GPUs
    runner: tuple = ()   # flags of `launch.run`, which then starts each command


class Trial(NamedTuple):
    """One model: its method, learning rate (as written in the flag) and seed."""
    method: str
    lr: str
    seed: int

    @property
    def id(self):
        return f"{self.method} lr={self.lr} seed={self.seed}"


class Command(NamedTuple):
    """A command line of one of PROGRAMS."""
    program: str
    words: list

    @property
    def out(self):
        """The path that it makes."""
        return Path(self.words[self.words.index("--out") + 1])


# ------------------------------------------------------------------------- independent rollouts

def independent_pairs(traces, verdicts, tokenizer, eos):
    """DPO's other reading: a safe and an unsafe rollout of one prompt that share only the prompt.

    Safe: complete, reasoning and response safe; unsafe: complete, reasoning unsafe. CHOICE: every
    unsafe rollout makes one pair, with its prompt's safe ones in turn; a prompt that lacks either
    kind makes none. Returns (pairs, counts).
    """
    verdict_of = {verdict["id"]: verdict for verdict in verdicts}
    safe = defaultdict(list)  # traces by prompt
    unsafe = defaultdict(list)
    for trace in traces:
        if trace["truncated"]:
            continue
        verdict = verdict_of[trace["id"]]
        if verdict["reasoning_safe"] is False:
            unsafe[trace["prompt_id"]].append(trace)
        elif verdict["reasoning_safe"] and verdict["response_safe"]:
            safe[trace["prompt_id"]].append(trace)

    prompts = dict.fromkeys(trace["prompt_id"] for trace in traces)
    with_both = [prompt for prompt in prompts if prompt in safe and prompt in unsafe]
    pairs = []
    for prompt in with_both:
        for k, rejected in enumerate(unsafe[prompt]):
            chosen = safe[prompt][k % len(safe[prompt])]
            renamed = {**chosen, "id": f"{rejected['id']}@independent"}
            origin = {"source": "independent", "interventions": 0}
            pairs.append(intervene.make_pair(tokenizer, eos, rejected, renamed, 0, "", **origin))
    counts = {
        "prompts": len(prompts),
        "with a safe rollout": len(safe),
        "with both kinds": len(with_both),
        "pairs": len(pairs),
    }
    return pairs, counts


def write_independent_pairs(out, model, traces, verdicts):
    """The stage `pairs`, from files of traces and verdicts to a file of pairs.

    Returns (counts, no further entries of the funnel).
    """
    tokenizer = load_tokenizer(model)
    eos = eos_ids(model, tokenizer)
    pairs, counts = independent_pairs(read_jsonl(traces), read_jsonl(verdicts), tokenizer, eos)
    write_jsonl(out, pairs)
    return counts, {}


# ---------------------------------------------------------------------------------- the commands
# Of one seed and one trial, as run.sh has them.

JUDGED = ("rollouts", "steps", "verdicts")
PAIRS = {"dpo-independent": "independent", "ipo-n2": "pairs_n2"}  # of all others: "pairs"


def data_needed(method):
    """The names of the files that a method trains on and what they are made from, in order."""
    if method.startswith("grpo-") or method == "base":
        return []
    needed = [*JUDGED, PAIRS.get(method, "pairs")]
    if method == "ipo-both":
        needed.append("benign_base")
    return needed


def seed_folder(sweep, seed):
    """The folder of everything that is made with a seed."""
    return sweep.out / f"seed{seed}"


def trial_folder(sweep, trial):
    """The folder of one model and its evaluation."""
    name = trial.method
    if name != "base":
        name += f"-{trial.lr}"
    return seed_folder(sweep, trial.seed) / name


def data_file(sweep, seed, name):
    """One of the files that the methods of a seed share."""
    return seed_folder(sweep, seed) / f"{name}.jsonl"


def make_command(sweep, program, *words):
    """A Command, with the flags that all have."""
    return Command(program, [str(word) for word in (*words, *sweep.stage_flags)])


def data_commands(sweep, seed):
    """{name: the command that makes that file of a seed}, in an order in which they can run."""
    file = functools.partial(data_file, sweep, seed)
    make = functools.partial(make_command, sweep)
    base = ["--model", sweep.model]
    sampling = [*sweep.sampling, *sweep.served, "--seed", seed]
    judged = ["--traces", file("rollouts"), "--verdicts", file("verdicts")]
    interventions = [
        "pairs", *base, *sampling, *sweep.judging, "--triggers", sweep.triggers, *judged,
        "--steps", file("steps"),
    ]
    return {
        "rollouts": make(
            "intervene", "rollouts", *base, *sampling, "--samples", sweep.samples,
            "--prompts", sweep.prompts, "--limit", sweep.limit, "--out", file("rollouts"),
        ),
        "steps": make(
            "intervene", "steps", "--traces", file("rollouts"), "--out", file("steps"),
        ),
        "verdicts": make(
            "intervene", "judge", *sweep.judging, "--traces", file("rollouts"),
            "--steps", file("steps"), "--out", file("verdicts"),
        ),
        "pairs": make("intervene", *interventions, "--out", file("pairs")),
        "pairs_n2": make(
            "intervene", *interventions, "--max-interventions", 2, "--out", file("pairs_n2"),
        ),
        "independent": make("baselines", "pairs", *base, *judged, "--out", file("independent")),
        "benign_base": make(
            "intervene", "rollouts", *base, *sampling, "--samples", 1,
            "--prompts", sweep.benign, "--limit", sweep.limit, "--out", file("benign_base"),
        ),
    }


def training_commands(sweep, trial):
    """The commands that train one model, the last of which writes it; none for `base`."""
    make = functools.partial(make_command, sweep)
    folder = trial_folder(sweep, trial)
    shared = [
        *sweep.train_args, "--lr", trial.lr, "--seed", trial.seed, "--out", folder / "model",
    ]
    from_base = ["--model", sweep.model, *shared]
    if trial.method == "base":
        return []
    if trial.method.startswith("grpo-"):
        return [make(
            "grpo", *sweep.sampling, *sweep.judging, *from_base, "--prompts", sweep.prompts,
            "--limit", sweep.limit, "--reward", trial.method.removeprefix("grpo-"),
            "--epochs", sweep.grpo_epochs,
        )]
    if trial.method == "ipo-both":
        return second_stage_commands(sweep, trial, shared)
    data = data_file(sweep, trial.seed, PAIRS.get(trial.method, "pairs"))
    if trial.method == "sft":
        return [make("sft", "--data", data, *from_base)]
    scoring = []
    if trial.method == "dpo":
        scoring = ["--score-from", "prompt"]
    return [make("ipo", "train", "--pairs", data, *scoring, *from_base)]


def second_stage_commands(sweep, trial, training):
    """Both stages of IPO at one rate; the first is that of the method `ipo`, if it is there.

    training: the flags of the second training that others have too.
    """
    make = functools.partial(make_command, sweep)
    folder = trial_folder(sweep, trial)
    file = functools.partial(data_file, sweep, trial.seed)
    first_stage = training_commands(sweep, trial._replace(method="ipo"))
    stage1 = ["--model", first_stage[-1].out]
    sampling = [*sweep.sampling, *sweep.served, "--seed", trial.seed]
    traces = folder / "benign_stage1.jsonl"
    pairs = folder / "benign_pairs.jsonl"
    return [
        *first_stage,
        make(
            "intervene", "rollouts", *stage1, *sampling, "--samples", 1,
            "--prompts", sweep.benign, "--limit", sweep.limit, "--out", traces,
        ),
        make(
            "intervene", "benign", *stage1, *sampling, *sweep.judging,
            "--triggers", sweep.triggers, "--base", file("benign_base"), "--traces", traces,
            "--out", pairs,
        ),
        make(
            "ipo", "train", *stage1, "--reference", sweep.model,
            "--pairs", file("pairs"), pairs, *training,
        ),
    ]


def evaluation_command(sweep, trial):
    """Validation and held-out sets in one command, so that the model is loaded once."""
    model = sweep.model
    if trial.method != "base":
        model = trial_folder(sweep, trial) / "model"
    return make_command(
        sweep, "evaluate", "run", "--model", model, *sweep.sampling, *sweep.served,
        "--seed", trial.seed,
        *sweep.eval_judging, "--set", *sweep.valid, *sweep.held_out,
        "--out", trial_folder(sweep, trial) / "eval",
    )


def commands_behind(sweep, trial):
    """All commands that a model is made by, those of its data among them."""
    data = data_commands(sweep, trial.seed)
    shared = [data[name] for name in data_needed(trial.method)]
    return [*shared, *training_commands(sweep, trial)]


# ------------------------------------------------------------------------- in a worker's process

def run_commands(sweep, commands, log_path):
    """Run commands in this process, skipping what is finished; returns a record of each one's time.

    What they print goes to a file. Raises errors that another process can be told of.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    spent = []
    with (
        open(log_path, "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        for command in commands:
            killed_before = sidecar(command.out, "config").exists()
            wall = time.monotonic()
            cpu = cpu_seconds()
            if sweep.runner:
                run_by_runner(sweep, command, log)
            else:
                run_command(command, log_path)
            spent.append({
                "id": command.out.relative_to(sweep.out).as_posix(),
                "killed_before": killed_before,  # then only the time since the last start counts
                "seconds": round(time.monotonic() - wall, 2),
                "cpu_seconds": round(cpu_seconds() - cpu, 2),
            })
    return spent


def cpu_seconds():
    """Processor time of this process and of those that it has started and waited for."""
    return sum(os.times()[:4])


def run_command(command, log_path):
    """Run one command; an error that has more to it than a message becomes a plain one."""
    try:
        PROGRAMS[command.program](command.words)
    except ServiceError as error:
        raise ServiceError(str(error)) from None
    except SystemExit:
        raise InputError(
            f"{command.program} refused its flags; the end of {log_path} says why."
        ) from None


def run_by_runner(sweep, command, log):
    """Run one command as run.sh runs a stage: on all GPUs, or from a server started for it."""
    line = f"{command.out}: {shlex.join(start_words(sweep, command))}"
    runner = [sys.executable, "-m", "launch.run", "--separate", "--run", str(sweep.out)]
    status = subprocess.run([*runner, *sweep.runner, line], stdout=log, stderr=log).returncode
    if status:
        raise ServiceError(f"{command.out}: status {status}; the end of {log.name} says why.")


def start_words(sweep, command):
    """A command as the words of a shell, with what starts it on all GPUs if it can use them.

    >>> command = Command("sft", ["--out", "x"])
    >>> sweep = Sweep(*[None] * len(Sweep._fields))._replace(launch=("torchrun",))
    >>> start_words(sweep, command)
    ['torchrun', '-m', 'studies.sft', '--out', 'x']
    """
    program = [f"{command.program}.py"]
    if command.program in ("baselines", "grpo", "sft"):
        program = ["-m", f"studies.{command.program}"]
    start = list(sweep.launch) or [sys.executable]
    if command.program in ("baselines", "grpo") or "--server" in command.words:
        start = [sys.executable]
    return [*start, *program, *command.words]


def make_data(sweep, seed, names):
    """The job that makes the files of a seed; returns (no record, times)."""
    commands = data_commands(sweep, seed)
    wanted = [command for name, command in commands.items() if name in names]
    return None, run_commands(sweep, wanted, seed_folder(sweep, seed) / "log.txt")


def run_trial(sweep, trial):
    """The job that trains and evaluates one model; returns (its record, times)."""
    evaluation = evaluation_command(sweep, trial)
    commands = [*training_commands(sweep, trial), evaluation]
    spent = run_commands(sweep, commands, trial_folder(sweep, trial) / "log.txt")
    metrics = read_metrics(evaluation.out)
    valid_names = {name for name, _, _ in evaluate.parse_sets(sweep.valid)}
    parts = {"validation": {}, "test": {}}
    for key, value in metrics.items():
        name = key.partition("/")[0]
        part = "validation" if name in valid_names else "test"
        parts[part][key] = value
    record = {
        "id": trial.id,
        **trial._asdict(),
        **parts,
        **count_costs(sweep, trial),
        "evaluation": evaluation.out.relative_to(sweep.out).as_posix(),
    }
    return record, spent


def read_metrics(folder):
    """The values of the metrics of AXES in a finished evaluation: {"SET/METRIC": value}.

    They are of all traces, the truncated ones among them: see `value_of`, which raises InputError.
    """
    sets = read_json(folder / "metrics.json", "sets")["sets"]
    metrics = {}
    for name, entry in sets.items():
        for metric in AXES.values():
            if metric in entry:
                metrics[f"{name}/{metric}"] = value_of(entry[metric], folder, f"{name}/{metric}")
    return metrics


def value_of(estimate, folder, metric):
    """The value of an estimate of `evaluate.metric_estimate`, over truncated traces as well.

    metric: "SET/METRIC". Raises InputError where there is no value for another reason than that a
    model of too high a learning rate never comes to a response.

    >>> value_of({"value": 0.5, "n": 6, "n_unjudged": 0, "n_truncated": 2}, "eval", "b/compliance")
    0.375
    """
    n = estimate["n"]
    n_truncated = estimate["n_truncated"]
    value = estimate["value"]
    if value is None and (estimate["n_unjudged"] or not n_truncated):
        raise InputError(
            f"{folder}: {metric} has no verdicts at all. Check the judge and --max-new-tokens, "
            "delete the folder, and start again."
        )
    if metric.endswith(("/compliance", "/response")):
        # CHOICE: a truncated trace has no response, so it neither complies nor does harm. Left out,
        # it would let a model that answers one prompt in ten look compliant.
        return (value or 0.0) * n / (n + n_truncated)
    return value  # reasoning and accuracy have the values of truncated traces already


def mean_over_sets(metrics, metric):
    """The mean of a metric over the sets that have it; None without any.

    >>> mean_over_sets({"a/accuracy": 0.5, "b/accuracy": 1.0, "b/compliance": 0.0}, "accuracy")
    0.75
    """
    values = []
    for key, value in metrics.items():
        if key.partition("/")[2] == metric:
            values.append(value)
    return mean(values) if values else None


# ------------------------------------------------------------------------------------- the costs

def count_costs(sweep, trial):
    """Generations and judge calls behind one model: of its data and training, not the evaluation.

    They are counted from what was written, so that a kill loses none.
    """
    generations = 0
    judge_calls = 0
    if trial.method.startswith("grpo-"):
        for line in read_jsonl(trial_folder(sweep, trial) / "model" / "metrics.jsonl"):
            generations += line["generations"]
            judge_calls += line["judge_calls"]
    for name in data_needed(trial.method):
        path = data_file(sweep, trial.seed, name)
        if name == "rollouts":
            # The cue is asked for with the verdicts, but pairs of independent rollouts need none.
            with_cues = trial.method != "dpo-independent"
            verdicts = path.with_name("verdicts.jsonl")
            generations += count_lines(path)
            judge_calls += count_questions(path, verdicts, with_cues)
        if name.startswith("pairs"):
            for traces in path.with_suffix(".rounds").glob("round*.traces.jsonl"):
                verdicts = traces.with_name(traces.name.replace("traces", "verdicts"))
                generations += count_lines(traces)
                judge_calls += count_questions(traces, verdicts)
    if trial.method == "ipo-both":
        made, asked = count_benign_costs(sweep, trial)
        generations += made
        judge_calls += asked
    return {"generations": generations, "judge_calls": judge_calls}


def count_lines(path):
    """The number of records in a file."""
    return len(read_jsonl(path))


def count_complete(path):
    """The number of traces in a file that have a response."""
    return sum(not trace["truncated"] for trace in read_jsonl(path))


def count_questions(traces_path, verdicts_path, with_cues=True):
    """What a judge was asked about traces: reasoning, responses, and cues of unsafe reasoning."""
    verdicts = read_jsonl(verdicts_path)
    cues = 0
    if with_cues:
        cues = sum(verdict["reasoning_safe"] is False for verdict in verdicts)
    return len(verdicts) + count_complete(traces_path) + cues


def count_benign_costs(sweep, trial):
    """(generations, judge calls) of the benign pairs of stage 2; see `intervene.benign_pairs`."""
    base = data_file(sweep, trial.seed, "benign_base")
    pairs = trial_folder(sweep, trial) / "benign_pairs.jsonl"
    stage1 = pairs.with_name("benign_stage1.jsonl")
    counts = read_json(sidecar(pairs, "funnel"), "counts")["counts"]
    generations = count_lines(base) + count_lines(stage1) + counts["reversed"]
    # Compliance of all complete traces, the cue where the model does not refuse by itself, and
    # compliance again after the intervention.
    cues = counts["answered"] - counts["refused now"]
    return generations, count_complete(base) + count_complete(stage1) + cues + counts["reversed"]


def add_times(sweep, record, times):
    """Add TIMES to a trial's record, and "killed_before": whether they are too short.

    times: {path below the sweep's folder: record of run_commands}.
    """
    trial = Trial(record["method"], record["lr"], record["seed"])
    spent = []
    for command in commands_behind(sweep, trial):
        spent.append(times[command.out.relative_to(sweep.out).as_posix()])
    for name in TIMES:
        record[name] = round(sum(entry[name] for entry in spent), 1)
    record["killed_before"] = any(entry["killed_before"] for entry in spent)


# ------------------------------------------------------------------------------------- the sweep

def all_trials(methods, lrs, seeds):
    """The trials of a sweep in order: after a kill, whole seeds and rates are there to compare."""
    trials = []
    for seed in seeds:
        trials.append(Trial("base", "-", seed))
        for lr in lrs:
            for method in METHODS:  # `ipo` before `ipo-both`, which continues it
                if method in methods:
                    trials.append(Trial(method, lr, seed))
    return trials


def jobs_of(sweep, trials):
    """Jobs for trials, with the data of each seed before them."""
    names_of = defaultdict(set)  # seed: files
    for trial in trials:
        names_of[trial.seed].update(data_needed(trial.method))
    jobs = []
    for seed, names in names_of.items():
        if names:
            jobs.append(Job(f"data of seed {seed}", (), make_data, (sweep, seed, names)))
    for trial in trials:
        needs = []
        if data_needed(trial.method):
            needs.append(f"data of seed {trial.seed}")
        if trial.method == "ipo-both":
            needs.append(trial._replace(method="ipo").id)
        jobs.append(Job(trial.id, tuple(needs), run_trial, (sweep, trial)))
    return jobs


def run_sweep(sweep, trials, workers):
    """Run the trials that are not in `results.jsonl` yet, and add them as they are done.

    Only this process writes to that file and to `times.jsonl`.
    """
    results = Appender(sweep.out / "results.jsonl")
    time_log = Appender(sweep.out / "times.jsonl")
    times = {record["id"]: record for record in read_jsonl(time_log.path)}
    todo = [trial for trial in trials if trial.id not in results.done]
    jobs = jobs_of(sweep, todo)
    started = time.monotonic()
    jobs_done = 0
    models_done = len(trials) - len(todo)
    print(f"{models_done} of {len(trials)} models are done", flush=True)
    with contextlib.closing(run_jobs(jobs, workers)) as finished:
        for name, (record, spent) in finished:
            jobs_done += 1
            for entry in spent:
                time_log.write(entry)
                times.setdefault(entry["id"], entry)  # the first is that of the work itself
            line = name
            if record:
                add_times(sweep, record, times)
                results.write(record)
                models_done += 1
                line = f"[{models_done}/{len(trials)}] {describe(record)}"
            left = (time.monotonic() - started) / jobs_done * (len(jobs) - jobs_done)
            print(f"{line} ({left / 60:.0f} min left)", flush=True)
    results.close()
    time_log.close()


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
        prog="python -m studies.baselines", description="The paper's baselines beside IPO.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser(
        "pairs", help="pairs of independent safe and unsafe rollouts of one prompt",
    )
    for flag in ("model", "traces", "verdicts", "out"):
        pairs.add_argument(f"--{flag}", required=True, help=intervene.FILES.get(flag))
    add_stage_flags(pairs)
    run = commands.add_parser(
        "run",
        help="train and evaluate all methods at all rates",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sweep_flags(run)
    return parser


def add_sweep_flags(parser):
    """Flags of the command `run`."""
    add_stage_flags(parser)
    add = parser.add_argument
    add("--model", required=True, help="base model: directory or hub name")
    add("--prompts", required=True, help="harmful " + intervene.FILES["prompts"])
    add("--benign", required=True, help="benign prompts, for stage 2")
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
    add("--methods", nargs="+", default=DEFAULT_METHODS, choices=METHODS, help="methods to compare")
    add("--lrs", nargs="+", type=learning_rate, default=DEFAULT_RATES, help="learning rates")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds to repeat everything with")
    add(
        "--samples", type=int, default=0,
        help="rollouts of a harmful prompt; 0 = one for each trigger",
    )
    # CHOICE: 16 generations per harmful prompt. IPO has at most 12 (6 rollouts, as many
    # interventions); stage 2 adds 2 or 3 for each benign prompt. The paper has at least 40 for
    # GRPO, which is 5 epochs.
    add(
        "--grpo-epochs", type=int, default=2,
        help="passes of GRPO over the prompts, 8 generations each",
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
        "--launch", type=shlex.split, default="",
        help="with --runner: words that start a program on all GPUs, as in 'torchrun ...'",
    )
    add(
        "--workers", type=int, default=default_workers(),
        help="processes that train and evaluate at the same time, with one thread each",
    )


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


def refuse_repeated(flags, *names):
    """Raise InputError where one of the named flags has a number twice, as in 1e-4 and 0.0001."""
    for name in names:
        seen = set()
        for value in flags[name]:
            number = float(value)
            if number in seen:
                raise InputError(f"--{name}: {value} comes twice; give each value once.")
            seen.add(number)


def check_kinds(flag, specs):
    """Raise InputError unless there is a harmful and a benign one among sets."""
    kinds = [kind for _, kind, _ in evaluate.parse_sets(specs)]
    for kind in ("harmful", "benign"):
        if kind not in kinds:
            raise InputError(f"{flag} {' '.join(specs)}: add a {kind} set, NAME={kind}:FILE.")


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


def main(argv=None):
    """Run one command."""
    args = build_parser().parse_args(argv)
    flags = intervene.recorded_flags(args)
    if args.command == "pairs":
        inputs = [args.model, args.traces, args.verdicts]
        work = functools.partial(write_independent_pairs, args.out, *inputs)
        run_stage(__file__, args.out, flags, inputs, work)
        return

    for name in FREE_FLAGS:
        del flags[name]
    flags["served"] = bool(args.served)
    ipo.refuse_below(1, vars(args), "workers", "grpo_epochs")
    ipo.refuse_below(0, vars(args), "limit", "limit_sets", "samples")
    refuse_repeated(vars(args), "lrs", "seeds")
    check_kinds("--valid", args.valid)
    check_kinds("--set", args.set)
    sets = evaluate.parse_sets([*args.valid, *args.set])  # together, as they are evaluated
    evaluate.load_sets(sets)
    inputs = [args.model, args.prompts, args.benign, args.triggers, *(path for *_, path in sets)]
    open_stage(__file__, args.out, flags, inputs)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(
        model=args.model,
        out=out,
        prompts=args.prompts,
        benign=args.benign,
        limit=args.limit,
        samples=args.samples or len(load_triggers(args.triggers)),
        triggers=args.triggers,
        sampling=args.sampling,
        served=args.served,
        judging=args.judging,
        eval_judging=args.eval_judging,
        train_args=args.train_args,
        grpo_epochs=args.grpo_epochs,
        valid=thin_sets(args.valid, args.limit_sets, out / "sets"),
        held_out=thin_sets(args.set, args.limit_sets, out / "sets"),
        stage_flags=("--accept-code-change",) if args.accept_code_change else (),
        launch=tuple(args.launch),
        runner=tuple(args.runner),
    )
    workers = 1 if args.runner else args.workers  # else they would share GPUs and ports
    run_sweep(sweep, all_trials(args.methods, args.lrs, args.seeds), workers)


PROGRAMS = {
    "baselines": main,
    "evaluate": evaluate.main,
    "grpo": grpo.main,
    "intervene": intervene.main,
    "ipo": ipo.main,
    "sft": sft.main,
}

if __name__ == "__main__":
    exit_cleanly(main)
