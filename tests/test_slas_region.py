"""slas.py --gamma auto: S, V and the choice of gamma against NumPy in float64, what a run measures,
its checkpoints, and two processes."""

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, weights
from test_processes import RUNS, SMALL, assert_same, one, two, words

import slas
from common import loss, models, sde

BETAS = (0.9, 0.999)
RNG = np.random.default_rng(0)
TWO_TERMS = (f"{ROOT}/tests/smooth.py:green=0.7", f"{ROOT}/tests/smooth.py:blue=1.4")


def ratio_of(powers, betas):
    """S / V by their sums over all updates, the last of which is powers[-1]."""
    b1, b2 = betas
    k = len(powers)
    age = np.arange(k)[::-1]
    w = (1 - b1) * b1**age / (1 - b1**k)
    u = (1 - b2) * b2**age / (1 - b2**k)
    assert w.sum() == pytest.approx(1) and u.sum() == pytest.approx(1)
    return (w**2 @ powers) / (u @ powers)


def advance(powers, betas=BETAS):
    moments = (0, 0.0, 0.0)
    for power in powers:
        moments = slas.moments_after(moments, power, betas)
    return moments


@pytest.mark.parametrize("betas", [BETAS, (0.8, 0.95), (0.0, 0.9)])
@pytest.mark.parametrize("k", [1, 2, 3, 40, 500])
def test_the_ratio_equals_its_sums(k, betas):
    powers = RNG.lognormal(0, 1, k)
    ours = slas.moments_ratio(advance(powers, betas), betas)
    assert ours == pytest.approx(ratio_of(powers, betas), rel=1e-12)


def test_the_ratio_of_known_moments():
    assert slas.moments_ratio(advance([7.0]), BETAS) == pytest.approx(1)
    many = slas.moments_ratio(advance([0.3] * 5000), BETAS)
    assert many == pytest.approx((1 - 0.9) / (1 + 0.9), rel=1e-9)
    assert slas.moments_ratio(advance([0.0, 0.0]), BETAS) == 0
    powers = RNG.lognormal(0, 1, 30)  # the unit of the advantages cancels
    scaled = slas.moments_ratio(advance(100 * powers), BETAS)
    assert scaled == pytest.approx(slas.moments_ratio(advance(powers), BETAS), rel=1e-12)


def test_the_ratio_is_the_square_of_adamws_step():
    """torch's own AdamW on independent noise, whose scale changes: the mean square of its step."""
    scales = np.concatenate([np.full(20, 1.0), np.full(10, 3.0)])
    weight = torch.zeros(200_000, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    found = []
    for scale in scales:
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.grad = scale * noise.sign()  # so that v is the same for every weight
        before = weight.detach().clone()
        optimizer.step()
        found.append((weight - before).square().mean().item())
    expected = [ratio_of(scales[: n + 1] ** 2, BETAS) for n in range(len(scales))]
    np.testing.assert_allclose(found, expected, rtol=0.02)


@pytest.mark.parametrize("limit, expected", [(0.5, 0.0), (1.0, 0.2), (1.5, 1.0), (9.0, 1.0)])
def test_the_largest_gamma_is_taken_also_beyond_one_that_is_too_dear(limit, expected):
    predicted = {0.0: 0.8, 0.1: 0.9, 0.2: 1.0, 0.3: 1.7, 0.4: 1.2, 1.0: 1.4}
    assert slas.largest_gamma(predicted, limit) == expected


def test_no_allowed_gamma_and_no_number_are_0():
    assert slas.largest_gamma({0.0: 3.0, 0.5: 2.0, 1.0: 1.0}, 0.5) == 0.0
    assert slas.largest_gamma(dict.fromkeys(slas.GAMMAS, float("nan")), 1.0) == 0.0


def region_after(powers, kls, limit):
    region = slas.TrustRegion(limit, BETAS)
    for power, kl in zip(powers, kls):
        region.observe(torch.tensor(power), torch.tensor(kl))
    return region


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])  # powers fall, do both, or rise with gamma
@pytest.mark.parametrize("share", [0.3, 0.99, 1.5])
def test_the_choice_equals_the_transcription(scale, share):
    past, kls = RNG.lognormal(0, 0.5, 12), RNG.lognormal(-10, 0.5, 12)
    z = scale * RNG.standard_normal(64)
    weights = 0.2 * 0.8 ** np.arange(12)[::-1]
    ratios = [ratio_of(past[: n + 1], BETAS) for n in range(12)]
    kappa = weights @ (kls / ratios) / weights.sum()

    def predict(gamma):
        power = (np.abs(z) ** (2 * (1 + gamma))).mean()
        later = [ratio_of([*past, *[power] * n], BETAS) for n in (1, 2, 3)]
        return kappa * max(later)

    predicted = {gamma: predict(gamma) for gamma in slas.GAMMAS}
    limit = share * predicted[0.5]
    region = region_after(past, kls, limit)
    powers = {g: torch.tensor((np.abs(z) ** (2 + 2 * g)).mean()) for g in slas.GAMMAS}
    gamma = region.choose_gamma(powers, updates=3)
    assert gamma == max([g for g in slas.GAMMAS if predicted[g] <= limit], default=0.0)
    assert region.predicted == pytest.approx(predicted[gamma], rel=1e-5)


