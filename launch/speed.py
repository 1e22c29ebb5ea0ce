"""How fast a model is sampled and trained on some hardware: in this process, or in a server."""
import heapq
import math
import random
import re
from pathlib import Path
from typing import NamedTuple

from launch import assumptions as assumed
from launch.assumptions import CPU, GPUS
from launch.shape import operations
from support.errors import InputError
from support.files import read_json
from support.waves import DRAIN


def hardware_named(name):
    """The Hardware of a GPU, by a name such as "H100" or "NVIDIA H100 80GB HBM3".

    Raises InputError for one that is not in the table.

    >>> hardware_named("NVIDIA GeForce RTX 4090").memory
    24000000000.0
    """
    for known, hardware in GPUS.items():
        words = known.replace(" ", " ?")
        if re.search(rf"\b{words}\b", name, re.IGNORECASE):
            return hardware
    raise InputError(f"{name}: the plan does not know this GPU. It knows {', '.join(GPUS)}; name "
                     "the one nearest to yours with --gpu (PLAN_GPU=...).")


# ------------------------------------------------------------------------- one step of sampling

class Speed(NamedTuple):
    """Seconds that sampling takes: of a decode step, `step + row * rows` and the reading of keys.

    `key` is per token that attention reads; `padded` says whether every row reads as many as the
    longest one, and whether as many rows are computed as the next power of two.
    """
    step: float
    row: float
    key: float
    padded: bool
    prefix: float   # a prefix that is computed
    prefill: float  # a token of it


def local_speed(shape, hardware, itemsize):
    """The Speed of sampling in this process."""
    if hardware is CPU:
        operations_of_row = 2 * shape.multiplied
        step = assumed.CPU_STEP + assumed.CPU_LAYER * shape.layers
        step += itemsize * shape.multiplied / CPU.bandwidth
        row = assumed.CPU_ROW + operations_of_row / (assumed.CPU_ROW_SHARE * CPU.flops)
        key = shape.kv_bytes(itemsize) / CPU.bandwidth
        prefill = operations_of_row / CPU.flops
        return Speed(step, row, key, True, assumed.CPU_LAYER * shape.layers, prefill)
    bandwidth = assumed.BANDWIDTH_SHARE * hardware.bandwidth
    step = assumed.GRAPH_STEP + assumed.GRAPH_LAYER * shape.layers
    step += itemsize * shape.multiplied / bandwidth
    # Attention under a mask gets keys repeated for each query head: read, written, read again.
    copies = 1
    if shape.heads > shape.kv_heads:
        copies += 2 * shape.heads / shape.kv_heads
    key = copies * shape.kv_bytes(itemsize) / bandwidth
    prefix = assumed.PREFILL_CALL * shape.layers
    return Speed(step, assumed.GRAPH_ROW, key, True, prefix, prefill_seconds(shape, hardware))


def engine_speed(shape, hardware):
    """The Speed of sampling in a server (vLLM, SGLang) on one GPU, in bfloat16."""
    bandwidth = assumed.BANDWIDTH_SHARE * hardware.bandwidth
    step = assumed.ENGINE_STEP + 2 * shape.multiplied / bandwidth
    key = shape.kv_bytes(2) / bandwidth
    return Speed(step, assumed.ENGINE_ROW, key, False, 0.0, prefill_seconds(shape, hardware))


def prefill_seconds(shape, hardware):
    """Seconds to compute a token of a long prefix."""
    return 2 * shape.multiplied / (assumed.PREFILL_MFU * hardware.flops)


# ------------------------------------------------------------------------------- whole requests

def lengths_of(count, mean, spread, loops, limit):
    """`count` lengths in tokens, always the same ones: lognormal about `mean`, and some at `limit`.

    >>> lengths_of(4, 10, 0.0, 0.25, 99)
    [10, 10, 10, 99]
    """
    rng = random.Random(0)
    lengths = []
    for number in range(count):
        # Every 1 / loops-th never ends.
        if int((number + 1) * loops) > int(number * loops):
            lengths.append(limit)
            continue
        drawn = mean * math.exp(rng.gauss(0, spread) - spread ** 2 / 2)
        lengths.append(max(1, min(limit, round(drawn))))
    return lengths


class Row(NamedTuple):
    """A completion to sample: tokens that its row holds before, and tokens to write."""
    held: float
    tokens: int


def sampling_seconds(rows, slots, speed, drain=None):
    """(seconds to sample some Rows, those that were put aside, as Rows).

    Each of `slots` takes the next row when its own is finished. `drain` steps after none is waiting
    any more the unfinished ones are put aside; None: never.

    >>> lone = Speed(step=1.0, row=0.0, key=0.0, padded=False, prefix=0.0, prefill=0.0)
    >>> rows = [Row(0, 9), Row(0, 1), Row(0, 1)]
    >>> sampling_seconds(rows, 2, lone)
    (9.0, [])
    >>> sampling_seconds(rows, 2, lone, drain=3)
    (4.0, [Row(held=4, tokens=5)])
    """
    active = []  # a heap of (step at which a row ends, tokens it would have held at step 0)
    next_row = 0
    now = 0
    seconds = 0.0
    last = None  # the step at which rows are put aside
    while True:
        while next_row < len(rows) and len(active) < slots:
            row = rows[next_row]
            heapq.heappush(active, (now + row.tokens, row.held - now))
            next_row += 1
        if not active:
            return seconds, []
        if next_row == len(rows) and last is None and drain is not None:
            last = now + drain
        until = active[0][0]
        if last is not None:
            until = min(until, last)
        seconds += (until - now) * _step_seconds(active, (now + until) / 2, slots, speed)
        now = until
        while active and active[0][0] <= now:
            heapq.heappop(active)
        if now == last:
            return seconds, [Row(start + now, end - now) for end, start in active]


