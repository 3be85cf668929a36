"""Keep an evaluation in a folder, so that it continues after a kill:

    evaluation.json          its settings; other settings need another folder
    scores/MODEL.jsonl       the identity of the model's weights, then a line for each scored part
    shown/MODEL/NNNNN.pt     the samples of the picture, uint8
    results.json, results.csv, side_by_side.png (.mp4)
    LAYOUT/...               files for --layout (layouts.py)

A sample is identified by (prompt, which): the index of one of P prompts, and of one of its S
samples. A part, the unit of work, is a tensor of n samples, [n, 2].
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from common import errors
from common.errors import InputError, RunError
from common.prompts import caption_of
from common.reporting import files, pictures
from common.trainer import Processes


class Folder:
    """Read and write the scores and pictures of an evaluation.

    Every process reads; only the main one writes. output: --output, or "" for
    runs/evaluation-XXXXXXXX, a hash of the settings and the models. settings: those that change
    the results. whose: {model: identity of its weights}. Raises InputError for a folder that is not
    writable, or that holds another evaluation or scores of other weights.
    """

    def __init__(self, output: str, settings: dict, whose: dict[str, dict]) -> None:
        self.settings, self.whose = json.loads(json.dumps([settings, whose], sort_keys=True))
        self.path = Path(output or f"runs/evaluation-{digest([self.settings, self.whose])[:8]}")
        self._check()
        self.parts = {name: self._read(name) for name in whose}  # {model: {part: {reward: [n]}}}

    def _check(self) -> None:
        above = [self.path, *self.path.absolute().parents]
        existing = next(folder for folder in above if folder.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise InputError(f"--output {self.path}: cannot write there. Choose another folder.")
        path = self.path / "evaluation.json"
        if not path.exists():
            return
        with errors.loading("--output", path, do="choose another folder"):
            then = json.loads(path.read_text(encoding="utf-8"))
            names = {**then, **self.settings}
            wrong = [name for name in names if then.get(name) != self.settings.get(name)]
        if wrong:
            name = wrong[0]
            raise InputError(
                f"--output {self.path}: has an evaluation with {name} {then.get(name)!r:.200}, now "
                f"it is {self.settings.get(name)!r:.200}. Choose another folder."
            )

    def _read(self, name: str) -> dict[int, dict[str, list]]:
        path = self._scores(name)
        lines = (
            path.read_text(errors="replace", encoding="utf-8").splitlines() if path.exists() else []
        )
        rows = [_json(line) for line in lines]
        rows = [row for row in rows if isinstance(row, dict)]  # a killed process leaves half a line
        if rows and rows[0] != self.whose[name]:
            raise InputError(
                f"--output {self.path}: has scores of other weights called {name}. Choose another "
                "folder."
            )
        return {row["part"]: row["scores"] for row in rows[1:] if _is_of_a_part(row)}

    def _scores(self, name: str) -> Path:
        return self.path / "scores" / f"{name}.jsonl"

    # --- Scores ---

    def begin(self) -> None:
        """Write the settings and the known scores. Raises OSError."""
        (self.path / "scores").mkdir(parents=True, exist_ok=True)
        files.write_text(self.path / "evaluation.json", json.dumps(self.settings, indent=2) + "\n")
        for name, parts in self.parts.items():
            rows = [{"part": number, "scores": scores} for number, scores in parts.items()]
            lines = [json.dumps(row) + "\n" for row in (self.whose[name], *rows)]
            files.write_text(self._scores(name), "".join(lines))

    def add(self, name: str, number: int, scores: dict[str, torch.Tensor]) -> None:
        """Append the scores {reward: [n] float32} of a model's part. Raises OSError.

        NaN, for a sample without a score, is null in the file.
        """
        values = {}
        for reward, found in scores.items():
            values[reward] = [v if v == v else None for v in found.tolist()]
        self.parts[name][number] = values
        with self._scores(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": number, "scores": values}) + "\n")

    def scores(
        self, name: str, reward: str, parts: Sequence[torch.Tensor], shape: tuple[int, int]
    ) -> torch.Tensor:
        """Return a model's scores [P, S] by a reward, NaN for a sample without one.

        parts: all parts, in order; shape: (P, S).
        """
        found = torch.full(shape, torch.nan)
        for number, part in enumerate(parts):
            values = self.parts[name][number][reward]
            known = [torch.nan if value is None else value for value in values]
            found[part[:, 0], part[:, 1]] = torch.tensor(known)
        return found

    @contextlib.contextmanager
    def writing(self, processes: Processes) -> Iterator[None]:
        """Raise RunError on all processes if one of them raises OSError in the block.

        An InputError in the block is raised on all processes as well.
        """
        error = ""
        try:
            yield
        except OSError as failed:
            error = RunError(
                f"cannot write into {self.path} ({errors.text(failed)}). Is the disk full? The "
                "same command continues."
            )
        except InputError as wrong:
            error = wrong
        error = processes.first(error)
        if error:
            raise error

    # --- The picture ---

    def shown(self, name: str, prompt: int) -> Path:
        """Return the file of a model's sample of a prompt."""
        return self.path / "shown" / name / f"{prompt:05d}.pt"

    def show(self, name: str, prompt: int, sample: torch.Tensor) -> None:
        """Save a sample [C, H, W], or a clip [F, C, H, W], in [0, 1]. Raises OSError."""
        path = self.shown(name, prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = io.BytesIO()  # on a full disk torch.save raises something else than OSError
        torch.save(sample.clamp(0, 1).mul(255).round().to("cpu", torch.uint8), written)
        files.write_beside(path, lambda beside: beside.write_bytes(written.getvalue()))

    def picture(self, prompts: list[str], rewards: dict[str, torch.Tensor], fps: float) -> Path:
        """Save side_by_side.png, a line for each of n prompts with a sample of each model.

        rewards {model: [n]}. For clips it has some frames, and side_by_side.mp4 has all of them.
        Returns the path of the picture or clip.
        """
        path = self.path / "side_by_side.png"
        places = [(number, name) for number in range(len(prompts)) for name in rewards]
        media = [torch.load(self.shown(name, n), weights_only=True) for n, name in places]
        media = torch.stack(media) / 255
        titles = [f"{name}: {caption_of(prompts[number])}" for number, name in places]
        marks = [rewards[name][number] for number, name in places]
        if media.ndim == 4:
            pictures.save_grid(path, media, titles, marks, columns=len(rewards))
            return path
        pictures.save_strips(path, media, titles, marks)
        pictures.save_clips(path.with_suffix(".mp4"), media, fps, columns=len(rewards))
        return path.with_suffix(".mp4")


def digest(*lists: Iterable) -> str:
    """Return the SHA-256 of lists of JSON values, in hexadecimal."""
    return hashlib.sha256(json.dumps([list(values) for values in lists]).encode()).hexdigest()


def _is_of_a_part(row: dict) -> bool:
    """Return whether a line has the form that `add` writes. Other lines are scored again."""
    scores = row.get("scores")
    if type(row.get("part")) is not int or not isinstance(scores, dict):
        return False
    for values in scores.values():
        if not isinstance(values, list):
            return False
        if not all(value is None or type(value) is float for value in values):
            return False
    return True


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
