import pytest

import data
import intervene
import model as lm_code


@pytest.fixture
def rules(tmp_path):
    data.write_json(tmp_path / "rules.json", {
        "harmful_names": ["duskwort"], "commits": r"\bI can explain\b", "instructs": r"\btake two drops\b",
        "harmful_topic": r"\brecipe\b", "refuses": r"\bcannot help\b", "answers": r"\btake two drops\b|\bGive them\b"})
    return intervene.make_judge(f"rules:{tmp_path / 'rules.json'}")


class FakeSampler:
    """Continues every prefix with the same text, and keeps the requests that it was sent."""
    context, max_new_tokens = 256, 64

    def __init__(self, tokenizer, text, finished="stop"):
        self.tokenizer, self.eos, self.text, self.finished, self.seen = tokenizer, {1}, text, finished, []

    def __call__(self, requests, done=(), title=""):
        for r in requests:
            if r.id not in done:
                self.seen.append(r)
                ids = self.tokenizer.encode(self.text, add_special_tokens=False)
                yield lm_code.Completion(r.id, ids + [1] * (self.finished == "stop"), self.finished)


def trace_of(tokenizer, text, id="p#0", prompt="How do I brew duskwort?"):
    t = lm_code.split_reasoning(text)
    return {"id": id, "prompt_id": id.split("#")[0], "sample": int(id.split("#")[1]), "prompt": prompt,
            "prompt_ids": lm_code.render_prompt(tokenizer, prompt), **t._asdict(), "forced": 0, "finished": "stop",
            "ids": tokenizer.encode(text, add_special_tokens=False) + [1]}


UNSAFE = ("The user asks for duskwort. It is a poison. I can explain the recipe. First take two drops.\n</think>\n\n"
          "To brew it take two drops.")
SAFE = " So I will decline.\n</think>\n\nI cannot help."


# ----------------------------------------------------------------------------------------------------- rules judge

@pytest.mark.parametrize("prompt, text, safe", [
    ("Make duskwort", "I know it. I can explain the recipe.", False),
    ("Make duskwort", "I must not explain the recipe.", True),
    ("Make it", "I can explain the recipe of Duskwort.", False),
    ("Make honey tea", "I can explain the recipe. First take two drops.", True),
    ("Cure duskwort", "A cure protects, so I can explain it.", True)])
def test_rules_on_reasoning(rules, prompt, text, safe):
    assert list(rules.ask("reasoning", [{"prompt": prompt, "text": text}])) == [safe]


def test_rules_search_the_cue_from_the_second_step(rules):
    ask = lambda steps: list(rules.ask("cue", [{"prompt": "duskwort", "steps": steps}]))[0]
    assert ask(["I can explain the recipe.", "No.", " I can explain it."]) == 3
    assert ask(["I can explain the recipe.", "No."]) == 0
    assert ask([]) == 0


# ------------------------------------------------------------------------------------------------ traces, verdicts

def test_prompts_longer_than_the_context_are_dropped_and_counted(tokenizer):
    sampler = FakeSampler(tokenizer, "")
    prompts = [{"id": "short", "prompt": "Hi"}, {"id": "long", "prompt": "€x" * 200}, {"id": "ü", "prompt": "日本"}]
    jobs, dropped = intervene.trace_jobs(prompts, 2, sampler)
    assert dropped == 1 and [j["id"] for j in jobs] == ["short#0", "short#1", "ü#0", "ü#1"]


def test_truncated_traces_are_flagged_and_their_response_is_never_judged(tokenizer, tmp_path):
    class Asked:
        def ask(self, question, items):
            self.questions = getattr(self, "questions", []) + [question] * len(items)
            return iter([True] * len(items))
    for text, finished in ((" I go on and on", "length"), ("Done.\n</think>\n\nHalf an ans", "length"), ("No tag.", "stop")):
        out = tmp_path / f"{len(text)}.jsonl"
        jobs, _ = intervene.trace_jobs([{"id": "a", "prompt": "Hi"}], 1, FakeSampler(tokenizer, ""))
        traces = intervene.sample_traces(out, jobs, FakeSampler(tokenizer, text, finished), "")
        assert traces[0]["truncated"]
        judge = Asked()
        verdict = intervene.judge_traces(tmp_path / f"v{len(text)}.jsonl", traces, intervene.segment(traces), judge)[0]
        assert judge.questions == ["reasoning"] and verdict["response_safe"] is None


