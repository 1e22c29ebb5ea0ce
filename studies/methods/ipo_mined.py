"""IPO with a pool of triggers mined from the model's own safe rollouts, as Section 3 mines its own.

The continuation safety ratio along rollouts of uncertain prompts, its safety turning points, and
the steps there that correct other traces best. The budget is a small one: `studies.csr` on whole
sentences, eight continuations each.
"""
from studies.lab import method, words_of

CSR = ["--at", "step", "--continuations", 8, "--uncertain", 12]
# Enough to choose six by; their test on further traces is a study's business.
CHOICE = ["--candidates", 12, "--held-out", 20, "--no-test"]


@method("IPO, stage 1, mined triggers", "arXiv 2509.24393, Section 3",
        "its pool comes from turning points too, but is picked by hand and by GPT-4o")
def ipo_mined(lab):
    """The pool is mined once for each seed, on the training prompts."""
    files = words_of(lab.judge(lab.rollouts()))
    sampling = ["--model", lab.model, *lab.sampling_flags, *lab.judging]
    folder = lab.shared / lab.name  # of this method alone, so that --again makes it anew
    csr = lab.run("studies.csr", *sampling, *files, *CSR, "--out", folder / "csr.jsonl")
    points = lab.run(
        "studies.turning_points", "--model", lab.model, *files, "--csr", csr,
        "--out", folder / "turning_points.jsonl",
    )
    chosen = lab.run(
        "studies.triggers", *sampling, *files, *CHOICE, "--triggers", lab.triggers,
        "--points", points, "--out", folder / "mined.jsonl",
    )
    pool = chosen.with_name("mined_triggers.txt")
    pairs = lab.run(
        "intervene", "pairs", *sampling, *files, "--triggers", pool,
        "--out", folder / "pairs.jsonl",
    )
    return lab.train(pairs)