def test_gamma_is_0_before_the_first_measurement_and_after_gradients_of_0():
    powers = {gamma: torch.tensor(1.0) for gamma in slas.GAMMAS}
    region = slas.TrustRegion(1e9, BETAS)
    assert region.choose_gamma(powers, updates=1) == 0.0 and region.metrics() == {}
    region.observe(torch.tensor(0.0), torch.tensor(1e-5))  # the KL term alone moved the weights
    assert region.choose_gamma(powers, updates=1) == 0.0
    region.observe(torch.tensor(1.0), torch.tensor(1e-5))
    assert region.choose_gamma(powers, updates=1) == 1.0


# --- In a run ---


@pytest.fixture
def watched(monkeypatch):
    """What the trust region was asked and told, and the advantages that were trained on."""
    chosen, told, trained = [], [], []
    choose_gamma, observe = slas.TrustRegion.choose_gamma, slas.TrustRegion.observe
    surrogate = loss.clipped_surrogate

    def choose(region, powers, updates):
        chosen.append((powers, updates, choose_gamma(region, powers, updates)))
        return chosen[-1][2]

    def note(region, power, kl):
        told.append((power.item(), kl.item(), torch.cat(trained).square().mean().item()))
        trained.clear()
        observe(region, power, kl)

    def watch(ratio, advantages, clip_range):
        trained.append(advantages.clone())
        return surrogate(ratio, advantages, clip_range)

    monkeypatch.setattr(slas.TrustRegion, "choose_gamma", choose)
    monkeypatch.setattr(slas.TrustRegion, "observe", note)
    monkeypatch.setattr(loss, "clipped_surrogate", watch)
    return chosen, told


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        dict(minibatches=2, micro_batch=2, kl_coef=0.1),
        dict(best_of=2, normalize="shaped", reward=TWO_TERMS, aggregate="advantages"),
        dict(normalize="after", updates_per_step=2, clip_range=0.5, attention="_native_math"),
        dict(normalize="none", lora_rank=2, learning_rate=1e-2, adv_clip_max=0.3),
    ],
    ids=lambda settings: " ".join(settings),
)
def test_the_moments_are_those_of_what_is_trained_on(train, watched, settings):
    """Also those that gamma is chosen by, whatever the normalisation, the mixture or best-of."""
    chosen, told = watched
    settings = dict(learning_rate=3e-4, reward=("red",), micro_batch=4, kl_limit=1e-3) | settings
    _, rows = train(slas, gamma="auto", steps=3, save_every=0, **settings)
    updates = settings.get("minibatches", 1) * settings.get("updates_per_step", 1)
    assert len(told) == 3 * updates and all(kl > 0 for _, kl, _ in told)
    for power, _, trained in told:
        assert power == pytest.approx(trained, rel=1e-5)
    for n, (row, (powers, asked, gamma)) in enumerate(zip(rows, chosen)):
        part = told[n * updates : (n + 1) * updates]
        assert list(powers) == slas.GAMMAS and asked == updates and row["gamma"] == gamma
        assert row["update_kl"] == pytest.approx(np.mean([kl for _, kl, _ in part]), rel=1e-6)
        mean = np.mean([power for power, _, _ in part])
        assert powers[gamma].item() == pytest.approx(mean, rel=1e-5)
    assert rows[0]["gamma"] == 0 and "predicted_kl" not in rows[0]
    assert all(row["gamma"] == 0 or row["predicted_kl"] <= 1e-3 for row in rows[1:])