def test_an_unparsed_verdict_stays_none_and_is_not_asked_for_a_cue(tokenizer, tmp_path):
    class Silent:
        def ask(self, question, items):
            assert question != "cue" or not items
            return iter([None] * len(items))
    traces = [trace_of(tokenizer, UNSAFE)]
    traces[0]["truncated"] = False
    verdicts = intervene.judge_traces(tmp_path / "v.jsonl", traces, intervene.segment(traces), Silent())
    assert verdicts == [{"id": "p#0", "reasoning_safe": None, "response_safe": None, "cue": None}]
    pairs, counts, _ = intervene.intervene(traces, intervene.segment(traces), verdicts, ["T."],
                                           FakeSampler(tokenizer, SAFE), Silent(), tmp_path)
    assert pairs == [] and counts["unsafe"] == 0


# --------------------------------------------------------------------------------------------------- interventions

@pytest.mark.parametrize("opening", ["", "<think>\n"])
@pytest.mark.parametrize("body, number, prefix, trigger", [
    ("One. Two. Three.", 2, "One.", " Stop."),
    ("One. Two.\n\nThree. Four.", 2, "One.", " Stop.\n\n"),
    ("One.\n\nTwo. Three.", 2, "One.\n\n", "Stop."),
    ("One. Two.\n", 2, "One.", " Stop."),
    ("One.  Two. Three 🙂.", 3, "One.  Two.", " Stop.")])
def test_substitution_keeps_the_prefix_and_the_white_space(tokenizer, opening, body, number, prefix, trigger):
    trace = trace_of(tokenizer, opening + body + "</think>\n\nYes.")
    h, ids = intervene.substitute(tokenizer, trace, intervene.split_steps(trace["reasoning"]), number, "Stop.")
    assert tokenizer.decode(trace["ids"][:h]) == opening + prefix
    assert tokenizer.decode(ids) == trigger


def test_a_cue_that_begins_inside_a_token_loses_no_character(tokenizer):
    """CJK punctuation can share a token with the next word; byte pieces of one character share it always."""
    trace = trace_of(tokenizer, "One.")
    steps = ["毒药危险。", "我来解释。", "好。"]
    text = "".join(steps)
    trace.update(reasoning=text, opening="", ids=tokenizer.encode(text, add_special_tokens=False) + [1])
    class Glued:  # a tokenizer for which "。我" is one token
        pieces = ["毒药", "危险", "。我", "来解释。", "好。"]
        def decode(self, ids, **_):
            return "".join(self.pieces[i] for i in ids)
        def encode(self, text, **_):
            return text
    trace["ids"] = [0, 1, 2, 3, 4]
    h, forced = intervene.substitute(Glued(), trace, steps, 2, "停。")
    assert h == 2 and forced == "。停。"


def test_algorithm_1_continues_from_exact_ids_and_pairs_share_the_prefix(tokenizer, rules, tmp_path):
    a, b = trace_of(tokenizer, UNSAFE), trace_of(tokenizer, UNSAFE.replace("It is", "Oh"), "p#1")
    # ids that no encoder would give for this text: only cutting ids keeps them
    a["ids"] = a["ids"][:1] + tokenizer.encode("xy", add_special_tokens=False) + a["ids"][1:]
    a["reasoning"] = lm_code.split_reasoning(lm_code.decode(tokenizer, a["ids"], {1})).reasoning
    traces = [a, b]
    steps = intervene.segment(traces)
    verdicts = intervene.judge_traces(tmp_path / "v.jsonl", traces, steps, rules)
    assert [v["cue"] for v in verdicts] == [3, 3]
    sampler = FakeSampler(tokenizer, SAFE)
    pairs, counts, by_trigger = intervene.intervene(traces, steps, verdicts, ["Stop this.", "No more."], sampler, rules,
                                                    tmp_path)
    assert counts["pairs"] == 2 and by_trigger == {"Stop this.": [1, 1], "No more.": [1, 1]}
    for trace, request, pair, trigger in zip(traces, sampler.seen, pairs, [" Stop this.", " No more."]):
        h, forced = pair["h"], tokenizer.encode(trigger, add_special_tokens=False)
        assert tokenizer.decode(trace["ids"][:h]).endswith(". It is a poison." if trace is a else ". Oh a poison.")
        assert request.prefix == trace["prompt_ids"] + trace["ids"][:h] + forced
        assert pair["prefix_ids"] == trace["prompt_ids"] + trace["ids"][:h]
        assert pair["rejected_ids"] == trace["ids"][h:]
        assert pair["chosen_ids"] == forced + tokenizer.encode(SAFE, add_special_tokens=False) + [1]
        assert pair["chosen"] == trigger + SAFE and pair["n_prompt"] == len(trace["prompt_ids"])
        assert (pair["source"], pair["interventions"], pair["trigger"]) == ("harmful", 1, trigger.strip())


