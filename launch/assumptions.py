"""All numbers that the plan of a run rests on, each with its source.

Three kinds of source: published (a data sheet, a paper, a model's own config.json), measured here
(on the embedded world, or on two cores of an AMD EPYC), and assumed, which no run of ours has
confirmed. `bash run.sh plan --measure` replaces the speeds of this process by measured ones.
"""
from typing import NamedTuple

# ------------------------------------------------------------------------------------- hardware


class Hardware(NamedTuple):
    """One GPU, or the CPU."""
    bandwidth: float  # of its memory, bytes/s
    flops: float      # dense arithmetic in bfloat16 (CPU: float32), operations/s
    memory: float     # bytes
    link: float       # to another GPU of the same machine, bytes/s


# Published: NVIDIA's data sheets, dense bfloat16 without sparsity. Links: NVLink in one direction,
# and 25 GB/s of PCI Express where there is no NVLink.
GPUS = {
    "H200": Hardware(4.8e12, 989e12, 141e9, 450e9),
    "H100 PCIe": Hardware(2.0e12, 756e12, 80e9, 25e9),
    "H100": Hardware(3.35e12, 989e12, 80e9, 450e9),
    "A100": Hardware(2.0e12, 312e12, 80e9, 300e9),
    "RTX 4090": Hardware(1.01e12, 165e12, 24e9, 25e9),
    "L4": Hardware(0.3e12, 121e12, 24e9, 25e9),
}
# Measured on two cores: training the embedded model reaches 50 GFLOP/s. Memory: assumed.
CPU = Hardware(20e9, 50e9, 16e9, 1e9)
# Assumed: 400 Gbit/s of network for each GPU, of which half is reached.
NODE_LINK = 25e9     # bytes/s
FREE_SHARE = 0.92    # CHOICE: of a GPU's memory; the rest is for kernels and fragmentation
FRAMEWORK = 1.5e9    # bytes that torch and CUDA's own libraries take of a GPU; assumed
FRAMEWORK_CPU = 0.5e9  # measured: a stage of the embedded model

# ------------------------------------------------------------------------------ speed of training

# Assumed: share of the peak that training reaches, the recomputation of activations counted as
# work. Published figures for 8B models under FSDP are 0.4 to 0.5; trees have smaller kernels.
TRAINING_MFU = 0.35
TRAINING_CPU = 1.0   # CPU.flops is what was measured in training

# ------------------------------------------------------------------------------ speed of sampling

# A decode step reads all weights and each row's keys and values, and costs some time besides.
BANDWIDTH_SHARE = 0.75    # assumed: of the memory's bandwidth that is reached
PREFILL_MFU = 0.4         # assumed
# In this process, with CUDA graphs (support/graph_slots.py); assumed, never run on a GPU.
GRAPH_STEP = 3e-3         # s a step: choosing tokens, one copy to the GPU and one back
GRAPH_LAYER = 50e-6       # s a layer: about 15 small kernels
GRAPH_ROW = 15e-6         # s a row: Python's part
PREFILL_CALL = 1e-3       # s a layer and prefix: a forward pass outside a graph, started by Python
# In this process on a CPU; measured on two cores with the embedded model.
CPU_STEP = 0.1e-3         # s a step
CPU_LAYER = 0.2e-3        # s a layer
CPU_ROW = 15e-6           # s a row
CPU_ROW_SHARE = 0.9       # of CPU.flops, in the matrix products of a row
# Served: chosen so that 256 rows of an 8B model on an H100 give about 7,500 tokens/s, which is what
# vLLM's users report; a lone row then gets about 110 tokens/s.
ENGINE_STEP = 2.5e-3      # s a step
ENGINE_ROW = 60e-6        # s a row
ENGINE_ROWS = 256         # the most that a server of one GPU computes together (vLLM's default)

# -------------------------------------------------------------------------------------- starting

PYTHON_START = 15.0       # s: Python, torch, CUDA; assumed
TOY_START = 4.0           # s, once: all stages of the embedded model share a process; measured
TOY_STAGE = 0.3           # s a stage; measured
ENGINE_START = 90.0       # s besides reading the weights: compiling, capturing graphs; assumed
READING = 1.5e9           # bytes/s at which weights come from the disk; assumed

# ---------------------------------------------------------------------------------------- judges

API_SECONDS = 1.5         # s a call to a paid API: 500 tokens in, 40 out; assumed
REQUEST_SECONDS = 0.02    # s a call to a server of our own, besides its computing; assumed
CHAT_OUT = 40             # tokens of a reply: {"reason": one sentence, "answer": ...}; assumed
LOCAL_OUT = 500           # a reasoning model in this process thinks before it answers; assumed
GUARD_OUT = 20            # three lines; from Qwen3Guard's model card
GUARD_TEMPLATE = 350      # tokens of Qwen3Guard's own instructions; from its chat template, about
# Tokens of our questions, from prompts/judge_*.txt at four characters each.
QUESTION_TOKENS = {
    "reasoning": 207,
    "response": 176,
    "cue": 314,
    "compliance": 172,
    "strongreject": 278,
}
# A guard names no cue: it is asked about the first n steps, for one n after another, until it says
# unsafe. Assumed: so many calls for each cue; a server keeps the keys of what it has read.
GUARD_CUE_CALLS = 12

# ------------------------------------------------------------------------------------------ disk

# Measured on the files of the embedded world, per token or per record.
TRACE_BYTES = 12          # a token of a trace: as a number, and as text
RECORD_BYTES = 250        # a trace, besides its tokens
STEP_BYTES = 4            # a token of the reasoning, in the steps' file
VERDICT_BYTES = 90
PAIR_BYTES = 10           # a token of a pair
CACHED_VERDICT = 300      # an answer in judge_cache.jsonl; assumed

