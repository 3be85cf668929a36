"""How far an update moves the policy, and the exponent of the advantages that this allows.

Used by slas.py --gamma auto alone. The functions need torch alone; TrustRegion needs a Policy.

A denoising step is the policy N(mean(weights), std^2). The KL (common/loss.py) between it and
itself after a step d of the weights, averaged over the B rows and the D dimensions of the latent,
is to second order d^T F d / 2, with

    F = 1 / (B D) sum_b J_b^T J_b / std_b^2,    J_b = d mean_b / d weights      2605.10937 eq 82, 84

F is the Hessian of that average at d = 0, exactly: the second derivative of the mean is multiplied
by a difference of means, which is 0 there. Neither F nor J is ever formed. Vectors are lists of
tensors, shaped like the weights.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import memory, sde
from common.errors import InputError, phase
from common.trainer import compiling
from common.trainer.policy import Policy
from common.trainer.processes import Processes

Vector = list[torch.Tensor]  # shaped like the weights


def gaussian_fisher_product(
    mean: torch.Tensor, weights: Vector, std: torch.Tensor | float, vector: Vector
) -> Vector:
    """Return F v, in units of KL per weight, a list shaped like `weights`.

    mean [B, ...]: a differentiable function value of `weights`, a list of tensors; std: a scalar or
    [B], not 0; vector: a list shaped like `weights`. Entries are zero where mean does not depend on
    a weight.

    The graph of `mean` is kept, so one forward pass serves every product. It is differentiated
    twice, which the fused kernels of torch's scaled_dot_product_attention cannot do: compute `mean`
    under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`. With gradient checkpointing the model
    runs again in here: then this call must be inside that context, too, and the checkpoints must be
    non-reentrant (the others lose weights silently).
    """
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
    """Return the largest eigenvalue of a symmetric positive semi-definite F by power iteration.

    product: v -> F v, list -> list, called `iterations` times; like: a list of tensors with the
    vectors' shapes, dtypes and device; generator: a CPU generator.

    Returns two 0-dim tensors: the Rayleigh quotient v . F v of the last unit vector v, and
    |F v - lambda v| / lambda. Some eigenvalue lies within that fraction of the quotient. The
    quotient never exceeds the largest eigenvalue (except by rounding), so one that has not
    converged is too small, and a limit that divides by it too generous.
    """
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
    """Return the inner product of two lists of tensors: 0-dim."""
    return sum((a * b).sum() for a, b in zip(left, right))


def largest_exponent(deviation: torch.Tensor, bound: float, gamma_max: float) -> float:
    """Return the largest gamma in [0, gamma_max] with mean |deviation|^(2 (1 + gamma)) <= bound.

    0.0 if there is none. deviation: any shape, rewards minus their mean, in the scale in which the
    power is taken.

    2605.10937 theorem 4, with bound = 2 zeta / (step size^2 * largest eigenvalue * G_max). Its
    corollary 1 divides by 2 log R_max, which is negative for rewards below 1, where the inequality
    turns round. Here the theorem is solved directly.
    """
    size = deviation.detach().double().cpu().abs()

    def powers(gamma: float) -> torch.Tensor:
        return size ** (2 * (1 + gamma))

    def allowed(gamma: float) -> bool:
        return (powers(gamma).mean() <= bound).item()

    def rising(gamma: float) -> bool:
        # the sign of the derivative in gamma; xlogy: a deviation of 0 counts 0
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
    """Chooses the exponent of the advantages from what was measured so far (2605.10937, theorem 4).

    measured, all in the units of an averaged log-probability (sde.gaussian_log_prob):
        eigenvalue, residual    of the Fisher matrix, by largest_eigenvalue, every `every` steps
        gradient_max            G_max: largest |gradient|^2 / mean advantage^2 so far; the mean
                                squared gradient of the log-probabilities is no smaller
        step_size               tau: AdamW moves each of N weights by about its learning rate, so
                                learning rate * sqrt(N) / |gradient| of the step before
        limit                   2 zeta / (tau^2 * eigenvalue * G_max): bound of the moment

    zeta: the KL that one update may cost; transition: of sde.TRANSITIONS.
    """

    def __init__(
        self,
        zeta: float,
        learning_rate: float,
        transition: Callable = sde.sde_step,
        every: int = 10,
        iterations: int = 15,
        gamma_max: float = 1.0,
    ) -> None:
        self.zeta = zeta
        self.learning_rate = learning_rate
        self.transition = transition
        self.every = every
        self.iterations = iterations
        self.gamma_max = gamma_max
        self.measured = {}

    def prepare(self, policy: Policy, processes: Processes, rows: int) -> None:
        """Keep what `measure` needs. Raises InputError if it does not fit into memory.

        rows: of the pass that is differentiated twice.
        """
        self.policy = policy
        self.processes = processes
        with twice_differentiable(policy):
            memory.check_twice_differentiated(
                policy.model,
                dtype=processes.dtype,
                rows=rows,
                free=memory.free_bytes(processes.device, processes.per_machine),
            )

    def exponent(self, deviation: torch.Tensor) -> float:
        """Return gamma for deviations [P, G], in the scale in which the power is taken.

        0.0 before the first measurement.
        """
        now = self.measured
        if not now.keys() >= {"eigenvalue", "step_size"}:
            return 0.0
        denominator = now["step_size"] ** 2 * now["eigenvalue"] * now["gradient_max"]
        now["limit"] = 2 * self.zeta / denominator
        return largest_exponent(deviation, now["limit"], self.gamma_max)

    def observe(self, advantages: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Update gradient_max and step_size after an update.

        advantages: any shape, of the samples that were trained on; grad_norm: of their gradient.
        """
        power, norm = advantages.square().mean().item(), float(grad_norm)
        if power and norm:
            size = sum(weight.numel() for weight in self.policy.weights)
            largest = self.measured.get("gradient_max", 0.0)
            self.measured["gradient_max"] = max(largest, norm**2 / power)
            self.measured["step_size"] = self.learning_rate * size**0.5 / norm

    def measure(
        self,
        step: int,
        x: torch.Tensor,
        cond: dict[str, torch.Tensor],
        sigma: torch.Tensor,
        sigma_next: torch.Tensor,
        s: torch.Tensor,
    ) -> None:
        """Measure the eigenvalue, every `every` steps, at a transition that was trained on.

        x [n, ...], cond: this process's latents at sigma and their conditioning.
        """
        if step % self.every:
            return
        weights = self.policy.weights
        advice = "choose a number for --gamma"
        with phase("--gamma auto", memory=advice), twice_differentiable(self.policy):
            velocity = self.policy.velocity(x, sigma, cond)
            _, _, mean = self.transition(velocity, x, sigma, sigma_next, s)
            std = sde.transition_std(sigma, sigma_next, s)

            def product(vector: Vector) -> Vector:  # averaged over the rows of all processes
                local = gaussian_fisher_product(mean, weights, std, vector)
                return [self.processes.accelerator.reduce(part, "mean") for part in local]

            generator = torch.Generator().manual_seed(step)
            found = largest_eigenvalue(product, weights, self.iterations, generator)
        self.measured["eigenvalue"], self.measured["residual"] = map(float, found)

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return self.measured

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with what a checkpoint kept."""
        self.measured.update({name: float(value) for name, value in state.items()})


@contextlib.contextmanager
def twice_differentiable(policy: Policy) -> Iterator[None]:
    """Make policy.velocity twice differentiable inside: no fused attention, no wrappers.

    Raises InputError for sharded weights, and for another --attention than native.
    """
    model = policy.model
    if policy.fsdp:
        raise InputError("--gamma auto: sharded weights are not supported. Use configs/ddp.yaml.")
    if policy.attention != "native":
        raise InputError(f"--gamma auto: --attention {policy.attention} has no second derivative.")
    wrapped = model.trainable
    unwrap = policy.processes.accelerator.unwrap_model
    model.trainable = {name: unwrap(module) for name, module in wrapped.items()}
    try:
        with sdpa_kernel(SDPBackend.MATH), compiling.off():
            yield
    finally:
        model.trainable = wrapped
