"""What a response answers, and whether that is right: numbers and formulas, letters, code. Pure functions of its text.

The response is what stands after `</think>`; a truncated one is wrong and never gets here. The last answer in it counts.
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

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are text
_TEXT = r"\\(?:text|mbox|mathrm|textbf|textit|mathbf|textnormal|operatorname)\s*\{([^{}]*)\}"
_UNITS = (r"(?:(?:square|cubic|sq) )?(?:degrees?|cents?|dollars?|percent|units?|inch(?:es)?|feet|foot|ft|yards?|miles?|"
          r"[ckm]m|meters?|hours?|minutes?|seconds?|days?|weeks?|years?|points?|kg|grams?|pounds?)")
_NUMBER = re.compile(r"([+-]?)(?:(\d+)?\\frac\{([+-]?\d+)\}\{(\d+)\}|(\d*\.?\d+)\.?)")
_LETTER = re.compile(r"""(?ix) (?: answer \s* (?:\*\*|__)? \s* : | \\boxed\s*\{ )   # "Answer:", "**Answer:**", "\boxed{"
    (?: [\s*_$({] | \\\( | \\(?:boxed|text|mathrm|mathbf|textbf)\s*\{ )*           # and what may stand round the letter
    (?: a (?! [\w'’-] | [ \t]+[a-z] ) | [bcd] (?! [\w'’-] ) )   # "Answer: a closer look ..." names none""")
_BLOCK = re.compile(r"^[ \t]*```[ \t]*([^\s`]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def last_boxed(text):
    r"""The content of the last `\boxed{...}`, by matching braces; None where there is none or it is not closed.

    >>> last_boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    boxes, depth = list(_BOXED.finditer(text)), 1
    for brace in _BRACES.finditer(text, boxes[-1].end()) if boxes else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[boxes[-1].end():brace.start()]
    return None


def normalise(answer):
    r"""One spelling for answers that differ in spelling only: spaces, \left, \text, units, $, %, commas, fractions, `x =`.

    >>> [normalise(a) for a in (r"\$32,\!348", r"x = \dfrac12", "0.50", r"1\frac{4}{5}", r"\left( 3, 90^\circ \right)")]
    ['32348', '1/2', '1/2', '9/5', '(3,90)']
    """
    s = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", "", answer.strip().rstrip(".").strip("$"))
    s = re.sub(r"(\\\\)|\\(?:[!,:;> ]|q?quad(?![a-zA-Z]))|~", lambda m: m[1] or " ", s)   # spaces; \\ ends a matrix's row
    s = re.sub(r"(?<=[\d}])\s*" + _TEXT + r"(?:\^\{?\d\}?)?\s*$", "", s)                      # the unit of a number
    s = re.sub(r"(?<=[\d}])\s+" + _UNITS + r"(?:\^\{?\d\}?)?$", "", re.sub(_TEXT, r"\1", s))
    s = re.sub(r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree|°|\\?[$%]|\s+", "", s)
    s = re.sub(r"^[a-zA-Z](?:=|\\in(?![a-zA-Z]))(?!.*=)", "", s)
    s = re.sub(r"^\(([A-Za-z]|\d+)\)$", r"\1", s)
    s = re.sub(r"\\[dtc]frac", r"\\frac", s)
    s = re.sub(r"\\frac(\{[^{}]*\}|\w)(\{[^{}]*\}|\w)", lambda m: r"\frac{%s}{%s}" % (m[1].strip("{}"), m[2].strip("{}")), s)
    s = re.sub(r"(?<![\w.)}/])(\d+)/(\d+)(?![\w./^])", r"\\frac{\1}{\2}", s)
    s = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", re.sub(r"([_^])\{(\w)\}", r"\1\2", s))
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", s):
        s = s.replace(",", "")
    number = _NUMBER.fullmatch(s) if len(s) < 300 else None
    if number and (not number[4] or int(number[4])):
        sign, whole, top, bottom, decimal = number.groups()
        value = Fraction(decimal) if decimal else int(whole or 0) + Fraction(int(top), int(bottom))
        return str(-value if sign == "-" else value)
    return s.lower() if re.fullmatch("[A-Za-z]{2,}", s) else s


class Grader:
    """Are two mathematical answers equal? By spelling; where that differs, by math-verify, if it is installed.

    math-verify runs in a process of its own, because neither its timeouts nor an `except` end a power tower of large
    integers: that process is killed after `seconds`, and the answer counts as not equal and in `failures`.
    """

    def __init__(self, use_math_verify=None, seconds=30):
        self.seconds, self.failures, self.worker, self.name = seconds, 0, None, "string match"
        try:
            if use_math_verify is not False:
                self.name = "math-verify " + metadata.version("math-verify")
        except metadata.PackageNotFoundError:
            if use_math_verify:
                raise SystemExit("math-verify is missing: pip install -e '.[eval]'") from None

    def __call__(self, found, answer):
        """True or False. found: str, or None where nothing was found."""
        if found is None or len(found) > 1000:
            return False
        one, other = normalise(found), normalise(answer)
        if one == other or self.name == "string match" or all(re.fullmatch(r"-?\d+", s) for s in (one, other)):
            return one == other != ""
        if self.worker is None:
            self.worker = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=subprocess.DEVNULL, text=True)
        try:
            self.worker.stdin.write(json.dumps([found, answer]) + "\n")
            self.worker.stdin.flush()
            said = self.worker.stdout.readline() if select.select([self.worker.stdout], [], [], self.seconds)[0] else ""
        except BrokenPipeError:
            said = ""
        self.failures += said not in ("true\n", "false\n")
        if not said:
            self.close()
        return said == "true\n"

    def close(self):
        """End the process; the next answer starts another one."""
        if self.worker:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None


def _serve():
    """The process of math-verify: pairs of answers come in, one a line, and true, false or null go out."""
    import logging
    import resource
    sys.path.pop(0)  # this folder
    out, sys.stdout = sys.stdout, sys.stderr  # which nobody reads: what a library prints is no answer
    from math_verify import parse, verify
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for line in sys.stdin:
        try:
            found, answer = (parse(r"\boxed{" + a + "}", parsing_timeout=5) for a in json.loads(line))
            result = bool(verify(answer, found, timeout_seconds=5))
        except Exception:  # of whatever kind sympy has for this formula
            result = None
        print(json.dumps(result), file=out, flush=True)


def choice(response):
    r"""The letter of the last `Answer: X` or `\boxed{X}` (GPQA), or None; the first is often one that is then withdrawn.

    >>> choice("Answer: A? No.\n**Answer: (C)**"), choice(r"Answer: $\boxed{\text{b}}$"), choice("A close call")
    ('C', 'B', None)
    """
    found = [match[0][-1].upper() for match in _LETTER.finditer(response)]
    return found[-1] if found else None


def program(task, response):
    """The pieces of Python that test a response to a HumanEval task; None where it holds no complete ```python block.

    CHOICE: the last block that defines the function counts, after the prompt's own imports and helpers; without such a
    block the last one is taken for the function's body.
    """
    blocks = [textwrap.dedent(code) for kind, code in _BLOCK.findall(response)
              if kind.lower() in ("python", "python3", "py", "")]
    if not blocks:
        return None
    head = re.compile(rf"^(?:async\s+)?def\s+{re.escape(task['entry_point'])}\b", re.MULTILINE)
    whole = [code for code in blocks if head.search(code)]
    pieces = [task["code_prompt"], whole[-1]] if whole else [task["code_prompt"] + textwrap.indent(blocks[-1], "    ")]
    return [*pieces, task["test"], f"check({task['entry_point']})"]


def pass_at_k(n, c, k):
    """The chance that one of k samples passes, estimated without bias from n samples of which c passed (k <= n).

    >>> pass_at_k(10, 3, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.3, 0.5, 1.0)
    """
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


if __name__ == "__main__":
    _serve()
