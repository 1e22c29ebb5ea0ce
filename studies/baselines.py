"""The paper's baselines beside IPO, from one base model on the same prompts: Tables 1 to 3.

    bash run.sh baselines                     # all of it; it picks up where it left off
    python -m studies.baselines run --help
    python -m studies.baselines pairs --model M --traces T --verdicts V --out pairs.jsonl

A fifth of the harmful training prompts is held back for validation. Each method trains on the
others at every learning rate of the grid with the first seed. The rate with the lowest harmful
ratio on validation that costs neither benign compliance nor arithmetic (`choose_rate`) is trained
again with every other seed and measured on the held-out sets. A seed decides the base model's
rollouts, the order of training and the evaluation's samples. Results are appended to
`results.jsonl`. `pairs` makes pairs of independent rollouts.
"""
import argparse
import contextlib
import functools
import shlex
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import evaluate
import intervene
import ipo
from data import Appender, load_prompts, load_triggers
from model import eos_ids, load_tokenizer
from studies import grpo, sft
from support.errors import InputError, exit_cleanly
from support.files import digest, read_json, read_jsonl, write_json, write_jsonl
from support.stages import add_stage_flags, open_stage, run_stage, sidecar
from support.statistics import student_interval

METHODS = {
    "sft": "SFT on chosen",
    "dpo": "DPO, whole trajectory",
    "dpo-independent": "DPO, independent rollouts",
    "grpo-response": "GRPO, I[y safe]",
    "grpo-gap": "GRPO, I[z safe] - I[y safe]",
    "grpo-reasoning": "GRPO, I[z safe]",
    "ipo": "IPO, stage 1",
}
METRICS = ("reasoning", "response", "compliance", "accuracy")
TIMES = ("seconds", "cpu_seconds")
COSTS = ("generations", "judge_calls", *TIMES)  # of the data and the training, not the evaluation
# Flags that may change, so that a finished sweep can grow: results are kept by their values.
GROWING_FLAGS = ("methods", "lrs", "seeds", "main_job")


class Sweep(NamedTuple):
    """What all trainings and evaluations have in common; the lists are flags to pass on."""
    model: str
    out: Path
    triggers: str
    sampling: list       # to every command that samples
    judging: list        # to those that build the data, for their judge
    eval_judging: list   # to `evaluate.py run`, for its judge
    train_args: list     # to every training
    grpo_epochs: int
    stage_flags: tuple = ()  # to all of them


class Trial(NamedTuple):
    """One training: its method, learning rate (as written in the flag) and seed."""
    method: str
    lr: str
    seed: int


# ------------------------------------------------------------------------ pairs, split and choice

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


def split_prompts(prompts, share=0.2):
    """(training prompts, validation prompts): an arbitrary fifth by the hash of the id.

    It is the same for every seed.

    >>> training, held = split_prompts([{"id": str(i)} for i in range(5)])
    >>> [p["id"] for p in training], [p["id"] for p in held]
    (['0', '1', '2', '3'], ['4'])
    """
    in_order = sorted(prompts, key=lambda prompt: digest(prompt["id"]))
    first = in_order[:round(share * len(prompts))]
    held_ids = {prompt["id"] for prompt in first}
    training = [prompt for prompt in prompts if prompt["id"] not in held_ids]
    held = [prompt for prompt in prompts if prompt["id"] in held_ids]
    return training, held


def choose_rate(metrics, base, tolerance=0.02):
    """The learning rate with the lowest mean harmful ratio that keeps the rest within `tolerance`.

    metrics: {rate: {"SET/METRIC": value}}; base: the base model's. If no rate keeps every other
    metric, it is the rate that loses least. Of equal rates it is the first.

    >>> base = {"h/reasoning": .7, "h/response": .5, "b/compliance": 1.0}
    >>> low = {**base, "h/response": .1}
    >>> high = {"h/reasoning": 0, "h/response": 0, "b/compliance": .5}
    >>> choose_rate({"low": low, "high": high}, base)
    'low'
    """
    harm = {}  # rate: mean harmful ratio
    lost = {}  # rate: the most that any other metric lost
    for rate, found in metrics.items():
        ratios = []
        losses = [0]
        for name, value in found.items():
            if name.endswith(("/reasoning", "/response")):
                ratios.append(value)
            else:
                losses.append(base[name] - value)
        harm[rate] = mean(ratios)
        lost[rate] = max(losses)
    keeping = [rate for rate in metrics if lost[rate] <= tolerance + 1e-9]
    if keeping:
        return min(keeping, key=harm.get)
    return min(metrics, key=lost.get)


