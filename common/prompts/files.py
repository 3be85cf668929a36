"""Read prompt files: text with one prompt a line, or a table with prompts in one column."""

import json
import re
from pathlib import Path
from typing import Any

from common import errors
from common.errors import InputError
from common.prompts import tables
from common.prompts.tables import Row

JSON_LINES = (".jsonl", ".ndjson")
TABLES = (*JSON_LINES, ".json", ".csv", ".tsv", ".parquet")
LONGEST = 2**30  # bytes of a file
LETTERS = 100_000  # of a prompt; the models read some hundred words
IMAGES = ("image", "images")  # fields of JSON lines with the paths of a prompt's images
COLUMN = "prompt"  # the column of a table when none is named
HEADER = {"prompt", "prompts", "caption", "captions"}  # a text file that begins so is a table
# What counts as a path before a tab, also if the file is missing. Any other file must exist.
MEDIA = (
    ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .avif .heic .mp4 .mov .avi .mkv .webm .m4v".split()
)
# lower-case beginnings of files that hold no prompts: pointers, and pages of a server
NOT_PROMPTS = {
    "version https://git-lfs": "a pointer of git-lfs. Fetch the file with `git lfs pull`",
    "<!doctype html": "a web page. Download the raw file",
    "<html": "a web page. Download the raw file",
    "404: not found": "a server's answer that there is no such file. Download it again",
    "entry not found": "a server's answer that there is no such file. Download it again",
}


class Prompt(str):
    """Hold a prompt's text, its `fields`, {name: value of JSON}, and its `place` in a file.

    It is equal to its text.
    """

    fields = {}
    place = ""


def parse(spec: str) -> tuple[str, str]:
    """Return (path, column) of `FILE[:COLUMN]`. A colon that is part of the path stays in it."""
    head, colon, column = spec.rpartition(":")
    if colon and not Path(spec).exists() and Path(head).suffix.lower() in TABLES:
        return head, column
    return spec, COLUMN


def read(path: str | Path, column: str = COLUMN, called: str | Path | None = None) -> list[str]:
    """Return the prompts of a file, without blank ones.

    A text file (UTF-8, with or without a byte-order mark) has a prompt a line. In a line
    IMAGE <tab> CAPTION the image's path is relative to the file's folder, and there may be several
    images; a tab after anything but the name of a picture, a clip or a file is a blank of the
    caption. For a table (TABLES) the prompts are the strings of one column; .jsonl, .ndjson and
    .json may also be lists of strings. In a line of .jsonl or .ndjson the fields `image`, a path,
    or `images`, a list of paths, are the prompt's images, and the other values become its `fields`.
    called: the name of the file in errors. Raises InputError, with the line or row at fault.
    """
    path, called = Path(path), called or path
    if path.is_fifo():
        raise InputError(f"prompts: {called} is a pipe, which cannot be read again. Give a file.")
    advice = "give a text file with one prompt a line, or the name of a set (--help lists them)"
    with errors.loading("prompts:", called, do=advice):
        if path.suffix.lower() in TABLES:
            prompts = _table(path, column, called)
        else:
            prompts = _lines(path, called)
    if not prompts:
        raise InputError(f"prompts: {called} has no prompt in it. Write one prompt a line.")
    return prompts


def one_line(text: str) -> str:
    """Return text without tabs and line breaks."""
    return re.sub(r"[\t\r\n]+", " ", text).strip()


