"""What a run will take, from its stages' flags and the number of prompts: hours, memory, cost.

    bash run.sh plan

Nothing is loaded but config.json of each model, and files of prompts to count them. What the models
will write is assumed (launch/assumptions.py); so are the speeds, unless `bash run.sh plan
--measure` has measured them on this machine.
"""
import math
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

from benchmarks.run import BENCHMARK_KINDS, samples_of_sets
from benchmarks.sets import SETS, records_file
from data import load_prompts
from evaluate import parse_sets
from launch import assumptions as assumed
from launch.assumptions import CPU, PUBLIC_PROMPTS, Hardware
from launch.shape import (
    Shape,
    framework,
    operations,
    read_shape,
    sampling_memory,
    training_needs,
)
from launch.speed import (
    MACHINE_FILE,
    engine_speed,
    hardware_named,
    in_waves,
    Row,
    lengths_of,
    local_speed,
    measured_speed,
    measurement_for,
    read_measurements,
    sampling_seconds,
    training_key,
    training_rate,
)
from support.batch_size import ON_CPU, PROMPT, rows_that_fit
from support.engine import split_gpus
from support.errors import InputError
from support.gpus import visible_gpus
from support.guards import judge_kind

ENGINE = "{engine}"
JUDGE = "{judge}"
EVALUATION = ("evaluate.py run", "benchmarks.run")


# ---------------------------------------------------------------------------- what runs where

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
    judge_gpus = options.judge_gpus
    if options.gpu:
        hardware = hardware_named(options.gpu)
        count = options.gpus or 1
        return Machine(options.gpu, hardware, count, hardware.memory, judge_gpus, options.separate)
    found = visible_gpus()
    if not found:
        if options.gpus:
            raise InputError("--gpus without --gpu NAME (PLAN_GPU=H100): there is no GPU here "
                             "whose kind could be taken.")
        return Machine("CPU", CPU, 0, CPU.memory, judge_gpus, options.separate)
    first = found[0]
    count = options.gpus or len(found)
    memory = min(gpu.total for gpu in found)
    hardware = hardware_named(first.name)
    return Machine(first.name, hardware, count, memory, judge_gpus, options.separate)


def processes_of(command, gpus=1):
    """(machines, processes on each) that a stage's command starts; gpus: those of a machine.

    Raises InputError for a word that is no number.

    >>> processes_of(["python3", "ipo.py", "train"])
    (1, 1)
    >>> processes_of(["srun", "torchrun", "--nnodes", "2", "--nproc-per-node=8", "ipo.py"])
    (2, 8)
    """
    nodes = _number_after(command, "--nnodes", 1)
    return nodes, _number_after(command, "--nproc-per-node", gpus)


def _number_after(command, flag, most):
    for number, word in enumerate(command):
        name, _, value = word.replace("_", "-", 2).partition("=")
        if name != flag:
            continue
        value = os.path.expandvars(value or command[number + 1])
        if value in ("auto", "gpu"):
            return max(1, most)
        if not value.isdigit():
            raise InputError(f"{flag} {value}: the plan needs a number there.")
        return int(value)
    return 1


# ------------------------------------------------------------------- what earlier stages produce

class Traces(NamedTuple):
    """A file of traces."""
    kind: str            # harmful or benign: what their prompts are
    count: int
    prompt_tokens: float  # of each, template included
    tokens: float        # that the model wrote, of each
    trained: int         # 0: by the base model; 1, 2: by that of stage 1, 2


class Pairs(NamedTuple):
    """A file of pairs; tokens of each: of what both sides share, and of either side."""
    count: float
    prefix: float
    chosen: float
    rejected: float


class Model(NamedTuple):
    """A model: its shape, and how many stages of training it has been through."""
    shape: Shape
    trained: int


