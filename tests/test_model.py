import pytest
import torch

import model as lm_code
from tests.conftest import random_model


def naive(model, prefix, limit, eos=1):
    """The oracle: one row, one token at a time, no cache."""
    ids = []
    while len(ids) < limit and (not ids or ids[-1] != eos):
        ids.append(model(torch.tensor([prefix + ids])).logits[0, -1].argmax().item())
    return ids


def some_requests(n=30, vocab=60):
    g = torch.Generator().manual_seed(0)
    return [lm_code.Request(f"r{i}", torch.randint(2, vocab, (1 + i * 7 % 12,), generator=g).tolist()) for i in range(n)]


def run(model, requests, **options):
    options = {"eos": {1}, "max_new_tokens": 24, "temperature": 0, "batch_size": 4, **options}
    return {c.id: c for c in lm_code.sample(model, requests, **options)}


def test_greedy_sampling_equals_a_naive_loop():
    model = random_model(60)
    requests = some_requests() + [lm_code.Request("twin", some_requests()[3].prefix)]  # two rows share a prefix
    done = run(model, requests)
    assert {r.id: naive(model, r.prefix, 24) for r in requests} == {id: c.ids for id, c in done.items()}
    lengths = {len(c.ids) for c in done.values()}
    assert len(lengths) > 5, "rows should leave the batch at different times for this test to mean anything"
    assert all((c.finished == "stop") == (c.ids[-1] == 1) for c in done.values())


def test_sampled_tokens_follow_the_models_distribution():
    model, n = random_model(12, spread=0.6), 4000
    prefix = [5, 3]
    done = run(model, [lm_code.Request(str(i), prefix) for i in range(n)], temperature=1.0, top_p=1.0, max_new_tokens=2,
               batch_size=500)
    p = model(torch.tensor([prefix])).logits[0, -1].softmax(-1)
    two = torch.zeros(12, 12)  # exact joint distribution of the first two tokens; after EOS there is no second
    for a in range(12):
        two[a] = p[a] * (model(torch.tensor([prefix + [a]])).logits[0, -1].softmax(-1) if a != 1 else torch.eye(12)[0])
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
    chosen = lm_code.next_token(logits, 0.6, 0.8, u).tolist()
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
    model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    trunk = [5, 9, 11, 7, 30, 8, 21, 40]
    prefixes = [trunk, trunk[:5], trunk + [3, 4], trunk + [3, 6, 7], [6, 6]]  # nested, siblings, and one apart
    requests = [lm_code.Request(f"{i}.{k}", p) for k in range(6) for i, p in enumerate(prefixes)]
    shared = run(model, requests, temperature=0.8, batch_size=4, max_new_tokens=9)
    # 30 requests, 4 rows: two waves, of 16 and 14, each begins afresh; in the order of the prefixes:
    # [5 of trunk] x6, [trunk] x6, [+ 3 4] x4 | x2, [+ 3 6 7] x6, [6 6] x6. All but the first steps are single tokens.
    assert [n for rows, n in seen if n > 1] == [5, 3, 2, 10, 2, 2]
    assert shared == {r.id: run(model, [r], temperature=0.8, max_new_tokens=9)[r.id] for r in requests}


def test_done_waves_are_skipped():
    model, requests = random_model(60), some_requests(20)
    first = list(run(model, requests, batch_size=2))[:8]  # the first wave: 4 * batch_size requests
    rest = run(model, requests, batch_size=2, done=set(first))
    assert set(rest) == {r.id for r in requests} - set(first)


def test_rows_end_where_the_context_is_full_and_full_prefixes_are_refused():
    model = random_model(60, max_position_embeddings=16)
    model.lm_head.weight.data[1] = -10 * model.lm_head.weight.data.mean(0)  # EOS becomes unlikely
    done = run(model, [lm_code.Request("a", [3] * 10)], max_new_tokens=100, eos={59999})
    assert len(done["a"].ids) == 6 and done["a"].finished == "length"
    with pytest.raises(ValueError, match="request b: prefix of 16 tokens fills the context of 16"):
        run(model, [lm_code.Request("b", [3] * 16)])


@pytest.mark.parametrize("text, expected", [
    ("<think>\nA.\n</think>\n\nB", ("<think>\n", "A.\n", "</think>\n\n", "B", False)),
    ("A.\n</think>\n\nB", ("", "A.\n", "</think>\n\n", "B", False)),
    ("A </think> B </think> C", ("", "A ", "</think> ", "B </think> C", False)),
    ("<think>\n\n</think>\n\nB", ("<think>\n\n", "", "</think>\n\n", "B", False)),
    ("A and so", ("", "A and so", "", "", True)),
    ("", ("", "", "", "", True))])
def test_split_reasoning(text, expected):
    trace = lm_code.split_reasoning(text)
    assert trace == expected
    assert "".join(trace[:4]) == text


def test_token_index_counts_tokens_wholly_before_a_character(tokenizer):
    text = "Wait, 这是 naïve 🙂🙂. So I can explain the recipe.\n\nNo\u200b. 3.5 kg"
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids = ids[:4] + tokenizer.encode("zq", add_special_tokens=False) + ids[4:]  # not a canonical tokenisation
    text = tokenizer.decode(ids)
    for char in range(len(text) + 1):
        # oracle: the longest prefix of ids whose bytes form whole characters that end at or before `char`
        expected = max(i for i in range(len(ids) + 1)
                       if text.startswith(tokenizer.decode(ids[:i])) and len(tokenizer.decode(ids[:i])) <= char)
        assert lm_code.token_index(tokenizer, ids, char) == expected


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
        got = lm_code.completion_logps(model, ids, attention, completion, chunk=chunk)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert torch.equal(completion, before), "masks are inputs and must not be edited in place"
    alone = lm_code.completion_logps(model, ids[1:2, :6], attention[1:2, :6], completion[1:2, :6])
    torch.testing.assert_close(alone, expected[1:2], atol=1e-5, rtol=0)
    nothing = lm_code.completion_logps(model, ids, attention, torch.zeros(3, width))
    assert nothing.tolist() == [0, 0, 0]


def test_render_prompt_ends_inside_the_reasoning(tokenizer):
    ids = lm_code.render_prompt(tokenizer, "How?")
    assert tokenizer.decode(ids) == "<|user|>How?<|assistant|><think>\n"
