"""Sigmas, noise schedules, the stochastic transitions, and the rollout. Needs torch alone.

Rectified flow: x_sigma = (1 - sigma) * x0 + sigma * eps, velocity v = eps - x0, sigma from 1
(noise) to 0 (data).

DanceGRPO (arXiv 2505.07818) and Flow-GRPO (2505.05470) turn the sampler's ODE into an SDE with the
same marginals, so that each denoising step is a Gaussian policy with an exact log-probability. They
are one formula with a different diffusion coefficient s:

    mean   = x + (v + s^2 / (2 sigma) * (x + (1 - sigma) * v)) * dt,    dt = sigma_next - sigma < 0
    x_next = mean + std * z,    std = s * sqrt(-dt),    z ~ N(0, I)
    log_prob = mean over all non-batch dimensions of log N(x_next; mean, std^2)

The last line is 2605.10937 eq 3-4.

That mean is (1 - sigma_next) x0_hat + c eps_hat with c = sigma_next - std^2 / (2 sigma), exact for
small steps. DDIM (2010.02502 eq 12, as a policy in DDPO 2305.13301) has c = sqrt(sigma_next^2 -
std^2), exact for steps of any size, and a different std. It is the third schedule. Its transition
is `ddim_step`, with the same arguments and results as `sde_step`. Coefficients-preserving sampling
(CPS, 2509.05952) is that transition with a std of its own, the fourth schedule.

One name, one quantity: `s` is the coefficient of the SDE, `std` the standard deviation of the
transition. Shapes: B rows, T denoising steps, `...` the latent's own dimensions."""

import math
from collections.abc import Callable, Iterable

import torch

SCHEDULES = ("dance", "flow", "ddim", "cps")
Scalars = float | torch.Tensor  # a scalar, or one for each row [B]


def shifted_sigmas(steps: int, shift: float) -> torch.Tensor:
    """Return T+1 sigmas, float32, from 1 to 0.

    They are shift * u / (1 + (shift - 1) * u) for u = linspace(1, 0, T+1). A larger shift spends
    more steps at high noise. Do not pass them to a scheduler that shifts them again.
    """
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def diffusion_coefficients(
    sigmas: torch.Tensor, eta: float, schedule: str, window: tuple[int, int] | None = None
) -> torch.Tensor:
    """Return the coefficient s [T] of each step, for sigmas [T+1] and a schedule:

    dance: s = eta (2505.07818).
    flow:  s = eta * sqrt(sigma / (1 - sigma)) (2505.05470). It has a pole at sigma = 1 (some
           schedulers start at 0.999999). There the denominator takes the next sigma, so that the
           std of the step is eta.
    ddim:  s such that std = s sqrt(-dt) is DDIM's. For the variance-preserving z = x / h that is
           eta sqrt((1 - a'^2) / (1 - a^2) (1 - a^2 / a'^2)), with h = hypot(1 - sigma, sigma) and
           a = (1 - sigma) / h; a' and h' are their values at sigma_next.
    cps:   s such that std = sigma_next sin(eta pi / 2) (2509.05952).

    The last step is always an ODE step (s = 0) and ends at x0_hat. It is never trained, because its
    log-probability has no finite limit. window = (start, length): add noise in these steps only;
    all others become ODE steps. Raises ValueError for an unknown schedule.
    """
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    if schedule == "dance":
        s = torch.full_like(sigma, eta)
    elif schedule == "flow":
        away_from_pole = torch.where(sigma > 1 - 1e-4, sigma_next, sigma)
        s = eta * (sigma / (1 - away_from_pole)).sqrt()
    elif schedule == "ddim":
        sigma, sigma_next = sigma.double(), sigma_next.double()
        h, h_next = torch.hypot(1 - sigma, sigma), torch.hypot(1 - sigma_next, sigma_next)
        signal, signal_next = ((1 - sigma) / h) ** 2, ((1 - sigma_next) / h_next) ** 2
        variance = (1 - signal_next) / (1 - signal) * (1 - signal / signal_next)
        s = (eta * h_next * (variance / (sigma - sigma_next)).sqrt()).to(sigmas)
    elif schedule == "cps":
        std = sigma_next.double() * math.sin(eta * math.pi / 2)
        s = (std / (sigma.double() - sigma_next.double()).sqrt()).to(sigmas)
    else:
        raise ValueError(
            f"unknown noise schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}"
        )
    s[-1] = 0
    if window is not None:
        start, length = window
        outside = torch.ones_like(s, dtype=torch.bool)
        outside[start : start + length] = False
        s[outside] = 0
    return s


