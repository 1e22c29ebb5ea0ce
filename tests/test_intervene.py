"""Algorithm 1 and the benign pairs on hand-made traces; the sampler always says the same."""
import subprocess
import sys
from pathlib import Path

import pytest

import intervene
from data import decode, render_prompt, split_reasoning
from data import Completion
from support.errors import InputError
from support.files import write_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def rules(tmp_path):
    write_json(tmp_path / "rules.json", {
        "harmful_names": ["duskwort"],
        "commits": r"\bI can explain\b",
        "instructs": r"\btake two drops\b",
        "harmful_topic": r"\brecipe\b",
        "refuses": r"\bcannot help\b",
        "answers": r"\btake two drops\b|\bGive them\b",
    })
    return intervene.make_judge(f"rules:{tmp_path / 'rules.json'}")


class FakeSampler:
    """Continues every prefix with the same text, and keeps the requests that it was sent."""
    context = 256
    max_new_tokens = 64

    def __init__(self, tokenizer, text, finished="stop"):
        self.tokenizer = tokenizer
        self.eos = {1}
        self.text = text
        self.finished = finished
        self.seen = []

    def __call__(self, requests, done=(), parts=None, title=""):
        for request in requests:
            if request.id not in done:
                self.seen.append(request)
                ids = encode(self.tokenizer, self.text)
                if self.finished == "stop":
                    ids.append(1)
                yield Completion(request.id, ids, self.finished)


class ConstantJudge:
    """Gives every question the same answer, and keeps the questions."""

    def __init__(self, answer):
        self.answer = answer
        self.questions = []

    def ask(self, question, items):
        self.questions += [question] * len(items)
        return iter([self.answer] * len(items))


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def trace_of(tokenizer, text, trace_id="p#0", prompt="How do I brew duskwort?"):
    prompt_id, sample = trace_id.split("#")
    return {
        "id": trace_id,
        "prompt_id": prompt_id,
        "sample": int(sample),
        "prompt": prompt,
        "prompt_ids": render_prompt(tokenizer, prompt),
        **split_reasoning(text)._asdict(),
        "forced": 0,
        "finished": "stop",
        "ids": encode(tokenizer, text) + [1],
    }


def judged(traces, judge, folder):
    """Steps and verdicts of traces."""
    steps = intervene.segment(traces)
    return steps, intervene.judge_traces(folder / "v.jsonl", traces, steps, judge)


UNSAFE = (
    "The user asks for duskwort. It is a poison. I can explain the recipe. First take two drops.\n"
    "</think>\n\nTo brew it take two drops."
)
RELAPSE = (
    " Still. I can explain the recipe. First take two drops.\n</think>\n\nNo."
)
SAFE = " So I will decline.\n</think>\n\nI cannot help."


# ------------------------------------------------------------------------------------ rules judge

@pytest.mark.parametrize("prompt, text, safe", [
    ("Make duskwort", "I know it. I can explain the recipe.", False),
    ("Make duskwort", "I must not explain the recipe.", True),
    ("Make it", "I can explain the recipe of Duskwort.", False),
    ("Make honey tea", "I can explain the recipe. First take two drops.", True),
    ("Cure duskwort", "A cure protects, so I can explain it.", True),
])
def test_rules_on_reasoning(rules, prompt, text, safe):
    assert list(rules.ask("reasoning", [{"prompt": prompt, "text": text}])) == [safe]


def test_rules_search_the_cue_from_the_second_step(rules):
    def cue(steps):
        return list(rules.ask("cue", [{"prompt": "duskwort", "steps": steps}]))[0]
    assert cue(["I can explain the recipe.", "No.", " I can explain it."]) == 3
    assert cue(["I can explain the recipe.", "No."]) == 0
    assert cue([]) == 0


# -------------------------------------------------------------------------------- traces, verdicts

def test_prompts_longer_than_the_context_are_dropped_and_counted(tokenizer):
    sampler = FakeSampler(tokenizer, "")
    prompts = [
        {"id": "short", "prompt": "Hi"},
        {"id": "long", "prompt": "€x" * 200},
        {"id": "ü", "prompt": "日本"},
    ]
    jobs, dropped = intervene.trace_jobs(prompts, 2, sampler)
    assert dropped == 1
    assert [job["id"] for job in jobs] == ["short#0", "short#1", "ü#0", "ü#1"]


