"""Intervened Preference Optimization and its variants."""
from data import load_prompts
from studies.lab import method

PAPER = "arXiv 2509.24393"
MORE = "N = 1 is used; more interventions leave less harm without training (60, 40, 25%)"
ONLINE_ROUNDS = 3


@method("IPO, stage 1", PAPER,
        "DS-8B: harmful reasoning 71.5% before, 15.3% after; SFT 42.3%, DPO 19.0% and IPO 10.9% in "
        "its ablation of the algorithm")
def ipo(lab):
    """Pairs by intervention, and the preference loss from h on."""
    return lab.train(lab.pairs())


@method("IPO, both stages", PAPER,
        "XSTest compliance of DS-8B about 98% before, 80% after, with the stage against "
        "over-refusal", needs_benign=True)
def ipo_both(lab):
    """Stage 1, then its model trained further on the same pairs and on benign ones."""
    stage1 = ipo(lab.as_method("ipo"))
    benign = lab.run(
        "intervene", "benign", "--model", stage1, *lab.sampling_flags, *lab.judging,
        "--triggers", lab.triggers, "--base", lab.benign_rollouts(),
        "--traces", lab.benign_rollouts(lab.out, stage1), "--out", lab.out / "benign_pairs.jsonl",
    )
    return lab.train([lab.pairs(), benign], "--reference", lab.model, model=stage1)


@method("IPO, stage 1, two interventions", PAPER, MORE)
def ipo_n2(lab):
    """Where the first trigger does not hold, the next cue is replaced as well."""
    return lab.train(lab.pairs(rounds=2, name=f"{lab.name}/pairs"))


@method("IPO, stage 1, three interventions", PAPER, MORE)
def ipo_n3(lab):
    """Three rounds of intervention."""
    return lab.train(lab.pairs(rounds=3, name=f"{lab.name}/pairs"))


@method("IPO, stage 1, online", PAPER, "not in the paper, whose pairs come from the base model")
def ipo_online(lab):
    """Three rounds of data and training, each on a third of the prompts, from the moving policy."""
    prompts = load_prompts(lab.prompts, lab.limit)
    model = lab.model
    for n in range(ONLINE_ROUNDS):
        part = lab.write(f"online/prompts{n}.jsonl", prompts[n::ONLINE_ROUNDS])
        folder = lab.out / f"round{n}"
        pairs = lab.pairs(folder, model, prompts=part)
        # CHOICE: the reference stays the base model, as in stage 2.
        out = lab.out / "model" if n == ONLINE_ROUNDS - 1 else folder / "model"
        model = lab.train(pairs, "--reference", lab.model, model=model, out=out)
    return model
