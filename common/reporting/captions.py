"""Prompts under pictures: as wide as the picture, without TeX, in fonts that have their letters."""

import functools
from bisect import bisect
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

LONGEST = 300  # letters of a prompt that are laid out
MISSING = "\\u{:04x}"  # a letter that no font has, as Python writes it


def put(axis: Axes, prompt: str, end: str, lines: int, size: float, **place: Any) -> None:
    """Set the title of an axis: a prompt as wide as the axis, shortened to `lines`, and `end`.

    size: of the letters in points; place: further keywords of Axes.set_title.
    """
    words, families = drawable(" ".join(prompt.split())[:LONGEST])
    font = FontProperties(family=families, size=size)
    renderer = axis.figure.canvas.get_renderer()
    room = float(axis.get_window_extent(renderer).width)

    def fits(line: str) -> bool:
        width, _, _ = renderer.get_text_width_height_descent(line, font, ismath=False)
        return width <= room

    text = "\n".join(wrapped(words, lines, fits)) + end
    axis.set_title(text, fontproperties=font, parse_math=False, **place)


def wrapped(words: str, lines: int, fits: Callable[[str], bool]) -> list[str]:
    """Return at most `lines` lines that each fit, broken between words where possible.

    The last line ends with "..." if words are left over.
    """
    done = []
    while words and len(done) < lines:
        lengths = range(1, len(words) + 1)
        length = max(1, bisect(lengths, False, key=lambda n: not fits(words[:n])))
        if length < len(words) and " " in words[1 : length + 1]:
            length = words.rindex(" ", 1, length + 1)
        done.append(words[:length])
        words = words[length:].lstrip()
    if not words:
        return done
    last = done.pop()
    while last and not fits(f"{last}..."):
        last = last[:-1]
    return [*done, f"{last}..."]


def drawable(words: str) -> tuple[str, list[str]]:
    """Return the words and the font families that draw them, the default family first.

    Letters that cannot be seen, or that no font of this machine has, are written as numbers.
    """
    families = list(matplotlib.rcParams["font.family"])
    drawn = ""
    for letter in words:
        family = family_of(letter)
        drawn += MISSING.format(ord(letter)) if family is None else letter
        if family and family not in families:
            families.append(family)
    return drawn, families


@functools.cache
def family_of(letter: str) -> str | None:
    """Return the font family that has a letter: "" for the default one, None for none."""
    if not letter.isprintable():
        return None
    if ord(letter) in letters_of(findfont(FontProperties())):
        return ""
    # matplotlib's own further fonts are of mathematics (letters in other places) and of boxes
    shipped = matplotlib.get_data_path()
    for font in fontManager.ttflist:
        known = font.size == "scalable" and not font.fname.startswith(shipped)
        if known and ord(letter) in letters_of(font.fname):
            return font.name
    return None


@functools.cache
def letters_of(path: str) -> frozenset[int]:
    """Return the code points of a font file, none for a file that cannot be read."""
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):  # fonts of pictures, for instance
        return frozenset()
