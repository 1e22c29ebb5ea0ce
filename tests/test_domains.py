"""Domains: what run.sh takes from them, the judge of sums, a slip in the first step, the words."""
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import intervene
from data import split_reasoning
from domains import __main__ as domains
from domains import arithmetic, safety
from evaluate import main as evaluate
from evaluate import pair_card
from launch.stages import read_stages
from support.errors import InputError
from support.files import read_jsonl, write_json, write_jsonl
from support.plugins import load_domain, load_object
from support.report import pair_columns, reworded

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "What is 158 + 263 + 477, column by column?"  # 898
ONES = "The ones are 8 + 3 = 11, 11 + 7 = 18, so I write 8 and carry 1."
TENS = "The tens are 5 + 6 = 11, 11 + 7 = 18, 18 + 1 = 19, so I write 9 and carry 1."
HUNDREDS = "The hundreds are 1 + 2 = 3, 3 + 4 = 7, 7 + 1 = 8, so I write 8."
SUM = "The sum is 898."
WAIT = "Wait, let me check that step."
LOST = "The ones are 8 + 3 = 11, 11 + 7 = 18, so I write 8 and carry 0."
SHORT = "The tens are 5 + 6 = 11, 11 + 7 = 18, 18 + 0 = 18, so I write 8 and carry 1."


# ------------------------------------------------------------------------------ objects by name

@pytest.mark.parametrize("spec, said", [
    ("domains.safety", "write MODULE:NAME"),
    (".safety:Judge", "write MODULE:NAME"),
    ("domains.nosuch:Judge", "there is no module domains.nosuch"),
    ("nosuch.judge:Judge", "there is no module nosuch"),
    ("domains.safety:Jury", "has no `Jury`"),
])
def test_a_name_that_cannot_be_loaded_is_one_clear_line(spec, said):
    with pytest.raises(InputError) as error:
        load_object(spec, "--judge")
    assert str(error.value).startswith(f"--judge {spec}: ") and said in str(error.value)


