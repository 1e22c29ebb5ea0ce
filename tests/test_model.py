"""Sampling against a naive loop, log-probabilities against all logits, weights read and saved."""
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data import render_prompt, split_reasoning, token_index
from model import (Request, completion_logps, empty_model, next_token, read_weights, sample,
                   save_model, token_logps)
from support.errors import InputError
from support.lora import LoRA
from tests.conftest import random_model

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------- sampling

def naive(model, prefix, limit, eos=1):
    """The oracle: one row, one token at a time, no cache."""
    ids = []
    while len(ids) < limit and (not ids or ids[-1] != eos):
        ids.append(model(torch.tensor([prefix + ids])).logits[0, -1].argmax().item())
    return ids


def some_requests(n=30, vocab=60):
    g = torch.Generator().manual_seed(0)
    lengths = [1 + i * 7 % 12 for i in range(n)]
    return [Request(f"r{i}", torch.randint(2, vocab, (length,), generator=g).tolist())
            for i, length in enumerate(lengths)]


def run(model, requests, **options):
    options = {"eos": {1}, "max_new_tokens": 24, "temperature": 0, "batch_size": 4, **options}
    return {c.id: c for c in sample(model, requests, **options)}


def test_greedy_sampling_equals_a_naive_loop():
    model = random_model(60)
    requests = some_requests()
    requests.append(Request("twin", requests[3].prefix))  # two rows share a prefix
    done = run(model, requests)
    for r in requests:
        assert done[r.id].ids == naive(model, r.prefix, 24)
    assert len(done) == len(requests)
    lengths = {len(c.ids) for c in done.values()}
    assert len(lengths) > 5, "rows must leave at different times for this test to mean anything"
    assert all((c.finished == "stop") == (c.ids[-1] == 1) for c in done.values())


def test_sampled_tokens_follow_the_models_distribution():
    model, n = random_model(12, spread=0.6), 4000
    prefix = [5, 3]
    requests = [Request(str(i), prefix) for i in range(n)]
    done = run(model, requests, temperature=1.0, top_p=1.0, max_new_tokens=2, batch_size=500)
    p = model(torch.tensor([prefix])).logits[0, -1].softmax(-1)
    two = torch.zeros(12, 12)  # joint distribution of two tokens; after EOS there is no second
    for a in range(12):
        if a == 1:
            two[a, 0] = p[a]
        else:
            two[a] = p[a] * model(torch.tensor([prefix + [a]])).logits[0, -1].softmax(-1)
    expected = two.flatten() * n
    observed = torch.zeros(144)
    for c in done.values():
        observed[c.ids[0] * 12 + (c.ids[1] if len(c.ids) > 1 else 0)] += 1
    rare = expected < 5  # the usual rule of the chi-square test: pool the small cells
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    statistic, k = ((observed - expected) ** 2 / expected).sum().item(), len(expected) - 1
    critical = k * (1 - 2 / (9 * k) + 3.72 * (2 / (9 * k)) ** 0.5) ** 3  # Wilson-Hilferty, p = 1e-4
    assert k > 10 and statistic < critical


def test_top_p_and_temperature_against_a_direct_computation():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 9, generator=g) * 2
    u = torch.rand(200, generator=g)
    chosen = next_token(logits, 0.6, 0.8, u).tolist()
    for row, uniform, token in zip(logits.double(), u.tolist(), chosen):
        order = sorted(range(9), key=lambda i: -row[i].item())
        p = [(row[i] / 0.6).exp().item() for i in order]
        p = [x / sum(p) for x in p]
        keep = next(k for k in range(1, 10) if sum(p[:k]) >= 0.8)  # the smallest nucleus
        assert token in order[:keep]
        below = sum(p[:order.index(token)]) / sum(p[:keep])
        assert below - 1e-5 <= uniform <= below + p[order.index(token)] / sum(p[:keep]) + 1e-5


def test_a_request_is_sampled_alike_in_any_order_batch_or_company():
    model, requests = random_model(60), some_requests()
    one = run(model, requests, temperature=0.8, top_p=0.9)
    two = run(model, requests[::-1], temperature=0.8, top_p=0.9, batch_size=7)
    assert one == two
    assert one == {**one, **run(model, requests[5:9], temperature=0.8, top_p=0.9)}
    assert one != run(model, requests, temperature=0.8, top_p=0.9, seed=1)


