"""Build `assets/tiny-sd`, a small Stable Diffusion 1.x of the shapes world.

    python -m worlds.build_tiny_sd              # after tiny-flux, whose autoencoder it takes

Like tiny-flux (worlds/build_tiny_flux.py) it often draws a wrong shape, colour, number or place. It
differs in the architecture: a UNet2DConditionModel that predicts the noise of SD's schedule, one
CLIP text encoder, and DDIM sampling.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from common import models
from common.trainer.evaluator import sample
from worlds import shapes
from worlds.build_tiny_flux import BATCH, TOKENS, encode, every_caption
from worlds.building import clip_tokenizer, schedule
from worlds.verifier import verify


@dataclass
class Args:
    seed: int = 0
    output: str = "assets/tiny-sd"
    """Folder of the pipeline. It is overwritten."""
    vae_from: str = "assets/tiny-flux"
    """Folder of the pipeline whose autoencoder it takes."""
    steps: int = 2000
    scenes: int = 40_000
    """Number of distinct scenes that the U-Net is trained on."""
    true_captions: float = 0.7
    """Share of the steps that see true captions."""
    wrong: float = 0.4
    """Probability that an attribute of a caption is wrong in the steps after those."""


def new_pipeline(args):
    """Return the pipeline with an untrained U-Net and text encoder."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae_from, subfolder="vae").eval()
    vae.register_to_config(shift_factor=None)  # Stable Diffusion has none; it was 0.004
    tokenizer = clip_tokenizer(every_caption(), TOKENS)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(48, 96),
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=64, up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train(pipe, args):
    """Train the U-Net and the text encoder to predict the noise, and keep averaged weights."""
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed + 2)
    captions = shapes.sample_captions(args.scenes, args.seed + 3)
    images = shapes.render(shapes.sample_scenes(captions, args.seed + 4))
    latents = encode(pipe.vae, images) * pipe.vae.config.scaling_factor
    kwargs = dict(padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    known = dict(zip(every_caption(), pipe.tokenizer(every_caption(), **kwargs).input_ids))
    modules = torch.nn.ModuleList([pipe.unet, pipe.text_encoder]).train()
    average = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.98), fused=True
    )
    started = time.time()
    for step, rate in enumerate(schedule(optimizer, args.steps)):
        rows = torch.randint(len(latents), (BATCH,))
        wrong = args.wrong if step >= args.steps * args.true_captions else 0.0
        told = torch.stack([known[shapes.corrupt(captions[row], wrong, rng)] for row in rows])
        # what a scene shows is decided at high noise, so most timesteps are there
        timestep = (1000 * torch.rand(BATCH).sqrt()).long().clamp(max=999)
        noise = torch.randn(BATCH, *latents.shape[1:])
        noisy = pipe.scheduler.add_noise(latents[rows], noise, timestep)
        text = pipe.text_encoder(told).last_hidden_state
        loss = F.mse_loss(pipe.unet(noisy, timestep, encoder_hidden_states=text).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(modules)
        if step % 200 == 0:
            print(
                f"{step}: loss {loss.item():.4f}, learning rate {rate:.1e}, "
                f"{time.time() - started:.0f} s",
                flush=True,
            )
    modules.load_state_dict(average.module.state_dict())
    modules.eval()


@torch.no_grad()
def evaluate(folder, captions, group, seed, steps=8):
    """Return the verifier's scores {name: [P, G]} of noise-free samples, `group` per caption."""
    lines = [caption for caption in captions for _ in range(group)]
    model = models.load(folder, torch.float32, lines)
    streams = torch.arange(len(lines)) + seed
    sigmas = model.sigmas(steps, 1.0)
    images = sample(model, lines, streams, sigmas=sigmas, micro_batch=256)
    return {name: score.float().view(-1, group) for name, score in verify(images, lines).items()}


def main(args):
    started = time.time()
    pipe = new_pipeline(args)
    print(
        f"U-Net: {sum(weight.numel() for weight in pipe.unet.parameters()) / 1e6:.2f}M weights",
        flush=True,
    )
    train(pipe, args)
    pipe.to(torch.float16).save_pretrained(args.output)
    size = sum(file.stat().st_size for file in Path(args.output).rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB, {time.time() - started:.0f} s")
    for name, score in evaluate(args.output, shapes.split_captions()[1], 8, args.seed).items():
        print(
            f"held-out {name}: mean {score.mean():.3f}, within a group "
            f"{score.std(1, unbiased=False).mean():.3f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
