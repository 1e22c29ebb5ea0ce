"""SFT on safe traces that somebody else has written, as STAR-1 and SafeChain do."""
from data import load_prompts, split_reasoning
from studies.lab import method
from studies.methods.examples import answered_examples, opening
from support.errors import InputError


@method("Teacher's traces", "arXiv 2504.01903, STAR-1",
        "1,000 traces of R1: 40% safer on average over four sets, reasoning down by 1.1%",
        needs_teacher=True)
def teacher(lab):
    """A teacher's safe traces for the harmful prompts."""
    return lab.sft(lab.write("teacher.jsonl", teacher_examples(lab)))


@method("Teacher's traces, mixed", "arXiv 2502.12025, SafeChain",
        "safer than before with reasoning kept on six sets; but less safe in the table of "
        "2601.23143 (Qwen3-4B: 22.6% harm before, 31.6% after)",
        needs_benign=True, needs_teacher=True)
def teacher_mixed(lab):
    """The same beside benign prompts.

    CHOICE: these have the base model's own full answers; SafeChain has a teacher's there too.
    """
    examples = teacher_examples(lab) + answered_examples(lab)
    return lab.sft(lab.write("teacher_mixed.jsonl", examples))


def teacher_examples(lab):
    """The teacher's prompts and completions for the harmful prompts in use.

    Raises InputError where there are none, or where one has no completion.
    """
    begin = opening(lab.tokenizer())
    in_use = {prompt["prompt"] for prompt in load_prompts(lab.prompts, lab.limit)}
    examples = []
    for record in load_prompts(lab.teacher):
        if not isinstance(record.get("completion"), str):
            raise InputError(f"{lab.teacher}, {record['id']}: no text `completion`. Add it.")
        if record["prompt"] in in_use:
            completion = begin + from_reasoning(record["completion"])
            examples.append({"prompt": record["prompt"], "completion": completion})
    if not examples:
        raise InputError(
            f"{lab.teacher}: no trace for the prompts of {lab.prompts}. Give a file that has their "
            "texts as `prompt`, with `completion`."
        )
    return examples


def from_reasoning(completion):
    r"""A completion from the reasoning on, whether or not it came with <think>.

    >>> from_reasoning("<think>\nNo.\n</think>\n\nSorry.")
    'No.\n</think>\n\nSorry.'
    """
    return completion[len(split_reasoning(completion).opening):]
