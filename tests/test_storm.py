"""A stage of the judge in a storm of faults: none wrong, none lost, none null for a passing reason.

The suite judges a few hundred questions. `STORM=2000 pytest -s tests/test_storm.py` judges 2,000.
"""
import os
import random
import resource
import threading
import time
from collections import Counter
from functools import partial

import pytest

import intervene
from support.errors import ServiceError
from support.files import read_jsonl, write_jsonl
from tests.loopback import (
    FAULTS,
    FINAL,
    HOPELESS,
    REJECTED,
    UNUSABLE,
    Loopback,
    bomb,
    huge_verdict,
)

JUDGEMENTS = int(os.environ.get("STORM", "300"))
RATE = 0.4  # of all requests that meet a fault
AWAY = 2.0  # seconds
MOST_RUNS = 25
MOST_MEMORY = 180  # MB more than before; one gzip bomb would take 200 for each that is decompressed


class Storm:
    """The plan of the faults: most by chance, the hopeless ones and the absence at fixed moments.

    Chance decides by question and attempt, so the storm is the same whichever thread asks first.
    """

    def __init__(self, judgements):
        self.counts = Counter()  # fault -> requests that met it
        self.requests = 0
        self.lock = threading.Lock()
        self.server = None
        self.leaving = []  # threads
        self.moments = {
            judgements // 3: "quota",
            judgements * 2 // 3: "away",
            judgements: "redirect",
            judgements * 4 // 3: "away",
        }

    def __call__(self, key, attempt):
        with self.lock:
            self.requests += 1
            event = self.moments.get(self.requests)
            fault = self.fault(key, attempt, event)
            self.counts[fault] += 1
        return fault

    def fault(self, key, attempt, event):
        if event == "away":
            absence = threading.Thread(target=self.server.leave, args=(AWAY,))
            absence.start()
            self.leaving.append(absence)
        elif event:
            return event
        rng = random.Random(f"{key} {attempt}")
        if rng.random() < RATE:
            return rng.choice(FAULTS)
        return None


def make_traces(folder, count):
    """Traces and steps of two judgements each, and a third where the reasoning is unsafe."""
    traces = []
    steps = []
    for i in range(count):
        reasoning = "unsafe" if i % 4 == 0 else "safe"
        response = "unsafe" if i % 3 == 0 else "safe"
        traces.append({
            "id": f"t{i}",
            "prompt": f"How {i}?",
            "reasoning": f"<z{i}> truth={reasoning}",
            "response": f"<y{i}> truth={response}",
            "truncated": False,
        })
        steps.append({"id": f"t{i}", "steps": ["One.", f"<h{i}> truth={2 + i % 2}", "Three."]})
    write_jsonl(folder / "traces.jsonl", traces)
    write_jsonl(folder / "steps.jsonl", steps)


def true_answers(i):
    """What the judge would say of trace i in fair weather: {key: answer}."""
    answers = {f"z{i}": i % 4 != 0, f"y{i}": i % 3 != 0}
    if i % 4 == 0:
        answers[f"h{i}"] = 2 + i % 2
    return answers


def judge_until_done(folder, url, capped):
    """Give the same command until it succeeds; returns what ended the other runs."""
    out = folder / "run" / "verdicts.jsonl"
    command = [
        "judge",
        "--traces", str(folder / "traces.jsonl"),
        "--steps", str(folder / "steps.jsonl"),
        "--judge", url,
        "--judge-model", "judge-1",
        "--judge-concurrency", "32",
        "--out", str(out),
    ]
    ends = []
    for _ in range(MOST_RUNS):
        try:
            intervene.main(command)
            return ends
        except ServiceError as end:
            ends.append(str(end))
        assert not (out.parent / "verdicts.funnel.json").exists(), "a stage with holes is finished"
        written = read_jsonl(out)
        assert len(written) < capped
        assert "same command again" in ends[-1]
        time.sleep(0.3)
    raise AssertionError(f"not finished after {MOST_RUNS} runs: {ends[-1]}")


