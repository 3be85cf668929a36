"""The errors that a person can cause, and the one line that they get instead of a traceback.

InputError    a wrong flag, file or setting, found before any work                exit code 2
RunError      a run that cannot continue: a reward that is not finite, a full disk  exit code 1
Stopped       a signal asked the run to stop, and its work is saved     128 + the signal's number

Two contexts turn what others raise into these: `loading` around everything that comes from outside
(a model's folder, a reward, a prompt file, a checkpoint, a server), and `phase` around each part of
a training step. The whole traceback of the original exception goes to error.log.
"""

import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn, TextIO

LONGEST = 500  # letters of another exception's message that are shown
run_folder = Path()  # where error.log is written: the working directory, then the run's folder
rescue = None  # error -> None: saves the finished steps when an error ends the run
release = None  # () -> None: frees the run's folder when the program ends


class InputError(ValueError):
    """A wrong flag, file or setting, almost always found before any work."""


class SetupError(InputError):
    """A wrong setting of the shell, as a proxy; `loading` puts in front what needed it."""


class RunError(RuntimeError):
    """A run that cannot continue. Every process raises it; the finished steps are saved."""


class LocalError(RunError):
    """A RunError of one process. The others do not know of it, so nothing is saved together."""


class Diverged(RunError):
    """The weights, or the samples made with them, are not finite: the last steps are not saved."""


class Stopped(Exception):
    """A signal asked the run to stop, and its work is saved."""

    def __init__(self, number: int, line: str) -> None:
        super().__init__(line)
        self.number = number


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. A KeyboardInterrupt of another class was raised by a user's code."""


# --- What others raise ---


@contextlib.contextmanager
def loading(what: str, source: object = "", do: str = "") -> Iterator[None]:
    """Raise InputError, in one line, for any exception inside: what could not be loaded and why.

    what: "reward clip", for example; source: the path or name that the user gave; do: what helps,
    a sentence without its full stop.
    """
    where = f"{what} {source}".strip()
    try:
        yield
    except SetupError as error:
        raise InputError(f"{where.removesuffix(':')}: {error}") from error.__cause__
    except (InputError, RunError, Stopped):
        raise
    except BaseException as error:  # a user's code may even call sys.exit
        if from_a_signal(error):
            raise
        advice = f"; {do}" if do and not out_of_memory(error) else ""
        raise InputError(f"{where} does not load ({described(error)}){advice}") from error


@contextlib.contextmanager
def phase(name: str, memory: str = "") -> Iterator[None]:
    """Raise LocalError that names the phase of a training step for any exception inside.

    name: "the rollout", for example; memory: the flags that help when its memory is not enough.
    """
    try:
        yield
    except (InputError, RunError, Stopped):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise LocalError(f"out of memory in {name} ({text(error)}); {memory}") from error
        raise LocalError(f"{name} failed: {described(error)}{_place(error)}") from error


def out_of_memory(error: BaseException) -> bool:
    """Return whether Python, torch or the operating system had no memory left."""
    name, words = type(error).__name__, text(error)
    named = "allocate memory" in words or "CUDA error: out of memory" in words  # pinned memory
    return isinstance(error, MemoryError) or "OutOfMemory" in name or named


def from_a_signal(error: BaseException) -> bool:
    """Return whether an exception is Ctrl-C, not a KeyboardInterrupt that a user's code raised."""
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, Interrupted) or (isinstance(error, KeyboardInterrupt) and default)


def text(error: BaseException) -> str:
    """Return an exception's message on one line, its class if it has none; 500 letters at most."""
    try:
        words = " ".join(str(error).split())
    except Exception:  # a class of a user's code
        words = ""
    words = words or type(error).__name__
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."


