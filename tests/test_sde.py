"""common/sde.py against an independent float64 NumPy transcription of the published equations."""

import numpy as np
import pytest
import torch

from common import sde


# --- The transcription ---
# Rectified flow: x_sigma = (1 - sigma) x0 + sigma eps, v = eps - x0, dt = sigma_next - sigma < 0.
# x, v: [B, ...]; sigma, sigma_next, s: scalars or anything that broadcasts against x.
def slas_mean(x, v, sigma, sigma_next, s):
    """SLAS eq 3-4."""
    return x + (v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)) * (sigma_next - sigma)


def dance_mean(x, v, sigma, sigma_next, s):
    """DanceGRPO: drift against the score of the marginal, written with x0_hat."""
    dt, x0_hat = sigma_next - sigma, x - sigma * v
    score = -(x - (1 - sigma) * x0_hat) / sigma**2
    return x + v * dt - 0.5 * s**2 * score * dt


def flow_mean(x, v, sigma, sigma_next, s):
    """Flow-GRPO: collected by x and v."""
    dt = sigma_next - sigma
    return x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt


def log_prob_of(x, mean, std):
    """Mean over the non-batch dimensions of log N(x; mean, std^2)."""
    terms = -((x - mean) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))
    return terms.reshape(len(x), -1).mean(1)


def sigmas_of(steps, shift):
    return [shift * (1 - i / steps) / (1 + (shift - 1) * (1 - i / steps)) for i in range(steps + 1)]


def coefficients_of(sigmas, eta, schedule):
    """s of each step; at a first sigma of 1 flow's denominator takes the next sigma; the last step
    is an ODE step."""
    s = []
    for i in range(len(sigmas) - 1):
        safe = sigmas[i + 1] if abs(sigmas[i] - 1) < 1e-5 else sigmas[i]
        s.append(eta if schedule == "dance" else eta * (sigmas[i] / (1 - safe)) ** 0.5)
    return s[:-1] + [0.0]


# Flow-GRPO's noise as three public codes have it, each in another form: x, v [B, D], step i of
# sigmas [T+1] -> mean [B, D], std.
def flow_grpo_transition(x, v, sigmas, i, noise_level):
    sigma, sigma_max, dt = sigmas[i], sigmas[1], sigmas[i + 1] - sigmas[i]
    std_dev_t = np.sqrt(sigma / (1 - np.where(sigma == 1, sigma_max, sigma))) * noise_level
    drift_x, drift_v = (
        1 + std_dev_t**2 / (2 * sigma) * dt,
        1 + std_dev_t**2 * (1 - sigma) / (2 * sigma),
    )
    return x * drift_x + v * drift_v * dt, std_dev_t * np.sqrt(-dt)


def mix_grpo_transition(x, v, sigmas, i, eta):
    delta_t = sigmas[i] - sigmas[i + 1]
    variance = eta**2 * sigmas[i] / (1.0 - (sigmas[1] if sigmas[i] == 1 else sigmas[i]))
    score = -(x / sigmas[i] + (1 - sigmas[i]) / sigmas[i] * v)
    return x - (v - 0.5 * variance * score) * delta_t, np.sqrt(variance * delta_t)


def flow_factory_transition(x, v, sigmas, i, noise_level):
    away = sigmas[1] if sigmas[i] == 1.0 else sigmas[i]
    std = noise_level * np.sqrt(sigmas[i] * (sigmas[i] - sigmas[i + 1]) / (1 - away))
    x0, x1 = x - sigmas[i] * v, x + (1 - sigmas[i]) * v  # of this step: data and noise
    return (1 - sigmas[i + 1]) * x0 + (sigmas[i + 1] - std**2 / (2 * sigmas[i])) * x1, std


def exact_velocity(x, sigma, m, c):
    """E[eps | x] - E[x0 | x] for data N(m, c^2), where x_sigma ~ N((1 - sigma) m, (1 - sigma)^2 c^2
    + sigma^2)."""
    deviation = (x - (1 - sigma) * m) / ((1 - sigma) ** 2 * c**2 + sigma**2)
    return sigma * deviation - (m + (1 - sigma) * c**2 * deviation)