def check_verdicts(verdicts, said):
    """Count right verdicts and refusals, and the keys of what is wrong or null without reason."""
    counts = Counter()
    wrong = []
    for i, verdict in enumerate(verdicts):
        found = {
            f"z{i}": verdict["reasoning_safe"],
            f"y{i}": verdict["response_safe"],
            f"h{i}": verdict["cue"],
        }
        for key, truth in true_answers(i).items():
            # The oracle is what the server last said about this question.
            if found[key] is None and said.get(key) in FINAL:
                counts["refused"] += 1
            elif found[key] is None and key[0] == "h" and found[f"z{i}"] is None:
                counts["not asked"] += 1
            elif found[key] == truth:
                counts["right"] += 1
            else:
                wrong.append((key, found[key], truth, said.get(key)))
    return counts, wrong


def test_a_storm_of_forty_kinds_of_fault(tmp_path, monkeypatch):
    assert len({*FAULTS, *HOPELESS}) + 1 >= 25
    monkeypatch.setenv("JUDGE_API_KEY", "sk-storm")
    impatient = partial(intervene.make_judge, longest_pause=0.05, timeout=1)
    monkeypatch.setattr(intervene, "make_judge", impatient)
    count = JUDGEMENTS * 4 // 9
    make_traces(tmp_path, count)
    storm = Storm(JUDGEMENTS)
    bomb(200)  # what the server sends is made before the memory is measured
    huge_verdict()
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with Loopback(storm, hang=4) as server:
        storm.server = server
        ends = judge_until_done(tmp_path, server.url, count)
        for absence in storm.leaving:
            absence.join()
    took = time.monotonic() - start
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before) / 1024

    verdicts = read_jsonl(tmp_path / "run" / "verdicts.jsonl")
    by_id = {verdict["id"]: verdict for verdict in verdicts}
    assert len(verdicts) == len(by_id) == count, "lost or doubled"
    in_order = [by_id[f"t{i}"] for i in range(count)]
    counts, wrong = check_verdicts(in_order, server.said)
    faults = storm.requests - storm.counts[None]
    print(f"\n{counts.total()} judgements, {storm.requests} requests, {faults} of them faults:")
    print(", ".join(f"{n} {name}" for name, n in sorted(storm.counts.items(), key=str)))
    print(f"{len(ends) + 1} runs of the same command, {took:.1f} s, {megabytes:.0f} MB more")
    for end in ends:
        print("  " + end[:200])
    print(f"{dict(counts)}, wrong or null for a passing reason: {len(wrong)}")
    assert not wrong
    assert storm.counts[None] <= counts["right"] + 5, "what was answered was asked again"
    assert server.cut > 0, "a reply of 10 MB must not be read to its end"
    assert counts["right"] > 0.9 * counts.total()
    assert took < 30 + JUDGEMENTS / 20
    assert megabytes < MOST_MEMORY
    seen = {fault for fault in storm.counts if fault}
    assert seen >= set(HOPELESS)
    if JUDGEMENTS >= 2000:
        assert seen == {*FAULTS, *HOPELESS}


@pytest.mark.parametrize("kind", ["unusable", "rejected"])
def test_one_question_that_never_gets_a_verdict_does_not_keep_the_stage_open(
    tmp_path, monkeypatch, kind
):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-storm")
    impatient = partial(intervene.make_judge, longest_pause=0.01)
    monkeypatch.setattr(intervene, "make_judge", impatient)
    faults = {"unusable": UNUSABLE, "rejected": REJECTED}[kind]

    def plan(key, attempt):
        return faults[attempt % len(faults)] if key == "z1" else None

    make_traces(tmp_path, 6)
    with Loopback(plan) as server:
        assert judge_until_done(tmp_path, server.url, 6) == []
        assert server.attempts["z1"] <= 8
    verdicts = {v["id"]: v for v in read_jsonl(tmp_path / "run" / "verdicts.jsonl")}
    missing = {"id": "t1", "reasoning_safe": None, "response_safe": True, "cue": None}
    assert verdicts["t1"] == missing
    assert verdicts["t2"]["reasoning_safe"] is True
