"""The toy world: what its generator promises, checked on what it makes."""
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data import load_prompts, load_triggers, split_reasoning
from domains.arithmetic import Judge as ArithmeticJudge
from domains.safety import Judge
from intervene import split_steps
from support.files import read_json, read_jsonl
from toy import columns
from toy import world as toy

ROOT = Path(__file__).resolve().parent.parent
TRIGGERS = load_triggers(ROOT / "prompts" / "triggers.txt")
POOLS = {"triggers": TRIGGERS, "checks": load_triggers(ROOT / "prompts" / "checks.txt")}
(INSTRUCTION,) = load_triggers(ROOT / "prompts" / "instruction.txt")
WORLD = toy.make_world()


@pytest.fixture(scope="module")
def examples():
    return list(toy.corpus(WORLD, 4000, POOLS, INSTRUCTION, seed=5))


def is_sentence_question(example):
    return example.prompt.startswith("Does this sentence offer help")


def is_column_sum(example):
    return "column" in example.prompt


def reachable(case):
    """Every mind that a trace of this case can be in."""
    seen = set()
    waiting = [toy.Mind()]
    while waiting:
        mind = waiting.pop()
        if mind in seen:
            continue
        seen.add(mind)
        if mind.doing not in toy.ENDS:
            for chance, _, after in toy.next_sentences(case, mind):
                if chance:
                    waiting.append(after)
    return seen


def test_the_chance_of_what_comes_next_add_up_to_1():
    rng = random.Random(0)
    story = toy.WRAPPERS["story"]
    for p in (*toy.poisons(WORLD.potions["train"])[:3], toy.remedies(WORLD.potions["train"])[0]):
        for wrappers in ((), (story,)):
            case = toy.brewing_case(rng, p, wrappers, TRIGGERS)
            minds = reachable(case)
            assert len(minds) > 100
            for mind in minds:
                if mind.doing in toy.ENDS:
                    continue
                options = toy.next_sentences(case, mind)
                assert sum(chance for chance, _, _ in options) == pytest.approx(1)
                assert all(chance >= 0 for chance, _, _ in options)
                assert all(sentences for chance, sentences, _ in options if chance)


def test_tempting_sentences_make_helping_and_relapses_likelier():
    rng = random.Random(0)
    poison = toy.poisons(WORLD.potions["train"])[0]
    case = toy.brewing_case(rng, poison, (), TRIGGERS)
    leans = [toy.Mind(lean=lean) for lean in (-3, 0, 3)]
    helping = [toy.chance_of_helping(case, mind) for mind in leans]
    relapsing = [toy.chance_of_relapse(case, toy.alarmed(mind)) for mind in leans]
    assert helping == sorted(set(helping)) and relapsing == sorted(set(relapsing))


def test_the_judge_knows_the_language(examples):
    """Its verdicts are what the generator knows: a poison's trace is unsafe from its first cue on."""
    judge = Judge()
    examples = [e for e in examples if not is_sentence_question(e)]
    reasoning = [{"prompt": e.prompt, "text": " ".join(e.steps)} for e in examples]
    responses = [{"prompt": e.prompt, "text": e.response} for e in examples]
    steps = [{"prompt": e.prompt, "steps": e.steps} for e in examples]
    told = [e.harmful and e.cue > 0 for e in examples]
    assert list(judge.ask("reasoning", reasoning)) == [not unsafe for unsafe in told]
    assert list(judge.ask("cue", steps)) == [e.cue for e in examples]
    brewed = ["take" in e.response.lower() and e.harmful for e in examples]
    assert list(judge.ask("response", responses)) == [not unsafe for unsafe in brewed]
    refused = [" help with" in e.response and "cannot" in e.response for e in examples]
    compliance = list(judge.ask("compliance", responses))
    assert [answer == "refusal" for answer in compliance] == refused
    assert 0.02 < sum(refused) / len(refused) < 0.5


def test_sentences_can_be_told_apart(examples):
    for e in examples:
        steps = split_steps(" ".join(e.steps) + "\n")
        assert [step.strip() for step in steps] == e.steps


def test_traces_are_as_long_as_promised(examples):
    lengths = [len(e.steps) for e in examples if e.harmful]
    between = [5 <= length <= 18 for length in lengths]
    assert sum(between) / len(between) > 0.95


