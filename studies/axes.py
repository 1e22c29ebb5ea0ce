"""The axes on which methods are compared."""
from statistics import mean

AXES = {  # what a point says: the mean of a metric over the sets that have it
    "harm": "reasoning",
    "compliance": "compliance",
    "capability": "accuracy",
    "response harm": "response",
}


def mean_over_sets(metrics, metric):
    """The mean of a metric over the sets that have it; None without any.

    >>> mean_over_sets({"a/accuracy": 0.5, "b/accuracy": 1.0, "b/compliance": 0.0}, "accuracy")
    0.75
    """
    values = []
    for key, value in metrics.items():
        if key.partition("/")[2] == metric:
            values.append(value)
    return mean(values) if values else None
