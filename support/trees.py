"""Sequences with a common prefix as trees, so that the prefix is computed once.

`pack` lays them out as one row, `use_tree_attention` makes a model read such rows, and
`model.tree_logps` scores them.
"""
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from support.compact import token_array
from support.errors import InputError


def pack(sequences):
    """Lay (prefix, completion) sequences out as one row of trees.

    A tree is `prefix[:-1] | prefix[-1] + b1[:-1] | prefix[-1] + b2[:-1] | ...`: all sequences
    with one prefix form it, the prefix is its trunk, and equal completions are one branch of it.
    A branch begins with a copy of the prefix's last token, which is what predicts the branch's
    first token.

    Returns input_ids and position_ids (1, T); tree, for each tree the tokens of its trunk and of
    its branches; scored, targets and branch (N,): the positions that predict a scored token, that
    token, and the branch it is in; branch_of (B,): each sequence's branch.

    >>> row = pack([([5, 6, 7], [8, 9]), ([5, 6, 7], [4]), ([5, 6, 7], [8, 9])])
    >>> row["input_ids"], row["position_ids"], row["tree"]
    ([[5, 6, 7, 8, 7]], [[0, 1, 2, 3, 2]], [[2, 2, 1]])
    >>> row["scored"], row["targets"], row["branch"], row["branch_of"]
    ([2, 3, 4], [8, 9, 4], [0, 0, 1], [0, 1, 0])
    """
    trees = {}  # prefix -> its completions, each once and in order: a dict is an ordered set
    for prefix, completion in sequences:
        completions = trees.setdefault(tuple(prefix), {})
        completions[tuple(completion)] = None

    ids = []
    positions = []
    scored = []
    targets = []
    branch = []
    tree = []
    numbers = {}  # (prefix, completion) -> number of its branch
    for prefix, completions in trees.items():
        trunk = len(prefix) - 1  # its last token starts every branch
        ids += prefix[:-1]
        positions += range(trunk)
        for completion in completions:
            # The branch reads prefix[-1], c0, c1, ... and predicts c0, c1, c2, ...: as many tokens.
            scored += range(len(ids), len(ids) + len(completion))
            positions += range(trunk, trunk + len(completion))
            branch += [len(numbers)] * len(completion)
            ids += prefix[-1:] + completion[:-1]
            targets += completion
            numbers[prefix, completion] = len(numbers)
        tree.append([trunk, *map(len, completions)])

    branch_of = [numbers[tuple(p), tuple(c)] for p, c in sequences]
    return {
        "input_ids": [ids],
        "position_ids": [positions],
        "scored": scored,
        "targets": targets,
        "branch": branch,
        "tree": tree,
        "branch_of": branch_of,
    }


def tree_parts(sequences):
    """What `pack` would lay down for some sequences, `{part: tokens}`; the trunk comes first.

    Equal parts have equal keys, also those of different examples.

    >>> list(tree_parts([([5, 6, 7], [8, 9]), ([5, 6, 7], [4])]).values())
    [2, 2, 1]
    """
    parts = {}
    for prefix, completion in sequences:
        prefix_bytes = token_array(prefix).tobytes()  # hashed ten times as fast as ints
        completion_bytes = token_array(completion).tobytes()
        trunk = hash(prefix_bytes)
        branch = hash((prefix_bytes, completion_bytes))
        parts[trunk] = len(prefix) - 1
        parts[branch] = len(completion)
    return parts


def use_tree_attention(model):
    """Give a model the attention that rows of trees need (`model.tree_logps`)."""
    AttentionInterface.register("tree", tree_attention)
    model.set_attn_implementation("tree")


def tree_attention(module, query, key, value, attention_mask, scaling=None, tree=None, **options):
    """Causal attention within packed trees: a trunk sees itself, a branch its trunk and itself.

    query (B, heads, T, d), key and value (B, kv heads, T, d); tree as `pack` makes it, None for
    rows without one. Returns (B, T, heads, d) and no weights, as transformers expects. Only
    torch's fused kernels are used, so there is no T x T mask. Raises InputError for a model with
    sliding windows or capped scores.
    """
    if options.get("sliding_window") or options.get("softcap"):
        raise InputError("tree attention has no sliding window and no softcap; "
                         "train this model with --no-share")
    query = query.to(value.dtype)  # autocast leaves rotated queries and keys in float32
    key = key.to(value.dtype)
    grouped = query.shape[1] != key.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=grouped)
    tree = tree or [[query.shape[2]]]
    # The row in pieces, (B, heads, length, d) each: a trunk, its branches, the next trunk, ...
    sizes = [length for lengths in tree for length in lengths]
    pieces = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2))
    out = []
    for trunk, *branches in tree:
        q, trunk_k, trunk_v = next(pieces)
        if trunk:
            out.append(attend(q, trunk_k, trunk_v, is_causal=True))
        else:
            out.append(q)  # the trunk of a prefix of one token is empty
        for branch in branches:
            q, k, v = next(pieces)
            k = torch.cat([trunk_k, k], 2)
            v = torch.cat([trunk_v, v], 2)
            mask = causal_lower_right(branch, trunk + branch)  # a description, no tensor
            out.append(attend(q, k, v, attn_mask=mask))
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None
