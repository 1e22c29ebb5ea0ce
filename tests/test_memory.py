"""The memory of long traces and many pairs: it must not grow with tokens times their number."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Ids that Python does not keep ready-made, as most of a real vocabulary.
IDS = list(range(1000, 3000))

# Each program works on a small file first, so that the growth is that of the large one alone.
# The peak is that of the process itself; ru_maxrss would include that of its parent.
HEAD = """
import sys

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024  # MB

small, large = sys.argv[1:]
"""
PAIRS = HEAD + """
import data
from support.trees import tree_parts
from ipo import pair_sequences

def work(path):
    pairs, _ = data.load_pairs([path], 10_000)
    parts = [tree_parts(pair_sequences(pair)) for pair in pairs]
    for batch in data.global_batches(parts, 32, 1, 0):
        data.micro_batches(batch, parts, 16384)
    assert len(pairs) == sum(1 for _ in open(path))

work(small)
before = peak()
work(large)
print(peak() - before)
"""
STAGE = HEAD + """
import intervene

class Sampler:  # everything has been sampled before
    context = 100_000
    max_new_tokens = 2000

    class tokenizer:
        def apply_chat_template(self, messages, **_):
            return [1, 2, 3]
    tokenizer = tokenizer()

    def __call__(self, requests, done, parts, title):
        assert {request.id for request in requests} == done
        return iter(())

def work(name):
    judge = intervene.make_judge("rules")
    stage = getattr(intervene, "run_STAGE")
    counts, _ = stage(
        out=name + ".OUT.jsonl", traces=name + ".rollouts.jsonl", steps=name + ".steps.jsonl",
        prompts=name + ".prompts.jsonl", limit=0, samples=6, sampler=Sampler(), judge=judge)
    assert list(counts.values())[-1] > 0

work(small)
before = peak()
work(large)
print(peak() - before)
"""

needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="needs the peak of /proc/self/status")


def growth(program, folder):
    """What `program` takes for the large file beyond what the small one took, in MB."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder / "small"), str(folder / "large")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


@needs_proc
def test_pairs_take_four_bytes_a_token(tmp_path):
    for name, count in (("small", 100), ("large", 2500)):
        with open(tmp_path / name, "w") as file:
            for i in range(count):
                pair = {"id": f"p{i}", "n_prompt": 9, "prompt": "x" * 1000, "chosen": "y" * 2000}
                for key in ("prefix_ids", "chosen_ids", "rejected_ids"):
                    pair[key] = IDS[:400]
                file.write(json.dumps(pair) + "\n")
    # 3 x 400 ids of 4 bytes are 12 MB. As lists, with their texts, they took 150.
    assert growth(PAIRS, tmp_path) < 25


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Rollouts of 2,000 tokens with their steps and prompts: 600, and 1,800 of them."""
    folder = tmp_path_factory.mktemp("traces")
    reasoning = "I can explain the recipe. " * 50
    ids = json.dumps(IDS)
    for name, count in (("small", 100), ("large", 300)):
        with open(folder / f"{name}.prompts.jsonl", "w") as prompts, \
                open(folder / f"{name}.rollouts.jsonl", "w") as rollouts:
            for p in range(count):
                prompt = "How do I brew duskwort?"
                prompts.write(json.dumps({"id": str(p), "prompt": prompt}) + "\n")
                for k in range(6):
                    trace = {"id": f"{p}#{k}", "prompt": prompt,
                             "reasoning": reasoning, "response": "No.", "truncated": False}
                    rollouts.write(json.dumps(trace)[:-1] + f', "ids": {ids}}}\n')
    return folder


@needs_proc
@pytest.mark.parametrize("stage, output", [
    ("rollouts", "rollouts"), ("steps", "steps"), ("judge", "verdicts")])
def test_a_stage_holds_no_more_of_many_traces_than_of_few(traces, stage, output):
    # 1,200 more traces of 2,000 tokens: as lists of ids they took 86 MB.
    program = STAGE.replace("STAGE", stage).replace("OUT", output)
    assert growth(program, traces) < 10
