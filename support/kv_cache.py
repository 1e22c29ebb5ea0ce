"""Keys and values while sampling: one slot for each active row, and the prefix computed last."""
import torch
from transformers import DynamicCache


class SlotCache:
    """Keys and values of the active rows, which may have any length and still share a batch.

    Each row has a slot, left-aligned. transformers calls `update` from every attention layer with
    one new token per row: it is written at that row's length, and attention gets the slots up to
    the longest row. A mask hides what lies beyond each row.
    """

    def __init__(self, rows):
        self.rows = rows  # how many slots there are
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
        """Copy one slot over another: how the last active row takes a finished row's place."""
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
        columns = torch.arange(self.span, device=device)
        visible = columns <= self.positions[:, None]  # (B, span)
        self.mask = visible[:, None, None]            # (B, 1, 1, span), for all heads and queries
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
