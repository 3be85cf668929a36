"""Evaluation, a run's own and evaluate.py's: noise-free samples of held-out prompts, from the same
initial noise every time."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from common import models, sde
from common.errors import RunError
from common.rewards.asking import check_finite, score
from common.rewards.mixing import weighted_sum

if TYPE_CHECKING:  # they load more than torch
    from common.models.family import Family
    from common.reporting.report import Report
    from common.trainer.runtime import Runtime

NOISE = 2**31 - 1  # the "step" whose noise the evaluation starts from; no training step has it


@torch.no_grad()
def sample(
    model: "Family",
    prompts: list[str],
    streams: torch.Tensor,
    sigmas: torch.Tensor,
    micro_batch: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> torch.Tensor:
    """Noise-free samples [b, C, H, W] (clips [b, F, C, H, W]) in [0, 1] of b prompts, each from the
    fixed noise of its stream [b] (int); sigmas [T+1]; micro_batch: rows of a pass."""
    cond = model.encode(prompts)
    images = []
    for mb in torch.arange(len(prompts)).split(micro_batch):
        x = sde.RowNoise(seed, NOISE, streams[mb], device)(model.noise_shape)
        velocity = partial(model.velocity, cond=models.take(cond, mb))
        latents, _ = sde.rollout(velocity, x, sigmas, torch.zeros(len(sigmas) - 1), None)
        images.append(model.decode(latents[:, -1]))
    return torch.cat(images)


def sample_and_score(
    model: "Family",
    scorers: dict,
    prompts: list[str],
    streams: torch.Tensor,
    sigmas: torch.Tensor,
    micro_batch: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    policy: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`sample`, in the context of `policy`, and every scorer on it: ({name: [b]}, samples). What a
    scorer raised waits for `check_finite`."""
    with policy():
        media = sample(model, prompts, streams, sigmas, micro_batch, device, seed)
    return score(scorers, media, prompts), media


def scores_of(
    run: "Runtime",
    model: "Family",
    scorers: dict,
    prompts: list[str],
    shown: int = 0,
    policy: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Every scorer on one noise-free sample of each of n prompts: {name: [n]}, the same on every
    process, and up to `shown` of this process's samples as `sample` gives them, None for 0, on the
    main process those of the first prompts. policy: a context to sample in, as
    Runtime.initial_weights. Between batches it hears signals. Raises what `check_finite` does, and
    Stopped."""
    # equal shares for all processes: the first prompts fill up the last share, and are dropped
    # again below
    numbers = run.rows(-(-len(prompts) // run.world) * run.world) % len(prompts)
    mine = [prompts[i] for i in numbers]
    sigmas = model.sigmas(run.args.sampling_steps, run.args.shift)
    parts, images = [], []
    for part in torch.arange(len(mine)).split(run.score_batch):  # a clip is a quarter of a gigabyte
        run.check_signals()
        captions = [mine[i] for i in part]
        settings = sigmas, run.args.micro_batch, run.device
        scores, media = sample_and_score(
            model, scorers, captions, numbers[part], *settings, policy=policy
        )
        parts.append(scores)
        images += media[: max(0, shown - len(images))].cpu()
    scores = {
        name: run.gather(torch.cat([part[name] for part in parts]))[: len(prompts)]
        for name in scorers
    }
    check_finite({name: value[:, None] for name, value in scores.items()}, scorers, prompts)
    return scores, torch.stack(images) if images else None


def initial_reward(
    run: "Runtime",
    model: "Family",
    scorers: dict,
    reward_weights: dict[str, float],
    prompts: list[str],
) -> torch.Tensor:
    """Mean reward of --group-size noise-free samples of each of n prompts by the weights before
    training: [n]. Raises RunError if one has none."""
    samples = [prompt for prompt in prompts for _ in range(run.args.group_size)]
    scorers = {name: scorers[name] for name in reward_weights}  # not those that are only watched
    scores, _ = scores_of(run, model, scorers, samples, policy=run.initial_weights)
    return expected(weighted_sum(scores, reward_weights).view(len(prompts), -1).nanmean(1), prompts)


def still_reward(
    run: "Runtime",
    model: "Family",
    scorers: dict,
    reward_weights: dict[str, float],
    prompts: list[str],
) -> torch.Tensor:
    """Reward of each of n prompts' conditioning images as a still video: [n]. Raises RunError if
    one has none."""
    scorers = {name: scorers[name] for name in reward_weights}
    parts = [prompts[i : i + run.score_batch] for i in range(0, len(prompts), run.score_batch)]
    found = [score(scorers, model.still(part), part) for part in parts]
    scores = {name: torch.cat([part[name] for part in found]) for name in scorers}
    scores = {name: run.gather(value[None]).T for name, value in scores.items()}  # [n, processes]
    check_finite(scores, scorers, prompts)
    return expected(
        weighted_sum(scores, reward_weights)[:, 0], prompts
    )  # a judge may answer each process otherwise


def expected(rewards: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Rewards [n] of n prompts, as they are; raises RunError if one has none (NaN): a prior cannot
    do without."""
    for reward, prompt in zip(rewards.tolist(), prompts):
        if reward != reward:
            raise RunError(
                f"the prompt {prompt!r} got no score for its prior; start again, or take another "
                "--prior"
            )
    return rewards


def evaluate(
    run: "Runtime",
    report: "Report",
    model: "Family",
    scorers: dict,
    reward_weights: dict[str, float],
    prompts: list[str],
    step: int,
    last: bool = False,
) -> dict[str, torch.Tensor]:
    """The evaluation before the steps that --eval-every and --sample-every name, and after the
    `last`: {"eval_reward", "eval_<scorer>"}, scalars, means over the prompts; else {}. Raises
    RunError, Stopped."""
    args = run.args
    due = args.eval_every and (last or step % args.eval_every == 0)
    grid = args.sample_every and (last or step % args.sample_every == 0)
    if not prompts or not (due or grid):
        return {}
    prompts = prompts if due else prompts[:16]
    scores, images = scores_of(run, model, scorers, prompts, shown=16)
    reward = weighted_sum(scores, reward_weights)
    if grid:
        report.samples(step, images, prompts, reward)
    if not due:
        return {}
    return {
        "eval_reward": reward.nanmean(),
        **{f"eval_{name}": value.nanmean() for name, value in scores.items()},
    }
