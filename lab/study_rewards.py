"""Rewards with exactly known faults: the verifiers with added noise, doubt or preference.

    python bpgo.py --reward lab/study_rewards.py:NoisyAmbiguous --watch verifier

    noise       every sample gets an error from N(0, noise^2). It depends on pixels and caption
                only, so a resumed run, or one with other processes, sees the same errors
    ambiguity   every attribute that a caption leaves open (a shape, a colour, a speed) moves the
                score towards UNSURE, so the samples of a vague caption get closer scores: 55% of
                the spread if half is open
    liking      captions of one kind, those that count, get that much more

`Vague` and `MotionVague` are for --watch: the truth of the captions that leave half or more open,
and 0 for the others; so its mean over a prompt file, divided by the file's share of them
(`share_of_vague`), is the truth of the vague ones."""

import hashlib
from statistics import NormalDist

from worlds import motion, scene
from worlds.motion import Motion
from worlds.scene import ANY
from worlds.verifier import Verifier

UNSURE = 0.3  # a score below most of the truth's
FLOOR = 0.95  # the verifier's score up to which Flat is 0
VAGUE = 0.5  # the open share from which a caption counts as vague


def left_open(caption):
    """The share of the attributes that a caption could name and leaves open: "a red circle" 0, "a
    circle" 0.5."""
    try:
        wanted = [attribute for thing in scene.parse(caption).objects for attribute in thing]
    except ValueError:
        moving = motion.parse(caption)
        wanted = [moving.shape, moving.colour, moving.direction, moving.speed]
    return sum(attribute == ANY for attribute in wanted) / len(wanted)


def is_vague(caption):
    return left_open(caption) >= VAGUE


def share_of_vague(captions):
    return sum(map(is_vague, captions)) / len(captions)


def counts(caption):
    """Whether a caption of the shapes world asks for a number: the kind that a biased judge
    likes."""
    return scene.parse(caption).task == "counting"


def own_error(sample, caption):
    """A standard normal number that belongs to a sample, in [0, 1] of any shape, at 8 bits, and its
    caption."""
    levels = (sample.float().clamp(0, 1) * 255).round().byte().cpu().numpy().tobytes()
    drawn = hashlib.blake2b(levels + caption.encode(), digest_size=8).digest()
    return NormalDist().inv_cdf((int.from_bytes(drawn, "big") + 0.5) / 2**64)


class Faulty:
    """Before a verifier's class: what it says, with these faults."""

    noise, ambiguity, liking = 0.0, 0.0, 0.0
    range = (None, None)

    def score(self, media, prompts):
        """media [b, ...] in [0, 1], prompts b strings -> [b] float32"""
        score = super().score(media, prompts)
        if self.ambiguity:
            open_ = score.new_tensor([self.ambiguity * left_open(prompt) for prompt in prompts])
            score = (1 - open_) * score + open_ * UNSURE
        if self.liking:
            score = score + self.liking * score.new_tensor(
                [float(counts(prompt)) for prompt in prompts]
            )
        if self.noise:
            score = score + self.noise * score.new_tensor(
                [own_error(*pair) for pair in zip(media, prompts)]
            )
        return score


class Noisy(Faulty, Verifier):
    """Reward: the verifier with an error as large as the spread within a group of tiny-flux
    samples."""

    noise = 0.2
    scale = 0.32  # with the verifier's own .25


class Ambiguous(Faulty, Verifier):
    """Reward: the verifier, unsure of what the caption leaves open."""

    ambiguity = 0.9


class NoisyAmbiguous(Faulty, Verifier):
    """Reward: both, so that the groups of vague captions show little but noise."""

    noise, ambiguity = 0.2, 0.9
    scale = 0.32


class Biased(Faulty, Verifier):
    """Reward: the verifier, and .1 more for captions that count."""

    liking = 0.1
    range = (0.0, 1.1)


class Unsure(Verifier):
    """Reward: a judge that cannot judge vague captions. It gives them a tenth of the verifier's
    score, and every sample an error of .15: the premises of SLAS and of BPGO."""

    scale = 0.2
    range = (None, None)

    def score(self, media, prompts):
        """media [b, ...] in [0, 1], prompts b strings -> [b] float32"""
        score = super().score(media, prompts)
        vague = score.new_tensor([float(is_vague(prompt)) for prompt in prompts])
        error = score.new_tensor([own_error(*pair) for pair in zip(media, prompts)])
        return (1 - 0.9 * vague) * score + 0.15 * error


class Flat(Verifier):
    """Reward: what the verifier has above FLOOR, on [0, 1]. It is 0 for most samples of the base
    model, so GRPO learns nothing from most groups."""

    scale = 0.05

    def score(self, media, prompts):
        """media [b, ...] in [0, 1], prompts b strings -> [b] float32"""
        return ((super().score(media, prompts) - FLOOR) / (1 - FLOOR)).clamp(min=0)


class Vague(Verifier):
    """To watch: the verifier of vague captions, 0 for the others."""

    def score(self, media, prompts):
        score = super().score(media, prompts)
        return score * score.new_tensor([float(is_vague(prompt)) for prompt in prompts])


class MotionNoisyAmbiguous(Faulty, Motion):
    """Reward: the motion verifier with noise, and unsure of what the caption leaves open."""

    noise, ambiguity = 0.2, 0.9
    scale = 0.32


class MotionVague(Motion):
    """To watch: the motion verifier of vague captions, 0 for the others."""

    def score(self, media, prompts):
        score = super().score(media, prompts)
        return score * score.new_tensor([float(is_vague(prompt)) for prompt in prompts])
