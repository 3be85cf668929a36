"""Write into docs/rooms.md what each file is for, by the first sentence of its docstring.

python -m lab.rooms
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/rooms.md"
ROOMS = ("common", "evaluation", "worlds", "benchmarks", "lab")
ALONE = "Needs torch alone"


def purpose(path):
    """Return the first sentence of a module's docstring, and whether it needs torch alone."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    text = " ".join(text.split("\n\n")[0].split())
    first = re.match(r".*?\.(?= [A-Z`]|$)|.*", text)[0].rstrip(".:,")
    if ALONE in text and ALONE not in first:
        first += f". {ALONE}"
    return first


def files(room):
    """Return the files of a room that have a docstring, those of a folder after its own."""
    found = (ROOT / room).rglob("*.py")
    return sorted((p for p in found if purpose(p)), key=lambda path: (path.parent, path.name))


def table(room):
    """Return Markdown: each file of a room and what it is for."""
    lines = ["| file | what |", "| --- | --- |"]
    for path in files(room):
        name = path.relative_to(ROOT).as_posix()
        lines.append(f"| [`{name}`](../{name}) | {purpose(path)} |")
    return "\n".join(lines)


def with_tables(text):
    """Return the page's text with the tables of today between their markers."""
    for room in ROOMS:
        start, end = f"<!-- {room} -->", f"<!-- /{room} -->"
        assert start in text and end in text, f"{PAGE} has no place for {room}/"
        before, _, rest = text.partition(start)
        after = rest.partition(end)[2]
        text = f"{before}{start}\n{table(room)}\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
