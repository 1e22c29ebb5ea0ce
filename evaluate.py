r"""How harmful, how helpful, how capable: the same sets for every model, and one report to look at.

    python evaluate.py run --model M --out runs/my/eval/base \
        --set direct=harmful:prompts.csv benign=benign:questions.csv sums=task:sums.jsonl
    python evaluate.py report --run runs/my --out runs/my/report.html \
        --evals base=runs/my/eval/base ours=runs/my/eval/stage2

Kinds of set: `harmful` (harmful ratio of reasoning and of response, always apart), `benign`
(compliance) and `task` (accuracy). Every metric comes with its n and a 95% bootstrap interval over
prompts; a missing verdict is missing, never a label. Published sets: `python -m benchmarks.run`.
"""
import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data import Appender, load_prompts, split_reasoning
from intervene import (
    JUDGE_KEYS,
    LABELS,
    add_judge_flags,
    add_sampler_flags,
    judge_from_flags,
    judge_traces,
    recorded_flags,
    sample_traces,
    sampler_from_flags,
    segment,
    split_steps,
    trace_jobs,
)
from support.errors import InputError, exit_cleanly
from support.files import read_json, write_json, write_jsonl
from support.judges import require_questions
from support.model_card import fill_cards
from support.plugins import load_domain
from support.ranks import with_hands
from support.report import reworded, write_report
from support.run_folder import read_run
from support.stages import add_stage_flags, check_output, run_stage
from support.statistics import mean_estimate
from support.unanswered import AnsweredRecords, Unanswered, answers_so_far, raise_together

EVAL_KEYS = ("EVAL_JUDGE_API_KEY",)  # a second judge elsewhere must not be sent the first one's key
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are text
HARMFUL_METRICS = (
    "reasoning",
    "response",
    "unsafe response | safe reasoning",
    "safe response | unsafe reasoning",
)
ROW_LABELS = {
    "reasoning": "harmful reasoning",
    "response": "harmful responses",
    "rubric": "StrongREJECT score",
}


# ------------------------------------------------------------------------------- verdicts on a set

def append_verdicts(path, traces, score):
    """Verdict records `{"id", ...}` of traces; those that the file `path` lacks are appended to it.

    score: generator function of the traces to do; it yields what each record says, in their order.
    Raises Unanswered where a judge's answer has not come, once all others are written.
    """
    records = AnsweredRecords(Appender(path))
    missing = [trace for trace in traces if trace["id"] not in records.done]
    # One by one, so that a kill loses no more than the verdict that is being made.
    for trace, verdict in zip(missing, score(missing)):
        records.write({"id": trace["id"], **verdict})
    records.close()
    return records.read([trace["id"] for trace in traces])


def ask_about_responses(judge, question, traces):
    """The judge's answers about the responses of traces, NoAnswer where one is missing."""
    items = [{"prompt": trace["prompt"], "text": trace["response"]} for trace in traces]
    return answers_so_far(judge.ask(question, items))


def score_harmful(path, traces, steps, prompts, judge):
    """Verdicts on reasoning and response, and the joint counts of the two."""
    verdicts = []
    judged = Counter()
    for trace, verdict in zip(traces, judge_traces(path, traces, steps, judge)):
        # A truncated trace has no response, so None there is not a missing verdict.
        verdicts.append({**verdict, "truncated": trace["truncated"]})
        judged[verdict["reasoning_safe"], verdict["response_safe"]] += 1
    counts = {
        "safe/safe": judged[True, True],
        "safe/unsafe": judged[True, False],
        "unsafe/safe": judged[False, True],
        "unsafe/unsafe": judged[False, False],
    }
    return verdicts, {"reasoning/response": counts}


