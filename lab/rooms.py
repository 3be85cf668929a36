"""Writes into docs/rooms.md what each file of common/ is for, by the first sentence of its
docstring.

python -m lab.rooms
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/rooms.md"


def purpose(path):
    """The first sentence of a module's docstring, and whether it says that it needs torch alone."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    first = re.match(r".*?\.(?= [A-Z`]|$)|.*", text)[0].rstrip(".:,")
    return first + ". Needs torch alone" * ("Needs torch alone" in text)


def table():
    """Markdown: each file of common/ that has a docstring, those of a folder after it."""
    files = sorted((ROOT / "common").rglob("*.py"), key=lambda path: (path.parent, path.name))
    rows = [(path.relative_to(ROOT), purpose(path)) for path in files if purpose(path)]
    return "\n".join(
        [
            "| file | what |",
            "| --- | --- |",
            *(f"| [`{p}`](../{p}) | {words} |" for p, words in rows),
        ]
    )


def with_table(text):
    """The page's text with the table of today between its markers."""
    before, _, rest = text.partition("<!-- rooms -->")
    _, end, after = rest.partition("<!-- /rooms -->")
    assert end, f"{PAGE} has no place for the rooms"
    return f"{before}<!-- rooms -->\n{table()}\n<!-- /rooms -->{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
