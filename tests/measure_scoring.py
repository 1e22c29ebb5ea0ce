"""The scorers on the published files' own solutions. Run by hand, with HumanEval and MATH-500 in the data folder:

    python data.py fetch humaneval math500 && python tests/measure_scoring.py

HumanEval: all canonical solutions must pass, and 20 functions that return None must fail. MATH-500: the last boxed result of each
solution against its answer, by spelling and, where it is installed, by math-verify.
"""
import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
from extras import sandbox, scoring  # noqa: E402
from extras.files import read_rows  # noqa: E402


def passes(task, body):
    """Whether a function with this body passes the task's tests, in the sandbox."""
    return sandbox.run(scoring.program(task, f"```python\n{task['code_prompt']}{body}\n```"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of the sets' files (default: $IPO_DATA, else ./data-sets)")
    folder = parser.parse_args().data_dir
    tasks = data.load_prompts("humaneval", data_dir=folder)
    right, wrong = [t["canonical_solution"] for t in tasks], ["    return None\n"] * 20
    print(f"HumanEval, sandbox layers {', '.join(sandbox.layers())}: {sum(map(passes, tasks, right))} of {len(tasks)} "
          f"canonical solutions pass, {sum(map(passes, tasks, wrong))} of {len(wrong)} broken ones")
    rows = read_rows(data.prompts_path("math500", folder))
    for use in (False, True) if find_spec("math_verify") else (False,):
        grader = scoring.Grader(use)
        equal = sum(grader(scoring.last_boxed(r["solution"]), r["answer"]) for r in rows)
        print(f"MATH-500, {grader.name}: {equal} of {len(rows)} solutions equal their answers")
        grader.close()


if __name__ == "__main__":
    main()
