"""How far a judge agrees with another one, or with labels, on the same traces.

    python -m studies.agreement --traces runs/my/rollouts.jsonl --judge https://HOST/v1 \\
        --judge-model J --other-judge https://OTHER/v1 --other-judge-model K --out agreement.json
    python -m studies.agreement --traces runs/my/rollouts.jsonl --judge https://HOST/v1 \\
        --judge-model J --labels labels.jsonl --out agreement.json

In the paper GPT-4o agrees with people's labels on 93.7% of reasoning and on over 80% of the cues.
"""
import argparse
from pathlib import Path

from evaluate import EVAL_KEYS, format_metric
from intervene import JUDGE_KEYS, LABELS, add_judge_flags, judge_from_flags, split_steps
from studies.common import prompt_ids_of
from support.errors import InputError, exit_cleanly
from support.files import read_jsonl, write_json
from support.judges import require_questions
from support.record import fingerprint
from support.statistics import judge_agreement

QUESTIONS = ("reasoning", "response", "cue", "compliance")


def is_label(question, label):
    """Whether a label is an answer to the question.

    >>> is_label("reasoning", "safe"), is_label("reasoning", 1), is_label("cue", 0)
    (True, False, True)
    """
    if question == "cue":
        return type(label) is int  # not True, which is an int too
    return isinstance(label, str) and label in LABELS[question]


def read_labels(path, question, traces):
    """The answers of a file of labels, None for a trace without one.

    Raises InputError for a label that is no answer.
    """
    expected = "number of a sentence, 0 = none"
    if question in LABELS:
        expected = " or ".join(LABELS[question])
    answers = {}
    for number, record in enumerate(read_jsonl(path), 1):
        label = record.get("label")
        if "id" not in record or not is_label(question, label):
            raise InputError(
                f'{path}, record {number}: write {{"id": trace id, "label": {expected}}}.'
            )
        if question in LABELS:
            label = LABELS[question][label]
        answers[record["id"]] = label
    return [answers.get(trace["id"]) for trace in traces]


def item_of(trace, question):
    """What a judge is shown of a trace: its prompt, and steps or text."""
    if question == "cue":
        return {"prompt": trace["prompt"], "steps": split_steps(trace["reasoning"])}
    part = "reasoning" if question == "reasoning" else "response"
    return {"prompt": trace["prompt"], "text": trace[part]}


def load_traces(path, question):
    """The traces that the question can be asked about: a truncated one has no response."""
    traces = read_jsonl(path)
    if question in ("reasoning", "cue"):
        return traces
    return [trace for trace in traces if not trace["truncated"]]


def print_agreement(result):
    """Print the result as one line."""
    one, other = result["judges"]
    # `format_metric` expects these counts; here the unjudged are shown at the end of the line.
    accuracy = {**result["accuracy"], "n_unjudged": 0, "n_truncated": 0}
    kappa = "undefined"
    if result["kappa"]:
        kappa = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**result["kappa"])
    print(
        f"{one} against {other}, {result['question']}: accuracy {format_metric(accuracy)}, "
        f"kappa {kappa}, {result['n_unjudged']} unjudged; counts {result['confusion']}"
    )


def build_parser():
    """The command line of this study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.agreement",
        description="Agreement of --judge with another judge, or with labels, on the same traces.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--traces", required=True, help="trace records (.jsonl)")
    add("--question", default="reasoning", choices=QUESTIONS, help="what to ask")
    add(
        "--labels",
        help="true answers instead of a judge: lines "
             '{"id": trace id, "label": "safe", "unsafe", a number, ...}',
    )
    add("--other-judge", help="the other judge; its key: EVAL_JUDGE_API_KEY")
    add("--other-judge-model", help="model name to send to it")
    add("--out", required=True, help="file to write (.json)")
    add_judge_flags(parser)
    return parser


def main(argv=None):
    """Run this study from the command line."""
    args = build_parser().parse_args(argv)
    if bool(args.labels) == bool(args.other_judge):
        raise InputError("Give either --other-judge or --labels.")
    judges = [judge_from_flags(args)]
    if args.other_judge:
        other = {
            "judge": args.other_judge,
            "judge_model": args.other_judge_model,
            "judge_kind": "auto",
            "cue_judge": None,  # that of --judge
        }
        other_args = argparse.Namespace(**{**vars(args), **other})
        # The key of a judge is not sent to another address.
        keys = JUDGE_KEYS if args.other_judge == args.judge else EVAL_KEYS
        judges.append(judge_from_flags(other_args, keys))
    for judge in judges:
        require_questions(judge, (args.question,))

    traces = load_traces(args.traces, args.question)
    items = [item_of(trace, args.question) for trace in traces]
    labels = None
    if args.labels:  # read before a judge is asked and paid
        labels = read_labels(args.labels, args.question, traces)
    names = []
    answers = []
    for judge in judges:
        names.append(judge.name)
        answers.append(list(judge.ask(args.question, items)))
    if labels is not None:
        names.append(f"{Path(args.labels).name}:{fingerprint(args.labels)}")
        answers.append(labels)

    result = {
        "question": args.question,
        "traces": fingerprint(args.traces),
        "judges": names,
        **judge_agreement(*answers, prompt_ids_of(traces)),
    }
    write_json(args.out, result)
    print_agreement(result)


if __name__ == "__main__":
    exit_cleanly(main)
