"""The shape of a model, from its config alone, and the memory that it takes."""
from pathlib import Path
from typing import NamedTuple

from launch.assumptions import FRAMEWORK, FRAMEWORK_CPU, PUBLIC_CONFIGS
from support.errors import InputError
from support.files import read_json
from support.fused_head import chunk_sizes
from support.hub import model_folder


class Shape(NamedTuple):
    """A dense decoder as Llama, Qwen2 and Qwen3 are."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    context: int
    biases: bool        # of the projections to queries, keys and values (Qwen2)
    head_norms: bool    # of queries and keys (Qwen3)
    stored: int         # bytes of a number in its files

    @property
    def block(self):
        """Parameters of one block."""
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        attention = 2 * self.hidden * queries + 2 * self.hidden * keys
        if self.biases:
            attention += queries + 2 * keys
        if self.head_norms:
            attention += 2 * self.head_dim
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embeddings(self):
        """Parameters of the input embeddings; the output head has as many unless it is tied."""
        return self.vocab * self.hidden

    @property
    def parameters(self):
        """Parameters in all."""
        matrices = 1 if self.tied else 2
        return self.layers * self.block + matrices * self.embeddings + self.hidden

    @property
    def multiplied(self):
        """Parameters that every token is multiplied with: the head, but no looked-up embedding."""
        return self.layers * self.block + self.embeddings + self.hidden

    def adapters(self, rank):
        """Parameters of adapters of that rank on every linear layer of the blocks."""
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        ends = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        ends += 3 * (self.hidden + self.intermediate)
        return self.layers * rank * ends

    def kv_bytes(self, itemsize):
        """Bytes of the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


def shape_of_config(config, name):
    """The Shape that a config.json describes, a dict.

    Raises InputError for a mixture of experts, and where a size is missing.
    """
    if any("expert" in key for key in config):
        raise InputError(f"{name}: a mixture of experts; the plan knows dense models only.")
    sizes = []
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "vocab_size", "max_position_embeddings"):
        if key not in config:
            raise InputError(f"{name}: its config.json has no {key}, which the plan needs.")
        sizes.append(config[key])
    hidden, layers, heads, intermediate, vocab, context = sizes
    kind = config.get("model_type")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=intermediate,
        vocab=vocab,
        tied=config.get("tie_word_embeddings", False),
        context=context,
        biases=kind == "qwen2" or bool(config.get("attention_bias")),
        head_norms=kind == "qwen3",
        stored=4 if dtype == "float32" else 2,
    )


def config_of(model):
    """The config of a model as a dict: of its directory, as published, or from the hub."""
    folder = Path(model)
    if not folder.is_dir():
        if model in PUBLIC_CONFIGS:
            return PUBLIC_CONFIGS[model]
        try:
            folder = model_folder(model, weights=False)
        except InputError as error:
            message = f"{error} The plan needs the model's config.json, no weights."
            raise InputError(message) from None
    if not (folder / "config.json").is_file():
        raise InputError(f"{model}: no config.json in it, which the plan needs.")
    return read_json(folder / "config.json")


def read_shape(model):
    """The Shape of a model: a directory, or a name on the hub. Reads no weights."""
    return shape_of_config(config_of(model), model)


# -------------------------------------------------------------------------- memory of training

class Needs(NamedTuple):
    """What training takes: of the model, and of one rank at its peak."""
    parameters: int  # of the model, adapters included
    trained: int     # of these, how many are trained
    memory: dict     # kind of memory -> bytes per rank


def training_needs(shape, gpus, micro_tokens, itemsize, checkpointed, lora_rank=0, device="cuda"):
    """The `Needs` of training a model of that shape.

    gpus: ranks; itemsize: bytes of a number of the compute dtype. Activations are what a Llama
    block keeps for its backward pass; the frameworks' own memory is not in it.
    """
    total = trained = shape.parameters
    if lora_rank:
        trained = shape.adapters(lora_rank)
        total += trained
    blocks = shape.layers * shape.block
    if lora_rank:
        blocks += trained
    outside = total - blocks

    # FSDP holds the root and two blocks gathered; autocast holds a cast copy of what is trained.
    gathered = 0
    if gpus > 1:
        gathered = itemsize * (outside + 2 * blocks / shape.layers)
    elif itemsize < 4:
        gathered = itemsize * trained

    gradients = 4 * trained / gpus
    if not lora_rank and gpus == 1:
        gradients += 4 * shape.embeddings  # `TokenLogps` sums the head's gradient in float32
    elif not lora_rank:
        # Of the root before sharding: as computed, and in float32 to be summed over ranks.
        gradients += (itemsize + 4) * outside

    chunk, waiting = chunk_sizes(device, shape.vocab)
    scored = micro_tokens // 2  # CHOICE: half of the tokens are suffixes
    logits = 8 * shape.vocab * min(chunk, scored)
    logits += 4 * min(waiting, scored * shape.vocab)

    memory = {
        "weights": (4 * trained + (total - trained) * itemsize) / gpus,
        "gathered": gathered,
        "gradients": gradients,
        "optimizer": 8 * trained / gpus,
        "activations": micro_tokens * token_bytes(shape, itemsize, checkpointed),
        "logits": logits,
    }
    return Needs(total, trained, memory)


def token_bytes(shape, itemsize, checkpointed):
    """Bytes that the blocks of a model keep of one token for the backward pass."""
    keys_and_values = shape.kv_heads * shape.head_dim
    numbers = 9 * shape.hidden + 4 * keys_and_values + 4 * shape.intermediate
    one_block = itemsize * numbers
    if itemsize < 4:
        one_block += 8 * shape.hidden  # the norms compute in float32
    all_blocks = one_block * shape.layers
    if checkpointed:
        # Each block's input, and one block at a time in full.
        all_blocks = itemsize * shape.hidden * shape.layers + one_block
    return all_blocks + 2 * itemsize * shape.intermediate


def operations(shape, lora_rank=0, checkpointed=False):
    """Arithmetic operations of training on one token; a forward pass alone takes 2 a parameter."""
    passes = 4 if lora_rank else 6  # frozen weights need no gradient of their own
    if checkpointed:
        passes += 2  # the forward pass again
    return passes * shape.multiplied


# -------------------------------------------------------------------------- memory of sampling

def sampling_memory(shape, rows, tokens, itemsize, device="cuda"):
    """Bytes of a model that is sampled here: weights, keys and values of full rows, logits."""
    weights = itemsize * shape.parameters
    slots = rows * tokens * shape.kv_bytes(itemsize)
    logits = 12 * rows * shape.vocab  # float32: logits, probabilities and their order
    return weights + slots + logits + framework(device)


def framework(device):
    """Bytes that torch takes besides."""
    return FRAMEWORK if device == "cuda" else FRAMEWORK_CPU
