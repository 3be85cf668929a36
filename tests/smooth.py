"""Rewards without jumps, for tests that compare runs whose roundings differ: two processes, other
batch shapes. A verifier decides, a JPEG quantises: where a sample lies on an edge, the last bit of
a weight changes its reward."""

import torch

from common import rewards


class _Colour:
    video = False
    scale = 0.02
    range = (0.0, 1.0)

    def score(self, media, prompts):
        """How far one channel is from white: media [b, 3, H, W] in [0, 1] -> [b]"""
        return (1 - media[:, self.channel].double()).square().mean((1, 2))


class Change:
    """Of clips that start from one frame the colours are nearly equal, and advantages would be made
    of rounding."""

    video = True
    image = False
    scale = 0.002
    range = (0.0, 1.0)

    def score(self, media, prompts):
        """How much moves: media [b, F, 3, H, W] in [0, 1] -> [b]"""
        return (media[:, 1:] - media[:, :-1]).double().square().mean((1, 2, 3, 4))


class Picky(_Colour):
    """The red channel, and NaN for all samples of some prompts."""

    channel, masks = 0, True

    def score(self, media, prompts):
        """media [b, 3, H, W] in [0, 1] -> [b]"""
        refused = [any(words in prompt for words in ("red circle", "shapes")) for prompt in prompts]
        return super().score(media, prompts).masked_fill(torch.tensor(refused), torch.nan)


COLOURS = ("red", "green", "blue")
for number, name in enumerate(COLOURS):
    globals()[name] = type(name, (_Colour,), {"channel": number})
    # a run that loads this as a user's file does not replace these
    rewards.REWARDS.setdefault(name, f"{__name__}:{name}")
rewards.REWARDS.setdefault("change", f"{__name__}:Change")
rewards.REWARDS.setdefault("picky", f"{__name__}:Picky")
