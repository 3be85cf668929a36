"""report.html: a run's folder as one page that needs no other file and no network. A run writes it
with its pictures;

python -m common.reporting.page RUN [RUN ...]

writes it again, of a run that was killed or came from elsewhere too.
"""

import base64
import json
import math
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from common import errors
from common.errors import InputError
from common.trainer.run_folder import rows_before, write_text

LARGEST = 8 * 2**20  # bytes of a picture or clip that the page takes in
MIME = {".png": "image/png", ".mp4": "video/mp4"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: #2a6fdb; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; } p { margin: .2rem 0; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } .row > * { flex: 1 1 320px; margin: 0; min-width: 0; }
.tile { flex: 1 1 150px; border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.25rem; } small, figcaption { opacity: .7; }
img, video { width: 100%; background: #fff; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .5rem; text-align: left; overflow-wrap: anywhere; }
svg { width: 180px; height: 26px; } polyline { fill: none; stroke: var(--ink); stroke-width: 1.5; }
"""
# nothing on the page may ask the network or run
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def write(folder: str | Path) -> Path:
    """RUN/report.html from what is in the folder, half a run too; returns its path. Raises
    InputError for no run, and OSError."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{folder} holds no run: it has no config.json that can be read")
    path = folder / "report.html"
    write_text(
        path,
        page(
            folder.resolve().name, config, rows_before(folder / "metrics.jsonl", math.inf), folder
        ),
    )
    return path


def page(name: str, config: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> str:
    """The page as text; config, rows: of config.json and metrics.jsonl; folder: with the
    pictures."""
    rewards = " + ".join(map(str, config.get("reward") or ()))
    about = f"{config.get('script')}.py · {config.get('model')} · {rewards}"
    curves = [folder / "reward.png", *sorted(set(folder.glob("*.png")) - {folder / "reward.png"})]
    parts = [
        f"<h1>{escape(name)}</h1><p>{escape(about)}</p>",
        f'<h2>In short</h2><div class="row">{"".join(tiles(config, rows))}</div>',
        "<h2>Curves</h2><div "
        f'class="row">{"".join(figure(path, path.stem) for path in curves)}</div>',
        "<h2>Samples: the same prompts and the same noise</h2><div "
        f'class="row">{"".join(samples(folder))}</div>',
        f"<h2>All metrics</h2><table>{''.join(metrics(rows))}</table>",
        f"<h2>Settings</h2><table>{''.join(settings(config))}</table>",
    ]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f'<meta name="viewport" content="width=device-width"><title>{escape(name)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
    )


def tiles(config: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    """The few numbers that one looks at first."""
    steps = [row for row in rows if "reward_mean" in row]
    yield tile("steps", f"{len(steps)} of {config.get('steps')}")
    for label, metric in (("held-out reward", "eval_reward"), ("training reward", "reward_mean")):
        values = finite(rows, metric)
        if values:
            yield tile(label, f"{values[0]:.3f} → {values[-1]:.3f}")
    if off := finite(rows, "ratio_error"):
        yield tile("largest ratio error", f"{max(off):.1e}" if any(off) else "0")
    if speed := finite(rows, "samples_per_second"):
        yield tile("samples a second", f"{sorted(speed)[len(speed) // 2]:.3g}")


def tile(label: str, value: str) -> str:
    """A number with its label."""
    return f'<div class="tile"><small>{escape(label)}</small><b>{escape(value)}</b></div>'


def samples(folder: Path) -> Iterator[str]:
    """The first samples and the last, as pictures, and of clips also as they move."""
    pictures = sorted((folder / "samples").glob("step_*.png"))
    for picture in dict.fromkeys(pictures[:1] + pictures[-1:]):
        label = f"step {picture.stem.removeprefix('step_').lstrip('0') or 0}"
        yield f"<div>{figure(picture, label)}{figure(picture.with_suffix('.mp4'), '')}</div>"


def figure(path: Path, label: str) -> str:
    """A picture (.png) or clip (.mp4) inside the page; "" for one that is not there, or has more
    than LARGEST bytes."""
    try:
        data = path.read_bytes() if path.stat().st_size <= LARGEST else b""
    except OSError:
        data = b""
    if not data:
        return ""
    source = f'src="data:{MIME[path.suffix]};base64,{base64.b64encode(data).decode()}"'
    video = f"<video {source} autoplay loop muted controls></video>"
    shown = video if path.suffix == ".mp4" else f'<img {source} alt="{escape(label)}">'
    return f"<figure>{shown}<figcaption>{escape(label)}</figcaption></figure>"


def metrics(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line of the table for each metric: first, last, lowest, highest, and its course."""
    yield "<tr><th>metric<th>first<th>last<th>lowest<th>highest<th></tr>"
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        if values := finite(rows, name):
            numbers = (values[0], values[-1], min(values), max(values))
            cells = "".join(f"<td>{number:.4g}" for number in numbers)
            yield f"<tr><td>{escape(name)}{cells}<td>{line(values)}</tr>"


def line(values: list[float], width: int = 180, height: int = 26) -> str:
    """The values, one or more, as an SVG line, evenly spaced; width, height: in pixels."""
    low, span, step = (
        min(values),
        (max(values) - min(values)) or 1.0,
        width / max(1, len(values) - 1),
    )
    heights = (height - 2 - (value - low) / span * (height - 4) for value in values)
    points = " ".join(f"{i * step:.1f},{y:.1f}" for i, y in enumerate(heights))
    return f'<svg viewBox="0 0 {width} {height}"><polyline points="{points}"/></svg>'


def settings(config: dict[str, Any]) -> Iterator[str]:
    """A line of the table for each setting."""
    for name, value in config.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        yield f"<tr><th>{escape(name)}<td>{escape(shown)}</tr>"


def finite(rows: list[dict[str, Any]], name: str) -> list[float]:
    """The values of a metric that are numbers, in the order of the steps."""
    values = [row.get(name) for row in rows]
    return [value for value in values if isinstance(value, int | float) and math.isfinite(value)]


def main(folders: list[str]) -> None:
    """Writes the page of each run's folder. Raises InputError."""
    if not folders or folders[0].startswith("-"):
        raise InputError("python -m common.reporting.page RUN [RUN ...] writes RUN/report.html")
    for folder in folders:
        print(write(folder))


if __name__ == "__main__":
    errors.run(main, sys.argv[1:])
