"""GRPO, the paper's baseline, with three rewards; the training is that of studies/grpo.py."""
import argparse

from studies.lab import method

PAPER = "arXiv 2509.24393, baseline"
CLAIM = "DS-8B, reward not said: 18.5% harmful reasoning, in more than twice the time of IPO"
# CHOICE: as many rollouts of a prompt as IPO makes generations: six, and up to six interventions.
# The paper has at least 40, which is GRPO_EPOCHS=4.
GROUP = ["--group-size", 12]


def train(lab, reward, *flags):
    """GRPO on the harmful prompts with a reward of studies.grpo; returns the model."""
    return lab.run(
        "studies.grpo", "--model", lab.model, "--prompts", lab.prompts, "--limit", lab.limit,
        *lab.sampling, *lab.judging, *size_flags(lab.train_args), "--reward", reward,
        *GROUP, "--epochs", lab.settings.grpo_epochs, *flags, "--lr", lab.lr, "--seed", lab.seed,
        "--out", lab.out / "model",
    )


def size_flags(train_args):
    """Of the flags of all other trainings those that decide what is trained, and in what memory.

    The rest are not those of a training that samples.

    >>> size_flags(["--epochs", "1", "--lora-rank", "8", "--checkpoint-activations"])
    ['--lora-rank', '8', '--checkpoint-activations']
    >>> size_flags(["--batch-size", "8", "--micro-tokens=4096"])
    ['--micro-tokens', '4096']
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--lora-rank")
    parser.add_argument("--micro-tokens")
    parser.add_argument("--checkpoint-activations", action="store_true")
    found, _ = parser.parse_known_args(train_args)
    flags = []
    if found.lora_rank:
        flags += ["--lora-rank", found.lora_rank]
    if found.micro_tokens:
        flags += ["--micro-tokens", found.micro_tokens]
    if found.checkpoint_activations:
        flags.append("--checkpoint-activations")
    return flags


@method("GRPO, I[y safe]", PAPER, CLAIM)
def grpo_response(lab):
    """A reward for a safe response."""
    return train(lab, "response")


@method("GRPO, I[z safe] - I[y safe]", PAPER, CLAIM)
def grpo_gap(lab):
    """The gap between reasoning and response, taken literally."""
    return train(lab, "gap")


@method("GRPO, I[z safe]", PAPER, CLAIM)
def grpo_reasoning(lab):
    """A reward for safe reasoning."""
    return train(lab, "reasoning")
