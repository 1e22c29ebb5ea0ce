"""Sampling from a server: the exact prefix arrives, and what the server does to text is noticed."""
import copy
import hashlib
import json
from collections import Counter

import pytest

import intervene
from data import render_prompt, split_reasoning
from model import Request, context_length, eos_ids, load_tokenizer
from support.errors import InputError, ServiceError
from support.files import read_jsonl
from support.record import deciding_flags
from support.server import ServerSampler, Shares, closing_token
from tests.loopback import Loopback

END = 1  # the id of <|end|>
CONTINUATION = " So I will decline.\n</think>\n\nNo."


class Completions:
    """Answers /v1/completions: a fixed text, with its ids or without, in forms that it takes."""

    def __init__(
        self,
        tokenizer,
        text=CONTINUATION,
        ids=True,
        forms=("ids", "text", "plain"),
        shift=0,
        at_most=99,
        change=lambda reply: reply,
    ):
        self.tokenizer = tokenizer
        self.text = text
        self.ids = ids  # whether token ids come back
        self.forms = forms
        self.shift = shift  # what is added to the true count of prompt tokens
        self.at_most = at_most  # samples that one reply may hold
        self.change = change

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def __call__(self, handler, body):
        prompt = body["prompt"]
        form = "plain"
        if "add_special_tokens" in body:
            form = "text"
        elif isinstance(prompt, list):
            form = "ids"
        if form not in self.forms:
            detail = "prompt must be a string" if form == "ids" else "unexpected fields"
            handler.reply(422, {"detail": detail})
            return
        prompt_ids = prompt if form == "ids" else self.encode(prompt)
        ids = self.encode(self.text) + [END]
        ids = ids[:body["max_tokens"]]
        choice = {"text": self.tokenizer.decode(ids), "finish_reason": "length"}
        if ids[-1] == END:
            choice = {"text": self.tokenizer.decode(ids[:-1]), "finish_reason": "stop"}
        if self.ids:
            choice["token_ids"] = ids
        n = min(body.get("n", 1), self.at_most)
        usage = {
            "prompt_tokens": len(prompt_ids) + self.shift,
            "completion_tokens": n * len(ids),
        }
        reply = {"choices": [dict(choice) for _ in range(n)], "usage": usage}
        handler.reply(200, self.change(reply))


def sampler_for(model_dir, server, **http):
    tokenizer = load_tokenizer(model_dir)
    return ServerSampler(
        model_dir,
        server.url,
        tokenizer,
        eos_ids(model_dir, tokenizer),
        context_length(model_dir),
        temperature=0.6,
        top_p=0.95,
        max_new_tokens=64,
        seed=0,
        concurrency=4,
        longest_pause=0.02,
        **http,
    )


def sent(server):
    """Bodies without the probe."""
    return [r["body"] for r in server.log[1:]]


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def encode_each(tokenizer, text):
    """One id a character: not the tokenizer's way to cut this text, as sampled ids need not be."""
    ids = []
    for character in text:
        ids += encode(tokenizer, character)
    return ids


class SafeJudge:
    def ask(self, question, items):
        return [True for _ in items]


def test_prompt_prefix_and_trigger_arrive_id_for_id(model_dir, tokenizer, tmp_path):
    reasoning = "The user asks. I can explain the recipe. First take oil.\n"
    ids = encode_each(tokenizer, reasoning) + encode(tokenizer, "</think>No.") + [END]
    assert ids[:-1] != encode(tokenizer, reasoning + "</think>No.")
    trace = {
        "id": "p#0",
        "prompt_id": "p",
        "sample": 0,
        "prompt": "How?",
        "prompt_ids": render_prompt(tokenizer, "How?"),
        "ids": ids,
        "forced": 0,
        **split_reasoning(reasoning + "</think>No.")._asdict(),
    }
    verdict = {"id": "p#0", "reasoning_safe": False, "response_safe": False, "cue": 2}
    steps = intervene.split_steps(reasoning)
    with Loopback(respond=Completions(tokenizer)) as server:
        pairs, counts, _ = intervene.intervene(
            [trace],
            [{"id": "p#0", "steps": steps}],
            [verdict],
            ["Wait, no."],
            sampler_for(model_dir, server),
            SafeJudge(),
            tmp_path,
        )
    h = len(steps[0])  # one id a character
    prefix = trace["prompt_ids"] + ids[:h] + encode(tokenizer, " Wait, no.")
    assert sent(server)[0]["prompt"] == prefix
    pair = pairs[0]
    continuation = encode(tokenizer, CONTINUATION) + [END]
    assert pair["prefix_ids"] + pair["chosen_ids"] == prefix + continuation
    assert pair["rejected_ids"] == ids[h:]
    assert counts["pairs"] == 1


