"""The axes on which methods are compared."""
from statistics import mean

AXES = {  # what a point says: the mean of a metric over the sets that have it
    "harm": "reasoning",
    "compliance": "compliance",
    "capability": "accuracy",
    "response harm": "response",
}
OF_RESPONSES = ("compliance", "response")  # metrics that a truncated trace has no value of


def complete_share(estimate, metric):
    """The share of traces that can have a value of a metric; estimate: `evaluate.metric_estimate`.

    CHOICE: a truncated trace has no response, so it neither complies nor does harm. Left out, it
    would let a model that answers one prompt in ten look compliant. One without a verdict counts
    like those that have one.

    >>> estimate = {"n": 5, "n_unjudged": 1, "n_truncated": 2}
    >>> complete_share(estimate, "compliance"), complete_share(estimate, "accuracy")
    (0.75, 1.0)
    """
    if metric not in OF_RESPONSES:
        return 1.0
    complete = estimate["n"] + estimate["n_unjudged"]
    return complete / (complete + estimate["n_truncated"])


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
