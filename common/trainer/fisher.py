"""How far a step in the weights moves the Gaussian policy: the Fisher matrix, its largest
eigenvalue, and the exponent of the advantages which they allow. The functions need torch alone,
TrustRegion a Runtime.

A denoising step is the policy N(mean(weights), std^2). The KL (common/loss.py) between it and
itself after a step d of the weights, averaged over the B rows and the D dimensions of the latent,
is to second order d^T F d / 2, with

    F = 1 / (B D) sum_b J_b^T J_b / std_b^2,    J_b = d mean_b / d weights                         2605.10937 eq 82, 84

F is the Hessian of that average at d = 0, exactly: the second derivative of the mean is multiplied
by a difference of means, which is 0 there. Neither F nor J is ever formed; vectors are lists of
tensors, shaped like the weights."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import sde
from common.memory import preflight

if TYPE_CHECKING:  # they load more than torch
    from common.models.family import Family
    from common.trainer.runtime import Runtime

Vector = list[torch.Tensor]  # shaped like the weights


def gaussian_fisher_product(
    mean: torch.Tensor, weights: Vector, std: torch.Tensor | float, vector: Vector
) -> Vector:
    """F v, in units of KL per weight: mean [B, ...], a differentiable function value of `weights`,
    a list of tensors; std a scalar or [B], not 0; vector: list like weights -> list like weights,
    zeros where mean does not depend on it.

    The graph of `mean` is kept, so one forward serves every product. It is differentiated twice,
    which the fused kernels of torch's scaled_dot_product_attention cannot do: compute `mean` under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`. Gradient checkpointing runs the model again
    in here: then this call belongs under it as well, and the checkpoints must be non-reentrant (the
    others lose weights silently)."""
    std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
    assert std.ndim == 0 or std.shape == mean.shape[:1], (
        f"expected a scalar or [{len(mean)}], got {tuple(std.shape)}"
    )
    # J v by reverse mode alone (not every operation has a forward mode): J^T u is linear in u, so
    # the derivative of v . J^T u in u is J v, whatever u is
    u = torch.zeros_like(mean, requires_grad=True)
    pulled = torch.autograd.grad(mean, weights, u, create_graph=True, allow_unused=True)
    inner = sum(((p * v).sum() for p, v in zip(pulled, vector) if p is not None), start=0 * u.sum())
    (pushed,) = torch.autograd.grad(inner, u)
    scaled = pushed / std.reshape(-1, *[1] * (mean.ndim - 1)) ** 2 / mean.numel()
    return list(
        torch.autograd.grad(mean, weights, scaled, retain_graph=True, materialize_grads=True)
    )


def largest_eigenvalue(
    product: Callable[[Vector], Vector], like: Vector, iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Power iteration for a symmetric positive semi-definite F: product: v -> F v, list -> list,
    called `iterations` times; like: list of tensors that gives the vectors' shapes, dtypes and
    device; generator: a CPU generator.

    Returns two 0-dim tensors: the Rayleigh quotient v . F v of the last unit vector v, and |F v -
    lambda v| / lambda. Some eigenvalue lies within that fraction of the quotient. The quotient
    never exceeds the largest eigenvalue (but for rounding), so an unconverged one is too small, and
    a limit that divides by it too generous."""
    assert iterations > 0, "the quotient needs at least one product"
    # drawn on the CPU, whose generator gives the same numbers on every machine
    vector = [torch.randn(x.shape, generator=generator).to(x) for x in like]
    for _ in range(iterations):
        # tiny: of a matrix of zeros, eigenvalue and residual are 0 instead of NaN
        length = _dot(vector, vector).sqrt()
        vector = [v / length.clamp_min(torch.finfo(length.dtype).tiny) for v in vector]
        image = product(vector)
        eigenvalue = _dot(vector, image)
        rest = [f - eigenvalue * v for f, v in zip(image, vector)]
        vector = image
    return eigenvalue, _dot(rest, rest).sqrt() / eigenvalue.clamp_min(
        torch.finfo(eigenvalue.dtype).tiny
    )


def _dot(left: Vector, right: Vector) -> torch.Tensor:
    """Inner product of two lists of tensors: 0-dim."""
    return sum((a * b).sum() for a, b in zip(left, right))


