"""How fast this machine samples and trains models of the run's shapes, with the project's own code.

    bash run.sh plan --measure

The weights are random, so nothing is fetched but config.json. A model of many layers is measured
with a few of them, twice, and extrapolated. The result is kept in runs/machine.json, where the plan
finds it.
"""
import functools
import random
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from data import Request
from ipo import Policy, pair_losses, take_step
from launch.costs import machine_of
from launch.shape import Shape, config_of, sampling_memory, shape_of_config, training_needs
from launch.speed import MACHINE_FILE, Measurement, read_measurements, training_key
from model import pick_device, pick_dtype, sample
from support.errors import InputError
from support.files import write_json
from support.lora import LoRA, add_adapters

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# CHOICE: enough steps to time one, few enough for a minute in all.
ROWS = (1, 16, 64)
# Random weights know nothing: at temperature 1 thousands of tokens would be likely, and be sorted.
TEMPERATURE = 0.01
PREFIX = 128         # tokens before the sampled ones
FEW = 4              # steps of the shorter of two runs, whose difference is timed
MANY = 104           # of the longer one, or fewer where they take long; one span of a CUDA graph
ENOUGH = 2.0         # s that the longer one may take
REPEATS = 3          # of everything that is timed
PREFILL_TOKENS = 512
PREFILL_PREFIXES = 8
PAIR_TOKENS = (256, 128, 128)  # prefix, chosen, rejected
SOME_LAYERS = (2, 6)  # of a model with more than ALL_LAYERS
ALL_LAYERS = 8


def measure(stages, options):
    """Measure every shape of model that the stages sample or train in this process."""
    here = machine_of(options)
    if options.gpu:
        raise InputError("--measure is about this machine; leave --gpu out.")
    kept = read_measurements()
    done = []
    for stage in stages:
        if not (stage.samples or stage.trains):
            continue
        model = stage.flags.model
        try:
            config = config_of(model)
        except InputError:
            if any(model == getattr(other.flags, "out", None) for other in stages):
                continue  # a stage will write it, of the shape that it starts from
            raise
        shape = shape_of_config(config, model)
        if shape in done:
            continue
        done.append(shape)
        trainings = ways_of_training(stages)
        started = time.monotonic()
        print(f"{model}: measuring on {here.name}", flush=True)
        found = measured(config, shape, here, trainings)
        print_measurement(found)
        print(f"measured in {time.monotonic() - started:.0f} s", flush=True)
        same = (found.device, found.shape, found.dtype)
        kept = [one for one in kept if (one.device, one.shape, one.dtype) != same]
        kept.append(found)
    MACHINE_FILE.parent.mkdir(parents=True, exist_ok=True)
    write_json(MACHINE_FILE, {"measurements": [one._asdict() for one in kept]})
    print(f"kept in {MACHINE_FILE}")


def ways_of_training(stages):
    """[(LoRA rank, whether activations are recomputed)] of the stages that train, each once."""
    ways = []
    for stage in stages:
        if stage.trains:
            way = (stage.flags.lora_rank, stage.flags.checkpoint_activations)
            if way not in ways:
                ways.append(way)
    return ways


def measured(config, shape, machine, trainings):
    """The Measurement of a model with that config, a dict, on this machine."""
    device = pick_device()
    dtype = pick_dtype("auto", device)
    counts = SOME_LAYERS if shape.layers > ALL_LAYERS else (shape.layers,)
    by_layers = []  # for each count of layers: all that is timed
    for layers in counts:
        timed = {}
        lm = random_model(config, layers, dtype, device)
        most = rows_to_measure(shape._replace(layers=layers), machine)
        for rows in ROWS:
            if rows <= most:
                timed[rows] = step_seconds(lm, rows)
        timed["prefill"] = prefill_seconds(lm)
        del lm
        for way in trainings:
            rank, checkpointed = way
            if training_fits(shape._replace(layers=layers), machine, *way):
                timed[training_key(*way)] = training_seconds(
                    config, layers, dtype, device, rank, checkpointed)
        by_layers.append(timed)
    in_full = {}
    for name in by_layers[0]:
        if all(name in timed for timed in by_layers):
            seconds = [timed[name] for timed in by_layers]
            in_full[name] = extrapolated(counts, seconds, shape.layers)
    return Measurement(
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        torch=torch.__version__,
        dtype=str(dtype).removeprefix("torch."),
        shape=list(shape),
        layers=list(counts),
        steps=[[rows, in_full[rows]] for rows in ROWS if rows in in_full],
        held=PREFIX + MANY // 2,
        prefill=in_full["prefill"],
        training={key: 1 / value for key, value in in_full.items() if "," in str(key)},
    )


def extrapolated(layers, values, wanted):
    """The value at `wanted` layers, from those at one or two numbers of layers.

    >>> extrapolated((2, 6), (3.0, 7.0), 32), extrapolated((4,), (1.5,), 4)
    (33.0, 1.5)
    """
    if len(layers) == 1:
        return values[0]
    few, many = layers
    a_layer = max(0.0, (values[1] - values[0]) / (many - few))
    return values[0] + a_layer * (wanted - few)


def rows_to_measure(shape, machine):
    """How many rows of the measured model the memory holds."""
    rows = max(ROWS)
    tokens = PREFIX + MANY
    while rows > 1 and sampling_memory(
            shape, rows, tokens, machine.itemsize, machine.device) > machine.memory / 2:
        rows //= 2
    return rows


