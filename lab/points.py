"""Train hundreds of runs at once in worlds of points, in which a method's premise can be varied.

A run is a seed and a learning rate. Each seed has its own world, weights, prompts and noise. These
are the same for every method and rate, so runs of two methods are paired. The equations are those
of the project: `sde` samples and re-scores, `loss` and `groups` make the loss, and the scripts' own
functions make the advantages. With one run, `train` equals the scripts' main() with --model points
up to rounding (tests/test_dials.py).

Shapes: S seeds, R rates, E = R * S runs; P prompts, G samples of each, B = P * G rows; T denoising
steps; D dimensions of a point; n held-out prompts.
"""

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import torch
from torch.func import vmap

from common import groups, loss, sde
from worlds import points
from worlds.points import nearness

HELD_OUT = 64  # number of held-out prompts
BETAS, ADAM_EPS = (0.9, 0.999), 1e-8  # torch's defaults


@dataclass(frozen=True)
class Setting:
    """Hold the settings of a run. A setting that is a flag of the scripts has the flag's name."""

    steps: int = 80
    prompts_per_step: int = 8
    group_size: int = 8
    sampling_steps: int = 6
    sde: str = "flow"
    noise_level: float = 0.7
    same_noise: bool = False
    timestep_fraction: float = 0.6
    best_of: int = 0
    minibatches: int = 2
    clip_range: float = 0.05
    kl_coef: float = 0.0
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    dimensions: int = points.D
    hidden: int = points.HIDDEN


# --- Worlds. score: points [R, S, P, G, D] -> {reward: [R, S, P, G]}; "truth" is the outcome ---


class Judge:
    """Score points as a judge that cannot tell the samples of some prompts apart.

    The truth is how near a point is to its prompt's target, 0 to 1. The judge's score is tell *
    truth + (1 - tell) * unsure + error on a share `vague` of the prompts, and truth + error on the
    others.

    noise: size of the error, which is `noise` times a random number. That number is standard normal
    (kind "chance"), or the sample's offset in one direction that is the same for all prompts (kind
    "style"), in standard deviations of the base model and between -3 and 3. noise_vague: the size
    on vague prompts, `noise` by default. noise_bad: added to the size in proportion to 1 - truth.
    second: distance of a second right answer from the target, a root mean square over the
    dimensions, 0 for none. It counts for the truth, but the judge does not know it.
    """

    rewards = ("judge",)
    trained = "judge"  # the reward that methods with one reward train on

    def __init__(
        self, bank, seeds, dimensions=points.D, *, vague=0.5, tell=0.1, unsure=0.45, noise=0.1,
        noise_vague=None, noise_bad=0.0, kind="chance", second=0.0,
    ):  # fmt: skip
        self.bank, self.seeds = bank, seeds
        self.world = points.worlds(bank, seeds, dimensions)
        self.vague, self.tell, self.unsure, self.kind = vague, tell, unsure, kind
        self.noise, self.noise_bad = noise, noise_bad
        self.noise_vague = noise if noise_vague is None else noise_vague
        self.second = second

    def prompts(self, number, generator):
        """Return `number` random prompts of each world, in the form of points.prompts_of."""
        z = torch.randn(self.seeds, number, points.C, generator=generator)
        vague = torch.rand(self.seeds, number, generator=generator) < self.vague
        return points.prompts_of(self.world, z, vague.float())

    def score(self, x, prompts, error):
        """Return {"judge" and "truth": [..., S, P, G]} of points x [..., S, P, G, D].

        error [S, P, G]: standard normal numbers, or 0 for scores without chance errors.
        """
        off = x - prompts.target[:, :, None]
        near = nearness(off)
        truth = near
        if self.second:
            other = self.second * off.shape[-1] ** 0.5 * self.world.style
            truth = torch.maximum(near, nearness(off - other))
        if self.kind == "style":
            along = ((x - prompts.mean[:, :, None]) * self.world.style).sum(-1)
            error = 3 * torch.tanh(along / points.SPREAD**0.5 / 3)
        vague = prompts.vague[..., None]
        told = 1 - vague * (1 - self.tell)
        size = self.noise + vague * (self.noise_vague - self.noise) + self.noise_bad * (1 - truth)
        judged = told * near + (1 - told) * self.unsure + size * error
        return {"judge": judged, "truth": truth}


