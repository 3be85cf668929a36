"""Points in a few dimensions instead of images: an exact base model, a small network to train,
rewards in closed form, and the model `points` of all scripts.

A prompt has an embedding z and a target, a point that is linear in z. The base model samples x0
from a Gaussian whose mean misses the target, and its velocity is known in closed form. Training
changes a small network, whose output is zero at first and is added to that velocity.

`lab/points.py` trains hundreds of runs in one batch with the same functions, so everything here has
leading dimensions: S worlds, E runs, n points, D dimensions, C numbers of an embedding.

    python -m worlds.points        # writes assets/points and its prompts
"""

import math
import zlib
from functools import cache
from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch.nn.functional import silu

from common import sde
from common.models.family import Family
from common.models.presets import ASSETS

D = 8  # dimensions of a point
C = 8  # numbers of a prompt's embedding
HIDDEN = 32  # width of the trained network
SPREAD = 0.25  # variance of the base model's samples of a prompt
NEAR = 0.72  # mean squared distance to the target at which the score is 1/e
BLOCKS = (slice(0, 3), slice(3, 5), slice(5, None))  # dimensions of the three stages
LARGEST = 8.0  # pictures show coordinates from -8 to 8


# --- The world ---


def drawn(*key):
    """Return a random generator that is seeded by a key of words and numbers."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def worlds(bank, seeds, dimensions=D):
    """Return S worlds: target and away [S, C, D], style [S, 1, 1, D].

    target: linear map from embeddings to targets. away: the same to how the base model misses them.
    style: a direction of length 1 that a judge may prefer. bank: a number; worlds of different
    banks are independent.
    """
    g = drawn(bank, "world")
    target, away = (torch.randn(seeds, C, dimensions, generator=g) / math.sqrt(C) for _ in range(2))
    style = torch.randn(seeds, 1, 1, dimensions, generator=g)
    return SimpleNamespace(target=target, away=away, style=style / style.norm(dim=-1, keepdim=True))


def prompts_of(world, z, vague):
    """Return what is known of n prompts in each of S worlds.

    z [S, n, C]: embeddings; vague [S, n]: 1 for a prompt whose samples a judge cannot tell apart,
    else 0. The result has z [S, n, C + 1], which is what the network sees, vague, and the target
    and the base model's mean [S, n, D].
    """
    target = z @ world.target
    mean = target - torch.tanh(1.5 * z @ world.away)  # misses by about 0.6 in every dimension
    seen = torch.cat([z, 2 * vague[..., None] - 1], -1)
    return SimpleNamespace(z=seen, vague=vague, target=target, mean=mean)


def nearness(off):
    """Return how near points are to their target: offsets [..., D] -> [...] in (0, 1]."""
    return torch.exp(-off.square().mean(-1) / NEAR)


# --- The model ---


def initial_weights(bank, seeds, inputs, dimensions=D, hidden=HIDDEN):
    """Return the network's weights at the start: tensors [S, inputs or 1, outputs].

    inputs: numbers of a prompt that it sees. The last layer is zero.
    """
    g = drawn(bank, "weights")
    sizes = ((dimensions + inputs + 4, hidden), (hidden, hidden))
    weights = []
    for rows, columns in sizes:
        weights.append(torch.randn(seeds, rows, columns, generator=g) / math.sqrt(rows))
        weights.append(torch.zeros(seeds, 1, columns))
    weights.append(torch.zeros(seeds, hidden, dimensions))
    weights.append(torch.zeros(seeds, 1, dimensions))
    return weights


def velocity(x, sigma, z, mean, weights=None):
    """Return the velocity eps - x0 of E runs: [E, n, D].

    x, mean [E, n, D]; sigma: a scalar or [n]; z [E, n, C + 1]; weights: those of initial_weights
    for E runs, None for the base model alone.
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1)
    kept = 1 - sigma
    # E[eps - x0 | x] for x0 ~ N(mean, SPREAD) and x = kept x0 + sigma eps
    slope = (sigma - kept * SPREAD) / (kept**2 * SPREAD + sigma**2)
    base = slope * (x - kept * mean) - mean
    if weights is None:
        return base
    turn = math.pi * sigma
    time = torch.cat([sigma, sigma**2, torch.cos(turn), torch.sin(turn)], -1)  # [1 or n, 4]
    inputs = torch.cat([x, z, time.expand(*x.shape[:2], 4)], -1)
    w1, b1, w2, b2, w3, b3 = weights
    hidden = silu(torch.baddbmm(b2, silu(torch.baddbmm(b1, inputs, w1)), w2))
    return base + torch.baddbmm(b3, hidden, w3)


