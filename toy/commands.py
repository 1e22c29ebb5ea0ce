"""Running the project's own commands, as anyone would on the command line."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*words):
    """Run Python with these words in the project's folder; end with its exit status if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
