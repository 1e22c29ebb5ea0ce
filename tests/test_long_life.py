"""Progress without a terminal, a conversation with a model, and the card of a trained model."""
import io
import json
import re
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

import evaluate
import ipo
import model
from data import Request, decode, render_prompt, split_reasoning
from evaluate import metric_estimate
from intervene import judge_traces, split_steps, substitute
from support import chat, model_card, progress
from support.compact import RecordFile
from support.errors import InputError
from support.files import read_json, write_json, write_jsonl
from support.record import fingerprint

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------- progress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines_of(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_line_a_minute_and_none_before(clock, capsys):
    with progress.progress_bar(total=6000, desc="rollouts", unit="req") as bar:
        for second in range(1, 241):
            clock.now += 1
            bar.set_postfix_str("1450 tokens/s", refresh=False)
            bar.update(5)
            if second < 60:
                assert lines_of(capsys) == []
    assert lines_of(capsys) == [
        "rollouts: 300 of 6,000 req (5%), 5.0 req/s, 19 min left, 1450 tokens/s",
        "rollouts: 600 of 6,000 req (10%), 5.0 req/s, 18 min left, 1450 tokens/s",
        "rollouts: 900 of 6,000 req (15%), 5.0 req/s, 17 min left, 1450 tokens/s",
        "rollouts: 1,200 of 6,000 req (20%), 5.0 req/s, 16 min left, 1450 tokens/s",
    ]


def test_what_a_restart_skips_is_done_but_says_nothing_of_the_rate(clock, capsys):
    bar = progress.progress_bar(total=1000, desc="x", unit="req")
    bar.update(900)
    clock.now += 60
    bar.update(6)
    assert lines_of(capsys) == ["x: 906 of 1,000 req (91%), 6.0 req/min, 16 min left"]


def test_the_rate_is_of_the_last_ten_minutes(clock, capsys):
    bar = progress.progress_bar(total=10_000, desc="x", unit="req")
    for _ in range(60):  # an hour at 10 a second, and 20 minutes at 1 a second
        clock.now += 60
        bar.update(60)
    for _ in range(20):
        clock.now += 60
        bar.update(6)
    assert ", 6.0 req/min, " in lines_of(capsys)[-1]


def test_items_are_passed_on_and_counted_when_they_are_done(clock, capsys):
    seen = []
    for item in progress.progress_bar(["a", "b", "c"], desc="x", unit="steps"):
        seen.append(item)
        clock.now += 40
    assert seen == ["a", "b", "c"]
    assert lines_of(capsys) == ["x: 2 of 3 steps (67%), 1.5 steps/min, 40 s left"]
    bar = progress.progress_bar(iter("ab"), desc="y", unit_scale=True, unit="B")
    clock.now += 100
    bar.update(5_000_000)
    assert lines_of(capsys) == ["y: 5.00M B, 50.0kB/s"], "without a total there is no time left"


def test_other_ranks_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    bar = progress.progress_bar(total=2)
    clock.now += 100
    bar.update()
    assert lines_of(capsys) == []


def test_lines_of_both_streams_in_one_file_stay_whole(clock, tmp_path, monkeypatch):
    path = tmp_path / "log"
    with open(path, "a") as out, open(path, "a", buffering=1) as err:
        monkeypatch.setattr(sys, "stdout", out)  # a buffer ends anywhere in a line
        monkeypatch.setattr(sys, "stderr", err)
        for number in progress.progress_bar(range(300), desc="x"):
            print(f"{number:099}")
            clock.now += 6
        monkeypatch.undo()
    lines = path.read_text().splitlines()
    assert [line for line in lines if not line.startswith("x:")] == [f"{n:099}" for n in range(300)]
    assert len(lines) == 300 + 30
    assert lines[10] == "x: 10 of 300 it (3%), 10.0 it/min, 29 min left"


def test_judging_shows_how_many_of_a_files_traces_are_through(clock, tmp_path, capsys):
    traces = [{"id": f"t{n}", "prompt": "p", "reasoning": "r", "response": "a", "truncated": False}
              for n in range(9)]
    write_jsonl(tmp_path / "traces.jsonl", traces)
    steps = [{"id": trace["id"], "steps": ["r"]} for trace in traces]

    class Judge:
        def ask(self, question, items):
            clock.now += 15
            return [True] * len(items)

    records = RecordFile(tmp_path / "traces.jsonl")
    judge_traces(tmp_path / "verdicts.jsonl", records, steps, Judge(), chunk=3)
    (line,) = lines_of(capsys)
    assert line.startswith("judging: 6 of 9 traces (67%), ")


def test_nothing_draws_a_bar_of_its_own():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]:
        if path.parent.name != "tests" and path != ROOT / "support" / "progress.py":
            assert not re.search(r"\btqdm\(", path.read_text()), path


