"""What it costs to sample completions and to have them judged: seconds, memory, dollars."""
import math
from typing import NamedTuple

from launch import assumptions as assumed
from launch.assumptions import CPU, Hardware
from launch.shape import sampling_memory
from launch.speed import (
    Row,
    engine_speed,
    hardware_named,
    in_waves,
    lengths_of,
    local_speed,
    measured_speed,
    sampling_seconds,
)
from launch.stages import (
    ALONE,
    BY_RULES,
    ENGINE,
    ENGINE_BESIDE_JUDGE,
    JUDGE,
    JUDGE_BESIDE_ENGINE,
    processes_of,
)
from support.batch_size import ON_CPU, longest_row, rows_that_fit
from support.engine import split_gpus
from support.errors import InputError
from support.gpus import visible_gpus
from support.guards import judge_kind


class Machine(NamedTuple):
    """The machine that is planned for: `gpus` of one kind, or a CPU (0)."""
    name: str
    hardware: Hardware
    gpus: int
    memory: float         # of each GPU, bytes
    judge_gpus: int = 1   # those of a judge that is served here
    separate: bool = True  # a process for each stage

    @property
    def device(self):
        """The kind of device, as torch names it."""
        return "cuda" if self.gpus else "cpu"

    @property
    def itemsize(self):
        """Bytes of a number of a model that is sampled or trained with --dtype auto."""
        return 2 if self.gpus else 4


def machine_of(options):
    """The Machine of the runner's options: the one named by --gpu and --gpus, else this one.

    Raises InputError for a GPU that the plan does not know.
    """
    ours = {"judge_gpus": options.judge_gpus, "separate": options.separate}
    if options.gpu:
        hardware = hardware_named(options.gpu)
        return Machine(options.gpu, hardware, options.gpus or 1, hardware.memory, **ours)
    found = visible_gpus()
    if found:
        name = found[0].name
        memory = min(gpu.total for gpu in found)
        return Machine(name, hardware_named(name), options.gpus or len(found), memory, **ours)
    if options.gpus:
        raise InputError("--gpus without --gpu NAME (PLAN_GPU=H100): there is no GPU here whose "
                         "kind could be taken.")
    return Machine("CPU", CPU, 0, CPU.memory, **ours)


class Cost(NamedTuple):
    """Seconds by activity, and what else a part of a stage takes."""
    seconds: dict
    where: str = ""
    sampled: float = 0
    read: float = 0
    calls: float = 0
    dollars: float = 0
    memory: float = 0   # bytes of each GPU at the peak
    disk: float = 0     # bytes that stay
    passing: float = 0  # bytes that are removed at the end of the stage


def added(costs):
    """Several Costs, one after another, as one."""
    seconds = {}
    places = []
    for cost in costs:
        for activity, number in cost.seconds.items():
            seconds[activity] = seconds.get(activity, 0) + number
        if cost.where and cost.where not in places:
            places.append(cost.where)
    numbers = {}
    for field in ("sampled", "read", "calls", "dollars", "disk"):
        numbers[field] = sum(getattr(cost, field) for cost in costs)
    for field in ("memory", "passing"):  # given back after each
        numbers[field] = max((getattr(cost, field) for cost in costs), default=0)
    return Cost(seconds, " + ".join(places), **numbers)


# ------------------------------------------------------------------------------------- sampling

class Sampling(NamedTuple):
    """Completions that a stage samples."""
    lengths: list   # tokens of each
    prefix: float   # tokens before each
    prefixes: int   # how many different ones are computed


def completions(count, mean, prefix, prefixes, flags, world, loops=None):
    """The Sampling of `count` completions of a mean length, cut at --max-new-tokens."""
    profile = world.profile
    if loops is None:
        loops = profile.loops
    lengths = lengths_of(round(count), mean, profile.spread, loops, flags.max_new_tokens)
    return Sampling(lengths, prefix, round(prefixes))


def sampling_cost(parts, stage, world):
    """The Cost of sampling some Samplings with a stage's flags, one after another."""
    flags = stage.flags
    if flags.server:
        where, seconds_of, memory = _by_server(stage, world, parts)
    else:
        where, seconds_of, memory = _here(stage, world, parts)
    sampled = read = seconds = 0
    for part in parts:
        sampled += sum(part.lengths)
        read += part.prefix * part.prefixes
        seconds += seconds_of(part)
    return Cost({"sampling": seconds}, where, sampled, read, memory=memory)