# --- The transition ---
SHAPES = [(3, 5), (2, 16, 12), (2, 4, 8, 8), (2, 3, 4, 6, 5)]
SCHEDULES = ["dance", "flow"]
ETAS = [0.05, 0.3, 1.2]


def transitions(shape, schedule, eta, per_row, steps=8, shift=3.0):
    """Random float64 (v, x, z) with every noisy (sigma, sigma_next, s), as scalars or with another
    step in each row."""
    rng = np.random.default_rng(0)
    sigmas = np.array(sigmas_of(steps, shift))
    s = np.array(coefficients_of(sigmas, eta, schedule))
    for t in range(steps - 1):
        t = (t + np.arange(shape[0])) % (steps - 1) if per_row else t
        yield *rng.standard_normal((3, *shape)), (sigmas[t], sigmas[t + 1], s[t])


def columns(transition, x):
    """Scalars, or [B] as [B, 1, ...]."""
    return [
        value.reshape(-1, *[1] * (x.ndim - 1)) if np.ndim(value) else value for value in transition
    ]


def tensors(*arrays):
    return [torch.as_tensor(array) for array in arrays]


def every_transition(test):
    for name, values in (
        ("shape", SHAPES),
        ("schedule", SCHEDULES),
        ("eta", ETAS),
        ("per_row", [False, True]),
    ):
        test = pytest.mark.parametrize(name, values, ids=str if name == "shape" else None)(test)
    return test


@every_transition
def test_mean_equals_slas_dancegrpo_and_flowgrpo_forms(shape, schedule, eta, per_row):
    for v, x, z, transition in transitions(shape, schedule, eta, per_row):
        mean = sde.sde_step(*tensors(v, x), *tensors(*transition), noise=torch.as_tensor(z))[
            2
        ].numpy()
        for form in (slas_mean, dance_mean, flow_mean):
            np.testing.assert_allclose(
                mean, form(x, v, *columns(transition, x)), rtol=0, atol=1e-10
            )


@every_transition
def test_sampled_latent_is_mean_plus_s_sqrt_dt_times_noise(shape, schedule, eta, per_row):
    for v, x, z, transition in transitions(shape, schedule, eta, per_row):
        x_next = sde.sde_step(*tensors(v, x), *tensors(*transition), noise=torch.as_tensor(z))[
            0
        ].numpy()
        sigma, sigma_next, s = columns(transition, x)
        expected = slas_mean(x, v, sigma, sigma_next, s) + s * np.sqrt(sigma - sigma_next) * z
        np.testing.assert_allclose(x_next, expected, rtol=0, atol=1e-10)


