"""The judges of a run: can each answer what its stages will ask, and does it answer now?"""
from pathlib import Path
from typing import NamedTuple

from evaluate import EVAL_KEYS
from intervene import ASKS, CUE_KEYS, JUDGE_KEYS, make_judge
from launch.check_models import check_model
from launch.probe import HURRY, try_judge
from launch.stages import BENCHMARKS, BY_RULES, EVALUATION, JUDGE
from support.errors import InputError
from support.guards import local_name
from support.http import without_password
from support.hub import model_folder

NOWHERE = "http://127.0.0.1/v1"  # for a judge that is made to see what it can answer, not asked


class JudgeFlags(NamedTuple):
    """What makes two judges two."""
    variable: str  # that names it
    spec: str  # `rules`, `python:MODULE`, `local:PATH`, a URL, {judge}
    model: str
    kind: str
    keys: tuple  # names of variables that may hold its key
    no_thinking: bool

    @property
    def shown(self):
        if self.spec == JUDGE:
            return f"{self.variable}=serve:{self.model}"
        return f"{self.variable}={without_password(self.spec)}"

    @property
    def path(self):
        """The folder of a model in this process, else an empty text."""
        return self.spec.removeprefix("local:") if self.spec.startswith("local:") else ""

    def make(self):
        """The judge, to be asked in a hurry; one that is not at an address yet cannot be asked."""
        flag = "--" + self.variable.lower().replace("_", "-")
        if self.spec.startswith(BY_RULES):
            return make_judge(self.spec, flag=flag)
        model = local_name(self.path) if self.path else self.model
        spec = NOWHERE if self.path or self.spec == JUDGE else self.spec
        # Without a cache: a verdict from there would hide a judge that is gone.
        return make_judge(spec, model, kind=self.kind, no_thinking=self.no_thinking, flag=flag,
                          keys=self.keys, **HURRY)


def check_judges(stages, sets, findings, start):
    """Report judges that cannot answer, or do not.

    sets: {title of an evaluation: [(name, kind, file)]}. What takes its time is left to threads:
    start(name, function, *arguments).
    """
    asked = {}  # JudgeFlags: {question}
    for stage in stages:
        if not stage.judges:
            continue
        main, other = judges_of(stage)
        questions = _questions(stage, sets.get(stage.title, []))
        with findings.reporting(main.variable):
            _distribute(questions, main, other, asked)
            if stage.program == BENCHMARKS:
                published = [one for one in sets[stage.title] if one[0] in stage.module.SETS]
                stage.module.check_judge(published, main.make())
    for flags, questions in asked.items():
        with findings.reporting(flags.shown):
            if flags.path:
                check_model(flags.path, flags.shown, findings, samples=True)
            elif flags.spec == JUDGE:
                if not Path(flags.model).is_file():  # some servers take a model in one file
                    model_folder(flags.model, weights=False)
            elif not flags.spec.startswith(BY_RULES):
                judge = flags.make()
                start(flags.shown, try_judge, flags.shown, flags.spec, judge, sorted(questions))


def judges_of(stage):
    """(the judge of a stage, its other judge for cues or None) as JudgeFlags."""
    flags = stage.flags
    quiet = flags.judge_no_thinking
    main = JudgeFlags("JUDGE", flags.judge, flags.judge_model, flags.judge_kind, JUDGE_KEYS, quiet)
    if stage.program in EVALUATION:
        main = main._replace(model=flags.eval_judge_model or main.model)
        if flags.eval_judge not in (None, main.spec):
            main = main._replace(variable="EVAL_JUDGE", spec=flags.eval_judge, keys=EVAL_KEYS)
    if not flags.cue_judge:
        return main, None
    keys = main.keys if flags.cue_judge == main.spec else CUE_KEYS
    other = JudgeFlags("CUE_JUDGE", flags.cue_judge, flags.cue_judge_model, "chat", keys, quiet)
    return main, other


def _questions(stage, sets):
    """What a stage asks its judge."""
    if stage.program not in EVALUATION:
        return ASKS.get(getattr(stage.flags, "command", None), ("reasoning",))
    questions = {}  # used as an ordered set
    for name, kind, _ in sets:
        questions.update(dict.fromkeys(stage.kinds[kind].questions))
        if name in getattr(stage.flags, "rubric", ()):
            questions["strongreject"] = None
    return list(questions)


def _distribute(questions, main, other, asked):
    """Note who is asked what; raises InputError for a question that nobody can answer."""
    if not questions:
        return
    known = main.make().questions
    for question in questions:
        if other and (question == "cue" or question not in known):
            asked.setdefault(other, set()).add(question)
        elif question in known:
            asked.setdefault(main, set()).add(question)
        elif question != "strongreject":  # such a set is then not graded by the rubric
            raise InputError(f"{main.model or main.spec} cannot answer the question `{question}`. "
                             "Add CUE_JUDGE=..., a chat model, or take another judge.")
