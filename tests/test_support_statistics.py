"""Intervals against known rates, closed forms and hand-computed numbers."""
import math
import random

import numpy as np
import pytest

from support import statistics
from support.statistics import (
    DIFFERENCE,
    SHARE,
    UNBOUNDED,
    bootstrap_means,
    column_estimates,
    correlations,
    format_estimate,
    interval_of,
    judge_agreement,
    mean_estimate,
    student_interval,
    wilson,
)


# ----------------------------------------------------------------------------------------- means

def test_bootstrap_of_independent_samples_matches_the_normal_interval():
    rng = random.Random(0)
    values = [int(rng.random() < 0.3) for _ in range(400)]
    e = mean_estimate(values, range(400), draws=5000)
    p = sum(values) / 400
    half = 1.96 * math.sqrt(p * (1 - p) / 400)
    assert e["value"] == p and e["n"] == 400
    assert e["low"] == pytest.approx(p - half, abs=0.006)
    assert e["high"] == pytest.approx(p + half, abs=0.006)


def test_the_draws_are_the_ones_that_finished_runs_were_reported_with():
    """Numbers that older runs hold; another kind or order of draws would change them."""
    def ends(e):
        return [e["low"], e["high"]]
    exact = pytest.approx
    none_of_58 = mean_estimate([0.0] * 58, range(58))
    assert ends(none_of_58) == exact([0.0, 0.04566345926081222], rel=1e-12)
    values = [float(i % 7 == 0) for i in range(60)]
    e = mean_estimate(values, [i // 2 for i in range(60)], draws=500, seed=3)
    assert ends(e) == exact([0.08182445409559692, 0.24815693662789332], rel=1e-12)
    ours = [True] * 25 + [False] * 25
    theirs = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    a = judge_agreement(ours, theirs, [i // 2 for i in range(50)])
    assert ends(a["kappa"]) == exact([0.050569493417214305, 0.7330960854092526], rel=1e-12)
    assert ends(a["accuracy"]) == exact([0.5058480778627709, 0.8412867548610629], rel=1e-12)


def test_bootstrap_resamples_prompts_not_samples():
    values = [1] * 50 + [0] * 50
    two_prompts = [0] * 50 + [1] * 50  # each all or nothing
    e = mean_estimate(values, two_prompts)
    assert e["low"] < 0.2 and e["high"] > 0.8
    e = mean_estimate(values, range(100))
    assert e["low"] > 0.38 and e["high"] < 0.62


def coverage(prompts, samples, rate, spread, trials=1000):
    """Share of simulated sets whose interval holds the rate; prompts' rates vary by a beta law."""
    rng, held = np.random.default_rng(1), 0
    names = np.repeat(np.arange(prompts), samples).tolist()
    for trial in range(trials):
        rates = np.full(prompts, rate)
        if spread:
            rates = rng.beta(rate * spread, (1 - rate) * spread, prompts)
        values = rng.binomial(1, np.repeat(rates, samples)).tolist()
        e = mean_estimate(values, names, draws=400, seed=trial)
        held += e["low"] - 1e-9 <= rate <= e["high"] + 1e-9
    return held / trials


@pytest.mark.parametrize("prompts, samples, rate, spread", [
    (250, 1, 0.3, 0), (100, 4, 0.3, 2.0), (100, 1, 0.1, 0)])
def test_95_percent_intervals_hold_the_rate_in_95_percent_of_trials(prompts, samples, rate, spread):
    assert 0.93 <= coverage(prompts, samples, rate, spread) <= 0.97


def test_intervals_of_small_sets_near_0_do_not_collapse():
    assert coverage(30, 1, 0.02, 0) > 0.93  # the usual bootstrap's holds it in 45% of trials
    e = mean_estimate([0] * 30, range(30))
    assert e["low"] == 0 and 0.05 < e["high"] < 0.15 and e["value"] == 0


def test_where_the_mean_is_on_an_edge_so_is_the_interval():
    drawn = np.array([0.1, 0.2, 0.3])
    assert interval_of(0, drawn)["low"] == 0 and interval_of(1, drawn)["high"] == 1
    assert interval_of(0, drawn, (-1, 1))["low"] == pytest.approx(0.105)


# --------------------------------------------------------------------------------------- columns

def column_coverage(sample, truth, invented, trials=2000, columns=50):
    """Share of columns of 30 prompts whose interval holds the truth; sample(shape) draws them."""
    held = 0
    for trial in range(trials // columns):
        table = sample((30, columns))
        for e in column_estimates(table, range(30), draws=400, seed=trial, invented=invented):
            held += e["low"] - 1e-9 <= truth <= e["high"] + 1e-9
    return held / trials


def test_intervals_of_30_shares_at_2_percent_hold_them():
    rng = np.random.default_rng(2)
    assert column_coverage(lambda shape: rng.random(shape) < 0.02, 0.02, SHARE) > 0.93


@pytest.mark.parametrize("ours, theirs", [(0.9, 0.6), (0.5, 0.5), (0.3, 0.3), (0.3, 0.0),
                                          (0.1, 0.05), (0.05, 0.02)])
def test_intervals_of_30_differences_hold_them(ours, theirs):
    """Differences of two shares on the same prompts, drawn independently."""
    rng = np.random.default_rng(3)

    def sample(shape):
        return (rng.random(shape) < ours).astype(float) - (rng.random(shape) < theirs)
    assert column_coverage(sample, ours - theirs, DIFFERENCE) > 0.91
    if ours <= 0.1:
        assert column_coverage(sample, ours - theirs, UNBOUNDED) < 0.91, "why prompts are invented"


def test_differences_that_are_seldom_anything_but_0_do_not_collapse():
    rng = np.random.default_rng(4)

    def sample(shape):  # where one arm fails so does the other
        hard = rng.random(shape)
        return (hard < 0.05).astype(float) - (hard < 0.02)
    assert column_coverage(sample, 0.03, DIFFERENCE) > 0.93
    assert column_coverage(sample, 0.03, UNBOUNDED) < 0.7
    e, = column_estimates(np.zeros((30, 1)), range(30), invented=DIFFERENCE)
    assert e["low"] < -0.02 and e["high"] > 0.02, "30 equal prompts do not prove equality"


def test_intervals_of_30_values_without_a_scale_hold_their_mean():
    rng = np.random.default_rng(5)
    assert 0.92 < column_coverage(lambda shape: rng.normal(7, 3, shape), 7, UNBOUNDED) < 0.97
    assert 0.87 < column_coverage(rng.standard_exponential, 1, UNBOUNDED) < 0.96


def test_a_column_is_estimated_as_the_list_of_its_values():
    rng = np.random.default_rng(6)
    table = rng.random((20, 3))
    table[:5, 1] = table[:, 2] = np.nan
    prompts = [f"p{i // 2}" for i in range(20)]
    first, second, third = column_estimates(table, prompts, draws=100)
    assert first == mean_estimate(table[:, 0].tolist(), prompts, draws=100)
    assert second == mean_estimate(table[5:, 1].tolist(), prompts[5:], draws=100)
    assert third == {"value": None, "low": None, "high": None, "n": 0}


def test_values_off_their_scale_are_refused():
    for values, invented in (([0.5, 1.5], SHARE), ([-0.1], SHARE), ([-2, 0], DIFFERENCE)):
        with pytest.raises(AssertionError, match="another `invented`"):
            mean_estimate(values, range(2), invented=invented)
    assert mean_estimate([-2, 2], range(2), invented=UNBOUNDED)["value"] == 0


def test_intervals_resample_prompts_not_traces():
    rng = np.random.default_rng(1)
    level = rng.normal(size=400)
    traces, prompts = np.repeat(level, 5), np.repeat(np.arange(400), 5)
    together = column_estimates(traces[:, None], prompts, invented=UNBOUNDED)[0]
    expected = 1.96 * level.std() / math.sqrt(400)  # five equal traces say no more than one
    assert together["n"] == 2000 and together["value"] == pytest.approx(level.mean())
    assert (together["high"] - together["low"]) / 2 == pytest.approx(expected, rel=0.1)
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert column_estimates([[math.nan]], "a")[0] == nothing


def test_two_runs_pair_their_invented_prompts():
    """With equal weights of the prompts, the differences of two runs are those of their draws."""
    ours = bootstrap_means([[1], [0], [1, 1]], draws=50)
    theirs = bootstrap_means([[1], [0], [1, 1]], draws=50, invented=(0, 1, 0, 1))
    both = bootstrap_means([[0], [0], [0, 0]], draws=50, invented=(0, -1, 1, 0))
    assert ours - theirs == pytest.approx(both)


# -------------------------------------------------------------------------------- other intervals

def test_the_wilson_interval_solves_its_equation():
    for k, n in ((0, 32), (3, 32), (16, 32), (32, 32), (1, 2)):
        for end in wilson(k, n):
            if 0 < end < 1:  # the score test just rejects: |k/n - p| = z sqrt(p (1 - p) / n)
                expected = 1.959964 * math.sqrt(end * (1 - end) / n)
                assert abs(k / n - end) == pytest.approx(expected, abs=1e-9)
    assert wilson(0, 32)[0] == 0 and wilson(32, 32)[1] == 1


def test_student_quantiles():
    """Against the integral of the density, 1 / (1 + t^2 / v)^((v + 1) / 2): 95% lies within."""
    for n, quantile in statistics.STUDENT_T.items():
        u = np.linspace(-np.pi / 2, np.pi / 2, 200_001)[1:-1]  # t = tan(u) brings the tails in
        density = (1 + np.tan(u) ** 2 / (n - 1)) ** (-n / 2) / np.cos(u) ** 2
        within = density[np.abs(np.tan(u)) <= quantile].sum() / density.sum()
        assert within == pytest.approx(0.95, abs=2e-4)


def test_student_intervals_stay_within_0_and_1():
    assert student_interval([0.4]) == {"value": 0.4, "low": 0.0, "high": 1.0, "n": 1}
    e = student_interval([0.9, 1.0])
    assert e["value"] == pytest.approx(0.95) and e["high"] == 1.0
    assert e["low"] == pytest.approx(0.95 - 12.706 * 0.05)  # s / sqrt(2) is half the distance


def test_correlations_by_hand():
    r = correlations([1, 2, 2, 3], [1, 3, 2, 4], "abcd")
    assert r["spearman"]["value"] == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-9)
    assert r["pearson"]["value"] == pytest.approx(3 / math.sqrt(2 * 5), abs=1e-9)
    for x in ([1, 1, 1], [1], []):
        assert correlations(x, x, "abc"[:len(x)])["pearson"]["value"] is None


def test_correlations_resample_prompts_not_items():
    rng = np.random.default_rng(7)
    x = rng.normal(size=30)
    y = x + rng.normal(size=30)
    prompts = np.arange(30)
    alone = correlations(x, y, prompts, draws=500)["pearson"]
    x, y, prompts = (np.repeat(values, 4) for values in (x, y, prompts))
    repeated = correlations(x, y, prompts, draws=500)["pearson"]
    assert repeated["n"] == 120 and repeated["value"] == pytest.approx(alone["value"])
    assert (repeated["low"], repeated["high"]) == pytest.approx((alone["low"], alone["high"]))


# --------------------------------------------------------------------------------------- agreement

def test_agreement_and_kappa_of_a_textbook_table():
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: kappa is 0.4."""
    ours = [True] * 25 + [False] * 25
    theirs = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    prompts = [f"p{i // 2}" for i in range(52)]
    a = judge_agreement(ours + [None, True], theirs + [True, None], prompts)
    assert a["accuracy"]["value"] == 0.7 and a["kappa"]["value"] == pytest.approx(0.4)
    assert a["n_unjudged"] == 2 and a["kappa"]["n"] == a["accuracy"]["n"] == a["n"] == 50
    assert a["accuracy"]["low"] < 0.7 < a["accuracy"]["high"]
    assert 0 < a["kappa"]["low"] < 0.4 < a["kappa"]["high"] < 0.75
    assert a["confusion"] == {"False/False": 15, "False/True": 10, "True/False": 5, "True/True": 20}


def brute_kappa(pairs):
    n, values = len(pairs), {v for p in pairs for v in p}
    observed = sum(a == b for a, b in pairs) / n
    chance = sum(sum(a == v for a, _ in pairs) * sum(b == v for _, b in pairs) for v in values)
    chance /= n ** 2
    return (observed - chance) / (1 - chance)


def test_agreement_of_two_judges():
    rng = random.Random(1)
    ours = [rng.choice([0, 2, 3, 5]) for _ in range(300)]
    theirs = [a if rng.random() < 0.7 else rng.choice([0, 2, 3, 4]) for a in ours]
    found = judge_agreement(ours, theirs, [i // 3 for i in range(300)])
    kappa = found["kappa"]
    assert kappa["value"] == pytest.approx(brute_kappa(list(zip(ours, theirs))))
    assert found["accuracy"]["value"] == sum(a == b for a, b in zip(ours, theirs)) / 300
    assert kappa["low"] < kappa["value"] < kappa["high"]
    assert sum(found["confusion"].values()) == 300
    drawn = []  # the interval against resampling prompts by hand
    for _ in range(400):
        picks = [rng.randrange(100) for _ in range(100)]
        items = [3 * p + k for p in picks for k in range(3)]
        drawn.append(brute_kappa([(ours[i], theirs[i]) for i in items]))
    drawn.sort()
    assert kappa["low"] == pytest.approx(drawn[10], abs=0.02)
    assert kappa["high"] == pytest.approx(drawn[389], abs=0.02)
    assert judge_agreement([True] * 4, [True] * 4, list("abcd"))["kappa"] is None
    assert judge_agreement([None], [True], ["a"])["accuracy"]["value"] is None


def test_an_estimate_of_nothing_as_text():
    assert format_estimate(None) == "not defined"
    assert format_estimate(mean_estimate([], [])) == "not defined"
