"""What a response answers, and whether that is right: formulas, letters, code.

The response is what follows `</think>`, and the last answer in it counts. A truncated trace has
none: it counts as wrong without being looked at here. Run as a program, `python -m
benchmarks.answers`, this module is the process in which math-verify works.
"""
import json
import re
import select
import subprocess
import sys
import textwrap
from fractions import Fraction
from importlib import metadata
from math import comb
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# -------------------------------------------------------------------------- spelling of mathematics

TEXT_COMMAND = (
    r"\\(?:text|mbox|mathrm|textbf|textit|mathbf|textnormal|operatorname)\s*\{([^{}]*)\}"
)
UNIT_WORD = (
    r"(?:(?:square|cubic|sq) )?"
    r"(?:degrees?|cents?|dollars?|percent|units?|inch(?:es)?|feet|foot|ft|yards?|miles?|[ckm]m|"
    r"meters?|hours?|minutes?|seconds?|days?|weeks?|years?|points?|kg|grams?|pounds?)"
)
POWER = r"(?:\^\{?\d\}?)?"  # of a unit: cm^2

DELIMITER_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?")
SPACING = re.compile(r"(\\\\)|\\(?:[!,:;> ]|q?quad(?![a-zA-Z]))|~")  # \\ ends a matrix's row
UNIT_IN_TEXT = re.compile(r"(?<=[\d}])\s*" + TEXT_COMMAND + POWER + r"\s*$")
UNIT_IN_WORDS = re.compile(r"(?<=[\d}])\s+" + UNIT_WORD + POWER + "$")
SYMBOLS = re.compile(r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree|°|\\?[$%]|\s+")
# "x=", "x \in", "m/n=" or "\frac{m}{n}="
VARIABLE = re.compile(
    r"^(?:[a-zA-Z](?:/[a-zA-Z])?|\\[dtc]?frac\{?[a-zA-Z]\}?\{?[a-zA-Z]\}?)"
    r"(?:=|\\in(?![a-zA-Z]))(?!.*=)"
)
IN_PARENTHESES = re.compile(r"^\(([A-Za-z]|\d+)\)$")
SHORT_FRACTION = re.compile(r"\\frac(\{[^{}]*\}|\\pi|\w)(\{[^{}]*\}|\\pi|\w)")
SLASH_FRACTION = re.compile(r"(?<![\w.)}/^])(\d+)/(\d+)(?![\w./^])")
# \pi/2, 2x/3, \sqrt{3}/2, 1/\pi; but not 1/2x, x^a/2, a/b/c or \sin x/2, which are ambiguous.
SYMBOL = r"\\pi(?![a-zA-Z])|\\sqrt\{[^{}]*\}|[a-zA-Z]"
SYMBOL_FRACTION = re.compile(
    rf"(?<![\w.)\]}}/^!\\])(\d+|\d*(?:{SYMBOL}))/(\d+|{SYMBOL})(?![\w./^!({{\\\[])"
)
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
NUMBER = re.compile(
    r"(?P<sign>[+-]?)"
    r"(?:(?P<integer>\d+)?\\frac\{(?P<top>[+-]?\d+)\}\{(?P<bottom>\d+)\}|(?P<decimal>\d*\.?\d+)\.?)"
)


def normalise_answer(answer):
    r"""One spelling for answers that differ in spelling only.

    It knows spaces, \left, \text, units, $, %, commas, fractions and a leading `x =`.

    >>> normalise_answer(r"\$32,\!348"), normalise_answer(r"x = \dfrac12")
    ('32348', '1/2')
    >>> normalise_answer("0.50"), normalise_answer(r"1\frac{4}{5}"), normalise_answer("m/n = 25/8")
    ('1/2', '9/5', '25/8')
    >>> normalise_answer(r"\left( 3, 90^\circ \right)")
    '(3,90)'
    """
    text = answer.strip().rstrip(".").strip("$")
    text = DELIMITER_SIZE.sub("", text)
    text = SPACING.sub(lambda match: match[1] or " ", text)
    text = text.replace("{,}", ",")
    text = UNIT_IN_TEXT.sub("", text)
    text = re.sub(TEXT_COMMAND, r"\1", text)
    text = UNIT_IN_WORDS.sub("", text)
    text = SYMBOLS.sub("", text)
    text = VARIABLE.sub("", text)
    text = IN_PARENTHESES.sub(r"\1", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = SHORT_FRACTION.sub(braced_fraction, text)
    text = SLASH_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = SYMBOL_FRACTION.sub(r"\\frac{\1}{\2}", text)
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    value = rational(text)
    if value is not None:
        return str(value)
    is_word = re.fullmatch("[A-Za-z]{2,}", text)
    return text.lower() if is_word else text


BARE_BOX = re.compile(r"""(?x)
    ( \\(?:boxed|fbox) ) \s*
    ( [+-]? \d (?: [\d.,/] | \{,\} )* (?<=\d)
      | [a-zA-Z]
      | -? \\(?:[dtc]?frac|sqrt|pi|text(?:bf)?|math(?:rm|bf))
        (?: \s* (?: \{[^{}]*\} | \\pi | \d ) )* )
    (?= $ | [\s.,;:!?$)\]}*] | \\[)\],%] )      # \boxed 5x is not understood
    (?! [.,]\d | \s*[-+/=^<>] )                # nor \boxed 5 + x""")


def brace_boxes(response):
    r"""A response with braces around what stands in a box without them.

    >>> brace_boxes(r"so \boxed 25. Or \boxed\frac12, or \boxed{3}?")
    'so \\boxed{25}. Or \\boxed{\\frac12}, or \\boxed{3}?'
    """
    return BARE_BOX.sub(r"\1{\2}", response)


def braced_fraction(match):
    r"""A match of SHORT_FRACTION as \frac{a}{b}."""
    top = match[1].strip("{}")
    bottom = match[2].strip("{}")
    return r"\frac{%s}{%s}" % (top, bottom)


def rational(text):
    """The exact value of a decimal, fraction or mixed number; None for any other text."""
    if len(text) >= 300:
        return None
    number = NUMBER.fullmatch(text)
    if number is None:
        return None
    if number["decimal"]:
        value = Fraction(number["decimal"])
    elif int(number["bottom"]):
        fraction = Fraction(int(number["top"]), int(number["bottom"]))
        value = int(number["integer"] or 0) + fraction
    else:
        return None
    return -value if number["sign"] == "-" else value


class Grader:
    """Are two mathematical answers equal? By spelling; where that differs, by math-verify.

    math-verify need not be installed; without it spelling alone decides. `use_math_verify`: None
    uses it where it is installed, True requires it (else InputError), False does without. It runs
    in a process of its own, because neither its timeouts nor an `except` can end a power tower of
    large integers: that process is killed after `seconds`. The answer then counts as not equal, and
    in `failures`.
    """

    def __init__(self, use_math_verify=None, seconds=30):
        self.seconds = seconds
        self.failures = 0
        self.worker = None
        self.name = "string match"
        if use_math_verify is False:
            return
        try:
            self.name = "math-verify " + metadata.version("math-verify")
        except metadata.PackageNotFoundError:
            if use_math_verify:
                from support.errors import InputError
                message = "math-verify is missing: pip install -e '.[eval]'"
                raise InputError(message) from None

    def __call__(self, found, answer):
        """True or False. found: str, or None where nothing was found."""
        if found is None or len(found) > 1000:
            return False
        ours = normalise_answer(found)
        theirs = normalise_answer(answer)
        if ours == theirs:
            return ours != ""
        both_integers = re.fullmatch(r"-?\d+", ours) and re.fullmatch(r"-?\d+", theirs)
        if both_integers or self.name == "string match":
            return False
        reply = self._ask_worker(found, answer)
        if reply not in ("true\n", "false\n"):
            self.failures += 1
        return reply == "true\n"

    def _ask_worker(self, found, answer):
        """The line that math-verify's process replies; "" if it died or took too long."""
        if self.worker is None:
            self.worker = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.answers"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        reply = ""
        try:
            self.worker.stdin.write(json.dumps([found, answer]) + "\n")
            self.worker.stdin.flush()
            readable, _, _ = select.select([self.worker.stdout], [], [], self.seconds)
            if readable:
                reply = self.worker.stdout.readline()
        except BrokenPipeError:
            pass
        if not reply:
            self.close()
        return reply

    def close(self):
        """End the process; the next answer starts another one."""
        if self.worker:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None


def serve_math_verify():
    """The process of math-verify: a line with two answers in; true, false or null out."""
    import logging
    import resource

    sys.path.pop(0)  # the project's folder: its modules must not shadow a library's
    out = sys.stdout
    sys.stdout = sys.stderr  # discarded: what a library prints is not an answer
    from math_verify import parse, verify
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for line in sys.stdin:
        found, answer = json.loads(line)
        try:
            found = parse(r"\boxed{" + found + "}", parsing_timeout=5)
            answer = parse(r"\boxed{" + answer + "}", parsing_timeout=5)
            result = bool(verify(answer, found, timeout_seconds=5))
        except Exception:  # of whatever kind sympy has for this formula
            result = None
        print(json.dumps(result), file=out, flush=True)


# ------------------------------------------------------------------------------------------ letters

CHOSEN_LETTER = re.compile(r"""(?ix)
    (?: answer \s* (?:\*\*|__)? \s* : | \\boxed\s*\{ )     # "Answer:", "**Answer:**", "\boxed{"
    (?: [\s*_$({] | \\\(                                   # and what may stand round the letter
      | \\(?:boxed|text|mathrm|mathbf|textbf)\s*\{ )*
    # "Answer: a closer look" names none, "Answer: A is right" does: no noun phrase begins so.
    ( a (?! [ \t]+ (?! (?:is|was|seems|because|since|as|by|due|from|with|and|or)\b ) [a-z] )
      | [bcd] )
    (?! [\w'’-] )
    (?! [ \t]+ (?:is|was|seems) (?: n['’]t | [ \t]+(?:not|wrong|incorrect|false) ) \b )""")


def last_choice(response):
    r"""The letter of the last `Answer: X` or `\boxed{X}` (GPQA), or None.

    The last, because the first is often one that is then withdrawn.

    >>> last_choice("Answer: A? No.\n**Answer: (C)**"), last_choice("A close call")
    ('C', None)
    >>> last_choice(r"Answer: $\boxed{\text{b}}$"), last_choice("Answer: A is correct.")
    ('B', 'A')
    """
    letter = None
    for match in CHOSEN_LETTER.finditer(brace_boxes(response)):
        letter = match[1].upper()
    return letter


# --------------------------------------------------------------------------------------------- code

CODE_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*([^\s`]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE
)
PYTHON_NAMES = ("python", "python3", "py", "")


def program_pieces(task, response):
    """(program, tests) of a response to a HumanEval task, pieces of Python for `run_code`.

    None where the response holds no complete ```python block. CHOICE: the last block that defines
    the function counts, after the prompt's own imports and helpers; without such a block the last
    one is taken for the function's body.
    """
    blocks = []
    for language, code in CODE_BLOCK.findall(response):
        if language.lower() in PYTHON_NAMES:
            blocks.append(textwrap.dedent(code))
    if not blocks:
        return None
    entry_point = task["entry_point"]
    head = re.compile(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    defining = [code for code in blocks if head.search(code)]
    if defining:
        program = [task["code_prompt"], defining[-1]]
    else:
        body = textwrap.indent(blocks[-1], "    ")
        program = [task["code_prompt"] + body]
    tests = [
        task["code_prompt"],  # some tests call its helpers
        f"{entry_point} = candidate_function({entry_point!r})",
        task["test"],
        f"check({entry_point})",
    ]
    return program, tests


def pass_at_k(n, c, k):
    """The chance that one of k samples passes, estimated without bias from n of which c passed.

    k is at most n.

    >>> pass_at_k(10, 3, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.3, 0.5, 1.0)
    """
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


if __name__ == "__main__":
    serve_math_verify()