class PointsField(ModelMixin, ConfigMixin):
    """Add the trained network to the base model's velocity, as a diffusers model."""

    @register_to_config
    def __init__(self, dimensions=D, inputs=C + 1, hidden=HIDDEN):
        super().__init__()
        first = initial_weights(0, 1, inputs, dimensions, hidden)
        self.weights = torch.nn.ParameterList(weight[0] for weight in first)

    def forward(self, x, sigma, z, mean):
        """Return the velocity [b, D] at points x [b, D]; arguments as of `velocity`, without E."""
        weights = [weight[None] for weight in self.weights]
        return velocity(x[None], sigma, z[None], mean[None], weights)[0]


class PointsPipeline(DiffusionPipeline):
    """Sample points for captions."""

    def __init__(self, transformer: PointsField):
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=6, generator=None):
        """Return noise-free samples for a list of captions, as pictures [b, 3, 8, D] in [0, 1]."""
        known = described(prompt)
        x = torch.randn(known.mean[0].shape, generator=generator)

        def field(x, sigma):
            return self.transformer(x, sigma, known.z[0], known.mean[0])

        sigmas = sde.shifted_sigmas(num_inference_steps, 1.0)
        latents, _ = sde.rollout(field, x, sigmas, torch.zeros(num_inference_steps), None)
        return pictures(latents[:, -1])


class Points(Family):
    """Run the model `points`: latents [b, D], pictures [b, 3, 8, D] with a column per dimension."""

    pipeline = PointsPipeline

    def __init__(self, pipe, height=0, width=0, **settings):
        super().__init__(pipe, **settings)
        dimensions = pipe.transformer.config.dimensions
        self.height, self.width = self._size(8, height or 8, width or dimensions)
        self.noise_shape = (dimensions,)

    @property
    def device(self):
        """Return the device of samples and conditioning."""
        return next(self.trainable["transformer"].parameters()).device

    @property
    def dtype(self):
        """Return the dtype of the conditioning."""
        return torch.float32

    def text(self, caption):
        """Return {"z": [C + 1], "mean": [D]} of a caption."""
        known = described([caption])
        return {"z": known.z[0, 0].to(self.device), "mean": known.mean[0, 0].to(self.device)}

    def blank(self):
        """Return zeros like the conditioning of one prompt, {name: [...]}."""
        return {name: torch.zeros_like(value) for name, value in self.text("").items()}

    def velocity(self, x, sigma, cond):
        """Return the velocity [b, D] float32 at x [b, D] and sigma, a scalar or [b]."""
        return self.trainable["transformer"](x, sigma, **cond).float()

    def pixels(self, x0):
        """Return points [b, D] as pictures [b, 3, 8, D] in [0, 1]."""
        return pictures(x0)


def pictures(x):
    """Return points [b, D] as grey pictures [b, 3, 8, D] in [0, 1]: -LARGEST is 0, LARGEST 1."""
    grey = (x / (2 * LARGEST) + 0.5).clamp(0, 1)
    return grey[:, None, None].expand(-1, 3, 8, -1)


def points(media):
    """Return the points [b, D] of pictures [b, 3, 8, D]: the inverse of `pictures`."""
    return (media[:, 0, 0] - 0.5) * (2 * LARGEST)


# --- Captions and rewards of --model points ---


@cache
def own_world():
    """Return the world of --model points."""
    return worlds(0, 1)


def described(captions):
    """Return what `prompts_of` returns, for a list of captions and S = 1.

    The embedding is random, with the caption as its seed. A caption that begins with "vague"
    belongs to a vague prompt.
    """
    rows = [torch.randn(C, generator=drawn(str(caption))) for caption in captions]
    vague = torch.tensor([float(str(caption).startswith("vague")) for caption in captions])
    return prompts_of(own_world(), torch.stack(rows)[None], vague[None])


class Score:
    """Score how near a point is to its prompt's target, 0 to 1."""

    video = False
    scale = 0.12  # spread within a group of the base model's samples
    range = (0.0, 1.0)

    def score(self, media, prompts):
        """Return the scores [b] of pictures [b, 3, 8, D]."""
        off = points(media) - described(prompts).target[0].to(media.device)
        return self.of(off)

    def of(self, off):
        """Return the scores [b] of offsets from the target [b, D]."""
        return nearness(off)


class Quality(Score):
    """Score the same in the first three dimensions."""

    def of(self, off):
        """Return the scores [b] of offsets from the target [b, D]."""
        return nearness(off[:, BLOCKS[0]])


class Layout(Score):
    """Score the mean of `Quality` and of the nearness in the next two dimensions."""

    def of(self, off):
        """Return the scores [b] of offsets from the target [b, D]."""
        return (nearness(off[:, BLOCKS[0]]) + nearness(off[:, BLOCKS[1]])) / 2


# --- The folder ---


def build():
    """Write assets/points and its prompts. Every second prompt is vague."""
    PointsPipeline(PointsField()).save_pretrained(ASSETS / "points")
    for name, numbers in (("points", range(512)), ("points_heldout", range(512, 576))):
        lines = [f"{('clear', 'vague')[number % 2]} point {number}\n" for number in numbers]
        (ASSETS / f"prompts/{name}.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    from worlds import points as module  # model_index.json names the module of its classes

    module.build()
