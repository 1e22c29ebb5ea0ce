r"""Sums in columns: a trace turns where a column is wrong, and a checking sentence turns it back.

    What is 158 + 263 + 477, column by column?
    The ones are 8 + 3 = 11, 11 + 7 = 18, so I write 8 and carry 0.      <- the first slip
    Wait, let me check that step.
    The ones are 8 + 3 = 11, 11 + 7 = 18, so I write 8 and carry 1.      <- it is taken back
    The tens are 5 + 6 = 11, 11 + 7 = 18, 18 + 1 = 19, so I write 9 and carry 1.
    The hundreds are 1 + 2 = 3, 3 + 4 = 7, 7 + 1 = 8, so I write 8.
    The sum is 898. </think> The answer is \boxed{898}.

The judge knows nothing but the numbers of the prompt.
"""
import re
from typing import NamedTuple

from intervene import split_steps
from support.record import fingerprint

PROMPTS = "toy/prompts/train_columns.jsonl"
EVAL = (
    "sums=task:toy/prompts/eval_columns.jsonl "
    "steps=harmful:toy/prompts/eval_columns.jsonl"
)
TRIGGERS = "prompts/checks.txt"
JUDGE = "python:domains.arithmetic"
RUN = "runs/arithmetic"

MODEL = "toy/model"
TOKENS = "320"
BATCH = "128"
LR = "9e-5"
TRAIN_ARGS = ""
VALID = "valid_steps=harmful:toy/prompts/valid_columns.jsonl"
LIMIT_SETS = "100"

METHODS = "ipo sft rejection"
LRS = "9e-5 1.8e-4"
ALSO = "1"  # every run compares these

WORDS = {
    "harmful reasoning": "wrong reasoning",
    "harmful responses": "wrong answers",
    "harmful prompts": "sums",
    "compliance cue": "first slip",
    "cue": "slip",
    "safety trigger": "checking sentence",
    "safety triggers": "checking sentences",
    "trigger": "checking sentence",
    "an unsafe": "a wrong",
    "unsafe": "wrong",
    "a safe": "a right",
    "safe": "right",
    "response": "answer",
    "responses": "answers",
    # What the paper found is about safety.
    "the paper's figure 3: of": "of",
    "a safe response (61 to 72% in the paper)": "a right answer",
    "an unsafe one (0.1 to 0.6%)": "a wrong one",
}
GLOSSARY = [
    (
        "First slip",
        "The first column that is wrong (a digit, an addition, a carry) and is not put right by a "
        "later sentence. From here on the trace is wrong.",
    ),
    (
        "Checking sentence",
        "A sentence that stops to get a column right. An intervention puts one in the place of the "
        "slip, and the model continues from there.",
    ),
    (
        "Wrong reasoning",
        "The share of traces in which a column or the sum is wrong in the end. Answers are counted "
        "apart.",
    ),
    (
        "Stage 1",
        "Training that prefers what follows the checking sentence (chosen) over what followed the "
        "slip (rejected). Both share the prefix before it.",
    ),
]

NAMES = ("ones", "tens", "hundreds", "thousands")
# How a step begins that says something about a column or about the sum.
STATEMENT = re.compile(rf"The ({'|'.join(NAMES)}|sum) (?:are|is)\b")
COLUMN = re.compile(r"The \w+ are (.+), so I write (\d+)(?: and carry (\d+))?\.")
BOX = re.compile(r"\\boxed\{\s*(\d+)\s*\}")


class Column(NamedTuple):
    """What is right in a column."""

    digits: list    # of all numbers, and the carry that comes in
    written: str    # the digit below the line; of the last column the whole number
    carry: object   # a digit; None of the last column


def right_columns(numbers):
    """{name: Column} of a sum, from the ones on.

    >>> right_columns([58, 63])["ones"]
    Column(digits=[8, 3], written='1', carry='1')
    >>> right_columns([58, 63])["tens"]
    Column(digits=[5, 6, 1], written='12', carry=None)
    """
    width = len(str(max(numbers)))
    columns = {}
    carry = 0
    for place, name in enumerate(NAMES[:width]):
        digits = [number // 10 ** place % 10 for number in numbers]
        if place:
            digits.append(carry)
        total = sum(digits)
        if place == width - 1:
            columns[name] = Column(digits, str(total), None)
        else:
            carry = total // 10
            columns[name] = Column(digits, str(total % 10), str(carry))
    return columns


def is_right_column(step, column):
    """Whether a step says all of a column as it is: digits, additions, what is written, carry."""
    found = COLUMN.fullmatch(step)
    if not found or column is None:
        return False
    additions, written, carry = found.groups()
    if written != column.written or carry != column.carry:
        return False
    total = column.digits[0]
    said = []
    for digit in column.digits[1:]:
        said.append(f"{total} + {digit} = {total + digit}")
        total += digit
    return additions == ", ".join(said)


def first_slip(numbers, steps):
    """The number, from 1, of the first step that is wrong and not taken back; 0 if there is none.

    A wrong statement is taken back by a right one about the same column later. A column that is
    never stated is missed where the next one stands that is, or at the last step.
    """
    columns = right_columns(numbers)
    stated = {}  # the first step about each column, and about the sum
    wrong = {}  # the first wrong one that is not taken back
    for number, step in enumerate(steps, 1):
        step = step.strip()
        found = STATEMENT.match(step)
        if not found:
            continue
        name = found[1]
        stated.setdefault(name, number)
        if name == "sum":
            right = step == f"The sum is {sum(numbers)}."
        else:
            right = is_right_column(step, columns.get(name))
        if right:
            wrong.pop(name, None)
        else:
            wrong.setdefault(name, number)
    missed_at = len(steps)
    for name in ["sum", *reversed(columns)]:
        if name in stated:
            missed_at = min(missed_at, stated[name])
        else:
            wrong[name] = missed_at
    return min(wrong.values(), default=0)


class Judge:
    """Checks every column. What is no sum of such numbers gets no verdict."""

    questions = {"reasoning", "response", "cue"}

    def __init__(self):
        # Verdicts of other rules are never mixed with these.
        self.name = f"arithmetic:{fingerprint(__file__)}"

    def ask(self, question, items):
        """Answers to `question`, see the table above LABELS in intervene.py."""
        for item in items:
            numbers = [int(digits) for digits in re.findall(r"\d+", item["prompt"])]
            if len(numbers) < 2 or max(numbers) >= 10 ** len(NAMES):
                yield None
            elif question == "response":
                boxes = BOX.findall(item["text"])
                yield boxes[-1:] == [str(sum(numbers))]
            elif question == "cue":
                yield first_slip(numbers, item["steps"])
            else:
                steps = split_steps(item["text"])
                yield bool(steps) and first_slip(numbers, steps) == 0

    def summary(self):
        """Nothing: it costs nothing."""
        return {}
