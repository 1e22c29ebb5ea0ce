"""Published benchmarks: fetch, check for leakage, evaluate a model on them, compare runs."""
