"""The variables of run.sh: which of them set a stage's flag, and names that look mistyped."""
import os
import re
from pathlib import Path

from launch.stages import EVALUATION

RUN_SH = Path(__file__).resolve().parent.parent / "run.sh"
KEYS = ("JUDGE_API_KEY", "EVAL_JUDGE_API_KEY", "SERVER_API_KEY", "OPENAI_API_KEY", "IPO_DATA")
OF_OTHERS = ("PROMPT", "TOKEN")  # common in environments
SHORTEST = 5  # letters; shorter names are one letter away from too many others

NO_SET = ('EVAL: no set to evaluate on. Give EVAL="NAME=KIND:FILE ...", or SETS=jbb,xstest,... of '
          "published ones.")
ARGUMENT = re.compile(r"argument (?:-\w/)?--([\w-]+)(?:/\S+)?: (.*)", re.DOTALL)
TRAINING = ("ipo.py train", "studies.sft")

# The variable that sets a flag, wherever the flag occurs.
EVERYWHERE = {
    "out": "RUN",
    "model": "MODEL",
    "reference": "MODEL",
    "triggers": "TRIGGERS",
    "limit": "LIMIT",
    "seed": "SEED",
    "epochs": "EPOCHS",
    "max_new_tokens": "TOKENS",
    "in_flight": "IN_FLIGHT",
    "max_interventions": "INTERVENTIONS",
    "continuations": "CONTINUATIONS",
    "judge": "JUDGE",
    "judge_model": "JUDGE_MODEL",
    "cue_judge": "CUE_JUDGE",
    "cue_judge_model": "CUE_JUDGE_MODEL",
    "eval_judge": "EVAL_JUDGE",
    "eval_judge_model": "EVAL_JUDGE_MODEL",
    "sets": "SETS",
    "set": "EVAL",
    "valid": "VALID",
    "benign": "BENIGN",
    "lora_rank": "LORA",
    "nproc_per_node": "NPROC",
}

# Where a variable is not given, another one decides.
FOLLOWS = {
    "LR2": "LR",
    "SAMPLES": "TRIGGERS",
    "EVAL_JUDGE": "JUDGE",
    "EVAL_JUDGE_MODEL": "JUDGE_MODEL",
    "EVAL_JUDGE_ARGS": "JUDGE_ARGS",
}


def variable_of(title, program, flag):
    """The variable that sets `flag` (max_new_tokens, ...) of a stage with this title and program.

    >>> variable_of("rollouts of the base model", "intervene.py rollouts", "prompts")
    'PROMPTS'
    >>> variable_of("benign rollouts of the base model", "intervene.py rollouts", "prompts")
    'BENIGN'
    >>> variable_of("training, stage 2 (against over-refusal)", "ipo.py train", "lr")
    'LR2'
    >>> variable_of("evaluation of base", "benchmarks.run", "max_cost")
    'EVAL_JUDGE_ARGS'
    """
    if flag in EVERYWHERE:
        return EVERYWHERE[flag]
    if program in TRAINING:
        if flag == "lr":
            return "LR2" if "stage 2" in title else "LR"
        return "TRAIN_ARGS"
    if flag == "batch_size":
        return "BATCH"
    about_judge = flag.startswith(("judge", "max_cost"))
    if program in EVALUATION:
        if flag == "server":
            return "EVAL_SERVER"
        return "EVAL_JUDGE_ARGS" if about_judge else "EVAL_ARGS"
    if flag == "prompts":
        return "BENIGN" if title.startswith("benign") else "PROMPTS"
    if about_judge:
        return "JUDGE_ARGS"
    return flag.upper()  # SAMPLES, SERVER, METHODS, ...


def variable(stage, flag):
    """The variable that sets a flag of a stage, or the one that it follows by default."""
    return _given(variable_of(stage.title, stage.program, flag))


def _given(name):
    while name in FOLLOWS and name not in os.environ:
        name = FOLLOWS[name]
    return name


def shown_flag(name):
    """A flag as it is written: `max_new_tokens` as `--max-new-tokens`."""
    return "--" + name.replace("_", "-")