class World:
    """What has been planned so far: what files hold, which models exist, which servers run."""

    def __init__(self, stages, machine, measurements=()):
        self.machine = machine
        self.profile = profile_of(stages)
        self.made = {}        # path -> Traces or Pairs
        self.models = {}      # name or path -> Model
        self.held = {}        # "engine", "judge" -> the model that it holds
        self.measurements = measurements
        self.used = []        # those of them that the plan rests on
        self.notes = []
        self.missing = {}     # published files that are not here -> their prompts
        self.first = True     # whether no stage has started yet

    def measurement(self, shape):
        """The Measurement of a model of that shape on the machine; None if there is none."""
        machine = self.machine
        found = measurement_for(self.measurements, shape, machine.name, machine.hardware)
        if found and found not in self.used:
            self.used.append(found)
        return found

    def note(self, text):
        """A line for the user, once."""
        if text not in self.notes:
            self.notes.append(text)

    def model(self, name):
        """The Model of that name, or that an earlier stage writes there."""
        if name not in self.models:
            trained = len(_stage_numbers(name))
            self.models[name] = Model(read_shape(name), trained)
        return self.models[name]

    def records(self, path, kind):
        """What a file of an earlier stage holds; of one that is there, its lines are counted."""
        if path in self.made:
            return self.made[path]
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file, and no stage before writes it.")
        with open(path, "rb") as file:
            count = sum(1 for _ in file)
        if kind == "pairs":
            return pairs_of_harmful(self.profile, count, self.profile.template + 40)
        tokens = self.profile.tokens[kind]
        return Traces(kind, count, self.profile.template + 40, tokens, 0)


def _stage_numbers(name):
    """What "stage1" or "stage2" at the end of a path says: how often the model was trained."""
    last = Path(name).name
    return range(int(last[5:])) if last in ("stage1", "stage2") else ()


def profile_of(stages):
    """The Profile of what the stages sample: the embedded world's where its rules judge."""
    for stage in stages:
        model = str(getattr(stage.flags, "model", ""))
        judge = str(getattr(stage.flags, "judge", ""))
        if model.startswith("toy/") or judge.startswith("rules"):
            return assumed.TOY_MODEL
    return assumed.REASONING_MODEL


# -------------------------------------------------------------------------------------- prompts

def prompts_in(path, limit, world, name):
    """(number of prompts, mean tokens of one) of a file, or as published where it is not there."""
    profile = world.profile
    if Path(path).is_file():
        prompts = load_prompts(path, limit)
        characters = sum(len(prompt["prompt"]) for prompt in prompts)
        tokens = characters / profile.characters / len(prompts)
        return len(prompts), profile.template + tokens
    if name not in PUBLIC_PROMPTS:
        raise InputError(f"{path}: no such file. The plan needs to know how many prompts it has.")
    published = PUBLIC_PROMPTS[name]
    count = min(limit, published.prompts) if limit else published.prompts
    world.missing[name] = published.prompts
    return count, profile.template + published.tokens


class Evaluated(NamedTuple):
    """A set of prompts that an evaluation samples."""
    name: str
    kind: str
    prompts: int
    prompt_tokens: float
    samples: int


def sets_of(flags, world):
    """[Evaluated] of an evaluation's flags, of either program."""
    files = parse_sets(flags.set, BENCHMARK_KINDS)
    for name in getattr(flags, "sets", ()):
        full_name = published_name(name)
        files.append((full_name, SETS[full_name].kind, records_file(full_name, flags.data_dir)))
    samples = samples_of_sets([name for name, _, _ in files], flags.samples)
    sets = []
    for name, kind, path in files:
        count, tokens = prompts_in(path, flags.limit, world, name)
        sets.append(Evaluated(name, kind, count, tokens, samples[name]))
    return sets


def published_name(name):
    """The full name of a published set: "gpqa" is enough for gpqa-diamond."""
    for known in SETS:
        if known == name or (name not in SETS and known.startswith(f"{name}-")):
            return known
    raise InputError(f"--sets {name}: no such published set; there are {', '.join(SETS)}.")


def tokens_of_set(one, profile, trained):
    """Mean length of a completion of a set, in tokens, loops left out."""
    mean = profile.tokens.get(one.name)
    if mean is None:
        kind = "harmful" if one.kind == "strongreject" else one.kind
        mean = profile.tokens[kind]
        if kind == "harmful" and trained:
            mean *= profile.trained_tokens
    return mean


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
    """The most tokens of a row that is sampled with some flags, as `--batch-size auto` sees it."""
    span = flags.max_new_tokens + PROMPT
    if hasattr(flags, "traces"):  # they are continued
        span += flags.max_new_tokens
    return min(span, shape.context)