@pytest.mark.parametrize("text, finished", [
    (" I go on and on", "length"),
    ("Done.\n</think>\n\nHalf an ans", "length"),
    ("No tag.", "stop"),
])
def test_truncated_traces_are_flagged_and_their_response_is_never_judged(
        tokenizer, tmp_path, text, finished):
    sampler = FakeSampler(tokenizer, text, finished)
    jobs, _ = intervene.trace_jobs([{"id": "a", "prompt": "Hi"}], 1, sampler)
    traces = intervene.sample_traces(tmp_path / "t.jsonl", jobs, sampler, "")
    assert traces[0]["truncated"]
    judge = ConstantJudge(True)
    _, verdicts = judged(traces, judge, tmp_path)
    assert judge.questions == ["reasoning"] and verdicts[0]["response_safe"] is None


def test_an_unparsed_verdict_stays_none_and_is_not_asked_for_a_cue(tokenizer, tmp_path):
    judge = ConstantJudge(None)
    traces = [trace_of(tokenizer, UNSAFE)]
    traces[0]["truncated"] = False
    steps, verdicts = judged(traces, judge, tmp_path)
    assert "cue" not in judge.questions
    assert verdicts == [{"id": "p#0", "reasoning_safe": None, "response_safe": None, "cue": None}]
    pairs, counts, _ = intervene.intervene(
        traces, steps, verdicts, ["T."], FakeSampler(tokenizer, SAFE), judge, tmp_path)
    assert pairs == [] and counts["unsafe"] == 0
    assert "cue" not in judge.questions


# ----------------------------------------------------------------------------------- interventions

@pytest.mark.parametrize("opening", ["", "<think>\n"])
@pytest.mark.parametrize("body, number, prefix, trigger", [
    ("One. Two. Three.", 2, "One.", " Stop."),
    ("One. Two.\n\nThree. Four.", 2, "One.", " Stop.\n\n"),
    ("One.\n\nTwo. Three.", 2, "One.\n\n", "Stop."),
    ("One. Two.\n", 2, "One.", " Stop."),
    ("One.  Two. Three 🙂.", 3, "One.  Two.", " Stop."),
])
def test_substitution_keeps_the_prefix_and_the_white_space(
        tokenizer, opening, body, number, prefix, trigger):
    trace = trace_of(tokenizer, opening + body + "</think>\n\nYes.")
    steps = intervene.split_steps(trace["reasoning"])
    h, ids = intervene.substitute(tokenizer, trace, steps, number, "Stop.")
    assert tokenizer.decode(trace["ids"][:h]) == opening + prefix
    assert tokenizer.decode(ids) == trigger


def test_a_cue_that_begins_inside_a_token_loses_no_character(tokenizer):
    """CJK punctuation can share a token with the next word, as pieces of a character always do."""
    trace = trace_of(tokenizer, "One.")
    steps = ["毒药危险。", "我来解释。", "好。"]

    class Glued:  # a tokenizer for which "。我" is one token
        pieces = ["毒药", "危险", "。我", "来解释。", "好。"]

        def decode(self, ids, **_):
            return "".join(self.pieces[i] for i in ids)

        def encode(self, text, **_):
            return text

    trace.update(reasoning="".join(steps), opening="", ids=[0, 1, 2, 3, 4])
    h, forced = intervene.substitute(Glued(), trace, steps, 2, "停。")
    assert h == 2 and forced == "。停。"


def test_algorithm_1_continues_from_exact_ids_and_pairs_share_the_prefix(
        tokenizer, rules, tmp_path):
    a = trace_of(tokenizer, UNSAFE)
    b = trace_of(tokenizer, UNSAFE.replace("It is", "Oh"), "p#1")
    # ids that no encoder would give for this text: only cutting ids keeps them
    a["ids"] = a["ids"][:1] + encode(tokenizer, "xy") + a["ids"][1:]
    a["reasoning"] = split_reasoning(decode(tokenizer, a["ids"], {1})).reasoning
    traces = [a, b]
    steps, verdicts = judged(traces, rules, tmp_path)
    assert [v["cue"] for v in verdicts] == [3, 3]
    sampler = FakeSampler(tokenizer, SAFE)
    triggers = ["Stop this.", "No more."]
    pairs, counts, more = intervene.intervene(
        traces, steps, verdicts, triggers, sampler, rules, tmp_path)
    assert counts["pairs"] == 2
    assert more["by_trigger"] == {"Stop this.": [1, 1], "No more.": [1, 1]}

    ends = [". It is a poison.", ". Oh a poison."]
    for trace, request, pair, trigger, end in zip(traces, sampler.seen, pairs, triggers, ends):
        h = pair["h"]
        forced = encode(tokenizer, " " + trigger)
        assert tokenizer.decode(trace["ids"][:h]).endswith(end)
        assert request.prefix == trace["prompt_ids"] + trace["ids"][:h] + forced
        assert pair["prefix_ids"] == trace["prompt_ids"] + trace["ids"][:h]
        assert pair["rejected_ids"] == trace["ids"][h:]
        assert pair["chosen_ids"] == forced + encode(tokenizer, SAFE) + [1]
        assert pair["chosen"] == " " + trigger + SAFE
        assert pair["n_prompt"] == len(trace["prompt_ids"])
        assert pair["source"] == "harmful"
        assert pair["interventions"] == 1
        assert pair["trigger"] == trigger