# -------------------------------------------------------------------------- one training at a time

def run_command(sweep, command, *argv):
    """Run a command line in this process; returns the path that its `--out` names.

    What it prints goes to `log.txt`, its time to `times.jsonl`.
    """
    argv = [str(word) for word in (*argv, *sweep.stage_flags)]
    target = Path(argv[argv.index("--out") + 1])
    times = Appender(sweep.out / "times.jsonl")
    killed_before = sidecar(target, "config").exists()
    wall = time.monotonic()
    cpu = time.process_time()
    with open(sweep.out / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        command(argv)
    times.write({
        "id": str(target),
        "killed_before": killed_before,  # then the times are those since the last start only
        "seconds": round(time.monotonic() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    })
    times.close()
    return target


def seed_folder(sweep, seed):
    """The folder of everything that is made with a seed."""
    return sweep.out / f"seed{seed}"


def judged_rollouts(sweep, seed):
    """The base model's rollouts with this seed, their steps and verdicts: three files."""
    folder = seed_folder(sweep, seed)
    rollouts = run_command(
        sweep, intervene.main, "rollouts", "--model", sweep.model, *sweep.sampling, "--seed", seed,
        "--prompts", sweep.out / "train.jsonl",
        "--samples", len(load_triggers(sweep.triggers)),
        "--out", folder / "rollouts.jsonl",
    )
    steps = run_command(
        sweep, intervene.main, "steps", "--traces", rollouts, "--out", folder / "steps.jsonl",
    )
    verdicts = run_command(
        sweep, intervene.main, "judge", *sweep.judging, "--traces", rollouts, "--steps", steps,
        "--out", folder / "verdicts.jsonl",
    )
    return rollouts, steps, verdicts


def pair_independent_rollouts(sweep, seed, rollouts, verdicts):
    """The file of pairs of a safe and an unsafe rollout."""
    return run_command(
        sweep, main, "pairs", "--model", sweep.model, "--traces", rollouts, "--verdicts", verdicts,
        "--out", seed_folder(sweep, seed) / "independent.jsonl",
    )


def pair_interventions(sweep, seed, rollouts, steps, verdicts):
    """The file of pairs by intervention."""
    return run_command(
        sweep, intervene.main, "pairs", "--model", sweep.model, *sweep.sampling, "--seed", seed,
        *sweep.judging, "--triggers", sweep.triggers,
        "--traces", rollouts, "--steps", steps, "--verdicts", verdicts,
        "--out", seed_folder(sweep, seed) / "pairs.jsonl",
    )


def train_model(sweep, trial):
    """Train one model; returns (its folder, its costs).

    Costs: each of COSTS, and "killed_before", whether the times are too short.
    """
    if trial.method.startswith("grpo-"):
        outputs, costs = train_with_grpo(sweep, trial)
    else:
        outputs, costs = train_on_pairs(sweep, trial)
    times = {record["id"]: record for record in read_jsonl(sweep.out / "times.jsonl")}
    spent = [times[str(output)] for output in outputs]
    costs["killed_before"] = any(record["killed_before"] for record in spent)
    for name in TIMES:
        costs[name] = round(sum(record[name] for record in spent), 1)
    return outputs[-1], costs


def training_flags(sweep, trial):
    """The flags that all ways of training share."""
    out = seed_folder(sweep, trial.seed) / f"{trial.method}-{trial.lr}"
    return [
        *sweep.train_args, "--model", sweep.model, "--lr", trial.lr, "--seed", trial.seed,
        "--out", out,
    ]


def train_with_grpo(sweep, trial):
    """Train by GRPO; returns ([the model's folder], generations and judge calls)."""
    out = run_command(
        sweep, grpo.main, *sweep.sampling, *sweep.judging, *training_flags(sweep, trial),
        "--reward", trial.method.removeprefix("grpo-"),
        "--prompts", sweep.out / "train.jsonl",
        "--epochs", sweep.grpo_epochs,
    )
    log = read_jsonl(out / "metrics.jsonl")
    costs = {}
    for name in ("generations", "judge_calls"):
        costs[name] = sum(line[name] for line in log)
    return [out], costs


def train_on_pairs(sweep, trial):
    """Train on pairs of the base model's rollouts.

    Returns (outputs of all stages, the model's last; generations and judge calls).
    """
    rollouts, steps, verdicts = judged_rollouts(sweep, trial.seed)
    traces = read_jsonl(rollouts)
    judged = read_jsonl(verdicts)
    if trial.method == "dpo-independent":
        pairs = pair_independent_rollouts(sweep, trial.seed, rollouts, verdicts)
        cues = 0  # it needs none
    else:
        pairs = pair_interventions(sweep, trial.seed, rollouts, steps, verdicts)
        first_round = pairs.with_suffix(".rounds") / "round1"
        traces += read_jsonl(first_round.with_suffix(".traces.jsonl"))
        judged += read_jsonl(first_round.with_suffix(".verdicts.jsonl"))
        cues = sum(verdict["reasoning_safe"] is False for verdict in judged)

    flags = training_flags(sweep, trial)
    if trial.method == "sft":
        model = run_command(sweep, sft.main, "--data", pairs, *flags)
    elif trial.method == "dpo":
        model = run_command(
            sweep, ipo.main, "train", "--score-from", "prompt", "--pairs", pairs, *flags,
        )
    else:
        model = run_command(sweep, ipo.main, "train", "--pairs", pairs, *flags)
    responses = sum(not trace["truncated"] for trace in traces)
    costs = {
        "generations": len(traces),
        "judge_calls": len(judged) + responses + cues,  # reasoning, response, cue
    }
    return [rollouts, steps, verdicts, pairs, model], costs


def train_and_evaluate(sweep, results, trial, part, sets, samples):
    """The record of one model on the sets of a part ("validation" or "test").

    Unless that is done, the model is trained (but for the method `base`) and evaluated.
    """
    record_id = f"{trial.method} lr={trial.lr} seed={trial.seed} {part}"
    if record_id in results.done:
        return results.read([record_id])[0]
    model = sweep.model
    costs = {}
    if trial.method != "base":
        model, costs = train_model(sweep, trial)
    folder = run_command(
        sweep, evaluate.main, "run", *sweep.sampling, *sweep.eval_judging, "--model", model,
        "--samples", samples, "--seed", trial.seed, "--set", *sets,
        "--out", seed_folder(sweep, trial.seed) / f"{part}-{trial.method}-{trial.lr}",
    )
    metrics = read_metrics(folder)
    if None in metrics.values():
        raise InputError(
            f"{folder}: a metric has no verdicts at all. "
            "Check the judge, delete the folder, and start again."
        )
    record = {"id": record_id, **trial._asdict(), "part": part, "metrics": metrics, **costs}
    results.write(record)
    figures = [f"{name} {100 * value:.1f}%" for name, value in metrics.items()]
    print(f"{record_id}: {', '.join(figures)}", flush=True)
    return record


def read_metrics(folder):
    """The values of METRICS in a finished evaluation: {"SET/METRIC": value}."""
    sets = read_json(folder / "metrics.json", "sets")["sets"]
    metrics = {}
    for name, entry in sets.items():
        for metric in METRICS:
            if metric in entry:
                metrics[f"{name}/{metric}"] = entry[metric]["value"]
    return metrics


# --------------------------------------------------------------------------------------- the sweep

def questions_about_sums(prompts):
    """The prompts that hold two numbers, with their sum as `answer`.

    >>> questions_about_sums([{"id": "a", "prompt": "What is 2 plus 3?"}])
    [{'id': 'a', 'prompt': 'What is 2 plus 3?', 'answer': '5'}]
    """
    found = []
    for prompt in prompts:
        words = [word.strip("?.,") for word in prompt["prompt"].split()]
        numbers = [int(word) for word in words if word.isdigit()]
        if len(numbers) == 2:
            found.append({**prompt, "answer": str(sum(numbers))})
    return found


def write_validation_sets(sweep, prompts, benign):
    """Write the split of the prompts; return the validation sets as `NAME=KIND:FILE`.

    These are held-back harmful prompts, a fifth of the benign ones, and the toy world's sums, which
    no method trains on.
    """
    training, held = split_prompts(prompts)
    sums = []
    if "rules" in sweep.judging:
        sums = questions_about_sums(benign)
    write_jsonl(sweep.out / "train.jsonl", training)
    parts = (
        ("valid_harmful", "harmful", held),
        ("valid_benign", "benign", split_prompts(benign)[1]),
        ("valid_sums", "task", sums),
    )
    sets = []
    for name, kind, part in parts:
        path = sweep.out / f"{name}.jsonl"
        write_jsonl(path, part)
        if part:
            sets.append(f"{name}={kind}:{path}")
    return sets


def estimate_over_seeds(values):
    """The estimate of a mean over seeds, with the `values` that it averages."""
    return {**student_interval(values), "values": values}


def table_row(method, lr, seeds, validation, records):
    """A row of `table.json` from the records of one method, one per seed."""
    metrics = {}
    for name in records[0]["metrics"]:
        metrics[name] = estimate_over_seeds([record["metrics"][name] for record in records])
    row = {
        "method": METHODS.get(method, method),
        "lr": lr,
        "seeds": seeds,
        "validation": validation,
        "metrics": metrics,
        "killed_before": any(record.get("killed_before") for record in records),
    }
    for name in COSTS:
        if name in records[0]:
            row[name] = mean(record[name] for record in records)
    return row


def main_job_rows(folder):
    """The row of a finished `run.sh`, if any: IPO with both stages, all prompts, its own rates."""
    evaluated = Path(folder) / "eval" / "stage2"
    if not (evaluated / "metrics.json").exists():
        return []
    metrics = {}
    for name, value in read_metrics(evaluated).items():
        metrics[name] = estimate_over_seeds([value])
    row = {
        "method": "IPO, stages 1 and 2 (main job)",
        "lr": "-",
        "seeds": ["-"],
        "killed_before": False,
        "metrics": metrics,
    }
    return [row]


def compare_methods(
    sweep, methods, lrs, seeds, sets, *, prompts, benign, validation_samples, main_job,
):
    """The whole comparison: choose rates, train, evaluate, write and print the table."""
    validation_sets = write_validation_sets(sweep, prompts, benign)
    results = Appender(sweep.out / "results.jsonl")

    def validate(method, lr):
        trial = Trial(method, lr, seeds[0])
        record = train_and_evaluate(
            sweep, results, trial, "validation", validation_sets, validation_samples,
        )
        return record["metrics"]

    base = validate("base", "-")
    rows = []
    for method in ["base", *methods]:
        lr = "-"
        validation = {}
        if method != "base":
            for rate in lrs:
                validation[rate] = validate(method, rate)
            lr = choose_rate(validation, base)
        records = []
        for seed in seeds:
            trial = Trial(method, lr, seed)
            records.append(train_and_evaluate(sweep, results, trial, "test", sets, 1))
        rows.append(table_row(method, lr, seeds, validation, records))
    results.close()
    rows += main_job_rows(main_job)
    write_json(sweep.out / "table.json", {
        "training prompts": len(read_jsonl(sweep.out / "train.jsonl")),
        "validation of base": base,
        "lrs": lrs,
        "rows": rows,
    })
    print(markdown_table(rows))


def format_share(share):
    """A mean over seeds in per cent, with its interval where there are several; "" without one."""
    if not share:
        return ""
    text = f"{100 * share['value']:.1f}"
    if share["n"] > 1:
        text += f" [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
    return text


def format_cost(row, name):
    """One of a row's COSTS as text; "> " before a time that leaves out what a kill cut off."""
    if name not in row:
        return ""
    text = f"{row[name]:.0f}"
    if row["killed_before"] and name in TIMES:
        text = "> " + text
    return text


def markdown_table(rows):
    """Rows as a Markdown table: the metrics, and what a model cost."""
    metrics = list(rows[0]["metrics"])
    costs = [name.replace("_", " ") for name in COSTS]
    head = ["method", "lr", "seeds", *metrics, *costs]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        shares = [format_share(row["metrics"].get(name)) for name in metrics]
        costs = [format_cost(row, name) for name in COSTS]
        lines.append([row["method"], row["lr"], str(len(row["seeds"])), *shares, *costs])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
        help="train and compare all methods",
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
    add("--benign", required=True, help="benign prompts, for validation only")
    add(
        "--set", nargs="+", required=True, metavar="NAME=KIND:FILE",
        help="held-out sets, as for `evaluate.py run`",
    )
    add("--out", required=True, help="folder for everything")
    add(
        "--methods", nargs="+", default=list(METHODS), choices=METHODS, help="methods to compare",
    )
    add(
        "--lrs", nargs="+", default=["3e-5", "1e-4", "3e-4", "1e-3"],
        help="learning rates, the lowest first",
    )
    add(
        "--seeds", nargs="+", type=int, default=[0, 1, 2],
        help="the first also chooses the learning rates",
    )
    # CHOICE: 40 generations per prompt, the least that the paper names for GRPO. (IPO makes 12 at
    # most.)
    add(
        "--grpo-epochs", type=int, default=5,
        help="passes of GRPO over the prompts, 8 generations each",
    )
    add("--validation-samples", type=int, default=4, help="rollouts of a validation prompt")
    for flag, default, purpose in (
        ("sampling", "", "whatever samples"),
        ("judging", "--judge rules", "the judge that builds the data"),
        ("eval-judging", "--judge rules", "`evaluate.py run` for its judge"),
        ("train-args", "", "every training"),
    ):
        add(
            f"--{flag}", type=shlex.split, default=default,
            help=f"flags of {purpose}, as one word: --{flag}='--x 1'",
        )
    add("--triggers", default=intervene.DEFAULT_TRIGGERS, help="safety triggers, one per line")
    add(
        "--main-job", default="runs/toy",
        help="folder of a finished run.sh, for the row of IPO's two stages",
    )
    add("--limit", type=int, default=0, help="use only the first prompts; 0 = all")


def main(argv=None):
    """Run one command."""
    args = build_parser().parse_args(argv)
    flags = intervene.recorded_flags(args)
    if args.command == "pairs":
        inputs = [args.model, args.traces, args.verdicts]
        work = functools.partial(write_independent_pairs, args.out, *inputs)
        run_stage(__file__, args.out, flags, inputs, work)
        return

    for name in GROWING_FLAGS:
        del flags[name]
    files = [path for _, _, path in evaluate.parse_sets(args.set)]
    inputs = [args.model, args.prompts, args.benign, args.triggers, *files]
    open_stage(__file__, args.out, flags, inputs)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(
        args.model, out, args.triggers, args.sampling, args.judging, args.eval_judging,
        args.train_args, args.grpo_epochs,
        ("--accept-code-change",) if args.accept_code_change else (),
    )
    compare_methods(
        sweep, args.methods, args.lrs, args.seeds, args.set,
        prompts=load_prompts(args.prompts, args.limit),
        benign=load_prompts(args.benign),
        validation_samples=args.validation_samples,
        main_job=args.main_job,
    )


if __name__ == "__main__":
    exit_cleanly(main)
