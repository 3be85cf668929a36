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

    The truth is how near a point is to its prompt's target, 0 to 1. The judge's score is
    truth + error, and on a share `vague` of the prompts it is signal * truth + (1 - signal) *
    unsure + error.

    noise: size of the error, which is `noise` times a random number. That number is standard normal
    (kind "chance"), or the sample's offset in one direction that is the same for all prompts (kind
    "style"), in standard deviations of the base model and between -3 and 3. noise_vague: the size
    on vague prompts, `noise` by default. noise_bad: added to the size in proportion to 1 - truth.
    second: distance of a second right answer from the target, a root mean square over the
    dimensions, 0 for none. It counts for the truth, but the judge does not know it. prior_error:
    error of the prior that a method is given (bpgo.py --prior VALUE).
    """

    rewards = ("judge",)
    trained = "judge"  # the reward that methods with one reward train on

    def __init__(
        self, bank, seeds, dimensions=points.D, *, vague=0.5, signal=0.1, unsure=0.45, noise=0.1,
        noise_vague=None, noise_bad=0.0, kind="chance", second=0.0, prior_error=0.0,
    ):  # fmt: skip
        self.bank, self.seeds = bank, seeds
        self.world = points.worlds(bank, seeds, dimensions)
        self.vague, self.signal, self.unsure, self.kind = vague, signal, unsure, kind
        self.noise, self.noise_bad = noise, noise_bad
        self.noise_vague = noise if noise_vague is None else noise_vague
        self.second, self.prior_error = second, prior_error

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
        share = 1 - vague * (1 - self.signal)
        size = self.noise + vague * (self.noise_vague - self.noise) + self.noise_bad * (1 - truth)
        judged = share * near + (1 - share) * self.unsure + size * error
        return {"judge": judged, "truth": truth}


class Ladder:
    """Score points in three stages from easy to hard, of which the last one is the outcome.

    The last stage is the product of the nearness in three blocks of dimensions. floor: the product
    at and below which this stage is 0, so that it is flat for the base model. conflict: standard
    deviation, in each dimension, of the offset between the target of the first two stages and that
    of the last one. thresholds: {stage: tau}, as --calibrate measures them.
    """

    rewards = ("quality", "layout", "truth")
    trained = "truth"

    def __init__(self, bank, seeds, dimensions=points.D, *, floor=0.0, conflict=0.0):
        self.bank, self.seeds, self.floor, self.thresholds = bank, seeds, floor, {}
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


def again(values, rates):
    """Repeat values of S seeds for each of R rates: [S, ...] -> [E, ...]."""
    return values.repeat(rates, *[1] * (values.ndim - 1))


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
        return again(values, self.rates)

    def base_reward(self, number):
        """Return the mean reward of `number` base samples of each prompt, [E, P]."""
        rewards = base_rewards(self.world, self.prompts, number, self.step)
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


@dataclass
class Rollout:
    """Hold n rows of each run: prompts z [E, n, C + 1] and mean [E, n, D], and what was sampled.

    latents [E, n, T + 1, D]; log_probs [E, n, T].
    """

    z: torch.Tensor
    mean: torch.Tensor
    latents: torch.Tensor
    log_probs: torch.Tensor

    def rows(self, index):
        """Return some rows of each run: index [E, m] -> a Rollout of m rows."""
        at = torch.arange(len(index))[:, None], index
        return Rollout(self.z[at], self.mean[at], self.latents[at], self.log_probs[at])


class Runs:
    """Sample, score and update E runs, which differ in seed and learning rate."""

    def __init__(self, world, rates, setting):
        self.world, self.rates, self.setting = world, len(rates), setting
        seeds, dimensions = world.seeds, setting.dimensions
        g = points.drawn(world.bank, "held out")
        self.held_out = world.prompts(HELD_OUT, g)
        self.start = torch.randn(seeds, HELD_OUT, dimensions, generator=g)
        inputs = self.held_out.z.shape[-1]
        first = points.initial_weights(world.bank, seeds, inputs, dimensions, setting.hidden)
        self.weights = [again(weight, self.rates).requires_grad_() for weight in first]
        self.optimizer = AdamW(self.weights, torch.tensor(rates).repeat_interleave(seeds), setting)
        self.sigmas = sde.shifted_sigmas(setting.sampling_steps, 1.0)
        self.s = sde.diffusion_coefficients(self.sigmas, setting.noise_level, setting.sde)
        self.transition = sde.TRANSITIONS[setting.sde]

    def known(self):
        """Return what methods may use, before the first step."""
        rewards = base_rewards(self.world, self.held_out, self.setting.group_size, "scale")
        means = rewards.std(2, unbiased=False).mean(1), rewards.mean((1, 2))  # [S, n, G] -> [S]
        scale, start = (again(values, self.rates)[:, None, None] for values in means)
        return Known(self.world, self.setting, self.rates, scale, start)

    def field(self, z, mean, base=False):
        """Return the function (x [E * n, D], sigma) -> velocity of the runs, or the base model's.

        z, mean: as in Rollout.
        """
        weights = None if base else self.weights

        def velocity(x, sigma):
            return points.velocity(x.view(mean.shape), sigma, z, mean, weights).flatten(0, 1)

        return velocity

    def score(self, x, prompts, error):
        """Return {reward: [E, P, G]} of points x [E, P, G, D]; arguments as in Judge.score."""
        by_rate = x.view(self.rates, self.world.seeds, *x.shape[1:])
        found = self.world.score(by_rate, prompts, error)
        return {name: values.flatten(0, 1) for name, values in found.items()}

    @torch.no_grad()
    def evaluate(self):
        """Return {reward: [R, S]}: means over noise-free samples of held-out prompts."""
        z, mean, x = (
            again(part, self.rates) for part in (self.held_out.z, self.held_out.mean, self.start)
        )
        none = torch.zeros(self.setting.sampling_steps)
        flat = x.flatten(0, 1)
        latents, _ = sde.rollout(self.field(z, mean), flat, self.sigmas, none, None)
        scores = self.score(latents[:, -1].view(x.shape)[:, :, None], self.held_out, none[0])
        return {name: values.mean((1, 2)).view(self.rates, -1) for name, values in scores.items()}

    @torch.no_grad()
    def rollout(self, prompts, noise):
        """Sample a group for each prompt: noise [T + 1, S, B, D] -> a Rollout of B rows."""
        G = self.setting.group_size
        if self.setting.same_noise:
            noise = torch.cat([noise[:1, :, ::G].repeat_interleave(G, 2), noise[1:]])
        z, mean = (
            again(part, self.rates).repeat_interleave(G, 1) for part in (prompts.z, prompts.mean)
        )
        x, *later = (again(part, self.rates).flatten(0, 1) for part in noise)
        latents, log_probs = sde.rollout(
            self.field(z, mean), x, self.sigmas, self.s, partial(next_of, iter(later)),
            self.transition,
        )  # fmt: skip
        shape = mean.shape[:2]
        return Rollout(z, mean, latents.unflatten(0, shape), log_probs.unflatten(0, shape))

    def rescore(self, velocity, rows, t):
        """Return the log-probability [E * n] and the mean [E * n, D] of the rows' step t."""
        x, x_next = (rows.latents[:, :, t + i].flatten(0, 1) for i in (0, 1))
        sigma, sigma_next = self.sigmas[t], self.sigmas[t + 1]
        _, log_prob, mean = self.transition(
            velocity(x, sigma), x, sigma, sigma_next, self.s[t], x_next=x_next
        )
        return log_prob, mean

    def kl(self, mean, other, t):
        """Return the KL [E * n] of two transitions of step t, from their means [E * n, D]."""
        std = sde.transition_std(self.sigmas[t], self.sigmas[t + 1], self.s[t])
        return loss.gaussian_kl(mean, other, std)

    def update(self, rollout, advantages, minibatch, trained, observe=None):
        """Update the runs with a minibatch; return the norms of the gradients [E].

        advantages: [E, B] for each surrogate; minibatch [E, P, G] bool; trained: denoising steps;
        observe: as in Known.
        """
        chosen = minibatch.flatten(1)  # [E, B]
        # Runs differ in their number of rows if some are masked. Shorter runs are filled up with
        # other rows, whose share of the loss is 0.
        longest = int(chosen.sum(1).max())
        index = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
        share = vmap(groups.row_weights)(minibatch).flatten(1).gather(1, index).flatten()
        terms = [term.gather(1, index).flatten() for term in advantages]  # [E * n] each
        rows = rollout.rows(index)
        velocity = self.field(rows.z, rows.mean)
        base = self.field(rows.z, rows.mean, base=True)
        means = {}  # {t: [E * n, D]} before the update
        total = 0
        for t in trained:
            log_prob, means[t] = self.rescore(velocity, rows, t)
            ratio = torch.exp(log_prob - rows.log_probs[:, :, t].flatten())
            row_loss = sum(
                loss.clipped_surrogate(ratio, term, self.setting.clip_range) for term in terms
            )
            if self.setting.kl_coef:
                _, reference = self.rescore(base, rows, t)
                row_loss = row_loss + self.setting.kl_coef * self.kl(means[t], reference, t)
            total = total + (share * row_loss).sum() / len(trained)
        gradients = torch.autograd.grad(total, self.weights)
        learning = chosen if self.setting.kl_coef else chosen & advantages[0].bool()
        norm = self.optimizer.step(gradients, learning.any(1))
        if observe:
            real = chosen.gather(1, index)  # [E, n]
            kls = []
            for t in trained:
                with torch.no_grad():
                    _, after = self.rescore(velocity, rows, t)
                kl = self.kl(after, means[t].detach(), t).view(real.shape)
                kls.append((kl * real).sum(1) / real.sum(1).clamp(min=1))
            observe(minibatch, torch.stack(kls).mean(0))
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