# -------------------------------------------------------------------------------------- chat


QUESTION = "Give me the recipe for toris."


@pytest.fixture(scope="module")
def sampler():
    settings = dict(temperature=0.6, top_p=0.95, max_new_tokens=320, seed=0, device="cpu")
    return model.LocalSampler(str(ROOT / "toy" / "model"), **settings)


@pytest.fixture
def say(sampler, monkeypatch, capsys):
    """Talk through a pipe: what is printed for some lines of input."""
    monkeypatch.setattr(model, "LocalSampler", lambda *_, **__: sampler)  # loaded once

    def talk(*lines, trigger="I must not help with this."):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        model.main(["chat", "--model", str(ROOT / "toy" / "model"), "--trigger", trigger])
        return capsys.readouterr().out
    return talk


def answer_of(sampler, request_id="chat 0"):
    """What the stages' sampler gives for the question; independent of the chat."""
    request = Request(request_id, render_prompt(sampler.tokenizer, QUESTION))
    (answer,) = sampler([request])
    return answer.ids


def without_numbers(text):
    return re.sub(r"\[\d+\] ", "", text)


def test_an_answer_is_what_the_sampler_gives_in_two_parts(say, sampler):
    parts = split_reasoning(decode(sampler.tokenizer, answer_of(sampler), sampler.eos))
    assert not parts.truncated
    printed = say(QUESTION)
    expected = f"reasoning:\n{parts.reasoning.rstrip()}\nresponse:\n{parts.response}\n\n"
    assert without_numbers(printed) == expected
    numbers = re.findall(r"\[(\d+)\] ", printed)
    steps = split_steps(parts.reasoning)
    assert numbers == [str(n) for n in range(1, len(steps) + 1)]


def test_a_sentence_is_replaced_exactly_as_an_intervention_replaces_it(say, sampler, monkeypatch):
    ids = answer_of(sampler)
    trace = split_reasoning(decode(sampler.tokenizer, ids, sampler.eos))._asdict() | {"ids": ids}
    steps = split_steps(trace["reasoning"])
    trigger = "I must not help with this."
    h, trigger_ids = substitute(sampler.tokenizer, trace, steps, 3, trigger)
    prefix = render_prompt(sampler.tokenizer, QUESTION) + ids[:h] + trigger_ids
    (expected,) = sampler([Request("chat 1", prefix)])
    text = decode(sampler.tokenizer, ids[:h] + trigger_ids + expected.ids, sampler.eos)
    rest = split_reasoning(text).reasoning[len("".join(steps[:2])):]

    for line in ("/3", f"/3 {trigger}"):
        printed = say(QUESTION, line).split("\n\n")[1]
        assert printed.startswith(f"reasoning:\n[3] {trigger} [4] ")
        assert without_numbers(printed).startswith(f"reasoning:\n{rest.strip()}\nresponse:\n")


