"""Any prompt under a picture: no mathematics, letters that the fonts lack, lines as wide as the
picture."""

import functools
from bisect import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.font_manager import FontProperties, fontManager, get_font

if TYPE_CHECKING:
    from matplotlib.axes import Axes
MISSING = "\\u{:04x}"  # a letter that no font has, as Python writes it


def put(axis: "Axes", prompt: str, end: str, lines: int, size: float, **place) -> None:
    """A title of an axis: the prompt in so many lines as wide as the axis, what is too long cut,
    and `end` after it. size: of the letters in points; place: what Axes.set_title takes besides."""
    words, families = drawable(" ".join(prompt.split())[:300])
    font = FontProperties(family=families, size=size)
    renderer = axis.figure.canvas.get_renderer()
    room = float(axis.get_window_extent(renderer).width)

    def fits(line: str) -> bool:
        return renderer.get_text_width_height_descent(line, font, ismath=False)[0] <= room

    text = "\n".join(wrapped(words, lines, fits)) + end
    axis.set_title(text, fontproperties=font, parse_math=False, **place)


def wrapped(words: str, lines: int, fits: Callable[[str], bool]) -> list[str]:
    """Words -> at most so many lines, each of which `fits`; "..." ends the last one if there is
    more."""
    done = []
    while words and len(done) < lines:
        length = max(1, bisect(range(1, len(words) + 1), False, key=lambda n: not fits(words[:n])))
        if length < len(words) and " " in words[1 : length + 1]:
            length = words.rindex(" ", 1, length + 1)  # between two words, if there are two
        done.append(words[:length])
        words = words[length:].lstrip()
    while words and not fits(f"{done[-1]}...") and done[-1]:
        done[-1] = done[-1][:-1]
    return [*done[:-1], f"{done[-1]}..."] if words else done


def drawable(words: str) -> tuple[str, list[str]]:
    """-> (words, families): those of the machine's fonts that have its letters, the default one
    first; letters that none of them has, or that cannot be seen, are written as numbers."""
    default = matplotlib.rcParams["font.family"]
    families, drawn = list(default), ""
    for letter in words:
        family = family_of(letter)
        drawn += letter if family is not None else MISSING.format(ord(letter))
        families += [family] if family and family not in families else []
    return drawn, families


@functools.cache
def family_of(letter: str) -> str | None:
    """The font that has a letter: "" for the default one, None if there is none."""
    if not letter.isprintable():
        return None
    default = matplotlib.font_manager.findfont(FontProperties())
    if ord(letter) in letters_of(default):
        return ""
    shipped = (
        matplotlib.get_data_path()
    )  # with letters elsewhere than Unicode has them, and a font of boxes
    fonts = [
        font
        for font in fontManager.ttflist
        if not font.fname.startswith(shipped) and font.size == "scalable"
    ]
    return next((font.name for font in fonts if ord(letter) in letters_of(font.fname)), None)


@functools.cache
def letters_of(path: str) -> frozenset[int]:
    """The code points that a font file has; none of one that cannot be read."""
    try:
        return frozenset(get_font(path).get_charmap())
    except (
        OSError,
        RuntimeError,
        ValueError,
    ):  # a font that cannot be read: of pictures, for instance
        return frozenset()
