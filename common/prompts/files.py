"""Read prompt files: text with one prompt a line, or a table with prompts in one column."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from common import errors
from common.errors import InputError

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
LONGEST = 2**30  # bytes of a file
LETTERS = 100_000  # of a prompt; the models read some hundred words
COLUMN = "prompt"  # the column of a table when none is named


class Prompt(str):
    """Hold a prompt's text and its `fields`, {name: value of JSON}. It is equal to its text."""

    fields = {}


def parse(spec: str) -> tuple[str, str]:
    """Return (path, column) of `FILE[:COLUMN]`. A colon that is part of the path stays in it."""
    head, colon, column = spec.rpartition(":")
    if colon and not Path(spec).exists() and Path(head).suffix.lower() in TABLES:
        return head, column
    return spec, COLUMN


def read(path: str | Path, column: str = COLUMN, called: str | Path | None = None) -> list[str]:
    """Return the prompts of a file, without blank ones.

    A text file (UTF-8, with or without a byte-order mark) has a prompt a line. In a line
    IMAGE <tab> CAPTION the image's path is relative to the file's folder. For a table (TABLES) the
    prompts are the strings of one column; .jsonl and .json may also be lists of strings. The other
    values in a line of .jsonl become the prompt's `fields`. called: the name of the file in errors.
    Raises InputError.
    """
    path, called = Path(path), called or path
    if path.is_fifo():
        raise InputError(f"prompts: {called} is a pipe, which cannot be read again. Give a file.")
    advice = "give a text file with one prompt a line, or the name of a set (--help lists them)"
    with errors.loading("prompts:", called, do=advice):
        if path.suffix.lower() in TABLES:
            prompts = _table(path, column, called)
        else:
            prompts = _lines(path)
    if not prompts:
        raise InputError(f"prompts: {called} has no prompt in it. Write one prompt a line.")
    if len(max(prompts, key=len)) > LETTERS:
        raise InputError(
            f"prompts: {called} has a prompt of more than {LETTERS} letters. Shorten it."
        )
    return prompts


def one_line(text: str) -> str:
    """Return text without tabs and line breaks."""
    return re.sub(r"[\t\r\n]+", " ", text).strip()


def rows_of(path: Path, column: str) -> list:
    """Return the rows of a table: dictionaries, or any values for .jsonl and .json.

    For .parquet they have the given column only. Raises OSError and ValueError.
    """
    kind = path.suffix.lower()
    if kind == ".jsonl":
        return _jsonl(path)
    if kind == ".json":
        return _json(path)
    if kind == ".parquet":
        return _parquet(path, column)
    return _csv(path, delimiter="\t" if kind == ".tsv" else ",")


def _text(path: Path) -> str:
    """Return what a text file holds, with the line ends of Unix."""
    with open(path, "rb") as file:
        regular = path.is_file() and path.stat().st_size <= LONGEST
        data = file.read() if regular else file.read(LONGEST + 1)  # /dev/zero has no end
    if len(data) > LONGEST:
        raise ValueError(f"it has more than {LONGEST} bytes")
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _lines(path: Path) -> list[str]:
    prompts = [line.strip() for line in _text(path).split("\n") if line.strip()]
    return [str(path.parent / prompt) if "\t" in prompt else prompt for prompt in prompts]


def _table(path: Path, column: str, called: str | Path) -> list[str]:
    """Return one column of a table. For .jsonl the other columns become fields."""
    prompts = []
    for number, row in enumerate(rows_of(path, column), 1):
        text = _cell(row, column, number, called)
        if text and path.suffix.lower() == ".jsonl":
            text = with_fields(text, row, column)
        if text:
            prompts.append(text)
    return prompts


def with_fields(text: str, row: dict | str | None, column: str) -> str:
    """Return a prompt with the other columns of its row, if it has any."""
    if not isinstance(row, dict) or row.keys() == {column}:
        return text
    prompt = Prompt(text)
    prompt.fields = {name: value for name, value in row.items() if name != column}
    return prompt


def _cell(row: Any, column: str, number: int, called: str | Path) -> str:
    """Return the prompt in a row, "" if it has none.

    Tabs and line breaks become blanks: the text before a tab would count as an image's path. Raises
    InputError for a row without the column, and for a value that is not text.
    """
    if isinstance(row, dict):
        if column not in row:
            has = ", ".join(map(repr, row)) or "none"
            raise InputError(
                f"prompts: row {number} of {called} has no column {column!r}; it has {has}. Write "
                "FILE:COLUMN."
            )
        row = row[column]
    if not isinstance(row, str | None):
        raise InputError(
            f"prompts: row {number} of {called} has {str(row)[:40]!r} in column {column!r}, which "
            "is not text. Name another column as FILE:COLUMN, or correct that row."
        )
    try:
        (row or "").encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a letter; tokenizers cannot
        half = row[error.start : error.end]
        raise InputError(
            f"prompts: row {number} of {called} has {half!a}, half of a letter. Correct that row."
        ) from None
    return one_line(row or "")


def _jsonl(path: Path) -> list:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def _json(path: Path) -> list:
    rows = json.loads(_text(path))
    if not isinstance(rows, list):
        raise ValueError("it is not a list of rows")
    return rows


def _csv(path: Path, delimiter: str) -> list[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def _parquet(path: Path, column: str) -> list[dict]:
    import pyarrow.parquet as parquet  # hpsv2 installs it

    names = parquet.read_schema(path).names
    if column not in names:
        return [dict.fromkeys(names)]
    return parquet.read_table(path, columns=[column]).to_pylist()  # others may hold pictures