def test_returned_ids_are_kept_although_their_text_encodes_otherwise(model_dir, tokenizer):
    odd = encode_each(tokenizer, "Wait") + [END]
    assert odd[:-1] != encode(tokenizer, "Wait")

    def change(reply):
        choice = {"text": "Wait", "token_ids": odd, "finish_reason": "stop"}
        reply["choices"] = [choice for _ in reply["choices"]]
        return reply

    with Loopback(respond=Completions(tokenizer, change=change)) as server:
        sampler = sampler_for(model_dir, server)
        assert [ids for _, ids, _ in sampler([Request("a", [5, 6])])] == [odd]


@pytest.mark.parametrize("at_most, of_a, requests", [(99, 1, 2), (4, 2, 3), (1, 5, 7)])
def test_samples_of_one_prefix_share_a_request(model_dir, tokenizer, at_most, of_a, requests):
    wanted = [Request(f"a{k}", [5, 6]) for k in range(6)] + [Request("b", [7])]
    with Loopback(respond=Completions(tokenizer, at_most=at_most)) as server:
        sampler = sampler_for(model_dir, server)
        done = list(sampler(wanted, done={"a0": None}))
        assert sorted(name for name, _, _ in done) == ["a1", "a2", "a3", "a4", "a5", "b"]
        assert all(finished == "stop" for _, _, finished in done)
        bodies = sent(server)
        assert len([b for b in bodies if b["prompt"] == [5, 6]]) == of_a
        assert len(bodies) <= requests
        seeds = {b["seed"] for b in bodies}
        assert len(seeds) == len(bodies), "requests of one prefix need seeds of their own"


def test_seeds_depend_on_the_run_and_the_request_alone(model_dir, tokenizer):
    with Loopback(respond=Completions(tokenizer)) as server:
        list(sampler_for(model_dir, server)([Request("a", [5, 6])]))
        first_bytes = hashlib.sha256(b"0 a").digest()[:4]
        seed = int.from_bytes(first_bytes, "big") >> 1
        assert [r["body"]["seed"] for r in server.log] == [seed, seed]
        assert 0 <= seed < 2 ** 31


def test_requests_are_concurrent(model_dir, tokenizer):
    with Loopback(respond=Completions(tokenizer), latency=0.05) as server:
        list(sampler_for(model_dir, server)([Request(str(i), [5 + i]) for i in range(40)]))
        assert server.most == 4


def test_a_server_that_knows_no_n_is_asked_once_a_sample(model_dir, tokenizer):
    wanted = [Request(f"a{k}", [5, 6]) for k in range(3)]
    with Loopback(respond=Completions(tokenizer, forms=("plain",))) as server:
        done = list(sampler_for(model_dir, server)(wanted))
        assert sorted(name for name, _, _ in done) == ["a0", "a1", "a2"]
        samples = [r["body"] for r in server.log if r["body"]["max_tokens"] > 16]
        assert len(samples) == 3
        assert not [body for body in samples if "n" in body or "seed" in body]


def test_neighbours_are_sent_one_after_another(model_dir, tokenizer):
    prefixes = [[7, 1], [5, 2], [7, 1, 3], [5, 2, 9], [6]]
    wanted = [Request(str(prefix), prefix) for prefix in prefixes]
    with Loopback(respond=Completions(tokenizer)) as server:
        sampler = sampler_for(model_dir, server)
        sampler.concurrency = 1
        list(sampler(wanted))
        assert [body["prompt"] for body in sent(server)] == sorted(prefixes)


def test_several_servers_share_the_work(model_dir, tokenizer):
    respond = Completions(tokenizer)
    wanted = [Request(f"{i} {j}", [5 + i, j]) for i in range(4) for j in range(10)]
    with Loopback(respond=respond, latency=0.02) as one:
        with Loopback(respond=respond, latency=0.02) as other:
            both = copy.copy(one)
            both.url = f"{one.url}, {other.url}"
            sampler = sampler_for(model_dir, both)
            done = list(sampler(wanted))
            assert sorted(name for name, _, _ in done) == sorted(name for name, _ in wanted)
            for server in (one, other):
                probe = server.log[0]["body"]
                assert probe["max_tokens"] == 16 and server.most == 4
                assert 15 <= len(sent(server)) <= 25
            # Those that begin alike went to the same server, but for the last few.
            first = Counter(body["prompt"][0] for body in sent(one))
            assert first[5] >= 8 and first[8] <= 2