def rows_of(part):
    """The Rows of a Sampling."""
    return [Row(part.prefix, tokens) for tokens in part.lengths]


def _by_server(stage, world, parts):
    """Sampling at servers: those of the runner, or of somebody else."""
    machine = world.machine
    shape = world.model(stage.flags.model).shape
    hardware = machine.hardware
    memory = machine.memory
    share = 0.9
    if stage.flags.server == ENGINE:
        gpus, _, shared = split_gpus(list(range(machine.gpus)), _judge_count(world))
        servers = max(1, len(gpus))
        where = "engine"
        if shared:
            share = 0.55
    else:
        servers = len(stage.flags.server.split(","))
        where = "server"
        if not machine.gpus:
            hardware = hardware_named("H100")
            memory = hardware.memory
            world.note("The servers of --server are taken for an H100 each; --gpu says otherwise.")
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


def _judge_count(world):
    """How many GPUs a judge that is served here has; 0 where none is in this run."""
    return world.machine.judge_gpus if world.held.get("judge wanted") else 0


def judge_memory(world):
    """Bytes that a judge, while it is held, takes of the GPUs that the stages use themselves."""
    machine = world.machine
    if not machine.gpus or "judge" not in world.held:
        return 0
    return 0.35 * machine.memory  # as launch/run.py shares a GPU


def _gpus(count):
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
    if spec.startswith("rules"):
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


def verdict_questions(profile, count, prompt_tokens, tokens, unsafe, loops=None):
    """[Questions] of `judge_traces` about traces of harmful prompts."""
    loops = profile.loops if loops is None else loops
    reasoning = prompt_tokens + profile.reasoning * tokens
    response = prompt_tokens + (1 - profile.reasoning) * tokens
    return [
        Questions("reasoning", count, reasoning),
        Questions("response", count * (1 - loops), response),
        Questions("cue", count * unsafe, reasoning),
    ]


def compliance_questions(profile, count, prompt_tokens, tokens, loops=None):
    """[Questions] about the responses to prompts that should be answered, if they are complete."""
    loops = profile.loops if loops is None else loops
    response = prompt_tokens + (1 - profile.reasoning) * tokens
    return [Questions("compliance", count * (1 - loops), response)]


# ---------------------------------------------------------------------------------- the stages

class Estimate(NamedTuple):
    """What a stage takes."""
    title: str
    cost: Cost

    @property
    def seconds(self):
        """Seconds in all."""
        return sum(self.cost.seconds.values())


def added(costs):
    """Several Costs, one after another, as one."""
    seconds = {}
    places = []
    for cost in costs:
        for activity, number in cost.seconds.items():
            seconds[activity] = seconds.get(activity, 0) + number
        if cost.where and cost.where not in places:
            places.append(cost.where)
    return Cost(
        seconds,
        " + ".join(places),
        disk=sum_of(costs, "disk"),
        sampled=sum_of(costs, "sampled"),
        read=sum_of(costs, "read"),
        calls=sum_of(costs, "calls"),
        dollars=sum_of(costs, "dollars"),
        memory=most_of(costs, "memory"),
        passing=most_of(costs, "passing"),
    )


def sum_of(costs, field):
    """A field of several Costs, added up."""
    return sum(getattr(cost, field) for cost in costs)


def most_of(costs, field):
    """The largest value of a field of several Costs."""
    return max((getattr(cost, field) for cost in costs), default=0)


def plan_rollouts(stage, world):
    """Stage `rollouts`; benign where one sample is taken of each prompt (as run.sh does)."""
    flags = stage.flags
    profile = world.profile
    count, prompt = prompts_in(
        flags.prompts, flags.limit, world, Path(flags.prompts).stem)
    kind = "benign" if is_benign(flags) else "harmful"
    trained = world.model(flags.model).trained
    mean = profile.tokens[kind]
    if kind == "harmful" and trained:
        mean *= profile.trained_tokens
    part = completions(count * flags.samples, mean, prompt, count, flags, world)
    cost = sampling_cost([part], stage, world)
    total = len(part.lengths)
    world.made[flags.out] = Traces(kind, total, prompt, cost.sampled / max(1, total), trained)
    disk = cost.sampled * assumed.TRACE_BYTES + total * trace_bytes(prompt)
    return cost._replace(disk=disk)


