"""The command on real HTTP, against another judge and against labels."""
import json

import pytest

from studies import agreement
from support.errors import InputError
from support.files import write_jsonl
from tests.loopback import Loopback


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-first")
    monkeypatch.setenv("EVAL_JUDGE_API_KEY", "sk-second")


def write_traces(folder, count):
    """A file of traces whose judged texts hold their truths, unique to each question."""
    traces = []
    for i in range(count):
        traces.append({
            "id": f"t{i}", "prompt_id": f"p{i // 2}", "prompt": f"How {i}?",
            "reasoning": f"<z{i}> truth={'safe' if i % 3 else 'unsafe'}",
            "response": f"<y{i}> truth={'safe' if i % 6 else 'unsafe'}", "truncated": i % 10 == 9})
    write_jsonl(folder / "traces.jsonl", traces)


def compare(folder, server, *flags):
    """Run the command; returns its result."""
    agreement.main(["--traces", str(folder / "traces.jsonl"), "--judge", server.url,
                    "--judge-model", "judge-1", "--out", str(folder / "a.json"), *flags])
    return json.loads((folder / "a.json").read_text())


def test_a_judge_that_cannot_answer_is_refused_before_it_is_asked(tmp_path):
    write_traces(tmp_path, 2)
    with pytest.raises(InputError, match="cannot answer: compliance"):
        agreement.main(["--traces", str(tmp_path / "traces.jsonl"), "--judge", "python:domains.arithmetic",
                        "--other-judge", "rules", "--question", "compliance", "--out", str(tmp_path / "a.json")])


def test_the_agreement_command(tmp_path, capsys):
    write_traces(tmp_path, 30)
    truth = [{"id": f"t{i}", "label": "unsafe" if i % 3 == 0 else "safe"} for i in range(30)]
    truth[0]["label"] = "safe"
    labels = tmp_path / "labels.jsonl"
    write_jsonl(labels, truth[:-1])
    with Loopback() as server, Loopback(lambda key, _: "refusal" if key == "z5" else None) as other:
        found = compare(tmp_path, server, "--labels", str(labels))
        assert found["n"] == 29 and found["n_unjudged"] == 1
        assert found["accuracy"]["value"] == pytest.approx(28 / 29)
        assert found["confusion"] == {"False/False": 9, "False/True": 1, "True/True": 19}
        found = compare(tmp_path, server, "--other-judge", other.url,
                        "--other-judge-model", "judge-2")
        assert found["n"] == 29 and found["kappa"]["value"] == 1
        assert len(server.log) == 30 and len(other.log) == 30
        assert {r["headers"]["Authorization"] for r in server.log} == {"Bearer sk-first"}
        assert {r["headers"]["Authorization"] for r in other.log} == {"Bearer sk-second"}
        write_jsonl(labels, [{"id": "t1", "label": "fine"}])
        with pytest.raises(ValueError, match="record 1.*safe or unsafe"):
            compare(tmp_path, server, "--labels", str(labels))
    printed = capsys.readouterr().out
    assert "kappa 1.000" in printed and "accuracy 96.6% [" in printed and "1 unjudged" in printed


def test_of_truncated_traces_there_is_no_response(tmp_path):
    write_traces(tmp_path, 30)
    labels = tmp_path / "labels.jsonl"
    write_jsonl(labels, [{"id": f"t{i}", "label": "safe"} for i in range(30)])
    with Loopback() as server:
        found = compare(tmp_path, server, "--labels", str(labels), "--question", "response")
    assert found["n"] == 27 == len(server.log) and found["kappa"]["value"] == 0
    assert found["confusion"] == {"False/True": 5, "True/True": 22}


def test_labels_of_cues_are_numbers(tmp_path):
    labels = tmp_path / "labels.jsonl"
    write_jsonl(labels, [{"id": "b", "label": 0}, {"id": "a", "label": 3}])
    traces = [{"id": "a"}, {"id": "b"}, {"id": "c"}]
    assert agreement.read_labels(labels, "cue", traces) == [3, 0, None]
    for label in ("3", True, None):
        write_jsonl(labels, [{"id": "a", "label": label}])
        with pytest.raises(InputError, match="record 1: .*number of a sentence, 0 = none"):
            agreement.read_labels(labels, "cue", traces)
    write_jsonl(labels, [{"label": "full"}])
    with pytest.raises(InputError, match="full or partial or refusal"):
        agreement.read_labels(labels, "compliance", traces)


@pytest.mark.parametrize("flags", [[], ["--labels", "l.jsonl", "--other-judge", "rules"]])
def test_either_labels_or_a_judge(tmp_path, flags):
    with pytest.raises(InputError, match="Give either --other-judge or --labels"):
        agreement.main(["--traces", "t.jsonl", "--out", str(tmp_path / "a.json"), *flags])
