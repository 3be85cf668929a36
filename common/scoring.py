"""Scores of samples as they come: while a judge's server looks at some, the next ones are sampled."""

import threading
from concurrent.futures import Future

import torch

from common.rewards import asking


class Scoring:
    """The scores of samples that are added in order, each with its caption; `size` of them are decoded and scored
    together. Scorers with `elsewhere` work in a thread, on one such batch at a time, from the first samples on. Without
    any all is done by `result`. What is wrong scorers keep, as ever, for asking.check_finite."""

    def __init__(self, scorers, model, captions, size):
        self.scorers, self.model, self.captions, self.size = scorers, model, captions, size
        away = {name for name, scorer in scorers.items() if getattr(scorer, "elsewhere", False)}
        self.here, self.away = ({n: s for n, s in scorers.items() if (n in away) == there} for there in (False, True))
        self.latents, self.done, self.parts, self.waiting = [], 0, [], None

    def add(self, x0):
        """Latents [n, ...] of the next samples; what comes after the last caption is a filler."""
        self.latents.extend(x0)
        if self.away and (not self.waiting or self.waiting.done()):  # sampling waits for nobody
            self._score(1)

    def result(self):
        """{name: [b] float32} of all samples."""
        self._score(len(self.captions))
        found = [{name: value() if callable(value) else value for name, value in part.items()} for part in self.parts]
        return {name: torch.cat([part[name] for part in found]) for name in self.scorers}

    def _score(self, batches):
        """Begins with so many batches, of those whose samples are there."""
        for _ in range(batches):
            captions = self.captions[self.done : self.done + self.size]
            if not captions or len(self.latents) < self.done + len(captions):
                break
            x0 = torch.stack(self.latents[self.done : self.done + len(captions)])
            self.parts.append(asking.of_samples(self.scorers, self.model, x0, captions, self._ask))
            self.done += len(captions)

    def _ask(self, scorers, media, captions):
        """What asking.score gives, with a function that waits for it in the place of a score from elsewhere."""
        later = {}
        if self.away:
            if self.waiting:
                self.waiting.result()  # one at a time: clips are large
            copy, device = media.cpu(), media.device
            self.waiting = done = begin(lambda: asking.score(self.away, copy, captions))
            later = {name: lambda name=name: done.result()[name].to(device) for name in self.away}
        return {**asking.score(self.here, media, captions), **later}


def begin(action):
    """What action() gives, in a thread of its own that keeps no program from ending."""
    done = Future()

    def act():
        try:
            done.set_result(action())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    return done
