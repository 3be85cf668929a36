"""common/loss.py against an independent float64 NumPy transcription and torch.distributions."""

import numpy as np
import pytest
import torch

from common import loss

CLIPS = [1e-4, 0.05, 0.2]


def surrogate_of(ratio, advantages, c):
    """-min(rho A, clip(rho, 1 - c, 1 + c) A), case by case."""
    out = []
    for rho, a in zip(ratio, advantages):
        clipped = 1 - c if rho < 1 - c else 1 + c if rho > 1 + c else rho
        out.append(-min(rho * a, clipped * a))
    return np.array(out)


def active_clip(rho, a, c):
    """Where the minimum is the constant: the ratio has moved far enough in the direction the
    advantage asks for."""
    return ((a > 0) & (rho > 1 + c)) | ((a < 0) & (rho < 1 - c))


def random_rows(c, count=2000):
    """Log-ratios around the clip range, so that every case occurs, and advantages of both signs and
    0."""
    rng = np.random.default_rng(0)
    log_ratio, advantages = 2 * c * rng.standard_normal(count), rng.standard_normal(count)
    advantages[:20] = 0
    return log_ratio, advantages


@pytest.mark.parametrize("c", CLIPS)
def test_surrogate_equals_the_transcription(c):
    log_ratio, advantages = random_rows(c)
    ours = loss.clipped_surrogate(
        torch.as_tensor(np.exp(log_ratio)), torch.as_tensor(advantages), c
    )
    assert ours.shape == (2000,)
    np.testing.assert_allclose(
        ours.numpy(), surrogate_of(np.exp(log_ratio), advantages, c), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("c", CLIPS)
def test_gradient_is_zero_where_actively_clipped_and_minus_a_rho_elsewhere(c):
    log_ratio, advantages = random_rows(c)
    log_prob = torch.tensor(log_ratio, requires_grad=True)
    loss.clipped_surrogate(log_prob.exp(), torch.as_tensor(advantages), c).sum().backward()
    rho = np.exp(log_ratio)
    clipped = active_clip(rho, advantages, c)
    outside_but_unclipped = ((rho > 1 + c) | (rho < 1 - c)) & ~clipped
    assert clipped.sum() > 100 and outside_but_unclipped.sum() > 100  # both cases are exercised
    np.testing.assert_array_equal(log_prob.grad.numpy()[clipped], 0)
    np.testing.assert_allclose(
        log_prob.grad.numpy(), np.where(clipped, 0, -advantages * rho), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("c", CLIPS)
def test_gradient_at_ratio_one_is_minus_the_advantage(c):
    advantages = torch.tensor([1.5, -0.7, 0.0, 5.0, -5.0])
    log_prob = torch.tensor([-1.2, 0.3, 2.0, -40.0, 0.0], requires_grad=True)
    loss.clipped_surrogate((log_prob - log_prob.detach()).exp(), advantages, c).sum().backward()
    assert torch.equal(log_prob.grad, -advantages)


@pytest.mark.parametrize("update", [0, 1, 5])
def test_the_ratio_is_exactly_one_in_the_first_update_and_as_measured_later(update):
    old = torch.tensor([-1.2, 0.3, 2.0, -40.0, 0.0])
    new = (old + torch.tensor([1e-3, -0.02, 3e-4, 0.0, 0.01])).requires_grad_()
    ratio = loss.probability_ratio(new - old, update)
    measured = np.exp((new.detach() - old).double().numpy())
    expected = np.ones(5) if update == 0 else measured
    if update == 0:
        assert torch.equal(ratio.detach(), torch.ones(5))
    np.testing.assert_allclose(ratio.detach().numpy(), expected, rtol=1e-6)
    ratio.sum().backward()  # d rho / d log_prob = rho
    np.testing.assert_allclose(new.grad.numpy(), expected, rtol=1e-6)


def test_rounding_between_rollout_and_update_clips_no_row_in_the_first_update():
    """A ratio off by 3e-4 has gradient 0 for half of the signs at a clip range of 1e-4."""
    old = torch.zeros(4)
    new = torch.tensor([3e-4, -3e-4, 3e-4, -3e-4], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    ratio = loss.probability_ratio(new - old, 0)
    loss.clipped_surrogate(ratio, advantages, 1e-4).sum().backward()
    assert torch.equal(new.grad, -advantages)
    got = loss.diagnostics(ratio, new - old, 1e-4, torch.ones(4), torch.tensor(0.0), 0)
    assert got["ratio_error"].item() == pytest.approx(3e-4, rel=1e-3)
    assert got["clip_fraction"] == got["ratio_divergence"] == 0


@pytest.mark.parametrize("shape", [(4, 1), (1,), (3,)])
def test_surrogate_refuses_shapes_that_would_broadcast(shape):
    with pytest.raises(AssertionError, match="ratio"):
        loss.clipped_surrogate(torch.ones(4), torch.ones(shape), 0.1)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 6, 6), (2, 3, 2, 4, 5)])
@pytest.mark.parametrize("per_row", [False, True])
def test_kl_equals_torch_distributions_averaged_over_dimensions(shape, per_row):
    rng = np.random.default_rng(0)
    mean, reference = torch.as_tensor(rng.standard_normal((2, *shape)))
    std = torch.as_tensor(
        rng.uniform(0.2, 2, (shape[0], *[1] * (len(shape) - 1)) if per_row else ())
    )
    normal = torch.distributions.Normal
    expected = (
        torch.distributions.kl_divergence(normal(mean, std), normal(reference, std))
        .flatten(1)
        .mean(1)
    )
    ours = loss.gaussian_kl(mean, reference, std)
    assert ours.shape == shape[:1]
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_kl_to_itself_is_exactly_zero_with_zero_gradient():
    mean = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kl = loss.gaussian_kl(mean, mean.detach().clone(), torch.tensor(0.05))
    kl.sum().backward()
    assert torch.equal(kl, torch.zeros(2)) and torch.equal(mean.grad, torch.zeros(2, 7))