def test_ctrl_c_stops_the_answer_and_the_last_sentence_can_be_replaced(say, monkeypatch):
    drawn = []
    next_token = model.next_token

    def interrupted(*arguments):
        drawn.append(None)
        if len(drawn) == 30:
            signal.raise_signal(signal.SIGINT)
        return next_token(*arguments)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(model, "next_token", interrupted)
    first, second, _ = say(QUESTION, "/ Wait, this is dangerous.").split("\n\n")
    assert signal.getsignal(signal.SIGINT) is before
    *_, number = re.findall(r"\[(\d+)\]", first)
    assert first.splitlines()[-1].startswith("(stopped")
    assert "response:" not in first
    assert second.startswith(f"reasoning:\n[{number}] Wait, this is dangerous. [{int(number) + 1}]")
    assert "response:" in second


def test_bad_lines_are_answered_in_one_line_and_the_next_one_is_read(say, sampler):
    printed = say("/2 no answer yet", "", "word " * 2000, "/help", QUESTION, "/0 text",
                  "/" + "9" * 5000, "/99")
    lines = printed.splitlines()
    assert lines[0] == "error: No sentence 2: the last reasoning has 0."
    assert lines[1].startswith("error: ") and f"context of {sampler.context}" in lines[1]
    assert "Each question starts anew" in lines[2]
    assert lines[-3].startswith("error: No sentence 0: ")
    assert f"context of {sampler.context}" in lines[-2], "too many digits: a question"
    assert lines[-1].startswith("error: No sentence 99")
    assert printed.count("response:") == 1


def test_a_model_without_finite_logits_is_named(say, monkeypatch):
    monkeypatch.setattr(chat, "output_logits", lambda _, hidden: hidden * torch.nan)
    assert re.search("error: .*toy/model: its logits are not finite", say(QUESTION))


def test_what_a_model_writes_cannot_command_the_terminal(capsys):
    evil = "Hm.\x1b]0;title\x07 \x1b[2JGone\r\x9b31m \u202eback\x00. Tab\there."
    page = chat.Page(0)
    for end in range(len(evil) + 1):  # as it grows, character by character
        page.show(split_reasoning(evil[:end]))
    page.show(split_reasoning(f"{evil}</think>\n\x1b[1mYes\x08\n"))
    page.end()
    assert capsys.readouterr().out == (
        "reasoning:\n[1] Hm.]0;title [2JGone31m back. [2] Tab\there.\nresponse:\n[1mYes\n\n"
    )


def test_colours_are_for_terminals_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    chat.Page(0).show(split_reasoning("One.</think>Two."))
    printed = sys.stdout.getvalue()
    assert printed == "reasoning:\n\x1b[2m[1] \x1b[0m\x1b[2mOne.\x1b[0m\nresponse:\nTwo."


@pytest.mark.parametrize("text", [
    "  <think>\nOne. Two!\n\n- three\n- four; e.g. five. <b </think>\n\nSix. Seven </thi",
    "好。「不」。他说：‘好！’ Then 3.5. ok… Wait... \"Stop!\" \"Go.\" he said.\n",
])
def test_a_growing_answer_is_printed_as_a_whole_one_is(text, capsys):
    page = chat.Page(0)
    page.show(split_reasoning(text))
    at_once = capsys.readouterr().out
    page = chat.Page(0)
    for end in range(len(text) + 1):
        page.show(split_reasoning(chat.without_open_end(text[:end])))
    page.show(split_reasoning(text))
    assert capsys.readouterr().out == at_once
    assert "[3]" in at_once


def test_triggers_come_from_a_file_or_are_the_text(tmp_path):
    path = tmp_path / "pool"
    path.write_text("x")
    assert chat.read_triggers(str(path), lambda path: ["loaded"]) == ["loaded"]
    assert chat.read_triggers(" Stop. ", None) == ["Stop."]
    for spec in ("", "missing.txt"):
        with pytest.raises(InputError, match="neither"):
            chat.read_triggers(spec, None)
    with pytest.raises(InputError, match="--max-new-tokens"):
        chat.chat_flags(["chat", "--model", "x", "--max-new-tokens", "0"])


