"""RECAP: reinforcement learning from bad beginnings, rewarded for safe ends.

Some groups of rollouts begin with harmful reasoning that is put there, so that the policy learns to
get out of it again; the prefix itself is not learned.
"""
from studies.common import step_starts
from studies.lab import method
from studies.methods.grpo import train


@method(
    "RECAP",
    paper="arXiv 2510.00938",
    claims="12.3% safer on harmful and 21.0% on jailbreak prompts, with the same token budget",
)
def recap(lab):
    """GRPO on responses, half of whose groups begin with unsafe reasoning."""
    # PAPER: it has benign prompts too, which begin with a needless refusal and are rewarded for an
    # answer; here, as in the other methods with GRPO, there are harmful prompts only.
    # CHOICE: the prefixes are the base model's own, because nothing else writes its language.
    prefixes = lab.write("recap_prefixes.jsonl", unsafe_beginnings(lab))
    # The reward is for the response: what was put there is unsafe reasoning, so that a reward for
    # reasoning would be the same for all of a group.
    return train(lab, "response", "--prefixes", prefixes, "--prefix-share", 0.5)


def unsafe_beginnings(lab):
    """The base model's unsafe rollouts up to and with the step of the first cue."""
    tokenizer = lab.tokenizer()
    prefixes = []
    for trace in lab.judged(lab.rollouts()):
        if trace["reasoning_safe"] is False and trace["cue"]:
            starts = step_starts(tokenizer, trace, trace["steps"])
            end = starts[trace["cue"]]  # where the step after the cue begins
            prefixes.append({"prompt_id": trace["prompt_id"], "ids": trace["ids"][:end]})
    return prefixes
