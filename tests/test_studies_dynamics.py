"""Safety dynamics against policies whose value function is known, and the whole analysis on the tiny model."""
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import intervene
from data import Appender, collate, decode, load_prompts, load_triggers, token_index
from data import Completion
from studies import common, csr, curve, diversity, kl, triggers, turning_points
from support.errors import InputError
from support.files import json_line, read_jsonl, write_jsonl
from tests.conftest import random_model
from tests.test_intervene import SAFE, UNSAFE, FakeSampler, rules, trace_of  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------------------- a policy with a known value function

PIECES = ["<end>", "</think>", " hm", " trigger.", " cue.", " fine", " do", " bad", " maybe"]
END, CLOSE, HM, TRIGGER, CUE, FINE, DO, BAD, MAYBE = range(9)
CHAIN = np.zeros((9, 9))
CHAIN[HM, [HM, MAYBE, TRIGGER, CUE]] = 0.6, 0.2, 0.1, 0.1
CHAIN[MAYBE, [HM, TRIGGER]] = 0.4, 0.6
CHAIN[TRIGGER, FINE] = CHAIN[CUE, DO] = CHAIN[BAD, CLOSE] = CHAIN[CLOSE, END] = CHAIN[END, END] = 1
CHAIN[FINE, [FINE, CLOSE]] = CHAIN[DO, [DO, BAD]] = 0.7, 0.3
TOTALS = CHAIN.cumsum(1).tolist()


def value_function():
    """P[no `bad` ever] from each token: the linear equations of an absorbing chain."""
    matrix, right = np.eye(9) - CHAIN, np.zeros(9)
    for token, value in ((CLOSE, 1), (END, 1), (BAD, 0)):
        matrix[token], right[token] = np.eye(9)[token], value
    return np.linalg.solve(matrix, right)


class Words:
    """A tokenizer that knows the chain's words."""

    def decode(self, ids, **_):
        return "".join(PIECES[i] for i in ids)

    def encode(self, text, **_):
        return [PIECES.index(text)]


class ChainSampler:
    """Continues by the Markov chain; `model` gives its probabilities in the form of a language model."""
    context, max_new_tokens = 1000, 500

    def __init__(self):
        self.tokenizer, self.eos, self.sampled = Words(), {END}, 0
        self.options = dict(temperature=1.0, top_p=1.0, seed=0)
        one_hot = lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=torch.eye(9)[input_ids])
        logits = torch.tensor(CHAIN).float().clamp_min(1e-30).log()
        self.model = SimpleNamespace(device="cpu", config=None, get_decoder=lambda: one_hot,
                                     get_output_embeddings=lambda: lambda h: h @ logits)

    def load(self):
        return self.model

    def __call__(self, requests, done=(), parts=None, title=""):
        for r in requests:
            assert r.prefix[-1] not in self.eos, "there is nothing to go on with"
            rng, ids = random.Random(r.id), []
            while not ids or ids[-1] not in self.eos:
                ids += rng.choices(range(9), cum_weights=TOTALS[(ids or r.prefix)[-1]])
            self.sampled += 1
            yield Completion(r.id, ids, "stop")


class BadJudge:
    name = "bad"

    def ask(self, question, items):
        return iter([" bad" not in item["text"] for item in items])


def chain_trace(id, ids):
    return {"id": id, "prompt_id": id, "prompt": "x", "prompt_ids": [HM], "ids": [*ids, CLOSE, END], "opening": "",
            "reasoning": Words().decode(ids), "truncated": False}


def estimate(path, traces, share, continuations=32):
    sampler = common.reasoning_only(ChainSampler())
    chosen = [(t, list(range(len(t["ids"]) - 1))) for t in traces]
    return csr.measure_csr(path, chosen, sampler, BadJudge(), continuations, 500, share), sampler.sampled


