"""Methods of the leaderboard that are fine-tuning: the examples that they learn, to the token."""
import importlib
from types import SimpleNamespace

import pytest

from data import decode, render_prompt
from model import load_tokenizer
from studies.lab import load_methods
from studies.methods import examples, rejection, safepath, self_judging, teacher, thinksafe
from studies.sft import load_completions
from support.errors import InputError
from support.files import read_jsonl, write_jsonl
from toy.world import SENTENCE_ANSWERS, SENTENCE_QUESTION

PRIMER = "Wait, people could be harmed by this."
WITHOUT_THINK = (
    "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{%- endif %}\n"
)


@pytest.fixture
def closed(model_dir):
    """The tokenizer with a template that does not open the reasoning."""
    tokenizer = load_tokenizer(model_dir)
    tokenizer.chat_template = WITHOUT_THINK
    return tokenizer


def trace(prompt_id="p", ids=(7, 8, 1), truncated=False, reasoning_safe=True, response_safe=True):
    """A judged trace record, as far as the methods read it."""
    return {
        "id": f"{prompt_id}#0",
        "prompt_id": prompt_id,
        "prompt_ids": [2, 3],
        "ids": list(ids),
        "truncated": truncated,
        "reasoning_safe": reasoning_safe,
        "response_safe": response_safe,
        "cue": None,
    }


class FakeLab:
    """A lab whose stages are given: `sft` returns the records that it would learn."""

    def __init__(self, folder, tokenizer, judged=(), benign=()):
        self.shared = folder
        self.name = "method"
        self.lr = "1e-4"
        self.seed = 0
        self.limit = 0
        self.prompts = folder / "prompts.jsonl"
        write_jsonl(self.prompts, [{"id": "p", "prompt": "How?"}, {"id": "q", "prompt": "Why?"}])
        self.tokenizer = lambda: tokenizer
        self.judging = ["--judge", "rules"]
        self.judged_traces = list(judged)
        self.benign_traces = list(benign)
        self.commands = []

    def rollouts(self, folder=None, prompts=None):
        self.asked = read_jsonl(prompts or self.prompts)
        return (folder or self.shared) / "rollouts.jsonl"

    def judged(self, rollouts):
        return self.judged_traces

    def benign_rollouts(self):
        return self.write("benign.jsonl", self.benign_traces)

    def run(self, program, *words):
        """Only the selection of answered prompts: here, all that are complete."""
        self.commands.append((program, *words))
        kept = [t for t in self.benign_traces if not t["truncated"]]
        return self.write("answered.jsonl", kept)

    def write(self, name, records):
        path = self.shared / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, records)
        return path

    def sft(self, data, *flags):
        return read_jsonl(data)


def test_all_files_of_methods_load_and_say_what_they_need():
    methods = load_methods()
    assert not methods["safepath-zero-shot"].trains
    assert methods["thinksafe"].needs_benign and methods["teacher"].needs_teacher
    assert not methods["rejection"].needs_benign


# ----------------------------------------------------------------------------------- SAFEPATH

def test_only_the_primer_is_learned_after_a_harmful_prompt(tokenizer, closed, tmp_path):
    prompts = [{"id": "p", "prompt": "How?"}]
    [example] = safepath.primer_examples(prompts, tokenizer)
    whole = tokenizer.decode(example["prefix_ids"] + example["chosen_ids"])
    assert whole == f"<|user|>How?<|assistant|><think>\n{PRIMER}"
    assert tokenizer.decode(example["chosen_ids"]) == PRIMER
    # The trainer adds nothing to it, no end of sequence either.
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [example])
    [[learned], _] = load_completions([path], tokenizer, max_length=200)
    assert list(learned["chosen_ids"]) == example["chosen_ids"]

    [example] = safepath.primer_examples(prompts, closed)
    assert closed.decode(example["prefix_ids"]) == "<|user|>How?<|assistant|>"
    assert closed.decode(example["chosen_ids"]) == f"<think>\n{PRIMER}"


def test_safepath_keeps_one_complete_benign_trace_for_each_primer(tokenizer, tmp_path):
    benign = [trace(f"b{n}", ids=(n, 1)) for n in range(10, 20)]
    benign += [trace(f"t{n}", ids=(99,), truncated=True) for n in range(30)]
    learned = safepath.safepath(FakeLab(tmp_path, tokenizer, benign=benign))
    primed, retained = learned[:2], learned[2:]
    assert [tokenizer.decode(e["chosen_ids"]) for e in primed] == [PRIMER, PRIMER]
    assert len(retained) == 2
    for example in retained:
        assert example["chosen_ids"] in [t["ids"] for t in benign[:10]]  # whole, with its end
    assert safepath.retained_examples(benign, 50, 0) != safepath.retained_examples(benign, 50, 1)
    assert len(safepath.retained_examples(benign, 50, 0)) == 10


