"""Keys and values while sampling: one slot for each active row.

`make_slots` gives the sampler an object with
    rows                           how many slots there are
    fill(slots, prefixes)          put prefixes into slots; the hidden states (n, H) of their ends
    move(source, target)           copy one slot over another
    step(tokens)                   give the first slots a token each; the hidden states (B, H)
It is `PlainSlots`, or on a GPU `GraphSlots` (graph_slots.py), which is much faster there.
"""
import functools

import torch
from transformers import DynamicCache

from support.fused_head import output_logits
from support.graph_slots import GraphSlots, step_masks
from support.model_check import (
    SERVE_IT,
    check_model,
    guard_length,
    in_float32,
    layer_windows,
    steady_length,
)

NO_GRAPH = f"sample with --no-graph, or {SERVE_IT}"  # a remedy


# ------------------------------------------------------------------------------ which slots

def uses_graphs(model):
    """Whether a model's decode steps are CUDA graphs: on a GPU, unless --no-graph.

    Where the rotary angles depend on the longest row, the model looks at the positions' values in
    every step, and a graph cannot record that.
    """
    wanted = getattr(model, "decode_graphs", False)  # set by `load_model`
    steady = steady_length(model.get_decoder().config) is None
    return wanted and steady and model.device.type == "cuda"


def make_slots(model, rows, longest, kept=None):
    """The slots of a wave: at most `rows` active rows of at most `longest` tokens each.

    kept: a dict that keeps slots with graphs, which are dear, from one wave to the next.
    """
    if not uses_graphs(model):
        return PlainSlots(model.get_decoder(), rows)
    if kept is None:
        kept = {}
    if model in kept and kept[model].fits(rows, longest):
        kept[model].start(rows, longest)
    else:
        kept.clear()  # before the new ones need the memory
        kept[model] = GraphSlots(model.get_decoder(), rows, longest)
    return kept[model]


# ------------------------------------------------------------------------------ the plain way

