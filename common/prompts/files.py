"""Prompt files: one prompt a line, or a table with the prompts in a column."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from common.errors import InputError

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
LONGEST = 2**30  # bytes of a file
LETTERS = 100_000  # of a prompt; the models read some hundred words
COLUMN = "prompt"  # of a table, where none is named


class Prompt(str):
    """A prompt that came with more than its text: `fields`, {name: value of JSON}. It is equal to
    its text."""

    fields = {}


def parse(spec: str) -> tuple[str, str]:
    """`FILE[:COLUMN]` -> (path, column); a colon that belongs to the path stays there."""
    head, colon, column = spec.rpartition(":")
    if colon and not Path(spec).exists() and Path(head).suffix.lower() in TABLES:
        return head, column
    return spec, COLUMN


def read(path: str | Path, column: str = COLUMN, called: str | Path | None = None) -> list[str]:
    """A file -> [str], blank ones left out. Raises InputError, in which the file is `called` as the
    user knows it.

    Text, UTF-8 with or without a byte-order mark: a prompt a line; in a line IMAGE <tab> CAPTION
    the image's path counts from the file's folder. Tables (TABLES): the strings of a column; .jsonl
    and .json may also hold strings. All else in a line of .jsonl are the prompt's `fields`."""
    path, called = Path(path), called or path
    if path.is_fifo():
        raise InputError(
            f"prompts: {called} is a pipe, and every process and --resume read it again; give a "
            "file"
        )
    try:
        prompts = table(path, column, called) if path.suffix.lower() in TABLES else lines(path)
    except OSError as error:
        raise InputError(
            f"prompts: cannot read {called} ({error.strerror or error}); give a text file with "
            "one prompt a line, or "
            "the name of a set (--help lists them)"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompts: {called} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    if not prompts:
        raise InputError(
            f"prompts: {called} has no prompt in it; give a text file with one prompt a line"
        )
    if len(max(prompts, key=len)) > LETTERS:
        raise InputError(
            f"prompts: {called} has a prompt of more than {LETTERS} letters; write one prompt a "
            "line"
        )
    return prompts


def text_of(path: Path) -> str:
    """What a text file holds, its line ends as Unix has them; raises InputError for one without
    end, as /dev/zero, OSError, and UnicodeDecodeError."""
    with open(path, "rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise InputError(f"prompts: {path} has more than {LONGEST} bytes; is it a file of prompts?")
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, images' paths from its folder. Raises what
    `text_of` does."""
    prompts = [line.strip() for line in text_of(path).split("\n") if line.strip()]
    return [str(path.parent / prompt) if "\t" in prompt else prompt for prompt in prompts]


def table(path: Path, column: str, called: str | Path) -> list[str]:
    """A column of a table, with the other columns as fields where it is .jsonl. Raises InputError,
    OSError, and UnicodeDecodeError."""
    try:
        rows = ROWS[path.suffix.lower()](path, column)
    except (ValueError, csv.Error, ImportError, RecursionError) as error:
        if isinstance(error, (UnicodeDecodeError, InputError)):
            raise
        raise InputError(
            f"prompts: {called} is no {path.suffix[1:].upper()} ({str(error).splitlines()[0]})"
        ) from None
    prompts = [(cell(row, column, number, called), row) for number, row in enumerate(rows, 1)]
    fields = path.suffix.lower() == ".jsonl"
    return [
        with_fields(prompt, row, column) if fields else prompt for prompt, row in prompts if prompt
    ]


def with_fields(text: str, row: dict | str | None, column: str) -> str:
    """A prompt with the other columns of its row, if it has any."""
    fields = (
        {name: value for name, value in row.items() if name != column}
        if isinstance(row, dict)
        else {}
    )
    if not fields:
        return text
    prompt = Prompt(text)
    prompt.fields = fields
    return prompt


def cell(row: Any, column: str, number: int, called: str | Path) -> str:
    """The prompt in a row: one line, as a tab would make an image of what stands before it. ""
    where there is none. Raises InputError for a row without the column, and for what is no text."""
    if isinstance(row, dict):
        if column not in row:
            has = ", ".join(map(repr, row)) or "none"
            raise InputError(
                f"prompts: row {number} of {called} has no column {column!r}; it has {has}: "
                "write FILE:COLUMN"
            )
        row = row[column]
    if not isinstance(row, str | None):
        raise InputError(
            f"prompts: row {number} of {called} has {str(row)[:40]!r} in column {column!r}, "
            "which is no text"
        )
    try:
        (row or "").encode()
    except UnicodeEncodeError as error:  # JSON can spell it; no tokenizer reads it
        raise InputError(
            f"prompts: row {number} of {called} has {row[error.start : error.end]!a}, half of a "
            "letter; mend that row"
        ) from None
    return one_line(row or "")


def one_line(text: str) -> str:
    """Text without tabs and line breaks."""
    return re.sub(r"[\t\r\n]+", " ", text).strip()


def _jsonl(path: Path, column: str) -> list:
    rows = []
    for number, line in enumerate(text_of(path).split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


def _json(path: Path, column: str) -> list:
    rows = json.loads(text_of(path))
    if not isinstance(rows, list):
        raise ValueError("it is no list of rows")
    return rows


def _csv(path: Path, column: str) -> list[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))


def _parquet(path: Path, column: str) -> list[dict]:
    import pyarrow.parquet as parquet  # hpsv2 brings it

    names = parquet.read_schema(path).names  # the others may hold pictures
    return (
        parquet.read_table(path, columns=[column]).to_pylist()
        if column in names
        else [dict.fromkeys(names)]
    )


ROWS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
