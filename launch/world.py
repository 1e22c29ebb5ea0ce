"""What the stages of a run read and write, as far as a plan knows it: prompts, traces, pairs."""
from pathlib import Path
from typing import NamedTuple

from data import load_prompts
from evaluate import parse_sets
from launch import assumptions as assumed
from launch.assumptions import PUBLIC_PROMPTS
from launch.shape import Shape, read_shape
from launch.speed import measurement_for
from launch.stages import BENCHMARKS, JUDGE
from support.errors import InputError


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
        self.judge_served = any(JUDGE in vars(stage.flags).values() for stage in stages)
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
            self.models[name] = Model(read_shape(name), _times_trained(name))
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


def _times_trained(name):
    """How often a model has been trained, by "stage1" or "stage2" at the end of its path."""
    return {"stage1": 1, "stage2": 2}.get(Path(name).name, 0)


def profile_of(stages):
    """The Profile of what the stages sample: the embedded world's where its rules judge."""
    for stage in stages:
        model = str(getattr(stage.flags, "model", ""))
        judge = str(getattr(stage.flags, "judge", ""))
        if model.startswith("toy/") or judge.startswith("rules"):
            return assumed.TOY_MODEL
    return assumed.REASONING_MODEL


def pairs_of_harmful(profile, count, prompt_tokens):
    """The Pairs that interventions give."""
    mean = profile.tokens["harmful"]
    shared = profile.cue_at * mean
    return Pairs(count, prompt_tokens + shared, profile.chosen, mean - shared)


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


def sets_of(stage, world):
    """[Evaluated] of an evaluation's stage, of either program."""
    flags = stage.flags
    files = parse_sets(flags.set, stage.kinds)
    samples = {name: flags.samples for name, _, _ in files}
    if stage.program == BENCHMARKS:
        files += stage.module.named_sets(flags.sets, flags.data_dir)
        samples = stage.module.samples_of_sets([name for name, _, _ in files], flags.samples)
    sets = []
    for name, kind, path in files:
        count, tokens = prompts_in(path, flags.limit, world, name)
        sets.append(Evaluated(name, kind, count, tokens, samples[name]))
    return sets


def tokens_of_set(one, profile, trained):
    """Mean length of a completion of a set, in tokens, loops left out."""
    mean = profile.tokens.get(one.name)
    if mean is None:
        kind = "harmful" if one.kind == "strongreject" else one.kind
        # The toy world has no such thing as MATH: then as a reasoning model would answer.
        mean = profile.tokens.get(kind, assumed.REASONING_MODEL.tokens[kind])
        if kind == "harmful" and trained:
            mean *= profile.trained_tokens
    return mean