class PlainSlots:
    """Slots that grow as the rows do. Prefixes are computed one after another."""

    def __init__(self, decoder, rows):
        self.rows = rows
        self.decoder = decoder
        self.prefixes = PrefixCache(decoder)
        self.cache = SlotCache(rows, decoder.config)

    def fill(self, slots, prefixes):
        """Put prefixes into slots; return the hidden states (n, H) of their last tokens."""
        states = []
        for slot, prefix in zip(slots, prefixes):
            states.append(self.prefixes.fill(self.cache, slot, prefix))
        return torch.stack(states)

    def move(self, source, target):
        """Copy one slot over another: how the last active row takes a finished row's place."""
        self.cache.move(source, target)

    def step(self, tokens):
        """Give each of the first slots its next token; tokens: a list of B ids.

        Returns the hidden states (B, H) that predict the tokens after these.
        """
        self.cache.start_step(len(tokens))
        output = self.decoder(
            input_ids=torch.tensor(tokens, device=self.decoder.device)[:, None],  # (B, 1)
            position_ids=self.cache.positions[:, None],                           # (B, 1)
            attention_mask=self.cache.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache.finish_step()
        return output.last_hidden_state[:, -1]


class SlotCache:
    """Keys and values of the active rows, which may have any length and still share a batch.

    Each row has a slot, left-aligned. transformers calls `update` from every attention layer with
    one new token per row: it is written at that row's length, and attention gets the slots up to
    the longest row. A mask hides what lies beyond each row, or outside a layer's sliding window.

    config: the decoder's. Raises InputError for layers that are no attention.
    """

    def __init__(self, rows, config):
        self.rows = rows  # how many slots there are
        self.windows = layer_windows(config)
        self.keys = {}    # layer number -> (rows, kv heads, capacity, d)
        self.values = {}  # the same
        self.lengths = torch.zeros(rows, dtype=torch.long)  # tokens held by each slot, on the CPU

    def put(self, slot, layers, length):
        """Copy the `length` positions of a prefilled cache of one row into a slot."""
        self.lengths[slot] = length
        for i, layer in enumerate(layers):
            self._reserve(self.keys, i, layer.keys, length)
            self._reserve(self.values, i, layer.values, length)
            self.keys[i][slot, :, :length] = layer.keys[0]
            self.values[i][slot, :, :length] = layer.values[0]

    def _reserve(self, store, i, like, length):
        """Make a layer's tensor long enough for `length` tokens, with room to spare."""
        capacity = store[i].shape[2] if i in store else 0
        if capacity >= length:
            return
        larger = max(length + 64, capacity * 3 // 2)
        heads = like.shape[1]
        d = like.shape[3]
        grown = like.new_zeros(self.rows, heads, larger, d)
        if capacity:
            grown[:, :, :capacity] = store[i]
        store[i] = grown

    def move(self, source, target):
        """Copy one slot over another."""
        self.lengths[target] = self.lengths[source]
        for keys in self.keys.values():
            keys[target] = keys[source]
        for values in self.values.values():
            values[target] = values[source]

    def start_step(self, active):
        """Make room for one more token in the first `active` slots."""
        self.active = active
        self.span = int(self.lengths[:active].max()) + 1
        device = next(iter(self.keys.values())).device
        self.row_numbers = torch.arange(active, device=device)
        self.positions = self.lengths[:active].to(device)  # (B,): where each row's new token goes
        self.mask = step_masks(self.positions, self.span, self.windows)
        for store in (self.keys, self.values):
            for i in store:
                self._reserve(store, i, store[i], self.span)

    def update(self, new_keys, new_values, layer, *args, **kwargs):
        """(active, kv heads, 1, d) of the new tokens -> (active, kv heads, span, d) of all."""
        keys = self.keys[layer]
        values = self.values[layer]
        keys[self.row_numbers, :, self.positions] = new_keys[:, :, 0]
        values[self.row_numbers, :, self.positions] = new_values[:, :, 0]
        active = slice(self.active)
        span = slice(self.span)
        return keys[active, :, span], values[active, :, span]

    def finish_step(self):
        """Count the token that each active row has just been given."""
        self.lengths[:self.active] += 1


class PrefixCache:
    """The prefix computed last, with its keys and values.

    The next prefix is computed only from where it differs.
    """

    def __init__(self, decoder):
        self.decoder = decoder
        self.prefix = []
        self.cache = DynamicCache()
        self.hidden = None  # (H,) of the prefix's last token

    def fill(self, slots, slot, prefix):
        """Put a prefix into a slot of a `SlotCache`; return the hidden state (H,) of its end."""
        if prefix != self.prefix:
            kept = common_prefix_length(self.prefix, prefix)
            # The last token is always computed: its hidden state chooses the next one.
            kept = min(kept, len(prefix) - 1)
            if kept < len(self.prefix):
                self.cache.crop(kept - len(self.prefix))  # a negative number removes that many
            rest = torch.tensor([prefix[kept:]], device=self.decoder.device)
            output = self.decoder(
                input_ids=rest,
                past_key_values=self.cache,
                use_cache=True,
            )
            self.hidden = output.last_hidden_state[0, -1]
            self.prefix = prefix
        slots.put(slot, self.cache.layers, len(prefix))
        return self.hidden


# ------------------------------------------------------------------------------ the check

def slot_logps(model, sequences):
    """Log-probabilities float32 (B,), nats, of (prefix, completion) sequences, as in sampling.

    Nothing is chosen: each row is given its own completion, token by token. The rows leave from
    the last to the first, so the sequences come by falling length of their completions.
    """
    rows = len(sequences)
    longest = max(len(prefix) + len(completion) for prefix, completion in sequences)
    slots = make_slots(model, rows, longest)
    hidden = slots.fill(range(rows), [prefix for prefix, _ in sequences])
    totals = torch.zeros(rows)
    for i in range(len(sequences[0][1])):
        tokens = [completion[i] for _, completion in sequences if i < len(completion)]
        logps = output_logits(model, hidden[:len(tokens)]).float().log_softmax(-1).cpu()
        totals[:len(tokens)] += logps[range(len(tokens)), tokens]
        hidden = slots.step(tokens)
    return totals


def check_sampling(model):
    """Raise InputError for a model whose numbers in sampling would not be its own.

    From then on the model refuses rows that it would read otherwise beside others.
    """
    remedy = NO_GRAPH if uses_graphs(model) else SERVE_IT
    with in_float32(model):
        check_model(model, {"sampling": functools.partial(slot_logps, model)}, remedy)
    guard_length(model)


def common_prefix_length(a, b):
    """How many elements two lists share at their beginning.

    >>> common_prefix_length([5, 6, 7], [5, 6, 8, 9])
    2
    """
    length = 0
    for x, y in zip(a, b):
        if x != y:
            break
        length += 1
    return length
