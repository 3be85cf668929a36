"""Files of a run's folder: what is replaced as a whole, and the rows of metrics.jsonl."""

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace a file's text. A killed process leaves the old or the new text. Raises OSError."""
    write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path of the same ending, and rename that file to `path`."""
    beside = path.with_name(f".tmp-{path.name}")
    write(beside)
    os.replace(beside, path)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it exists; its name is free afterwards. Raises OSError.

    On NFS a folder cannot be removed while another program has one of its files open. So it is
    first renamed to .NAME.RANDOM.old, and what cannot be removed stays there.
    """
    if folder.exists():
        old = folder.with_name(f".{folder.name.lstrip('.')}.{secrets.token_hex(4)}.old")
        os.rename(folder, old)
        shutil.rmtree(old, ignore_errors=True)


def rows_before(path: Path, step: float) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl whose step is smaller than this one, with NaN for null.

    Lines that a killed process left half written are skipped; without the file there are no rows.
    """
    lines = path.read_text(errors="replace", encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for line in lines:
        row = _row(line)
        if row is not None and row["step"] < step:
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a metrics.jsonl by these rows. Raises OSError."""
    write_text(path, "".join(map(line_of, rows)))


def line_of(row: dict[str, Any]) -> str:
    """Return a row as a line of metrics.jsonl, with null for NaN and infinity, which JSON lacks."""
    values = {}
    for name, value in row.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        values[name] = value if finite else None
    return json.dumps(values) + "\n"


def _row(line: str) -> dict[str, Any] | None:
    """Return the row of a line, or None for a line that is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