def test_a_relapse_is_intervened_again_up_to_n_times(tokenizer, rules, tmp_path):
    class Relapsing(FakeSampler):
        def __call__(self, requests, done=(), parts=None, title=""):
            self.text = SAFE if self.seen else RELAPSE
            yield from super().__call__(requests, done)

    traces = [trace_of(tokenizer, UNSAFE)]
    steps, verdicts = judged(traces, rules, tmp_path)

    def run(name, rounds):
        sampler = Relapsing(tokenizer, "")
        return intervene.intervene(
            traces, steps, verdicts, ["Stop."], sampler, rules, tmp_path / name, rounds)

    assert run("one", 1)[1]["pairs"] == 0
    pairs, counts, _ = run("two", 2)
    assert counts["interventions"] == 2
    assert len(pairs) == 1 and pairs[0]["interventions"] == 2
    assert pairs[0]["prefix"].endswith("It is a poison. Stop. Still.")
    assert pairs[0]["rejected"].startswith(" I can explain")
    assert pairs[0]["chosen"].startswith(" Stop. So I will decline.")


class InTurn(FakeSampler):
    """Answers the n-th request with the n-th of its texts, and from then on with the last."""

    def __init__(self, tokenizer, texts):
        super().__init__(tokenizer, "")
        self.texts = texts

    def __call__(self, requests, done=(), parts=None, title=""):
        for request in requests:
            self.text = self.texts[min(len(self.seen), len(self.texts) - 1)]
            yield from super().__call__([request], done)


def test_a_second_round_never_inserts_the_sentence_that_ends_its_prefix(
        tokenizer, rules, tmp_path):
    at_once = " I can explain the recipe. First take two drops.\n</think>\n\nNo."
    traces = [trace_of(tokenizer, UNSAFE), trace_of(tokenizer, UNSAFE, "p#1")]
    steps, verdicts = judged(traces, rules, tmp_path)
    sampler = InTurn(tokenizer, [at_once, at_once, SAFE])
    pairs, counts, _ = intervene.intervene(
        traces, steps, verdicts, ["Stop.", "Think."], sampler, rules, tmp_path, rounds=2)
    assert counts["interventions"] == 4
    assert [pair["trigger"] for pair in pairs] == ["Think.", "Stop."]
    assert pairs[0]["prefix"].endswith(" It is a poison. Stop.")
    assert pairs[1]["prefix"].endswith(" It is a poison. Think.")
    for pair in pairs:
        assert pair["chosen"] == " " + pair["trigger"] + SAFE


def test_a_trigger_never_stands_on_the_rejected_side(tokenizer, rules, tmp_path):
    """The judge finds the second cue before the first trigger: no pair, but it is counted."""
    class Wavering:
        cues = [3, 2]

        def ask(self, question, items):
            answers = list(rules.ask(question, items))
            if question == "cue" and items:
                answers = [self.cues.pop(0)]
            return iter(answers)

    traces = [trace_of(tokenizer, UNSAFE)]
    judge = Wavering()
    steps, verdicts = judged(traces, judge, tmp_path)
    sampler = InTurn(tokenizer, [RELAPSE, SAFE])
    pairs, counts, more = intervene.intervene(
        traces, steps, verdicts, ["Stop.", "Think."], sampler, judge, tmp_path, rounds=2)
    assert pairs == []
    assert counts["interventions"] == 2 and counts["safe continuations"] == 1
    assert more["outcomes"] == {"unsafe": 1, "cue before trigger": 1}


