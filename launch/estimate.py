"""What each stage of a run will take, from its flags and the number of prompts."""
import math
from pathlib import Path
from typing import NamedTuple

from launch import assumptions as assumed
from launch.assumptions import CPU
from launch.costs import (
    Cost,
    Machine,
    Questions,
    added,
    completions,
    compliance_questions,
    gpus_as_text,
    judge_of,
    judging_cost,
    sampling_cost,
    slots_of,
    span_of,
    verdict_questions,
)
from launch.shape import framework, operations, sampling_memory, training_needs
from launch.speed import training_key, training_rate
from launch.stages import BY_RULES, ENGINE, EVALUATION, JUDGE, JUDGES, processes_of
from launch.world import (
    Model,
    Pairs,
    Traces,
    World,
    pairs_of_harmful,
    prompts_in,
    sets_of,
    tokens_of_set,
)
from support.errors import InputError


class Estimate(NamedTuple):
    """What a stage takes."""
    title: str
    cost: Cost

    @property
    def seconds(self):
        """Seconds in all."""
        return sum(self.cost.seconds.values())


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
    return 0 if flags.judge.startswith(BY_RULES) else cost.calls * assumed.CACHED_VERDICT


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
    memory = training_memory(stage, shape, machine)
    where = ""
    if machine.gpus:
        where = gpus_as_text(processes)
    world.models[flags.out] = Model(shape, model.trained + 1)
    cost = Cost({"training": seconds, "saving": writing}, where,
                read=tokens * (flags.epochs + 1), memory=memory)
    # A checkpoint is complete before the one before it is removed.
    checkpoints = min(2, (steps - 1) // flags.save_every)
    return cost._replace(disk=stored, passing=checkpoints * saved)


def training_memory(stage, shape, machine):
    """Bytes that a training stage takes of each GPU."""
    flags = stage.flags
    nodes, each = processes_of(stage.command, machine.gpus)
    needs = training_needs(
        shape, nodes * each, flags.micro_tokens, machine.itemsize, flags.checkpoint_activations,
        flags.lora_rank, machine.device)
    return sum(needs.memory.values()) + framework(machine.device)


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
    disk = 0
    for one in sets_of(stage, world):
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
    **dict.fromkeys(EVALUATION, plan_evaluation),
}
LEADERBOARD = "studies.leaderboard"  # many trainings in one stage


def estimate(stage, world):
    """The Estimate of a stage; notes in `world` what it produces."""
    seconds = starting(stage, world)
    cost = Cost({})
    if stage.program in PROGRAMS:
        cost = PROGRAMS[stage.program](stage, world)
    elif stage.trains or stage.samples or stage.program == LEADERBOARD:
        world.note(f"{stage.title}: {stage.program} is not planned.")
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
        seconds += _reading(flags.model, world)
        if getattr(flags, "reference", None) not in (None, flags.model):
            seconds += _reading(flags.model, world)  # as large
    elif stage.samples and not flags.server:
        seconds += _reading(flags.model, world)
    for name, model in _servers_of(stage):
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
    for name in JUDGES:
        if getattr(stage.flags, name, None) == JUDGE:
            model = getattr(stage.flags, f"{name}_model", None)
            if model:
                servers.append(("judge", model))
                break
    return servers


def estimates(stages, world):
    """The Estimate of each stage, in order."""
    return [estimate(stage, world) for stage in stages]


# -------------------------------------------------------------------------- for the checks before

def stage_memory(stage, stages, gpus):
    """Bytes that a stage takes of each GPU for its own sampling or training; 0: nothing.

    stages: all of the run, which say where its model comes from; gpus: those it runs on. Raises
    InputError where nobody knows the model.
    """
    if not (stage.samples or stage.trains) or getattr(stage.flags, "server", None):
        return 0
    # Of its kind nothing but the memory counts here.
    memory = min(gpu.total for gpu in gpus)
    machine = Machine("a GPU", assumed.GPUS["A100"], len(gpus), memory)
    world = World(stages, machine)
    for earlier in stages:
        if earlier.trains and earlier.flags.out not in world.models:
            origin = world.model(earlier.flags.model)
            world.models[earlier.flags.out] = Model(origin.shape, origin.trained + 1)
    shape = world.model(stage.flags.model).shape
    if stage.trains:
        return training_memory(stage, shape, machine)
    slots = slots_of(stage.flags, shape, machine)
    return sampling_memory(shape, slots, span_of(stage.flags, shape), machine.itemsize)


def disk_needed(stages):
    """Bytes that some stages of a run will write.

    Stages whose inputs are unknown count for nothing: other checks say what is wrong with them.
    """
    world = World(stages, Machine("CPU", CPU, 0, CPU.memory))  # any will do
    costs = []
    for stage in stages:
        try:
            costs.append(estimate(stage, world).cost)
        except InputError:
            continue
    total = added(costs)
    return total.disk + total.passing
