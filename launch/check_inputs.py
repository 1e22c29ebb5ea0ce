"""Prompts, triggers, sets and numbers: read before a run, as its stages will read them."""
from pathlib import Path

from data import load_prompts, load_triggers
from evaluate import load_sets, parse_sets
from launch.outputs import place
from launch.stages import BENCHMARKS
from launch.variables import NO_SET, shown_flag, variable

POSITIVE = (
    "samples",
    "max_interventions",
    "max_new_tokens",
    "batch_size",
    "in_flight",
    "judge_concurrency",
    "epochs",
    "micro_tokens",
    "max_length",
    "save_every",
    "continuations",
)
NOT_NEGATIVE = (
    "limit",
    "lora_rank",
    "temperature",
    "weight_decay",
    "sft_weight",
    "max_cost",
    "judge_price_in",
    "judge_price_out",
)
ABOVE_ZERO = ("lr", "clip", "beta", "top_p")
MADE_BY_STAGES = ("traces", "steps", "verdicts", "base", "pairs", "data")  # flags for such files
LEARNED = ("PROMPTS", "BENIGN")  # the variables of prompts that are trained on


def check_numbers(stage, findings):
    """Report numbers that make no sense; returns whether there are none."""
    sensible = True
    for flag, value in vars(stage.flags).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            wanted = _wanted(flag, value)
            if wanted:
                name = variable(stage, flag)
                findings.problem(f"{name}: {shown_flag(flag)} {value:g} must be {wanted}.")
                sensible = False
    limited = getattr(stage.flags, "max_cost", 0)
    if limited and not (stage.flags.judge_price_in or stage.flags.judge_price_out):
        name = variable(stage, "max_cost")
        findings.problem(f"{name}: --max-cost needs --judge-price-in and --judge-price-out, in "
                         "dollars per million tokens.")
    return sensible


def _wanted(flag, value):
    """What the value of a flag must be, where it is not; else None. A NaN is nothing of it."""
    if flag in POSITIVE and not value >= 1:
        return "at least 1"
    if flag in NOT_NEGATIVE and not value >= 0:
        return "0 or more"
    if flag in ABOVE_ZERO and not value > 0:
        return "above 0"
    if flag == "top_p" and value > 1:
        return "at most 1"
    return None


class Inputs:
    """The prompts and sets of all stages, each file read once."""

    def __init__(self, findings):
        self.findings = findings
        self.prompts = {}  # (variable, file): prompts; [] where they cannot be read
        self.sets = {}  # title of an evaluation: [(name, kind, file)]

    def read(self, stage, made):
        """Read what a stage reads, but for what other stages write (`made`)."""
        flags = stage.flags
        for name in ("prompts", "benign"):
            path = getattr(flags, name, None)
            if path:
                self._read_prompts(variable(stage, name), path, flags.limit)
        if getattr(flags, "triggers", None):
            with self.findings.reporting("TRIGGERS"):
                load_triggers(flags.triggers)
        for name in MADE_BY_STAGES:
            paths = getattr(flags, name, None) or []
            for path in [paths] if isinstance(paths, str) else paths:
                if place(path) not in made and not Path(path).is_file():
                    self.findings.problem(f"{stage.title}: {shown_flag(name)} {path}: no such "
                                          "file. Check the path.")
        if hasattr(flags, "set"):
            self._read_sets(stage)

    def _read_prompts(self, name, path, limit):
        if (name, path) not in self.prompts:
            self.prompts[name, path] = []
            with self.findings.reporting(name):
                self.prompts[name, path] = load_prompts(path, max(limit, 0))

    def _read_sets(self, stage):
        """The sets of an evaluation, one by one, so that each can have its own problem."""
        flags = stage.flags
        found = []
        for flag in ("set", "valid"):
            for spec in getattr(flags, flag, []):
                with self.findings.reporting(variable(stage, flag)):
                    found += parse_sets([spec], stage.kinds)
        for name in getattr(flags, "sets", []):
            with self.findings.reporting("SETS"):
                found += stage.module.published_sets([name], flags.data_dir)
        if not (flags.set or getattr(flags, "sets", [])):
            self.findings.problem(NO_SET)
        names = [name for name, _, _ in found]
        for name in set(names):
            if names.count(name) > 1:
                self.findings.problem(f"EVAL: the set {name} comes twice.")
        for one in found:
            with self.findings.reporting(f"EVAL or SETS, {one[0]}"):
                self._read_set(one, stage)
        self.sets[stage.title] = found

    def _read_set(self, one, stage):
        """Read a set (name, kind, file); raises InputError where it cannot be used."""
        name, _, path = one
        flags = stage.flags
        key = (f"set {name}", path)
        if stage.program == BENCHMARKS:
            stage.module.check_code([one], flags.allow_code_execution)
        if key not in self.prompts:
            self.prompts[key] = []
            loaded = load_sets([one], stage.kinds, max(getattr(flags, "limit", 0), 0))
            if stage.program == BENCHMARKS:
                stage.module.check_labels([one], loaded)
            self.prompts[key] = loaded[name]

    def warn_of_leaks(self):
        """Warn of prompts that are both trained on and evaluated on."""
        learned = {}  # prompt: variable
        for (name, _), prompts in self.prompts.items():
            if name in LEARNED:
                learned.update((prompt["prompt"].strip(), name) for prompt in prompts)
        for (name, _), prompts in self.prompts.items():
            if name in LEARNED:
                continue
            texts = [prompt["prompt"].strip() for prompt in prompts]
            both = [text for text in texts if text in learned]
            if both:
                self.findings.warning(
                    f"{name}: {len(both)} of its {len(texts)} prompts are in {learned[both[0]]} "
                    "too, so it measures in part what was learned by heart"
                )
