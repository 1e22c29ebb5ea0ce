"""The stages that test_ranks.py runs: alone in its own process, and under torchrun.

    python -m torch.distributed.run --standalone --nproc-per-node 3 tests/stages_of_ranks.py RUN rollouts
"""
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import intervene
import model
from support.errors import exit_cleanly
from support.ranks import with_hands

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = str(ROOT / "toy" / "prompts" / "train_harmful.jsonl")
SAMPLING = ["--model", str(ROOT / "toy" / "model"), "--max-new-tokens", "150", "--batch-size", "2"]
DRAIN = 16  # so that rows are put aside


def run_stages(run, stages):
    """Some of the stages rollouts, pairs and evaluation, in the folder `run`."""
    whole = model.sample
    model.sample = functools.partial(whole, drain=DRAIN)
    try:
        for stage in stages:
            STAGES[stage](Path(run))
    finally:
        model.sample = whole


def rollouts(run):
    intervene.main(["rollouts", *SAMPLING, "--prompts", PROMPTS, "--limit", "12", "--samples", "2",
                    "--out", f"{run}/rollouts.jsonl"])


def pairs(run):
    traces = ["--traces", f"{run}/rollouts.jsonl"]
    steps = ["--steps", f"{run}/steps.jsonl"]
    verdicts = ["--verdicts", f"{run}/verdicts.jsonl"]
    intervene.main(["steps", *traces, "--out", f"{run}/steps.jsonl"])
    intervene.main(["judge", *traces, *steps, "--out", f"{run}/verdicts.jsonl"])
    intervene.main(["pairs", *SAMPLING, *traces, *steps, *verdicts, "--out", f"{run}/pairs.jsonl"])


def evaluation(run):
    evaluate.main(["run", *SAMPLING, "--limit", "9", "--out", f"{run}/eval",
                   "--set", f"direct=harmful:{PROMPTS}"])


STAGES = {"rollouts": rollouts, "pairs": pairs, "evaluation": evaluation}


if __name__ == "__main__":
    exit_cleanly(with_hands(lambda: run_stages(sys.argv[1], sys.argv[2:])))