def _here(stage, world, parts):
    """Sampling in the stage's own processes."""
    machine = world.machine
    shape = world.model(stage.flags.model).shape
    nodes, each = processes_of(stage.command, machine.gpus)
    processes = nodes * each
    beside = judge_memory(world)
    longest = max(part.prefix for part in parts) + stage.flags.max_new_tokens
    longest = min(longest, shape.context)
    slots = slots_of(stage.flags, shape, machine, beside)
    speed = local_speed(shape, machine.hardware, machine.itemsize)
    measurement = world.measurement(shape)
    if measurement:
        speed = measured_speed(measurement, speed)

    def seconds_of(part):
        computed = part.prefixes * (speed.prefix + part.prefix * speed.prefill) / processes
        return computed + in_waves(rows_of(part), slots, processes, speed)

    where = f"{slots} rows"
    if machine.gpus:
        where = f"{processes} x {slots} rows"
    memory = sampling_memory(shape, slots, longest, machine.itemsize, machine.device) + beside
    return where, seconds_of, memory


def slots_of(flags, shape, machine, beside=0):
    """How many rows of a model are sampled together here: --batch-size, a number or "auto".

    beside: bytes of each GPU that a judge's server has.
    """
    if flags.batch_size != "auto":
        return flags.batch_size
    if not machine.gpus:
        return ON_CPU
    itemsize = machine.itemsize
    weights = itemsize * shape.parameters
    kv_bytes = shape.kv_bytes(itemsize)
    return rows_that_fit(machine.memory - beside, weights, kv_bytes, span_of(flags, shape))


def span_of(flags, shape):
    """The most tokens of a row that is sampled with some flags, within the model's context."""
    return min(longest_row(vars(flags)), shape.context)


def rows_of(part):
    """The Rows of a Sampling."""
    return [Row(part.prefix, tokens) for tokens in part.lengths]


def _by_server(stage, world, parts):
    """Sampling at servers: those of the runner, or of somebody else."""
    machine = world.machine
    shape = world.model(stage.flags.model).shape
    hardware = machine.hardware
    memory = machine.memory
    share = ALONE
    if stage.flags.server == ENGINE:
        gpus, _, shared = split_gpus(list(range(machine.gpus)), judge_count(world))
        servers = max(1, len(gpus))
        where = "engine"
        if shared:
            share = ENGINE_BESIDE_JUDGE
    else:
        servers = len(stage.flags.server.split(","))
        where = "server"
        if not machine.gpus:
            hardware = hardware_named("H100")
            memory = hardware.memory
            world.note("The servers of --server are taken for an H100 each; --gpu says otherwise.")
    if 2 * shape.parameters > share * memory:
        world.note(f"{stage.flags.model}: its weights do NOT fit a server's "
                   f"{share * memory / 1e9:.0f} GB, so its times mean nothing.")
    speed = engine_speed(shape, hardware)

    def slots_for(part):
        held = part.prefix + sum(part.lengths) / max(1, len(part.lengths))
        room = share * memory - 2 * shape.parameters - 2e9
        fitting = max(1, int(room / (shape.kv_bytes(2) * held)))
        return max(1, min(stage.flags.in_flight, fitting, assumed.ENGINE_ROWS))

    def seconds_of(part):
        computed = part.prefixes * (speed.prefix + part.prefix * speed.prefill) / servers
        # Each server gets every `servers`-th request.
        rows = rows_of(part)[::servers]
        seconds, _ = sampling_seconds(rows, slots_for(part), speed)
        return computed + seconds

    slots = min(slots_for(part) for part in parts)
    where += f" {servers} x {slots} rows"
    return where, seconds_of, share * memory if machine.gpus else 0


def judge_count(world):
    """How many GPUs a judge that is served here has; 0 where none is in this run."""
    return world.machine.judge_gpus if world.judge_served else 0


def judge_memory(world):
    """Bytes that a judge, while it is held, takes of the GPUs that the stages use themselves."""
    machine = world.machine
    if not machine.gpus or "judge" not in world.held:
        return 0
    return JUDGE_BESIDE_ENGINE * machine.memory


def gpus_as_text(count):
    """
    >>> gpus_as_text(1), gpus_as_text(8)
    ('1 GPU', '8 GPUs')
    """
    return "1 GPU" if count == 1 else f"{count} GPUs"


# --------------------------------------------------------------------------------------- judges

class Judge(NamedTuple):
    """Who answers a stage's questions."""
    kind: str       # rules, api, served or local
    name: str
    guard: bool     # whether it is a guard model, which knows two of our questions only
    in_flight: int
    prices: tuple   # dollars per million tokens sent and received


class Questions(NamedTuple):
    """Questions of one sort: `count` of them about texts of so many tokens."""
    question: str
    count: float
    tokens: float  # of the prompt and of what is judged


