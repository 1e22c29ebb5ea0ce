"""All that could stop a run later, looked at before anything is sampled or loaded.

A run of hours should not end at its first evaluation because a file's name is mistyped. So every
file is read, every judge and server is asked a question, the model's architecture is tried on a
few tokens, and memory and disk are compared with the plan. Everything that is wrong is reported at
once. What is finished already needs no judge, server or GPU any more.
"""
import os
import shlex
import time
from pathlib import Path

from data import render_prompt
from launch.check_inputs import Inputs, check_numbers
from launch.check_judges import check_judges
from launch.check_machine import check_folders, check_gpus, check_programs
from launch.check_models import (
    check_context,
    check_model,
    server_sampler,
    warn_if_it_does_not_reason,
)
from launch.findings import Findings
from launch.outputs import changes_since, place, report_changes
from launch.probe import HURRY, Task, try_server, wait_for
from launch.stages import ENGINE, is_finished, own_program, read_stages
from launch.variables import (
    explained,
    misspelt,
    singular_or_plural,
    variable,
    without_flag,
)
from support.errors import InputError
from support.files import read_json
from support.http import without_password
from support.hub import is_hub_name
from support.model_check import warn

HERE = Path(__file__).resolve().parent.parent
TOY = HERE / "toy"
TOY_MODEL = "toy/model"  # as run.sh compares it
TOY_RUN = HERE / "runs" / "toy"
LONGEST = 14  # seconds from the beginning until all judges and servers must have answered


def check_lines(lines, options):
    """The stages of run.sh's lines "TITLE: COMMAND", and all problems: ([Stage], [str]).

    Flags that cannot be read are a problem each; all else is looked at nevertheless.
    """
    stages = []
    unread = []
    problems = {}  # used as an ordered set: three evaluations complain of the same
    for line in lines:
        title, _, quoted = line.partition(": ")
        words = shlex.split(quoted)
        stage, complaints = _read_stage(title, words)
        problems.update(dict.fromkeys(complaints))
        if stage is not None:
            stages.append(stage)
        elif "--out" in words[:-1]:
            unread.append(words[words.index("--out") + 1])
    return stages, [*problems, *check(stages, options, unread)]


def _read_stage(title, words):
    """(Stage, what its parser complains of); flags that it complains of are left out.

    The Stage is None where that does not help.
    """
    program = _program(words)
    complaints = []
    while True:
        try:
            [stage] = read_stages([f"{title}: {shlex.join(words)}"])
            return stage, complaints
        except InputError as error:
            complaint = str(error).removeprefix(f"{title}: ")
        complaints.append(explained(complaint, title, program))
        fewer = without_flag(words, complaint)
        if fewer == words:
            return None, complaints
        words = fewer


def _program(words):
    """What a command starts, as in "intervene.py rollouts", though its flags cannot be read."""
    try:
        module, rest = own_program(words)
    except InputError:
        return "no program of ours"
    if "." in module:
        return module
    if rest and not rest[0].startswith("-"):
        return f"{module}.py {rest[0]}"
    return f"{module}.py"


def check(stages, options, unread=()):
    """All problems of a run, each one line that names a variable, flag or file and the remedy.

    stages: of `read_stages`; options: of `launch.run`; unread: what stages write that are not
    among these. Prints nothing but warnings, on stderr. Ends within 15 seconds, whatever hangs.
    """
    preflight = Preflight(stages, options, unread)
    preflight.look()
    for warning in preflight.findings.warnings:
        warn(warning)
    return preflight.findings.problems


