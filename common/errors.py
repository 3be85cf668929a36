"""The errors that a person can cause, and the line that they get instead of a traceback."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO


class InputError(ValueError):
    """A wrong flag, file or setting, found before any work: one line, exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (a NaN reward, a full disk): one line, exit code 1; the finished
    steps are saved. It is raised on every process, or the others would wait for it."""


class Diverged(RunError):
    """The weights, or what they make, are no numbers: these steps are not worth saving."""


class Stopped(Exception):
    """A signal asked the run to stop, and its work is saved: one line, exit code 128 + the signal's
    number."""

    def __init__(self, number: int, line: str) -> None:
        super().__init__(line)
        self.number = number


class Interrupted(KeyboardInterrupt):
    """Ctrl-C at a moment when nothing has to be finished. A KeyboardInterrupt of another class is
    somebody's code's."""


# By the function in which it happens: where that is, and what helps.
OUT_OF_MEMORY = {
    "score_one": (
        "a reward",
        "lower --reward-batch, or keep the judge behind a server (--judge-url)",
    ),
    "decode": (
        "the VAE",
        "lower --decode-batch, or the size of the samples (--height, --width, --frames)",
    ),
    "encode": ("the text encoders", "add --offload-encoders"),
    "rollout": ("the rollout", "lower --micro-batch or --prompts-per-step, add --offload-encoders"),
    "backward": (
        "the update",
        "lower --micro-batch, add --gradient-checkpointing or --exchange-often, train a LoRA "
        "(--lora-rank)",
    ),
}
ANYWHERE = (
    "lower --micro-batch, --decode-batch, --reward-batch or the size of the samples, train a "
    "LoRA (--lora-rank), add "
    "--gradient-checkpointing or --offload-encoders"
)
OUT_OF_MEMORY["velocity"] = OUT_OF_MEMORY["update"] = OUT_OF_MEMORY[
    "backward"
]  # where it is no rollout's

rescues = []  # what to call with a RunError; the Runtime of the run puts its own there
# what tells the other processes that this one cannot go on, true if they heard it; the same
alarms = []
last_checkpoint = ""  # the folder of the last one


def run(main: Callable[[Any], Any], args: Any) -> None:
    """main(args); an InputError or RunError ends it with one line on stderr, and of the latter the
    finished steps are saved. Tracebacks are for our own bugs."""
    with one_line():
        main(args)
        state = sys.modules.get("accelerate.state")  # no run, no processes
        if state and state.is_initialized():
            # not before: a program may hold several runs (--calibrate)
            state.PartialState().destroy_process_group()


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Inside, what a person, a machine or a signal can cause ends the program with one line on
    stderr: SystemExit with the code of its class, 1 for the machine's. All but an InputError and a
    signal call the `rescues` before that."""
    with _lasting_streams(), _own_interrupt():
        try:
            yield
        except InputError as error:
            _say("error", error)
            sys.exit(2)
        except RunError as error:
            _say("error", error)
            _rescue(error)
            sys.exit(1)
        except Stopped as stopped:
            _say("stopped", stopped)
            sys.exit(128 + stopped.number)
        except KeyboardInterrupt:
            _say(
                "stopped",
                "SIGINT: at once; --resume latest goes on from the last checkpoint, if there is "
                "one",
            )
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            line = of_the_machine(error)
            if line:
                _say("error", line)
                traceback.clear_frames(
                    error.__traceback__
                )  # the memory that they hold, the rescue may need
            # the other processes, if any, know nothing of this, unless they hear of it
            if os.environ.get("WORLD_SIZE", "1") == "1" or _alarmed():
                _rescue(error)
            if not line:
                raise
            sys.exit(1)


def from_a_signal(error: BaseException) -> bool:
    """Whether an exception is Ctrl-C's, and not one of the same class that somebody's code
    raised."""
    plain = (
        isinstance(error, KeyboardInterrupt)
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    return plain or isinstance(error, Interrupted)


def text(error: BaseException) -> str:
    """What an exception says, or its class where it says nothing or cannot be asked, of no more
    than 500 letters."""
    try:
        words = str(error)
    except Exception:  # anybody's class
        words = ""
    words = " ".join(words.split()) or type(error).__name__
    return words if len(words) <= 500 else f"{words[:500]}..."


def of_the_machine(error: Exception) -> str:
    """The line for what a machine without memory, a disk without room or a lost process makes
    Python or torch raise; "" for all else."""
    if _lost_a_process(error):
        return (
            "another process of this run is gone; what it said stands above or in its machine's "
            "log, and the last "
            "checkpoint is intact: start again with --resume latest"
        )
    if out_of_memory(error):
        where, cure = out_of_memory(error)
        return f"out of memory{where} ({text(error)}): {cure}"
    if isinstance(error, OSError):
        return f"{text(error)}; is the disk full, or gone? Earlier checkpoints are intact: go on with --resume latest"
    return ""


def out_of_memory(error: BaseException) -> tuple[str, str] | None:
    """(where the memory ran out, " in ..." by the functions under way or "", the flags that help
    there, with the last checkpoint); None for any other error."""
    name, said = type(error).__name__, text(error)
    if (
        not isinstance(error, MemoryError)
        and "OutOfMemory" not in name
        and "allocate memory" not in said
    ):
        return None
    names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    where, cure = next(
        (value for name, value in OUT_OF_MEMORY.items() if name in names), ("", ANYWHERE)
    )
    last = f"; the last checkpoint is {last_checkpoint}" if last_checkpoint else ""
    return f" in {where}" if where else "", cure + last


def _alarmed() -> bool:
    try:
        return any([alarm() for alarm in alarms])
    except Exception:  # they are gone
        return False


def _rescue(error: Exception) -> None:
    for rescue in list(rescues):
        try:
            rescue(error)
        except Exception as worse:
            _say("error", f"the finished steps could not be saved: {text(worse)}")


def _lost_a_process(error: Exception) -> bool:
    """Whether the processes' exchange failed: torch's own errors of NCCL and the store, and gloo's,
    which has none."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__.startswith("Dist") or "gloo" in str(error)
    )


def _say(what: str, line: str | Exception) -> None:
    line = " ".join(str(line).split())
    line = "".join(
        letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line
    )  # a server's, a file's
    line = line if len(line) <= 1000 else f"{line[:700]} ... {line[-300:]}"
    sys.stderr.write(f"{what}: {line}\n")  # one write: other processes write too


# --- Ctrl-C, and streams that end before the run does ---


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C raises Interrupted, where it would have raised KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _lasting_streams() -> Iterator[None]:
    """Inside, a closed pipe or a full device under stdout or stderr ends nothing but the output,
    and letters that its encoding lacks are written as numbers."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(_Lasting, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        if sys.stdout.lost:
            _say("warning", f"standard output ended early: {text(sys.stdout.lost)}")
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream; once it cannot be written to, what is written goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lost = stream, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, words: str) -> int:
        self._try(self.stream.write, words)
        return len(words)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., Any], *words) -> None:
        try:
            action(*words)
        except OSError as error:
            self.lost = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(
                nowhere, self.stream.fileno()
            )  # what waits in its buffer goes there too, when Python ends
            os.close(nowhere)