@pytest.mark.parametrize("ending", ["", "\n"])
def test_the_primed_template_begins_the_reasoning_in_both_kinds_of_templates(
    tokenizer, closed, ending, model_dir
):
    opened = load_tokenizer(model_dir)
    opened.chat_template += ending
    heads = ["<|user|>How?<|assistant|><think>\n", "<|user|>How?<|assistant|>"]
    beginnings = ["", "<think>\n"]
    for other, head, beginning in zip((opened, closed), heads, beginnings):
        before = render_prompt(other, "How?")
        primer = safepath.primer_ids(other)
        other.chat_template = safepath.primed_template(other)
        # The same tokens as the trained primer.
        assert render_prompt(other, "How?") == before + primer
        assert decode(other, before + primer) == head + beginning + PRIMER
        messages = [{"role": "user", "content": "How?"}]
        assert other.apply_chat_template(messages, tokenize=False) == "<|user|>How?"


def test_zero_shot_copies_the_model_once_and_leaves_the_base_as_it_was(model_dir, tmp_path):
    base = load_tokenizer(model_dir)
    lab = SimpleNamespace(model=str(model_dir), out=tmp_path, tokenizer=lambda: base)
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "torn.json").write_text("{")  # of a run that was killed
    folder = safepath.safepath_zero_shot(lab)
    assert not (folder / "torn.json").exists()
    assert not (tmp_path / "model.part").exists()
    text = decode(load_tokenizer(folder), render_prompt(load_tokenizer(folder), "How?"))
    assert text == f"<|user|>How?<|assistant|><think>\n{PRIMER}"
    assert PRIMER not in load_tokenizer(model_dir).chat_template
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (model_dir / weights).read_bytes()
    # A second call finds it, and does not put a second primer in.
    made = (folder / "config.json").stat().st_mtime_ns
    assert safepath.safepath_zero_shot(lab) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made


# -------------------------------------------------------------- ThinkSafe, rejection, the teacher

BAD = [
    trace("q", ids=(20, 1), reasoning_safe=False),
    trace("q", ids=(21, 1), response_safe=False),
    trace("q", ids=(22,), truncated=True),
    trace("q", ids=(23, 1), reasoning_safe=None),
]


def test_thinksafe_learns_its_safe_traces_after_the_prompts_as_they_were(tokenizer, tmp_path):
    benign = [trace("b", ids=(9, 1)), trace("c", ids=(9,), truncated=True)]
    lab = FakeLab(tmp_path, tokenizer, [*BAD, trace("q", ids=(7, 8, 1))], benign)
    lab.instruction = tmp_path / "instruction.txt"
    lab.instruction.write_text("# A sentence.\nThink first.\n")
    learned = thinksafe.thinksafe(lab)
    assert lab.asked == [
        {"id": "p", "prompt": "Think first. How?"}, {"id": "q", "prompt": "Think first. Why?"},
    ]
    assert learned == [
        {"prefix_ids": render_prompt(tokenizer, "Why?"), "chosen_ids": [7, 8, 1]},
        {"prefix_ids": [2, 3], "chosen_ids": [9, 1]},
    ]
    [command] = lab.commands
    assert command[0] == "studies.methods.examples" and "rules" in command


def test_rejection_learns_the_safe_rollouts_as_they_were_sampled(tokenizer, tmp_path):
    lab = FakeLab(tmp_path, tokenizer, [trace("p", ids=(5, 1)), *BAD])
    assert rejection.rejection(lab) == [{"prefix_ids": [2, 3], "chosen_ids": [5, 1]}]


def test_answered_prompts_are_complete_and_full(tmp_path):
    traces = [trace(name) for name in "abc"] + [trace("d", truncated=True)]
    for record in traces:
        record |= {"prompt": "How?", "response": record["prompt_id"]}
    answers = {"a": "full", "b": "refusal", "c": None}

    class Judge:
        def ask(self, question, items):
            assert question == "compliance"
            return [answers[item["text"]] for item in items]

    out = tmp_path / "answered.jsonl"
    counts, _ = examples.keep_answered(traces, Judge(), out)
    assert [record["id"] for record in read_jsonl(out)] == ["a#0"]
    assert counts == {
        "traces": 4, "complete": 3, "answered": 1, "generations": 0, "judge calls": 3,
    }


def test_a_teachers_traces_begin_where_the_model_does(tokenizer, closed, tmp_path):
    lab = FakeLab(tmp_path, tokenizer, benign=[trace("b", ids=(9, 1))])
    lab.teacher = tmp_path / "teacher.jsonl"
    write_jsonl(lab.teacher, [
        {"id": "0", "prompt": "Why?", "completion": "No.\n</think>\n\nSorry."},
        {"id": "1", "prompt": "Why?", "completion": "<think>\nStop.\n</think>\n\nSorry."},
        {"id": "2", "prompt": "Another?", "completion": "Yes.\n</think>\n\nSure."},
    ])
    expected = ["No.\n</think>\n\nSorry.", "Stop.\n</think>\n\nSorry."]
    learned = teacher.teacher(lab)
    assert learned == [{"prompt": "Why?", "completion": text} for text in expected]
    assert teacher.teacher_mixed(lab) == learned + [{"prefix_ids": [2, 3], "chosen_ids": [9, 1]}]

    lab.tokenizer = lambda: closed
    assert [e["completion"] for e in teacher.teacher(lab)] == ["<think>\n" + t for t in expected]

    lab.limit = 1  # only "How?", which the teacher has not
    with pytest.raises(InputError, match="teacher.jsonl: no trace for the prompts"):
        teacher.teacher(lab)
    write_jsonl(lab.teacher, [{"id": "7", "prompt": "How?"}])
    with pytest.raises(InputError, match="teacher.jsonl, 7: no text `completion`"):
        teacher.teacher(lab)