def test_a_prefix_is_computed_once_for_all_that_begin_with_it():
    model, seen = random_model(60), []

    def note(module, args, keywords):
        seen.append(keywords["input_ids"].shape)
    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    trunk = [5, 9, 11, 7, 30, 8, 21, 40]
    # Nested, siblings, and one apart.
    prefixes = [trunk, trunk[:5], trunk + [3, 4], trunk + [3, 6, 7], [6, 6]]
    requests = [Request(f"{i}.{k}", p) for k in range(6) for i, p in enumerate(prefixes)]
    together = run(model, requests, temperature=0.8, batch_size=4, max_new_tokens=9)
    # 30 requests, 4 rows: two waves, of 16 and 14, each starts afresh. In the order of prefixes:
    # [5 of trunk] x6, [trunk] x6, [+ 3 4] x4 | x2, [+ 3 6 7] x6, [6 6] x6. All later steps are
    # single tokens.
    assert [n for rows, n in seen if n > 1] == [5, 3, 2, 10, 2, 2]
    alone = {r.id: run(model, [r], temperature=0.8, max_new_tokens=9)[r.id] for r in requests}
    assert together == alone


def test_done_waves_are_skipped():
    model, requests = random_model(60), some_requests(20)
    first = list(run(model, requests, batch_size=2))[:8]  # the first wave: 4 * batch_size requests
    rest = run(model, requests, batch_size=2, done=set(first))
    assert set(rest) == {r.id for r in requests} - set(first)


def test_rows_end_where_the_context_is_full_and_full_prefixes_are_refused():
    model = random_model(60, max_position_embeddings=16)
    model.lm_head.weight.data[1] = -10 * model.lm_head.weight.data.mean(0)  # EOS becomes unlikely
    done = run(model, [Request("a", [3] * 10)], max_new_tokens=100, eos={59999})
    assert len(done["a"].ids) == 6 and done["a"].finished == "length"
    with pytest.raises(ValueError, match="request b: prefix of 16 tokens fills the context of 16"):
        run(model, [Request("b", [3] * 16)])


# --------------------------------------------------------------------------- log-probabilities

def test_completion_logps_against_plain_log_softmax_and_padding():
    model = random_model(60)
    rows = [([3, 4, 5], [6, 7, 1]), ([8], [9, 10, 11, 12, 13]), ([3, 4, 5, 6], [1])]

    def naive_logp(prefix, completion):
        logps = model(torch.tensor([prefix + completion])).logits[0].log_softmax(-1)
        return sum(logps[len(prefix) + i - 1, t] for i, t in enumerate(completion))

    expected = torch.stack([naive_logp(*row) for row in rows])
    width = 10
    ids = torch.full((3, width), 47)  # garbage in the padding must not matter
    attention, completion = torch.zeros(3, width), torch.zeros(3, width)
    for i, (p, c) in enumerate(rows):
        ids[i, :len(p) + len(c)] = torch.tensor(p + c)
        attention[i, :len(p) + len(c)] = 1
        completion[i, len(p):len(p) + len(c)] = 1
    before = completion.clone()
    for chunk in (1, 2, 1024):
        got = completion_logps(model, ids, attention, completion, chunk=chunk)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert torch.equal(completion, before), "masks are inputs and must not be edited in place"
    alone = completion_logps(model, ids[1:2, :6], attention[1:2, :6], completion[1:2, :6])
    torch.testing.assert_close(alone, expected[1:2], atol=1e-5, rtol=0)
    nothing = completion_logps(model, ids, attention, torch.zeros(3, width))
    assert nothing.tolist() == [0, 0, 0]


