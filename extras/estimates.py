"""Shares, means and correlations with their intervals.

An *estimate* is {"value", "low", "high", "n"}: a 95% interval from resampling prompts, because the traces of one prompt
are not independent; n is the number of items, and value, low, high are None where there are none.
"""
import numpy as np

SPAN = 30  # tokens that curves show on either side of a cue or trigger


def wilson(successes, n, z=1.959964):
    """The 95% Wilson interval of a binomial share.

    >>> [round(x, 4) for x in wilson(32, 32)], wilson(0, 0)
    ([0.8928, 1.0], (0.0, 1.0))
    """
    if not n:
        return 0.0, 1.0
    p, shrink = successes / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / shrink, z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def means(values, prompts, draws=2000, seed=0, invented=()):
    """Estimates of the mean of each column, resampling prompts.

    values: (N,) or (N, C), nan where there is no value; prompts: the prompt id of each of the N > 0 rows. `invented` are
    the means of more prompts of middling size that join the draws, but not the mean.

    >>> means([[1, 0], [1, np.nan]], ["a", "b"])
    [{'value': 1.0, 'low': 1.0, 'high': 1.0, 'n': 2}, {'value': 0.0, 'low': 0.0, 'high': 0.0, 'n': 1}]
    """
    values = np.asarray(values, dtype=float).reshape(len(prompts), -1)
    row = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    total, count = np.zeros((2, len(row), values.shape[1]))
    np.add.at(total, [row[p] for p in prompts], np.nan_to_num(values))
    np.add.at(count, [row[p] for p in prompts], ~np.isnan(values))
    with np.errstate(invalid="ignore"):
        mean, n, middling = total.sum(0) / count.sum(0), count.sum(0), count.mean(0)
        total = np.concatenate([total, *(middling[None] * m for m in invented)])
        count = np.concatenate([count, *(middling[None] for _ in invented)])
        picks = np.random.default_rng(seed).multinomial(len(total), np.full(len(total), 1 / len(total)), draws)
        drawn = (picks @ total) / (picks @ count)  # picks (draws, prompts): how often each prompt is drawn
    return [_estimate(*column) for column in zip(mean, drawn.T, n)]


def shares(values, prompts, draws=2000, seed=0):
    """`means` for values that are 0 or 1, with four invented prompts, two of mean 0 and two of 1, as in Agresti and
    Coull's interval (CHOICE): without them 30 prompts without a hit would have the interval [0, 0].

    >>> shares([1] * 30, range(30))[0]["low"] < 0.9
    True
    """
    return means(values, prompts, draws, seed, invented=(0, 0, 1, 1))


def _estimate(value, drawn, n):
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(drawn):
        return {"value": None, "low": None, "high": None, "n": int(n)}
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"value": float(value), "low": float(low), "high": float(high), "n": int(n)}


def average(table, axis):
    """The mean along an axis, leaving out nan; nan where there is nothing else.

    >>> average([[1, np.nan], [np.nan, np.nan]], 1).tolist()
    [1.0, nan]
    """
    return np.ma.masked_invalid(table).mean(axis).filled(np.nan)


def ranks(x):
    """Ranks from 1, equal values sharing the mean of theirs.

    >>> ranks([30, 10, 30]).tolist()
    [2.5, 1.0, 2.5]
    """
    x = np.asarray(x)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


def pearson(x, y):
    """Pearson's R of two arrays; nan where either does not vary."""
    if not len(x):
        return np.nan
    x, y = x - x.mean(), y - y.mean()
    scale = (x @ x * (y @ y)) ** 0.5
    return x @ y / scale if scale else np.nan


def correlations(x, y, prompts, draws=2000, seed=0):
    """{"pearson": estimate, "spearman": estimate} of two lists of numbers, resampling prompts.

    >>> correlations([1, 2, 3], [1, 4, 9], "abc")["spearman"]
    {'value': 1.0, 'low': 1.0, 'high': 1.0, 'n': 3}
    """
    x, y, prompts = np.asarray(x, dtype=float), np.asarray(y, dtype=float), np.asarray(list(prompts))
    groups = [np.flatnonzero(prompts == p) for p in dict.fromkeys(prompts.tolist())]
    rng, result = np.random.default_rng(seed), {}
    picks = [np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])
             for _ in range(draws)] if groups else []
    for name, of in (("pearson", lambda v: v), ("spearman", ranks)):
        drawn = np.array([pearson(of(x[i]), of(y[i])) for i in picks])
        result[name] = _estimate(np.round(pearson(of(x), of(y)), 12), drawn.round(12), len(x))
    return result


def show(e):
    """An estimate as text.

    >>> show({"value": 0.5, "low": 0.25, "high": 1.0, "n": 8})
    '0.500 [0.250, 1.000] n=8'
    """
    return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}] n={e['n']}" if e and e["value"] is not None else "not defined"
