"""DPO, the paper's closest baseline, in its two readings."""
from collections import defaultdict

from intervene import make_pair
from model import eos_ids
from studies.lab import method

PAPER = "arXiv 2509.24393, ablation"


@method("DPO, whole trajectory", PAPER,
        "19.0% harmful reasoning, if it is this DPO that the paper means; IPO has 10.9%")
def dpo(lab):
    """The pairs of IPO, with both terms of the loss scored from the prompt on."""
    return lab.train(lab.pairs(), "--score-from", "prompt")


@method("DPO, independent rollouts", PAPER,
        "19.0% harmful reasoning, if it is this DPO that the paper means")
def dpo_independent(lab):
    """Pairs of a safe and an unsafe rollout of the same prompt."""
    traces = lab.judged(lab.rollouts())
    tokenizer = lab.tokenizer()
    pairs = independent_pairs(traces, tokenizer, eos_ids(lab.model, tokenizer))
    return lab.train(lab.write("independent.jsonl", pairs))


def independent_pairs(traces, tokenizer, eos):
    """Pairs of judged rollouts that share only the prompt.

    Safe: complete, reasoning and response safe; unsafe: complete, reasoning unsafe. CHOICE: every
    unsafe rollout makes one pair, with its prompt's safe ones in turn; a prompt that lacks either
    kind makes none.
    """
    safe = defaultdict(list)  # traces by prompt
    unsafe = defaultdict(list)
    for trace in traces:
        if trace["truncated"]:
            continue
        if trace["reasoning_safe"] is False:
            unsafe[trace["prompt_id"]].append(trace)
        elif trace["reasoning_safe"] and trace["response_safe"]:
            safe[trace["prompt_id"]].append(trace)

    pairs = []
    for prompt, bad_ones in unsafe.items():
        good_ones = safe[prompt]
        if not good_ones:
            continue
        for k, rejected in enumerate(bad_ones):
            chosen = {**good_ones[k % len(good_ones)], "id": f"{rejected['id']}@independent"}
            origin = {"source": "independent", "interventions": 0}
            pairs.append(make_pair(tokenizer, eos, rejected, chosen, 0, "", **origin))
    return pairs