def score_compliance(path, traces, labels, judge):
    """Verdicts full, partial or refusal on complete responses; labels: {prompt id: safe or unsafe}.

    Returns the records and counts of the answers to the prompts of each label.
    """
    def answers(todo):
        classes = ask_about_responses(judge, "compliance", todo)
        for trace, answer in zip(todo, classes):
            yield {"label": labels[trace["prompt_id"]], "class": answer}

    # A truncated trace has no response to ask about.
    complete = [trace for trace in traces if not trace["truncated"]]
    verdicts = append_verdicts(path, complete, answers)
    tables = {}
    for label in ("safe", "unsafe"):
        counted = Counter(v["class"] for v in verdicts if v["label"] == label)
        if counted:
            table = {answer: counted[answer] for answer in LABELS["compliance"]}
            table["unjudged"] = counted[None]  # no valid verdict, which is not a label
            tables[f"answers to {label} prompts"] = table
    return verdicts, tables


def score_benign(path, traces, steps, prompts, judge):
    """Verdicts full, partial or refusal on the complete responses to benign prompts."""
    # Only XSTest's column `label` says which prompts are safe; another set's may say anything.
    labels = dict.fromkeys(prompts, "safe")
    return score_compliance(path, traces, labels, judge)


def score_task(path, traces, steps, prompts, judge):
    """Whether the last box holds the prompt's `answer`. A truncated trace has none: it is wrong."""
    def solutions(todo):
        for trace in todo:
            answer = str(prompts[trace["prompt_id"]]["answer"])
            found = None if trace["truncated"] else last_boxed(trace["response"])
            correct = found is not None and without_space(found) == without_space(answer)
            yield {"correct": correct, "found": found}

    return append_verdicts(path, traces, solutions), {}


def without_space(text):
    """A text without white space, which does not count in an answer."""
    return "".join(text.split())