def test_one_of_several_servers_that_fails_ends_the_run(model_dir, tokenizer):
    def fail(handler, body):
        handler.reply(500, {})

    with Loopback(respond=Completions(tokenizer)) as one, Loopback(respond=fail) as other:
        both = copy.copy(one)
        both.url = f"{one.url},{other.url}"
        with pytest.raises(ServiceError, match=other.url):
            list(sampler_for(model_dir, both, tries=1)([Request("a", [5, 6])]))
        both.url = f"{one.url},"
        with pytest.raises(InputError, match="an address is missing"):
            sampler_for(model_dir, both)
        both.url = f"{one.url.replace('://', '://me:sesame@')},"
        with pytest.raises(InputError, match="an address is missing") as caught:
            sampler_for(model_dir, both)
        assert "sesame" not in str(caught.value)


def test_a_server_takes_over_from_the_largest_share_that_is_left():
    work = Shares(range(6), ["a", "b"])
    assert [work.take() for _ in range(3)] == [("a", 0), ("b", 3), ("a", 1)]
    work.give_back("a")
    work.give_back("a")
    assert [work.take() for _ in range(1)] == [("a", 2)]
    work.give_back("a")
    assert work.take() == ("a", 5)
    work.give_back("a")
    assert work.take() == ("a", 4)


@pytest.mark.parametrize("forms, expected", [
    (("ids", "text", "plain"), "ids"),
    (("text", "plain"), "text"),
    (("plain",), "plain"),
])
def test_text_where_the_server_takes_no_ids(model_dir, tokenizer, forms, expected):
    prefix = render_prompt(tokenizer, "How  is it?\n")
    with Loopback(respond=Completions(tokenizer, forms=forms, ids=False)) as server:
        sampler = sampler_for(model_dir, server)
        (_, ids, _), = sampler([Request("a", prefix)])
        assert list(sampler.form_of.values()) == [expected]
        prompt = prefix if expected == "ids" else tokenizer.decode(prefix)
        assert server.log[-1]["body"]["prompt"] == prompt
        assert ids == encode(tokenizer, CONTINUATION) + [END]


def test_each_of_several_servers_gets_the_form_that_was_probed_there(model_dir, tokenizer):
    """In the other's form, vLLM would put a BOS in front, and nobody would have counted it."""
    exact, plain = Completions(tokenizer), Completions(tokenizer, forms=("plain",), ids=False)
    with Loopback(respond=exact, latency=0.02) as one, Loopback(respond=plain) as other:
        both = copy.copy(one)
        both.url = f"{one.url},{other.url}"
        list(sampler_for(model_dir, both)([Request(str(i), [5, 6 + i]) for i in range(12)]))
        assert {type(body["prompt"]) for body in sent(one)} == {list}
        assert {type(r["body"]["prompt"]) for r in other.log[2:]} == {str}


CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Only what others say ends with <|turn|>; what the model says ends with <|text|>.
MIXED = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'user' %}<|turn|>{% else %}<|text|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template, own, end", [
    (CHATML, "<|text|>", "<|turn|>"),  # as Qwen3 and Llama 3, whose smallest id ends a document
    (MIXED, "<|turn|>", "<|text|>"),
    ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "<|turn|>", "<|turn|>"),
    ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "<|end|>", "<|text|>"),
])
def test_text_ends_with_the_token_that_ends_a_turn(tokenizer, template, own, end):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<|text|>", "<|turn|>"], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.eos_token = own
    eos = set(tokenizer.convert_tokens_to_ids(["<|text|>", "<|turn|>"]))
    assert closing_token(tokenizer, eos) == tokenizer.convert_tokens_to_ids(end)


# ----------------------------------------------------------------------------- what the probe finds

def without_text(reply):
    for choice in reply["choices"]:
        choice["text"] = ""
    return reply


def reasoning_apart(reply):
    for choice in reply["choices"]:
        choice["text"] = ""
        choice["reasoning_content"] = "It"
    return reply


@pytest.mark.parametrize("server_options, words", [
    ({"shift": 1}, "second BOS.*add_bos_token"),
    ({"shift": -1}, "strips white space"),
    ({"shift": 9}, "not that of --model"),
    ({"ids": False, "text": "It is 3.5 kg", "change": reasoning_apart}, "--reasoning-parser"),
    ({"ids": False, "change": without_text}, "--reasoning-parser"),
    ({"forms": ()}, "Neither token ids nor text"),
])
def test_what_a_server_does_to_text_is_said_before_sampling(
    model_dir, tokenizer, server_options, words
):
    with Loopback(respond=Completions(tokenizer, **server_options)) as server:
        sampler = sampler_for(model_dir, server)
        with pytest.raises(ServiceError, match=words) as stop:
            list(sampler([Request("a", [5, 6, 7])]))
        assert server.url in str(stop.value)
        assert len(server.log) <= 3


