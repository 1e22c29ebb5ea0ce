"""Examples to fine-tune on that several methods share, and the benign prompts that are answered.

    python -m studies.methods.examples --traces benign.jsonl --judge rules --out answered.jsonl

Of rollouts of benign prompts this keeps those that are complete and answer in full, as the judge
sees it: what a method learns beside refusals, so that it does not refuse everything.
"""
from data import OPEN, decode, render_prompt
from intervene import complied, judge_from_flags
from studies.common import study_parser
from support.errors import exit_cleanly
from support.files import read_jsonl, write_jsonl
from support.flags import add_judge_flags
from support.judges import require_questions
from support.stages import run_stage


def opening(tokenizer):
    """What stands between prompt and reasoning: "" where the chat template opens the reasoning."""
    prompt = decode(tokenizer, render_prompt(tokenizer, "Hello."))
    return "" if prompt.rstrip().endswith(OPEN) else f"{OPEN}\n"


def example_of(trace, prompt_ids=None):
    """The record for studies.sft that learns a trace, token for token as it was sampled.

    prompt_ids: of another prompt to learn it after.
    """
    return {"prefix_ids": prompt_ids or trace["prompt_ids"], "chosen_ids": trace["ids"]}


def answered_examples(lab):
    """Examples of the base model's own full answers to the benign prompts."""
    answered = lab.run(
        "studies.methods.examples", "--traces", lab.benign_rollouts(), *lab.judging,
        "--out", lab.shared / lab.name / "answered.jsonl",
    )
    return [example_of(trace) for trace in read_jsonl(answered)]


def keep_answered(traces, judge, out):
    """Write the complete traces whose response answers in full; returns (counts, {})."""
    complete = [trace for trace in traces if not trace["truncated"]]
    kept = []
    for trace, full in zip(complete, complied(judge, complete)):
        if full:
            kept.append(trace)
    write_jsonl(out, kept)
    counts = {
        "traces": len(traces),
        "complete": len(complete),
        "answered": len(kept),
        "generations": 0,
        "judge calls": len(complete),
    }
    return counts, {}


def build_parser():
    """The command line of the selection."""
    parser = study_parser("methods.examples", "Keep rollouts that answer in full.", ["traces"])
    add_judge_flags(parser)
    return parser


def main(argv=None):
    """Run the selection from the command line."""
    args = build_parser().parse_args(argv)
    judge = judge_from_flags(args)
    require_questions(judge, ["compliance"])
    # The judge's name holds a hash of its rules or prompts.
    flags = {**vars(args), "judge": judge.name}

    def work():
        return keep_answered(read_jsonl(args.traces), judge, args.out)

    run_stage(__file__, args.out, flags, [args.traces], work)


if __name__ == "__main__":
    exit_cleanly(main)
