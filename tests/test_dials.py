"""The bench of points: one run of it equals the scripts' own main(), its premises do what they say,
and errors that are planted in an advantage show up."""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import points_rewards
import pytest
import torch
from conftest import ROOT

import bpgo
import grpo_base
import self_paced
import slas
from common import models, sde
from common.errors import InputError
from common.prompts import prompts_of_step, read_prompts
from lab import dial_pages, dials
from lab.points import Judge, Ladder, Setting, base_rewards, draws, train
from worlds import points

STEPS = 8
RATE = 0.006
UNIT = 0.15  # points_rewards.Judge.scale
TAU = {"quality": 0.55, "layout": 0.5, "truth": 0.1}
FILE = "tests/points_rewards.py:"
FLAGS = (
    "steps", "prompts_per_step", "group_size", "sampling_steps", "sde", "noise_level", "same_noise",
    "timestep_fraction", "best_of", "minibatches", "clip_range", "kl_coef",
)  # fmt: skip


def own_draws(world, setting, step, chance):
    """Return the prompts, noise and choices of a step of main() with --model points --seed 0."""
    P, G, T = setting.prompts_per_step, setting.group_size, setting.sampling_steps
    prompts = read_prompts(models.settings("points")["prompts"])
    known = points.described(prompts_of_step(prompts, step, P, 0))
    rows = torch.arange(P * G)
    first = rows // G * G if setting.same_noise else rows
    start = sde.RowNoise(0, step, first)((points.D,))
    later = sde.RowNoise(0, step, P * G + rows)
    noise = torch.stack([start, *(later((points.D,)) for _ in range(T - 1)), start])
    return known, noise[:, None], torch.zeros(()), torch.Generator().manual_seed(step)


def in_units(method):
    """Return the method with the unit of rewards that the scripts' rewards declare."""

    def same_unit(rewards, known):
        known.scale = torch.full_like(known.scale, UNIT)
        return method(rewards, known)

    return same_unit


