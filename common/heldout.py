"""The fixed exam of a run: one noise-free sample for each held-out prompt, from the same initial noise every time."""

from functools import partial

import torch

from common import models, sde
from common.rewards import score, weighted_sum

NOISE = 2**31 - 1  # the "step" whose noise the exam starts from; no training step has it


@torch.no_grad()
def sample(model, prompts, streams, sigmas, micro_batch, device="cpu"):
    """Noise-free samples [b, C, H, W] in [0, 1] of b prompts, each from the fixed noise of its stream [b] (int)."""
    cond = model.encode(prompts)
    images = []
    for mb in torch.arange(len(prompts)).split(micro_batch):
        x = sde.RowNoise(0, NOISE, streams[mb], device)(model.noise_shape)
        velocity = partial(model.velocity, cond=models.take(cond, mb))
        latents, _ = sde.rollout(velocity, x, sigmas, torch.zeros(len(sigmas) - 1), None)
        images.append(model.decode(latents[:, -1]))
    return torch.cat(images)


def evaluate(run, report, model, scorers, weights, prompts, step, last=False):
    """On the steps that --eval-every and --sample-every name, the exam: {"eval_reward", "eval_<scorer>"}, else {}."""
    args = run.args
    exam = args.eval_every and (last or step % args.eval_every == 0)
    grid = args.sample_every and (last or step % args.sample_every == 0)
    if not prompts or not (exam or grid):
        return {}
    prompts = prompts if exam else prompts[:16]
    # equal shares for all processes: the first prompts fill up the last share, and are dropped again below
    numbers = run.rows(-(-len(prompts) // run.world) * run.world) % len(prompts)
    sigmas = sde.shifted_sigmas(args.sampling_steps, args.shift)
    mine = [prompts[i] for i in numbers]
    images = sample(model, mine, numbers, sigmas, args.micro_batch, run.device)
    scores = score(scorers, images, mine)
    if grid:
        report.samples(step, images, mine, weighted_sum(scores, weights))
    if not exam:
        return {}
    scores = {name: run.gather(value)[: len(prompts)] for name, value in scores.items()}
    means = {f"eval_{name}": value.mean() for name, value in scores.items()}
    return {"eval_reward": weighted_sum(scores, weights).mean(), **means}
