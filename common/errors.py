"""The two errors that a person can cause, and the line that they get instead of a traceback."""

import sys


class InputError(ValueError):
    """A wrong flag, file or setting, found before any work: one line, exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (a NaN reward, a full disk): one line, exit code 1; the last checkpoint is intact."""


def run(main, args):
    """main(args); an InputError or RunError ends it with one line on stderr. Tracebacks are for our own bugs."""
    try:
        main(args)
    except (InputError, RunError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
