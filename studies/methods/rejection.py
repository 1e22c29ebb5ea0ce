"""Rejection sampling: of IPO's own rollouts the model learns those that are good already."""
from intervene import is_safe
from studies.lab import method
from studies.methods.examples import example_of


@method("Rejection sampling", "arXiv 2203.14465, STaR: one round, without hints",
        "a model improves itself by learning its own reasoning where that led to right answers")
def rejection(lab):
    """SFT on the rollouts whose reasoning and response are safe (right, for arithmetic)."""
    traces = lab.judged(lab.rollouts())
    examples = [example_of(trace) for trace in traces if is_safe(trace)]
    return lab.sft(lab.write("rejection.jsonl", examples))
