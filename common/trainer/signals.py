"""What stops a run. Signals: it finishes its step first, unless that has sampled only. Errors: the
finished steps are saved, by all processes where they can be told."""

import contextlib
import shlex
import signal
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import torch

from common import errors
from common.errors import RunError
from common.trainer import run_folder
from common.trainer.processes import Processes

if TYPE_CHECKING:  # which has this file's class
    from common.trainer.runtime import Runtime

LOST = 255  # in the place of a signal's number: a process cannot go on


class Stopping(Processes):
    """The part of a Runtime that stops it."""

    signal = 0  # the number of the one that asked this process to stop
    sampling = False  # whether all processes are between two questions for signals

    def watch(self) -> None:
        """From now on an error that ends the program saves the finished steps first, and tells the
        other processes."""
        errors.rescues[:], errors.alarms[:] = [self.rescue], [self.alarm]

    def check_signals(self) -> None:
        """Between steps, and between samples: if a process got a signal, saves on all of them and
        raises Stopped; if one cannot go on, raises RunError on the others."""
        caught = torch.tensor([self.signal], device=self.device)
        number = int(self.gather(caught).max()) if self.world > 1 else self.signal
        if number == LOST:
            raise RunError(
                "another process of this run cannot go on; what it said stands above or in its "
                "machine's log"
            )
        if number:
            self.rescue()
            raise errors.Stopped(
                number, f"{signal.Signals(number).name}: stopped after {self.step} steps"
            )

    def alarm(self) -> bool:
        """Tells the other processes that this one cannot go on, where they will ask: while all are
        sampling, unless they wait for its share of the weights first. Returns whether they heard
        it: then all of them rescue. Else says what is lost."""
        heard, lost = self.sampling and not self.sharding, self.step - self.saved
        if not heard and lost > 0:
            print(
                f"the last {lost} steps are lost, as the other processes wait for this one and "
                "cannot save them; a "
                "smaller --save-every loses less",
                flush=True,
            )
        if heard and self.world > 1:
            self.gather(torch.tensor([LOST], device=self.device))
        return heard

    def rescue(self, error: Exception | None = None) -> None:
        """Saves the finished steps, also in the middle of another that has not changed the weights
        yet, unless a checkpoint holds them or they are no good; and says how to go on after this
        error."""
        errors.rescues.clear()  # once: a disk that is full stays full
        diverged = self.any(isinstance(error, errors.Diverged) or not self.finite())
        if self.step > self.saved and not self.moved and not diverged:
            self.save(self.step, {**self.stateful, **self.kept})
        if diverged:
            self.cure = ("--learning-rate", self.args.learning_rate / 10)
        if self.saved and not diverged:
            output = shlex.quote(str(self.output))
            self.print(
                f"{self.saved} steps are saved; go on with --output {output} --resume latest"
            )
        if self.saved and self.cure:
            self.print(
                "to get past this, in a new run: "
                f"{run_folder.new_run(self.output, self.saved, *self.cure)}"
            )


@contextlib.contextmanager
def end_the_step(run: "Runtime") -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP (a closed terminal; not under nohup) let the update
    finish: run.signal is the first one's number, and `check_signals` saves and ends the run. The
    same one again ends it at once."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]

    def note(number: int, frame: FrameType | None) -> None:
        run.signal = run.signal or number
        signal.signal(number, before[number])
        with contextlib.suppress(RuntimeError):  # it may have come in the middle of another line
            run.print(
                f"\n{signal.Signals(number).name}: saving as soon as no update is under way; "
                "once more ends it at once"
            )

    try:
        for number in before:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
