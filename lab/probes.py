"""What the study measures without training: on samples of the base models, or on true scenes.

Each probe takes a model's name and a seed, and returns {"numbers": {name: value}} or {"pictures":
{...}}."""

import base64
import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import grpo_base
import slas
from common import cli, models
from common.args import defaults
from common.prompts import caption_of, prompts_of_step, read_prompts
from common.rewards import Rewards
from common.trainer.evaluator import sample
from evaluation import bias, sampler
from worlds import motion, shapes, verifier

PROXY = dict(reward_path=("clip=assets/tiny-clip",), reward_batch=96)
PROMPTS, GROUP = 48, 12  # groups of the base model's samples
SHUFFLES = 300
SHOWN = (0, 2, 5, 7, 11, 12)  # of the held-out prompts, in the pictures; of clips the first four


def sampled(args, model, prompts, seed=0):
    """Noise-free samples of a run's model: [n, 3, H, W], clips [n, F, 3, H, W]."""
    sigmas = model.sigmas(args.sampling_steps, args.shift)
    return sample(
        model,
        prompts,
        streams=torch.arange(len(prompts)),
        sigmas=sigmas,
        micro_batch=args.micro_batch,
        seed=seed,
    )


# --- Groups of the base model's samples (2605.10937, proposition 1) ---


def loudness(name, seed):
    """Of groups whose proxy scores lie closest together, and furthest apart (a quarter of all
    each): how loud their advantages are against each other, by GRPO and by SLAS, and how well the
    proxy ranks a group's samples."""
    args = defaults(cli.Args, name)
    prompts = prompts_of_step(read_prompts(args.prompts), 0, PROMPTS, seed)
    model = models.load(name, torch.float32, prompts, **args.model_settings())
    rewards = Rewards(replace(args, reward=("clip", "verifier"), **PROXY), prompts)
    every = [prompt for prompt in prompts for _ in range(GROUP)]
    scores = rewards.score(sampled(args, model, every, seed), every)
    sampler.check(rewards, scores, every)
    scores = {reward: values.view(PROMPTS, GROUP).double() for reward, values in scores.items()}
    return {"numbers": loud(proxy=scores["clip"], truth=scores["verifier"])}


def loud(proxy, truth):
    """Scores [P, G] of both -> {"grpo", "slas": mean |A| of the tightest quarter of groups over
    that of the widest; "true_low", "true_high": mean correlation of proxy and truth within a group,
    of these two quarters, of the groups in which neither is constant; "constant": their share of
    the tightest quarter}."""
    order, quarter = proxy.std(1, unbiased=False).argsort(), len(proxy) // 4
    low, high = order[:quarter], order[-quarter:]
    found = {}
    for method, advantages in (
        ("grpo", grpo_base.compute_advantages(proxy, 5.0)),
        ("slas", slas.compute_advantages(proxy, 0.5, 5.0)),
    ):
        found[method] = (advantages[low].abs().mean() / advantages[high].abs().mean()).item()
    centred = [scores - scores.mean(1, keepdim=True) for scores in (proxy, truth)]
    norms = [scores.norm(dim=1) for scores in centred]
    correlation = (centred[0] * centred[1]).sum(1) / (norms[0] * norms[1])
    correlation[(norms[0] == 0) | (norms[1] == 0)] = torch.nan  # one is constant
    found |= {
        "true_low": correlation[low].nanmean().item(),
        "true_high": correlation[high].nanmean().item(),
    }
    return {**found, "constant": correlation[low].isnan().double().mean().item()}


# --- Kinds of content (2511.19356, eq 3) ---


def bias_(name, seed):
    """The coefficient of variation of mean scores over clusters of captions, in per cent and beyond
    what chance alone gives, of true scenes with noise of any strength: of one quality, whatever the
    caption."""
    args = defaults(cli.Args, name)
    captions = sorted({*read_prompts(args.prompts), *read_prompts(args.eval_prompts)})
    vectors = bias.vectors_of(
        models.load(name, torch.float32, captions, **args.model_settings()), captions
    )
    generator = torch.Generator().manual_seed(seed)
    images = shapes.render(shapes.sample_scenes(captions, seed=seed))
    strength = 0.05 * torch.rand(len(images), 1, 1, 1, generator=generator)
    images = (images + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    rated = {"verifier": "verifier", "clip": "clip", "biased": "lab/study_rewards.py:Biased"}
    rewards = Rewards(replace(args, reward=tuple(rated.values()), **PROXY), captions)
    scores = list(bias.scores_of(rewards, images, captions).values())
    numbers = {}
    for clusters in (10, 15, 20):
        labels = bias.clustered(vectors, clusters, seed)
        for reward, value in zip(rated, scores):
            found = bias.against_chance(value, labels, clusters, seed, shuffles=SHUFFLES)
            numbers |= {
                f"{reward}_{clusters}": found["beyond_chance"],
                f"{reward}_{clusters}_kappa": found["kappa"],
            }
    return {"numbers": numbers}


# --- Samples to look at ---


def samples(name, seed):
    """Those of the base model, for the pictures."""
    args = defaults(cli.Args, name)
    return {"pictures": pictures(args, models.load(name, torch.float32, **args.model_settings()))}


def pictures(args, model):
    """{"captions", "truth": [n], "png": [n] base64, of 64 colours, a clip's frames side by side}"""
    prompts = [prompt for i, prompt in enumerate(read_prompts(args.eval_prompts)) if i in SHOWN]
    prompts = prompts[:4] if args.frames else prompts
    media, captions = sampled(args, model, prompts), [caption_of(prompt) for prompt in prompts]
    verify = motion.verify if media.ndim == 5 else verifier.verify
    truth = [float(f"{score:.3f}") for score in verify(media, captions)["score"].tolist()]
    strips = media if media.ndim == 4 else torch.cat(media.unbind(1), dim=-1)
    return {"captions": captions, "truth": truth, "png": [png(strip) for strip in strips]}


def png(image):
    """[3, H, W] in [0, 1] -> base64"""
    file = io.BytesIO()
    levels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
    Image.fromarray(np.ascontiguousarray(levels)).quantize(64).save(
        file, format="PNG", optimize=True
    )
    return base64.b64encode(file.getvalue()).decode()


PROBES = {"loudness": loudness, "bias": bias_, "samples": samples}
