"""common/trainer/fisher.py against the full Fisher matrix of a small network, the Hessian of
common/loss.py's KL, finite steps of a small FLUX transformer, and a grid of exponents."""

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import loss, sde
from common.trainer.fisher import gaussian_fisher_product, largest_eigenvalue, largest_exponent

SHAPES = [(4, 3), (4,), (2,), (6, 4), (6,)]  # the third is used nowhere
SIZES = [int(np.prod(shape)) for shape in SHAPES]
STDS = [0.3, torch.tensor([0.1, 0.3, 0.5, 0.2, 1.1], dtype=torch.float64)]


def unflatten(flat):
    return [part.reshape(shape) for part, shape in zip(flat.split(SIZES), SHAPES)]


def flatten(tensors):
    return torch.cat([x.flatten() for x in tensors])


def network(flat):
    """Weights [48] -> means [5, 2, 3] of five fixed rows."""
    w1, b1, _, w2, b2 = unflatten(flat)
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (torch.tanh(rows @ w1.T + b1) @ w2.T + b2).reshape(5, 2, 3)


def random_weights(seed=0):
    return torch.randn(
        sum(SIZES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def fisher_matrix(std):
    """Row by row, dimension by dimension."""
    jacobian = (
        torch.autograd.functional.jacobian(network, random_weights()).reshape(5, 6, -1).numpy()
    )
    stds = np.broadcast_to(np.asarray(std), 5)
    return np.mean([np.outer(j, j) / stds[b] ** 2 for b in range(5) for j in jacobian[b]], axis=0)


def fisher_product(std):
    weights = [w.clone().requires_grad_() for w in unflatten(random_weights())]
    mean = network(flatten(weights))
    return lambda vector: gaussian_fisher_product(mean, weights, std, vector)


@pytest.mark.parametrize("std", STDS, ids=["scalar", "per row"])
def test_product_equals_the_full_matrix(std):
    matrix, product = fisher_matrix(std), fisher_product(std)
    for seed in (1, 2):  # twice on one graph
        v = random_weights(seed)
        ours = product(unflatten(v))
        assert [x.shape for x in ours] == [torch.Size(shape) for shape in SHAPES]
        assert not any(x.requires_grad for x in ours)
        np.testing.assert_allclose(flatten(ours).numpy(), matrix @ v.numpy(), rtol=0, atol=1e-10)


def test_weights_the_mean_does_not_depend_on_get_zeros():
    used, unused = (torch.ones(3, requires_grad=True) for _ in range(2))
    mean, v = (2 * used)[None], [torch.ones(3), torch.ones(3)]
    ours = gaussian_fisher_product(mean, [used, unused], 1.0, v)
    assert torch.allclose(ours[0], torch.full((3,), 4 / 3)) and torch.equal(ours[1], torch.zeros(3))
    assert torch.equal(gaussian_fisher_product(mean, [unused], 1.0, v[1:])[0], torch.zeros(3))


def test_std_of_another_length_is_refused():
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(AssertionError, match="expected a scalar"):
        gaussian_fisher_product(w.expand(2, 3), [w], torch.ones(3), [torch.ones(3)])


@pytest.mark.parametrize("std", STDS, ids=["scalar", "per row"])
def test_matrix_is_the_hessian_of_the_average_kl(std):
    weights = random_weights()
    before, column = network(weights), torch.as_tensor(std, dtype=torch.float64).reshape(-1, 1, 1)
    hessian = torch.autograd.functional.hessian(
        lambda w: loss.gaussian_kl(network(w), before, column).mean(), weights
    )
    product = fisher_product(std)
    ours = torch.stack(
        [flatten(product(unflatten(e))) for e in torch.eye(len(weights), dtype=torch.float64)]
    )
    np.testing.assert_allclose(ours.numpy(), hessian.numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("std", STDS, ids=["scalar", "per row"])
def test_largest_eigenvalue(std):
    expected = np.linalg.eigvalsh(fisher_matrix(std)).max()
    generator = torch.Generator().manual_seed(3)
    eigenvalue, residual = largest_eigenvalue(
        fisher_product(std), unflatten(random_weights()), 200, generator
    )
    assert eigenvalue.shape == residual.shape == () and eigenvalue.dtype == torch.float64
    assert abs(eigenvalue.item() / expected - 1) < 1e-6
    assert residual.item() < 1e-6


def test_residual_bounds_the_distance_to_the_spectrum_before_convergence():
    spectrum = np.linalg.eigvalsh(fisher_matrix(0.3))
    for iterations in (1, 2, 5):
        generator = torch.Generator().manual_seed(3)
        found = largest_eigenvalue(
            fisher_product(0.3), unflatten(random_weights()), iterations, generator
        )
        eigenvalue, residual = (x.item() for x in found)
        assert residual > 1e-6  # not converged yet
        assert np.abs(spectrum - eigenvalue).min() <= residual * eigenvalue
        assert eigenvalue <= spectrum.max()


def test_eigenvalue_depends_on_the_generator_and_on_the_number_of_products_alone():
    calls = []

    def product(vector):
        calls.append(vector)
        return [torch.arange(1.0, 5.0) * vector[0]]

    def estimate(seed, global_seed):
        torch.manual_seed(global_seed)
        return largest_eigenvalue(product, [torch.empty(4)], 3, torch.Generator().manual_seed(seed))

    first, again, other = estimate(0, 0), estimate(0, 1), estimate(1, 0)
    assert len(calls) == 9
    assert all(abs(vector[0].norm() - 1) < 1e-6 for vector in calls)
    assert torch.equal(torch.stack(first), torch.stack(again)) and first[0] != other[0]


def test_matrix_of_zeros_has_eigenvalue_and_residual_zero():
    zeros = largest_eigenvalue(
        lambda v: [torch.zeros(3)], [torch.empty(3)], 3, torch.Generator().manual_seed(0)
    )
    assert [x.item() for x in zeros] == [0, 0]


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).double()


@pytest.mark.parametrize(
    "among", ["", "attn.to_", "attn.add_"], ids=["all", "attention", "text attention"]
)
def test_product_of_a_flux_transformer_equals_small_finite_steps(flux, among):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, text, pooled = randn(2, 4, 16), randn(2, 3, 32), randn(2, 32)
    sigma, sigma_next, s = (
        torch.tensor([0.9, 0.5]).double(),
        torch.tensor([0.8, 0.3]).double(),
        torch.tensor(0.3),
    )
    img_ids = torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    names, weights = zip(*[(name, w) for name, w in flux.named_parameters() if among in name])

    def mean_with(values):
        velocity = functional_call(
            flux,
            dict(zip(names, values)),
            kwargs={
                "hidden_states": x,
                "encoder_hidden_states": text,
                "pooled_projections": pooled,
                "timestep": sigma,
                "guidance": torch.full((2,), 3.5, dtype=torch.float64),
                "txt_ids": torch.zeros(3, 3),
                "img_ids": img_ids,
                "return_dict": False,
            },
        )[0]
        return sde.sde_step(velocity, x, sigma, sigma_next, s)[2]

    std = sde.transition_std(sigma, sigma_next, s)
    v = [randn(*w.shape) for w in weights]
    length = sum((part**2).sum() for part in v).sqrt()
    v = [part / length for part in v]
    with sdpa_kernel(SDPBackend.MATH):
        mean = mean_with(weights)
        product = gaussian_fisher_product(mean, weights, std, v)
    quadratic = sum((a * b).sum() for a, b in zip(v, product)).item()

    def average_kl(step):
        with torch.no_grad():
            moved = mean_with([w + step * part for w, part in zip(weights, v)])
            return loss.gaussian_kl(moved, mean, std.reshape(-1, 1, 1)).mean().item()

    # 2 / eps^2 times the KL, averaged over both signs so that the order eps is gone and eps^2
    # remains. A smaller step drowns in rounding: this transformer's rotary embedding computes in
    # float32 whatever the dtype. With this step both are below 1e-5 of the value; ten times that is
    # tolerated.
    eps = 1e-2
    finite = (average_kl(eps) + average_kl(-eps)) / eps**2
    assert quadratic > 0
    assert abs(finite / quadratic - 1) < 1e-4


@pytest.mark.parametrize("low, high", [(0.05, 0.95), (1.05, 2.0), (0.0, 2.0), (0.2, 1.3)])
def test_exponent_equals_a_fine_grid(low, high):
    rng, gamma_max = np.random.default_rng(0), 3.0
    grid = np.linspace(0, gamma_max, 4001)
    found = []
    for _ in range(4):
        deviation = rng.uniform(low, high, (4, 6)) * rng.choice([-1, 1], (4, 6))
        moments = (np.abs(deviation).reshape(1, -1) ** (2 * (1 + grid[:, None]))).mean(1)
        for bound in np.linspace(moments.min() * 0.9, moments.max() * 1.1, 9):
            ours = largest_exponent(torch.as_tensor(deviation), bound, gamma_max)
            best = grid[moments <= bound].max(initial=0)
            assert best - 1e-9 <= ours <= best + grid[1]
            found.append(ours)
    assert min(found) == 0 and max(found) == gamma_max  # both ends occur


def moment(deviation, gamma):
    return (deviation.abs() ** (2 * (1 + gamma))).mean().item()


@pytest.mark.parametrize("gamma", [0.25, 1.0, 2.9])
def test_exponent_solves_the_equation_of_one_size(gamma):
    deviation = torch.tensor([1.5, -1.5], dtype=torch.float64)
    assert abs(largest_exponent(deviation, 1.5 ** (2 * (1 + gamma)), 3.0) - gamma) < 1e-12


def test_exponent_where_the_moment_falls_below_the_bound_and_rises_again():
    deviation = torch.tensor([0.3] * 9 + [1.2], dtype=torch.float64)
    bound = (moment(deviation, 0.0) + moment(deviation, 0.5)) / 2
    assert moment(deviation, 0.5) < bound < min(moment(deviation, 0.0), moment(deviation, 3.0))
    ours = largest_exponent(deviation, bound, 3.0)
    assert type(ours) is float and 0.5 < ours < 3
    assert moment(deviation, ours) <= bound < moment(deviation, ours + 1e-9)
    # gamma_max itself is allowed though 0 is not
    assert largest_exponent(deviation, bound, 0.5) == 0.5
    assert (
        largest_exponent(deviation, 0.9 * min(moment(deviation, g / 100) for g in range(300)), 3.0)
        == 0
    )


def test_exponent_of_edge_cases():
    above, below = torch.tensor([1.5, -2.0]), torch.tensor([0.5, -0.25])
    assert largest_exponent(above, 0.5, 2.0) == 0  # violated at 0 already, and rising
    assert largest_exponent(below, 1e-9, 2.0) == 0  # falling, but not far enough
    assert largest_exponent(below, 1.0, 2.0) == 2
    # an empty range
    assert largest_exponent(above, 2.0, 0.0) == largest_exponent(above, 9.0, 0.0) == 0
    assert largest_exponent(above, float("inf"), 2.0) == 2
    assert largest_exponent(above, float("nan"), 2.0) == 0
    assert largest_exponent(torch.zeros(4), 0.1, 2.0) == 2  # equal rewards allow everything
    half = torch.tensor([0.0, 1, -1, 0])  # the moment is 1/2 for every gamma
    assert largest_exponent(half, 0.4, 2.0) == 0
    assert largest_exponent(half, 0.5, 2.0) == 2
    # 2^1002 is finite, barely; 1000^1002 overflows
    assert largest_exponent(torch.tensor([0.0, 2.0]), 4.0, 500.0) == pytest.approx(0.5)
    assert largest_exponent(torch.tensor([0.0, 1e3]), 5e8, 500.0) == pytest.approx(0.5)


def test_exponent_is_computed_in_float64():
    deviation = torch.tensor([1.5, 0.7, -1.1])
    assert largest_exponent(deviation, 4.0, 3.0) == largest_exponent(deviation.double(), 4.0, 3.0)
