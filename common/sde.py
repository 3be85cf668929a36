"""Sigmas, noise schedules, the stochastic transitions, and the rollout. Needs torch alone.

Rectified flow: x_sigma = (1 - sigma) * x0 + sigma * eps, velocity v = eps - x0, sigma from 1
(noise) to 0 (data).

DanceGRPO (arXiv 2505.07818) and Flow-GRPO (2505.05470) turn the sampler's ODE into an SDE with the
same marginals, so that each denoising step is a Gaussian policy with an exact log-probability. They
are one formula with a different diffusion coefficient s:

    mean   = x + (v + s^2 / (2 sigma) * (x + (1 - sigma) * v)) * dt,    dt = sigma_next - sigma < 0
    x_next = mean + std * z,    std = s * sqrt(-dt),    z ~ N(0, I)
    log_prob = mean over all non-batch dimensions of log N(x_next; mean, std^2)               2605.10937 eq 3-4

That mean is (1 - sigma_next) x0_hat + c eps_hat with c = sigma_next - std^2 / (2 sigma), exact for
small steps. DDIM (2010.02502 eq 12, as a policy in DDPO 2305.13301) has c = sqrt(sigma_next^2 -
std^2), exact for steps of any size, and a std of its own. It is the third schedule, with
`ddim_step` in the place of `sde_step`: same arguments, same results.

One name, one quantity: `s` is the coefficient of the SDE, `std` the standard deviation of the
transition. Shapes: B rows, T denoising steps, `...` the latent's own dimensions."""

import math
from collections.abc import Callable, Iterable

import torch

SCHEDULES = ("dance", "flow", "ddim")
Scalars = float | torch.Tensor  # a scalar, or one for each row [B]


def shifted_sigmas(steps: int, shift: float) -> torch.Tensor:
    """sigmas [T+1] float32 from 1 to 0: shift * u / (1 + (shift - 1) * u) of u = linspace(1, 0,
    T+1).

    A larger shift spends more steps at high noise. Never hand these to a scheduler that shifts them
    a second time."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def diffusion_coefficients(
    sigmas: torch.Tensor, eta: float, schedule: str, window: tuple[int, int] | None = None
) -> torch.Tensor:
    """The coefficient s of each step: sigmas [T+1] -> [T].

    `dance`: s = eta (2505.07818). `flow`: s = eta * sqrt(sigma / (1 - sigma)) (2505.05470); where
    sigma is 1 (some schedulers start at 0.999999) this has a pole: the denominator alone takes the
    next sigma, so std is eta there. `ddim`: so that std = s sqrt(-dt) is DDIM's, eta sqrt((1 -
    a'^2) / (1 - a^2) (1 - a^2 / a'^2)) in the units of the variance-preserving z = x / h, where h =
    hypot(1 - sigma, sigma), a = (1 - sigma) / h; a' and h' at sigma_next. The last step is an ODE
    step (s = 0): its log-probability has no finite limit, so it is never trained and decodes to
    x0_hat. `window` = (start, length) keeps noise in those steps only and makes the others ODE
    steps."""
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
    """(start, length) of a random window within the first `steps` steps, all of them for length
    0."""
    return (
        (torch.randint(steps - length + 1, (), generator=generator).item(), length)
        if length
        else (0, steps)
    )


def noisy_steps(s: torch.Tensor, fraction: float, generator: torch.Generator) -> list[int]:
    """Indices of a random `fraction` of the steps with noise (rounded, at least one), sorted: s [T]
    -> [int]."""
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
    """One transition, to sample (give `noise`) or to re-score a stored sample (give `x_next`); same
    arithmetic, so the ratio of the two is exactly 1 for the same velocity.

    velocity, x, noise, x_next: [B, ...] float; sigma, sigma_next, s: scalars or [B].
    Returns x_next [B, ...], log_prob [B], mean [B, ...]. With s = 0 this is the Euler step of the ODE and log_prob is
    0.
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
    """The transition of DDIM, used as `sde_step` is. 2010.02502 eq 12."""
    assert noise is None or x_next is None, "give noise to sample or x_next to re-score, not both"
    sigma, sigma_next, s = (_per_row(value, x) for value in (sigma, sigma_next, s))
    std = transition_std(sigma, sigma_next, s)
    x0, eps = x - sigma * velocity, x + (1 - sigma) * velocity
    # at eta = 1 and sigma = 1 the difference is 0, up to rounding
    mean = (1 - sigma_next) * x0 + (sigma_next**2 - std**2).clamp(min=0).sqrt() * eps
    return _draw_or_score(mean, std, noise, x_next)