def judge_of(flags, spec_flag="judge"):
    """The Judge of a stage's flags; spec_flag: "judge", "eval_judge" or "cue_judge"."""
    spec = getattr(flags, spec_flag, None) or flags.judge
    model = getattr(flags, f"{spec_flag}_model", None) or flags.judge_model or ""
    prices = (flags.judge_price_in, flags.judge_price_out)
    kind = "api"
    if spec.startswith(BY_RULES):
        kind = "rules"
    elif spec == JUDGE:
        kind = "served"
    elif spec.startswith("local:"):
        kind = "local"
        model = spec.removeprefix("local:")
    guard = kind != "rules" and judge_kind(getattr(flags, "judge_kind", "auto"), model) != "chat"
    return Judge(kind, model, guard, flags.judge_concurrency, prices)


def judging_cost(questions, stage, world):
    """The Cost of asking a stage's judges some Questions."""
    flags = stage.flags
    main = judge_of(flags, "eval_judge")
    other = main
    if getattr(flags, "cue_judge", None):
        other = judge_of(flags, "cue_judge")
    costs = []
    for asked in questions:
        judge = other if asked.question == "cue" else main
        costs.append(_cost_of_questions(asked, judge, stage, world))
    total = added(costs)
    return total._replace(where="rules" if main.kind == "rules" else total.where)


def _cost_of_questions(asked, judge, stage, world):
    calls = asked.count
    text = asked.tokens
    fresh = text  # tokens that a server has to compute
    if judge.guard:
        question_tokens = assumed.GUARD_TEMPLATE
        out = assumed.GUARD_OUT
        if asked.question == "cue":
            calls *= assumed.GUARD_CUE_CALLS
            # Up to the cue, on average half of that; each prefix continues the one before it.
            text *= world.profile.cue_at / 2
            fresh = 2 * text / assumed.GUARD_CUE_CALLS
    else:
        question_tokens = assumed.QUESTION_TOKENS[asked.question]
        out = assumed.CHAT_OUT
    if judge.kind == "local" and not judge.guard:
        out = assumed.LOCAL_OUT
    if judge.kind == "rules":
        return Cost({}, "", calls=calls)
    sent = calls * (question_tokens + text)
    received = calls * out
    dollars = (sent * judge.prices[0] + received * judge.prices[1]) / 1e6
    if judge.kind == "api":
        seconds = calls * assumed.API_SECONDS / judge.in_flight
        return Cost({"judging": seconds}, "judge API", 0, sent, calls, dollars)

    shape = world.model(judge.name).shape
    machine = world.machine
    computed = calls * (question_tokens + fresh)
    if judge.kind == "local":
        _, each = processes_of(stage.command, machine.gpus)
        speed = local_speed(shape, machine.hardware, machine.itemsize)
        batches = math.ceil(calls / judge.in_flight / each)
        held = question_tokens + text
        step = speed.step + judge.in_flight * (speed.row + speed.key * held)
        # Batches are not refilled: the longest reply of each counts, twice the mean or so.
        seconds = batches * 2 * out * step + computed * speed.prefill / each
        memory = sampling_memory(shape, judge.in_flight, held + out, machine.itemsize,
                                 machine.device)
        return Cost({"judging": seconds}, "judge here", received, sent, calls, dollars, memory)

    gpus = min(machine.judge_gpus, max(1, machine.gpus))
    hardware = machine.hardware
    speed = engine_speed(shape, hardware)
    step = speed.step + judge.in_flight * (speed.row + speed.key * (question_tokens + text))
    waiting = out * step + assumed.REQUEST_SECONDS
    seconds = calls * waiting / judge.in_flight + computed * speed.prefill / gpus
    memory = judge_memory(world)
    return Cost({"judging": seconds}, "judge", received, sent, calls, dollars, memory)


def verdict_questions(profile, count, prompt_tokens, tokens, unsafe):
    """[Questions] of `judge_traces` about traces of harmful prompts."""
    reasoning = prompt_tokens + profile.reasoning * tokens
    response = prompt_tokens + (1 - profile.reasoning) * tokens
    return [
        Questions("reasoning", count, reasoning),
        Questions("response", count * (1 - profile.loops), response),
        Questions("cue", count * unsafe, reasoning),
    ]


def compliance_questions(profile, count, prompt_tokens, tokens, loops=None):
    """[Questions] about the responses to prompts that should be answered, if they are complete."""
    loops = profile.loops if loops is None else loops
    response = prompt_tokens + (1 - profile.reasoning) * tokens
    return [Questions("compliance", count * (1 - loops), response)]