@pytest.mark.parametrize("opening, text, tokens, found", [
    ("", "It is", 1, True),  # EOS is no part of a text, so nothing is missing
    ("", "It is", 9, False),
    ("", "<think>\nIt is", 9, True),  # shorter than what was generated, but it starts as it should
    ("<think>\n", "It is", 9, True),
    ("<think>\n", "", 9, False),
])
def test_text_without_reasoning_is_noticed(model_dir, tokenizer, opening, text, tokens, found):
    def change(reply):
        for choice in reply["choices"]:
            choice["text"] = text
        reply["usage"]["completion_tokens"] = len(encode(tokenizer, text)) + tokens
        return reply

    wanted = [Request("a", encode(tokenizer, "How?" + opening))]
    with Loopback(respond=Completions(tokenizer, ids=False, change=change)) as server:
        sampler = sampler_for(model_dir, server)
        if found:
            assert len(list(sampler(wanted))) == 1
        else:
            with pytest.raises(ServiceError, match="--reasoning-parser"):
                list(sampler(wanted))


def test_a_server_without_counts_is_not_trusted(model_dir, tokenizer):
    def without_usage(reply):
        return {**reply, "usage": None}

    with Loopback(respond=Completions(tokenizer, change=without_usage)) as server:
        with pytest.raises(ServiceError, match="must report usage.prompt_tokens"):
            list(sampler_for(model_dir, server)([Request("a", [5, 6, 7])]))


# --------------------------------------------------------------------------------- faults, restarts

def make_jobs(prompts):
    jobs = []
    for i, prompt_ids in enumerate(prompts):
        jobs.append({"id": f"j{i}", "prompt_ids": prompt_ids, "forced_ids": []})
    return jobs


def test_faults_are_tried_again(model_dir, tokenizer, tmp_path):
    good = Completions(tokenizer)
    calls = Counter()

    def flaky(handler, body):
        key = str((body["prompt"], body["max_tokens"]))
        calls[key] += 1
        if calls[key] == 1:
            handler.reply(503, {})
        elif calls[key] == 2:
            choice = {"text": "half", "finish_reason": "abort"}
            handler.reply(200, {"choices": [choice], "usage": {"prompt_tokens": 1}})
        else:
            good(handler, body)

    jobs = make_jobs([5 + i] for i in range(12))
    with Loopback(respond=flaky) as server:
        sampler = sampler_for(model_dir, server)
        records = intervene.sample_traces(tmp_path / "t.jsonl", jobs, sampler, "t")
    assert [r["id"] for r in records] == [j["id"] for j in jobs]
    assert all(r["response"] == "No." for r in records)


def test_a_request_that_fails_for_good_ends_the_run(model_dir, tokenizer, tmp_path):
    good = Completions(tokenizer)

    def one_fails(handler, body):
        is_probe = body["max_tokens"] <= 16
        if body["prompt"] == [9] and not is_probe:
            handler.reply(500, {})
        else:
            good(handler, body)

    jobs = make_jobs([5 + i] for i in range(12))
    with Loopback(respond=one_fails) as server:
        sampler = sampler_for(model_dir, server, tries=2)
        words = "request j4.*status 500.*run the same command again"
        with pytest.raises(ServiceError, match=words):
            intervene.sample_traces(tmp_path / "u.jsonl", jobs, sampler, "t")


def test_reading_back_what_a_server_wrote_is_resumable(model_dir, tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    jobs = make_jobs([5] for _ in range(5))
    with Loopback(respond=Completions(tokenizer)) as server:
        first = intervene.sample_traces(path, jobs[:3], sampler_for(model_dir, server), "t")
        records = intervene.sample_traces(path, jobs, sampler_for(model_dir, server), "t")
        assert records[:3] == first
        assert [b["n"] for b in sent(server) if b["max_tokens"] > 16] == [3, 2]
    assert json.loads(path.read_text().splitlines()[0])["id"] == "j0"
    assert read_jsonl(path) == records


def test_a_server_at_another_address_may_go_on_with_more_in_flight():
    before = {"server": "http://one:8700/v1", "in_flight": 32, "batch_size": 16, "seed": 0}
    after = {**before, "server": "http://a/v1,http://b/v1", "in_flight": 64, "batch_size": "auto"}
    assert deciding_flags(before) == deciding_flags(after) == {"server": True, "seed": 0}
    assert deciding_flags({**before, "server": None}) != deciding_flags(before)