@pytest.mark.parametrize("chunk", [0, 1, 3, 100])
def test_token_logps_are_the_cross_entropy_of_the_heads_logits(chunk):
    model = random_model(60)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 32, generator=g, requires_grad=True)
    targets = torch.randint(60, (7,), generator=g)
    head = model.get_output_embeddings()
    inputs = (hidden, head.weight)
    expected = -F.cross_entropy(head(hidden).float(), targets, reduction="none")
    got = token_logps(model, hidden, targets, chunk)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    weights = torch.randn(7, generator=g)
    for a, b in zip(torch.autograd.grad(got, inputs, weights),
                    torch.autograd.grad(expected, inputs, weights)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------- reading and saving

def read(path, **options):
    """The model of a directory as training reads it, in one process."""
    model = empty_model(path, **options)
    assert all(p.is_meta for p in model.parameters())
    read_weights(model, path, CPU, 0, 1)
    return model


@pytest.mark.parametrize("limit, several", [(10 ** 9, False), (20_000, True)])
def test_what_is_saved_is_what_was_read(model_dir, tokenizer, tmp_path, limit, several):
    save_model(read(model_dir), tokenizer, tmp_path, 0, torch.float32, limit=limit)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 3) == several and (len(files) == 1) == (not several)
    assert (tmp_path / "model.safetensors.index.json").exists() == several
    assert not list(tmp_path.glob(".*")), "the temporary folder is gone"
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "who may read the config may read the weights"
    start = AutoModelForCausalLM.from_pretrained(model_dir)
    end, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    for name, weight in start.state_dict().items():
        assert torch.equal(weight, end.state_dict()[name])


def test_merged_adapters_compute_what_the_adapters_did(model_dir, tokenizer, tmp_path):
    model, ids = read(model_dir, lora_rank=2), torch.tensor([[5, 6, 7, 8]])
    original = AutoModelForCausalLM.from_pretrained(model_dir)(ids).logits
    assert torch.equal(model(ids).logits, original), "B is 0 at first"
    g = torch.Generator().manual_seed(0)
    adapted = [m for m in model.modules() if isinstance(m, LoRA)]
    assert len(adapted) == 2 * 7, "seven linear layers in each of two blocks"
    for module in adapted:
        module.lora_b.data = torch.randn(module.lora_b.shape, generator=g) / 10
    save_model(model, tokenizer, tmp_path, 0, torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    assert (merged - original).abs().max() > 0.1
    torch.testing.assert_close(merged, model(ids).logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("extra, missing, message", [
    ({}, "model.norm.weight", "lack model.norm.weight"),
    ({"extra": torch.zeros(1)}, None, "extra has no place in a LlamaForCausalLM")])
def test_wrong_weights_are_named(model_dir, tokenizer, tmp_path, extra, missing, message):
    save_model(read(model_dir), tokenizer, tmp_path, 0, torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(missing, None)
    save_file({**weights, **extra}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        read(tmp_path)


# ----------------------------------------------------------------------------------- text (data.py)

def test_render_prompt_ends_inside_the_reasoning(tokenizer):
    ids = render_prompt(tokenizer, "How?")
    assert tokenizer.decode(ids) == "<|user|>How?<|assistant|><think>\n"


@pytest.mark.parametrize("text, expected", [
    ("<think>\nA.\n</think>\n\nB", ("<think>\n", "A.\n", "</think>\n\n", "B", False)),
    ("A.\n</think>\n\nB", ("", "A.\n", "</think>\n\n", "B", False)),
    ("A </think> B </think> C", ("", "A ", "</think> ", "B </think> C", False)),
    ("<think>\n\n</think>\n\nB", ("<think>\n\n", "", "</think>\n\n", "B", False)),
    ("A and so", ("", "A and so", "", "", True)),
    ("", ("", "", "", "", True))])
def test_split_reasoning(text, expected):
    trace = split_reasoning(text)
    assert trace == expected
    assert "".join(trace[:4]) == text


def test_token_index_counts_tokens_wholly_before_a_character(tokenizer):
    text = "Wait, 这是 naïve 🙂🙂. So I can explain the recipe.\n\nNo\u200b. 3.5 kg"
    ids = tokenizer.encode(text, add_special_tokens=False)
    more = tokenizer.encode("zq", add_special_tokens=False)
    ids = ids[:4] + more + ids[4:]  # not a canonical tokenisation
    text = tokenizer.decode(ids)
    for char in range(len(text) + 1):
        # oracle: the longest prefix of ids whose bytes form whole characters that end by `char`
        heads = [tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)]
        fitting = [i for i, head in enumerate(heads) if text.startswith(head) and len(head) <= char]
        expected = max(fitting)
        assert token_index(tokenizer, ids, char) == expected
