"""Two kinds of error that end a command with one clear line instead of a traceback."""
import sys


class InputError(ValueError):
    """A file, flag or value that cannot be used. The message names it and the remedy."""


class ServiceError(RuntimeError):
    """A server that cannot be used, or not any longer. The message names it and the remedy."""


def exit_cleanly(main):
    """Run a command line; print an InputError or ServiceError as one line and exit with 2."""
    try:
        main()
    except (InputError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