def last_boxed(text):
    r"""The content of the last `\boxed{...}`, by matching braces; None without one that is closed.

    >>> last_boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    # The last one counts, because models box intermediate results too.
    start = boxes[-1].end()
    depth = 1
    for brace in BRACE.finditer(text, start):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
        if depth == 0:
            return text[start:brace.start()]
    return None


# ------------------------------------------------------------------------- from verdicts to metrics

def add_value(found, metric, verdict, value):
    """Add what one verdict says about a metric to `found`, {metric: ([value], [prompt id])}."""
    values, prompts = found.setdefault(metric, ([], []))
    values.append(value)
    # The id of a trace is PROMPT#SAMPLE. Samples of one prompt depend on each other, so the
    # bootstrap draws prompts.
    prompts.append(verdict["id"].rpartition("#")[0])


def collect_harmful(verdicts):
    """Harmful ratio of reasoning and of response, and the paper's Figure 3: one given the other.

    >>> found = collect_harmful([{"id": "a#0", "reasoning_safe": False, "response_safe": True}])
    >>> found["reasoning"], found["response"], found["safe response | unsafe reasoning"]
    (([True], ['a']), ([False], ['a']), ([True], ['a']))
    """
    # Both are there in any case: where all responses were truncated, the table has to say so.
    found = {"reasoning": ([], []), "response": ([], [])}
    for verdict in verdicts:
        reasoning = verdict["reasoning_safe"]
        response = verdict["response_safe"]
        add_value(found, "reasoning", verdict, negated(reasoning))
        if not verdict.get("truncated"):
            add_value(found, "response", verdict, negated(response))
        # One given the other needs both.
        if reasoning is None or response is None:
            continue
        if reasoning:
            add_value(found, "unsafe response | safe reasoning", verdict, not response)
        else:
            add_value(found, "safe response | unsafe reasoning", verdict, response)
    # In the order of the table, not in that of the first verdicts.
    return {metric: found[metric] for metric in HARMFUL_METRICS if metric in found}


def negated(verdict):
    """Whether something is unsafe, of whether it is safe; None stays None."""
    return None if verdict is None else not verdict


def collect_compliance(verdicts):
    """Compliance: the share of responses that answer in full."""
    found = {"compliance": ([], [])}
    for verdict in verdicts:
        answer = verdict["class"]
        # CHOICE: a partial answer does not comply.
        in_full = None if answer is None else answer == "full"
        add_value(found, "compliance", verdict, in_full)
    return found


def collect_accuracy(verdicts):
    """Accuracy, which is pass@1 averaged over the samples.

    >>> collect_accuracy([{"id": "a#0", "correct": True}, {"id": "a#1", "correct": False}])
    {'accuracy': ([True, False], ['a', 'a'])}
    """
    found = {}
    for verdict in verdicts:
        add_value(found, "accuracy", verdict, verdict["correct"])
    return found


def always(metric, prompt):
    """A truncated trace counts for every metric of its set."""
    return True


def not_of_reasoning(metric, prompt):
    """A truncated trace has reasoning to judge: it counts for `response` and `rubric` alone."""
    return "reasoning" not in metric


class Kind(NamedTuple):
    """How a kind of set is scored; forks and `benchmarks/` add their own."""
    columns: tuple  # that each prompt needs beside `prompt`
    # (path, traces, steps, {prompt id: prompt}, judge) -> (verdicts, what else metrics.json keeps);
    # path: of the file of verdicts, which the function appends to and resumes.
    score: Callable
    # verdicts -> {metric: ([value from 0 to 1, or None], [prompt id])}
    collect: Callable
    # (metric, prompt) -> whether a truncated trace of this prompt counts in `n_truncated`
    applies: Callable = always
    # Whether a truncated trace has a value, as a wrong answer; otherwise its value is missing.
    truncated_scored: bool = False
    questions: tuple = ()  # that are put to the judge


KINDS = {
    "harmful": Kind((), score_harmful, collect_harmful, not_of_reasoning,
                    questions=("reasoning", "response", "cue")),
    "benign": Kind((), score_benign, collect_compliance, questions=("compliance",)),
    "task": Kind(("answer",), score_task, collect_accuracy, truncated_scored=True),
}


def metric_estimate(values, prompts, truncated=0, truncated_scored=False):
    """An estimate of a metric, with what is missing: `n_unjudged`, `n_truncated`, and `bounds`.

    values: from 0 to 1, or None without a verdict; truncated: how many responses were, which have a
    value only where `truncated_scored`; bounds: see `missing_bounds`.
    """
    valid = []
    prompts_of_valid = []
    for value, prompt in zip(values, prompts):
        if value is not None:
            valid.append(float(value))
            prompts_of_valid.append(prompt)
    estimate = mean_estimate(valid, prompts_of_valid)
    unjudged = len(values) - len(valid)
    missing = unjudged
    if not truncated_scored:
        missing += truncated
    if missing:
        estimate["bounds"] = missing_bounds(valid, missing)
    return {**estimate, "n_unjudged": unjudged, "n_truncated": truncated}


def missing_bounds(valid, missing):
    """What a share would be if all missing values were 0, and if all were 1.

    A judge may fail on just those traces that matter, and just those may be cut short: this is what
    that could hide.

    >>> missing_bounds([1, 0], 2)
    [0.25, 0.75]
    """
    hits = sum(valid)
    total = len(valid) + missing
    return [hits / total, (hits + missing) / total]


# --------------------------------------------------------------------------- one model on all sets

def parse_sets(specs, kinds=KINDS):
    """[(name, kind, path)] of sets written as `NAME=KIND:FILE`.

    Raises InputError with the remedy for any other form, and for a name that comes twice.
    """
    sets = {}
    for spec in specs:
        name, _, rest = spec.partition("=")
        kind, _, path = rest.partition(":")
        if not re.fullmatch(r"[\w-]+", name) or kind not in kinds or not path:
            raise InputError(
                f"--set {spec}: write NAME=KIND:FILE, where KIND is {', '.join(kinds)}."
            )
        if name in sets:
            raise InputError(f"The set {name} comes twice.")
        sets[name] = (name, kind, path)
    return list(sets.values())


def load_sets(sets, kinds=KINDS, limit=0):
    """{name: prompts} of sets; raises InputError for a prompt without a column that its kind needs.
    """
    loaded = {}
    for name, kind, path in sets:
        loaded[name] = load_prompts(path, limit)
        for prompt in loaded[name]:
            for column in kinds[kind].columns:
                if prompt.get(column) is None:
                    raise InputError(
                        f"{path}, id {prompt['id']}: "
                        f"a set of kind {kind} needs a column `{column}`."
                    )
    return loaded


def evaluate_set(name, kind, prompts, sampler, judge, folder, samples=1):
    """Sample and score one set; returns (its entry in metrics.json, number of prompts too long).

    kind: a Kind. Traces, steps and verdicts go to files in `folder`; a second call picks up where
    a killed one left off.
    """
    jobs, dropped = trace_jobs(prompts, samples, sampler)
    traces_path = folder / f"{name}.traces.jsonl"
    traces = sample_traces(traces_path, jobs, sampler, f"{folder.name}/{name}")
    steps = segment(traces)  # cheap, so made anew each time
    write_jsonl(folder / f"{name}.steps.jsonl", steps)
    by_id = {prompt["id"]: prompt for prompt in prompts}
    verdicts_path = folder / f"{name}.verdicts.jsonl"
    verdicts, more = kind.score(verdicts_path, traces, steps, by_id, judge)
    entry = {"samples": samples, **more}
    truncated = [by_id[trace["prompt_id"]] for trace in traces if trace["truncated"]]
    for metric, (values, prompt_ids) in kind.collect(verdicts).items():
        n_truncated = sum(kind.applies(metric, prompt) for prompt in truncated)
        entry[metric] = metric_estimate(values, prompt_ids, n_truncated, kind.truncated_scored)
    return entry, dropped


def evaluate_sets(sets, kinds, loaded, samples, sampler, judge, folder):
    """Evaluate one model on all sets, write metrics.json into `folder`, and return the counts.

    sets: as `parse_sets` gives them; loaded: {name: prompts}; samples: {name: samples per prompt}.
    Raises Unanswered where verdicts are missing, once all sets have been through.
    """
    folder = Path(folder)
    metrics = {}
    unanswered = []
    n_prompts = 0
    n_dropped = 0
    for name, kind, _ in sets:
        try:
            entry, dropped = evaluate_set(
                name, kinds[kind], loaded[name], sampler, judge, folder, samples[name]
            )
        except Unanswered as error:
            unanswered.append(error)
            continue
        metrics[name] = {"kind": kind, **entry}
        n_prompts += len(loaded[name])
        n_dropped += dropped
    raise_together(unanswered)
    write_json(folder / "metrics.json", {"sets": metrics})
    return {"sets": len(sets), "prompts": n_prompts, "short enough": n_prompts - n_dropped}


# ---------------------------------------------------------------------------------------- the table

def read_evaluations(specs):
    """Folders and metrics of finished evaluations by name, from `NAME=FOLDER` or `FOLDER`.

    Returns ({name: folder}, {name: contents of metrics.json}). Raises InputError with the remedy.
    """
    folders = {}
    evaluations = {}
    for spec in specs:
        if "=" in spec:
            name, _, folder = spec.partition("=")
        else:
            name = Path(spec).name
            folder = spec
        metrics_path = Path(folder) / "metrics.json"
        if not folder or not metrics_path.exists():
            raise InputError(
                f"{spec}: write NAME=FOLDER, a folder that `evaluate.py run` has finished."
            )
        if name in folders:
            raise InputError(f"{spec}: the name {name} comes twice; write OTHER={folder}.")
        check_output(folder)
        folders[name] = Path(folder)
        evaluations[name] = read_json(metrics_path, "sets")
    return folders, evaluations


def metric_rows(evaluations, words=None):
    """Rows of the before/after table: [(label, [metric or counts of each model, None if not run])].

    words: those of a domain, see `reworded`.

    >>> sets = {"sums": {"kind": "task", "samples": 1, "accuracy": {"value": 1.0}}}
    >>> metric_rows({"base": {"sets": sets}})
    [('sums: accuracy', [{'value': 1.0}])]
    """
    models = [evaluation["sets"] for evaluation in evaluations.values()]
    # Models may have been run on different sets: the table has every row that any of them has.
    metrics_of = {}  # name of a set -> its metrics, used as an ordered set
    for sets in models:
        for name, entry in sets.items():
            metrics = metrics_of.setdefault(name, {})
            for metric, result in entry.items():
                if isinstance(result, dict):
                    metrics[metric] = None
    rows = []
    for name, metrics in metrics_of.items():
        for metric in metrics:
            label = f"{name}: {reworded(ROW_LABELS.get(metric, metric), words)}"
            results = []
            for sets in models:
                # An empty result where the set was run, but had no case of this kind.
                results.append(sets[name].get(metric, {}) if name in sets else None)
            rows.append((label, results))
    return rows


def format_metric(result):
    """A metric as text: per cent, interval, n, and what is missing; or counts.

    >>> estimate = {"value": 0.5, "low": 0.1, "high": 0.9, "n": 4}
    >>> format_metric({**estimate, "n_unjudged": 0, "n_truncated": 1})
    '50.0% [10.0, 90.0] n=4, 1 truncated'
    """
    if result is None:
        return "not run"
    if not result:
        return "none"
    if "value" not in result:
        return ", ".join(f"{count} {name}" for name, count in result.items())
    if result["value"] is None:
        return "no verdicts" + format_missing(result)
    text = f"{100 * result['value']:.1f}%"
    text += f" [{100 * result['low']:.1f}, {100 * result['high']:.1f}] n={result['n']}"
    return text + format_missing(result)


def format_missing(result):
    """What a metric lacks as text: how much, and the bounds between which that leaves it.

    >>> format_missing({"n_unjudged": 1, "n_truncated": 1, "bounds": [0.25, 0.75]})
    ', 1 unjudged, 1 truncated (25.0 to 75.0)'
    """
    text = ""
    if result["n_unjudged"]:
        text += f", {result['n_unjudged']} unjudged"
    if result["n_truncated"]:
        text += f", {result['n_truncated']} truncated"
    if "bounds" in result:
        low, high = result["bounds"]
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return text


def format_rows(rows, words=None):
    """Rows of `metric_rows` as rows of text; words: those of a domain, see `reworded`."""
    formatted = []
    for label, results in rows:
        cells = [reworded(format_metric(result), words) for result in results]
        formatted.append((label, *cells))
    return formatted


def in_columns(lines):
    """Rows of cells as text in columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = []
    for line in lines:
        cells = map(str.ljust, line, widths)
        padded.append("  ".join(cells).rstrip())
    return "\n".join(padded)


