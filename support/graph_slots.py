"""Sampling on a GPU: keys and values in fixed places, and the decode step as a CUDA graph.

A decode step of some rows is hundreds of small kernels. Started one by one from Python they take
longer than the GPU needs to read the weights. A CUDA graph records them once and starts all of
them with one call, but only on the same tensors, of the same shapes, at the same addresses.
So everything is allocated once, and rows and lengths are rounded up to a few shapes.

Everything but `_capture` and the replay runs on a CPU too, with `graphs=False`.
"""
import torch
from transformers import DynamicCache

from support.errors import InputError
from support.model_check import layer_windows

SMALLEST_SPAN = 256      # tokens; spans and limits are multiples of it
PREFILL_TOKENS = 16_384  # of prefixes computed together, padding included


class GraphSlots:
    """The slots of a wave: keys and values (rows, kv heads, limit, d) of each layer.

    decoder: the model without its head. rows: the most that are active at a time. longest: the most
    tokens that a row will have. graphs: whether to capture the steps, which needs CUDA.

    transformers calls `update` from every attention layer, as it would of its own `Cache`.
    """

    def __init__(self, decoder, rows, longest, graphs=True):
        self.decoder = decoder
        self.device = decoder.device
        self.windows = layer_windows(decoder.config)
        self.capacity = (rows, round_up(longest, SMALLEST_SPAN))
        self.keys = []      # a tensor for each layer; the first prefix shows the shape
        self.values = []    # the same
        self.hidden = None  # (rows, H): what the last step has computed
        self.inputs = torch.zeros(2, rows, dtype=torch.long, device=self.device)  # ids, positions
        self.row_numbers = torch.arange(rows, device=self.device)
        self.shape = None  # (rows, span) of the step that is being computed
        self.captured = {}  # (rows, span) -> CUDAGraph
        self.graphs = graphs
        if graphs:
            self.stream = torch.cuda.Stream(self.device)
            self.pool = torch.cuda.graph_pool_handle()
        self.start(rows, longest)

    def fits(self, rows, longest):
        """Whether there is room for a wave of that size."""
        most_rows, most_tokens = self.capacity
        return rows <= most_rows and longest <= most_tokens

    def start(self, rows, longest):
        """Forget everything but the graphs, for another wave that fits.

        Nothing that a wave computes may depend on the waves before it: a run that is started again
        skips those. So the shapes of its steps come from its own size, not from the capacity.
        """
        assert self.fits(rows, longest)
        self.rows = rows
        self.limit = round_up(longest, SMALLEST_SPAN)
        self.lengths = [0] * rows      # tokens held by each slot
        self.prefixes = [None] * rows  # the prefix that each slot begins with, if it is unharmed
        self.ends = [None] * rows      # the hidden state (H,) of that prefix's last token

    # ---------------------------------------------------------------------------- prefixes

    @torch.no_grad()
    def fill(self, slots, prefixes):
        """Put prefixes into slots; return the hidden states (n, H) of their last tokens.

        Equal prefixes are computed once, and not at all where a slot still holds one.
        """
        prefixes = [tuple(prefix) for prefix in prefixes]
        for slot in slots:
            self.prefixes[slot] = None
        slot_of = {}  # prefix to compute -> where to
        for slot, prefix in zip(slots, prefixes):
            if prefix not in self.prefixes:
                slot_of.setdefault(prefix, slot)
        for batch in prefill_batches(slot_of, PREFILL_TOKENS):
            self._prefill([slot_of[prefix] for prefix in batch], batch)
        for slot, prefix in zip(slots, prefixes):
            self._copy(self.prefixes.index(prefix), slot, len(prefix))
        return torch.stack([self.ends[slot] for slot in slots])

    def _prefill(self, slots, prefixes):
        """Compute some prefixes in one padded batch."""
        width = max(len(prefix) for prefix in prefixes)
        padded = [prefix + (0,) * (width - len(prefix)) for prefix in prefixes]
        cache = DynamicCache()
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        output = self.decoder(
            input_ids=torch.tensor(padded, device=self.device),
            past_key_values=cache,
            use_cache=True,
        )
        states = output.last_hidden_state  # (n, width, H)
        if not self.keys:
            self._allocate(cache.layers, states)
        for row, (slot, prefix) in enumerate(zip(slots, prefixes)):
            length = len(prefix)
            for i, layer in enumerate(cache.layers):
                self.keys[i][slot, :, :length] = layer.keys[row, :, :length]
                self.values[i][slot, :, :length] = layer.values[row, :, :length]
            self.lengths[slot] = length
            self.prefixes[slot] = prefix
            self.ends[slot] = states[row, length - 1].clone()  # a view would keep the whole batch

    def _allocate(self, layers, states):
        """Make the tensors of all layers; zeros, since a masked NaN would still spread."""
        rows, tokens = self.capacity
        try:
            for layer in layers:
                _, heads, _, d = layer.keys.shape
                self.keys.append(layer.keys.new_zeros(rows, heads, tokens, d))
                _, heads, _, d = layer.values.shape
                self.values.append(layer.values.new_zeros(rows, heads, tokens, d))
        except torch.OutOfMemoryError:
            raise InputError(f"keys and values of {rows} rows of up to {tokens} tokens do not fit "
                             "into the GPU's memory. Lower --batch-size or --max-new-tokens, or "
                             "take --no-graph, which reserves nothing.") from None
        self.hidden = states.new_zeros(rows, states.shape[-1])

    def move(self, source, target):
        """Copy one slot over another: how the last active row takes a finished row's place."""
        self._copy(source, target, self.lengths[source])

    def _copy(self, source, target, length):
        """Copy the first `length` positions of a slot, and what is known of its prefix."""
        if source == target:
            return
        for tensor in self.keys + self.values:
            tensor[target, :, :length] = tensor[source, :, :length]
        self.lengths[target] = length
        self.prefixes[target] = self.prefixes[source]
        self.ends[target] = self.ends[source]

    # ------------------------------------------------------------------------- decode step

    @torch.no_grad()
    def step(self, tokens):
        """Give each of the first slots its next token; tokens: a list of B ids.

        Returns the hidden states (B, H) that predict the tokens after these.
        """
        active = len(tokens)
        rows = min(power_of_two(active), self.rows)
        longest = max(self.lengths[:active]) + 1
        assert longest <= self.limit, "a row has become longer than was said"
        span = min(span_bucket(longest), self.limit)

        # Idle rows are computed too. They write to the beginning of their own slots, and look at
        # that one token, so that nothing of theirs is a softmax over nothing.
        idle = [0] * (rows - active)
        for slot in range(active, rows):
            self.prefixes[slot] = None
        inputs = torch.tensor([tokens + idle, self.lengths[:active] + idle])
        self.inputs[:, :rows] = inputs.to(self.device)  # the step's only copy to the device
        for slot in range(active):
            self.lengths[slot] += 1

        if not self.graphs:
            self._compute(rows, span)
        else:
            with torch.cuda.device(self.device):
                if (rows, span) not in self.captured:
                    self.captured[rows, span] = self._capture(rows, span)
                self.captured[rows, span].replay()
        return self.hidden[:active].clone()  # the next step writes to the same place

    def _compute(self, rows, span):
        """One step of the first `rows` slots, from `inputs` to `hidden`, over `span` positions.

        Once captured, nothing of this is Python any more: it must not look at a tensor's value.
        """
        self.shape = (rows, span)
        tokens, positions = self.inputs[:, :rows]
        output = self.decoder(
            input_ids=tokens[:, None],        # (B, 1)
            position_ids=positions[:, None],  # (B, 1)
            attention_mask=step_masks(positions, span, self.windows, self.hidden.dtype),
            past_key_values=self,
            use_cache=True,
        )
        self.hidden[:rows] = output.last_hidden_state[:, -1]

    def update(self, new_keys, new_values, layer, *args, **kwargs):
        """(rows, kv heads, 1, d) of the new tokens -> (rows, kv heads, span, d) of all."""
        rows, span = self.shape
        row_numbers = self.row_numbers[:rows]
        positions = self.inputs[1, :rows]
        keys = self.keys[layer]
        values = self.values[layer]
        keys[row_numbers, :, positions] = new_keys[:, :, 0]
        values[row_numbers, :, positions] = new_values[:, :, 0]
        return keys[:rows, :, :span], values[:rows, :, :span]

    def _capture(self, rows, span):
        """Record one step as a CUDA graph (PyTorch's notes on CUDA semantics, "CUDA Graphs").

        A run before it loads the kernels and makes the libraries' handles and workspaces, which
        cannot be done while recording. It has to be on another stream than the default one; the
        same one records, since handles and shared memory belong to a stream. Both runs write what
        the replay will write again. All graphs share their scratch memory: they run one after
        another, and nothing in it is needed after a replay, `hidden` having been copied out.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self._compute(rows, span)
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, NCCL's for example: "thread_local" lets them.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            self._compute(rows, span)
        return graph


def step_masks(positions, span, windows, dtype=torch.bool):
    """What each row's new token may look at: (B, 1, 1, span), for all heads.

    positions (B,): where the new tokens are; span: how many positions attention gets; windows: see
    `layer_windows`. One mask for all layers, or a dict of one for each kind of layer. A bool mask
    is turned into numbers by every layer again; of a float dtype it holds them, 0 and -inf.
    """
    columns = torch.arange(span, device=positions.device)
    age = positions[:, None] - columns  # (B, span): how far back; below 0 nothing is there
    masks = {}
    for kind, window in windows.items():
        visible = age >= 0
        if window is not None:
            visible &= age < window
        mask = visible[:, None, None]
        if dtype != torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
        masks[kind] = mask
    return masks.get(None, masks)


# CHOICE: four spans to each doubling. Attention then reads at most a quarter more than it needs,
# and rows of 8,192 tokens want 16 graphs, each captured in a fraction of a second.
def span_bucket(length):
    """A length in tokens, rounded up to one of a few.

    >>> [span_bucket(n) for n in (1, 256, 257, 1025, 2049, 8192, 8193)]
    [256, 256, 512, 1280, 2560, 8192, 10240]
    """
    quarter = power_of_two(length) // 8  # of the power of two below
    return round_up(length, max(quarter, SMALLEST_SPAN))


def power_of_two(n):
    """n, rounded up to a power of two.

    >>> [power_of_two(n) for n in (1, 2, 3, 48)]
    [1, 2, 4, 64]
    """
    return 1 << (n - 1).bit_length()


def round_up(n, step):
    """n, rounded up to a multiple of `step`.

    >>> round_up(257, 256)
    512
    """
    return -(-n // step) * step


def prefill_batches(prefixes, budget):
    """Yield lists of prefixes whose padded batch has at most `budget` tokens, or of a single one.

    Prefixes of like length come together, the longest first.

    >>> list(prefill_batches(["a", "bbbb", "ccc", "dddddddd"], budget=8))
    [['dddddddd'], ['bbbb', 'ccc'], ['a']]
    """
    batch = []
    for prefix in sorted(prefixes, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(prefix)
    if batch:
        yield batch
