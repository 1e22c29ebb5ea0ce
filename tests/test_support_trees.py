"""Trees against separate passes, the fused head against log_softmax."""
import pytest
import torch
from transformers import (LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

from data import collate, global_batches
from model import completion_logps, tree_logps
from support.errors import InputError
from support.fused_head import TokenLogps
from support.trees import pack, tree_parts, use_tree_attention
from tests.conftest import random_model

FAMILIES = {
    "llama": dict(config=LlamaConfig, cls=LlamaForCausalLM, tie_word_embeddings=True),
    "qwen2": dict(config=Qwen2Config, cls=Qwen2ForCausalLM),
    "qwen3": dict(config=Qwen3Config, cls=Qwen3ForCausalLM, tie_word_embeddings=True)}


def some_ids(g, low, high):
    length = int(torch.randint(low, high, (1,), generator=g))
    return torch.randint(2, 60, (length,), generator=g).tolist()


def some_trees(seed=0):
    """Ragged trees, shuffled.

    Six branches and one rejected side, a single pair, a prefix of one token, a lone row.
    """
    g = torch.Generator().manual_seed(seed)
    sequences = []
    for length, branches in ((9, 6), (5, 2), (1, 3), (4, 1)):
        prefix = some_ids(g, length, length + 1)
        rejected = some_ids(g, 1, 8)
        for _ in range(branches):
            sequences += [(prefix, some_ids(g, 1, 8)), (prefix, rejected)]
    return [sequences[i] for i in torch.randperm(len(sequences), generator=g)]


def separately(model, sequences, weights):
    """The oracle: one forward pass a sequence, all logits.

    Returns the log-probabilities, and the gradients of their weighted sum.
    """
    logps = []
    for prefix, completion in sequences:
        table = model(torch.tensor([prefix + completion])).logits[0].log_softmax(-1)
        logps.append(sum(table[len(prefix) + i - 1, t] for i, t in enumerate(completion)))
    model.zero_grad()
    (torch.stack(logps) * weights).sum().backward()
    return torch.stack(logps).detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def packed(sequences):
    """The arguments of `tree_logps`."""
    row = {}
    for name, value in pack(sequences).items():
        row[name] = value if name == "tree" else torch.tensor(value)
    return row


# ---------------------------------------------------------------------------------------- trees

@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_equals_separate_passes(family, checkpointed):
    model = random_model(60, spread=0.15, **FAMILIES[family]).train()
    sequences = some_trees()
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(len(sequences), generator=g) / len(sequences)
    logps, gradients = separately(model, sequences, weights)
    if checkpointed:
        model.activation_checkpointing_enable()
    use_tree_attention(model)
    row = packed(sequences)
    laid_down = row["input_ids"].shape[1]
    assert laid_down == sum(tree_parts(sequences).values()) < sum(len(p + c) for p, c in sequences)
    model.zero_grad()
    got = tree_logps(model, **row)
    (got * weights).sum().backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.detach(), logps, atol=1e-5, rtol=1e-6)
    assert max(g.abs().max() for g in gradients.values()) > 0.1
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-5)


def test_trees_equal_the_plain_way():
    model, sequences = random_model(60, spread=0.15), some_trees(seed=2)
    plain = completion_logps(model, **collate(sequences))
    use_tree_attention(model)
    torch.testing.assert_close(tree_logps(model, **packed(sequences)), plain, atol=1e-5, rtol=1e-6)


def test_a_branch_sees_its_trunk_and_nothing_of_its_siblings():
    model = random_model(60)
    use_tree_attention(model)
    prefix, other = [5, 6, 7], [5, 9, 7]
    alone = tree_logps(model, **packed([(prefix, [8, 9])]))
    for company in ([(prefix, [30, 31])], [(other, [8, 9])], [(prefix, [8, 9, 10]), (other, [1])]):
        for sequences in ([(prefix, [8, 9]), *company], [*company, (prefix, [8, 9])]):
            got = tree_logps(model, **packed(sequences))[sequences.index((prefix, [8, 9]))]
            torch.testing.assert_close(got, alone[0], atol=1e-5, rtol=0)
    assert (tree_logps(model, **packed([(other, [8, 9])])) - alone).abs() > 0.01


def test_sliding_windows_are_refused():
    model = random_model(60, config=Qwen2Config, cls=Qwen2ForCausalLM, use_sliding_window=True,
                         sliding_window=4, max_window_layers=0)
    use_tree_attention(model)
    with pytest.raises(InputError, match="--no-share"):
        tree_logps(model, **packed([([5, 6], [7])]))


def test_whole_trees_meet_in_a_batch_and_epochs_cover_everything():
    parts = [tree_parts([([i // 3, 5], [i])]) for i in range(12)]
    batches = global_batches(parts, 6, 2, seed=1)
    first = sorted(i for b in batches[:2] for i in b)
    second = sorted(i for b in batches[2:] for i in b)
    assert first == second == list(range(12))
    assert all(len({i // 3 for i in b}) == 2 for b in batches), "six pairs are two whole trees"
    assert batches[:2] != batches[2:] and batches == global_batches(parts, 6, 2, seed=1)


# --------------------------------------------------------------------------------- the fused head

@pytest.mark.parametrize("chunk, keep", [(1, 0), (3, 40), (3, 1000), (100, 0)])
def test_the_chunked_head_equals_log_softmax(chunk, keep):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=g, requires_grad=True) for n in (7, 11))
    targets, grad = torch.randint(11, (7,), generator=g), torch.randn(7, generator=g)
    expected = (hidden @ weight.T).log_softmax(-1)[range(7), targets]
    wanted = torch.autograd.grad(expected, (hidden, weight), grad)
    got = TokenLogps.apply(hidden, weight, None, targets, chunk, keep)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight), grad), wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    frozen = TokenLogps.apply(hidden, weight.detach(), None, targets, chunk, keep)
    got = torch.autograd.grad(frozen, hidden, grad)[0]
    torch.testing.assert_close(got, wanted[0], atol=1e-5, rtol=0)