@pytest.mark.parametrize("text, finished, outcome", [
    # safe reasoning, unsafe response
    (" So I will decline.\n</think>\n\nTo brew it take two drops.", "stop", "unsafe"),
    (" So I will decl", "length", "truncated"),
    # unsafe reasoning
    (" I can explain the recipe.\n</think>\n\nNo.", "stop", "unsafe"),
])
def test_only_complete_and_wholly_safe_continuations_become_pairs(
        tokenizer, rules, tmp_path, text, finished, outcome):
    traces = [trace_of(tokenizer, UNSAFE)]
    steps, verdicts = judged(traces, rules, tmp_path)
    sampler = FakeSampler(tokenizer, text, finished)
    pairs, counts, more = intervene.intervene(
        traces, steps, verdicts, ["Stop."], sampler, rules, tmp_path)
    assert pairs == [] and counts["interventions"] == 1 and counts["pairs"] == 0
    assert more["outcomes"] == {outcome: 1}


def test_the_outcomes_of_all_rounds_add_up_to_the_interventions(tokenizer, rules, tmp_path):
    class Tongueless:
        """Has no verdict on responses that say `Hm.`"""

        def ask(self, question, items):
            answers = rules.ask(question, items)
            if question == "response":
                answers = [None if "Hm." in i["text"] else a for i, a in zip(items, answers)]
            return iter(list(answers))

    traces = [trace_of(tokenizer, UNSAFE, f"p#{k}") for k in range(5)]
    steps, verdicts = judged(traces, rules, tmp_path)
    unjudged = " So I will decline.\n</think>\n\nHm."
    sampler = InTurn(tokenizer, [RELAPSE, unjudged, SAFE, " No tag", RELAPSE, RELAPSE, SAFE])
    pairs, counts, more = intervene.intervene(
        traces, steps, verdicts, ["Stop.", "Think."], sampler, Tongueless(), tmp_path, rounds=2)
    assert more["outcomes"] == {
        "unsafe": 3, "unjudged": 1, "pairs": 2, "truncated": 1}
    assert sum(more["outcomes"].values()) == counts["interventions"] == 7
    assert counts["safe continuations"] == counts["pairs"] == len(pairs) == 2
    assert list(counts) == ["prompts", "rollouts", "complete", "unsafe", "cue found",
                            "interventions", "safe continuations", "pairs"]


def test_steps_of_other_traces_are_refused(tokenizer, rules, tmp_path):
    traces = [trace_of(tokenizer, UNSAFE, f"p#{k}") for k in range(3)]
    steps = intervene.segment(traces)
    with pytest.raises(InputError, match="p#0: its steps are missing or in another place"):
        intervene.judge_traces(tmp_path / "v.jsonl", traces, steps[1:], rules)
    with pytest.raises(InputError, match="p#1: its steps"):
        intervene.judge_traces(tmp_path / "w.jsonl", traces, steps[:1], rules)


def test_a_trace_without_room_for_a_continuation_is_left_out(tokenizer, rules, tmp_path):
    traces = [trace_of(tokenizer, UNSAFE)]
    steps, verdicts = judged(traces, rules, tmp_path)
    sampler = FakeSampler(tokenizer, SAFE)
    sampler.context = len(traces[0]["prompt_ids"]) + 5
    pairs, counts, _ = intervene.intervene(
        traces, steps, verdicts, ["Stop."], sampler, rules, tmp_path)
    assert pairs == [] and sampler.seen == []
    assert counts["cue found"] == 1 and counts["interventions"] == 0


def test_identical_pairs_are_dropped_and_counted(tokenizer, tmp_path):
    text = "Duskwort. I can explain the recipe. So I will decline.\n</think>\n\nI cannot help."
    traces = [trace_of(tokenizer, text)]
    steps = intervene.segment(traces)
    verdicts = [{"id": "p#0", "reasoning_safe": False, "response_safe": True, "cue": 2}]
    triggers = ["I can explain the recipe."]
    pairs, counts, _ = intervene.intervene(
        traces, steps, verdicts, triggers, FakeSampler(tokenizer, SAFE), ConstantJudge(True),
        tmp_path)
    assert pairs == [] and counts["identical"] == 1