def _text(path: Path, called: str | Path) -> str:
    """Return what a text file holds, with the line ends of Unix.

    Raises InputError for other encodings than UTF-8, and for what was not meant to be a text file.
    """
    with open(path, "rb") as file:
        regular = path.is_file() and path.stat().st_size <= LONGEST
        data = file.read() if regular else file.read(LONGEST + 1)  # /dev/zero has no end
    if len(data) > LONGEST:
        raise ValueError(f"it has more than {LONGEST} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
        raise InputError(
            f"prompts: {called}, line {line}: {kind} ({error}). Save it as UTF-8 text."
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\n\ufeff", "\n")  # byte-order marks of files that were joined
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(
            f"prompts: {called}, line {line}: a NUL character, as in UTF-16, binary or damaged "
            "files. Save it as UTF-8 text."
        )
    start = text[:100].lstrip().lower()
    for beginning, meaning in NOT_PROMPTS.items():
        if start.startswith(beginning):
            raise InputError(f"prompts: {called} is {meaning}.")
    return text


# --- Text with one prompt a line ---


def _lines(path: Path, called: str | Path) -> list[str]:
    prompts = []
    for number, line in enumerate(_text(path, called).split("\n"), 1):
        line = line.strip()
        if line:
            place = f"prompts: {called}, line {number}"
            if not prompts:
                _refuse_header(line, place)
            _refuse_json(line, place, first=not prompts)
            prompts.append(_placed(_with_paths(line, path.parent), f"line {number} of {called}"))
            _check_length(prompts[-1], f"prompts: {called}", f"line {number}")
    return prompts


def _with_paths(line: str, folder: Path) -> str:
    """Return [IMAGE <tab> ...] CAPTION with paths from `folder`, and a caption without tabs."""
    cells, paths = line.split("\t"), []
    while len(cells) > 1:
        path = folder / Path(cells[0].strip()).expanduser()
        if path.suffix.lower() not in MEDIA and not path.is_file():
            break
        paths.append(str(path))
        del cells[0]
    return "\t".join([*paths, one_line("\t".join(cells))])


def _refuse_header(line: str, place: str) -> None:
    """Raise InputError if the first line of a text file is the header of a table."""
    cells = [cell.strip(" \"'").lower() for cell in re.split(r"[,;\t]", line)]
    if HEADER & set(cells) and all(re.fullmatch(r"\w*", cell) for cell in cells):
        raise InputError(
            f"{place}: {line[:80]!r} looks like the header of a table. Name the file .csv or .tsv, "
            "or delete that line."
        )


def _refuse_json(line: str, place: str, first: bool) -> None:
    """Raise InputError for a line that is a JSON object, and for a first line that begins JSON."""
    if line[0] not in ("{[" if first else "{"):
        return
    try:
        json.loads(line)
    except ValueError:
        if not first or line not in ("{", "[", "[{"):
            return
    raise InputError(
        f"{place}: {line[:80]!r} is JSON. Name the file .jsonl if each line is an object, else "
        ".json."
    )


def _check_length(prompt: str, owner: str, place: str) -> None:
    if len(prompt) > LETTERS:
        raise InputError(
            f"{owner} has a prompt of more than {LETTERS} letters ({place}). Shorten it."
        )


# --- Tables ---


def rows_of(path: Path, column: str) -> list[Any]:
    """Return the rows of a table: dictionaries, or any values for JSON.

    For .parquet they have the given column only. Raises OSError and ValueError.
    """
    return [row.value for row in _rows(path, column, path)]


def _rows(path: Path, column: str, called: str | Path) -> list[Row]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return tables.parquet_rows(path, column)
    text = _text(path, called)
    if kind == ".json":
        return tables.json_rows(text, called)
    if kind == ".tsv":
        return tables.tsv_rows(text, called)
    if kind == ".csv":
        return list(tables.csv_rows(text, called))
    return tables.jsonl_rows(text, called)


def _table(path: Path, column: str, called: str | Path) -> list[str]:
    """Return one column of a table. For JSON lines the other columns become fields."""
    prompts = []
    for row in _rows(path, column, called):
        text = _cell(row, column, called)
        if text and path.suffix.lower() in JSON_LINES:
            paths = _images(row, path.parent, called)
            text = with_fields("\t".join([*paths, text]), row.value, column)
        if text:
            prompts.append(_placed(text, row.of(called)))
    return prompts


def with_fields(text: str, row: dict | str | None, column: str) -> str:
    """Return a prompt with the other columns of its row, if it has any."""
    fields = row if isinstance(row, dict) else {}
    fields = {name: value for name, value in fields.items() if name not in (column, *IMAGES)}
    if not fields:
        return text
    prompt = Prompt(text)
    prompt.fields = fields
    return prompt


def _images(row: Row, folder: Path, called: str | Path) -> list[str]:
    """Return the paths in a row's `image` or `images`, from `folder`. Raises InputError."""
    found = {n: row.value[n] for n in IMAGES if isinstance(row.value, dict) and n in row.value}
    if not found:
        return []
    name, value = found.popitem()
    paths = value if name == "images" else [value]
    right = isinstance(paths, list) and all(isinstance(path, str) and path for path in paths)
    if found or not right or "\t" in "".join(paths):
        raise InputError(
            f"prompts: {row.of(called)} must have its images as one path in the field image, or as "
            "a list of paths in the field images. Correct that row."
        )
    return [str(folder / Path(path).expanduser()) for path in paths]


def _placed(text: str, place: str) -> Prompt:
    """Return a prompt that knows where it was read."""
    prompt = text if isinstance(text, Prompt) else Prompt(text)
    prompt.place = place
    return prompt


def _cell(row: Row, column: str, called: str | Path) -> str:
    """Return the prompt in a row, "" if it has none.

    Tabs and line breaks become blanks: the text before a tab would count as an image's path. Raises
    InputError for a row without the column, and for a value that is not text.
    """
    value, place = row.value, f"prompts: {row.of(called)}"
    if isinstance(value, dict):
        if column not in value:
            has = ", ".join(map(repr, value)) or "none"
            raise InputError(
                f"{place} has no column {column!r}; it has {has[:300]}. Write FILE:COLUMN. The "
                "first line of a csv or tsv file has the names of its columns."
            )
        value = value[column]
    if not isinstance(value, str | None):
        raise InputError(
            f"{place} has {str(value)[:40]!r} in column {column!r}, which is not text. Name "
            "another column as FILE:COLUMN, or correct that row."
        )
    value = value or ""
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a letter; tokenizers cannot
        half = value[error.start : error.end]
        raise InputError(f"{place} has {half!a}, half of a letter. Correct that row.") from None
    if "\0" in value:
        raise InputError(f"{place} has a NUL character. Correct that row.")
    _check_length(value, f"prompts: {called}", f"row {row.number}")
    return one_line(value)