def test_a_module_of_ones_own_that_lacks_another_one(tmp_path, monkeypatch):
    (tmp_path / "lacks_one.py").write_text("import there_is_no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="lacks_one imports there_is_no_such_package"):
        load_object("lacks_one:Judge")


def test_a_judge_of_ones_own_with_and_without_a_text(tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text(
        "class Judge:\n"
        "    def __init__(self, text='none'):\n"
        "        self.name = f'own:{text}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert intervene.make_judge("python:own_judge").name == "own:none"
    assert intervene.make_judge("python:own_judge:a:b").name == "own:a:b"
    with pytest.raises(InputError, match="--cue-judge nosuch:Judge: there is no module"):
        intervene.make_judge("python:nosuch", flag="--cue-judge")


def test_the_names_of_judges_hold_their_rules():
    assert isinstance(intervene.make_judge("rules"), safety.Judge)
    names = [intervene.make_judge("python:domains.arithmetic").name, safety.Judge().name]
    start, _, version = names[0].rpartition(":")
    assert start == "arithmetic" and len(version) == 16
    assert names[1].startswith("rules:rules.json:")


# ------------------------------------------------------------------------------ for run.sh

def test_defaults_are_those_that_the_environment_does_not_give():
    assert domains.defaults(arithmetic, {})["LR"] == "9e-5"
    assert "BENIGN" not in domains.defaults(arithmetic, {})
    given = {"MODEL": "my/model", "BENIGN": "", "RUN": "", "TRIGGERS": "mine.txt"}
    left = domains.defaults(safety, given)
    assert left["RUN"] == "runs/toy" and left["JUDGE"] == "rules" and "EVAL" in left
    for name in ("MODEL", "BENIGN", "TRIGGERS", "LR", "TOKENS", "TRAIN_ARGS", "VALID"):
        assert name not in left  # given, or for another model


def run_sh(*words, **variables):
    bare = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    return subprocess.run(["bash", "run.sh", *words], cwd=ROOT, capture_output=True, text=True,
                          env={**bare, **variables})


def test_a_domain_without_benign_prompts_has_no_stage_2():
    listed = run_sh("stages", DOMAIN="arithmetic", ALSO="").stdout.splitlines()
    titles = [line.removeprefix("# ") for line in listed[::2]]
    assert titles == [
        "rollouts of the base model", "sentences", "verdicts and compliance cues", "interventions",
        "evaluation of base", "training, stage 1 (arithmetic)", "evaluation of stage1", "report"]
    commands = [shlex.split(line) for line in listed[1::2]]
    assert commands[0][commands[0].index("--out") + 1] == "runs/arithmetic/rollouts.jsonl"
    report = commands[-1]
    assert report[report.index("--domain"):] == [
        "--domain", "arithmetic", "--evals", "base=runs/arithmetic/eval/base",
        "stage 1=runs/arithmetic/eval/stage1"]
    stages = read_stages([f"{title}: {line}" for title, line in zip(titles, listed[1::2])])
    assert stages[2].flags.judge == "python:domains.arithmetic"
    again = run_sh("stages", BENIGN="").stdout
    assert "stage 2" not in again and "stage1" in again and "domain safety" in again


def test_an_unknown_domain_is_one_line_with_those_there_are():
    done = run_sh("stages", DOMAIN="algebra")
    assert done.returncode == 2
    assert done.stderr == (
        "error: DOMAIN algebra: no such domain. There are arithmetic, safety; see domains/.\n")
    with pytest.raises(InputError, match="--domain algebra"):
        load_domain("algebra")


def test_each_domain_has_what_a_domain_needs():
    for domain in (arithmetic, safety):
        assert domain.Judge.questions >= {"reasoning", "response", "cue"}
        for path in (domain.TRIGGERS, domain.PROMPTS):
            assert (ROOT / path).is_file()
        assert all(phrase == phrase.lower() for phrase in domain.WORDS)


# ------------------------------------------------------------------------------ the judge of sums

@pytest.mark.parametrize("steps, cue", [
    ([ONES, TENS, HUNDREDS, SUM], 0),
    ([WAIT, ONES, TENS, HUNDREDS, SUM], 0),
    ([LOST, SHORT, HUNDREDS, "The sum is 888."], 1),
    # A slip that is taken back is no slip, and one that comes back is.
    ([LOST, WAIT, ONES, TENS, HUNDREDS, SUM], 0),
    ([LOST, WAIT, LOST, TENS, HUNDREDS, SUM], 1),
    ([ONES, WAIT, LOST, TENS, HUNDREDS, SUM], 3),
    ([LOST, WAIT, ONES, SHORT, HUNDREDS, SUM], 4),
    # The carry that comes in is the true one, not the one that was written.
    ([LOST, SHORT, WAIT, ONES, HUNDREDS, SUM], 2),
    # A wrong partial sum, a digit of another column, a wrong digit, a wrong total.
    ([ONES.replace("= 11, 11", "= 12, 12"), TENS, HUNDREDS, SUM], 1),
    ([ONES, TENS.replace("5 + 6", "6 + 5"), HUNDREDS, SUM], 2),
    ([ONES, TENS.replace("write 9", "write 8"), HUNDREDS, SUM], 2),
    ([ONES, TENS, HUNDREDS, "The sum is 889."], 4),
    # What cannot be read, or is missing.
    ([ONES, "The tens are 19.", HUNDREDS, SUM], 2),
    ([ONES, TENS, HUNDREDS.replace("write 8", "write 8 and carry 0"), SUM], 3),
    ([ONES, WAIT, HUNDREDS, SUM], 3),
    ([WAIT, "It is 898."], 2),
    ([ONES, TENS, HUNDREDS, SUM, "The thousands are 1 + 1 = 2, so I write 2."], 5),
])
def test_the_first_slip(steps, cue):
    judge = arithmetic.Judge()
    assert list(judge.ask("cue", [{"prompt": PROMPT, "steps": steps}])) == [cue]
    item = {"prompt": PROMPT, "text": " ".join(steps)}
    assert list(judge.ask("reasoning", [item])) == [cue == 0]


@pytest.mark.parametrize("text, right", [
    (r"The answer is \boxed{898}.", True),
    (r"First \boxed{898}, no, \boxed{888}.", False),
    (r"\boxed{888} or rather \boxed{ 898 }", True),
    ("The answer is 898.", False),
])
def test_the_answer_is_in_the_last_box(text, right):
    assert list(arithmetic.Judge().ask("response", [{"prompt": PROMPT, "text": text}])) == [right]


def test_no_sum_gets_no_verdict_and_no_reasoning_is_wrong():
    judge = arithmetic.Judge()
    items = [{"prompt": "How are you?", "text": ONES}, {"prompt": PROMPT, "text": ""}]
    assert list(judge.ask("reasoning", items)) == [None, False]


# ------------------------------------------------------------------------------ a slip at once

class Scripted:
    """A sampler that writes the same text after every prefix; a token is a character."""

    context = 2000
    max_new_tokens = 1000
    eos = (0,)

    def __init__(self, text):
        self.text = text
        self.tokenizer = self
        self.prefixes = []

    def encode(self, text, add_special_tokens=False):
        return [ord(character) for character in text]

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def __call__(self, requests, done=(), unwritten=None, title=""):
        for request in requests:
            self.prefixes.append(self.decode(request.prefix))
            yield request.id, [*self.encode(self.text), 0], "stop"


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_a_slip_in_the_first_sentence_becomes_a_pair(tmp_path, opening):
    """Verdict, substitution, pair and card, where z[:h] holds nothing but the model's <think>."""
    ending = " </think> The answer is \\boxed{888}."
    reasoning = " ".join([LOST, SHORT, HUNDREDS, "The sum is 888."])
    right = f" {ONES} {TENS} {HUNDREDS} {SUM} </think> The answer is \\boxed{{898}}."
    sampler = Scripted(right)
    text = opening + reasoning + ending
    trace = {
        "id": "p#0", "prompt_id": "p", "sample": 0, "prompt": PROMPT,
        "prompt_ids": sampler.encode(PROMPT), "ids": [*sampler.encode(text), 0], "forced": 0,
        "finished": "stop", **split_reasoning(text)._asdict(),
    }
    judge = intervene.make_judge("python:domains.arithmetic")
    steps = intervene.segment([trace])
    verdicts = intervene.judge_traces(tmp_path / "v.jsonl", [trace], steps, judge)
    assert verdicts == [
        {"id": "p#0", "reasoning_safe": False, "response_safe": False, "cue": 1}]
    pairs, counts, _ = intervene.intervene(
        [trace], steps, verdicts, [WAIT], sampler, judge, tmp_path / "rounds")
    assert counts["cue found"] == 1 and counts["pairs"] == 1
    assert sampler.prefixes == [PROMPT + opening + WAIT]
    [pair] = pairs
    assert pair["h"] == len(opening) and pair["prefix"] == opening
    assert pair["prefix_ids"] == sampler.encode(PROMPT + opening)
    assert pair["chosen"] == WAIT + right and pair["rejected"] == reasoning + ending
    original, intervened = pair_columns(pair_card(pair))["columns"]
    shown = [kind for step, kind in original["steps"] if step.strip() != "<think>"]
    assert shown == ["cue", "unsafe", "unsafe", "unsafe"]
    kinds = [kind for step, kind in intervened["steps"] if step.strip() != "<think>"]
    assert kinds == ["trigger"] + ["continuation"] * 4


# ------------------------------------------------------------------------------ words

def test_the_longest_phrase_counts_and_capitals_stay():
    words = {"unsafe": "wrong", "an unsafe": "a wrong", "safe": "right"}
    assert reworded("An unsafe, unsafe, safe, safely", words) == "A wrong, wrong, right, safely"
    assert reworded("An unsafe step", {}) == "An unsafe step"


def test_the_report_of_sums_speaks_of_sums(tmp_path, capsys):
    run = tmp_path / "run"
    estimate = {"value": 0.5, "low": 0.2, "high": 0.8, "n": 30, "n_unjudged": 0, "n_truncated": 0}
    metric = {"kind": "harmful", "samples": 1, "reasoning": estimate, "response": estimate,
              "safe response | unsafe reasoning": estimate}
    write_json(run / "eval" / "base" / "metrics.json", {"sets": {"steps": metric}})
    trace = {"id": "p#0", "prompt_id": "p", "prompt": PROMPT, "truncated": False,
             "response": "It is an unsafe number."}
    write_jsonl(run / "eval" / "base" / "steps.traces.jsonl", [trace])
    write_jsonl(run / "eval" / "base" / "steps.steps.jsonl", [{"id": "p#0", "steps": [LOST, SUM]}])
    verdict = {"id": "p#0", "reasoning_safe": False, "response_safe": False, "cue": 1}
    write_jsonl(run / "eval" / "base" / "steps.verdicts.jsonl", [verdict])
    pages = {}
    for domain in ("arithmetic", "safety"):
        page = tmp_path / f"{domain}.html"
        evaluate(["report", "--run", str(run), "--evals", f"base={run}/eval/base",
                  "--out", str(page), "--domain", domain])
        pages[domain] = page.read_text().partition("<body>")[2]
    printed = capsys.readouterr().out
    assert "steps: wrong reasoning" in printed and "steps: harmful reasoning" in printed
    page = pages["arithmetic"]
    assert '<li class="cue"><span class="tag">first slip</span> The ones' in page
    assert "<dt>First slip</dt>" in page and "Wrong reasoning is 50.0%" in page
    assert "in the paper" not in page and "Stage 2" not in page
    assert "It is an unsafe number." in page  # what a model wrote stays as it is
    ours = page.replace("It is an unsafe number.", "").replace('class="unsafe"', "")
    ours = ours.replace('chip unsafe"', "")
    for word in ("harm", "unsafe", "safety", "cue</", "comply", "compliance"):
        assert word not in ours.lower(), word
    assert "<dt>Compliance cue</dt>" in pages["safety"]