def known_variables():
    """The names in the table of `bash run.sh --help`, and those of keys."""
    text = RUN_SH.read_text(encoding="utf-8")
    table = text.partition("\nvariable ")[2].partition("\nHELP")[0]
    names = set(KEYS)
    for line in table.splitlines():
        listed = re.match(r"[A-Z][A-Z0-9_]+(, [A-Z0-9_]+)*\b", line)
        if listed:
            names.update(listed[0].split(", "))
    return names


def misspelt(environment):
    """{name in the environment: the variable that it looks like}; values are never looked at.

    One letter is left out, put in or replaced, or two are swapped.

    >>> misspelt(["PROMTPS", "N_PROC", "MODEL", "HOME", "PROMPT", "PYTHON3", "LAUNCHER", "JUDGES"])
    {'PROMTPS': 'PROMPTS', 'N_PROC': 'NPROC', 'JUDGES': 'JUDGE'}
    """
    known = known_variables()
    long_enough = [name for name in known if len(name) >= SHORTEST]
    found = {}
    for name in environment:
        if name in known or name in OF_OTHERS or name[-1:].isdigit():
            continue
        for meant in long_enough:
            if _one_slip_apart(name, meant):
                found[name] = meant
    return found


def _one_slip_apart(name, meant):
    """Whether two different words differ by one letter, or by two that are swapped.

    >>> [_one_slip_apart(name, "JUDGE") for name in ("JUGDE", "JUDGES", "JUGE", "JUDDLE")]
    [True, True, True, False]
    """
    same = len(os.path.commonprefix([name, meant]))
    rest, wanted = name[same:], meant[same:]
    one_letter = (rest[1:], wanted), (rest, wanted[1:]), (rest[1:], wanted[1:])
    if any(left == right for left, right in one_letter):
        return True
    return rest[:2] == wanted[:2][::-1] and rest[2:] == wanted[2:]


def singular_or_plural(name, meant):
    """Whether a name is the other's singular or plural, which another program may well have."""
    return name + "S" == meant or name == meant + "S"


# --------------------------------------------------------------------------- argparse's complaints

def explained(complaint, title, program):
    """What argparse says of a stage's flags, as one line that names the variable.

    >>> explained("x.py: error: argument --limit: invalid int value: 'a b'", "t", "x.py")
    "LIMIT: 'a b' is not a whole number (--limit)."
    >>> explained("x.py: error: unrecognized arguments: --fast --key abc", "t", "ipo.py train")
    'TRAIN_ARGS: no such flag: --fast, --key. `python ipo.py train --help` lists them.'
    """
    said = complaint.partition("error: ")[2] or complaint
    argument = ARGUMENT.match(said)
    if argument:
        flag, problem = argument.groups()
        name = _given(variable_of(title, program, flag.replace("-", "_")))
        problem = re.sub(r"invalid int value: (.*)", r"\1 is not a whole number", problem)
        problem = re.sub(r"invalid float value: (.*)", r"\1 is not a number", problem)
        return f"{name}: {problem} (--{flag})."
    if said.endswith("are required: --set"):
        return NO_SET
    unknown = said.partition("unrecognized arguments: ")[2]
    if unknown:
        # Flags only: a value may be a key.
        flags = [word for word in unknown.split() if word.startswith("--")]
        named = ", ".join(word.partition("=")[0] for word in flags) or "a word without a flag"
        start = program if ".py" in program else f"-m {program}"
        return (f"{_more_flags(program)}: no such flag: {named}. "
                f"`python {start} --help` lists them.")
    return f"{title}: {said}"


def without_flag(words, complaint):
    """The words of a command without the flag that argparse complains of, and its values.

    >>> without_flag(["x.py", "--limit", "abc", "--out", "y"], "error: argument --limit: no")
    ['x.py', '--out', 'y']
    """
    said = complaint.partition("error: ")[2]
    argument = ARGUMENT.match(said)
    if argument:
        bad = [f"--{argument[1]}"]
    else:
        bad = said.partition("unrecognized arguments: ")[2].split()
    kept = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in bad or word in bad
        if not dropping and word not in bad:
            kept.append(word)
    return kept


def _more_flags(program):
    if program in TRAINING:
        return "TRAIN_ARGS"
    if program in EVALUATION:
        return "EVAL_ARGS or EVAL_JUDGE_ARGS"
    return "JUDGE_ARGS"
