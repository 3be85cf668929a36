"""The errors that a person can cause, and the line that they get instead of a traceback."""

import sys


class InputError(ValueError):
    """A wrong flag, file or setting, found before any work: one line, exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (a NaN reward, a full disk): one line, exit code 1; the finished steps are saved. It is
    raised on every process, or the others would wait for it."""


class Stopped(Exception):
    """A signal asked the run to stop, and its work is saved: one line, exit code 128 + the signal's number."""

    def __init__(self, number, line):
        super().__init__(line)
        self.number = number


rescues = []  # what to call after a RunError; the Runtime of the run puts its own there


def run(main, args):
    """main(args); an InputError or RunError ends it with one line on stderr, and of the latter the finished steps are
    saved. Tracebacks are for our own bugs."""
    try:
        main(args)
    except (InputError, RunError) as error:
        _say("error", error)
        if isinstance(error, InputError):
            sys.exit(2)
        for rescue in list(rescues):
            try:
                rescue()
            except RunError as worse:
                _say("error", worse)
        sys.exit(1)
    except RuntimeError as error:
        if not _lost_a_process(error):
            raise
        _say(
            "error",
            "another process of this run is gone; what it said stands above or in its machine's log, and the last "
            "checkpoint is intact: start again with --resume latest",
        )
        sys.exit(1)
    except Stopped as stopped:
        _say("stopped", stopped)
        sys.exit(128 + stopped.number)


def _say(what, line):
    # one write: other processes write too
    sys.stderr.write(f"{what}: {' '.join(str(line).split())}\n")


def _lost_a_process(error):
    """Whether the processes' exchange failed: torch's own errors of NCCL and the store, and gloo's, which has none."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error)
