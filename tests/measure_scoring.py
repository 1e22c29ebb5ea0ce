"""The scorers on the published files' own solutions. Run by hand, once HumanEval and MATH-500 were fetched:

    python -m benchmarks.fetch humaneval math500 && python tests/measure_scoring.py

HumanEval: all canonical solutions must pass, and 20 functions that return None must fail. MATH-500: the last boxed
result of each solution against its answer, by spelling and, where it is installed, by math-verify.
"""
import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.answers import Grader, program_pieces  # noqa: E402
from benchmarks.sandbox import active_layers, run_code  # noqa: E402
from benchmarks.sets import find_prompts, published_file  # noqa: E402
from data import load_prompts  # noqa: E402
from evaluate import last_boxed  # noqa: E402
from support.errors import exit_cleanly  # noqa: E402
from support.files import read_rows  # noqa: E402


def passes(task, body):
    """Whether a function with this body passes the task's tests, in the sandbox."""
    return run_code(*program_pieces(task, f"```python\n{task['code_prompt']}{body}\n```"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of the sets (default: $IPO_DATA, else ./data-sets)")
    folder = parser.parse_args().data_dir
    tasks = load_prompts(find_prompts("humaneval", folder))
    right = [task["canonical_solution"] for task in tasks]
    wrong = ["    return None\n"] * 20
    n_right = sum(map(passes, tasks, right))
    n_wrong = sum(map(passes, tasks, wrong))
    print(f"HumanEval, sandbox layers {', '.join(active_layers())}: {n_right} of {len(tasks)} canonical solutions "
          f"pass, {n_wrong} of {len(wrong)} broken ones")
    rows = read_rows(published_file("math500", folder))  # whose solutions our records leave out
    for use_math_verify in (False, True) if find_spec("math_verify") else (False,):
        grader = Grader(use_math_verify)
        equal = sum(grader(last_boxed(row["solution"]), row["answer"]) for row in rows)
        print(f"MATH-500, {grader.name}: {equal} of {len(rows)} solutions equal their answers")
        grader.close()


if __name__ == "__main__":
    exit_cleanly(main)
