"""Train hundreds of runs at once in worlds of points, whose premises can be turned.

A run is a seed and a learning rate. Each seed has its own world, weights, prompts and noise, which
are the same for every method and rate, so runs of two methods are paired. The equations are those
of the project: `sde` samples and scores again, `loss` and `groups` make the loss, and the scripts'
own functions make the advantages. With one run, `train` equals the scripts' main() with --model
points up to rounding (tests/test_dials.py).

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

HELD_OUT = 64  # prompts that no step has
BETAS, ADAM_EPS = (0.9, 0.999), 1e-8  # torch's defaults


@dataclass(frozen=True)
class Setting:
    """The settings of a run, named as the flags of the scripts where they have one."""

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
    """A judge that cannot tell the samples of some prompts apart.

    The truth is how near a point is to its prompt's target. The judge says tell * truth + (1 -
    tell) * unsure + error on a share `vague` of the prompts, and truth + error on the others.

    error: `noise` times a standard normal number (kind "chance"), or times how far a sample lies in
    one direction, the same for all prompts (kind "style"). noise_vague: the error on vague prompts.
    noise_bad: how much larger the error of the worst samples is. second: distance of a second right
    answer from the target, which the judge does not know; 0: there is none.
    """

    rewards = ("judge",)
    trained = "judge"  # what a method with one reward is trained on

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
        """Return `number` random prompts of each world, as points.prompts_of does."""
        z = torch.randn(self.seeds, number, points.C, generator=generator)
        vague = torch.rand(self.seeds, number, generator=generator) < self.vague
        return points.prompts_of(self.world, z, vague.float())

    def score(self, x, prompts, error):
        """Return the rewards; error [S, P, G]: standard normal numbers, or 0."""
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
    """Three stages from easy to hard. The last one is the outcome, and flat for a beginner.

    It is what the product of three parts exceeds `floor` by. conflict: how far the target of the
    first two stages lies from that of the last.
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
        """Return the rewards of the stages."""
        off = x - prompts.target[:, :, None]
        easy, parts = off - self.aside, [nearness(off[..., block]) for block in self.blocks]
        quality, middle = (nearness(easy[..., block]) for block in self.blocks[:2])
        whole = parts[0] * parts[1] * parts[2]
        truth = ((whole - self.floor) / (1 - self.floor)).clamp(min=0)
        return {"quality": quality, "layout": (quality + middle) / 2, "truth": truth}


# --- Training ---


@dataclass
class Known:
    """What a method may know beside the rewards of a step."""

    world: object
    setting: Setting
    rates: int
    """Number of rates R."""
    scale: torch.Tensor
    """Spread of the trained reward within a group of the base model, [E, 1, 1]."""
    start: torch.Tensor
    """Its mean for the base model, [E, 1, 1]."""
    prompts: SimpleNamespace = None
    """Those of the step, [S, P, ...]."""
    step: int = 0
    reward: torch.Tensor = None
    """The trained reward of the step, [E, P, G]; a method that mixes rewards replaces it."""
    observe: object = None
    """A method's function of an update's rows [E, P, G] bool and of its KL [E], or None."""
    memory: dict = field(default_factory=dict)
    """What the method keeps from step to step."""

    def again(self, values):
        """Repeat values of S seeds for every rate: [S, ...] -> [E, ...]."""
        return values.repeat(self.rates, *[1] * (values.ndim - 1))

    def base_reward(self):
        """Return the mean reward of a group of the base model's samples of each prompt, [E, P]."""
        rewards = base_rewards(self.world, self.prompts, self.setting.group_size, self.step)
        return self.again(rewards.mean(2))


def base_rewards(world, prompts, number, *key):
    """Return the trained reward of `number` base samples of each prompt, [S, P, number]."""
    g = points.drawn(world.bank, *key, "prior")
    mean = prompts.mean[:, :, None].expand(-1, -1, number, -1)
    x = mean + points.SPREAD**0.5 * torch.randn(mean.shape, generator=g)
    error = torch.randn(x.shape[:-1], generator=g)
    return world.score(x, prompts, error)[world.trained]


class AdamW:
    """AdamW of E runs, each with its own rate, and each with its own largest norm of gradients."""

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
    """Return the next of prepared tensors of noise; sde.rollout asks with a shape."""
    return next(noise)


def draws(world, setting, step, chance):
    """Return what chance decides in a step, the same for every method and rate.

    These are the prompts; T + 1 tensors of noise [S, B, D]; the judge's errors [S, P, G]; and the
    generator that chooses denoising steps. chance: another number gives other draws.
    """
    g = points.drawn(world.bank, step, *([chance] if chance else []))
    prompts = world.prompts(setting.prompts_per_step, g)
    P, G = setting.prompts_per_step, setting.group_size
    shape = (setting.sampling_steps + 1, world.seeds, P * G, setting.dimensions)
    noise = torch.randn(shape, generator=g)
    error = torch.randn(world.seeds, P, G, generator=g)
    return prompts, noise, error, points.drawn(0, step, "steps")


def train(world, method, rates, setting=Setting(), chance=0, draws=draws, watch=None):  # noqa: B008
    """Train R rates times S seeds; return {reward: [R, S, 2]}, before and after.

    Rewards are those of noise-free samples of held-out prompts, without the judge's chance errors.
    method: ({reward: [E, P, G]}, Known) -> advantages [[E, P, G]], one for each clipped surrogate.
    watch: a list that gets (rewards, norms of the gradients [E], Known) of every step.
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
        """Return the velocity of flat rows x [E * n, D] for z and mean [E, n, ...]."""

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
            # runs have different rows if some are masked; the rows beside them have share 0
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
