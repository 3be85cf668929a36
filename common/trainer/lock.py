"""The lock of a run's folder: OUTPUT/.in_use.json names the process that writes into it.

A file that is created exclusively works on every file system, also without flock (NFS, FUSE). It
outlives a killed process, so it says enough to find out whether its owner is alive:

the same machine       the process with its number, if it started when the file says so
another one, or an     the owner touches the file every BEAT seconds; unless that is seen within
other container        SILENCE seconds, by no clock but ours, the owner is dead

The lock of a dead owner is taken over.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from common import errors
from common.errors import InputError, RunError

NAME = ".in_use.json"
BEAT = 15.0
SILENCE = 60.0
HALF_WRITTEN = 2.0  # seconds after which an empty file is what a power failure has left


class Lock:
    """The lock of a folder that does not exist yet or holds a run, until `release`.

    A process has one at a time: a new one releases the one before. It ends with the program.
    """

    def __init__(self, folder: Path, shown: str) -> None:
        """Make the folder and take its lock.

        folder: absolute; shown: as the user knows it. Raises InputError if it is in use, or not
        writable.
        """
        if errors.release:
            errors.release()
        self.path = folder / NAME
        self.shown = shown
        self.made = [folder, *(parent for parent in folder.parents if not parent.exists())]
        self.content = json.dumps({**_this_process(), "token": secrets.token_hex(8)})
        self.ended = threading.Event()
        errors.release = self.release
        try:
            self._take()
        except OSError as error:
            reason = error.strerror or errors.text(error)
            raise InputError(f"--output {shown}: cannot write there ({reason}).") from error
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raise RunError if another process has taken the lock over.

        That happens to a process that was suspended, or cut off from its disk, for SILENCE seconds.
        """
        if _read(self.path) not in (None, self.content):
            raise RunError(
                f"--output {self.shown}: another process has taken this folder over, because this "
                "one gave no sign of life. That process continues the run."
            )

    def release(self) -> None:
        """Free the folder, and remove it if nothing was written into it."""
        errors.release = None
        self.ended.set()
        with contextlib.suppress(OSError):
            if _read(self.path) == self.content:
                self.path.unlink()
        for folder in self.made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()

    def _take(self) -> None:
        removed = 0
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _create(self.path, self.content)
                return
            except FileExistsError:
                pass
            except FileNotFoundError:  # the folder's last owner removed it in this moment
                removed += 1
                if removed == 3:
                    raise
                continue
            found = _read(self.path)
            if found is None:
                continue
            owner = _parsed(found)
            if _lives(owner, self.path, self.shown):
                raise InputError(
                    f"--output {self.shown}: is in use by process {owner.get('pid')} on "
                    f"{owner.get('host')} since {owner.get('since')}. Wait for it, or choose "
                    "another folder."
                )
            self._remove(found)

    def _remove(self, found: str) -> None:
        """Remove the lock with this content, and no other."""
        aside = self.path.with_name(f"{NAME}.{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            os.rename(self.path, aside)
            content = aside.read_text(encoding="utf-8", errors="replace")
            if content != found:  # that of a process that was faster
                with contextlib.suppress(FileExistsError):
                    _create(self.path, content)
            aside.unlink()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):
                if _read(self.path) == self.content:
                    os.utime(self.path)


# --- The owner of a lock ---


def _this_process() -> dict[str, Any]:
    import psutil

    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": psutil.Process().create_time(),
        "place": _place(),
    }


def _place() -> str:
    """Return what processes have in common that see each other's numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))  # containers have their own
    return " ".join(parts)


def _lives(owner: dict[str, Any], path: Path, shown: str) -> bool:
    """Return whether the owner of a lock is another process that is alive."""
    import psutil

    pid, started = owner.get("pid"), owner.get("started")
    if owner.get("place") != _place() or type(pid) is not int or not isinstance(started, float):
        return _beats(owner, path, shown)
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 2  # numbers are used again
        return same and pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _beats(owner: dict[str, Any], path: Path, shown: str) -> bool:
    """Return whether a lock is touched within SILENCE seconds."""
    host = owner.get("host", "another machine")
    first = _touched(path)
    print(f"{shown}: waiting up to {SILENCE:.0f} s for a sign of life from {host}", flush=True)
    end = time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENCE / 10))
        if _touched(path) != first:
            return path.exists()
    return False


def _touched(path: Path) -> int | None:
    """Return when a file was touched; None without it.

    NFS asks its server for that only when a file is opened.
    """
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


# --- The file ---


def _create(path: Path, content: str) -> None:
    """Write a file. Raises FileExistsError if there is one, and OSError."""
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(content)
            file.flush()
        except OSError:  # a full disk
            path.unlink(missing_ok=True)
            raise


def _read(path: Path) -> str | None:
    """Return the content of a lock, once it is written; None without one."""
    end = time.monotonic() + HALF_WRITTEN
    while True:
        try:
            content = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        if content or time.monotonic() > end:
            return content
        time.sleep(0.05)


def _parsed(content: str) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {}
