"""The paper's baselines beside IPO, from one base model on the same prompts: its Tables 1 to 3 in miniature.

    bash run.sh baselines                                                   # all of it, resumable
    python -m extras.baselines pairs --model M --traces T --verdicts V --out pairs.jsonl    # pairs of independent rollouts

A fifth of the harmful training prompts is held back for validation. Each method trains on the others at every learning
rate of the grid with the first seed; the rate with the lowest harmful ratio on validation that costs neither benign
compliance nor arithmetic (`choose`) is trained again with every other seed and measured on the held-out sets. A seed decides the
base model's rollouts, the order of training and the evaluation's samples. Results are appended to `results.jsonl`.
"""
import argparse
import contextlib
import json
import shlex
import statistics
import time
from pathlib import Path

import data
import evaluate
import intervene
import ipo
import model as lm_code

METHODS = {"sft": "SFT on chosen", "dpo": "DPO, whole trajectory", "dpo-independent": "DPO, independent rollouts",
           "grpo-response": "GRPO, I[y safe]", "grpo-gap": "GRPO, I[z safe] - I[y safe]", "grpo-reasoning": "GRPO, I[z safe]",
           "ipo": "IPO, stage 1"}
SHOWN = ("reasoning", "response", "compliance", "accuracy")
COSTS = ("generations", "judge_calls", "seconds", "cpu_seconds")  # of the data and the training, not of the evaluation
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student, by n


# ------------------------------------------------------------------------------------------------------- the pieces

def independent_pairs(traces, verdicts, tokenizer, eos):
    """DPO's other reading: a safe and an unsafe rollout of one prompt that share no more than the prompt.

    Safe: complete, reasoning and response safe; unsafe: complete, reasoning unsafe. CHOICE: every unsafe rollout makes one
    pair, with its prompt's safe ones in turn; a prompt that lacks either kind makes none. Returns (pairs, counts).
    """
    verdicts, groups = {v["id"]: v for v in verdicts}, {t["prompt_id"]: ([], []) for t in traces}
    for t in (t for t in traces if not t["truncated"]):
        v, (safe, unsafe) = verdicts[t["id"]], groups[t["prompt_id"]]
        if v["reasoning_safe"] is False:
            unsafe.append(t)
        elif v["reasoning_safe"] and v["response_safe"]:
            safe.append(t)
    pairs = [intervene.make_pair(tokenizer, eos, t, {**safe[k % len(safe)], "id": t["id"] + "@independent"}, 0, "",
                                 source="independent", interventions=0)
             for safe, unsafe in groups.values() if safe for k, t in enumerate(unsafe)]
    return pairs, {"prompts": len(groups), "with a safe rollout": sum(bool(s) for s, _ in groups.values()),
                   "with both kinds": sum(bool(s and u) for s, u in groups.values()), "pairs": len(pairs)}


def split(prompts, share=0.2):
    """(training prompts, validation prompts), the same for every seed: an arbitrary fifth by the hash of the id.

    >>> [[p["id"] for p in part] for part in split([{"id": str(i)} for i in range(5)])]
    [['0', '1', '2', '3'], ['4']]
    """
    held = {p["id"] for p in sorted(prompts, key=lambda p: data.digest(p["id"]))[:round(share * len(prompts))]}
    return [p for p in prompts if p["id"] not in held], [p for p in prompts if p["id"] in held]


def choose(trials, base, tolerance=0.02):
    """The learning rate with the lowest mean harmful ratio, of those that keep every other metric within `tolerance`.

    trials: {rate: metrics}; base: the base model's. Where none keeps them, the one that loses least; of equals the first.

    >>> base = {"h/reasoning": .7, "h/response": .5, "b/compliance": 1.0}
    >>> choose({"low": {**base, "h/response": .1}, "high": {"h/reasoning": 0, "h/response": 0, "b/compliance": .5}}, base)
    'low'
    """
    def harm(rate):
        return statistics.mean(v for k, v in trials[rate].items() if k.endswith(("/reasoning", "/response")))

    def lost(rate):
        return max([base[k] - v for k, v in trials[rate].items() if k.endswith(("/compliance", "/accuracy"))], default=0)
    kept = [rate for rate in trials if lost(rate) <= tolerance + 1e-9]
    return min(kept, key=harm) if kept else min(trials, key=lost)


