"""How a command ends where it cannot go on: with one clear line instead of a traceback."""
import errno
import os
import signal
import sys

# What to do about the errors that the operating system reports. Most concern a file.
REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EACCES: "Change its permissions, or name another place",
    errno.EPERM: "Change its permissions, or name another place",
    errno.EROFS: "Name another place",
    errno.EEXIST: "A file stands where a folder is needed: move it, or name another place",
    errno.ENOTDIR: "A file stands where a folder is needed: move it, or name another place",
    errno.EISDIR: "A file is needed here, not a folder",
    errno.ENOENT: "Check the path",
}

INTERRUPTED = "interrupted. What is finished is kept; run the same command again to continue."


class InputError(ValueError):
    """A file, flag or value that cannot be used. The message names it and the remedy."""


class ServiceError(RuntimeError):
    """A server that cannot be used, or not any longer. The message names it and the remedy."""


def exit_cleanly(main):
    """Run a command line, and end it with one line on stderr where it cannot go on.

    The exit status is 130 after Ctrl-C, and 2 after an InputError, a ServiceError or an error of
    the operating system that names a file. Where the reader of our output has gone, as `| head`
    does, it is 141, as for any program that a broken pipe ends, and nothing is printed. Other
    exceptions are bugs and keep their traceback.
    """
    # Not where it is ignored, as by the commands that a shell starts in its background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_interrupted)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:  # torchrun's, see launch/run.py
        exit_interrupted()
    except (InputError, ServiceError) as error:
        fail(error)
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        _let_go_of_stdout()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None and error.errno not in REMEDIES:
            raise
        _let_go_of_stdout()
        fail(os_error_line(error))


def _reader_has_left():
    # A pipe of another kind may have broken too, such as that to a process of ours.
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def fail(message):
    """Print an error as one line and exit with 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def os_error_line(error):
    """What an error of the operating system says: the file, the problem, the remedy.

    >>> os_error_line(OSError(errno.ENOSPC, "No space left on device", "pairs.jsonl"))
    'pairs.jsonl: No space left on device. Free some space, then run the same command again.'
    """
    where = "standard output" if error.filename is None else error.filename
    remedy = REMEDIES.get(error.errno, "Mend that")
    return f"{where}: {error.strerror}. {remedy}, then run the same command again."


def _let_go_of_stdout():
    # Python flushes it once more when it ends, and would report the same error again.
    try:
        sys.stdout.flush()
    except RuntimeError:  # Ctrl-C has come while it was being written to
        pass
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_interrupted(*_):
    """End after Ctrl-C, at once, with one line and exit status 130.

    As the handler of the signal: a KeyboardInterrupt gets lost in libraries that catch everything,
    and waits for threads, which may wait for a server. Nothing is lost, because every file of ours
    survives a kill.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C changes nothing
    # Under torchrun each process would say it; there the launcher does.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        start = "\n" if os.isatty(2) else ""  # below a progress bar, not behind it
        # Not by print: sys.stderr may be in the middle of a write.
        os.write(2, f"{start}{INTERRUPTED}\n".encode())
    _let_go_of_stdout()
    os._exit(130)


def _report_uncaught(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        exit_interrupted()
    sys.__excepthook__(kind, error, traceback)


# Ctrl-C while a command is still importing torch, before it comes to `exit_cleanly`.
sys.excepthook = _report_uncaught