def is_benign(flags):
    """Whether a stage's rollouts are of benign prompts: their file's name, or run.sh's, says so."""
    return "benign" in Path(flags.out).name or "benign" in Path(flags.prompts).name


def trace_bytes(prompt_tokens):
    """Bytes of a trace's record besides what follows its prompt."""
    return assumed.RECORD_BYTES + assumed.TRACE_BYTES * prompt_tokens


def plan_steps(stage, world):
    """Stage `steps`."""
    traces = world.records(stage.flags.traces, "harmful")
    world.made[stage.flags.out] = traces
    disk = traces.count * traces.tokens * world.profile.reasoning * assumed.STEP_BYTES
    return Cost({}, disk=disk)


def plan_judge(stage, world):
    """Stage `judge`: verdicts on rollouts."""
    flags = stage.flags
    profile = world.profile
    traces = world.records(flags.traces, "harmful")
    unsafe = profile.unsafe[traces.trained]
    questions = verdict_questions(
        profile, traces.count, traces.prompt_tokens, traces.tokens, unsafe)
    world.made[flags.out] = traces
    cost = judging_cost(questions, stage, world)
    disk = traces.count * assumed.VERDICT_BYTES + cached_bytes(cost, flags)
    return cost._replace(disk=disk)


def cached_bytes(cost, flags):
    """Bytes of judge_cache.jsonl; the rules have none."""
    return 0 if flags.judge.startswith("rules") else cost.calls * assumed.CACHED_VERDICT


def pairs_of_harmful(profile, count, prompt_tokens):
    """The Pairs that interventions give."""
    mean = profile.tokens["harmful"]
    shared = profile.cue_at * mean
    return Pairs(count, prompt_tokens + shared, profile.chosen, mean - shared)


def plan_pairs(stage, world):
    """Stage `pairs`: interventions, round after round."""
    flags = stage.flags
    profile = world.profile
    traces = world.records(flags.traces, "harmful")
    unsafe = profile.unsafe[traces.trained]
    tried = traces.count * (1 - profile.loops) * unsafe * profile.cue
    forced = profile.cue_at * profile.tokens["harmful"] + profile.trigger
    costs = []
    records = disk = pairs = 0
    for _ in range(flags.max_interventions):
        prefix = traces.prompt_tokens + forced
        part = completions(tried, profile.continuation, prefix, tried, flags, world)
        costs.append(sampling_cost([part], stage, world))
        questions = verdict_questions(
            profile, tried, traces.prompt_tokens, forced + profile.continuation,
            profile.unsafe_after)
        costs.append(judging_cost(questions, stage, world))
        records += tried
        disk += (sum(part.lengths) + tried * forced) * assumed.TRACE_BYTES
        pairs += tried * profile.safe_after
        tried *= profile.unsafe_after * profile.cue
    cost = added(costs)
    made = pairs_of_harmful(profile, pairs, traces.prompt_tokens)
    world.made[flags.out] = made
    disk += records * trace_bytes(traces.prompt_tokens) + bytes_of_pairs(made)
    return cost._replace(disk=disk + cached_bytes(cost, flags))


def bytes_of_pairs(pairs):
    """Bytes of a file of pairs."""
    return pairs.count * (pairs.prefix + pairs.chosen + pairs.rejected) * assumed.PAIR_BYTES


