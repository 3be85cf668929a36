"""report.html: a run's folder as one page that needs no other file and no network.

A run writes it with its pictures. This command writes it again, also for a run that was killed or
that came from another machine:

    python -m common.reporting.page RUN [RUN ...]
"""

import base64
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from common import errors
from common.errors import InputError
from common.reporting.files import rows_before, write_text

LARGEST = 8 * 2**20  # bytes of a picture or clip that the page takes in
MIME = {".png": "image/png", ".mp4": "video/mp4"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: #2a6fdb; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; }
body { padding: 0 1rem; } p { margin: .2rem 0; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
.row > * { flex: 1 1 320px; margin: 0; min-width: 0; }
.row > .tile { flex: 1 1 150px; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.25rem; } small, figcaption { opacity: .7; }
img, video { width: 100%; background: #fff; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .5rem; text-align: left; }
td, th { overflow-wrap: anywhere; } svg { width: 180px; height: 26px; }
polyline { fill: none; stroke: var(--ink); stroke-width: 1.5; }
"""
# the page loads nothing from the network and runs no script
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
HEAD = f"""<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width">
<style>{STYLE}</style>"""


def write(folder: str | Path) -> Path:
    """Write RUN/report.html from what the folder holds, and return its path.

    Raises InputError for a folder without a readable config.json, and OSError.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{folder} holds no run: it has no readable config.json. Give a RUN.")
    rows = rows_before(folder / "metrics.jsonl", math.inf)
    path = folder / "report.html"
    write_text(path, page(folder.resolve().name, config, rows, folder))
    return path


def page(name: str, config: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> str:
    """Return the page.

    config, rows: the contents of config.json and metrics.jsonl; folder: where the pictures are.
    """
    rewards = " + ".join(map(str, config.get("reward") or ()))
    about = f"{config.get('script')}.py · {config.get('model')} · {rewards}"
    first = folder / "reward.png"
    curves = [first, *sorted(set(folder.glob("*.png")) - {first})]
    parts = [
        f"<h1>{escape(name)}</h1><p>{escape(about)}</p>",
        "<h2>In short</h2>",
        row(tiles(config, rows)),
        "<h2>Curves</h2>",
        row(figure(path, path.stem) for path in curves),
        "<h2>Samples: the same prompts and the same noise</h2>",
        row(samples(folder)),
        f"<h2>All metrics</h2><table>{''.join(metrics(rows))}</table>",
        f"<h2>Settings</h2><table>{''.join(settings(config))}</table>",
    ]
    head = f"<head>{HEAD}<title>{escape(name)}</title></head>"
    return f'<!doctype html><html lang="en">{head}<body>{"".join(parts)}</body></html>\n'


def row(parts: Iterable[str]) -> str:
    """Return the parts side by side."""
    return f'<div class="row">{"".join(parts)}</div>'


def tiles(config: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the few numbers that one looks at first."""
    steps = sum("reward_mean" in row for row in rows)
    yield tile("steps", f"{steps} of {config.get('steps')}")
    for label, metric in (("held-out reward", "eval_reward"), ("training reward", "reward_mean")):
        values = finite(rows, metric)
        if values:
            yield tile(label, f"{values[0]:.3f} → {values[-1]:.3f}")
    ratio_errors = finite(rows, "ratio_error")
    if ratio_errors:
        yield tile("largest ratio error", f"{max(ratio_errors):.1g}")
    speeds = finite(rows, "samples_per_second")
    if speeds:
        yield tile("samples a second", f"{statistics.median_high(speeds):.3g}")


def tile(label: str, value: str) -> str:
    """Return a number with its label."""
    return f'<div class="tile"><small>{escape(label)}</small><b>{escape(value)}</b></div>'


def samples(folder: Path) -> Iterator[str]:
    """Yield the first samples and the last, as pictures, and clips also as videos."""
    pictures = sorted((folder / "samples").glob("step_*.png"))
    for picture in dict.fromkeys(pictures[:1] + pictures[-1:]):
        step = picture.stem.removeprefix("step_").lstrip("0") or "0"
        video = figure(picture.with_suffix(".mp4"), "")
        yield f"<div>{figure(picture, f'step {step}')}{video}</div>"


def figure(path: Path, label: str) -> str:
    """Return a picture (.png) or clip (.mp4) as a part of the page.

    Return "" for a file that cannot be read, is empty, or has more than LARGEST bytes.
    """
    try:
        data = path.read_bytes() if path.stat().st_size <= LARGEST else b""
    except OSError:
        data = b""
    if not data:
        return ""
    source = f'src="data:{MIME[path.suffix]};base64,{base64.b64encode(data).decode()}"'
    if path.suffix == ".mp4":
        shown = f"<video {source} autoplay loop muted controls></video>"
    else:
        shown = f'<img {source} alt="{escape(label)}">'
    return f"<figure>{shown}<figcaption>{escape(label)}</figcaption></figure>"


def metrics(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line of the table for each metric: first, last, lowest, highest, and its curve."""
    yield "<tr><th>metric<th>first<th>last<th>lowest<th>highest<th></tr>"
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        values = finite(rows, name)
        if values:
            numbers = (values[0], values[-1], min(values), max(values))
            cells = "".join(f"<td>{number:.4g}" for number in numbers)
            yield f"<tr><td>{escape(name)}{cells}<td>{line(values)}</tr>"


def line(values: list[float], width: int = 180, height: int = 26) -> str:
    """Return one or more values as an SVG line, evenly spaced; width, height: in pixels."""
    low = min(values)
    span = max(values) - low or 1.0
    step = width / max(1, len(values) - 1)
    heights = (height - 2 - (value - low) / span * (height - 4) for value in values)
    points = " ".join(f"{i * step:.1f},{y:.1f}" for i, y in enumerate(heights))
    return f'<svg viewBox="0 0 {width} {height}"><polyline points="{points}"/></svg>'


def settings(config: dict[str, Any]) -> Iterator[str]:
    """Yield a line of the table for each setting."""
    for name, value in config.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        yield f"<tr><th>{escape(name)}<td>{escape(shown)}</tr>"


def finite(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Return the finite values of a metric, in the order of the steps."""
    values = [row.get(name) for row in rows]
    return [value for value in values if isinstance(value, int | float) and math.isfinite(value)]


def main(folders: list[str]) -> None:
    """Write the page of each run's folder and print its path. Raises InputError."""
    if not folders or folders[0].startswith("-"):
        raise InputError("no RUN was given. Write: python -m common.reporting.page RUN [RUN ...]")
    for folder in folders:
        print(write(folder))


if __name__ == "__main__":
    errors.run(main, sys.argv[1:])