def interval(values):
    """Mean and 95% interval over seeds (Student's t; for two seeds or three it is wide), within 0 and 1.

    >>> {k: round(v, 3) for k, v in interval([0.1, 0.2, 0.3]).items() if k != "values"}
    {'mean': 0.2, 'low': 0.0, 'high': 0.448}
    """
    mean, n = statistics.mean(values), len(values)
    half = T95.get(n, 1.96) * statistics.stdev(values) / n ** 0.5 if n > 1 else float("inf")
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half), "values": values}


# -------------------------------------------------------------------------------------------------------- the sweep

def stage(args, main, *argv):
    """Run one stage by its command line; what it prints goes to `log.txt`, its time to `times.jsonl`. Returns its output."""
    argv = [str(a) for a in argv]
    target = Path(argv[argv.index("--out") + 1])
    times, begun = data.Appender(Path(args.out) / "times.jsonl"), data.beside(target, "config").exists()
    wall, cpu = time.monotonic(), time.process_time()
    with open(Path(args.out) / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        main(argv)
    times.write({"id": str(target), "killed_before": begun,  # then the times are those since the last start only
                 "seconds": round(time.monotonic() - wall, 2), "cpu_seconds": round(time.process_time() - cpu, 2)})
    times.close()
    return target


def prepare(args, method, seed):
    """The pairs that a method trains on with this seed. Returns (stages' outputs, pairs last; stems of traces and verdicts)."""
    folder, model = Path(args.out) / f"seed{seed}", ["--model", args.model]
    rollouts, verdicts, steps, independent, pairs = (
        folder / f"{name}.jsonl" for name in ("rollouts", "verdicts", "steps", "independent", "pairs"))
    sampling = [*args.sampling, "--seed", seed]
    stages = [stage(args, intervene.main, "rollouts", *model, *sampling, "--prompts", Path(args.out) / "train.jsonl",
                    "--samples", len(data.load_triggers(args.triggers)), "--out", rollouts),
              stage(args, intervene.main, "steps", "--traces", rollouts, "--out", steps),
              stage(args, intervene.main, "judge", *args.judging, "--traces", rollouts, "--steps", steps, "--out", verdicts)]
    if method == "dpo-independent":
        stages.append(stage(args, main, "pairs", *model, "--traces", rollouts, "--verdicts", verdicts, "--out", independent))
        return stages, [(rollouts, verdicts)]
    stages.append(stage(args, intervene.main, "pairs", *model, *sampling, *args.judging, "--triggers", args.triggers,
                        "--traces", rollouts, "--steps", steps, "--verdicts", verdicts, "--out", pairs))
    first = pairs.with_suffix(".rounds") / "round1"
    return stages, [(rollouts, verdicts), (first.with_suffix(".traces.jsonl"), first.with_suffix(".verdicts.jsonl"))]


def train(args, method, lr, seed):
    """Train one model; returns (its folder, {each of COSTS, and "killed_before", where the times are too short})."""
    out = Path(args.out) / f"seed{seed}" / f"{method}-{lr}"
    common = [*args.train_args, "--model", args.model, "--lr", lr, "--seed", seed, "--out", out]
    if method.startswith("grpo-"):
        stages = [stage(args, ipo.main, "grpo", *args.sampling, *args.judging, *common, "--reward",
                        method[5:], "--prompts", Path(args.out) / "train.jsonl", "--epochs", args.grpo_epochs)]
        log = data.read_jsonl(out / "metrics.jsonl")
        cost = {k: sum(line[k] for line in log) for k in ("generations", "judge_calls")}
    else:
        stages, files = prepare(args, method, seed)
        command = {"sft": ["sft", "--data"], "dpo": ["train", "--score-from", "prompt", "--pairs"]}
        stages.append(stage(args, ipo.main, *command.get(method, ["train", "--pairs"]), stages[-1], *common))
        complete, judged = ([r for pair in files for r in data.read_jsonl(pair[i])] for i in (0, 1))
        cues = sum(v["reasoning_safe"] is False for v in judged) * (method != "dpo-independent")  # which needs none
        cost = {"generations": len(complete), "judge_calls": len(judged) + sum(not t["truncated"] for t in complete) + cues}
    times = {r["id"]: r for r in data.read_jsonl(Path(args.out) / "times.jsonl")}
    return out, {**cost, "killed_before": any(times[str(s)]["killed_before"] for s in stages),
                 **{k: round(sum(times[str(s)][k] for s in stages), 1) for k in ("seconds", "cpu_seconds")}}


def trial(args, results, method, lr, seed, part, sets, samples):
    """Train (but for `base`) and evaluate one model on `sets` unless that is done; returns its record."""
    id = f"{method} lr={lr} seed={seed} {part}"
    if id not in results.done:
        path, cost = (args.model, {}) if method == "base" else train(args, method, lr, seed)
        folder = stage(args, evaluate.main, "run", *args.sampling, *args.eval_judging, "--model", path,
                       "--samples", samples, "--seed", seed, "--set", *sets,
                       "--out", Path(args.out) / f"seed{seed}" / f"{part}-{method}-{lr}")
        measured = json.loads((folder / "metrics.json").read_text())["sets"]
        metrics = {f"{name}/{metric}": entry[metric]["mean"] for name, entry in measured.items() for metric in SHOWN if metric in entry}
        if None in metrics.values():
            raise SystemExit(f"{folder}: a metric has no verdicts at all. Look at the judge, delete the folder, start again.")
        results.write({"id": id, "method": method, "lr": lr, "seed": seed, "part": part, "metrics": metrics, **cost})
        print(id + ": " + ", ".join(f"{k} {100 * v:.1f}%" for k, v in metrics.items()), flush=True)
    return results.done[id]


def validation_sets(args):
    """Write the split and return the validation sets: held-back harmful prompts, a fifth of the benign ones, sums."""
    out = Path(args.out)
    training, held = split(data.load_prompts(args.prompts, args.limit))
    benign = data.load_prompts(args.benign)
    sums = [{**p, "answer": str(sum(map(int, n)))} for p in benign if len(n := [
        w.strip("?.,") for w in p["prompt"].split() if w.strip("?.,").isdigit()]) == 2]  # the toy world's; none trains on them
    parts = {"train": training, "valid_harmful": held, "valid_benign": split(benign)[1],
             "valid_sums": sums if "rules" in args.judging else []}
    for name, prompts in parts.items():
        data.write_jsonl(out / f"{name}.jsonl", prompts)
    kinds = {"valid_harmful": "harmful", "valid_benign": "benign", "valid_sums": "task"}
    return [f"{name}={kind}:{out / name}.jsonl" for name, kind in kinds.items() if parts[name]]


def run(args):
    """The whole comparison: choose rates, train, measure, write `table.json` and print it."""
    chosen_by = ("methods", "lrs", "seeds", "main_job")  # results are kept by these, so a sweep can grow
    given = {k: v for k, v in vars(args).items() if k not in chosen_by}
    files = [path for _, _, path in evaluate.parse_sets(args.set)]
    data.begin(args.out, given, [args.model, args.prompts, args.benign, args.triggers, *files])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    valid = validation_sets(args)
    results, rows, first = data.Appender(Path(args.out) / "results.jsonl"), [], args.seeds[0]
    base = trial(args, results, "base", "-", first, "validation", valid, args.validation_samples)["metrics"]
    for method in ["base", *args.methods]:
        lr, trials = "-", {}
        if method != "base":
            trials = {lr: trial(args, results, method, lr, first, "validation", valid, args.validation_samples)["metrics"]
                      for lr in args.lrs}
            lr = choose(trials, base)
        records = [trial(args, results, method, lr, seed, "test", args.set, 1) for seed in args.seeds]
        rows.append({"method": METHODS.get(method, method), "lr": lr, "seeds": args.seeds, "validation": trials,
                     "metrics": {k: interval([r["metrics"][k] for r in records]) for k in records[0]["metrics"]},
                     "killed_before": any(r.get("killed_before") for r in records),
                     **{k: statistics.mean(r[k] for r in records) for k in COSTS if k in records[0]}})
    results.close()
    rows += main_job(args.main_job)
    data.write_json(Path(args.out) / "table.json", {"training prompts": len(data.read_jsonl(Path(args.out) / "train.jsonl")),
                                                    "validation of base": base, "lrs": args.lrs, "rows": rows})
    print(table(rows))


def main_job(folder):
    """The row of a finished `run.sh` in `folder`, if any: IPO with both stages, on all prompts and at its own rates."""
    evaluated, rows = Path(folder) / "eval" / "stage2" / "metrics.json", []
    if evaluated.exists():
        sets = json.loads(evaluated.read_text())["sets"]
        rows.append({"method": "IPO, stages 1 and 2 (main job)", "lr": "-", "seeds": ["-"], "killed_before": False, "metrics": {
            f"{name}/{m}": interval([e[m]["mean"]]) for name, e in sets.items() for m in SHOWN if m in e}})
    return rows


def table(rows):
    """Rows as a Markdown table: per cent over seeds with the interval where there are several, and what a model cost."""
    def cell(m):
        several = m and len(m["values"]) > 1
        return (f"{100 * m['mean']:.1f}" if m else "") + (f" [{100 * m['low']:.0f}, {100 * m['high']:.0f}]" if several else "")
    metrics = list(rows[0]["metrics"])
    lines = [["method", "lr", "seeds", *metrics, *(c.replace("_", " ") for c in COSTS)]]
    for r in rows:
        costs = [("> " if r["killed_before"] and "seconds" in c else "") + f"{r[c]:.0f}" if c in r else "" for c in COSTS]
        lines.append([r["method"], r["lr"], str(len(r["seeds"])), *(cell(r["metrics"].get(m)) for m in metrics), *costs])
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


# ---------------------------------------------------------------------------------------------------- the command line

def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m extras.baselines", description="The paper's baselines beside IPO.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("pairs", help="pairs of independent safe and unsafe rollouts of one prompt")
    for flag in ("model", "traces", "verdicts", "out"):
        p.add_argument("--" + flag, required=True, help=intervene.FILES.get(flag))
    p = commands.add_parser("run", help="train and compare all methods", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", required=True, help="base model: directory or hub name")
    p.add_argument("--prompts", required=True, help="harmful " + intervene.FILES["prompts"])
    p.add_argument("--benign", required=True, help="benign prompts, for validation only")
    p.add_argument("--set", nargs="+", required=True, metavar="NAME=KIND:FILE", help="held-out sets, as for `evaluate.py run`")
    p.add_argument("--out", required=True, help="folder for everything")
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="methods to compare")
    p.add_argument("--lrs", nargs="+", default="3e-5 1e-4 3e-4 1e-3".split(), help="learning rates, the lowest first")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the first also chooses the learning rates")
    # CHOICE: 40 generations a prompt, the least that the paper names for GRPO; IPO makes at most 12.
    p.add_argument("--grpo-epochs", type=int, default=5, help="passes of GRPO over the prompts, 8 generations each")
    p.add_argument("--validation-samples", type=int, default=4, help="rollouts of a validation prompt")
    for flag, default, text in (
            ("sampling", "", "whatever samples"), ("judging", "--judge rules", "the judge that builds the data"),
            ("eval-judging", "--judge rules", "`evaluate.py run` for its judge"), ("train-args", "", "every training")):
        p.add_argument("--" + flag, type=shlex.split, default=default, help=f"flags of {text}, as one word: --{flag}='--x 1'")
    p.add_argument("--triggers", default=str(intervene.HERE / "prompts" / "triggers.txt"), help="safety triggers, one a line")
    p.add_argument("--main-job", default="runs/toy", help="folder of a finished run.sh, for the row of IPO's two stages")
    p.add_argument("--limit", type=int, default=0, help="use only the first prompts; 0 = all")
    return parser


def main(argv=None):
    """Run one command."""
    args = build_parser().parse_args(argv)
    if args.command == "run":
        return run(args)

    def work():
        tokenizer = lm_code.load_tokenizer(args.model)
        pairs, counts = independent_pairs(data.read_jsonl(args.traces), data.read_jsonl(args.verdicts), tokenizer,
                                          lm_code.eos_ids(args.model, tokenizer))
        data.write_jsonl(args.out, pairs)
        return counts, {}
    data.stage(args.out, vars(args), [args.model, args.traces, args.verdicts], work)


if __name__ == "__main__":
    main()