# ------------------------------------------------------------------------- what the models write


class Profile(NamedTuple):
    """Lengths (tokens) and shares of a kind of model. Pairs: base, after stage 1, after stage 2."""
    source: str
    template: int         # tokens of the chat template around a prompt
    characters: float     # of a prompt to a token
    tokens: dict          # name or kind of a set -> mean length of a completion, loops left out
    trained_tokens: float  # a trained model's completion of a harmful prompt, against the base's
    loops: float          # share of completions that never end
    spread: float         # of lengths: standard deviation of their logarithm
    reasoning: float      # share of a completion that is reasoning
    unsafe: tuple         # share of harmful prompts' completions with unsafe reasoning
    cue: float            # share of these in which a cue is found
    cue_at: float         # where, as a share of the completion
    trigger: int          # tokens
    continuation: int     # tokens that the model writes after a trigger
    chosen: int           # tokens of a pair's chosen side, trigger included
    safe_after: float     # share of interventions that give a pair
    unsafe_after: float   # share of interventions after which the reasoning is unsafe
    answered: float       # share of benign prompts that the base model answers in full
    refused: float        # share of these that the model of stage 1 refuses
    reverse_at: float     # where a trigger is put into an answer, as a share of it
    reversed_tokens: int  # tokens that the model writes after it
    reversed_share: float  # share of these that become pairs


# Assumed, except where a source is named: no full-size run of ours exists. Shares of unsafe
# reasoning: arXiv 2509.24393, DeepSeek-R1-Distill-Llama-8B before and after IPO (means of three
# sets); after stage 1 the same is taken as after stage 2.
REASONING_MODEL = Profile(
    source="assumed for a reasoning model; shares of unsafe reasoning from arXiv 2509.24393",
    template=10,
    characters=4.0,
    tokens={
        "harmful": 1000,
        "benign": 700,
        "xstest": 700,
        "task": 2800,
        "math": 2800,       # MATH-500
        "aime24": 6500,     # at a limit of 8,192; more at 32,768
        "choice": 5000,     # GPQA
        "code": 3000,       # HumanEval
    },
    trained_tokens=1.0,
    loops=0.02,
    spread=0.6,
    reasoning=0.65,
    unsafe=(0.715, 0.153, 0.153),
    cue=0.9,
    cue_at=0.3,
    trigger=15,
    continuation=600,
    chosen=615,
    safe_after=0.7,
    unsafe_after=0.25,
    answered=0.95,
    refused=0.2,
    reverse_at=0.2,
    reversed_tokens=500,
    reversed_share=0.6,
)

# Measured on the embedded world: the files of one default run.
TOY_MODEL = Profile(
    source="measured on the embedded world",
    template=2,
    characters=2.9,
    tokens={"harmful": 133, "benign": 108, "task": 111},
    trained_tokens=0.93,
    loops=0.0,
    spread=0.2,
    reasoning=0.81,
    unsafe=(0.85, 0.06, 0.003),
    cue=1.0,
    cue_at=0.52,
    trigger=18,
    continuation=61,
    chosen=64,
    safe_after=0.58,
    unsafe_after=0.42,
    answered=1.0,
    refused=0.055,
    reverse_at=0.43,
    reversed_tokens=49,
    reversed_share=0.87,
)

# ------------------------------------------------------------------- what need not be fetched yet


class PublicFile(NamedTuple):
    """A published file of prompts."""
    prompts: int
    tokens: int  # of a prompt, about


# Numbers of rows: published, as benchmarks/sets.py checks them. Lengths: assumed.
PUBLIC_PROMPTS = {
    "star1": PublicFile(1000, 60),
    "star-benign-915": PublicFile(915, 60),
    "jbb": PublicFile(100, 25),
    "jbb-benign": PublicFile(100, 25),
    "strongreject": PublicFile(313, 35),
    "wildjailbreak": PublicFile(250, 180),
    "xstest": PublicFile(450, 20),
    "math500": PublicFile(500, 90),
    "aime24": PublicFile(30, 130),
    "gpqa-diamond": PublicFile(198, 300),
    "humaneval": PublicFile(164, 250),
}

# Published: each model's own config.json, so that a plan needs no connection.
_QWEN3 = {
    "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936,
    "dtype": "bfloat16",
}
_QWEN3_06B = {
    **_QWEN3, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
    "intermediate_size": 3072, "tie_word_embeddings": True, "max_position_embeddings": 40960,
}
_QWEN3_17B = {**_QWEN3_06B, "hidden_size": 2048, "intermediate_size": 6144}
_QWEN3_4B = {
    **_QWEN3, "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32,
    "intermediate_size": 9728, "tie_word_embeddings": True, "max_position_embeddings": 40960,
}
_QWEN3_8B = {
    **_QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False,
}
_LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
    "max_position_embeddings": 131072, "dtype": "bfloat16",
}
PUBLIC_CONFIGS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
        "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
        "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
        "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    },
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA_8B,
    "meta-llama/Llama-Guard-3-8B": _LLAMA_8B,
    "Qwen/Qwen3-0.6B": _QWEN3_06B,
    "Qwen/Qwen3-1.7B": _QWEN3_17B,
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3Guard-Gen-0.6B": _QWEN3_06B,
    "Qwen/Qwen3Guard-Gen-4B": _QWEN3_4B,
    "Qwen/Qwen3Guard-Gen-8B": _QWEN3_8B,
}
