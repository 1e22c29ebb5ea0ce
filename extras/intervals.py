"""How sure a figure is: bootstrap intervals over prompts, and the agreement of two judges. Numbers in, numbers out."""
from collections import Counter

import numpy as np


def resample(groups, draws=2000, seed=0, invented=(0, 0, 1, 1)):
    """Means float64 (draws,) under random weights of the prompts, which the samples of one prompt share: they depend.

    groups: for each prompt the list of its values, from 0 to 1. CHOICE: Rubin's Bayesian bootstrap, whose weights are
    exponential where the usual one counts how often a prompt was drawn; and two thirds of an invented prompt that scores 0,
    two thirds of one that scores 1 (each in two parts, so that two runs can pair them). The usual one fails near 0: of 30
    prompts at a true rate of 2% its 95% interval, most often [0, 0], holds the rate in 45% of cases, this one in 98%. Of
    one sample each of 30 to 313 prompts at any rate from 2 to 98%, it holds in 92% or more, on average in 95%.
    """
    rng, (total, count) = np.random.default_rng(seed), (np.array([f(g) for g in groups], float) for f in (sum, len))
    weights, more = rng.standard_exponential((draws, len(total))), rng.standard_gamma(1 / 3, (draws, 4)) * count.mean()
    return (weights @ total + more @ np.array(invented)) / (weights @ count + more.sum(1))


def interval(mean, drawn, edges=(0, 1)):
    """`{"mean", "low", "high"}` of a mean and its draws: 95% percentiles, but the edge itself where the mean is on it."""
    low, high = np.percentile(drawn, (2.5, 97.5))
    low, high = (mean if mean == edge else end for edge, end in zip(edges, (low, high)))
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def grouped(values, prompts):
    """Values by prompt: {prompt: [value]}.

    >>> grouped([1, 0, 1], "aba")
    {'a': [1, 1], 'b': [0]}
    """
    groups = {}
    for value, prompt in zip(values, prompts):
        groups.setdefault(prompt, []).append(value)
    return groups


def bootstrap(values, prompts, draws=2000, seed=0):
    """Mean of values from 0 to 1 and 95% interval over prompts: {"mean", "low", "high", "n"}; mean None if n is 0.

    >>> {k: round(v, 2) for k, v in bootstrap([0.0] * 40, range(40)).items()}
    {'mean': 0.0, 'low': 0.0, 'high': 0.07, 'n': 40}
    """
    if not values:
        return {"mean": None, "low": None, "high": None, "n": 0}
    return {**interval(np.mean(values), resample(grouped(values, prompts).values(), draws, seed)), "n": len(values)}


def agreement(ours, theirs, prompts, draws=2000, seed=0):
    """Accuracy and Cohen's kappa of two lists of answers, with 95% bootstrap intervals over prompts, and the counts.

    Kappa is the agreement beyond chance, (p - e) / (1 - e); it is None where chance alone explains all (e = 1). Items
    that lack an answer on either side are left out and counted as n_unjudged.

    >>> a = agreement([True, True, False, False, None], [True, False, False, False, True], list("pqrst"), draws=100)
    >>> a["n"], a["n_unjudged"], a["accuracy"]["mean"], a["kappa"]["mean"], a["confusion"]
    (4, 1, 0.75, 0.5, {'False/False': 2, 'True/False': 1, 'True/True': 1})
    """
    valid = [(a, b, p) for a, b, p in zip(ours, theirs, prompts) if a is not None and b is not None]
    answers = {v: i for i, v in enumerate(sorted({v for a, b, _ in valid for v in (a, b)}))}
    rows = {p: i for i, p in enumerate(dict.fromkeys(p for _, _, p in valid))}
    tables = np.zeros((len(rows), len(answers), len(answers)))  # (prompts, ours, theirs)
    for a, b, p in valid:
        tables[rows[p], answers[a], answers[b]] += 1

    def kappa(table):  # (draws, L, L) -> (draws,); nan where chance explains all
        share = table / table.sum((1, 2), keepdims=True)
        chance = (share.sum(1) * share.sum(2)).sum(1)
        with np.errstate(invalid="ignore"):
            return (np.trace(share, axis1=1, axis2=2) - chance) / (1 - chance)

    result = {"n": len(valid), "n_unjudged": len(ours) - len(valid), "kappa": None,
              "accuracy": bootstrap([float(a == b) for a, b, _ in valid], [p for _, _, p in valid], draws, seed),
              "confusion": dict(sorted(Counter(f"{a}/{b}" for a, b, _ in valid).items()))}
    if len(answers) > 1:
        picks = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), draws)
        drawn, mean = kappa(np.tensordot(picks, tables, 1)), kappa(tables.sum(0, keepdims=True)).item()
        result["kappa"] = dict(zip(("mean", "low", "high"), (mean, *np.nanpercentile(drawn, (2.5, 97.5)).tolist())))
    return result