def training_fits(shape, machine, rank, checkpointed):
    """Whether the memory holds the training of the measured model."""
    needs = training_needs(
        shape, 1, 4 * sum(PAIR_TOKENS), machine.itemsize, checkpointed, rank, machine.device)
    return sum(needs.memory.values()) < 0.8 * machine.memory


def random_model(config, layers, dtype, device):
    """A model of that config, a dict, with so many layers and random weights."""
    settings = {key: value for key, value in config.items() if key != "layer_types"}
    settings["num_hidden_layers"] = layers
    kind = settings.pop("model_type", None)
    if kind not in CONFIGS:
        raise InputError(f"models of type {kind} cannot be measured, only "
                         f"{', '.join(CONFIGS)}; the plan takes assumed speeds.")
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(
            CONFIGS[kind](**settings), dtype=dtype, attn_implementation="sdpa")
    return lm.eval()


def random_ids(n, vocabulary, seed):
    """`n` random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(n)]


def step_seconds(lm, rows):
    """Seconds of a decode step of so many rows, by `model.sample`."""
    vocabulary = lm.config.vocab_size
    requests = []
    for number in range(rows):
        requests.append(Request(str(number), random_ids(PREFIX, vocabulary, number)))

    def run(steps):
        started = time.monotonic()
        # No id ends a row, so all rows take all steps.
        completions = sample(lm, requests, eos=set(), max_new_tokens=steps, batch_size=rows,
                             temperature=TEMPERATURE)
        for _ in completions:
            pass
        return time.monotonic() - started

    run(FEW)  # loads kernels
    a_step = min(run(FEW), run(FEW)) / FEW
    steps = 2 * FEW + min(MANY - 2 * FEW, int(ENOUGH / a_step))
    # The median, because a hiccup in the shorter run would make a step seem to take no time.
    differences = [run(steps) - run(FEW) for _ in range(REPEATS)]
    return max(1e-6, statistics.median(differences) / (steps - FEW))


def prefill_seconds(lm):
    """Seconds a token of a long prefix."""
    vocabulary = lm.config.vocab_size
    length = min(PREFILL_TOKENS, lm.config.max_position_embeddings // 2)
    requests = []
    for number in range(PREFILL_PREFIXES):
        requests.append(Request(str(number), random_ids(length, vocabulary, number)))

    def run():
        started = time.monotonic()
        completions = sample(lm, requests, eos=set(), max_new_tokens=1,
                             batch_size=PREFILL_PREFIXES, temperature=TEMPERATURE)
        for _ in completions:
            pass
        return time.monotonic() - started

    run()
    return min(run() for _ in range(REPEATS)) / (PREFILL_PREFIXES * length)


def training_seconds(config, layers, dtype, device, rank, checkpointed):
    """Seconds a token of an update by `ipo.take_step`, with the loss of preference training."""
    frozen = dtype if rank else torch.float32
    lm = random_model(config, layers, frozen, device)
    if rank:
        add_adapters(lm, rank)
        fill_adapters(lm, device)
    if checkpointed:
        lm.activation_checkpointing_enable()
    policy = Policy(lm, share=True).train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    autocast = functools.partial(
        torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    pairs = [random_pair(lm.config.vocab_size, seed) for seed in range(4)]
    losses_of = functools.partial(pair_losses, device=device, beta=0.1, sft_weight=0.2)

    def run():
        started = time.monotonic()
        # Reading the gradient's norm waits for the device.
        take_step(policy, optimizer, 1e-6, [pairs], pairs[:1], len(pairs), losses_of, autocast)
        return time.monotonic() - started

    run()
    return min(run() for _ in range(REPEATS)) / (len(pairs) * sum(PAIR_TOKENS))


def fill_adapters(lm, device):
    """Give adapters, which are made without memory, random numbers."""
    for module in lm.modules():
        if isinstance(module, LoRA):
            for name in ("lora_a", "lora_b"):
                made = torch.randn(getattr(module, name).shape, device=device) * 0.01
                setattr(module, name, torch.nn.Parameter(made))


def random_pair(vocabulary, seed):
    """A pair as `pair_losses` takes it, of random tokens."""
    prefix, chosen, rejected = PAIR_TOKENS
    return {
        "prefix_ids": random_ids(prefix, vocabulary, seed),
        "chosen_ids": random_ids(chosen, vocabulary, seed + 100),
        "rejected_ids": random_ids(rejected, vocabulary, seed + 200),
        "n_prompt": 1,
        "ref": [-100.0, -100.0],
    }


def print_measurement(found):
    """Print what was measured."""
    layers = found.shape[Shape._fields.index("layers")]
    if max(found.layers) < layers:
        measured_with = " and ".join(map(str, found.layers))
        print(f"  with {measured_with} of {layers} layers, extrapolated")
    for rows, seconds in found.steps:
        print(f"  {rows} rows: {1000 * seconds:.1f} ms a step, {rows / seconds:,.0f} tokens/s")
    print(f"  prefixes: {1 / found.prefill:,.0f} tokens/s")
    for way, rate in found.training.items():
        print(f"  training (LoRA rank, activations: {way}): {rate:,.0f} tokens/s")