def random_window(steps: int, length: int, generator: torch.Generator) -> tuple[int, int]:
    """Return (start, length) of a random window of steps within the first `steps` steps.

    Length 0 returns (0, steps): all of them.
    """
    return (
        (torch.randint(steps - length + 1, (), generator=generator).item(), length)
        if length
        else (0, steps)
    )


def noisy_steps(s: torch.Tensor, fraction: float, generator: torch.Generator) -> list[int]:
    """Return the sorted indices of a random `fraction` of the steps with noise.

    s [T]: the coefficients, 0 for a step without noise. The number is rounded, and at least one.
    """
    noisy = s.nonzero().flatten()
    number = max(1, round(fraction * len(noisy)))
    return sorted(noisy[torch.randperm(len(noisy), generator=generator)[:number]].tolist())


def sde_step(
    velocity: torch.Tensor,
    x: torch.Tensor,
    sigma: Scalars,
    sigma_next: Scalars,
    s: Scalars,
    *,
    noise: torch.Tensor | None = None,
    x_next: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x_next [B, ...], log_prob [B] and mean [B, ...] of one transition of the SDE.

    Give `noise` to sample, or `x_next` to re-score a stored sample. Both use the same arithmetic,
    so their ratio is exactly 1 for the same velocity. With s = 0 this is the Euler step of the ODE,
    and log_prob is 0.

    velocity, x, noise, x_next: [B, ...] float; sigma, sigma_next, s: scalars or [B].
    """
    assert noise is None or x_next is None, "give noise to sample or x_next to re-score, not both"
    sigma, sigma_next, s = (_per_row(value, x) for value in (sigma, sigma_next, s))
    dt = sigma_next - sigma
    mean = x + (velocity + s**2 / (2 * sigma) * (x + (1 - sigma) * velocity)) * dt
    return _draw_or_score(mean, transition_std(sigma, sigma_next, s), noise, x_next)


def ddim_step(
    velocity: torch.Tensor,
    x: torch.Tensor,
    sigma: Scalars,
    sigma_next: Scalars,
    s: Scalars,
    *,
    noise: torch.Tensor | None = None,
    x_next: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `sde_step` returns, for the transition of DDIM (2010.02502 eq 12) and CPS."""
    assert noise is None or x_next is None, "give noise to sample or x_next to re-score, not both"
    sigma, sigma_next, s = (_per_row(value, x) for value in (sigma, sigma_next, s))
    std = transition_std(sigma, sigma_next, s)
    x0, eps = x - sigma * velocity, x + (1 - sigma) * velocity
    # at eta = 1 and sigma = 1 the difference is 0, up to rounding
    mean = (1 - sigma_next) * x0 + (sigma_next**2 - std**2).clamp(min=0).sqrt() * eps
    return _draw_or_score(mean, std, noise, x_next)


TRANSITIONS = {"dance": sde_step, "flow": sde_step, "ddim": ddim_step, "cps": ddim_step}


def _draw_or_score(
    mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor | None, x_next: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x_next is None:
        x_next = mean if noise is None else mean + std * noise
    return x_next, gaussian_log_prob(x_next, mean, std), mean


def transition_std(sigma: Scalars, sigma_next: Scalars, s: Scalars) -> Scalars:
    """Return the standard deviation of the transition, s * sqrt(-dt)."""
    return s * (sigma - sigma_next) ** 0.5


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return log N(x; mean, std^2) averaged over the non-batch dimensions: [B, ...] -> [B].

    Rows with std 0 get 0. The average instead of the sum makes a clip range of 1e-4 meaningful for
    latents of any size.
    """
    safe = torch.where(std > 0, std, 1.0)
    log_prob = -((x - mean) ** 2) / (2 * safe**2) - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(std > 0, log_prob, 0.0).flatten(1).mean(1)


def _per_row(value: Scalars, x: torch.Tensor) -> torch.Tensor:
    """Return a scalar or [B] as a tensor that broadcasts against x [B, ...]."""
    if not isinstance(value, torch.Tensor) or (value.ndim == 0 and value.device != x.device):
        # filled in on x's device: a copy from the CPU would wait for a GPU to finish
        value = torch.full((), float(value), dtype=x.dtype, device=x.device)
    value = value.to(x)
    assert value.ndim == 0 or value.shape == x.shape[:1], (
        f"expected a scalar or [{len(x)}], got {tuple(value.shape)}"
    )
    return value.reshape(-1, *[1] * (x.ndim - 1))


class RowNoise:
    """Draw standard normal noise with a separate random stream for each row.

    A stream depends on (seed, step, row) and on nothing else. So a row gets the same noise on one
    process and on many, and a resumed run repeats it. Drawing happens on the CPU, whose generator
    gives the same numbers on every machine. A GPU does not wait for it: the rows are drawn into
    pinned memory and copied behind the work that the GPU has been given.
    """

    def __init__(
        self, seed: int, step: int, rows: Iterable[int], device: torch.device | str = "cpu"
    ) -> None:
        # CPU generators use the low 32 bits of a seed. Odd multipliers: different rows of a step
        # never share a stream.
        keys = [
            (seed * 0x9E3779B1 + step * 0x85EBCA77 + int(row) * 0xC2B2AE3D) & 0xFFFFFFFF
            for row in rows
        ]
        self.generators = [torch.Generator().manual_seed(key) for key in keys]
        self.device = torch.device(device)

    def __call__(self, shape: Iterable[int]) -> torch.Tensor:
        """Return the next draw of every row, [B, *shape] float32."""
        pinned = self.device.type == "cuda"
        drawn = torch.empty((len(self.generators), *shape), pin_memory=pinned)
        for row, generator in zip(drawn, self.generators):
            row.normal_(generator=generator)
        return drawn.to(self.device, non_blocking=pinned)


def rollout(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    s: torch.Tensor,
    noise: Callable[[torch.Size], torch.Tensor] | None,
    transition: Callable = sde_step,
    means: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Sample a batch, and return what re-scoring needs.

    velocity: (x [B, ...], sigma) -> [B, ...]; x: standard normal noise [B, ...]; sigmas [T+1];
    s [T]; noise: shape -> [B, *shape], None if no step has noise; transition: the function of the
    schedule (TRANSITIONS); out [b, T+1, ...]: a tensor of any device that is filled with the
    latents of the first b <= B rows, instead of a new one.

    Returns latents [B, T+1, ...] float32, the last of which is x0, and log_probs [B, T]. With
    means=True it also returns the means of the transitions [B, T, ...], for a method that compares
    them with those of an update. Latents stay float32: rounding them to bf16 changes the
    log-probability by more than the clip range.
    """
    # a schedule may start below 1 (Stable Diffusion): latents at that sigma have this deviation
    x = x.float() * torch.hypot(1 - sigmas[0], sigmas[0])
    latents = x.new_empty(len(x), len(sigmas), *x.shape[1:]) if out is None else out
    latents[:, 0].copy_(x[: len(latents)], non_blocking=True)
    log_probs, kept_means = [], []
    for t in range(len(s)):
        v = velocity(x, sigmas[t])
        # drawn on the CPU while a GPU computes the velocity
        z = noise(x.shape[1:]) if s[t] > 0 else None
        x, log_prob, mean = transition(v, x, sigmas[t], sigmas[t + 1], s[t], noise=z)
        latents[:, t + 1].copy_(x[: len(latents)], non_blocking=True)
        log_probs.append(log_prob)
        if means:
            kept_means.append(mean)
    found = [latents, torch.stack(log_probs, 1)]
    if means:
        found.append(torch.stack(kept_means, 1))
    return tuple(found)
