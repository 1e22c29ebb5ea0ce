"""ThinkSafe: the model, asked to think of safety first, writes the safe traces that it learns."""
from data import load_prompts, render_prompt
from intervene import is_safe
from studies.common import load_instruction, with_instruction
from studies.lab import method
from studies.methods.examples import answered_examples, example_of


@method("ThinkSafe", "arXiv 2601.23143",
        "Qwen3-4B: average harm 22.6% before, 5.1% after, reasoning 74.5% and 77.2%, with about an "
        "eighth of the compute of GRPO", needs_benign=True)
def thinksafe(lab):
    """Safe traces under the instruction, learned without it, and full answers to benign prompts.

    As many generations for each harmful prompt as IPO has rollouts.
    """
    prompts = load_prompts(lab.prompts, lab.limit)
    instruction = load_instruction(lab.instruction)
    # CHOICE: the judge sees the instructed prompt too, as it is what the trace answers.
    asked = lab.write("thinksafe/prompts.jsonl", with_instruction(prompts, instruction))
    traces = lab.judged(lab.rollouts(lab.shared / "thinksafe", prompts=asked))
    safe = restored_examples(traces, prompts, lab.tokenizer())
    return lab.sft(lab.write("thinksafe.jsonl", safe + answered_examples(lab)))


def restored_examples(traces, prompts, tokenizer):
    """The traces that are complete and safe, as examples after their prompts as they were."""
    prompt_ids = {}
    for prompt in prompts:
        prompt_ids[prompt["id"]] = render_prompt(tokenizer, prompt["prompt"])
    safe = [trace for trace in traces if is_safe(trace)]
    return [example_of(trace, prompt_ids[trace["prompt_id"]]) for trace in safe]