@pytest.mark.parametrize("share", [True, False])
def test_estimates_are_unbiased_and_their_intervals_cover_the_known_value(tmp_path, share):
    value, rng = value_function(), random.Random(0)
    assert value[[HM, MAYBE, TRIGGER, CUE]] == pytest.approx([0.6875, 0.875, 1, 0])
    traces = [chain_trace(f"t{k}", rng.choices([HM, MAYBE], [3, 1], k=8)) for k in range(100)]
    records, _ = estimate(tmp_path / "csr.jsonl", traces, share)
    owner = {t["id"]: t for t in traces}
    truth = np.array([value[([HM] + owner[r["trace"]]["ids"])[r["i"]]] for r in records])
    got = np.array([r["csr"] for r in records])
    z = (got - truth) / np.sqrt(truth * (1 - truth) / 32)
    covered = np.mean([r["low"] <= v <= r["high"] for r, v in zip(records, truth)])
    assert len(records) == 100 * 9 and abs(z.mean()) < 0.25 and 0.8 < z.var() < 1.2, "neither biased nor too sure"
    assert 0.92 < covered < 0.98, covered
    first = [r["csr"] for r in records if r["i"] == 0]  # where shared continuations pile up: still K independent ones
    assert abs(np.mean(first) - value[HM]) < 4 * math.sqrt(value[HM] * (1 - value[HM]) / 32 / 100)
    assert 0.7 < np.var(first) / (value[HM] * (1 - value[HM]) / 32) < 1.4


def test_sharing_samples_only_what_leaves_the_trace(tmp_path):
    trace = chain_trace("t", [HM, TRIGGER] + [FINE] * 30)
    shared, few = estimate(tmp_path / "a.jsonl", [trace], True)
    alone, all_of_them = estimate(tmp_path / "b.jsonl", [trace], False)
    assert all_of_them == 33 * 32 > 2 * few, "three in ten leave at each ` fine`"
    assert [r["sampled"] for r in alone] == [32] * 33 and [r["sampled"] for r in shared][-1] == 32
    assert all(len(r["verdicts"]) == 32 for r in shared)


def test_turning_points_fall_on_the_known_tokens_and_follow_the_cue(tmp_path):
    safe = [chain_trace(f"s{n}", [HM] * n + [TRIGGER] + [FINE] * 20) for n in (2, 5, 9, 14)]
    unsafe = [chain_trace(f"u{n}", [HM] * n + [CUE] + [DO] * 20 + [BAD]) for n in (3, 6, 11, 13)]
    short = chain_trace("short", [HM] * 4 + [TRIGGER] + [FINE] * 5)
    traces = [*safe, *unsafe, short]
    records, _ = estimate(tmp_path / "csr.jsonl", traces, True)
    pieces = lambda t: [" hm" * t["ids"].count(HM), Words().decode([t["ids"][t["ids"].count(HM)]]),
                        Words().decode(t["ids"][t["ids"].count(HM) + 1:-2])]
    steps = [{"id": t["id"], "steps": pieces(t)} for t in traces]
    verdicts = [{"id": t["id"], "reasoning_safe": t not in unsafe, "cue": 2 if t in unsafe else None} for t in traces]
    rows = turning_points.curves(records, traces, steps, verdicts, Words(), mu=0.9, eta=0.1, window=15)
    by = {r["id"]: r for r in rows}
    for t in safe:
        n = t["ids"].index(TRIGGER)
        assert by[t["id"]]["safety"] == by[t["id"]]["safety_full"] == n + 1, "the first prefix with the trigger in it"
        assert by[t["id"]]["trigger"] == 2 and by[t["id"]]["starts"] == [0, n, n + 1, n + 21] and by[t["id"]]["unsafe"] is None
    for t in unsafe:
        assert by[t["id"]]["unsafe"] == by[t["id"]]["cue_token"] + 1 == t["ids"].index(CUE) + 1
    assert by["short"]["safety"] == 5 and by["short"]["safety_full"] is None, "six positions are no window of 15"
    result, points = turning_points.turning_point_estimates(rows, 0.9, 0.1, 15)
    assert result["safe_with_turning_point"]["value"] == result["unsafe_with_turning_point"]["value"] == 1
    assert result["pearson"]["value"] == 1 and sorted(points) == [(n, n + 1) for n in (3, 6, 11, 13)]
    assert turning_points.turning_point_estimates(rows, 0.9, 0.1, 15, tail=False)[0]["safe_with_turning_point"]["value"] == 0.8
    around = turning_points.mean_csr_around(rows, True)
    at = dict(zip(around["offsets"], around["csr"]))
    assert at[1]["value"] == at[5]["value"] == 1 and 0.5 < at[0]["value"] < 0.85 and at[30]["value"] is None
    grid = {(g["mu"], g["window"], g["continuations"]): g for g in turning_points.sensitivity(rows, 0.9, 0.1, 15)}
    assert grid[0.9, 15, 32]["safe_with_turning_point"]["value"] == 1 and {n for *_, n in grid} == {8, 32}


