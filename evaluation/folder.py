"""What evaluate.py makes and scores samples with, and the folder of an evaluation, in which it goes
on after a kill:

    evaluation.json          its settings; others need another folder
    scores/MODEL.jsonl       a line as soon as a part of a model's samples is scored; the first line says whose they are
    shown/MODEL/NNNNN.pt     the samples of the picture, uint8
    results.json, results.csv, side_by_side.png (.mp4)
    LAYOUT/...               of --layout (layouts.py)

Samples are told by (prompt, which): of P prompts, and of the S samples of a prompt. A part is a
tensor of them, [n, 2]."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import errors
from common.errors import InputError, RunError
from common.models.family import Family
from common.prompts import caption_of
from common.reporting import report
from common.rewards import asking
from common.trainer import heldout, run_folder
from common.trainer.processes import Processes
from evaluation import layouts


class Folder:
    """output: --output, "" for runs/evaluation-XXXXXXXX, by the settings and the models. settings:
    what makes this evaluation no other; whose {model: what tells its weights from others}. Raises
    InputError for a folder that cannot be written to, or holds another evaluation, or scores of
    other weights. Every process reads; the main one writes, and may raise OSError."""

    def __init__(self, output: str, settings: dict, whose: dict[str, dict]) -> None:
        self.settings, self.whose = json.loads(json.dumps([settings, whose], sort_keys=True))
        self.path = Path(output or f"runs/evaluation-{digest([self.settings, self.whose])[:8]}")
        self._check()
        self.parts = {name: self._read(name) for name in whose}  # {model: {part: {reward: [n]}}}

    def _check(self) -> None:
        there = next(
            folder for folder in (self.path, *self.path.absolute().parents) if folder.exists()
        )
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise InputError(f"--output {self.path}: cannot write there; choose another folder")
        path = self.path / "evaluation.json"
        if not path.exists():
            return
        try:
            then = json.loads(path.read_text())
            wrong = [
                name
                for name in {**then, **self.settings}
                if then.get(name) != self.settings.get(name)
            ]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            raise InputError(
                f"--output {self.path}: its evaluation.json cannot be read; choose another"
            ) from None
        if wrong:
            raise InputError(
                f"--output {self.path} has an evaluation with {wrong[0]} "
                f"{then.get(wrong[0])!r:.200}, now it is "
                f"{self.settings.get(wrong[0])!r:.200}: choose another folder"
            )

    def _read(self, name: str) -> dict[int, dict[str, list]]:
        path = self._scores(name)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        rows = [
            row for row in map(_json, lines) if isinstance(row, dict)
        ]  # not the half line of a killed process
        if rows and rows[0] != self.whose[name]:
            raise InputError(
                f"--output {self.path} has scores of other weights called {name}: choose another "
                "folder"
            )
        return {row["part"]: row["scores"] for row in rows[1:] if _is_of_a_part(row)}

    def begin(self) -> None:
        """Writes the settings, and the scores that were read, without a killed process's half line.
        Raises OSError."""
        (self.path / "scores").mkdir(parents=True, exist_ok=True)
        run_folder.write_text(
            self.path / "evaluation.json", json.dumps(self.settings, indent=2) + "\n"
        )
        for name, parts in self.parts.items():
            rows = [{"part": number, "scores": scores} for number, scores in parts.items()]
            lines = [json.dumps(row) + "\n" for row in (self.whose[name], *rows)]
            run_folder.write_text(self._scores(name), "".join(lines))

    def add(self, name: str, parts: dict[int, dict[str, torch.Tensor]]) -> None:
        """Appends a model's scores {part: {reward: [n] float32}}; NaN, of a sample without one, is
        null in the file. Raises OSError."""
        for number, scores in parts.items():
            scores = {
                reward: [v if v == v else None for v in values.tolist()]
                for reward, values in scores.items()
            }
            self.parts[name][number] = scores
            with self._scores(name).open("a") as file:
                file.write(json.dumps({"part": number, "scores": scores}) + "\n")

    def scores(
        self, name: str, reward: str, parts: Sequence[torch.Tensor], shape: tuple[int, int]
    ) -> torch.Tensor:
        """Of a model and a reward, `shape` [P, S], NaN where there is none; parts: all of them, in
        order."""
        found = torch.full(shape, torch.nan)
        for number, part in enumerate(parts):
            values = self.parts[name][number][reward]
            found[part[:, 0], part[:, 1]] = torch.tensor(
                [torch.nan if value is None else value for value in values]
            )
        return found

    def together(self, run: Processes, action: Callable, *words) -> None:
        """All processes together: what the main one writes; where it fails, all of them stop.
        Raises RunError, and the action's InputError."""
        error = ""
        try:
            if run.is_main:
                action(*words)
        except OSError as failed:
            error = RunError(self.cannot_write(failed))
        except InputError as wrong:
            error = wrong
        if error := run.first(error):
            raise error

    def cannot_write(self, error: OSError) -> str:
        """The line for an OSError."""
        return f"cannot write into {self.path} ({errors.text(error)}); is the disk full? The same command goes on"

    # --- The picture ---

    def shown(self, name: str, prompt: int) -> Path:
        """The file of a model's sample of a prompt."""
        return self.path / "shown" / name / f"{prompt:05d}.pt"

    def show(self, name: str, prompt: int, sample: torch.Tensor) -> None:
        """Keeps a sample [C, H, W], or a clip [F, C, H, W], in [0, 1] for the picture; raises
        OSError."""
        path = self.shown(name, prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = io.BytesIO()  # of a full disk torch says something else than OSError
        torch.save(sample.clamp(0, 1).mul(255).round().to("cpu", torch.uint8), written)
        run_folder.write_beside(path, lambda beside: beside.write_bytes(written.getvalue()))

    def picture(self, prompts: list[str], rewards: dict[str, torch.Tensor], fps: float) -> Path:
        """side_by_side.png, a line for each of n prompts with a sample of each model (rewards
        {model: [n]}); of clips some of their frames, and all of them in side_by_side.mp4. Returns
        the path."""
        path, columns = self.path / "side_by_side.png", len(rewards)
        places = [(number, name) for number in range(len(prompts)) for name in rewards]
        media = (
            torch.stack([torch.load(self.shown(name, n), weights_only=True) for n, name in places])
            / 255
        )
        titles = [f"{name}: {caption_of(prompts[number])}" for number, name in places]
        marks = [rewards[name][number] for number, name in places]
        if media.ndim == 4:
            report.save_grid(path, media, titles, marks, columns)
            return path
        report.save_strips(path, media, titles, marks)
        report.save_clips(path.with_suffix(".mp4"), media, fps, columns)
        return path.with_suffix(".mp4")

    def _scores(self, name: str) -> Path:
        return self.path / "scores" / f"{name}.jsonl"


@dataclass
class Evaluator:
    """What every model's samples are made and scored with. Samples are (prompt, which); a part is
    some, [n, 2]."""

    run: Processes
    model: Family
    scorers: dict
    sigmas: torch.Tensor  # [T+1]
    prompts: list
    folder: Folder
    layout: layouts.Layout | None
    pictured: int  # prompts

    def begin(self) -> None:
        """On the main process, before any samples; raises OSError or InputError."""
        self.folder.begin()
        for name in self.folder.parts if self.layout else ():
            self.layout.begin(self.folder.path, name)

    def shown(self, part: torch.Tensor) -> list[tuple[int, int]]:
        """Those in the picture."""
        return [
            (p, which)
            for p, which in part.tolist()
            if self.scorers and which == 0 and p < self.pictured
        ]

    def lacks(self, name: str, number: int, part: torch.Tensor) -> bool:
        """Whether some of a part's scores or files are not there yet."""
        paths = [self.folder.shown(name, p) for p, _ in self.shown(part)]
        if self.layout:
            paths += [
                self.layout.path(self.folder.path, name, tuple(sample)) for sample in part.tolist()
            ]
        scores = self.folder.parts[name].get(number)
        if scores is None or any(
            len(scores.get(reward, ())) != len(part) for reward in self.scorers
        ):
            return True
        return not all(path.exists() for path in paths)

    def score(self, name: str, part: torch.Tensor) -> tuple[dict[str, torch.Tensor], str]:
        """Makes a part of a model's samples: ({reward: [n]}, ""), or ({}, why there are no
        scores)."""
        run, args, shown = self.run, self.run.args, self.shown(part)
        captions, streams = (
            [self.prompts[p] for p in part[:, 0]],
            part[:, 1] * len(self.prompts) + part[:, 0],
        )
        settings = self.sigmas, args.micro_batch, run.device, args.seed
        try:
            found, media = heldout.sample_and_score(
                self.model, self.scorers, captions, streams, *settings
            )
            if not media.isfinite().all():
                return (
                    {},
                    f"the samples of {name} are no numbers: its weights have diverged; name an "
                    "earlier checkpoint",
                )
            for sample, pixels in zip(map(tuple, part.tolist()), media):
                if sample in shown:
                    self.folder.show(name, sample[0], pixels)
                if self.layout:
                    layouts.write(
                        self.layout.path(self.folder.path, name, sample), pixels, args.fps
                    )
            return {name: values.cpu() for name, values in found.items()}, ""
        except Exception as error:
            reason = (
                self.folder.cannot_write(error)
                if isinstance(error, OSError)
                else errors.of_the_machine(error)
            )
            if not reason:
                raise
            return {}, reason

    def check(self, scored: list[tuple[dict[str, torch.Tensor], str]], part: torch.Tensor) -> None:
        """All processes together: raises RunError where these parts, all in `part`, have no scores,
        or none that can be counted. scored: what `score` gave of each."""
        if reason := next(filter(None, (reason for _, reason in scored)), ""):
            raise RunError(reason)
        for name, scorer in self.scorers.items():
            values = torch.cat([found[name] for found, _ in scored])[:, None]
            if getattr(scorer, "masks", False):  # here a part may have no score at all
                values = torch.where(values.isnan(), 0.0, values)
            asking.check_finite({name: values}, self.scorers, [self.prompts[p] for p in part[:, 0]])


def digest(*things: Iterable) -> str:
    """What tells lists of JSON's values from others: SHA-256, in hexadecimal."""
    return hashlib.sha256(json.dumps([list(values) for values in things]).encode()).hexdigest()


def _is_of_a_part(row: dict) -> bool:
    """Whether a line of scores is as `add` wrote it: what was edited since counts as not there."""
    lists = row["scores"].values() if isinstance(row.get("scores"), dict) else [None]
    numbers = (
        value for values in lists for value in (values if isinstance(values, list) else [""])
    )
    return type(row.get("part")) is int and all(
        value is None or type(value) is float for value in numbers
    )


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