class Ladder:
    """Score points in three stages from easy to hard, of which the last one is the outcome.

    The last stage is the product of the nearness in three blocks of dimensions. floor: the product
    at and below which this stage is 0, so that it is flat for the base model. conflict: standard
    deviation, in each dimension, of the offset between the target of the first two stages and that
    of the last one.
    """

    rewards = ("quality", "layout", "truth")
    trained = "truth"

    def __init__(self, bank, seeds, dimensions=points.D, *, floor=0.0, conflict=0.0):
        self.bank, self.seeds, self.floor = bank, seeds, floor
        self.world = points.worlds(bank, seeds, dimensions)
        aside = torch.randn(seeds, 1, 1, dimensions, generator=points.drawn(bank, "aside"))
        self.aside = conflict * aside
        thirds = dimensions // 8
        self.blocks = (slice(0, 3 * thirds), slice(3 * thirds, 5 * thirds), slice(5 * thirds, None))

    def prompts(self, number, generator):
        """Return `number` random prompts of each world, none of them vague."""
        z = torch.randn(self.seeds, number, points.C, generator=generator)
        return points.prompts_of(self.world, z, torch.zeros(self.seeds, number))

    def score(self, x, prompts, error):
        """Return the rewards of the stages as Judge.score does. `error` is not used."""
        off = x - prompts.target[:, :, None]
        easy, parts = off - self.aside, [nearness(off[..., block]) for block in self.blocks]
        quality, middle = (nearness(easy[..., block]) for block in self.blocks[:2])
        whole = parts[0] * parts[1] * parts[2]
        truth = ((whole - self.floor) / (1 - self.floor)).clamp(min=0)
        return {"quality": quality, "layout": (quality + middle) / 2, "truth": truth}


# --- Training ---


@dataclass
class Known:
    """Hold what a method may use in addition to the rewards of a step."""

    world: object
    setting: Setting
    rates: int
    """Number of rates R."""
    scale: torch.Tensor
    """Standard deviation of the trained reward in a group of the base model, [E, 1, 1]."""
    start: torch.Tensor
    """Mean of the trained reward for the base model, [E, 1, 1]."""
    prompts: SimpleNamespace = None
    """The prompts of the step, [S, P, ...]."""
    step: int = 0
    reward: torch.Tensor = None
    """The trained reward of the step, [E, P, G]; a method that mixes rewards replaces it."""
    observe: object = None
    """None, or a function that the method sets. It is called after each update with the update's
    rows [E, P, G] bool and its mean KL [E]."""
    memory: dict = field(default_factory=dict)
    """State that the method keeps from step to step."""

    def again(self, values):
        """Repeat values of S seeds for every rate: [S, ...] -> [E, ...]."""
        return values.repeat(self.rates, *[1] * (values.ndim - 1))

    def base_reward(self):
        """Return the mean reward of a group of base samples for each prompt, [E, P]."""
        rewards = base_rewards(self.world, self.prompts, self.setting.group_size, self.step)
        return self.again(rewards.mean(2))


def base_rewards(world, prompts, number, *key):
    """Return the trained reward of `number` base samples of each prompt, [S, P, number].

    key: seeds the samples, together with the world's bank.
    """
    g = points.drawn(world.bank, *key, "prior")
    mean = prompts.mean[:, :, None].expand(-1, -1, number, -1)
    x = mean + points.SPREAD**0.5 * torch.randn(mean.shape, generator=g)
    error = torch.randn(x.shape[:-1], generator=g)
    return world.score(x, prompts, error)[world.trained]


