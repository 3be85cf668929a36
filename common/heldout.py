"""Evaluation, a run's own and evaluate.py's: noise-free samples of held-out prompts, from the same initial noise every
time."""

from contextlib import nullcontext
from functools import partial

import torch

from common import models, sde
from common.errors import RunError
from common.rewards.asking import check_finite, score
from common.rewards.mixing import weighted_sum

NOISE = 2**31 - 1  # the "step" whose noise the evaluation starts from; no training step has it


@torch.no_grad()
def sample(model, prompts, streams, sigmas, micro_batch, device="cpu", seed=0):
    """Noise-free samples [b, C, H, W] in [0, 1] of b prompts, each from the fixed noise of its stream [b] (int)."""
    cond = model.encode(prompts)
    images = []
    for mb in torch.arange(len(prompts)).split(micro_batch):
        x = sde.RowNoise(seed, NOISE, streams[mb], device)(model.noise_shape)
        velocity = partial(model.velocity, cond=models.take(cond, mb))
        latents, _ = sde.rollout(velocity, x, sigmas, torch.zeros(len(sigmas) - 1), None)
        images.append(model.decode(latents[:, -1]))
    return torch.cat(images)


def sample_and_score(model, scorers, prompts, streams, sigmas, micro_batch, device="cpu", seed=0, policy=nullcontext):
    """`sample`, in the context of `policy`, and every scorer on it: ({name: [b]}, samples). What a scorer raised waits
    for `check_finite`."""
    with policy():
        media = sample(model, prompts, streams, sigmas, micro_batch, device, seed)
    return score(scorers, media, prompts), media


def scores_of(run, model, scorers, prompts, shown=0, policy=nullcontext):
    """Every scorer on one noise-free sample of each of n prompts: {name: [n]}, the same on every process, and up to
    `shown` of this process's images [b, C, H, W], on the main process those of the first prompts. policy: a context
    to sample in, as Runtime.initial_weights. Between batches it hears signals."""
    # equal shares for all processes: the first prompts fill up the last share, and are dropped again below
    numbers = run.rows(-(-len(prompts) // run.world) * run.world) % len(prompts)
    mine = [prompts[i] for i in numbers]
    sigmas = model.sigmas(run.args.sampling_steps, run.args.shift)
    parts, images = [], []
    for part in torch.arange(len(mine)).split(run.score_batch):  # a clip is a quarter of a gigabyte
        run.check_signals()
        captions = [mine[i] for i in part]
        settings = sigmas, run.args.micro_batch, run.device
        scores, media = sample_and_score(model, scorers, captions, numbers[part], *settings, policy=policy)
        parts.append(scores)
        images += media[: max(0, shown - len(images))].cpu()
    scores = {name: run.gather(torch.cat([part[name] for part in parts]))[: len(prompts)] for name in scorers}
    check_finite({name: value[:, None] for name, value in scores.items()}, scorers, prompts)
    return scores, torch.stack(images) if images else None


def initial_reward(run, model, scorers, reward_weights, prompts):
    """Mean reward of --group-size noise-free samples of each of n prompts by the weights before training: [n]"""
    samples = [prompt for prompt in prompts for _ in range(run.args.group_size)]
    scorers = {name: scorers[name] for name in reward_weights}  # not those that are only watched
    scores, _ = scores_of(run, model, scorers, samples, policy=run.initial_weights)
    return expected(weighted_sum(scores, reward_weights).view(len(prompts), -1).nanmean(1), prompts)


def still_reward(run, model, scorers, reward_weights, prompts):
    """Reward of each of n prompts' conditioning images, shown as a still video: [n]"""
    scorers = {name: scorers[name] for name in reward_weights}
    parts = [prompts[i : i + run.score_batch] for i in range(0, len(prompts), run.score_batch)]
    found = [score(scorers, model.still(part), part) for part in parts]
    scores = {name: torch.cat([part[name] for part in found]) for name in scorers}
    scores = {name: run.gather(value[None]).T for name, value in scores.items()}  # [n, processes]
    check_finite(scores, scorers, prompts)
    return expected(weighted_sum(scores, reward_weights)[:, 0], prompts)  # a judge may answer each process otherwise


def expected(rewards, prompts):
    """Rewards [n] of n prompts, as they are; raises RunError if one has none (NaN): a prior cannot do without."""
    for reward, prompt in zip(rewards.tolist(), prompts):
        if reward != reward:
            raise RunError(f"the prompt {prompt!r} got no score for its prior; start again, or take another --prior")
    return rewards


def evaluate(run, report, model, scorers, reward_weights, prompts, step, last=False):
    """The evaluation on the steps that --eval-every and --sample-every name: {"eval_reward", "eval_<scorer>"}, else
    {}."""
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
    return {"eval_reward": reward.nanmean(), **{f"eval_{name}": value.nanmean() for name, value in scores.items()}}
