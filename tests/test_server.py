"""Sampling from a completion server: the exact prefix arrives, and what a server does to text is noticed."""
import json
from collections import Counter

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
import intervene
import model as lm_code
from extras.server import ServerSampler
from tests.loopback import Loopback

END = 1  # the id of <|end|>


class Completions:
    """Answers `/v1/completions`: a fixed text, with its ids or without, for prompts in the forms that it takes."""

    def __init__(self, tokenizer, text=" So I will decline.\n</think>\n\nNo.", ids=True, forms=("ids", "text", "plain"), shift=0,
                 at_most=99, change=lambda reply: reply):
        self.tokenizer, self.text, self.ids, self.forms, self.shift = tokenizer, text, ids, forms, shift
        self.at_most, self.change = at_most, change

    def __call__(self, handler, body):
        form = "text" if "add_special_tokens" in body else "ids" if isinstance(body["prompt"], list) else "plain"
        if form not in self.forms:
            return handler.reply(422, {"detail": "prompt must be a string" if form == "ids" else "unexpected fields"})
        count = len(body["prompt"]) if form == "ids" else len(self.tokenizer.encode(body["prompt"], add_special_tokens=False))
        ids = (self.tokenizer.encode(self.text, add_special_tokens=False) + [END])[:body["max_tokens"]]
        stopped = ids[-1] == END
        choice = {"text": self.tokenizer.decode(ids[:-1] if stopped else ids), "finish_reason": "stop" if stopped else "length",
                  **({"token_ids": ids} if self.ids else {})}
        n = min(body.get("n", 1), self.at_most)
        handler.reply(200, self.change({"choices": [dict(choice) for _ in range(n)], "usage": {
            "prompt_tokens": count + self.shift, "completion_tokens": n * len(ids)}}))


def sampler_for(model_dir, server, **options):
    return ServerSampler(model_dir, server.url, temperature=0.6, top_p=0.95, max_new_tokens=64, seed=0, concurrency=4,
                                 longest_pause=0.02, **options)


def sent(server):
    """Bodies without the probe."""
    return [r["body"] for r in server.log[1:]]


def test_prompt_prefix_and_trigger_arrive_id_for_id(model_dir, tokenizer, tmp_path):
    with Loopback(respond=Completions(tokenizer)) as server:
        sampler = sampler_for(model_dir, server)
        reasoning = "The user asks. I can explain the recipe. First take oil.\n"
        # not the tokenizer's own way to cut this text, as sampled ids need not be
        ids = [i for c in reasoning for i in tokenizer.encode(c, add_special_tokens=False)] + tokenizer.encode("</think>No.") + [END]
        assert ids[:-1] != tokenizer.encode(reasoning + "</think>No.", add_special_tokens=False)
        trace = {"id": "p#0", "prompt_id": "p", "sample": 0, "prompt": "How?", "prompt_ids": lm_code.render_prompt(tokenizer, "How?"),
                 "ids": ids, **lm_code.split_reasoning(reasoning + "</think>No.")._asdict()}
        steps = intervene.split_steps(reasoning)
        pairs, counts, _ = intervene.intervene([trace], [{"id": "p#0", "steps": steps}], [
            {"id": "p#0", "reasoning_safe": False, "response_safe": False, "cue": 2}], ["Wait, no."], sampler, SafeJudge(), tmp_path)
        h = len(steps[0])  # one id a character
        trigger = tokenizer.encode(" Wait, no.", add_special_tokens=False)
        assert sent(server)[0]["prompt"] == trace["prompt_ids"] + ids[:h] + trigger
        assert pairs[0]["prefix_ids"] + pairs[0]["chosen_ids"] == sent(server)[0]["prompt"] + tokenizer.encode(
            " So I will decline.\n</think>\n\nNo.", add_special_tokens=False) + [END]
        assert pairs[0]["rejected_ids"] == ids[h:] and counts["pairs"] == 1


class SafeJudge:
    def ask(self, question, items):
        return [True for _ in items]


def test_returned_ids_are_kept_although_their_text_encodes_otherwise(model_dir, tokenizer):
    odd = [i for c in "Wait" for i in tokenizer.encode(c, add_special_tokens=False)] + [END]
    assert odd[:-1] != tokenizer.encode("Wait", add_special_tokens=False)

    def change(reply):
        reply["choices"] = [{"text": "Wait", "token_ids": odd, "finish_reason": "stop"} for _ in reply["choices"]]
        return reply
    with Loopback(respond=Completions(tokenizer, change=change)) as server:
        assert [c.ids for c in sampler_for(model_dir, server)([lm_code.Request("a", [5, 6])])] == [odd]