@every_transition
def test_log_prob_equals_torch_normal_and_the_transcription(shape, schedule, eta, per_row):
    for v, x, z, transition in transitions(shape, schedule, eta, per_row):
        sigma, sigma_next, s = columns(transition, x)
        mean, std = slas_mean(x, v, sigma, sigma_next, s), s * np.sqrt(sigma - sigma_next)
        x_next = mean + 1.7 * std * z
        x_next_given, log_prob, _ = sde.sde_step(
            *tensors(v, x), *tensors(*transition), x_next=torch.as_tensor(x_next)
        )
        normal = torch.distributions.Normal(torch.as_tensor(mean), torch.as_tensor(std))
        expected = normal.log_prob(torch.as_tensor(x_next)).flatten(1).mean(1).numpy()
        np.testing.assert_allclose(log_prob.numpy(), expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(
            log_prob.numpy(), log_prob_of(x_next, mean, std), rtol=0, atol=1e-10
        )
        np.testing.assert_array_equal(x_next_given.numpy(), x_next)


def test_transition_std_is_s_sqrt_dt_in_the_callers_shape():
    sigma, sigma_next, s = torch.tensor([[0.9, 0.5], [0.4, 0.1], [0.3, 1.5]], dtype=torch.float64)
    expected = [0.3 * 0.5**0.5, 1.5 * 0.4**0.5]
    np.testing.assert_allclose(
        sde.transition_std(sigma, sigma_next, s).numpy(), expected, rtol=1e-12
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rescoring_with_the_same_velocity_gives_ratio_exactly_one_in_float32(shape, schedule):
    for v, x, z, transition in transitions(shape, schedule, 0.3, False, shift=1.0):
        v, x, z = (array.float() for array in tensors(v, x, z))
        x_next, old, mean = sde.sde_step(v, x, *transition, noise=z)
        _, new, mean_again = sde.sde_step(v, x, *transition, x_next=x_next)
        assert x_next.dtype == old.dtype == torch.float32
        assert torch.equal(old, new) and torch.equal(mean, mean_again)
        assert torch.equal(torch.exp(new - old), torch.ones(shape[0]))


def test_rescoring_a_rollout_in_other_micro_batches_gives_ratio_exactly_one():
    sigmas = sde.shifted_sigmas(6, 3.0)
    s = sde.diffusion_coefficients(sigmas, 0.3, "dance")

    def velocity(x, sigma):  # elementwise: the same bits in any batch
        return torch.sin(3 * x) * sigma - x

    noise = sde.RowNoise(0, 0, range(7))
    latents, log_probs = sde.rollout(velocity, noise((16, 12)), sigmas, s, noise)
    for mb in (torch.tensor([4, 1]), torch.tensor([6]), torch.tensor([5, 0, 3, 2])):
        for t in range(5):
            x, x_next = latents[mb, t], latents[mb, t + 1]
            _, log_prob, _ = sde.sde_step(
                velocity(x, sigmas[t]), x, sigmas[t], sigmas[t + 1], s[t], x_next=x_next
            )
            assert torch.equal(log_prob, log_probs[mb, t])


def test_without_diffusion_the_step_is_euler_and_log_prob_is_zero():
    v, x, z = torch.randn(
        3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    euler = x + v * (0.4 - 0.7)
    for given in ({}, {"noise": z}, {"x_next": z}):
        x_next, log_prob, mean = sde.sde_step(v, x, 0.7, 0.4, 0.0, **given)
        assert torch.equal(mean, euler) and torch.equal(
            log_prob, torch.zeros(2, dtype=torch.float64)
        )
        assert torch.equal(x_next, given.get("x_next", euler))


def test_a_row_without_diffusion_leaves_other_rows_and_gradients_finite():
    v, x, x_next = torch.randn(
        3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    v.requires_grad_()
    _, log_prob, _ = sde.sde_step(v, x, 0.7, 0.4, torch.tensor([0.0, 0.5]), x_next=x_next)
    alone = sde.sde_step(v[1:], x[1:], 0.7, 0.4, 0.5, x_next=x_next[1:])[1]
    log_prob.sum().backward()
    assert log_prob[0] == 0 and log_prob[1] == alone[0]
    assert (
        torch.equal(v.grad[0], torch.zeros(6))
        and v.grad.isfinite().all()
        and (v.grad[1] != 0).all()
    )


def test_without_noise_or_sample_the_step_returns_its_mean():
    v, x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_next, _, mean = sde.sde_step(v, x, 0.7, 0.4, 0.5)
    assert torch.equal(x_next, mean)
    np.testing.assert_allclose(
        mean.numpy(), slas_mean(x.numpy(), v.numpy(), 0.7, 0.4, 0.5), atol=1e-10
    )


def test_noise_and_sample_together_and_wrong_row_counts_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(AssertionError, match="not both"):
        sde.sde_step(x, x, 0.7, 0.4, 0.3, noise=x, x_next=x)
    with pytest.raises(AssertionError, match=r"expected a scalar or \[2\]"):
        sde.sde_step(x, x, torch.full((3,), 0.7), 0.4, 0.3, noise=x)


def test_rounding_stored_latents_to_bf16_moves_log_prob_by_more_than_a_clip_range_of_1e_4():
    """The rounding error d has rms near 2^-8 |x| / sqrt(12), so log_prob falls by about mean(d^2) /
    (2 std^2)."""
    # DanceGRPO's first step: std = 0.3 * sqrt(0.0217) = 0.044
    sigma, sigma_next = sigmas_of(16, 3.0)[:2]
    v, x, z = torch.randn(3, 8, 1024, 16, generator=torch.Generator().manual_seed(0))
    x_next, old, _ = sde.sde_step(v, x, sigma, sigma_next, 0.3, noise=z)
    _, new, _ = sde.sde_step(v, x, sigma, sigma_next, 0.3, x_next=x_next.bfloat16().float())
    assert ((new - old).abs() > 1e-4).all() and ((new - old).abs() < 2e-3).all()
    assert (new - old).mean() < -2e-4  # a bias, not noise that averages out


# --- Sigmas and noise schedules ---
@pytest.mark.parametrize("steps,shift", [(1, 3.0), (4, 1.0), (16, 3.0), (16, 12.0), (50, 0.5)])
def test_shifted_sigmas_follow_the_formula_from_exactly_1_to_exactly_0(steps, shift):
    sigmas = sde.shifted_sigmas(steps, shift)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    np.testing.assert_allclose(sigmas.numpy(), sigmas_of(steps, shift), rtol=1e-7)


def test_shift_1_is_linspace():
    assert torch.equal(
        sde.shifted_sigmas(10, 1.0), torch.linspace(1, 0, 11, dtype=torch.float64).float()
    )


@pytest.mark.parametrize(
    "shift,boundary,high", [(3, 0.9, 5), (3, 0.875, 5), (12, 0.9, 10), (12, 0.875, 11)]
)
def test_shift_decides_how_many_of_16_steps_go_to_the_high_noise_expert(shift, boundary, high):
    """shift u / (1 + (shift - 1) u) >= b  <=>  u >= b / (shift - (shift - 1) b), u = 1 - k / 16."""
    assert (sde.shifted_sigmas(16, shift)[:-1] >= boundary).sum() == high
    assert (
        sum(1 - k / 16 >= boundary / (shift - (shift - 1) * boundary) - 1e-12 for k in range(16))
        == high
    )


def test_dance_coefficient_is_eta_until_the_last_step():
    expected = torch.tensor([0.3, 0.3, 0.3, 0.0])
    assert torch.equal(
        sde.diffusion_coefficients(sde.shifted_sigmas(4, 3.0), 0.3, "dance"), expected
    )


@pytest.mark.parametrize("first", [1.0, 0.999999])
def test_flow_coefficient_follows_the_formula_and_its_denominator_takes_the_next_sigma_at_the_pole(
    first,
):
    sigmas = [first, 0.9, 0.5, 0.2, 0.1, 0.0]
    s = sde.diffusion_coefficients(torch.tensor(sigmas), 0.7, "flow")
    np.testing.assert_allclose(s.numpy(), [0.7 * 10**0.5, 0.7 * 3, 0.7, 0.7 * 0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(s.numpy(), coefficients_of(sigmas, 0.7, "flow"), rtol=1e-6)
    assert sde.transition_std(first, 0.9, s[0]).item() == pytest.approx(0.7, abs=1e-5)


@pytest.mark.parametrize("steps, shift", [(8, 1.0), (6, 3.0), (16, 5.0)])
@pytest.mark.parametrize(
    "theirs", [flow_grpo_transition, mix_grpo_transition, flow_factory_transition]
)
def test_flow_transitions_are_those_of_three_public_codes_from_the_first_step_on(
    theirs, steps, shift
):
    sigmas = np.array(sigmas_of(steps, shift))
    s = sde.diffusion_coefficients(torch.as_tensor(sigmas), 0.7, "flow")
    x, v = np.random.default_rng(steps).standard_normal((2, 3, 7))
    for i in range(steps - 1):
        at = sigmas[i], sigmas[i + 1], s[i]
        mean, std = theirs(x, v, sigmas, i, 0.7)
        np.testing.assert_allclose(
            sde.sde_step(*tensors(v, x), *at)[2].numpy(), mean, rtol=0, atol=1e-12
        )
        np.testing.assert_allclose(sde.transition_std(*at).numpy(), std, rtol=1e-12)


def test_flow_coefficient_just_below_the_pole_is_left_alone():
    s = sde.diffusion_coefficients(torch.tensor([0.99, 0.5, 0.0]), 1.0, "flow")
    np.testing.assert_allclose(s.numpy(), [99**0.5, 0], rtol=1e-4)  # rtol: 1 - 0.99 in float32


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_window_keeps_its_own_steps_and_zeroes_the_rest_without_touching_its_input(schedule):
    sigmas = sde.shifted_sigmas(8, 3.0)
    before = sigmas.clone()
    full = sde.diffusion_coefficients(sigmas, 0.3, schedule)
    windowed = sde.diffusion_coefficients(sigmas, 0.3, schedule, window=(2, 3))
    assert (
        torch.equal(windowed[2:5], full[2:5])
        and windowed[:2].sum() == 0
        and windowed[5:].sum() == 0
    )
    assert sde.diffusion_coefficients(sigmas, 0.3, schedule, window=(6, 2))[-1] == 0
    assert torch.equal(sigmas, before)


def test_unknown_schedule_is_refused_by_name():
    with pytest.raises(ValueError, match="'cosine'.*dance, flow"):
        sde.diffusion_coefficients(sde.shifted_sigmas(4, 1.0), 0.3, "cosine")


@pytest.mark.parametrize("length", [1, 3, 7])
def test_random_window_covers_every_position_within_its_steps(length):
    generator = torch.Generator().manual_seed(0)
    windows = [sde.random_window(7, length, generator) for _ in range(400)]
    assert {kept for _, kept in windows} == {length}
    # the last start ends at step 6 of 0..6
    assert {start for start, _ in windows} == set(range(8 - length))
    assert sde.random_window(7, 0, generator) == (0, 7)


@pytest.mark.parametrize("fraction,number", [(1.0, 4), (0.5, 2), (0.6, 2), (0.75, 3), (0.01, 1)])
def test_noisy_steps_picks_the_right_number_of_noisy_steps_in_order(fraction, number):
    s = torch.tensor([0.0, 0.3, 0.3, 0.0, 0.3, 0.3, 0.0])
    generator = torch.Generator().manual_seed(0)
    draws = [sde.noisy_steps(s, fraction, generator) for _ in range(200)]
    assert all(len(draw) == number and draw == sorted(set(draw)) for draw in draws)
    assert {t for draw in draws for t in draw} == {1, 2, 4, 5}


def test_noisy_steps_depends_on_its_generator_alone():
    s = torch.full((16,), 0.3)

    def draw(seed):
        return sde.noisy_steps(s, 0.6, torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first = draw(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert draw(1) == first and any(draw(seed) != first for seed in range(2, 6))


# --- Noise ---
def test_a_rows_noise_does_not_depend_on_the_other_rows_or_their_order():
    full = sde.RowNoise(3, 5, range(8))((4, 6))
    for rows in ([0, 1, 2, 3], [7, 2, 4], [5], torch.tensor([6, 0, 3])):
        part = sde.RowNoise(3, 5, rows)((4, 6))
        assert part.dtype == torch.float32 and torch.equal(part, full[torch.as_tensor(rows)])


@pytest.mark.parametrize("shape", [(2025, 64), (4, 3, 5, 7), (17,), (1,)])
def test_a_rows_noise_is_what_torch_draws_from_its_generator(shape):
    """Sizes below and above 16, from which torch draws in blocks, and multiples of it or not."""
    rows = sde.RowNoise(3, 5, [2, 9])
    alone = sde.RowNoise(3, 5, [2, 9]).generators
    for _ in range(3):
        expected = torch.stack([torch.randn(shape, generator=each) for each in alone])
        assert torch.equal(rows(shape), expected)


def test_successive_draws_repeat_from_the_start_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    noise, again = sde.RowNoise(0, 0, [2, 9]), sde.RowNoise(0, 0, [9])
    first, second = noise((5, 7)), noise((5, 7))
    assert not torch.equal(first, second)
    assert torch.equal(again((5, 7)), first[1:]) and torch.equal(again((5, 7)), second[1:])
    assert torch.equal(state, torch.get_rng_state())


def test_no_two_seeds_steps_or_rows_share_a_stream():
    keys = [
        generator.initial_seed()
        for seed in (0, 1, 2, 42)
        for step in range(60)
        for generator in sde.RowNoise(seed, step, range(128)).generators
    ]
    assert len(set(keys)) == 4 * 60 * 128


@pytest.mark.parametrize("axis", ["seed", "step", "row"])
def test_noise_is_standard_normal_and_uncorrelated_between_neighbours(axis):
    """Standard errors: mean 1/sqrt(N), std 1/sqrt(2N), a correlation of n pairs 1/sqrt(n); five of
    each are allowed."""
    count, n = 64, 4096
    draws = {
        "seed": lambda i: sde.RowNoise(i, 0, [0]),
        "step": lambda i: sde.RowNoise(0, i, [0]),
        "row": lambda i: sde.RowNoise(0, 0, [i]),
    }
    z = torch.cat([draws[axis](i)((n,)) for i in range(count)]).double()
    assert abs(z.mean()) < 5 / (count * n) ** 0.5
    assert abs(z.std() - 1) < 5 / (2 * count * n) ** 0.5
    # the means of independent streams scatter
    assert abs((z.mean(1) * n**0.5).std() - 1) < 5 / (2 * count) ** 0.5
    correlation = torch.corrcoef(z) - torch.eye(count)
    assert correlation.abs().max() < 5 / n**0.5


# --- DDIM (the rest against diffusers' scheduler: tests/test_families.py) and CPS ---


def followed(schedule, eta, steps, m, c):
    """Mean and standard deviation at the end, for data N(m, c^2), whose posterior means of x0 and
    eps are known: followed in closed form, without samples."""
    sigmas = sde.shifted_sigmas(steps, 1.0).double()
    s = sde.diffusion_coefficients(sigmas, eta, schedule).double()
    mean, variance = 0.0, 1.0  # at sigma = 1
    for t in range(steps):
        sigma, sigma_next = sigmas[t], sigmas[t + 1]
        spread = (1 - sigma) ** 2 * c**2 + sigma**2  # of x at sigma

        def step(x, t=t, sigma=sigma, spread=spread):
            x = torch.tensor([[x]], dtype=torch.float64)
            slope = (1 - sigma) * c**2 / spread
            x0 = m + slope * (x - (1 - sigma) * m)
            eps = sigma / spread * (x - (1 - sigma) * m)
            return sde.TRANSITIONS[schedule](eps - x0, x, sigma, sigmas[t + 1], s[t])[2].item()

        gain = step(1.0) - step(0.0)
        mean, variance = (
            step(0.0) + gain * mean,
            gain**2 * variance + sde.transition_std(sigma, sigma_next, s[t]) ** 2,
        )
    return mean, variance**0.5


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps, close", [(200, 0.02), (2000, 0.002)])
def test_ddim_keeps_the_marginals_of_a_gaussian(eta, steps, close):
    mean, std = followed("ddim", eta, steps, m=0.7, c=0.5)
    assert mean == pytest.approx(0.7, abs=1e-6)
    # a posterior's mean is narrower than its samples; what is lost shrinks with the steps
    assert std == pytest.approx(0.5, rel=close)


@pytest.mark.parametrize("eta, narrower", [(0.4, 0.475), (1.0, 0.352)])
def test_cps_is_narrower_than_the_data_in_any_number_of_steps(eta, narrower):
    """Its std does not shrink with the steps, as docs/choices.md says with these numbers."""
    mean, std = followed("cps", eta, 2000, m=0.7, c=0.5)
    assert mean == pytest.approx(0.7, abs=1e-6)
    assert std == pytest.approx(narrower, abs=1e-3)
    assert followed("cps", eta, 200, m=0.7, c=0.5)[1] < std


@pytest.mark.parametrize("eta", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("t", [0, 2, 4])
def test_cps_is_that_of_its_paper(eta, t):
    """Transcribed from 2509.05952. The public code's log-probability lacks the variance."""
    generator = np.random.default_rng(t)
    v, x, z, other = generator.normal(size=(4, 3, 4, 6))
    sigmas = sde.shifted_sigmas(6, 3.0).double()
    s = sde.diffusion_coefficients(sigmas, eta, "cps")
    sigma, sigma_next = sigmas[t].item(), sigmas[t + 1].item()
    std = sigma_next * np.sin(eta * np.pi / 2)
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    mean = (1 - sigma_next) * clean + np.sqrt(sigma_next**2 - std**2) * noise
    given = (torch.as_tensor(v), torch.as_tensor(x), sigmas[t], sigmas[t + 1], s[t])
    found, log_prob, found_mean = sde.TRANSITIONS["cps"](*given, noise=torch.as_tensor(z))
    close = dict(rtol=1e-9, atol=1e-7)  # sqrt(sigma'^2 - std^2) near 0 has half of the digits
    np.testing.assert_allclose(found_mean, mean, **close)
    np.testing.assert_allclose(found, mean + std * z, **close)
    _, again, _ = sde.TRANSITIONS["cps"](*given, x_next=found)
    assert torch.equal(again, log_prob)
    _, far, _ = sde.TRANSITIONS["cps"](*given, x_next=torch.as_tensor(other))
    public = [-((value - mean) ** 2).reshape(3, -1).mean(1) for value in (other, found.numpy())]
    np.testing.assert_allclose(far - log_prob, (public[0] - public[1]) / (2 * std**2), rtol=1e-6)
    assert s[-1] == 0


# --- The rollout ---
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rollout_stores_float32_and_ends_at_the_last_x0_hat(dtype):
    sigmas = sde.shifted_sigmas(5, 3.0)
    s = sde.diffusion_coefficients(sigmas, 0.3, "dance", window=(1, 2))
    x, drawn = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype), []
    noise = sde.RowNoise(0, 0, range(3))

    def velocity(x, sigma):  # a half-precision model
        return (torch.sin(x) * sigma).bfloat16()

    latents, log_probs = sde.rollout(
        velocity, x, sigmas, s, lambda shape: drawn.append(shape) or noise(shape)
    )
    assert latents.shape == (3, 6, 4, 6) and log_probs.shape == (3, 5)
    assert latents.dtype == log_probs.dtype == torch.float32
    assert torch.equal(latents[:, 0], x.float())
    assert torch.equal(
        latents[:, -1], latents[:, -2] - sigmas[-2] * velocity(latents[:, -2], sigmas[-2]).float()
    )
    assert drawn == [(4, 6)] * 2  # noise is drawn for the two steps of the window alone
    assert torch.equal(log_probs == 0, torch.tensor([[True, False, False, True, True]] * 3))


def test_rollout_equals_the_transcription_step_by_step():
    sigmas, s = (
        sde.shifted_sigmas(6, 3.0),
        sde.diffusion_coefficients(sde.shifted_sigmas(6, 3.0), 0.7, "flow"),
    )
    latents, log_probs = sde.rollout(
        lambda x, sigma: exact_velocity(x, sigma, 0.7, 0.4),
        torch.ones(2, 9),
        sigmas,
        s,
        sde.RowNoise(0, 0, [0, 1]),
    )
    noise = sde.RowNoise(0, 0, [0, 1])
    x, exact_sigmas = np.ones((2, 9)), sigmas_of(6, 3.0)
    exact_s = coefficients_of(exact_sigmas, 0.7, "flow")
    for t in range(6):
        sigma, sigma_next = exact_sigmas[t : t + 2]
        mean = slas_mean(x, exact_velocity(x, sigma, 0.7, 0.4), sigma, sigma_next, exact_s[t])
        std = exact_s[t] * (sigma - sigma_next) ** 0.5
        x = mean + std * noise((9,)).double().numpy() if std else mean
        np.testing.assert_allclose(latents[:, t + 1].numpy(), x, atol=3e-6)
        np.testing.assert_allclose(
            log_probs[:, t].numpy(), log_prob_of(x, mean, std) if std else 0, atol=1e-5
        )


def test_means_of_a_rollout_are_those_that_re_scoring_finds_and_change_no_number():
    sigmas = sde.shifted_sigmas(5, 3.0)
    s = sde.diffusion_coefficients(sigmas, 0.7, "flow")
    x, velocity = torch.randn(3, 4, 6), lambda x, sigma: torch.sin(x) * sigma
    two, three = (
        sde.rollout(velocity, x, sigmas, s, sde.RowNoise(0, 0, range(3)), means=means)
        for means in (False, True)
    )
    latents, log_probs, means = three
    assert len(two) == 2 and torch.equal(latents, two[0]) and torch.equal(log_probs, two[1])
    assert means.shape == (3, 5, 4, 6) and means.dtype == torch.float32
    for t in range(5):
        x, at = latents[:, t], (sigmas[t], sigmas[t + 1], s[t])
        assert torch.equal(
            means[:, t], sde.sde_step(velocity(x, sigmas[t]), x, *at, x_next=latents[:, t + 1])[2]
        )
    assert torch.equal(means[:, -1], latents[:, -1])  # the last step draws no noise


# --- Marginals ---
# Every eta must end at the data's N(m, c^2), from the exact velocity of that data.
M, C = 0.7, 0.4
MARGINALS = [
    ("dance", 0.0),
    ("dance", 0.3),
    ("dance", 0.7),
    ("flow", 0.0),
    ("flow", 0.3),
    ("flow", 0.7),
]


def chain_moments(steps, schedule, eta):
    """Exact mean and std of x at every sigma: a step is x -> a x + b + std z, read off at x = 0 and
    1."""
    sigmas = sde.shifted_sigmas(steps, 1.0).double()
    s = sde.diffusion_coefficients(sigmas, eta, schedule)
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean, variance, moments = 0.0, 1.0, []
    for t in range(steps):
        transition = sigmas[t], sigmas[t + 1], s[t]
        b, a_plus_b = (
            sde.sde_step(exact_velocity(probes, sigmas[t], M, C), probes, *transition)[2]
            .flatten()
            .tolist()
        )
        a, std = a_plus_b - b, sde.transition_std(*transition).item()
        mean, variance = a * mean + b, a**2 * variance + std**2
        sigma = sigmas[t + 1].item()
        moments.append(
            (mean, variance**0.5, (1 - sigma) * M, ((1 - sigma) ** 2 * C**2 + sigma**2) ** 0.5)
        )
    return np.array(moments).T


@pytest.mark.parametrize("schedule,eta", MARGINALS)
def test_chain_without_sampling_error_ends_at_the_data_distribution(schedule, eta):
    """Euler-Maruyama is of first order: for this data the std is off by less than 2/T. The mean has
    no error, because the mean of x_sigma is a straight line in sigma."""
    mean, std, true_mean, true_std = chain_moments(400, schedule, eta)
    np.testing.assert_allclose(mean, true_mean, atol=1e-12)
    assert abs(std[-1] / C - 1) < 2 / 400


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
def test_dance_chain_has_the_right_marginal_at_every_sigma_and_its_error_halves_with_the_step(eta):
    errors = [
        np.abs(std / true - 1).max()
        for _, std, _, true in (chain_moments(T, "dance", eta) for T in (200, 400))
    ]
    assert errors[0] < 2 / 200 and abs(errors[0] / errors[1] - 2) < 0.1


def test_flow_chain_starts_too_wide_for_any_number_of_steps_and_then_forgets_it():
    """At the pole s^2 dt is eta^2 for every T: the first step multiplies by 1 - eta^2/2 and adds
    eta^2, so the variance is 1 + eta^4/4 instead of 1. This is the published schedule; the later
    steps contract the excess."""
    for steps in (400, 1600):
        _, std, _, true = chain_moments(steps, "flow", 0.7)
        assert abs((std[0] / true[0]) ** 2 - (1 + 0.7**4 / 4)) < 5 / steps
        assert abs(std[-1] / C - 1) < 2 / 400


@pytest.mark.parametrize("schedule,eta", MARGINALS)
def test_sampled_rollout_ends_at_the_data_distribution(schedule, eta):
    """N independent rows: standard errors c/sqrt(N) of the mean and c/sqrt(2N) of the std; five of
    each are allowed, and for the std also the discretisation error 2/T of the exact chain above."""
    rows, steps = 20_000, 200
    generator = torch.Generator().manual_seed(0)
    sigmas = sde.shifted_sigmas(steps, 1.0)
    s = sde.diffusion_coefficients(sigmas, eta, schedule)
    x = torch.randn(rows, 1, generator=generator)

    def velocity(x, sigma):
        return exact_velocity(x, sigma, M, C)

    def noise(shape):
        return torch.randn(rows, *shape, generator=generator)

    latents, _ = sde.rollout(velocity, x, sigmas, s, noise)
    end = latents[:, -1].double()
    assert abs(end.mean() - M) < 5 * C / rows**0.5
    assert abs(end.std() - C) < 5 * C / (2 * rows) ** 0.5 + C * 2 / steps