def plan_benign(stage, world):
    """Stage `benign`: the trained model's refusals, its own and provoked ones."""
    flags = stage.flags
    profile = world.profile
    base = world.records(flags.base, "benign")
    current = world.records(flags.traces, "benign")
    mean = profile.tokens["benign"]
    answered = base.count * (1 - profile.loops) * profile.answered
    refused = answered * profile.refused
    tried = answered - refused
    forced = profile.reverse_at * mean + profile.trigger
    prompt = base.prompt_tokens
    part = completions(
        tried, profile.reversed_tokens, prompt + forced, tried, flags, world)
    sampling = sampling_cost([part], stage, world)
    questions = [
        *compliance_questions(profile, base.count, prompt, mean),
        *compliance_questions(profile, current.count, prompt, mean),
        Questions("cue", tried, prompt + profile.reasoning * mean),
        *compliance_questions(profile, tried, prompt, forced + profile.reversed_tokens, loops=0),
    ]
    cost = added([sampling, judging_cost(questions, stage, world)])
    count = refused + tried * profile.reversed_share
    shared = tried * profile.reversed_share / max(1, count) * profile.reverse_at * mean
    rejected = profile.trigger + profile.reversed_tokens
    made = Pairs(count, prompt + shared, mean - shared, rejected)
    world.made[flags.out] = made
    disk = (sum(part.lengths) + tried * forced) * assumed.TRACE_BYTES
    disk += tried * trace_bytes(prompt) + bytes_of_pairs(made)
    return cost._replace(disk=disk + cached_bytes(cost, flags))