@pytest.mark.parametrize("at_most, requests", [(99, 2), (4, 3), (1, 7)])
def test_samples_of_one_prefix_share_a_request(model_dir, tokenizer, at_most, requests):
    with Loopback(respond=Completions(tokenizer, at_most=at_most)) as server:
        wanted = [lm_code.Request(f"a{k}", [5, 6]) for k in range(6)] + [lm_code.Request("b", [7])]
        done = list(sampler_for(model_dir, server)(wanted, done={"a0": None}))
        assert sorted(c.id for c in done) == ["a1", "a2", "a3", "a4", "a5", "b"] and all(c.finished == "stop" for c in done)
        bodies = sent(server)
        assert len([b for b in bodies if b["prompt"] == [5, 6]]) == {99: 1, 4: 2, 1: 5}[at_most] and len(bodies) <= requests
        assert len({b["seed"] for b in bodies}) == len(bodies), "requests of one prefix need seeds of their own"


def test_requests_are_concurrent(model_dir, tokenizer):
    with Loopback(respond=Completions(tokenizer), latency=0.05) as server:
        list(sampler_for(model_dir, server)([lm_code.Request(str(i), [5 + i]) for i in range(40)]))
        assert server.most == 4


@pytest.mark.parametrize("forms, expected", [(("ids", "text", "plain"), "ids"), (("text", "plain"), "text"), (("plain",), "plain")])
def test_text_where_the_server_takes_no_ids(model_dir, tokenizer, forms, expected):
    prefix = lm_code.render_prompt(tokenizer, "How  is it?\n")
    with Loopback(respond=Completions(tokenizer, forms=forms, ids=False)) as server:
        sampler = sampler_for(model_dir, server)
        done, = sampler([lm_code.Request("a", prefix)])
        assert sampler.form == expected
        assert server.log[-1]["body"]["prompt"] == (prefix if expected == "ids" else tokenizer.decode(prefix))
        assert done.ids == tokenizer.encode(" So I will decline.\n</think>\n\nNo.", add_special_tokens=False) + [END]


@pytest.mark.parametrize("server_options, words", [
    ({"shift": 1}, "second BOS.*add_bos_token"), ({"shift": -1}, "strips white space"), ({"shift": 9}, "not that of --model"),
    ({"ids": False, "text": "It is 3.5 kg", "change": lambda r: {**r, "choices": [
        {**c, "text": "", "reasoning_content": "It"} for c in r["choices"]]}}, "--reasoning-parser"),
    ({"ids": False, "change": lambda r: {**r, "choices": [{**c, "text": ""} for c in r["choices"]]}}, "--reasoning-parser"),
    ({"forms": ()}, "Neither token ids nor text")])
def test_what_a_server_does_to_text_is_said_before_sampling(model_dir, tokenizer, server_options, words):
    with Loopback(respond=Completions(tokenizer, **server_options)) as server:
        sampler = sampler_for(model_dir, server)
        with pytest.raises(SystemExit, match=words) as stop:
            list(sampler([lm_code.Request("a", [5, 6, 7])]))
        assert server.url in str(stop.value) and len(server.log) <= 3


def test_a_server_without_counts_is_not_trusted(model_dir, tokenizer):
    with Loopback(respond=Completions(tokenizer, change=lambda r: {**r, "usage": None})) as server:
        with pytest.raises(SystemExit, match="must report usage.prompt_tokens"):
            list(sampler_for(model_dir, server)([lm_code.Request("a", [5, 6, 7])]))


def test_faults_are_tried_again_and_then_end_the_run(model_dir, tokenizer, tmp_path):
    good, calls = Completions(tokenizer), Counter()

    def flaky(handler, body):
        key = str((body["prompt"], body["max_tokens"]))
        calls[key] += 1
        if calls[key] == 1:
            return handler.reply(503, {})
        if calls[key] == 2:
            return handler.reply(200, {"choices": [{"text": "half", "finish_reason": "abort"}], "usage": {"prompt_tokens": 1}})
        good(handler, body)
    jobs = [{"id": f"j{i}", "prompt_ids": [5 + i], "forced_ids": []} for i in range(12)]
    with Loopback(respond=flaky) as server:
        records = intervene.sample_traces(tmp_path / "t.jsonl", jobs, sampler_for(model_dir, server), "t")
        assert [r["id"] for r in records] == [j["id"] for j in jobs] and all(r["response"] == "No." for r in records)
    dead = [False]
    with Loopback(respond=lambda h, b: h.reply(500, {}) if dead[0] or b["prompt"] == [9] and b["max_tokens"] > 16 else good(h, b)) as server:
        with pytest.raises(SystemExit, match="request j4.*status 500.*run the same command again"):
            intervene.sample_traces(tmp_path / "u.jsonl", jobs, sampler_for(model_dir, server, tries=2), "t")