def steps_of(runs, method, chance=0, draws=draws):
    """Train runs; yield (rewards, norms of the gradients [E], Known) after every step.

    method, chance: as of `train`.
    """
    world, setting, known = runs.world, runs.setting, runs.known()
    for step in range(setting.steps):
        prompts, noise, error, generator = draws(world, setting, step, chance)
        known.step, known.prompts = step, prompts

        # --- Rollout, reward, advantage ---
        rollout = runs.rollout(prompts, noise)
        x = rollout.latents[:, :, -1].unflatten(1, (-1, setting.group_size))  # [E, P, G, D]
        rewards = runs.score(x, prompts, error)
        known.reward = rewards[world.trained]
        with torch.no_grad():
            advantages = [term.flatten(1) for term in method(rewards, known)]  # [E, B] each

        # --- Update ---
        kept = groups.keep_rows(known.reward.flatten(0, 1), setting.best_of)  # [E * P, G]
        norm = torch.zeros(len(x))
        for part in groups.split_rows(kept, setting.minibatches):
            minibatch = part.view(known.reward.shape)
            trained = sde.noisy_steps(runs.s, setting.timestep_fraction, generator)
            if minibatch.any():
                norm = runs.update(rollout, advantages, minibatch, trained, known.observe)
        yield rewards, norm, known


def train(world, method, rates, setting=Setting(), chance=0, draws=draws, watch=None):  # noqa: B008
    """Train S seeds with each of R learning rates; return {reward: [R, S, 2]}, before and after.

    The returned rewards are those of Runs.evaluate, without the judge's random errors.

    method: ({reward: [E, P, G]}, Known) -> advantages [[E, P, G]], one for each clipped surrogate.
    chance: as of `draws`. watch: a list to which every step appends what `steps_of` yields.
    """
    runs = Runs(world, rates, setting)
    before = runs.evaluate()
    for row in steps_of(runs, method, chance, draws):
        if watch is not None:
            watch.append(row)
    after = runs.evaluate()
    return {name: torch.stack([before[name], after[name]], -1) for name in before}