# --- Diagnostics ---
RATIO = torch.tensor([1.0, 1.3, 0.6, 1.05, 3.0, 0.1], dtype=torch.float64)
WEIGHT = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0])


def test_diagnostics_leave_out_rows_without_weight():
    got = loss.diagnostics(RATIO, RATIO.log(), 0.1, WEIGHT, torch.tensor(0.5), update=0)
    rho = RATIO[:4].numpy()
    assert set(got) == {"ratio_error", "clip_fraction", "ratio_divergence", "loss", "rows"}
    assert got["rows"] == 4 and got["loss"] == 0.5
    assert got["clip_fraction"] == 2  # 1.3 and 0.6 of the four; a count, not yet a fraction
    assert got["ratio_error"].item() == pytest.approx(0.4, abs=1e-12)
    assert got["ratio_divergence"].item() == pytest.approx(sum(rho - 1 - np.log(rho)), abs=1e-12)
    alone = loss.diagnostics(
        RATIO[:4], RATIO[:4].log(), 0.1, WEIGHT[:4], torch.tensor(0.5), update=0
    )
    assert {name: value.item() for name, value in alone.items()} == {
        name: value.item() for name, value in got.items()
    }


def test_diagnostics_count_rows_not_weights():
    got = [
        loss.diagnostics(RATIO, RATIO.log(), 0.1, scale * WEIGHT, torch.tensor(0.0), update=0)
        for scale in (1.0, 1e-3)
    ]
    assert got[0] == got[1]


def test_ratio_error_is_zero_after_the_first_update_where_the_ratio_may_move():
    for update, expected in ((0, 0.4), (1, 0), (3, 0)):
        got = loss.diagnostics(RATIO, RATIO.log(), 0.1, WEIGHT, torch.tensor(0.5), update)
        assert got["ratio_error"].item() == pytest.approx(expected, abs=1e-12)


def test_diagnostics_at_ratio_one_are_exactly_zero():
    got = loss.diagnostics(
        torch.ones(3), torch.zeros(3), 1e-4, torch.ones(3), torch.tensor(0.5), update=0
    )
    assert got["ratio_error"] == got["clip_fraction"] == got["ratio_divergence"] == 0
    assert got["rows"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_divergence_is_never_negative(dtype):
    for delta in np.concatenate([-np.logspace(-6, -0.01, 200), np.logspace(-6, 1, 200)]):
        ratio = torch.tensor([1 + delta], dtype=dtype)
        got = loss.diagnostics(ratio, ratio.log(), 0.1, torch.ones(1), torch.tensor(0.0), 0)
        assert got["ratio_divergence"] >= 0


@pytest.mark.parametrize("delta", [1e-2, 1e-3, -1e-2, -1e-3])
def test_ratio_divergence_is_second_order_in_the_log_ratio(delta):
    """e^d - 1 - d = d^2/2 + d^3/6 + ..."""
    ratio = torch.tensor([delta], dtype=torch.float64).exp()
    got = loss.diagnostics(ratio, ratio.log(), 0.1, torch.ones(1), torch.tensor(0.0), 0)
    assert abs(got["ratio_divergence"].item() - delta**2 / 2) < abs(delta) ** 3 / 5


@pytest.mark.parametrize("k, D", [(4e-5, 512), (1e-3, 512), (0.05, 64)])
def test_ratio_divergence_is_no_kl(k, D):
    """With a KL of k per dimension it is k / D + k^2 / 2 to second order; -log rho has mean k."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((10_000, D))
    apart = np.sqrt(2 * k)  # of the means, in standard deviations: the KL is apart^2 / 2
    log_ratio = ((z**2 - (z - apart) ** 2) / 2).mean(1)
    rows = torch.ones(len(z), dtype=torch.float64)
    ratio = torch.as_tensor(np.exp(log_ratio))
    found = loss.diagnostics(ratio, ratio.log(), 0.1, rows, torch.tensor(0.0), 0)
    got = found["ratio_divergence"] / len(z)
    assert got.item() == pytest.approx(k / D + k**2 / 2, rel=0.06)
    error = np.sqrt(2 * k / D / len(z))
    assert -log_ratio.mean() == pytest.approx(k, abs=4 * error)


def test_the_kl_is_that_of_the_rows_that_count():
    kl = torch.tensor([0.1, 0.2, 0.3, 0.4, torch.nan, 7.0], requires_grad=True)
    got = loss.diagnostics(RATIO, RATIO.log(), 0.1, WEIGHT, torch.tensor(0.5), 0, kl)
    assert got["kl"].item() == pytest.approx(1.0) and not got["kl"].requires_grad
    other = loss.diagnostics(
        RATIO[:2], RATIO[:2].log(), 0.1, WEIGHT[:2], torch.tensor(0.5), 1, kl[:2]
    )
    assert loss.summarise([[got], [other]])["kl"] == pytest.approx(1.3 / 6)
    assert "kl" not in loss.summarise([[], []])


def test_diagnostics_keep_no_graph():
    ratio = torch.ones(3, requires_grad=True)
    got = loss.diagnostics(ratio * 1.5, ratio * 0.5, 0.1, torch.ones(3), (ratio * 2).sum(), 0)
    assert not any(value.requires_grad for value in got.values())