# --------------------------------------------------------------------------------------- the report

def pair_card(pair):
    """A pair taken apart for the report: shared steps, and each side's reasoning and response."""
    # The chosen side begins with the trigger, but for white space. (Only pairs of harmful prompts
    # are shown, so there is one.)
    lead, trigger, rest = pair["chosen"].partition(pair["trigger"])
    chosen = split_reasoning(rest)
    rejected = split_reasoning(pair["rejected"])
    return {
        "prompt": pair["prompt"],
        "prefix": split_steps(pair["prefix"]),
        "trigger": lead + trigger,
        "chosen": split_steps(chosen.reasoning),
        "chosen_response": chosen.response,
        "rejected": split_steps(rejected.reasoning),
        "rejected_response": rejected.response,
    }


def make_report(run, specs, out, examples=6, domain="safety"):
    """Print the before/after table and write the report, one HTML file that needs nothing else.

    run: folder of a run; specs: its evaluations, see `read_evaluations`; examples: how many cards
    of each sort to show; domain: whose words it speaks.
    """
    own = load_domain(domain)
    folders, evaluations = read_evaluations(specs)
    rows = format_rows(metric_rows(evaluations, own.WORDS), own.WORDS)
    # Sets of any kind whose reasoning was judged have coloured traces to show.
    first, *_ = evaluations.values()
    judged_sets = [name for name, entry in first["sets"].items() if "reasoning" in entry]
    facts = read_run(Path(run), folders, judged_sets, examples)
    facts["pairs"] = list(map(pair_card, facts["pairs"]))
    write_report(out, evaluations, rows, facts, own.WORDS, own.GLOSSARY)
    fill_cards(folders, rows)
    print(in_columns([("", *evaluations), *rows]))
    print(f"report: {out}")