class Preflight:
    """One look at all stages of a run."""

    def __init__(self, stages, options, unread=()):
        self.stages = stages
        self.options = options
        self.findings = Findings()
        self.inputs = Inputs(self.findings)
        self.made = {place(path) for path in unread}  # what stages write
        self.unfinished = []  # stages with work left to do
        self.pending = set(self.made)  # what those will write
        self.changes = {}  # output: what has changed since it was made
        self.models = {}  # model that no stage writes: ModelFacts
        self.tasks = []  # in threads
        self.deadline = time.monotonic() + LONGEST

    def look(self):
        """Look at everything; what waits for others does so in threads."""
        self.look_at_names()
        sensible = [check_numbers(stage, self.findings) for stage in self.stages]
        for stage in self.stages:
            self.look_at_stage(stage)
        report_changes(self.changes, self.findings)
        planned = all(sensible)
        self.start("nvidia-smi", check_gpus, self.stages, self.unfinished, self.options, planned)
        self.start("the disk", check_folders, self.unfinished, planned)
        check_judges(self.unfinished, self.inputs.sets, self.findings, self.start)
        self.inputs.warn_of_leaks()
        check_programs(self.unfinished, self.findings)
        for model in self.given_models():
            self.look_at_model(model)
        self.start_servers()
        wait_for(self.tasks, self.deadline, self.findings)
        self.refuse_toy_world()  # last, because it ends with a command to try

    def look_at_names(self):
        """Report names in the environment that look like mistyped variables of run.sh."""
        for name, meant in misspelt(os.environ).items():
            text = f"{name}: run.sh knows no such variable. Did you mean {meant}?"
            if singular_or_plural(name, meant):
                self.findings.warning(text)
            else:
                self.findings.problem(f"{text} If it belongs to another program: unset {name}.")

    def start(self, name, function, *arguments):
        """Call function(*arguments, findings) in a thread."""
        self.tasks.append(Task(name, function, *arguments, self.findings))

    def look_at_stage(self, stage):
        """Its files, and what there is of its output already."""
        self.inputs.read(stage, self.made)
        finished = False
        sets = self.inputs.sets.get(stage.title, [])
        with self.findings.reporting(variable(stage, "out")):
            finished = is_finished(stage)
            self.changes[stage.out] = changes_since(stage, sets, self.pending)
        written = {place(stage.out)} if stage.out else set()
        self.made |= written
        if not finished:
            self.unfinished.append(stage)
            self.pending |= written

    # ------------------------------------------------------------------------------------- models

    def given_models(self):
        """The models that no stage writes, in order."""
        models = {}  # used as an ordered set
        for stage in self.stages:
            given = [getattr(stage.flags, "model", None)]
            if stage.trains:
                given.append(getattr(stage.flags, "reference", None))
            for model in given:
                if model and place(model) not in self.made:
                    models[model] = None
        return list(models)

    def look_at_model(self, model):
        """A model's files and architecture, and whether its context holds the prompts."""
        in_this_process = False
        trainings = {}  # attention and rows: flags, because each of these is tried by itself
        longest = 0
        for stage in self.stages:
            if stage.trains:
                flags = stage.flags
                trainings[getattr(flags, "attn", None), getattr(flags, "no_share", None)] = flags
            if stage.samples:
                in_this_process = in_this_process or not stage.flags.server
                longest = max(longest, stage.flags.max_new_tokens)
        name = f"MODEL={model}"
        facts = check_model(model, name, self.findings, in_this_process, trainings.values())
        self.models[model] = facts
        if not facts.usable:
            return
        warn_if_it_does_not_reason(facts, name, self.findings)
        if not longest:
            return
        misnamed = model != TOY_MODEL and place(model).resolve() == HERE / TOY_MODEL
        if misnamed and longest >= facts.context:
            self.findings.problem(f"{name}: write MODEL={TOY_MODEL}. Spelled otherwise, run.sh "
                                  "takes a large model's settings for it, as in "
                                  f"TOKENS={longest}.")
        else:
            check_context(facts, longest, self.inputs.prompts, self.findings)

    # ------------------------------------------------------------------------------------ servers

    def start_servers(self):
        """Let every server continue a prompt, in threads."""
        servers = {}  # (URL, model): stage
        for stage in self.unfinished:
            addresses = getattr(stage.flags, "server", None)
            if not addresses or addresses == ENGINE:
                continue
            for url in addresses.split(","):
                servers[url, stage.flags.model] = stage
        for (url, model), stage in servers.items():
            facts = self.models.get(model)
            # A server may hold a model later that is still to be made.
            if facts is None or not facts.usable:
                continue
            shown = f"{variable(stage, 'server')}={without_password(url)}"
            with self.findings.reporting(shown):
                sampler = server_sampler(url, facts, HURRY)
                prefix = render_prompt(facts.tokenizer, "Hello.")
                self.start(shown, try_server, shown, url, sampler, prefix)

    # ---------------------------------------------------------------------------------- toy world

    def refuse_toy_world(self):
        """Report prompts, sets, a judge or a folder of the toy world for a real model.

        JUDGE=rules:FILE is said by those only who know what they do: who have taught it that world.
        """
        real = [model for model in self.given_models() if is_real(model)]
        toys = self.toy_settings()
        taught = any(str(getattr(stage.flags, "judge", "")).startswith("rules:")
                     for stage in self.stages)
        if not real or not toys or taught:
            return
        named = ", ".join(f"{name}={value}" for name, value in toys.items())
        self.findings.problem(f"MODEL={real[0]} does not know the toy world, and these settings "
                              f"are the toy world's: {named}. A model that was taught it takes "
                              "JUDGE=rules:toy/rules.json.")
        self.findings.problem(f"Perhaps you meant: {self.meant_command(real[0], toys)}")

    def toy_settings(self):
        """{variable: value} of all that belongs to the toy world."""
        toys = {}
        for name, path in self.inputs.prompts:
            if TOY in place(path).resolve().parents:
                toys.setdefault("EVAL" if name.startswith("set ") else name, path)
        for stage in self.stages:
            flags = stage.flags
            for flag in ("judge", "eval_judge"):
                if getattr(flags, flag, None) == "rules":
                    toys[variable(stage, flag)] = "rules"
            if stage.out and place(stage.out).is_relative_to(TOY_RUN):
                toys["RUN"] = "runs/toy"
        if "JUDGE" in toys:
            toys.pop("EVAL_JUDGE", None)  # it follows
        return toys

    def meant_command(self, model, toys):
        """A command for a real model: what was given, and places to fill in for the rest."""
        settings = {
            "MODEL": model,
            "PROMPTS": "harmful.jsonl",
            "BENIGN": "benign.jsonl",
            "EVAL": "jbb,xstest",
            "JUDGE": "https://HOST/v1",
            "JUDGE_MODEL": "NAME",
            "RUN": f"runs/{Path(model).name}",
        }
        for (name, path) in self.inputs.prompts:
            if name in settings and name not in toys:
                settings[name] = path
        words = []
        for name, value in settings.items():
            given = os.environ.get(name)
            if given and name not in toys:
                value = given
            elif name == "EVAL":
                name = "SETS"
                value = os.environ.get(name) or value
            words.append(f"{name}={shlex.quote(value)}")
        return " ".join([*words, "bash run.sh"])


def is_real(model):
    """Whether a model's tokenizer is not that of the toy world. A missing model is not real."""
    if is_hub_name(model):
        return True
    tokenizer = Path(model) / "tokenizer.json"
    toy = TOY / "model" / "tokenizer.json"
    if not tokenizer.is_file() or not toy.is_file():
        return False
    try:
        return _vocabulary(tokenizer) != _vocabulary(toy)
    except InputError:
        return True


def _vocabulary(path):
    return read_json(path, "model")["model"].get("vocab")