def described(error: BaseException) -> str:
    """Return the class of an exception and the first sentence of its message.

    If a module lacks an attribute, its path is added: a file of that name may hide the package.
    """
    words, name = text(error), type(error).__name__
    module = getattr(error, "obj", None) if isinstance(error, AttributeError) else None
    if isinstance(module, ModuleType):
        place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "")
        words = f"{words} (imported from {place})" if place else words
    sentence = re.split(r"(?<=[a-z)\]])\. ", words)[0].removesuffix(".")
    return name if sentence == name else f"{name}: {sentence}"


def _place(error: BaseException) -> str:
    """Return the file and line that raised an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


# --- How a program ends ---


def run(main: Callable[[Any], Any], args: Any) -> None:
    """Call main(args). An error ends the program with one line on stderr and an exit code."""
    with one_line():
        main(args)
        accelerate = sys.modules.get("accelerate.state")  # without it there are no processes
        if accelerate and accelerate.is_initialized():
            accelerate.PartialState().destroy_process_group()


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """End the program with one line on stderr for every exception inside, and raise SystemExit.

    A RunError, or an exception that nobody expected, saves the finished steps first.
    """
    with _lasting_streams(), _own_interrupt():
        try:
            yield
        except InputError as error:
            _print("error", f"{error}{_logged(error)}")
            _rescue(error)  # a conditioning image, for example, is read in a step
            sys.exit(2)
        except Stopped as stopped:
            _print("stopped", str(stopped))
            sys.exit(128 + stopped.number)
        except KeyboardInterrupt:
            _print("stopped", "SIGINT: at once")
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            line = str(error) if isinstance(error, RunError) else described(error)
            _print("error", f"{line}{_hint(error)}{_logged(error)}")
            _rescue(error)
            sys.exit(1)
        finally:
            if release:
                release()


def _hint(error: BaseException) -> str:
    """Return a hint when the exchange between processes failed, which has no error of its own."""
    while error:
        if type(error).__name__.startswith("Dist") or "gloo" in str(error):
            return (
                "; another process of this run ended: its own message is above, or in the log of "
                "its machine. --resume latest continues from the last checkpoint"
            )
        error = error.__cause__
    return ""


def _logged(error: BaseException) -> str:
    """Write the traceback to error.log, unless the error is only ours; return where it is."""
    if isinstance(error, (InputError, RunError)) and error.__cause__ is None:
        return ""
    path = run_folder / "error.log"
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(lines) + "\n")  # one write: other processes write too
    except OSError:  # a full or read-only disk
        return ""
    return f" (traceback: {path})"


def _rescue(error: Exception) -> None:
    """Save the finished steps, unless other processes would have to take part and do not know."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    everywhere = isinstance(error, RunError) and not isinstance(error, LocalError)
    chained = error
    while chained:  # the frames hold the memory that saving may need
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__cause__
    if rescue and (alone or everywhere):
        try:
            rescue(error)
        except Exception as worse:
            _print("error", f"the finished steps could not be saved: {text(worse)}")


def warn(line: str) -> None:
    """Print one line of warning on stderr."""
    _print("warning", line)


def _print(kind: str, line: str) -> None:
    line = " ".join(line.split())
    # a server's answer or a file name may hold control characters
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    line = line if len(line) <= 1200 else f"{line[:800]} ... {line[-350:]}"
    start = "\n" if getattr(sys.stderr, "in_a_line", False) else ""
    sys.stderr.write(f"{start}{kind}: {line}\n")  # one write: other processes write too


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Raise Interrupted for Ctrl-C inside, where Python would raise KeyboardInterrupt."""

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
    """Keep running when stdout or stderr is closed or its disk is full: only the output is lost."""
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
            _print("warning", f"standard output ended early: {text(sys.stdout.lost)}")
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream; when it cannot be written to any more, the output goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost = None
        self.in_a_line = False  # whether a progress bar left the cursor behind its words

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, words: str) -> int:
        self._try(self.stream.write, words)
        if words:
            self.in_a_line = not words.endswith(("\n", "\r"))
        return len(words)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., Any], *words: str) -> None:
        try:
            action(*words)
        except OSError as error:
            self.lost = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # the stream's buffer is flushed there, too
            os.close(nowhere)