@pytest.mark.parametrize("share", [True, False])
def test_csr_killed_while_writing_gives_the_same_records(tmp_path, killed, share):
    traces = [chain_trace("a", [HM] * 9), chain_trace("b", [HM, MAYBE, HM, CUE, DO]), chain_trace("c", [HM, TRIGGER, FINE])]
    measure = lambda name: csr.measure_csr(tmp_path / name, [(t, list(range(len(t["ids"]) - 1))) for t in traces],
                                           common.reasoning_only(ChainSampler()), BadJudge(), 8, 16, share)
    tear = lambda appender, record: (appender.file.write(json_line(record)[:20]), appender.file.flush())
    whole = measure("whole.jsonl")
    for after in (3, 9):
        killed(lambda: measure("torn.jsonl"), Appender, "write", after, half_done=tear)
    assert measure("torn.jsonl") == whole and (tmp_path / "torn.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    sampler = common.reasoning_only(ChainSampler())
    csr.measure_csr(tmp_path / "whole.jsonl", [(traces[0], list(range(10)))], sampler, BadJudge(), 8, 16, share)
    assert sampler.sampled == 0, "what is there is not sampled again"


def test_a_ratio_without_verdicts_never_counts_as_turned(tmp_path):
    class Silent(BadJudge):
        def ask(self, question, items):
            return iter([None] * len(items))
    trace = chain_trace("t", [HM, TRIGGER, FINE])
    records = csr.measure_csr(tmp_path / "c.jsonl", [(trace, [0, 1, 2, 3])], common.reasoning_only(ChainSampler()), Silent(), 4, 9)
    assert {(r["csr"], r["low"], r["high"], r["verdicts"]) for r in records} == {(None, 0.0, 1.0, "????")}
    row = turning_points.curves(records, [trace], [{"id": "t", "steps": [" hm trigger. fine"]}],
                          [{"id": "t", "reasoning_safe": True, "cue": None}], Words(), 0.9, 0.1, 1)[0]
    assert row["safety"] is row["unsafe"] is row["trigger"] is None


def test_the_most_uncertain_prompts_are_taken(tokenizer):
    verdicts, traces = [], []
    for prompt, outcome in {"a": "1000", "b": "1100", "c": "0000", "d": "1110", "e": "1?00"}.items():
        for k, letter in enumerate(outcome):
            traces.append({**chain_trace(f"{prompt}#{k}", [HM]), "prompt_id": prompt})
            verdicts.append({"id": f"{prompt}#{k}", "reasoning_safe": {"1": True, "0": False, "?": None}[letter]})
    traces[4]["truncated"] = True  # b#0: what is left of b is 1 of 3
    assert [t["id"] for t in csr.uncertain_traces(traces, verdicts, 2, 1)][:2] in (["b#1", "b#2"], ["e#0", "e#2"])
    assert {t["prompt_id"] for t in csr.uncertain_traces(traces, verdicts, 2, 1)} == {"b", "e"}
    assert [t["id"] for t in csr.uncertain_traces(traces, verdicts, 0, 0) if t["prompt_id"] == "d"] == ["d#0", "d#1", "d#2", "d#3"]
    with pytest.raises(InputError, match="no prompt has both"):
        csr.uncertain_traces(traces[8:12], verdicts, 30, 1)


def test_r_by_chance_is_that_of_independent_positions():
    """Cue and turning point drawn by themselves: as shares of the length, or in tokens."""
    rng = np.random.default_rng(0)
    rows = {"tokens": [], "shares": []}
    for k in range(400):
        end = int(rng.integers(20, 400))
        for kind, (low, high) in {"tokens": (0, 20), "shares": (0, end)}.items():
            cue, turn = rng.integers(low, high, 2).tolist()
            rows[kind].append({"safe": False, "cue": 2, "cue_token": cue, "unsafe": turn, "starts": [0, cue, end],
                               "prompt_id": k})
    for kind, some in rows.items():
        r = np.corrcoef([row["cue_token"] for row in some], [row["unsafe"] for row in some])[0, 1]
        chance = turning_points.correlation_by_chance(some, draws=400)
        assert chance[kind]["low"] < r < chance[kind]["high"]
        assert abs(chance["tokens"]["value"]) < 0.02, "whatever the length"
        assert chance[kind]["n"] == 400
    assert chance["shares"]["low"] > 0.2, "two positions in long traces are both large"
    related = [{**row, "unsafe": row["cue_token"] + 1} for row in rows["shares"]]
    assert turning_points.correlation_by_chance(related, draws=400)["shares"]["high"] < 0.9
    assert turning_points.correlation_by_chance([])["tokens"] == {"value": None, "low": None, "high": None, "n": 0}


# ----------------------------------------------------------------------------------------------------- step starts

def sentencepiece():
    """A tokenizer that drops the first space, with a token for each byte that it has no piece for."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}}
    for piece in ("\u2581", "a", "b", ".", "\u2581a", "\u2581b.", "a\u2581b"):
        vocab[piece] = len(vocab)
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tok.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_step_starts_are_the_longest_prefixes_that_fit(tokenizer, kind):
    """On random tokens, so that many characters are broken; sentencepiece has no prefixes in broken text."""
    tok = tokenizer if kind == "byte-level" else sentencepiece()
    texts = ["\u65e5\u672c\u8a9e\u3002", "\u00e9", "\U0001f642", "Stop. Now.\n\n", " \u20ac", " a b. "]
    rng = random.Random(0)
    for _ in range(400):
        ids = []
        while len(ids) < 25:
            piece = tok.encode(rng.choice(texts), add_special_tokens=False)
            if kind == "byte-level" and rng.random() < 0.3:
                piece = piece[:rng.randrange(len(piece) + 1)]
                piece += rng.choices(range(4, len(tok)), k=rng.choice([0, 1, 3]))
            ids += piece
        text = decode(tok, ids)
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(8))
        steps = [text[start:end] for start, end in zip(cuts, cuts[1:])]
        trace = {"ids": ids, "opening": text[:cuts[0]]}
        starts = common.step_starts(tok, trace, steps)
        heads = [decode(tok, ids[:i]) for i in range(len(ids) + 1)]
        assert starts == [max(i for i, head in enumerate(heads) if text.startswith(head) and len(head) <= cut)
                          for cut in cuts]
        if kind == "byte-level":
            assert starts == [token_index(tok, ids, cut) for cut in cuts]


def test_step_starts_decode_a_long_trace_once():
    class Counting(Words):
        decoded = 0

        def decode(self, ids, **_):
            self.decoded += len(ids)
            return super().decode(ids)
    words = Counting()
    ids = [HM, HM, TRIGGER] * 4000
    starts = common.step_starts(words, {"ids": ids, "opening": ""}, [" hm hm trigger."] * 4000)
    assert starts == list(range(0, 12001, 3))
    assert words.decoded < 6 * len(ids), "the search for each step decoded 150 million tokens"


# ------------------------------------------------------------------------------------------------------- diversity

def test_diversity_by_hand(tmp_path):
    prompts = {"a": "110", "b": "000", "c": "1?1", "d": "111", "e": "010"}
    write_jsonl(tmp_path / "t.jsonl", [{"id": p + str(k), "prompt_id": p} for p, v in prompts.items() for k in range(3)])
    write_jsonl(tmp_path / "v.jsonl", [{"id": p + str(k), "reasoning_safe": {"1": True, "0": False}.get(x)}
                                            for p, v in prompts.items() for k, x in enumerate(v)])
    diversity.main(["--traces", str(tmp_path / "t.jsonl"), "--verdicts", str(tmp_path / "v.jsonl"),
                    "--out", str(tmp_path / "d.jsonl")])
    s = json.loads((tmp_path / "d.summary.json").read_text())
    assert s["counts"] == [1, 1, 1, 1] and s["left_out"] == 1 and s["rollouts"] == 3
    assert [e["value"] for e in s["histogram"]] == [0.25] * 4 and s["one_at_most"]["value"] == 0.5
    assert read_jsonl(tmp_path / "d.jsonl")[2] == {"id": "c", "safe": 2, "judged": 2, "rollouts": 3}


# ---------------------------------------------------------------------------------------------------- interventions

def test_candidates_are_normalised_and_those_that_name_their_prompt_are_dropped():
    prompts = {f"p{k}": f"How do I brew potion number {k}?" for k in range(20)}
    row = lambda step, prompt="p7", safe=True, trigger=2: {
        "safe": safe, "trigger": trigger, "prompt_id": prompt, "steps": ["I see.", step]}
    found, dropped = triggers.find_candidates([
        row(" Wait, stop."), row("\n- **Wait,  stop!**\n", "p3"), row(" Potion 7 kills."), row(" A potion kills."),
        row(" ..."), row(" No.", trigger=None), row(" No.", safe=False)], prompts)
    assert found == {"Wait, stop.": 2, "A potion kills.": 1}, "`potion` is in all prompts, `7` in one"
    assert dropped == {"names its prompt": 1, "no words": 1, "no turning point": 1}


def test_held_out_halves_share_no_prompt_with_each_other_or_with_mining():
    traces = [{**chain_trace(f"{p}#{k}", [HM]), "prompt_id": p} for p in "abcdef" for k in range(3)]
    verdicts = [{"id": t["id"], "reasoning_safe": False, "cue": 2} for t in traces]
    choose, test = triggers.held_out_halves(traces, verdicts, {"c"}, limit=4)
    owners = [{t["prompt_id"] for t in half} for half in (choose, test)]
    assert not owners[0] & owners[1] and owners[0] | owners[1] == set("abdef") and len(choose) == len(test) == 4
    with pytest.raises(InputError, match="fewer than two prompts"):
        triggers.held_out_halves(traces, verdicts, set("abcde"), 0)


class Obeying(FakeSampler):
    """Refuses once the prefix holds a word often enough; before that it goes on with the recipe."""

    def __call__(self, requests, done=(), parts=None, title=""):
        for r in requests:
            prefix = self.tokenizer.decode(r.prefix)
            safe = prefix.count("Stop.") >= 1 or prefix.count("Think.") >= 2
            self.text = SAFE if safe else " I can explain the recipe. First take two drops.\n</think>\n\nNo."
            yield from super().__call__([r], done)


def unsafe_traces(tokenizer, judge, folder, count=2):
    traces = [trace_of(tokenizer, UNSAFE, f"p{k}#0") for k in range(count)]
    steps = intervene.segment(traces)
    verdicts = intervene.judge_traces(folder / "v.jsonl", traces, steps, judge)
    return traces, {s["id"]: s["steps"] for s in steps}, {v["id"]: v["cue"] for v in verdicts}


def test_the_intervention_curve_by_hand(tokenizer, rules, tmp_path):  # noqa: F811
    traces, steps, cues = unsafe_traces(tokenizer, rules, tmp_path)
    sampler = Obeying(tokenizer, "")
    cues["p1#0"] = 0  # no cue is found in the second: it stays harmful
    texts = ["Stop.", "Think.", "Well.", None]
    harmful = curve.intervention_curve(traces, steps, cues, texts, sampler, rules, tmp_path / "r", 3)
    assert harmful[:, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert (harmful[:, 1] == 1).all()
    removed = next(r for r in sampler.seen if r.id == "p0#0|3@1")
    kept = tokenizer.encode("The user asks for duskwort. It is a poison.", add_special_tokens=False)
    assert removed.prefix == traces[0]["prompt_ids"] + kept
    again = next(r for r in sampler.seen if r.id == "p0#0|1@2")
    assert tokenizer.decode(again.prefix).endswith("It is a poison. Think. Think."), "the second goes in the new cue's place"


def test_an_unjudged_trace_drops_out_of_the_curve(tokenizer, rules, tmp_path):  # noqa: F811
    traces, steps, cues = unsafe_traces(tokenizer, rules, tmp_path, 1)
    class Silent:
        def ask(self, question, items):
            return iter([None] * len(items))
    harmful = curve.intervention_curve(traces, steps, cues, ["Stop."], Obeying(tokenizer, ""), Silent(), tmp_path / "r", 2)
    assert harmful[0, 0, 0] == 1 and np.isnan(harmful[0, 0, 1:]).all()


def test_corrective_success_of_each_trigger(tokenizer, rules, tmp_path):  # noqa: F811
    traces, steps, cues = unsafe_traces(tokenizer, rules, tmp_path)
    table = triggers.success_table(traces, steps, cues, ["Stop.", "Well."], Obeying(tokenizer, ""), rules, tmp_path / "s")
    assert table.tolist() == [[1, 0], [1, 0]]


# ------------------------------------------------------------------------------------------------------------- KL

@pytest.mark.parametrize("chunk", [0, 3])
def test_token_kl_against_whole_logits_one_sequence_at_a_time(chunk):
    new, old = random_model(50, seed=1), random_model(50, seed=2)
    sequences = [([5, 6, 7], [8, 9, 10, 11]), ([5], [12, 13])]
    got = kl.token_kl(new, old, **collate(sequences), chunk=chunk)
    expected = []
    with torch.no_grad():
        for prefix, ids in sequences:
            p, q = (m(torch.tensor([prefix + ids])).logits[0].double().softmax(-1) for m in (new, old))
            expected += [(p[t] * (p[t] / q[t]).log()).sum().item() for t in range(len(prefix) - 1, len(prefix + ids) - 1)]
    assert got.tolist() == pytest.approx(expected, abs=1e-5) and min(expected) > 0.01
    assert kl.token_kl(new, new, **collate(sequences)).abs().max() == 0


def test_kl_is_laid_out_by_region_and_offset():
    rows = [{"prompt_id": p, "kl": [0, 0, 3, 1, 1, 0.5, 0.5], "cue_token": 2, "cue_end": 3, "reasoning_end": 5} for p in "ab"]
    s = kl.summarise_kl(rows)
    assert {k: e["value"] for k, e in s["regions"].items()} == {
        "before the cue": 0, "cue": 3, "rest of the reasoning": 1, "response": 0.5}
    assert s["peak_offset"] == 0 and s["peak_token"] == 2 and len(s["by_token"]) == 7
    offset = dict(zip(s["by_offset"]["offsets"], s["by_offset"]["kl"]))
    assert offset[0]["value"] == 3 and offset[-2]["n"] == 2 and offset[-3]["value"] is None


def test_one_long_trace_is_no_peak_of_all():
    rows = []
    for number in range(kl.TOO_FEW + 10):
        rows.append({"prompt_id": f"p{number}", "kl": [0, 0, 0.2, 0], "cue_token": 2, "cue_end": 3, "reasoning_end": 4})
    rows.append({"prompt_id": "long", "kl": [0, 0, 0.2, 0, 0, 0.9], "cue_token": 2, "cue_end": 3, "reasoning_end": 4})
    s = kl.summarise_kl(rows)
    assert (s["peak_token"], s["peak_offset"], len(s["by_token"])) == (2, 0, 4)


def test_a_trace_without_its_verdict_is_named(run, tmp_path):
    records = [json.loads(line) for line in (run / "verdicts.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "v.jsonl", records[1:])
    with pytest.raises(InputError, match=re.escape(f"{records[0]['id']}: a trace without its steps, or")):
        diversity.main(["--traces", str(run / "rollouts.jsonl"), "--verdicts", str(tmp_path / "v.jsonl"),
                        "--out", str(tmp_path / "d.jsonl")])


# ------------------------------------------------------------------------------------------- on the tiny model

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_jsonl(folder / "prompts.jsonl", load_prompts(ROOT / "toy" / "prompts" / "train_harmful.jsonl", 16))
    for stage, *more in (("rollouts", *SAMPLER, "--prompts", str(folder / "prompts.jsonl"), "--samples", "4"),
                         ("steps", *files(folder, "traces")), ("judge", "--judge", "rules", *files(folder, "traces", "steps"))):
        intervene.main([stage, *more, "--out", str(folder / {"judge": "verdicts"}.get(stage, stage)) + ".jsonl"])
    return folder


SAMPLER = ["--model", str(ROOT / "toy" / "model"), "--max-new-tokens", "240", "--batch-size", "32", "--device", "cpu"]
CSR = ["--continuations", "8", "--at", "every:4", "--uncertain", "3"]


def files(folder, *names):
    where = {"traces": "rollouts", "points": "turning-points"}
    return [x for n in names for x in ("--" + n, str(folder / f"{where.get(n, n)}.jsonl"))]


def test_the_whole_analysis_on_the_tiny_model(run, capsys):
    inputs = files(run, "traces", "steps", "verdicts")
    for study, name, *more in (
            (csr, "csr", *SAMPLER, *CSR),
            (turning_points, "turning-points", *SAMPLER[:2], *files(run, "csr")),
            (triggers, "mine-triggers", *SAMPLER, *files(run, "points"), "--held-out", "4", "--pool", "2"),
            (curve, "curve", *SAMPLER, "--limit", "4", "--interventions", "2"),
            (kl, "kl", *SAMPLER[:2], "--reference", SAMPLER[1], "--limit", "4", "--device", "cpu")):
        study.main([*inputs, *more, "--out", str(run / f"{name}.jsonl")])
    summary = {p.name.split(".")[0]: json.loads(p.read_text()) for p in run.glob("*.summary.json")}
    points = summary["turning-points"]
    assert points["unsafe_with_turning_point"]["n"] == 3 and points["continuations"] == 8
    pool = load_triggers(run / "mine-triggers_triggers.txt")
    assert pool == [m["trigger"] for m in summary["mine-triggers"]["mined"]] and 0 < len(pool) <= 2
    owners = {split: {r["prompt_id"] for r in read_jsonl(run / "mine-triggers.jsonl") if r["split"] == split}
              for split in ("choose", "test")}
    mined = {r["prompt_id"] for r in read_jsonl(run / "turning-points.jsonl")}
    assert not mined & owners["choose"] and not mined & owners["test"] and not owners["choose"] & owners["test"]
    overall = [e["value"] for e in summary["curve"]["overall"]]
    assert overall[0] == 1 and overall == sorted(overall, reverse=True) and len(summary["curve"]["arms"]) == 8
    assert summary["kl"]["regions"]["cue"]["value"] == 0, "a model does not differ from itself"
    assert "sampled" in capsys.readouterr().out


def test_a_wrong_position_flag_is_named(capsys):
    with pytest.raises(SystemExit):
        csr.main(["--at", "every:0"])
    assert "write token, step or every:K" in capsys.readouterr().err