def test_the_kl_of_an_update_is_that_of_the_weights_before_and_after_it(train, monkeypatch):
    """The means of the checkpoints' weights at the latents of the rollout, in NumPy."""
    rollouts, honest = [], sde.rollout

    def rollout(velocity, x, sigmas, s, *rest, **settings):
        found = honest(velocity, x, sigmas, s, *rest, **settings)
        rollouts.append((found[0].clone(), sigmas, s, velocity.keywords["cond"]))
        return found

    monkeypatch.setattr(sde, "rollout", rollout)
    settings = dict(learning_rate=1e-3, reward=("red",), save_every=1, sde="flow", noise_level=0.7)
    folder, rows = train(slas, gamma="auto", steps=2, **settings)
    latents, sigmas, s, cond = rollouts[1]
    velocities = []
    for step in (1, 2):
        model = models.load("tiny-flux", torch.float32, height=32, width=32)
        model.pipe.transformer.load_state_dict(weights(folder, step))
        model.pipe.transformer.eval()
        with torch.no_grad():
            velocities.append([model.velocity(latents[:, t], sigmas[t], cond) for t in range(3)])
    kls = []
    for t, (before, after) in enumerate(zip(*velocities)):
        sigma, sigma_next, noise = (float(v) for v in (sigmas[t], sigmas[t + 1], s[t]))
        slope = 1 + noise**2 / (2 * sigma) * (1 - sigma)  # of the mean in the velocity
        moved = (after - before).double().numpy() * slope * (sigma_next - sigma)
        kls.append((moved**2).mean() / (2 * noise**2 * (sigma - sigma_next)))
    assert rows[1]["update_kl"] == pytest.approx(np.mean(kls), rel=1e-3)


@pytest.mark.long
def test_a_resumed_run_equals_the_uninterrupted_one(train):
    settings = dict(gamma="auto", kl_limit=2e-4, minibatches=2, learning_rate=3e-4, save_every=1)
    whole, rows = train(slas, steps=6, **settings)
    assert any(row["gamma"] > 0 for row in rows[4:])  # which the restored state decides
    train(slas, "parts", steps=3, **settings)
    parts, resumed = train(slas, "parts", steps=6, resume="latest", **settings)
    assert resumed == rows
    for name in ("region", "transformer", "optimizer"):
        file = f"checkpoints/step_000006/{name}.pt"
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), name


def test_a_checkpoint_of_version_0_2_begins_the_measurement_anew():
    region = slas.TrustRegion(1.0, BETAS)
    region.load_state_dict({"eigenvalue": 17.8, "residual": 0.1})
    assert region.state_dict() == slas.TrustRegion(1.0, BETAS).state_dict()


@pytest.mark.long
def test_a_wider_limit_allows_a_larger_gamma(train):
    tight, wide = (
        train(slas, name, steps=3, gamma="auto", kl_limit=limit, learning_rate=1e-4)[1][-1]["gamma"]
        for name, limit in (("tight", 1e-12), ("wide", 1e6))
    )
    assert (tight, wide) == (0.0, 1.0)


@pytest.mark.long
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_choose_the_gamma_of_one(config, tmp_path, monkeypatch):
    """All rows of an update are measured, whose halves fill a micro-batch with padding rows."""
    auto = dict(gamma="auto", kl_limit=6e-5, learning_rate=1e-4, micro_batch=12, steps=5)
    auto |= dict(kl_coef=0.1)  # so that kl is compared, too
    monkeypatch.setitem(RUNS, "auto", (slas, {**SMALL, **auto}))
    two(tmp_path, [words(*RUNS["auto"], tmp_path / config)], config)
    alone = one(monkeypatch, "auto", tmp_path / "alone")
    rows = list(zip(metrics(alone), metrics(tmp_path / config), strict=True))
    assert any(0 < row["gamma"] for row, _ in rows)
    for row, other in rows:
        assert row.keys() == other.keys() and row["gamma"] == other["gamma"]
        for name in ("update_kl", "predicted_kl"):
            assert other.get(name, 0) == pytest.approx(row.get(name, 0), rel=1e-3)
    assert_same(alone, tmp_path / config, steps=1)
