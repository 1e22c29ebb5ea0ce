"""OPSA: on-policy self-distillation from the model that is told to think of safety first."""
from studies.lab import method
from studies.methods.grpo import size_flags


@method(
    "OPSA",
    paper="arXiv 2605.15239",
    claims="More safety at less loss of reasoning than off-policy distillation, by 8.85 points for "
    "R1-Distill-1.5B and 5.49 for Qwen3-0.6B.",
)
def opsa(lab):
    """Six rollouts of each harmful prompt, learned from the instructed start model."""
    # PAPER: benign prompts have a context of their own there, against needless refusals; here only
    # harmful prompts are learned, as by the other methods.
    return lab.run(
        "studies.opsa", "train",
        "--model", lab.model,
        "--prompts", lab.prompts,
        "--limit", lab.limit,
        "--instruction", lab.instruction,
        # CHOICE: half of GRPO's rollouts, two at a time, because they need not be compared. On the
        # tiny model the loss is down after the first epoch.
        "--samples", 2,
        "--epochs", 3,
        "--prompts-per-step", 32,
        *lab.sampling,
        *size_flags(lab.train_args),
        "--lr", lab.lr,
        "--seed", lab.seed,
        "--out", lab.out / "model",
    )