def _step_seconds(active, step, slots, speed):
    """Seconds of one decode step of the active rows."""
    starts = [start for _, start in active]
    count = len(active)
    if speed.padded:
        computed = min(slots, 1 << (count - 1).bit_length())
        keys = computed * (max(starts) + step)
    else:
        keys = sum(starts) + count * step
    return speed.step + speed.row * count + speed.key * keys


def in_waves(rows, slots, processes, speed):
    """Seconds until `processes` have sampled some Rows as `model.sample` does.

    Waves are 4 * `slots` rows; process after process takes the next one. What each wave puts aside
    comes after all others, in waves of its own.
    """
    busy = [0.0] * processes
    drain = DRAIN if len(rows) > 4 * slots else None
    aside = []
    while rows:
        for start in range(0, len(rows), 4 * slots):
            wave = rows[start:start + 4 * slots]
            seconds, left = sampling_seconds(wave, slots, speed, drain)
            lightest = busy.index(min(busy))
            busy[lightest] += seconds
            aside += left
        rows = aside
        # They start with all that they have written, which is computed again.
        computed = sum(speed.prefix + speed.prefill * row.held for row in rows)
        busy = [seconds + computed / processes for seconds in busy]
        aside = []
        drain = None
    return max(busy)


# -------------------------------------------------------------------------------------- training

def training_rate(shape, hardware, processes, nodes, micro_tokens, lora_rank, checkpointed):
    """Tokens/s of training on `processes` GPUs in all, on `nodes` machines.

    Each micro-batch gathers all weights twice in bfloat16 and reduces gradients in float32 while
    others compute; the slower of the two decides.
    """
    rate = assumed.TRAINING_MFU * hardware.flops
    if hardware is CPU:
        return assumed.TRAINING_CPU * hardware.flops / operations(shape, lora_rank, checkpointed)
    computing = micro_tokens * operations(shape, lora_rank, checkpointed) / rate
    if processes == 1:
        return micro_tokens / computing
    gradients = 4 * (shape.adapters(lora_rank) if lora_rank else shape.parameters)
    link = assumed.NODE_LINK if nodes > 1 else hardware.link
    moving = (2 * 2 * shape.parameters + gradients) / (0.7 * link)
    return processes * micro_tokens / max(computing, moving)


# --------------------------------------------------------------------------- what was measured

MACHINE_FILE = Path("runs/machine.json")


class Measurement(NamedTuple):
    """Speeds of one shape of model on one kind of device (launch/measure.py)."""
    device: str      # "CPU", or the GPU's name
    torch: str       # version
    dtype: str
    shape: list      # the fields of a Shape
    layers: list     # numbers of layers that were measured; fewer than the shape's: extrapolated
    steps: list      # [rows, seconds of a decode step], at `held` tokens a row
    held: int
    prefill: float   # seconds a token of a prefix
    training: dict   # "LoRA rank, activations recomputed" -> tokens/s of one process


def read_measurements(path=MACHINE_FILE):
    """[Measurement] of this machine; [] where nothing was measured."""
    if not Path(path).is_file():
        return []
    fields = read_json(path, "measurements")["measurements"]
    return [Measurement(**one) for one in fields]


def measurement_for(measurements, shape, name, hardware):
    """The Measurement of that shape on that kind of device; None if there is none."""
    for one in measurements:
        same_device = one.device == name
        if hardware is not CPU and one.device != "CPU":
            same_device = hardware_named(one.device) == hardware
        if same_device and one.shape == list(shape):
            return one
    return None


def measured_speed(measurement, assumed_speed):
    """The Speed that a Measurement shows; reading longer keys costs what is assumed.

    >>> steps = [[1, 2.0], [64, 65.0]]
    >>> one = Measurement("CPU", "", "float32", [], [], steps, 0, 0.5, {})
    >>> measured_speed(one, Speed(9.0, 9.0, 0.0, True, 0.1, 9.0))
    Speed(step=1.0, row=1.0, key=0.0, padded=True, prefix=0.1, prefill=0.5)
    """
    few, of_few = measurement.steps[0]
    many, of_many = measurement.steps[-1]
    row = max(0.0, (of_many - of_few) / (many - few))
    step = max(0.0, of_few - few * row)
    # What the keys cost there is in `row` already.
    row = max(0.0, row - assumed_speed.key * measurement.held)
    return assumed_speed._replace(step=step, row=row, prefill=measurement.prefill)


def training_key(lora_rank, checkpointed):
    """The name of a way of training in `Measurement.training`."""
    return f"{lora_rank}, {'recomputed' if checkpointed else 'kept'}"
