"""Rewards of --model points in the worlds of lab/points.py, for tests/test_dials.py."""

import torch

from lab.points import Judge as JudgedWorld
from lab.points import Ladder
from worlds import points

JUDGED = JudgedWorld(0, 1, kind="style", noise=0.05)
LADDER = Ladder(0, 1, floor=0.1)
MASKED = 0.8  # samples whose first coordinate is larger have no score


class MaskedWorld(JudgedWorld):
    """A judge that gives no score to some samples."""

    def score(self, x, prompts, error):
        """Return the rewards, with NaN for samples without a score."""
        scores = super().score(x, prompts, error)
        missing = x[..., 0] > MASKED
        return {**scores, "judge": scores["judge"].masked_fill(missing, torch.nan)}


UNSURE = MaskedWorld(0, 1, kind="style", noise=0.05)


class Judge:
    """The judge of JUDGED."""

    world, name = JUDGED, "judge"
    video, masks, scale, range = False, True, 0.15, (None, None)

    def score(self, media, prompts):
        """Return the scores [b] of pictures of points."""
        known = points.described(prompts)
        x = points.points(media)[None, :, None]  # a group of one for each prompt
        return self.world.score(x, known, torch.zeros(()))[self.name].flatten()


class Masked(Judge):
    """The judge that gives no score to some samples."""

    world = UNSURE


class Quality(Judge):
    """The first stage."""

    world, name, range = LADDER, "quality", (0.0, 1.0)


class Layout(Quality):
    """The second stage."""

    name = "layout"


class Truth(Quality):
    """The last stage."""

    name = "truth"