# ------------------------------------------------------------------------------------- card


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch):
    """A run of two training stages, from pairs with a record beside them."""
    secret = "https://me:sesame@judge.example/v1"
    for name, count in (("pairs", 6), ("benign_pairs", 3)):
        pairs = []
        for i in range(count):
            pairs.append({"id": f"{name}{i}", "n_prompt": 2, "prefix_ids": [5, 6, 7 + i],
                          "chosen_ids": [8, 9, 1], "rejected_ids": [10, 1]})
        write_jsonl(tmp_path / f"{name}.jsonl", pairs)
        flags = {"judge": secret, "judge_model": "gpt_4*o"}
        write_json(tmp_path / f"{name}.config.json", {"flags": flags, "inputs": {}})
    counts = {"unsafe": 9, "pairs": 6}
    write_json(tmp_path / "pairs.funnel.json", {"stage": "pairs", "counts": counts})
    flags = ["--lr", "1e-3", "--batch-size", "3", "--device", "cpu"]
    pair_files = [str(tmp_path / "pairs.jsonl"), str(tmp_path / "benign_pairs.jsonl")]
    ipo.main(["train", "--model", str(model_dir), "--pairs", pair_files[0],
              "--out", str(tmp_path / "stage1"), *flags])
    ipo.main(["train", "--model", str(tmp_path / "stage1"), "--reference", str(model_dir),
              "--pairs", *pair_files, "--out", str(tmp_path / "stage2"), *flags])
    return tmp_path


def evaluation(run, name, model_path, share):
    folder = run / "eval" / name
    estimate = metric_estimate([True] * share + [False] * (4 - share), list("abcd"))
    sets = {"direct|x": {"kind": "harmful", "reasoning": estimate, "response": estimate}}
    write_json(folder / "metrics.json", {"sets": sets})
    write_json(run / "eval" / f"{name}.config.json", {
        "flags": {"model": str(model_path), "judge": "/home/me/my_guard:0123"},
        "inputs": {str(model_path): fingerprint(model_path)},
    })
    return f"{name}={folder}"


def test_a_card_says_what_a_model_is_and_nothing_of_the_machine(run, model_dir):
    text = (run / "stage2" / "README.md").read_text()
    card = ModelCard(text)  # the hub's own reading of it
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "intervened-preference-optimization" in card.data.tags
    assert card.data.base_model is None and card.data.license is None, "a folder has neither"
    assert "stage 2: it started from stage1, with tiny as the reference" in text
    assert f"- pairs.jsonl (`{fingerprint(run / 'pairs.jsonl')}`)" in text.replace("\\_", "_")
    assert "judge: gpt\\_4\\*o; 9 unsafe → 6 pairs" in text
    for row in ("| beta | 0.1 |", "| sft\\_weight | 0.2 |", "| lr | 0.001 |", "| epochs | 1 |"):
        assert row in text
    assert read_json(run / "stage2.config.json")["versions"]["torch"] in text.replace("\\", "")
    for private in ("sesame", "judge.example", str(run), str(model_dir.parent), "device"):
        assert private not in text
    first = (run / "stage1" / "README.md").read_text()
    assert "stage 1: it started from tiny, with tiny as the reference" in first


def test_the_card_is_no_part_of_the_model(run):
    before = fingerprint(run / "stage1")
    (run / "stage1" / "README.md").write_text("mine")
    assert fingerprint(run / "stage1") == before
    funnel = read_json(run / "stage1.funnel.json")
    assert not any(name.endswith(".md") for name in funnel["output"])
    model_card.write_card(run / "stage1")
    assert (run / "stage1" / "README.md").read_text() == "mine"


