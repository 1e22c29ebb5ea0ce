"""Sums of three numbers of three digits, column by column, with slips: the domain `arithmetic`.

    The ones are 7 + 8 = 15, 15 + 3 = 18, so I write 8 and carry 0.     <- a slip: carry 1
    Wait, let me check that step.                                       <- sometimes
    The ones are 7 + 8 = 15, 15 + 3 = 18, so I write 8 and carry 1.

A slip is a wrong carry or a wrong last addition. A checking sentence, before a column or after it,
makes the model careful: slips are rare then, until it grows careless again. A trace may begin with
a slip, because nothing comes before the first column.
"""
import random
from typing import NamedTuple

NAMES = ("ones", "tens", "hundreds")
ASKING = [
    "What is {a} + {b} + {c}, column by column?",
    "Add {a}, {b} and {c} in columns.",
    "Please work out {a} + {b} + {c} in columns.",
    "How much is {a} + {b} + {c}? Go column by column.",
]
CHECKS = [  # the model's own; the method's pool (prompts/checks.txt) comes on top
    "I should not rush this.",
    "Let me add the next digits with care.",
    "A carry is soon lost, so let me look twice.",
    "Let me do that column once more.",
]
SLIP_IN_CARRY = {0: 0.25, 1: 0.4, 2: 0.55}  # chance, by the right carry
SLIP_IN_ADDITION = 0.2                     # chance, in each column
WHEN_CAREFUL = 0.45     # factor of both
STAY_CAREFUL = 0.6      # chance, with each column
CHECK_BEFORE = 0.2      # chance of a checking sentence before a column
CHECK_AFTER = {True: 0.2, False: 0.03}  # after one, by whether it slipped


class Column(NamedTuple):
    """What is said about one column."""

    text: str
    digit: int  # that is written; of the last column the whole number
    carry: int
    slipped: bool


def say_column(rng, numbers, place, carry, careful):
    """A column with the carry that comes in, perhaps with a slip."""
    factor = WHEN_CAREFUL if careful else 1
    digits = [number // 10 ** place % 10 for number in numbers]
    if place:
        digits.append(carry)
    wrong_by = 0
    if rng.random() < SLIP_IN_ADDITION * factor:
        wrong_by = rng.choice([-1, 1])
    in_words, total = add_up(digits, wrong_by)
    start = f"The {NAMES[place]} are {in_words}, so I write"
    if place == len(NAMES) - 1:
        return Column(f"{start} {total}.", total, 0, wrong_by != 0)
    right, digit = divmod(total, 10)
    out = right
    if rng.random() < SLIP_IN_CARRY[right] * factor:
        out = rng.choice([other for other in (0, 1, 2) if abs(other - right) == 1])
    slipped = wrong_by != 0 or out != right
    return Column(f"{start} {digit} and carry {out}.", digit, out, slipped)


def add_up(digits, wrong_by=0):
    """(a sum in words, its value), one digit at a time; the last addition may be wrong.

    >>> add_up([7, 8, 3]), add_up([7, 8], wrong_by=1)
    (('7 + 8 = 15, 15 + 3 = 18', 18), ('7 + 8 = 16', 16))
    """
    total = digits[0]
    parts = []
    for number, digit in enumerate(digits[1:], 1):
        after = total + digit
        if number == len(digits) - 1:
            after = max(0, after + wrong_by)
        parts.append(f"{total} + {digit} = {after}")
        total = after
    return ", ".join(parts), total


def work_out(rng, numbers, pool):
    """One reasoning trace: (its sentences, the sum that it comes to)."""
    checks = CHECKS + list(pool)
    steps = []
    digits = []
    carry = 0
    careful = False
    for place in range(len(NAMES)):
        if not careful and rng.random() < CHECK_BEFORE:
            steps.append(rng.choice(checks))
            careful = True
        column = say_column(rng, numbers, place, carry, careful)
        steps.append(column.text)
        if rng.random() < CHECK_AFTER[column.slipped]:
            steps.append(rng.choice(checks))
            careful = True
            column = say_column(rng, numbers, place, carry, careful)
            steps.append(column.text)
        digits.append(column.digit)
        carry = column.carry
        careful = careful and rng.random() < STAY_CAREFUL
    total = int("".join(map(str, reversed(digits))))
    steps.append(f"The sum is {total}.")
    return steps, total


def ask(rng, numbers):
    """A question for the sum of three numbers."""
    a, b, c = numbers
    return rng.choice(ASKING).format(a=a, b=b, c=c)


def held_out(numbers):
    """True for the fifth of all sums that is kept for validation and evaluation."""
    a, b, c = numbers
    return (a * 31 + b * 17 + c * 7) % 5 == 3


def draw(rng, keep):
    """Three numbers of three digits, held out or not."""
    while True:
        numbers = [rng.randint(100, 999) for _ in range(3)]
        if held_out(numbers) == keep:
            return numbers


def prompt_sets(seed=0):
    """{name: [{"prompt", "answer"}]}: sums to train on, and held-out ones."""
    rng = random.Random(seed)
    sets = {}
    for name, count, keep in (
        ("train_columns", 80, False),
        ("valid_columns", 60, True),
        ("eval_columns", 160, True),
    ):
        records = []
        for _ in range(count):
            numbers = draw(rng, keep)
            records.append({"prompt": ask(rng, numbers), "answer": str(sum(numbers))})
        sets[name] = records
    return sets