def largest_exponent(deviation: torch.Tensor, bound: float, gamma_max: float) -> float:
    """The largest gamma in [0, gamma_max] with mean |deviation|^(2 (1 + gamma)) <= bound, and 0.0
    if there is none: deviation any shape, the rewards less their mean, in the scale in which the
    power is taken; bound a float.

    2605.10937 theorem 4, with bound = 2 zeta / (step size^2 * largest eigenvalue * G_max). Its corollary 1 divides by
    2 log R_max, negative for rewards below 1, where the inequality turns round; here the theorem is solved directly.
    """
    size = deviation.detach().double().cpu().abs()

    def powers(gamma: float) -> torch.Tensor:
        return size ** (2 * (1 + gamma))

    def allowed(gamma: float) -> bool:
        return (powers(gamma).mean() <= bound).item()

    def rising(
        gamma: float,
    ) -> bool:  # the sign of the derivative in gamma; xlogy: a deviation of 0 counts 0
        return (torch.xlogy(powers(gamma), size).sum() >= 0).item()

    if allowed(gamma_max):
        return float(gamma_max)
    # The moment is convex in gamma, falling at first where deviations are below 1, so the allowed
    # gammas are an interval: "not allowed and rising" holds right of it and nowhere else. If the
    # interval is empty, the same bisection ends at the minimum (or at an end of the range), which
    # is not allowed.
    low, high = 0.0, float(gamma_max)
    for _ in range(64):
        middle = (low + high) / 2
        if rising(middle) and not allowed(middle):
            high = middle
        else:
            low = middle
    return low if allowed(low) else 0.0


class TrustRegion:
    """Chooses the exponent of the advantages, step by step, from what was measured so far
    (2605.10937, theorem 4).

    `measured`, all of it in the units of an averaged log-probability (sde.gaussian_log_prob):
        eigenvalue, residual    largest_eigenvalue of the Fisher matrix, of every `every`-th step
        gradient_max            G_max: the largest |gradient|^2 / mean advantage^2 of the steps so far; the mean squared
                                gradient of the log-probabilities is no smaller (Cauchy and Schwarz)
        step_size               tau: AdamW moves each of N weights by about its learning rate, which makes it
                                learning rate * sqrt(N) / |gradient|, of the step before
        limit                   2 zeta / (tau^2 * eigenvalue * G_max): what the moment may be
    With a model, raises InputError where its measuring does not fit into memory.
    """

    def __init__(
        self,
        run: "Runtime",
        zeta: float,
        model: "Family | None" = None,
        every: int = 10,
        iterations: int = 15,
        gamma_max: float = 1.0,
    ) -> None:
        self.run, self.zeta, self.every, self.iterations, self.gamma_max = (
            run,
            zeta,
            every,
            iterations,
            gamma_max,
        )
        self.measured = {}
        if model:
            with sdpa_kernel(SDPBackend.MATH), run.plain_modules():
                preflight.check_twice_differentiated(run, model)

    def exponent(self, deviation: torch.Tensor) -> float:
        """Deviations [P, G], in the scale in which the power is taken -> gamma; 0.0 before the
        first measurement."""
        now = self.measured
        if not now.keys() >= {"eigenvalue", "step_size"}:
            return 0.0
        now["limit"] = (
            2 * self.zeta / (now["step_size"] ** 2 * now["eigenvalue"] * now["gradient_max"])
        )
        return largest_exponent(deviation, now["limit"], self.gamma_max)

    def measure(
        self,
        step: int,
        model: "Family",
        x: torch.Tensor,
        cond: dict[str, torch.Tensor],
        at: tuple,
        advantages: torch.Tensor,
        grad_norm: float,
    ) -> None:
        """After an update with these advantages [P, G] and this norm of their gradient: latents x
        [b, ...] with their conditioning `at` a transition (sigma, sigma_next, s) that it trained
        on, this process's share."""
        weights, power = self.run.weights(), advantages.square().mean().item()
        if power and grad_norm:
            size = sum(weight.numel() for weight in weights)
            self.measured["gradient_max"] = max(
                self.measured.get("gradient_max", 0.0), float(grad_norm) ** 2 / power
            )
            self.measured["step_size"] = self.run.args.learning_rate * size**0.5 / float(grad_norm)
        if step % self.every:
            return
        with sdpa_kernel(SDPBackend.MATH), self.run.plain_modules():
            _, _, mean = sde.TRANSITIONS[self.run.args.sde](model.velocity(x, at[0], cond), x, *at)
            std = sde.transition_std(*at)

            def product(
                vector: Vector,
            ) -> Vector:  # averaged over the processes' rows: the same number on all of them
                local = gaussian_fisher_product(mean, weights, std, vector)
                return [self.run.accelerator.reduce(part, "mean") for part in local]

            generator = torch.Generator().manual_seed(step)
            found = largest_eigenvalue(product, weights, self.iterations, generator)
        self.measured |= zip(("eigenvalue", "residual"), map(float, found))

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps: the numbers measured so far."""
        return self.measured

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on with them."""
        self.measured.update({name: float(value) for name, value in state.items()})
