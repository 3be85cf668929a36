"""Signals that ask a run to stop: it finishes its step first, unless that has sampled only."""

import contextlib
import signal


@contextlib.contextmanager
def end_the_step(run):
    """Inside, SIGINT, SIGTERM and SIGHUP (a closed terminal; not under nohup) let the update finish: run.signal is the
    first one's number, and `Runtime.check_signals` saves and ends the run. The same one again ends it at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]

    def note(number, frame):
        run.signal = run.signal or number
        signal.signal(number, before[number])
        with contextlib.suppress(RuntimeError):  # it may have come in the middle of another line
            run.print(
                f"\n{signal.Signals(number).name}: saving as soon as no update is under way; once more ends it at once"
            )

    try:
        for number in before:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