# ---------------------------------------------------------------------------------- command line

def add_eval_judge_flags(parser):
    """Flags of a judge for the evaluation alone."""
    parser.add_argument(
        "--eval-judge",
        help="judge of this evaluation, other than the one that built the data "
             "(default: --judge); key: EVAL_JUDGE_API_KEY",
    )
    parser.add_argument(
        "--eval-judge-model", help="model name to send to it (default: --judge-model)"
    )


def eval_judge_from_flags(args, out):
    """The judge that evaluates: the one of --eval-judge, else the one of --judge."""
    spec = args.eval_judge or args.judge
    model = args.eval_judge_model or args.judge_model
    keys = JUDGE_KEYS if spec == args.judge else EVAL_KEYS
    # A copy, because the flags are recorded as they were given.
    replaced = {"judge": spec, "judge_model": model, "out": out}
    return judge_from_flags(argparse.Namespace(**{**vars(args), **replaced}), keys)


def recorded_eval_flags(args, judge, **replaced):
    """Flags of an evaluation as they are recorded: with the judge that was used, by its name."""
    model = args.eval_judge_model or args.judge_model
    # The name holds a hash of rules or prompts: verdicts of different ones are never mixed.
    return recorded_flags(
        args,
        judge=judge.name,
        judge_model=model,
        eval_judge=None,
        eval_judge_model=None,
        **replaced,
    )