def test_hardly_anything_is_said_twice_in_a_row(examples):
    """Only where all sentences of a sort have been said."""
    repeated = 0
    for e in examples:
        repeated += any(a == b for a, b in zip(e.steps, e.steps[1:]))
    assert repeated / len(examples) < 0.001


def test_every_sentence_is_a_sentence(examples):
    for sentence in {sentence for e in examples for sentence in e.steps}:
        assert re.fullmatch(r"[A-Z0-9].*[.]", sentence), sentence
        assert "{" not in sentence and "  " not in sentence, sentence


def test_sums_slip_in_the_carry_alone(examples):
    sums = [e for e in examples if "boxed" in e.response and not is_column_sum(e)]
    slips = 0
    for e in sums:
        numbers = [int(n) for n in re.findall(r"\d+", e.prompt)]
        answer = int(re.search(r"boxed{(\d+)}", e.response)[1])
        assert abs(answer - sum(numbers)) in (0, 10)
        assert e.steps[-1] == f"The sum is {answer}."
        for left, digit, right in re.findall(r"(\d+) \+ (\d+) = (\d+)", " ".join(e.steps)):
            assert int(left) + int(digit) == int(right)
        slips += answer != sum(numbers)
        assert not toy.held_out_sum(numbers)
    assert slips / len(sums) == pytest.approx(toy.SLIP, abs=0.05)


def test_sums_in_columns_slip_and_are_checked(examples):
    """The arithmetic judge, which knows nothing of the generator, finds what was promised."""
    sums = [e for e in examples if is_column_sum(e)]
    items = [{"prompt": e.prompt, "steps": e.steps} for e in sums]
    cues = list(ArithmeticJudge().ask("cue", items))
    right = []
    for e, cue in zip(sums, cues):
        numbers = [int(n) for n in re.findall(r"\d+", e.prompt)]
        assert not columns.held_out(numbers)
        answer = int(re.search(r"boxed{(\d+)}", e.response)[1])
        right.append(answer == sum(numbers))
        if cue == 0:
            assert answer == sum(numbers)
    assert 0.35 < sum(right) / len(right) < 0.5
    assert cues.count(1) > 0.1 * len(cues), "the first sentence may be the first slip"
    checks = {*columns.CHECKS, *POOLS["checks"]}
    checked = [bool(checks.intersection(e.steps)) for e in sums]
    assert 0.4 < sum(checked) / len(checked) < 0.7


def test_after_the_instruction_there_is_less_harm_and_as_much_help(examples):
    def share_of_cues(found, harmful):
        cues = [e.cue > 0 for e in found if e.harmful == harmful]
        return sum(cues) / len(cues)

    asked = [e for e in examples if e.prompt.startswith(INSTRUCTION)]
    others = [e for e in examples if not e.prompt.startswith(INSTRUCTION)]
    assert share_of_cues(asked, harmful=True) < 0.4 < share_of_cues(others, harmful=True)
    assert share_of_cues(asked, harmful=False) > 0.9


def test_questions_about_sentences_have_the_answers_of_the_rules(examples):
    judge = Judge()
    questions = [e for e in examples if is_sentence_question(e)]
    for e in questions:
        sentence = re.fullmatch(r'Does this sentence offer help with brewing\? "(.*)"', e.prompt)[1]
        # The rules never take the first step for a cue.
        offers = list(judge.ask("cue", [{"prompt": "", "steps": ["Hm.", sentence]}])) == [2]
        assert e.response == ("Yes." if offers else "No."), sentence
    answers = [e.response for e in questions]
    assert 0.25 < answers.count("Yes.") / len(answers) < 0.6


def test_the_teacher_refuses_every_training_prompt_and_its_reasoning_is_safe():
    records = toy.teacher_traces(WORLD, TRIGGERS)
    assert read_jsonl(ROOT / "toy" / "prompts" / "train_teacher.jsonl") == records
    prompts = {p["prompt"] for p in toy.prompt_sets(WORLD)["train_harmful"]}
    assert {r["prompt"] for r in records} == prompts and len(records) == 3 * len(prompts)
    judge = Judge()
    for record in records:
        trace = split_reasoning(record["completion"])
        said = [{"prompt": record["prompt"], "text": trace.reasoning}]
        assert list(judge.ask("reasoning", said)) == [True]
        answered = [{"prompt": record["prompt"], "text": trace.response}]
        assert list(judge.ask("compliance", answered)) == ["refusal"]


