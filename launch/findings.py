"""What the checks before a run find."""
import contextlib

from support.errors import InputError, os_error_line


class Findings:
    """Problems, which end the run, and warnings, which do not; each once, in order, on a line."""

    def __init__(self):
        self._problems = {}  # used as ordered sets
        self._warnings = {}

    def problem(self, text):
        self._problems[_one_line(text)] = None

    def warning(self, text):
        self._warnings[_one_line(text)] = None

    @property
    def problems(self):
        return list(self._problems)

    @property
    def warnings(self):
        return list(self._warnings)

    @contextlib.contextmanager
    def reporting(self, what):
        """Report an InputError, or an error of the operating system, as a problem of `what`."""
        try:
            yield
        except InputError as error:
            self.problem(f"{what}: {error}")
        except OSError as error:
            self.problem(f"{what}: {os_error_line(error)}")


def _one_line(text):
    return " ".join(str(text).split())
