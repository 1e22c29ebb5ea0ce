"""IPO without a pool: the model writes the trigger of each trace itself (studies.self_triggers)."""
from studies.lab import method, words_of

PAPER = "arXiv 2509.24393, after its future work"
CLAIMS = "not in the paper, which picks its pool of triggers by hand"


@method("IPO, stage 1, self-written triggers", PAPER, CLAIMS)
def ipo_self_written(lab):
    """The model is asked to think of safety first, and continues from the cue."""
    return lab.train(written_pairs(lab, "instruction"))


@method("IPO, stage 1, resampled triggers", PAPER, CLAIMS)
def ipo_resampled(lab):
    """The model continues from the cue without being asked, until that turns out safe."""
    return lab.train(written_pairs(lab, "resample"))


def written_pairs(lab, way):
    """The pairs of one way to write triggers, of the rollouts that all methods share."""
    files = lab.judge(lab.rollouts())
    return lab.run(
        "studies.self_triggers", "pairs", "--model", lab.model, *lab.sampling_flags, *lab.judging,
        "--instruction", lab.instruction, "--write", way, *words_of(files),
        # In a folder of this method alone, so that --again makes them anew.
        "--out", lab.shared / lab.name / "pairs.jsonl",
    )