def plan_training(stage, world):
    """Stage `train`: the reference's pass, the updates, the checkpoints."""
    flags = stage.flags
    machine = world.machine
    model = world.model(flags.model)
    shape = model.shape
    count = tokens = 0
    for path in flags.pairs:
        pairs = world.records(path, "pairs")
        prefixes = 2 if flags.no_share else 1
        count += pairs.count
        tokens += pairs.count * (prefixes * pairs.prefix + pairs.chosen + pairs.rejected)
    nodes, each = processes_of(stage.command, machine.gpus)
    processes = nodes * each
    steps = flags.epochs * max(1, math.ceil(count / flags.batch_size))
    micro = min(flags.micro_tokens, max(1, tokens * flags.epochs / steps / processes))
    checkpointed = flags.checkpoint_activations
    rate = training_rate(
        shape, machine.hardware, processes, nodes, micro, flags.lora_rank, checkpointed)
    alone = measured_training(world, shape, flags.lora_rank, checkpointed)
    if alone:  # as fast as so many alone, unless what they send each other is slower
        rate = min(rate, processes * alone) if processes > 1 else alone
    # The pass of the reference is the forward part of an epoch's work.
    forward = 2 * shape.multiplied / operations(shape, flags.lora_rank, checkpointed)
    seconds = tokens * (flags.epochs + forward) / rate
    trained = shape.adapters(flags.lora_rank) if flags.lora_rank else shape.parameters
    saved = 12 * trained  # weights and both moments, in float32
    itemsize = {"float32": 4, "bfloat16": 2}.get(flags.save_dtype, shape.stored)
    stored = itemsize * shape.parameters
    writing = ((steps - 1) // flags.save_every * saved + stored) / assumed.READING
    needs = training_needs(
        shape, processes, flags.micro_tokens, machine.itemsize, checkpointed, flags.lora_rank,
        machine.device)
    memory = sum(needs.memory.values()) + framework(machine.device)
    where = ""
    if machine.gpus:
        where = _gpus(processes)
    world.models[flags.out] = Model(shape, model.trained + 1)
    cost = Cost({"training": seconds, "saving": writing}, where,
                read=tokens * (flags.epochs + 1), memory=memory)
    # A checkpoint is complete before the one before it is removed.
    checkpoints = min(2, (steps - 1) // flags.save_every)
    return cost._replace(disk=stored, passing=checkpoints * saved)


def measured_training(world, shape, lora_rank, checkpointed):
    """Tokens/s of one process that were measured; None if they were not."""
    measurement = world.measurement(shape)
    if measurement:
        return measurement.training.get(training_key(lora_rank, checkpointed))
    return None


def plan_evaluation(stage, world):
    """Stage `run` of an evaluation: each set is sampled, then judged."""
    flags = stage.flags
    profile = world.profile
    trained = world.model(flags.model).trained
    judge = judge_of(flags, "eval_judge")
    parts = []
    questions = []
    records = disk = 0
    for one in sets_of(flags, world):
        mean = tokens_of_set(one, profile, trained)
        count = one.prompts * one.samples
        judged = one.kind in ("harmful", "strongreject", "benign", "xstest")
        loops = profile.loops if judged else 0  # of tasks they are in the mean
        part = completions(count, mean, one.prompt_tokens, one.prompts, flags, world, loops)
        parts.append(part)
        if one.kind in ("harmful", "strongreject"):
            questions += verdict_questions(
                profile, count, one.prompt_tokens, mean, profile.unsafe[min(trained, 2)])
            rubric = one.name in getattr(flags, "rubric", ()) or one.kind == "strongreject"
            if rubric and judge.kind != "rules" and not judge.guard:
                response = one.prompt_tokens + (1 - profile.reasoning) * mean
                questions.append(Questions("strongreject", count * (1 - loops), response))
        elif judged:
            questions += compliance_questions(profile, count, one.prompt_tokens, mean)
        records += count
        disk += count * (trace_bytes(one.prompt_tokens) + assumed.VERDICT_BYTES)
        disk += sum(part.lengths) * assumed.TRACE_BYTES
        disk += sum(part.lengths) * profile.reasoning * assumed.STEP_BYTES
    if not parts:
        return Cost({})
    cost = added([sampling_cost(parts, stage, world), judging_cost(questions, stage, world)])
    return cost._replace(disk=disk + cached_bytes(cost, flags))


PROGRAMS = {
    "intervene.py rollouts": plan_rollouts,
    "intervene.py steps": plan_steps,
    "intervene.py judge": plan_judge,
    "intervene.py pairs": plan_pairs,
    "intervene.py benign": plan_benign,
    "ipo.py train": plan_training,
    "evaluate.py run": plan_evaluation,
    "benchmarks.run": plan_evaluation,
}


def estimate(stage, world):
    """The Estimate of a stage; notes in `world` what it produces."""
    if stage.program not in PROGRAMS:
        if stage.trains or stage.samples:
            world.note(f"{stage.title}: {stage.program} is not planned.")
        return Estimate(stage.title, Cost(starting(stage, world)))
    seconds = starting(stage, world)
    cost = PROGRAMS[stage.program](stage, world)
    return Estimate(stage.title, cost._replace(seconds={**cost.seconds, **seconds}))


def starting(stage, world):
    """{"starting": seconds} until a stage's processes and servers are ready."""
    machine = world.machine
    if not machine.separate:
        seconds = assumed.TOY_STAGE
        if world.first:
            seconds += assumed.TOY_START
        world.first = False
        return {"starting": seconds}
    flags = stage.flags
    seconds = 0
    if stage.samples or stage.trains:
        seconds += assumed.PYTHON_START
    if stage.trains:
        world.held.pop("engine", None)
        world.held.pop("judge", None)
        other = flags.reference not in (None, flags.model) if hasattr(flags, "reference") else False
        seconds += (1 + other) * _reading(flags.model, world)
    elif stage.samples and not flags.server:
        seconds += _reading(flags.model, world)
    for name, model in _servers_of(stage):
        if name == "judge":
            world.held["judge wanted"] = True
        if world.held.get(name) != model:
            world.held[name] = model
            seconds += assumed.ENGINE_START + _reading(model, world)
    return {"starting": seconds}


def _reading(model, world):
    """Seconds to read a model's weights from the disk."""
    shape = world.model(model).shape
    return shape.stored * shape.parameters / assumed.READING


def _servers_of(stage):
    """[("engine" or "judge", its model)] that a stage needs from the runner."""
    servers = []
    if getattr(stage.flags, "server", None) == ENGINE:
        servers.append(("engine", stage.flags.model))
    for name in ("judge", "cue_judge", "eval_judge"):
        if getattr(stage.flags, name, None) == JUDGE:
            model = getattr(stage.flags, f"{name}_model", None)
            if model:
                servers.append(("judge", model))
                break
    return servers


def estimates(stages, world):
    """The Estimate of each stage, in order."""
    for stage in stages:
        if JUDGE in vars(stage.flags).values():
            world.held["judge wanted"] = True
    return [estimate(stage, world) for stage in stages]


# -------------------------------------------------------------------------- for the checks before

def this_machine():
    """The Machine of this computer, whatever kind its GPUs are: memory and disk do not ask."""
    found = visible_gpus()
    if not found:
        return Machine("CPU", CPU, 0, CPU.memory)
    return Machine(found[0].name, assumed.GPUS["A100"], len(found), found[0].total)


def stage_memory(stage, stages=()):
    """Bytes that a stage takes of each GPU for its own sampling or training; 0: nothing.

    stages: all of the run, which say where its model comes from. Raises InputError where nobody
    knows the model.
    """
    if not (stage.samples or stage.trains) or getattr(stage.flags, "server", None):
        return 0
    machine = this_machine()
    if not machine.gpus:
        machine = Machine("a GPU", assumed.GPUS["A100"], 1, assumed.GPUS["A100"].memory)
    world = World([*stages, stage], machine)
    for earlier in stages:
        if earlier.trains and earlier.flags.out not in world.models:
            origin = world.model(earlier.flags.model)
            world.models[earlier.flags.out] = Model(origin.shape, origin.trained + 1)
    shape = world.model(stage.flags.model).shape
    if stage.trains:
        nodes, each = processes_of(stage.command, machine.gpus)
        needs = training_needs(
            shape, nodes * each, stage.flags.micro_tokens, 2, stage.flags.checkpoint_activations,
            stage.flags.lora_rank)
        return sum(needs.memory.values()) + framework("cuda")
    slots = slots_of(stage.flags, shape, machine)
    return sampling_memory(shape, slots, span_of(stage.flags, shape), 2)


def disk_needed(stages):
    """Bytes that some stages of a run will write.

    Stages whose inputs are unknown count for nothing: other checks say what is wrong with them.
    """
    world = World(stages, this_machine())
    costs = []
    for stage in stages:
        try:
            costs.append(estimate(stage, world).cost)
        except InputError:
            continue
    total = added(costs)
    return total.disk + total.passing


# ------------------------------------------------------------------------------------- the table

COLUMNS = ("stage", "GPUs x rows", "sampled", "read", "asked", "time", "GB", "$", "disk")


def table_rows(planned, machine):
    """Rows of text: a stage each, then their sum."""
    rows = [cells(one.title, one.cost, machine) for one in planned]
    total = added([one.cost for one in planned])
    rows.append(cells("together", total._replace(where=""), machine))
    return rows


def cells(title, cost, machine):
    """One row of the table."""
    memory = ""
    if cost.memory and machine.gpus:
        memory = f"{cost.memory / 1e9:.0f}"
    return (
        _shortened(title, 29),
        _shortened(cost.where, 30),
        short(cost.sampled),
        short(cost.read),
        short(cost.calls),
        duration(sum(cost.seconds.values())),
        memory,
        f"{cost.dollars:.2f}" if cost.dollars else "",
        short(cost.disk + cost.passing),
    )


def _shortened(text, width):
    return text if len(text) <= width else text[:width - 3] + "..."


def short(number):
    """A number in four characters or so.

    >>> [short(n) for n in (0, 7, 950, 86_000, 6_900_000, 96e9)]
    ['', '7', '950', '86k', '6.9M', '96G']
    """
    if number < 1:
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            value = number / size
            return f"{value:.0f}{letter}" if value >= 9.95 else f"{value:.1f}{letter}"
    return f"{number:.0f}"


def duration(seconds):
    """Seconds as people say them.

    >>> [duration(s) for s in (0.2, 42, 300, 9000)]
    ['0 s', '42 s', '5 min', '2.5 h']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def in_columns(rows):
    """Rows of cells as text; the first two columns to the left, numbers to the right."""
    rows = [list(row) for row in rows]
    used = []  # columns that are not empty below their heading
    for i in range(len(rows[0])):
        if any(row[i] for row in rows[1:]):
            used.append(i)
    lines = []
    for row in rows:
        cells = []
        for i in used:
            width = max(len(other[i]) for other in rows)
            cells.append(row[i].ljust(width) if i < 2 else row[i].rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def dominating(planned, most=3):
    """Lines about what takes most of the time."""
    shares = []
    total = sum(one.seconds for one in planned)
    for one in planned:
        for activity, seconds in one.cost.seconds.items():
            shares.append((seconds, one.title, activity))
    shares.sort(reverse=True)
    lines = []
    for seconds, title, activity in shares[:most]:
        if seconds > 0.03 * total:
            lines.append(f"  {100 * seconds / total:3.0f}%  {title}: {activity}, "
                         f"{duration(seconds)}")
    return lines


def doubts(planned, machine, stages):
    """Lines about what will not fit, or is not known."""
    lines = []
    if machine.gpus:
        limit = assumed.FREE_SHARE * machine.memory
        for one in planned:
            if one.cost.memory > limit:
                lines.append(f"{one.title}: does NOT fit: {one.cost.memory / 1e9:.0f} GB of "
                             f"{machine.memory / 1e9:.0f} on each GPU.")
    for stage in stages:
        nodes, each = processes_of(stage.command, machine.gpus)
        if machine.gpus and each > machine.gpus:
            lines.append(f"{stage.title}: {each} processes, {_gpus(machine.gpus)} on a machine.")
    lines += slow_judging(planned, stages)
    total = added([one.cost for one in planned]).dollars
    limits = [stage.flags.max_cost for stage in stages if getattr(stage.flags, "max_cost", 0)]
    if limits and total > min(limits):
        lines.append(f"--max-cost {min(limits):g} would stop the run: about {total:.0f} dollars "
                     "are needed.")
    asks = any(judge_of(stage.flags).kind == "api" for stage in stages if stage.judges)
    if asks and not total:
        lines.append("The judge's price is not known: give --judge-price-in and --judge-price-out "
                     "(JUDGE_ARGS=...).")
    return lines


def slow_judging(planned, stages):
    """A line where much of the time is spent waiting for a judge that is asked little at once."""
    total = sum(one.seconds for one in planned)
    judging = sum(one.cost.seconds.get("judging", 0) for one in planned)
    for stage in stages:
        if not stage.judges or judge_of(stage.flags).kind not in ("api", "served"):
            continue
        at_once = stage.flags.judge_concurrency
        if judging > 0.15 * total and at_once < 32:
            return [f"judging takes {100 * judging / total:.0f}% of the time, {at_once} calls at "
                    "a time; JUDGE_ARGS=\"--judge-concurrency 32\" would be faster."]
    return []


def speed_source(world):
    """Where the speeds of the plan come from, as text."""
    if not world.used:
        return "assumed (launch/assumptions.py); `bash run.sh plan --measure` measures this machine"
    devices = {f"{one.device}, torch {one.torch}" for one in world.used}
    text = f"of this process, measured on {' and '.join(sorted(devices))} ({MACHINE_FILE})"
    if any(max(one.layers) < one.shape[1] for one in world.used):
        text += ", from fewer layers"
    return text


def print_plan(stages, options):
    """Print what the stages will take: a table, what dominates it, and what is doubtful."""
    machine = machine_of(options)
    world = World(stages, machine, read_measurements())
    planned = estimates(stages, world)
    kind = _gpus(machine.gpus) if machine.gpus else "no GPU"
    if machine.gpus and _judge_count(world):
        _, own, shared = split_gpus(list(range(machine.gpus)), machine.judge_gpus)
        kind += ", shared with the judge" if shared else f", the last {len(own)} for the judge"
    print(f"plan for {machine.name} ({kind}); nothing is run")
    print(f"lengths and shares: {world.profile.source}")
    print(f"speeds: {speed_source(world)}")
    print()
    for line in in_columns([COLUMNS, *table_rows(planned, machine)]):
        print(line)
    print("(sampled, read: tokens; asked: calls to judges; GB: on each GPU; disk: bytes)")
    print()
    seconds = sum(one.seconds for one in planned)
    held = ""
    if machine.gpus:
        machines = max(processes_of(stage.command)[0] for stage in stages)
        held = f", {seconds / 3600 * machines * machine.gpus:.1f} GPU-hours"
    print(f"about {duration(seconds)}{held}; most of it:")
    for line in dominating(planned):
        print(line)
    for line in [*doubts(planned, machine, stages), *world.notes, *missing_files(world)]:
        print(textwrap.fill(f"note: {line}", 110, subsequent_indent="      ",
                            break_on_hyphens=False))


def missing_files(world):
    """A line about files of prompts that are not here."""
    if not world.missing:
        return []
    files = ", ".join(f"{name} ({count:,})" for name, count in world.missing.items())
    return [f"not here yet, taken as published (prompts): {files}. "
            f"Get them with: python -m benchmarks.fetch {' '.join(world.missing)}"]