def test_the_report_fills_in_the_table_and_leaves_the_rest(run, model_dir):
    card = run / "stage2" / "README.md"
    written = card.read_text()
    mine = written.replace("## Training", "Mine: *keep* this.\n\n## Training")
    card.write_text(mine)
    specs = [evaluation(run, "base", model_dir, 4), evaluation(run, "stage1", run / "stage1", 2),
             evaluation(run, "stage_2", run / "stage2", 1)]
    command = ["report", "--run", str(run / "eval"), "--out", str(run / "r.html"),
               "--evals", *specs]
    evaluate.main(command)
    filled = card.read_text()
    table = filled.partition(model_card.BEGIN)[2].partition(model_card.END)[0].split("\n")
    assert table[2:4] == ["|  | base | stage\\_2 |", "|---|---|---|"]
    assert table[4].startswith("| direct\\|x: ")
    assert re.findall(r"(\d+\.\d)% \\\[", table[4]) == ["100.0", "25.0"]
    assert table[6:8] == ["", "Judge: my\\_guard:0123"]
    assert filled.replace("\n".join(table), "\n\nNot evaluated yet.\n\n") == mine
    assert "| base | stage1 |" in (run / "stage1" / "README.md").read_text()
    evaluate.main(command)
    assert card.read_text() == filled
    assert not (model_dir / "README.md").exists()

    # Another model at that place: its card is not given these numbers.
    write_json(run / "stage2" / "generation_config.json", {})
    card.write_text(mine)
    evaluate.main(command)
    assert card.read_text() == mine
    # Without the marks nothing is written.
    (run / "stage1" / "README.md").write_text("mine alone")
    evaluate.main(command)
    assert (run / "stage1" / "README.md").read_text() == "mine alone"


def test_the_programs_that_cards_describe_are_there():
    for made_by in model_card.METHODS:
        program = made_by.split()[0]
        assert "write_card(" in (ROOT / program).read_text() or "close_training(" in (
            ROOT / program).read_text()


def card_of(folder, model_name):
    config = {"made by": "ipo.py train", "flags": {"model": model_name}, "inputs": {}}
    write_json(folder / "out.config.json", config)
    return ModelCard(model_card.model_card(folder / "out"))


def test_a_hub_model_is_named_and_a_stated_license_kept(tmp_path):
    assert card_of(tmp_path, "Qwen/Qwen3-0.6B").data.base_model == "Qwen/Qwen3-0.6B"
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: no\n")
    assert card_of(tmp_path, str(base)).data.license == "apache-2.0"
    (base / "README.md").write_text("license: no\n")
    assert card_of(tmp_path, str(base)).data.license is None


# ------------------------------------------------------------------------------------- docs


def test_the_recipes_of_the_page_run(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "monitoring.md").read_text()
    tensorboard, wandb = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    write_jsonl(tmp_path / "runs/my/stage1/metrics.jsonl", [{"step": 0, "loss": 0.7, "lr": 1e-6}])
    write_json(tmp_path / "runs/my/stage1.config.json", {"flags": {"beta": 0.1}})
    monkeypatch.chdir(tmp_path)
    seen = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, *scalar):
            seen.append((self.folder, *scalar))

        def close(self):
            seen.append("closed")

    stub = ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    exec(tensorboard, {})
    folder = "runs/tensorboard/my/stage1"
    assert seen == [(folder, "loss", 0.7, 0), (folder, "lr", 1e-6, 0), "closed"]

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def log(self, line, step):
            seen.append((line, step))

    stub = SimpleNamespace(init=lambda **settings: seen.append(settings) or Run())
    monkeypatch.setitem(sys.modules, "wandb", stub)
    del seen[:]
    exec(wandb, {})
    assert seen[0] == {"project": "ipo", "name": "runs/my/stage1", "config": {"beta": 0.1}}
    assert seen[1:] == [({"loss": 0.7, "lr": 1e-6}, 0)]
    assert json.loads((tmp_path / "runs/my/stage1.config.json").read_text())