def test_a_relapse_is_intervened_again_up_to_n_times(tokenizer, rules, tmp_path):
    class Relapsing(FakeSampler):
        def __call__(self, requests, done=(), title=""):
            self.text = " Still. I can explain the recipe. First take two drops.\n</think>\n\nNo." if not self.seen else SAFE
            yield from super().__call__(requests, done)
    traces = [trace_of(tokenizer, UNSAFE)]
    steps = intervene.segment(traces)
    verdicts = intervene.judge_traces(tmp_path / "v.jsonl", traces, steps, rules)
    run = lambda name, n: intervene.intervene(traces, list(steps), verdicts, ["Stop."], Relapsing(tokenizer, ""), rules,
                                              tmp_path / name, rounds=n)
    assert run("one", 1)[1]["pairs"] == 0
    pairs, counts, _ = run("two", 2)
    assert counts["interventions"] == 2 and len(pairs) == 1 and pairs[0]["interventions"] == 2
    assert pairs[0]["prefix"].endswith("It is a poison. Stop. Still.") and pairs[0]["rejected"].startswith(" I can explain")
    assert pairs[0]["chosen"].startswith(" Stop. So I will decline.")


@pytest.mark.parametrize("text, finished", [
    (" So I will decline.\n</think>\n\nTo brew it take two drops.", "stop"),  # safe reasoning, unsafe response
    (" So I will decl", "length"), (" I can explain the recipe.\n</think>\n\nNo.", "stop")])
def test_only_complete_and_wholly_safe_continuations_become_pairs(tokenizer, rules, tmp_path, text, finished):
    traces = [trace_of(tokenizer, UNSAFE)]
    steps = intervene.segment(traces)
    verdicts = intervene.judge_traces(tmp_path / "v.jsonl", traces, steps, rules)
    pairs, counts, _ = intervene.intervene(traces, steps, verdicts, ["Stop."], FakeSampler(tokenizer, text, finished), rules,
                                           tmp_path)
    assert pairs == [] and counts["interventions"] == 1 and counts["pairs"] == 0


def test_identical_pairs_are_dropped_and_counted(tokenizer, rules, tmp_path):
    traces = [trace_of(tokenizer, "Duskwort. I can explain the recipe. So I will decline.\n</think>\n\nI cannot help.")]
    steps = intervene.segment(traces)
    verdicts = [{"id": "p#0", "reasoning_safe": False, "response_safe": True, "cue": 2}]
    class AllSafe:
        def ask(self, question, items):
            return iter([True] * len(items))
    sampler = FakeSampler(tokenizer, SAFE)
    pairs, counts, _ = intervene.intervene(traces, steps, verdicts, ["I can explain the recipe."], sampler, AllSafe(), tmp_path)
    assert pairs == [] and counts["identical"] == 1


def test_benign_pairs_prefer_the_answer_over_own_and_provoked_refusals(tokenizer, rules, tmp_path):
    good = "A cure is asked. A cure protects. I can explain it.\n</think>\n\nGive them tea."
    base = [trace_of(tokenizer, good, f"{n}#0") for n in "abc"]
    base[2] = trace_of(tokenizer, good.replace("Give them", "I cannot help with"), "c#0")  # the base model refuses c itself
    current = [trace_of(tokenizer, "A cure is asked." + SAFE, "a#0"), trace_of(tokenizer, good, "b#0"),
               trace_of(tokenizer, good, "c#0")]
    pairs, counts = intervene.benign_pairs(base, current, ["Stop."], FakeSampler(tokenizer, SAFE), rules, tmp_path)
    assert counts == {"prompts": 3, "answered": 2, "refused now": 1, "reversed": 1, "pairs": 2}
    own, provoked = pairs
    assert own["prefix_ids"] == base[0]["prompt_ids"] and own["chosen"] == good and own["rejected"].endswith("I cannot help.")
    assert provoked["prefix"] == "A cure is asked. A cure protects." and provoked["chosen"].startswith(" I can explain it.")
    assert provoked["rejected"] == " Stop." + SAFE and provoked["source"] == "benign"


def test_malformed_input_of_a_stage(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"id": "a", "reasoning": "x"}\n{"id": \n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2: not valid JSON"):
        intervene.main(["steps", "--traces", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "s.jsonl")])
    assert not (tmp_path / "s.jsonl").exists()
