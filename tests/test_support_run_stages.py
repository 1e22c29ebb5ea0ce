"""The stages of run.sh in one process and in separate ones."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("flags", [[], ["--separate"]])
def test_stages_run_in_order_and_stop_at_the_first_that_fails(tmp_path, flags):
    script = tmp_path / "say it.py"
    script.write_text("import os, sys\n"
                      "print(sys.argv[1:], __name__, flush=True)\n"
                      "if sys.argv[1] == 'fail': sys.exit(2)\n")
    python = sys.executable
    quoted = str(script).replace(" ", "\\ ")
    stages = [f"one: {python} {quoted} a\\ b", f"two: {python} {quoted} fail", f"three: {python} {quoted} c"]
    done = subprocess.run([python, "-m", "support.run_stages", *flags, *stages],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "--- one (0s)\n['a b'] __main__\n--- two (0s)\n['fail'] __main__\n"


def test_run_sh_lists_its_stages_and_explains_every_variable_it_reads():
    text = (ROOT / "run.sh").read_text()
    listed = subprocess.run(["bash", "run.sh", "stages"], cwd=ROOT, capture_output=True, text=True,
                            env={"PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin"})
    lines = listed.stdout.splitlines()
    assert listed.returncode == 0 and len(lines) == 26
    assert [line.split()[1] for line in lines[1::2]] == [
        "intervene.py", "intervene.py", "intervene.py", "intervene.py", "ipo.py", "intervene.py",
        "intervene.py", "intervene.py", "ipo.py", "evaluate.py", "evaluate.py", "evaluate.py", "evaluate.py"]
    usage = text[text.index("HELP'\n"):text.index("\nHELP\n")]
    read = set(re.findall(r"\$\{([A-Z][A-Z0-9_]+):?[-+]", text))
    internal = {"OMP_WAIT_POLICY", "OMP_NUM_THREADS"}
    explained = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", usage))
    assert read - internal <= explained, read - internal - explained
    assert subprocess.run(["bash", "run.sh", "nosuch"], cwd=ROOT, capture_output=True).returncode == 2