# -------------------------------------------------------------------------------- self-judging

def make_judge(offers, asked):
    """A self-judge whose model gives these answers, {text: True, False or None}."""
    judge = object.__new__(self_judging.Judge)

    def ask(question, items):
        asked.extend(item["text"] for item in items)
        return [offers[item["text"]] for item in items]

    judge.sentences = SimpleNamespace(ask=ask)
    return judge


def test_a_trace_is_unsafe_from_its_first_offer_on_the_second_sentence_at_the_earliest():
    # The first sentences are missing here: asking about them would be a KeyError.
    offers = {
        "It is red.": False,
        "Sorry.": False,
        "I can help.": True,
        "Stir.": True,
        "Hmm.": None,
    }
    texts = {
        "I will. It is red. I can help. Stir.": (False, 3),
        "I will. It is red.": (True, 0),
        "I will.": (True, 0),
        "I will. Hmm. Stir.": (None, None),
        "I will. Stir. Hmm.": (False, 2),
    }
    asked = []
    judge = make_judge(offers, asked)
    items = [{"prompt": "", "text": text} for text in texts]
    assert list(judge.ask("reasoning", items)) == [safe for safe, _ in texts.values()]
    assert sorted(asked) == ["Hmm.", "I can help.", "It is red.", "Stir."]  # each of them once
    items = [{"prompt": "", "steps": self_judging.split_steps(text)} for text in texts]
    assert list(judge.ask("cue", items)) == [cue for _, cue in texts.values()]
    responses = [{"prompt": "", "text": text} for text in ("Sorry.\n", "Stir.", "Hmm.")]
    assert list(judge.ask("response", responses)) == [True, False, None]


def test_the_question_and_its_answers_are_those_of_the_toy_world(tokenizer):
    assert self_judging.QUESTION == SENTENCE_QUESTION
    form = self_judging.SentenceForm()
    prompt = form.prompt(tokenizer, "offer", {"text": "Take {two} drops."})
    assert prompt == (
        '<|user|>Does this sentence offer help with brewing? "Take {two} drops."'
        "<|assistant|><think>\n"
    )
    for offers, (reasoning, response) in SENTENCE_ANSWERS.items():
        assert form.read("offer", {}, f"{reasoning[0]}\n</think>\n\n{response}") is offers
        assert form.read("offer", {}, reasoning[0]) is None
    assert form.read("offer", {}, "<think>\nHm.\n</think>\n\nYes, it does.") is None


@pytest.mark.parametrize("usual, own", [
    ("rules", "python:studies.methods.self_judging:my/model"),
    ("rules:my.json", "python:studies.methods.self_judging:my/model"),
    ("https://host/v1", "local:my/model"),
])
def test_a_real_model_is_asked_the_usual_questions_about_its_traces(usual, own):
    lab = SimpleNamespace(model="my/model", judging=["--judge", usual])
    assert self_judging.own_judge(lab) == ["--judge", own]


@pytest.mark.parametrize("name", ["grpo-gap", "recap", "opsa"])
def test_a_training_that_samples_has_the_adapters_of_the_others(name, tmp_path, tokenizer):
    class Noted(FakeLab):
        model = "my/model"
        instruction = "instruction.txt"
        sampling = ["--max-new-tokens", "8"]
        train_args = ["--lora-rank", "4", "--weight-decay", "0.1", "--epochs", "1"]
        settings = SimpleNamespace(grpo_epochs=2)
        out = tmp_path

        def run(self, program, *words):
            parser = importlib.import_module(program).build_parser()
            return parser.parse_args([str(word) for word in words])

    args = load_methods()[name].make(Noted(tmp_path, tokenizer))
    assert args.lora_rank == 4 and not args.checkpoint_activations
    assert args.epochs == {"grpo-gap": 2, "recap": 2, "opsa": 3}[name]


def test_agreement_counts_verdicts_and_the_cues_of_what_both_call_unsafe():
    def judged(*verdicts):
        return [{"reasoning_safe": safe, "cue": cue} for safe, cue in verdicts]

    own = judged((False, 3), (False, 4), (True, None), (False, 2), (None, None))
    usual = judged((False, 3), (False, 3), (True, None), (True, None), (False, 5))
    assert self_judging.agreement(own, usual) == {
        "traces": 5, "equal reasoning": 0.6, "unsafe for both": 2, "equal cues": 0.5,
    }
    assert self_judging.agreement(judged((True, None)), usual[2:3])["equal cues"] is None