GRPO, SHAPED = (grpo_base, dials.grpo, {}), partial(dials.slas_by, gamma=1.0)
MORE = Setting(best_of=4, same_noise=True, kl_coef=0.5, sde="dance", noise_level=0.5)
SHORT = dict(group_size=5, prompts_per_step=3, minibatches=1, sde="ddim", timestep_fraction=1.0)
V1 = partial(dials.paced, gate="previous", saturation="one-minus-hoyer")
PROSE = {"gate": "previous", "saturation": "one-minus-hoyer"}
STAGES = {"reward": tuple(f"{FILE}{name}" for name in ("Quality", "Layout", "Truth"))}
STAGES["thresholds"] = tuple(TAU.values())
CASES = {
    "grpo": (*GRPO, {}),
    "grpo, choices": (*GRPO, {"setting": MORE}),
    "grpo, ddim": (*GRPO, {"setting": Setting(**SHORT)}),
    "grpo, masked": (*GRPO, {"reward": "Masked"}),
    "slas": (slas, SHAPED, {"gamma": 1.0}, {}),
    "slas, masked": (slas, SHAPED, {"gamma": 1.0}, {"reward": "Masked"}),
    "slas, auto": (slas, partial(dials.slas_auto, limit=1e-3),
                   {"gamma": "auto", "kl_limit": 1e-3}, {}),
    "bpgo": (bpgo, dials.bpgo_by, {}, {}),
    "bpgo, masked": (bpgo, dials.bpgo_by, {}, {"reward": "Masked"}),
    "bpgo, eq 5": (bpgo, partial(dials.bpgo_by, alone=True), {"crt_alone": True}, {}),
    "bpgo, released": (bpgo, dials.bpgo_released, {"variant": "released", "alpha": 1.0}, {}),
    "paced, v1": (self_paced, partial(dials.paced, gate="own"), STAGES, {"reward": "Truth"}),
    "paced, prose": (self_paced, V1, STAGES | PROSE, {"reward": "Truth"}),
    "paced, v4": (self_paced, partial(dials.paced, variant="v4", alpha=1.0),
                  STAGES | {"variant": "v4", "alpha": 1.0}, {"reward": "Truth"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_run_equals_main(train_script, case):
    script, method, flags, more = CASES[case]
    theirs, ours, _ = train_script(script, method, flags, **more)
    assert len(ours) == STEPS and theirs[:, 1].min() > 0
    assert np.abs(theirs / ours - 1).max() < 1e-4


@pytest.fixture
def train_script(train_main):
    """Trains by main() and by the bench; returns their rows [STEPS, (reward, gradient norm)]."""

    def run(script, method, flags, setting=Setting(), reward="Judge"):  # noqa: B008
        setting = replace(setting, steps=STEPS)
        settings = models.settings("points")
        names = ("prompts", "height", "width", "guidance", "shift")
        same = {name: settings[name] for name in names}
        same |= {name: getattr(setting, name) for name in FLAGS}
        same |= {"reward": (FILE + reward,), "learning_rate": RATE, "micro_batch": 64, **flags}
        _, rows = train_main(script, model="points", **same)
        world = getattr(points_rewards, reward).world
        world.thresholds = TAU
        watch = []
        train(world, in_units(method), (RATE,), setting, draws=own_draws, watch=watch)
        name = f"points_rewards.py:{reward}_mean"
        theirs = [(row[name], row["grad_norm"]) for row in rows]
        ours = [(r[world.trained].nanmean().item(), norm.item()) for r, norm, _ in watch]
        return np.array(theirs), np.array(ours), rows

    return run


@pytest.fixture
def train_main(train, monkeypatch):
    """Runs a script's main; rewards in tests/ are found from the repository's folder."""
    monkeypatch.chdir(ROOT)
    return train


def test_masked_samples_are_masked():
    """Otherwise the cases above compare less than they say."""
    prompts, noise, error, _ = draws(points_rewards.UNSURE, Setting(), 0, 0)
    x = prompts.mean[None, :, :, None] + 0.5 * noise[0].view(1, 1, 8, 8, points.D)
    share = points_rewards.UNSURE.score(x, prompts, error)["judge"].isnan().float().mean()
    assert 0.02 < share < 0.5


# --- --model points ---


def test_the_folder_is_what_the_builder_writes():
    model = models.load("points", torch.float32)
    fresh = points.PointsField().state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in model.pipe.transformer.state_dict().items())
    media = model.decode(torch.linspace(-7, 7, 16).view(2, points.D))
    assert media.shape == (2, 3, 8, points.D) and 0 <= media.min() and media.max() <= 1
    assert torch.allclose(points.points(media).flatten(), torch.linspace(-7, 7, 16), atol=1e-5)


def test_the_base_model_is_exact():
    """Many noise-free steps end at the Gaussian whose velocity it is."""
    known = points.described(["some point"])
    z, mean = (value[0].expand(4000, -1) for value in (known.z, known.mean))
    field = points.PointsField()
    start = torch.randn(4000, points.D, generator=torch.Generator().manual_seed(0))
    sigmas = sde.shifted_sigmas(100, 1.0)
    with torch.no_grad():
        latents, _ = sde.rollout(
            lambda x, sigma: field(x, sigma, z, mean), start, sigmas, torch.zeros(100), None
        )
    assert torch.allclose(latents[:, -1].mean(0), mean[0], atol=0.05)
    assert torch.allclose(latents[:, -1].var(0), torch.tensor(points.SPREAD), atol=0.03)


def test_a_run_is_exported_as_a_pipeline(train):
    names = ("prompts", "reward", "height", "width", "guidance", "learning_rate")
    folder, _ = train(model="points", **{name: models.settings("points")[name] for name in names})
    pipe = points.PointsPipeline.from_pretrained(folder / "export")
    assert pipe.transformer.weights[4].abs().max() > 0  # the last layer was zero
    assert pipe(["clear point 1"]).shape == (1, 3, 8, points.D)
    loaded = models.load(str(folder / "export"), torch.float32)
    state = loaded.pipe.transformer.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in pipe.transformer.state_dict().items())
    card = (folder / "export/README.md").read_text(encoding="utf-8")
    assert "from worlds.points import PointsPipeline" in card and "Scheduler" not in card


# --- Premises ---


def one_step(method, world):
    """Return (advantages, Known) of the first step of 8 seeds: the base model's samples."""
    seen = []

    def watched(rewards, known):
        seen.append((rewards, method(rewards, known)))
        return seen[-1][1]

    watch = []
    train(world, watched, (RATE,), Setting(steps=1), watch=watch)
    (rewards, terms), (_, _, known) = seen[0], watch[0]
    return rewards, terms, known


@pytest.mark.parametrize("unsure, sign", [(0.0, 1), (0.9, -1)])
def test_trust_follows_what_an_unsure_judge_says(unsure, sign):
    """RAS takes prompts that score low for ambiguous, whether they are or not."""
    _, terms, known = one_step(partial(dials.bpgo_by, beta=0.0), Judge(1, 8, unsure=unsure))
    _, plain, _ = one_step(dials.grpo, Judge(1, 8, unsure=unsure))
    trust = (terms[0] / plain[0]).nanmedian(2).values  # [E, P]
    vague = known.prompts.vague.bool()
    assert sign * (trust[~vague].mean() - trust[vague].mean()) > 0.1


def test_errors_spoil_the_ranks_of_tight_groups_first():
    agreements = []
    for noise in (0.0, 0.05, 0.2):
        rewards, _, known = one_step(dials.grpo, Judge(1, 8, noise=noise))
        judge, truth = (r - r.mean(2, keepdim=True) for r in (rewards["judge"], rewards["truth"]))
        agree = (judge * truth).sum(2) / (judge.norm(dim=2) * truth.norm(dim=2))
        vague = known.prompts.vague.bool()
        agreements.append((agree[vague].mean().item(), agree[~vague].mean().item()))
    (tight, clear), (tight_2, clear_2), (tight_3, clear_3) = agreements
    assert tight > 0.999 and clear > 0.999
    assert clear_2 > 0.85 and tight_2 < 0.5
    assert clear_3 < clear_2 and tight_3 < tight_2


def test_other_premises():
    world = Ladder(1, 8, floor=0.4)
    prompts = world.prompts(64, points.drawn("some"))
    reward = base_rewards(world, prompts, 8)
    assert 0 < (reward > 0).float().mean() < 0.05  # a beginner hardly ever sees a reward
    assert (base_rewards(Ladder(1, 8), prompts, 8) > 0).all()
    x = prompts.target[:, :, None]
    at_target = Judge(1, 8, second=1.0).score(x, prompts, 0)
    assert torch.allclose(at_target["truth"], torch.ones(()))
    second = x + points.D**0.5 * Judge(1, 8).world.style
    both = Judge(1, 8, second=1.0, vague=0.0, noise=0.0).score(second, prompts, 0)
    assert torch.allclose(both["truth"], torch.ones(())) and both["judge"].max() < 0.3


# --- Statistics ---


def test_a_search_leaves_the_edge_and_finds_the_peak_between_rates():
    def curve(rates):
        return [-(np.log2(rate / 0.03) ** 2) for rate in rates]

    rate, tried = dials.best_rate(curve)
    assert rate == pytest.approx(0.03, rel=1e-6) and set(tried) == {*dials.RATES, 0.032, 0.064}
    assert dials.best_rate(lambda rates: [rate for rate in rates])[0] == 0.064
    assert dials.best_rate(lambda rates: [-rate for rate in rates])[0] == 0.0005
    assert dials.best_rate(lambda rates: [np.nan if r > 0.005 else r for r in rates])[0] == 0.004


def test_intervals_hold_for_all_values_together():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        shared = rng.normal(size=(1, 40))
        rows = dials.intervals(shared + rng.normal(size=(5, 40)), draws=400)
        inside += all(low <= 0 <= high for _, low, high in rows)
    assert 0.90 <= inside / 200 <= 0.99


@pytest.mark.parametrize(
    "low, high, word",
    [
        (-0.01, 0.01, "no difference"), (0.001, 0.009, "no difference"), (0.001, 0.02, "helps"),
        (-0.02, -0.001, "hurts"), (-0.001, 0.02, "open"), (-0.5, 0.5, "open"),
    ],
)  # fmt: skip
def test_verdicts(low, high, word):
    assert dials.verdict(low, high) == word


# --- Planted errors ---


def flipped(reward, adv_clip_max):
    """GRPO with the wrong sign."""
    return -grpo_base.compute_advantages(reward, adv_clip_max)


def wrong_std(reward, adv_clip_max):
    """GRPO with the standard deviation over prompts instead of that over samples."""
    centred = reward - reward.mean(1, keepdim=True)
    return (centred / (reward.std(0, keepdim=True) + 1e-8)).clamp(-adv_clip_max, adv_clip_max)


@pytest.mark.parametrize("planted", [flipped, wrong_std])
def test_a_planted_error_hurts(planted):
    world, setting = Judge(2, 12, noise=0.0), Setting(steps=40)

    def method(rewards, known):
        return [dials.each_run(lambda reward: planted(reward, 5.0), known.reward)]

    ends = [train(world, one, (RATE,), setting)["truth"][0, :, 1] for one in (method, dials.grpo)]
    ((_, low, high),) = dials.intervals((ends[0] - ends[1])[None].numpy())
    assert dials.verdict(low, high) == "hurts"


def test_a_method_of_your_own_trains_cells_of_three_minutes(tmp_path):
    """44 of 6 core-seconds, those of 160 steps counted twice, on two cores."""
    jobs = dials.plan(dials.Args(methods=("mine.py",)), tmp_path)
    steps = [dials.DIALS[name].setting.steps for _, name, _, left, _ in jobs if "mine" in left]
    assert len(steps) == 44 and sum(steps) / 80 * 6 / 2 <= 180
    quick = dials.plan(dials.Args(methods=("mine.py",), quick=True), tmp_path)
    assert all("mine" in left for *_, left, _ in quick)
    with pytest.raises(InputError, match="no dial has such a name"):
        dials.plan(dials.Args(only=("nothing",)), tmp_path)


METHOD = """
def compute_advantages(reward, adv_clip_max):
    return reward - reward.mean(1, keepdim=True)
"""
STATEFUL = re.search(r"```python\n(.*?)```", (ROOT / "docs/dials.md").read_text("utf-8"), re.S)[1]


@pytest.mark.long
def test_a_method_of_your_own_gets_a_line(tmp_path, monkeypatch, capsys):
    """Also a stateful one; a second call finds all cells, and trains nothing."""
    (tmp_path / "mine.py").write_text(METHOD, encoding="utf-8")
    (tmp_path / "stateful.py").write_text(STATEFUL, encoding="utf-8")
    monkeypatch.setattr(dials, "QUICK_SEEDS", (2, 3))
    monkeypatch.setattr(dials, "QUICK", {"slas-exploit": ((0.05,), ("gamma 2",))})
    own = tuple(str(tmp_path / name) for name in ("mine.py", "stateful.py"))
    args = dials.Args(quick=True, methods=own, workers=1, output=str(tmp_path / "out"))
    dials.main(args)
    result = json.loads((tmp_path / "out/slas-exploit.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in result["cells"]] == ["GRPO", "gamma 2", "mine", "stateful"]
    assert all(len(row["ends"]["truth"]) == 3 for row in result["cells"])
    out = capsys.readouterr().out
    assert "| mine |" in out and "1/1 slas-exploit 0.05" in out
    assert (tmp_path / "out/slas.png").stat().st_size > 10_000
    dials.main(args)
    assert "1/1" not in capsys.readouterr().out


# --- Pages ---


def test_the_pages_have_the_tables_of_the_committed_results():
    for path, text in dial_pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path}: run python -m lab.dials --figures"
        )


def test_the_committed_results_are_those_of_the_declared_dials():
    """Settings, worlds and seeds are today's, and no cell is there twice."""
    paths = sorted(dials.RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        name, _, variant = path.stem.partition("--")
        result = json.loads(path.read_text(encoding="utf-8"))
        changes = dict(dials.VARIANTS.get(variant, {}))
        if "steps" in changes:
            changes["steps"] *= dials.DIALS[name].setting.steps
        seeds = dials.VARIANT_SEEDS if variant else dials.SEEDS
        made = dials.made_by(name, seeds, changes)
        assert all(result[key] == made[key] for key in ("seeds", "settings", "world")), path
        cells = [(row["value"], row["method"]) for row in result["cells"]]
        assert len(set(cells)) == len(cells)
        known = {"GRPO", *dials.DIALS[name].methods}
        assert all(v in dials.DIALS[name].values and m in known for v, m in cells), path
        assert json.loads(json.dumps(dials.findings(result))) == result["differences"], path