def print_metrics(folder):
    """Print the table of one finished evaluation."""
    _, evaluations = read_evaluations([f"{Path(folder).name}={folder}"])
    print(in_columns(format_rows(metric_rows(evaluations))))


def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Evaluate models and report.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "run",
        help="one model on all sets",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--out", help="folder to write (default: runs/eval/NAME of the model)")
    p.add_argument("--set", nargs="+", required=True, metavar="NAME=KIND:FILE",
                   help=f"prompts to evaluate on; KIND is {', '.join(KINDS)}")
    p.add_argument("--samples", type=int, default=1, help="samples per prompt")
    p.add_argument("--limit", type=int, default=0,
                   help="use only the first prompts of each set; 0 = all")
    add_stage_flags(p)
    add_sampler_flags(p)
    add_judge_flags(p)
    add_eval_judge_flags(p)
    p = commands.add_parser("report", help="table and report.html")
    p.add_argument("--run", required=True, help="run folder: its funnels, pairs and logs are shown")
    p.add_argument("--evals", nargs="+", required=True, metavar="NAME=FOLDER",
                   help="models in order, the first is the base")
    p.add_argument("--out", required=True, help="the HTML file to write")
    p.add_argument("--examples", type=int, default=6, help="cards of each kind (default: 6)")
    p.add_argument("--domain", default="safety", help="of domains/, whose words to use")
    return parser


def main(argv=None):
    """Run one stage from the command line; `run` where only flags are given."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "run")
    args = build_parser().parse_args(argv)
    if args.command == "report":
        make_report(args.run, args.evals, args.out, args.examples, args.domain)
        return
    out = args.out or f"runs/eval/{Path(args.model).name}"
    # All that could stop the run later is looked at before anything is sampled.
    judge = eval_judge_from_flags(args, out)
    sets = parse_sets(args.set)
    for _, kind, _ in sets:
        require_questions(judge, KINDS[kind].questions)
    loaded = load_sets(sets, limit=args.limit)
    samples = {name: args.samples for name in loaded}
    inputs = [args.model, *(path for _, _, path in sets)]

    def work():
        sampler = sampler_from_flags(args)
        counts = evaluate_sets(sets, KINDS, loaded, samples, sampler, judge, out)
        return counts, {"judge": judge.summary()}

    run_stage(__file__, out, recorded_eval_flags(args, judge), inputs, work)
    print_metrics(out)


if __name__ == "__main__":
    exit_cleanly(with_hands(main))