class AdamW:
    """Update E runs with AdamW, each with its own learning rate and clipped by its own norm."""

    def __init__(self, weights, rates, setting):
        self.weights, self.rates, self.setting = weights, rates[:, None, None], setting
        self.first = [torch.zeros_like(weight) for weight in weights]
        self.second = [torch.zeros_like(weight) for weight in weights]
        self.updates = torch.zeros_like(self.rates)

    @torch.no_grad()
    def step(self, gradients, learning):
        """Update the runs that are learning [E]; return the norms of the gradients [E]."""
        norm = sum(gradient.square().sum((1, 2)) for gradient in gradients).sqrt()
        scale = (self.setting.max_grad_norm / (norm + 1e-6)).clamp(max=1)[:, None, None]
        learning = learning[:, None, None].float()  # the others keep weights and moments
        self.updates += learning
        counted = self.updates.clamp(min=1)
        state = zip(self.weights, gradients, self.first, self.second)
        for weight, gradient, first, second in state:
            gradient = gradient * scale
            first += learning * (1 - BETAS[0]) * (gradient - first)
            second += learning * (1 - BETAS[1]) * (gradient.square() - second)
            deviation = (second / (1 - BETAS[1] ** counted)).sqrt() + ADAM_EPS
            move = first / (1 - BETAS[0] ** counted) / deviation
            weight -= learning * self.rates * (self.setting.weight_decay * weight + move)
        return norm


def next_of(noise, shape):
    """Return the next prepared noise tensor. The shape that sde.rollout passes is not used."""
    return next(noise)


def draws(world, setting, step, chance):
    """Return the random draws of a step, which are the same for every method and rate.

    These are the prompts; T + 1 tensors of noise [S, B, D]; the judge's errors [S, P, G]; and the
    generator that chooses denoising steps. chance: a number; another one gives other draws.
    """
    g = points.drawn(world.bank, step, *([chance] if chance else []))
    prompts = world.prompts(setting.prompts_per_step, g)
    P, G = setting.prompts_per_step, setting.group_size
    shape = (setting.sampling_steps + 1, world.seeds, P * G, setting.dimensions)
    noise = torch.randn(shape, generator=g)
    error = torch.randn(world.seeds, P, G, generator=g)
    return prompts, noise, error, points.drawn(0, step, "steps")


