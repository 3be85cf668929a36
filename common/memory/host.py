"""The memory of this machine that is free, and the limits that a container or a cluster's job sets.

Linux keeps such limits in control groups (cgroups), of version 1 or 2. Each folder above a group
can limit it, too.
"""

from collections.abc import Iterator
from pathlib import Path

# (limits of a group, what it uses, the part of that which is a cache the kernel can drop)
VERSION_1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = (("memory.max", "memory.high"), "memory.current", "inactive_file")


def free(root: str | Path = "/") -> int:
    """Return the bytes of memory that processes of this machine, or of this container, can take.

    root: the folder that has proc/ and sys/.
    """
    import psutil

    return min([psutil.virtual_memory().available, *free_of_groups(Path(root))])


def free_of_groups(root: Path) -> Iterator[int]:
    """Yield the bytes that each limit of this process's control groups leaves, 0 or more."""
    for folder, names in _groups(root):
        limit_names, usage_name, cache_name = names
        limits = [limit for name in limit_names if (limit := _number(folder / name)) is not None]
        used = _number(folder / usage_name)
        if not limits or used is None:
            continue
        cache = _statistic(folder / "memory.stat", cache_name)
        yield max(0, min(limits) - max(0, used - cache))


def _groups(root: Path) -> Iterator[tuple[Path, tuple]]:
    """Yield (folder, names of its files) of this process's groups and of all that contain them."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # not Linux
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:  # NUMBER:CONTROLLERS:PATH; version 2 has 0 and no controllers
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            top, names = mounts / "memory", VERSION_1
        elif number == "0" and not controllers:
            top, names = mounts, VERSION_2
        else:
            continue
        # A container may see the path of its host, below its own group as the top.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth]), names


def _number(path: Path) -> int | None:
    """Return the number in a file; None for "max", without the file, or for another content."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    """Return a number of a memory.stat, 0 if it is not there."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[:1] == [name])
    except (OSError, ValueError, IndexError, StopIteration):
        return 0
