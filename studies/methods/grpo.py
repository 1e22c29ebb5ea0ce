"""GRPO, the paper's baseline, with three rewards; the training is that of studies/grpo.py."""
from studies.lab import method

PAPER = "arXiv 2509.24393, baseline"
# CHOICE: as many rollouts of a prompt as IPO makes generations: six, and up to six interventions.
# The paper has at least 40, which is GRPO_EPOCHS=4.
GROUP = ["--group-size", 12]


def train(lab, reward, *flags):
    """GRPO on the harmful prompts with a reward of studies.grpo; returns the model."""
    return lab.run(
        "studies.grpo", "--model", lab.model, "--prompts", lab.prompts, "--limit", lab.limit,
        *lab.sampling, *lab.judging, "--reward", reward,
        *GROUP, "--epochs", lab.settings.grpo_epochs, *flags, "--lr", lab.lr, "--seed", lab.seed,
        "--out", lab.out / "model",
    )


@method("GRPO, I[y safe]", PAPER, "DS-8B, reward not said: 18.5% harmful reasoning")
def grpo_response(lab):
    """A reward for a safe response."""
    return train(lab, "response")


@method("GRPO, I[z safe] - I[y safe]", PAPER, "as above")
def grpo_gap(lab):
    """The gap between reasoning and response, taken literally."""
    return train(lab, "gap")


@method("GRPO, I[z safe]", PAPER, "as above; more than twice the time of IPO")
def grpo_reasoning(lab):
    """A reward for safe reasoning."""
    return train(lab, "reasoning")
