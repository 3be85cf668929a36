"""Read the rows of tables: csv, tsv, JSON lines, JSON and Parquet.

What a lenient reader would repair in silence is refused with the number of the row: a row with more
or fewer cells than the header, and a quote that does not enclose a whole cell.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError, described

QUOTES = (
    "Enclose a cell in quotes if it has the separator, a quote or a line break in it, and write "
    'a quote in it twice: """STOP"" on a sign"'
)
QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a cell as csv writers quote it


class Row(NamedTuple):
    """Hold a row of a table: its number from 1, its first line (0: it has none), and its value."""

    number: int
    line: int
    value: Any  # {column: cell}; any value in JSON

    def of(self, called: str | Path) -> str:
        """Return the row's place for an error: "row 2 of FILE (line 3)"."""
        return f"row {self.number} of {called}" + (f" (line {self.line})" if self.line else "")


def csv_rows(
    text: str, called: str | Path, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL
) -> Iterator[Row]:
    """Yield the rows below the header, without rows of empty cells.

    called: the name of the file in errors. Raises InputError for a row with more or fewer cells
    than the header, and for a quote that does not enclose a whole cell.
    """
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
    header, number = [], 0  # the header is row 0
    while True:
        row = Row(number, reader.line_num + 1, None)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"prompts: {row.of(called)}: {error}. {QUOTES}.") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            number += bool(cells and header)  # an empty line has no cells
            continue
        if not header:
            header = cells
            twice = [name for name in header if name and header.count(name) > 1]
            if twice:
                raise InputError(f"prompts: {called} has two columns {twice[0]!r}. Rename one.")
        elif len(cells) != len(header):
            raise InputError(
                f"prompts: {row.of(called)}: the number of cells is {len(cells)}, and that of the "
                f"header {len(header)}. {QUOTES}."
            )
        else:
            yield row._replace(value=dict(zip(header, cells)))
        number += 1


def tsv_rows(text: str, called: str | Path) -> list[Row]:
    """Return the rows of a table whose cells are separated by tabs.

    Quotes are part of a cell, as in `"STOP" on a sign`, unless the file needs them: the header is
    quoted, a quoted cell has a doubled quote, or rows have the header's number of cells only if
    quotes enclose tabs and line breaks. Raises InputError as csv_rows does, and for a quote that
    may be part of a cell or may enclose several lines.
    """
    faults, readings = [], []
    for quoting in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL):
        try:
            readings.append(list(csv_rows(text, called, "\t", quoting)))
            faults.append(None)
        except InputError as error:
            readings.append(None)
            faults.append(error)
    plain, quoted = readings
    if _has_quoted_cells(text) or plain is None:
        if quoted is None:
            raise faults[1] if _has_quoted_cells(text) else faults[0]
        return quoted
    several = [row for row in quoted or () if any("\n" in cell for cell in row.value.values())]
    if several:
        raise InputError(
            f"prompts: {several[0].of(called)} opens a quote that closes in a later line. Delete "
            "the quote, or save the table as .csv if the cell has several lines."
        )
    return plain


def _has_quoted_cells(text: str) -> bool:
    """Return whether a csv writer has quoted cells of a table that is separated by tabs."""
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and any(QUOTED.fullmatch(cell) for cell in lines[0].split("\t")):
        return True
    cells = (cell for line in lines if '""' in line for cell in line.split("\t"))
    return any('""' in cell and QUOTED.fullmatch(cell) for cell in cells)


def jsonl_rows(text: str, called: str | Path) -> list[Row]:
    """Return the value of each line, without empty lines. Raises InputError for other than JSON."""
    rows = []
    for line, words in enumerate(text.split("\n"), 1):
        if words.strip():
            try:
                rows.append(Row(len(rows) + 1, line, json.loads(words)))
            except ValueError as error:
                raise InputError(
                    f"prompts: {called}, line {line}: {described(error)}. Write one JSON value a "
                    "line, or name the file .json if it is one list."
                ) from None
    return rows


def json_rows(text: str, called: str | Path) -> list[Row]:
    """Return the values of a list. Raises ValueError for other than that."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        raise InputError(
            f"prompts: {called}: {described(error)}. Name the file .jsonl if each line is a value."
        ) from None
    if not isinstance(values, list):
        raise ValueError("it is not a list of rows")
    return [Row(number, 0, value) for number, value in enumerate(values, 1)]


def parquet_rows(path: Path, column: str) -> list[Row]:
    """Return the rows with this column only; if there is no such column, one row of None."""
    import pyarrow.parquet as parquet  # hpsv2 installs it

    names = parquet.read_schema(path).names
    if column not in names:
        return [Row(1, 0, dict.fromkeys(names))]
    values = parquet.read_table(path, columns=[column]).to_pylist()  # others may hold pictures
    return [Row(number, 0, value) for number, value in enumerate(values, 1)]
