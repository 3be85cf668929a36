"""Scores of samples as they come: while a judge's server looks at some, the next ones are
sampled."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch

from common.rewards import asking

if TYPE_CHECKING:  # it loads more than torch
    from common.models.family import Family


class Scoring:
    """The scores of samples that are added in order, each with its caption; `size` of them are
    decoded and scored together. Scorers with `elsewhere` work in a thread, on one such batch at a
    time, from the first samples on. Without any all is done by `result`. What is wrong scorers
    keep, as ever, for asking.check_finite."""

    def __init__(self, scorers: dict, model: "Family", captions: list[str], size: int) -> None:
        self.scorers, self.model, self.captions, self.size = scorers, model, captions, size
        away = {name for name, scorer in scorers.items() if getattr(scorer, "elsewhere", False)}
        self.here, self.away = (
            {n: s for n, s in scorers.items() if (n in away) == there} for there in (False, True)
        )
        self.latents, self.done, self.parts, self.waiting = [], 0, [], None

    def add(self, x0: torch.Tensor) -> None:
        """Latents [n, ...] of the next samples; what comes after the last caption is a filler."""
        self.latents.extend(x0)
        if self.away and (not self.waiting or self.waiting.done()):  # sampling waits for nobody
            self._score(1)

    def result(self) -> dict[str, torch.Tensor]:
        """{name: [b] float32} of all samples."""
        self._score(len(self.captions))
        found = [
            {name: value() if callable(value) else value for name, value in part.items()}
            for part in self.parts
        ]
        return {name: torch.cat([part[name] for part in found]) for name in self.scorers}

    def _score(self, batches: int) -> None:
        """Begins with so many batches, of those whose samples are there."""
        for _ in range(batches):
            captions = self.captions[self.done : self.done + self.size]
            if not captions or len(self.latents) < self.done + len(captions):
                break
            x0 = torch.stack(self.latents[self.done : self.done + len(captions)])
            self.parts.append(asking.of_samples(self.scorers, self.model, x0, captions, self._ask))
            self.done += len(captions)

    def _ask(
        self, scorers: dict, media: torch.Tensor, captions: list[str]
    ) -> dict[str, torch.Tensor | Callable]:
        """What asking.score gives, with a function that waits for it in the place of a score from
        elsewhere."""
        later = {}
        if self.away:
            if self.waiting:
                self.waiting.result()  # one at a time: clips are large
            copy, device = media.cpu(), media.device
            self.waiting = done = begin(lambda: asking.score(self.away, copy, captions))
            later = {name: lambda name=name: done.result()[name].to(device) for name in self.away}
        return {**asking.score(self.here, media, captions), **later}


def begin(action: Callable) -> Future:
    """What action() gives or raises, from a thread of its own that keeps no program from ending."""
    done = Future()

    def act() -> None:
        try:
            done.set_result(action())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    return done