TRANSITIONS = {"dance": sde_step, "flow": sde_step, "ddim": ddim_step}


def _draw_or_score(
    mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor | None, x_next: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x_next is None:
        x_next = mean if noise is None else mean + std * noise
    return x_next, gaussian_log_prob(x_next, mean, std), mean


def transition_std(sigma: Scalars, sigma_next: Scalars, s: Scalars) -> Scalars:
    """Standard deviation of the transition: s * sqrt(-dt)."""
    return s * (sigma - sigma_next) ** 0.5


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """log N(x; mean, std^2), averaged over the non-batch dimensions: [B, ...] -> [B]; 0 where std
    is 0.

    The average, not the sum, is what makes a clip range of 1e-4 meaningful for latents of any size.
    """
    safe = torch.where(std > 0, std, 1.0)
    log_prob = -((x - mean) ** 2) / (2 * safe**2) - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(std > 0, log_prob, 0.0).flatten(1).mean(1)


def _per_row(value: Scalars, x: torch.Tensor) -> torch.Tensor:
    """A scalar or [B] as a tensor that broadcasts against x [B, ...]."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    assert value.ndim == 0 or value.shape == x.shape[:1], (
        f"expected a scalar or [{len(x)}], got {tuple(value.shape)}"
    )
    return value.reshape(-1, *[1] * (x.ndim - 1))


class RowNoise:
    """Standard normal noise, for each row a stream of its own that depends on (seed, step, row) and
    on nothing else.

    So one process and many draw the same noise for the same row, and a resumed run repeats it.
    Drawn on the CPU, whose generator gives the same numbers on every machine."""

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
        self.device = device

    def __call__(self, shape: Iterable[int]) -> torch.Tensor:
        """The next draw of every row: [B, *shape] float32."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(
            self.device
        )


def rollout(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    s: torch.Tensor,
    noise: Callable[[torch.Size], torch.Tensor] | None,
    transition: Callable = sde_step,
    means: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Samples a batch and keeps what re-scoring needs.

    velocity: (x [B, ...], sigma) -> [B, ...]; x: standard normal noise [B, ...]; sigmas [T+1]; s
    [T]; noise: shape -> [B, *shape], None where no step has any; transition: the function of the
    schedule (TRANSITIONS). Returns latents [B, T+1, ...] float32 (the last is x0, ready to decode)
    and log_probs [B, T]; with `means` also those of the transitions [B, T, ...] float32, for a
    method that compares them with an update's. Latents stay float32: rounding them to bf16 moves
    the log-probability by more than the clip range."""
    # where a schedule starts below 1 (Stable Diffusion), the noise stands in for latents of unit
    # variance at that sigma
    latents, log_probs, kept = [x.float() * torch.hypot(1 - sigmas[0], sigmas[0])], [], []
    for t in range(len(s)):
        x = latents[-1]
        z = noise(x.shape[1:]) if s[t] > 0 else None
        x, log_prob, mean = transition(
            velocity(x, sigmas[t]), x, sigmas[t], sigmas[t + 1], s[t], noise=z
        )
        latents.append(x)
        log_probs.append(log_prob)
        kept += [mean] * means
    return tuple(torch.stack(parts, 1) for parts in (latents, log_probs, kept) if parts)