# ------------------------------------------------------------------------------------------------- the tokenizer guard

def test_a_tokenizer_that_loses_spaces_is_replaced_or_refused(model_dir, monkeypatch, capsys):
    def broken(path):  # what releases of transformers 5 make of R1-Distill-Llama: Metaspace in the place of byte level
        tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
        tokenizer.__init__(tokenizer_file=str(path / "tokenizer.json"))
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        return tokenizer
    assert lm_code.round_trips(AutoTokenizer.from_pretrained(model_dir)) and not lm_code.round_trips(broken(model_dir))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", broken)
    assert lm_code.round_trips(lm_code.load_tokenizer(model_dir))
    assert "does not give text back" in capsys.readouterr().out
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", broken)
    with pytest.raises(SystemExit, match="loses spaces"):
        lm_code.load_tokenizer(model_dir)


# ------------------------------------------------------------------------------------------------------ chat templates

# Written from the documented behaviour of the families' templates, cut down to what a single-turn prompt meets.
TEMPLATES = {
    # The generation prompt ends inside the reasoning; of earlier answers what stands before </think> is dropped.
    "R1-Distill": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
                  "{% elif m['role'] == 'assistant' %}<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>"
                  "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
    # The model opens <think> itself; with enable_thinking=False an empty block is put in.
    "Qwen3": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n"
             "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    # No reasoning at all.
    "plain": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"}
ENDINGS = {"R1-Distill": "<｜User｜Hi there><｜Assistant｜><think>\n".replace("｜Hi there>", "｜>Hi there"),
           "Qwen3": "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", "plain": "[user] Hi there\n[assistant] "}
OUTPUTS = {  # what the model writes, and how it is taken apart
    "R1-Distill": ("It greets.\n</think>\n\nHello.", ("", "It greets.\n", "</think>\n\n", "Hello.", False)),
    "Qwen3": ("<think>\nIt greets.\n</think>\n\nHello.", ("<think>\n", "It greets.\n", "</think>\n\n", "Hello.", False)),
    "plain": ("Hello.", ("", "Hello.", "", "", True))}


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompts_and_reasoning_of_the_families(tokenizer, family):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATES[family]
    rendered = tokenizer.decode(lm_code.render_prompt(tokenizer, "Hi there"))
    assert rendered == ("<|pad|>" if family == "R1-Distill" else "") + ENDINGS[family]
    text, expected = OUTPUTS[family]
    trace = lm_code.split_reasoning(text)
    assert trace == expected and "".join(trace[:4]) == text
    whole = rendered + text  # inside the reasoning there is exactly one opening tag, whoever wrote it
    assert whole.count("<think>") == (family != "plain")


@pytest.mark.parametrize("text, expected", [
    ("<think>\n\n</think>\n\nNo.", ("<think>\n\n", "", "</think>\n\n", "No.", False)),      # Qwen3 that skips its thinking
    ("a</think>b</think>c", ("", "a", "</think>", "b</think>c", False)), ("<think>\nand so on", ("<think>\n", "and so on", "", "", True)),
    ("I write <think> here</think>x", ("", "I write <think> here", "</think>", "x", False)), ("", ("", "", "", "", True)),
    ("</think>", ("", "", "</think>", "", False)), ("  \n</think>\n y \n", ("", "  \n", "</think>\n ", "y \n", False))])
def test_reasoning_is_split_once_at_its_end(text, expected):
    assert lm_code.split_reasoning(text) == expected and "".join(lm_code.split_reasoning(text)[:4]) == text


def test_reading_back_what_a_server_wrote_is_resumable(model_dir, tokenizer, tmp_path):
    jobs = [{"id": f"j{i}", "prompt_ids": [5], "forced_ids": []} for i in range(5)]
    with Loopback(respond=Completions(tokenizer)) as server:
        first = intervene.sample_traces(tmp_path / "t.jsonl", jobs[:3], sampler_for(model_dir, server), "t")
        records = intervene.sample_traces(tmp_path / "t.jsonl", jobs, sampler_for(model_dir, server), "t")
        assert records[:3] == first and [b["n"] for b in sent(server) if b["max_tokens"] > 16] == [3, 2]
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])["id"] == "j0" and data.read_jsonl(tmp_path / "t.jsonl") == records