def test_benign_pairs_prefer_the_answer_over_own_and_provoked_refusals(tokenizer, rules, tmp_path):
    good = "A cure is asked. A cure protects. I can explain it.\n</think>\n\nGive them tea."
    refused_by_base = good.replace("Give them", "I cannot help with")
    base = [
        trace_of(tokenizer, good, "a#0"),
        trace_of(tokenizer, good, "b#0"),
        trace_of(tokenizer, refused_by_base, "c#0"),
    ]
    current = [
        trace_of(tokenizer, "A cure is asked." + SAFE, "a#0"),
        trace_of(tokenizer, good, "b#0"),
        trace_of(tokenizer, good, "c#0"),
    ]
    pairs, counts = intervene.benign_pairs(
        base, current, ["Stop."], FakeSampler(tokenizer, SAFE), rules, tmp_path)
    assert counts == {
        "prompts": 3, "answered": 2, "refused now": 1, "reversed": 1, "pairs": 2}
    own, provoked = pairs
    assert own["prefix_ids"] == base[0]["prompt_ids"]
    assert own["chosen"] == good
    assert own["rejected"].endswith("I cannot help.")
    assert provoked["prefix"] == "A cure is asked. A cure protects."
    assert provoked["chosen"].startswith(" I can explain it.")
    assert provoked["rejected"] == " Stop." + SAFE
    assert provoked["source"] == "benign"


class Partial:
    """A judge for whom every answer is partial."""

    def ask(self, question, items):
        return iter(["partial" if question == "compliance" else 1 for _ in items])


def test_a_partial_answer_is_neither_an_answer_nor_a_refusal(tokenizer, tmp_path):
    answer = trace_of(tokenizer, "A cure is asked. I can explain it.\n</think>\n\nSome.", "a#0")
    assert intervene.complied(Partial(), [answer]) == [False]
    assert intervene.own_refusals([answer], [answer], Partial()) == []
    sampler = FakeSampler(tokenizer, SAFE)
    tried = intervene.provoked_refusals(tmp_path / "r.jsonl", [answer], ["Stop."], sampler, Partial())
    assert tried == (1, [])


@pytest.mark.parametrize("steps, verdicts", [([], [{"id": "a#0"}]), ([{"id": "a#0"}], [])])
def test_a_trace_without_steps_or_verdict_is_named(tokenizer, steps, verdicts):
    with pytest.raises(InputError, match="a#0: a trace without steps or without a verdict"):
        intervene.judged_traces([trace_of(tokenizer, SAFE, "a#0")], steps, verdicts)


# ------------------------------------------------------------------------------------ command line

@pytest.mark.parametrize("flags, problem", [
    ("--top-p 0", "--top-p must be above 0 and at most 1"),
    ("--top-p 1.1", "--top-p must be"),
    ("--top-p nan", "--top-p must be"),
    ("--temperature -1", "--temperature must be at least 0"),
    ("--temperature nan", "--temperature must be at least 0"),
    ("--max-new-tokens 0", "--max-new-tokens must be at least 1"),
    ("--samples 0", "--samples must be at least 1"),
    ("--limit -1", "--limit must be at least 0"),
])
def test_flags_that_sample_nothing_are_refused(tmp_path, flags, problem):
    out = tmp_path / "r.jsonl"
    prompts = ROOT / "toy" / "prompts" / "train_harmful.jsonl"
    with pytest.raises(InputError, match=problem):
        intervene.main(["rollouts", "--model", str(ROOT / "toy" / "model"), *flags.split(),
                        "--prompts", str(prompts), "--out", str(out)])
    assert not out.exists()


def test_malformed_input_of_a_stage(tmp_path):
    traces = tmp_path / "t.jsonl"
    traces.write_text('{"id": "a", "reasoning": "x"}\n{"id": \n')
    out = tmp_path / "s.jsonl"
    with pytest.raises(InputError, match=r"t\.jsonl, line 2: not valid JSON"):
        intervene.main(["steps", "--traces", str(traces), "--out", str(out)])
    assert not out.exists()


def test_stages_that_do_not_sample_start_without_torch(tmp_path):
    traces = tmp_path / "t.jsonl"
    traces.write_text('{"id": "a", "prompt": "p", "reasoning": "x", "truncated": true}\n')
    steps = tmp_path / "s.jsonl"
    program = f"""
import sys
import intervene
intervene.build_parser().format_help()
intervene.main(["steps", "--traces", {str(traces)!r}, "--out", {str(steps)!r}])
intervene.main(["judge", "--traces", {str(traces)!r}, "--steps", {str(steps)!r},
                "--out", {str(tmp_path / "v.jsonl")!r}])
print([name for name in ("torch", "transformers", "requests") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