def train(world, method, rates, setting=Setting(), chance=0, draws=draws, watch=None):  # noqa: B008
    """Train S seeds with each of R learning rates; return {reward: [R, S, 2]}, before and after.

    The returned rewards are means over noise-free samples of held-out prompts, without the judge's
    chance errors.

    method: ({reward: [E, P, G]}, Known) -> advantages [[E, P, G]], one for each clipped surrogate.
    chance: as of `draws`. watch: a list to which every step appends (rewards, norms of the
    gradients [E], Known).
    """
    P, G, S, R = setting.prompts_per_step, setting.group_size, world.seeds, len(rates)
    E, B, T, D = R * S, P * G, setting.sampling_steps, setting.dimensions
    g = points.drawn(world.bank, "held out")
    held_out = world.prompts(HELD_OUT, g)
    start = torch.randn(S, HELD_OUT, D, generator=g)
    rewards = base_rewards(world, held_out, G, "scale")  # [S, n, G]
    scale, mean = rewards.std(2, unbiased=False).mean(1), rewards.mean((1, 2))
    known = Known(world, setting, R, *(v.repeat(R)[:, None, None] for v in (scale, mean)))
    inputs = held_out.z.shape[-1]
    first = points.initial_weights(world.bank, S, inputs, D, setting.hidden)
    weights = [known.again(weight).requires_grad_() for weight in first]
    optimizer = AdamW(weights, torch.tensor(rates).repeat_interleave(S), setting)
    sigmas = sde.shifted_sigmas(T, 1.0)
    s = sde.diffusion_coefficients(sigmas, setting.noise_level, setting.sde)
    transition = sde.TRANSITIONS[setting.sde]

    def field_of(z, mean, weights=weights):
        """Return the function (x [E * n, D], sigma) -> velocity for z and mean [E, n, ...]."""

        def flat(x, sigma):
            return points.velocity(x.view(mean.shape), sigma, z, mean, weights).flatten(0, 1)

        return flat

    def score(x, prompts, error):
        found = world.score(x.view(R, S, *x.shape[1:]), prompts, error)
        return {name: values.flatten(0, 1) for name, values in found.items()}

    @torch.no_grad()
    def evaluate():
        flat = field_of(known.again(held_out.z), known.again(held_out.mean))
        x = known.again(start).flatten(0, 1)
        latents, _ = sde.rollout(flat, x, sigmas, torch.zeros(T), None)
        scores = score(latents[:, -1].view(E, HELD_OUT, 1, D), held_out, torch.zeros(()))
        return {name: values.mean((1, 2)).view(R, S) for name, values in scores.items()}

    before = evaluate()
    for step in range(setting.steps):
        prompts, noise, error, generator = draws(world, setting, step, chance)
        known.step, known.prompts = step, prompts
        z = known.again(prompts.z).repeat_interleave(G, 1)  # [E, B, C + 1]
        mean = known.again(prompts.mean).repeat_interleave(G, 1)  # [E, B, D]

        # --- Rollout, reward, advantage ---
        if setting.same_noise:
            noise = torch.cat([noise[:1, :, ::G].repeat_interleave(G, 2), noise[1:]])
        x, *later = (known.again(part).flatten(0, 1) for part in noise)
        more = iter(later)
        with torch.no_grad():
            flat = field_of(z, mean)
            latents, log_probs = sde.rollout(flat, x, sigmas, s, partial(next_of, more), transition)
            rewards = score(latents[:, -1].view(E, P, G, D), prompts, error)
            known.reward = rewards[world.trained]
            terms = method(rewards, known)
        latents, log_probs = latents.view(E, B, T + 1, D), log_probs.view(E, B, T)
        kept = groups.keep_rows(known.reward.flatten(0, 1), setting.best_of)  # [E * P, G]
        advantages = [term.flatten(1) for term in terms]  # [E, B] each

        # --- Update ---
        norm = torch.zeros(E)
        for minibatch in groups.split_rows(kept, setting.minibatches):
            trained = sde.noisy_steps(s, setting.timestep_fraction, generator)
            share = vmap(groups.row_weights)(minibatch.view(E, P, G)).flatten(1)  # [E, B]
            # Runs differ in their number of rows if some are masked. Shorter runs are filled up
            # with other rows, which have share 0.
            most = int(minibatch.view(E, B).sum(1).max())
            if not most:
                continue
            index = minibatch.view(E, B).byte().argsort(dim=1, descending=True, stable=True)
            rows = torch.arange(E)[:, None], index[:, :most]
            latents_mb, log_probs_mb = latents[rows], log_probs[rows]
            some = field_of(z[rows], mean[rows])
            base = field_of(z[rows], mean[rows], weights=None)
            means = {}  # {t: [E * rows, D]} before the update
            total = 0
            for t in trained:
                x, x_next = (latents_mb[:, :, t + i].flatten(0, 1) for i in (0, 1))
                velocity = some(x, sigmas[t])
                _, log_prob, means[t] = transition(
                    velocity, x, sigmas[t], sigmas[t + 1], s[t], x_next=x_next
                )
                ratio = torch.exp(log_prob - log_probs_mb[:, :, t].flatten())
                row_loss = sum(
                    loss.clipped_surrogate(ratio, term[rows].flatten(), setting.clip_range)
                    for term in advantages
                )
                if setting.kl_coef:
                    _, _, reference = transition(
                        base(x, sigmas[t]), x, sigmas[t], sigmas[t + 1], s[t]
                    )
                    std = sde.transition_std(sigmas[t], sigmas[t + 1], s[t])
                    row_loss = row_loss + setting.kl_coef * loss.gaussian_kl(
                        means[t], reference, std
                    )
                total = total + (share[rows].flatten() * row_loss).sum() / len(trained)
            gradients = torch.autograd.grad(total, weights)
            learning = (minibatch.view(E, B) & advantages[0].bool()).any(1)
            if setting.kl_coef:
                learning = minibatch.view(E, B).any(1)
            norm = optimizer.step(gradients, learning)
            if known.observe:  # the KL of the update, from the means before and after it
                real = minibatch.view(E, B)[rows]  # [E, rows]
                kls = []
                for t in trained:
                    x = latents_mb[:, :, t].flatten(0, 1)
                    with torch.no_grad():
                        _, _, after = transition(
                            some(x, sigmas[t]), x, sigmas[t], sigmas[t + 1], s[t]
                        )
                    std = sde.transition_std(sigmas[t], sigmas[t + 1], s[t])
                    kl = loss.gaussian_kl(after, means[t].detach(), std).view(E, -1)
                    kls.append((kl * real).sum(1) / real.sum(1).clamp(min=1))
                known.observe(minibatch.view(E, P, G), torch.stack(kls).mean(0))
        if watch is not None:
            watch.append((rewards, norm, known))
    last = evaluate()
    return {name: torch.stack([before[name], last[name]], -1) for name in before}