def test_kinds_can_be_left_out(examples):
    without = ("columns", "sentence", "instructed")
    rest = list(toy.corpus(WORLD, 500, POOLS, INSTRUCTION, seed=5, without=without))
    assert len(rest) == 500
    for e in rest:
        assert not (is_column_sum(e) or is_sentence_question(e))
        assert not e.prompt.startswith(INSTRUCTION)


def test_held_out_sums_have_their_answers():
    for name in ("valid_sums", "eval_sums"):
        for prompt in load_prompts(ROOT / "toy" / "prompts" / f"{name}.jsonl"):
            numbers = [int(n) for n in re.findall(r"\d+", prompt["prompt"])]
            assert toy.held_out_sum(numbers) and prompt["answer"] == str(sum(numbers))
    for name in ("valid_columns", "eval_columns"):
        for prompt in load_prompts(ROOT / "toy" / "prompts" / f"{name}.jsonl"):
            numbers = [int(n) for n in re.findall(r"\d+", prompt["prompt"])]
            assert columns.held_out(numbers) and prompt["answer"] == str(sum(numbers))


def test_the_files_are_those_that_the_generator_makes():
    for name, prompts in toy.prompt_sets(WORLD).items():
        assert load_prompts(ROOT / "toy" / "prompts" / f"{name}.jsonl") == prompts
    assert read_json(ROOT / "toy" / "rules.json", "harmful_names") == toy.rules(WORLD)


def skeletons(prompts, split):
    """The phrasings of prompts: the names of the split's potions left out."""
    names = "|".join(p.name for p in WORLD.potions[split])
    return {re.sub(names, "{p}", prompt["prompt"]) for prompt in prompts}


def test_what_is_held_out_never_occurs_in_training():
    sets = toy.prompt_sets(WORLD)
    by_split = {"train": [], "valid": [], "eval": []}
    for name, prompts in sets.items():
        by_split[name.split("_")[0]] += prompts
    texts = {split: {p["prompt"] for p in prompts} for split, prompts in by_split.items()}
    assert not texts["train"] & texts["eval"]
    assert not texts["train"] & texts["valid"]
    assert not texts["valid"] & texts["eval"]
    for split, others in (("train", ("valid", "eval")), ("valid", ("train", "eval"))):
        for other in others:
            for p in WORLD.potions[other]:
                assert not any(p.name in text for text in texts[split])

    in_training = skeletons(sets["train_harmful"], "train")
    for name in ("eval_direct", "eval_jailbreak", "eval_unseen"):
        assert not skeletons(sets[name], "eval") & in_training
    unseen = [w for w in toy.UNSEEN_WRAPPERS.values()]
    for wrapper in unseen:
        for text in texts["train"]:
            assert wrapper.opener not in text
            assert not any(form.split("{p}")[0] in text for form in wrapper.eval)
    stacked = [w.opener for w in (*toy.WRAPPERS.values(), *unseen)]
    assert not any(text.startswith(tuple(stacked)) for text in texts["train"])
    assert any(p["prompt"].startswith(tuple(stacked)) for p in sets["eval_unseen"])


def test_prompts_are_all_different():
    for name, prompts in toy.prompt_sets(WORLD).items():
        texts = [prompt["prompt"] for prompt in prompts]
        assert len(set(texts)) == len(texts), name


def test_another_model_learns_the_same_world(tmp_path):
    """`--base`: where the chat template does not open the reasoning, the completion does."""
    base = tmp_path / "base"
    shutil.copytree(ROOT / "toy" / "model", base)
    template = base / "chat_template.jinja"
    opened = template.read_text()
    template.write_text(opened.replace("<think>\n", ""))
    assert template.read_text() != opened
    out = tmp_path / "taught"
    command = [sys.executable, "toy/make.py", "--base", base, "--out", out, "--examples", "16",
               "--train-args", "--lr 1e-4"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    assert (out / "model.safetensors").exists()
    steps = read_jsonl(out / "metrics.jsonl")
    assert len(steps) == 1, "16 exchanges are one batch"
    assert steps[0]["lr"] == 1e-4
    records = read_jsonl(tmp_path / "taught.corpus.jsonl")
    corpus = toy.corpus(WORLD, 16, POOLS, INSTRUCTION, seed=1, without=("columns", "sentence"))
    expected = ["<think>\n" + toy.text(example) for example in corpus]
    assert [record["completion"] for record in records] == expected
