"""The bench of points: one run of it equals the scripts' own main(), its premises do what they say,
and errors that are planted in an advantage show up."""

from dataclasses import replace
from functools import partial

import numpy as np
import points_rewards
import pytest
import torch

import bpgo
import grpo_base
import self_paced
import slas
from common import sde
from common.prompts import prompts_of_step, read_prompts
from common import models
from lab import dials
from lab.points import Judge, Ladder, Setting, train
from worlds import points

torch.set_num_threads(1)
STEPS = 12
TAU = {"quality": 0.55, "layout": 0.5, "truth": 0.1}
REWARDS = "tests/points_rewards.py:"
STAGES = tuple(f"{REWARDS}{name}" for name in ("Quality", "Layout", "Truth"))


def own_draws(world, setting, step, chance):
    """The prompts, noise and choices of a step of main() with --model points and seed 0."""
    P, G, T = setting.prompts_per_step, setting.group_size, setting.sampling_steps
    prompts = read_prompts(models.settings("points")["prompts"])
    known = points.described(prompts_of_step(prompts, step, P, 0))
    rows = torch.arange(P * G)
    first = rows // G * G if setting.same_noise else rows
    start = sde.RowNoise(0, step, first)((points.D,))
    later = sde.RowNoise(0, step, P * G + rows)
    noise = torch.stack([start, *(later((points.D,)) for _ in range(T - 1)), start])
    return known, noise[:, None], torch.zeros(()), torch.Generator().manual_seed(step)


class Same:
    """The generator of main(): its seed is --seed * 1,000,003 + the step, with seed 0 the step."""


def pair(train_script, script, method, world=points_rewards.JUDGED, setting=Setting(), **flags):
    """Return the rows of main() and those of the bench: [(reward mean, gradient norm)] of both."""
    setting = replace(setting, steps=STEPS)
    names = {"steps", "prompts_per_step", "group_size", "sampling_steps", "sde", "noise_level"}
    names |= {"same_noise", "timestep_fraction", "best_of", "minibatches", "clip_range", "kl_coef"}
    same = {name: getattr(setting, name) for name in names}
    flags = {"reward": (f"{REWARDS}Judge",), "learning_rate": 0.006, **same, **flags}
    settings = models.settings("points")
    kept = {n: settings[n] for n in ("prompts", "height", "width", "guidance", "shift")}
    _, rows = train_script(
        script, model="points", micro_batch=64, **{**kept, **flags}
    )
    watch = []
    train(world, method, (0.006,), setting, draws=own_draws, watch=watch)
    name = world.trained
    ours = [(rewards[name].nanmean().item(), norm.item()) for rewards, norm, _ in watch]
    named = f"points_rewards.py:{name.capitalize()}_mean"
    if world is points_rewards.UNSURE:
        named = "points_rewards.py:Masked_mean"
    theirs = [(row[named], row["grad_norm"]) for row in rows]
    return np.array(theirs), np.array(ours), rows


CASES = {
    "grpo": (grpo_base, dials.grpo, {}),
    "slas": (slas, partial(dials.slas_by, gamma=1.0), {"gamma": 1.0}),
    "bpgo": (bpgo, dials.bpgo_by, {"reward_scale": 0.15}),
    "bpgo alone": (
        bpgo, partial(dials.bpgo_by, alone=True), {"reward_scale": 0.15, "crt_alone": True}
    ),
    "released": (bpgo, dials.bpgo_released, {"variant": "released", "alpha": 1.0}),
}  # fmt: skip


def scaled(method):
    """The method with the unit of rewards that the script has, 0.15."""

    def with_scale(rewards, known):
        known.scale = torch.full_like(known.scale, 0.15)
        return method(rewards, known)

    return with_scale


@pytest.mark.parametrize("case", CASES)
def test_one_run_equals_main(train, case):  # noqa: F811
    script, method, flags = CASES[case]
    theirs, ours, _ = pair(train, script, scaled(method), **flags)
    assert len(ours) == STEPS and theirs[:, 1].min() > 0
    assert np.abs(theirs / ours - 1).max() < 1e-4
