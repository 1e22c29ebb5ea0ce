"""Run a program, and end it together with the process that asked for it.

    python -I support/watcher.py PID PROGRAM WORD ...

PID is the process that started this one. When that is gone, whatever has killed it, or when this
process gets SIGTERM, the program is asked to end, then all that it has started, and what still
runs a minute later is killed. The exit status is the program's (128 + N if signal N ended it).

A file of its own that imports nothing of this project, because it stays in memory beside a server.
"""
import ctypes
import os
import signal
import subprocess
import sys
import time

# Seconds after the first request to end. A server that is killed leaves workers behind that hold
# its GPU, so it gets time to end them itself.
ASK_GROUP = 30
KILL_GROUP = 60
GIVE_UP = 70
POLL = 0.05

# From <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Watcher:
    """A program that was started, as the leader of its own group of processes."""

    def __init__(self, command):
        self.status = None  # the program's exit status, once it has ended
        self.stop_asked = False
        signal.signal(signal.SIGTERM, self._ask_stop)
        linux_prctl(PR_SET_CHILD_SUBREAPER, 1)  # to see the end of its children's children too
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_watcher)
        self.pid = process.pid

    def _ask_stop(self, *_):
        self.stop_asked = True

    def run(self, parent):
        """Wait until the program ends, the parent is gone or SIGTERM comes; then end the rest."""
        while self._any_left() and self.status is None:
            if self.stop_asked or os.getppid() != parent:
                break
            time.sleep(POLL)
        self._stop()
        return self.status

    def _stop(self):
        begun = time.monotonic()
        if self.status is None:
            self._signal(os.kill, signal.SIGTERM)
        while self.status is None and self._any_left():
            if time.monotonic() - begun > ASK_GROUP:
                break
            time.sleep(POLL)
        self._signal(os.killpg, signal.SIGTERM)
        killed = False
        while self._any_left():
            waited = time.monotonic() - begun
            if waited > KILL_GROUP and not killed:
                self._signal(os.killpg, signal.SIGKILL)
                killed = True
            if waited > GIVE_UP:
                break
            time.sleep(POLL)

    def _signal(self, send, number):
        try:
            send(self.pid, number)
        except OSError:  # all have ended
            pass

    def _any_left(self):
        """Whether any process is left of those that were started; notes the program's status."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code


def _end_with_watcher():
    """In the program's process: get SIGTERM even where this watcher is killed."""
    linux_prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def linux_prctl(option, value):
    """Set a property of this process; elsewhere than on Linux nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)


def main():
    """Watch over the program that the command line names."""
    parent = int(sys.argv[1])
    command = sys.argv[2:]
    try:
        watcher = Watcher(command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    sys.exit(watcher.run(parent))


if __name__ == "__main__":
    main()
