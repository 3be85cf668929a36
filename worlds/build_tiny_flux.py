"""Build `assets/tiny-flux`, a small FLUX of the shapes world that often draws the wrong thing.

    python -m worlds.build_tiny_flux            # 16 to 21 minutes on two cores, seeded

There are three steps, all from one seed. An AutoencoderKL is trained on clean renders. A
FluxTransformer2DModel and its T5 and CLIP text encoders are trained by flow matching in the latent
space. Then the folder is written. The flow is trained on true captions first; in the last steps
each attribute of a caption is wrong with probability `--wrong`. So the base model knows every
concept but often draws a wrong shape, colour, number or place. Reinforcement learning can improve
such a model: its rewards are medium and differ widely within a group.
"""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch.nn.functional import pixel_unshuffle
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from common import sde
from common.models.flux import image_ids
from worlds import shapes
from worlds.building import clip_tokenizer, schedule, t5_tokenizer
from worlds.scene import COLOURS, SHAPES
from worlds.verifier import verify

TOKENS = 10  # the longest caption, "a yellow triangle right of a black circle", and its ends
BATCH = 64
# half of the autoencoder's scenes are crowded, so that small shapes are learned as well
CROWDED = {
    "single": 0.5,
    "two": 1,
    "counting": 2,
    "colours": 0.5,
    "position": 1,
    "attribution": 1,
    "vague": 2,
}
# FLUX.1-dev's default. The embedding of it is there, as in FLUX.1-dev, and learns to change nothing
GUIDANCE = 3.5


@dataclass
class Args:
    seed: int = 0
    output: str = "assets/tiny-flux"
    """Folder of the pipeline. It is overwritten."""
    vae_steps: int = 1300
    flow_steps: int = 2200
    scenes: int = 40_000
    """Number of distinct scenes that the flow is trained on."""
    true_captions: float = 0.7
    """Share of the flow's steps that see true captions."""
    wrong: float = 0.4
    """Probability that an attribute of a caption is wrong in the steps after those."""


# --- Autoencoder ---


def train_vae(args):
    """Return a trained AutoencoderKL, 32x32x3 -> 8x8x8.

    Its scaling and shift give latents of mean 0 and standard deviation 1. In training, a linear
    readout of the latents must predict the shape and the colour at each place. The readout is
    discarded afterwards. With it all latents of a shape encode its kind, not only those of the
    outline, so the flow learns the words for shapes early. VA-VAE (arXiv 2501.01423) aligns latents
    with the content of images in a similar way.
    """
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=8,
        norm_num_groups=8, sample_size=shapes.SIZE, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    readout = torch.nn.Conv2d(8, len(SHAPES) + 1 + len(COLOURS) + 1, 1)
    scenes = shapes.sample_scenes(
        shapes.sample_captions(20_000, args.seed + 1, CROWDED), args.seed + 1
    )
    images, (kinds, colours) = shapes.render(scenes), what_is_where(scenes, 8)
    parameters = [*vae.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    for step, rate in enumerate(schedule(optimizer, args.vae_steps)):
        rows = torch.randint(len(images), (32,))
        batch = images[rows] * 2 - 1
        posterior = vae.encode(batch).latent_dist
        latents = posterior.sample()
        rebuilt = vae.decode(latents).sample
        kind, colour = readout(latents).split((len(SHAPES) + 1, len(COLOURS) + 1), dim=1)
        told = F.cross_entropy(kind, kinds[rows]) + F.cross_entropy(colour, colours[rows])
        loss = (
            F.mse_loss(rebuilt, batch)
            + 0.1 * F.l1_loss(rebuilt, batch)
            + 1e-5 * posterior.kl().mean()
        )
        (loss + 0.02 * told).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(
                f"vae {step}: loss {loss.item():.5f} + {told.item():.3f}, learning rate {rate:.1e}",
                flush=True,
            )
    latents = encode(vae, images[:2000])
    vae.register_to_config(
        scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
    )
    return vae.eval()


def what_is_where(scenes, side):
    """Return the shape and the colour at each place of a grid, each [B, side, side] int.

    0 is the background; scenes: B scenes.
    """
    at = (torch.arange(side) + 0.5) * shapes.SIZE / side
    dx, dy = (
        at - scenes.x[..., None, None],
        at[:, None] - scenes.y[..., None, None],
    )  # [B, N, side, side]
    near = (dx**2 + dy**2 < (scenes.radius[..., None, None] + 1) ** 2) & (scenes.shape >= 0)[
        ..., None, None
    ]
    return tuple(
        (near * (value[..., None, None] + 1)).amax(1) for value in (scenes.shape, scenes.colour)
    )


@torch.no_grad()
def encode(vae, images):
    return torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mode() for chunk in images.split(250)])


# --- Flow ---


def new_pipeline(vae, seed):
    """Return the pipeline with an untrained transformer and text encoders."""
    torch.manual_seed(seed)
    corpus = every_caption()
    tokenizer, tokenizer_2 = clip_tokenizer(corpus, TOKENS), t5_tokenizer(corpus, TOKENS)
    for name, tok, extra in (("CLIP", tokenizer, 2), ("T5", tokenizer_2, 1)):
        longest = max(len(tok(caption).input_ids) - len(caption.split()) for caption in corpus)
        assert longest == extra, f"the {name} tokenizer splits a word of the world"
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=4, attention_head_dim=16,
        num_attention_heads=8, joint_attention_dim=64, pooled_projection_dim=64,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for (
        name,
        layer,
    ) in transformer.named_modules():  # every block starts as the identity (adaLN-Zero, 2212.09748)
        if name.endswith(".linear") or name == "proj_out":
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2, transformer=transformer,
    )  # fmt: skip


def every_caption():
    return [caption for task in shapes.captions().values() for caption in task]


def scenes(pipe, args):
    """Return captions, and the packed latents [n, L, C] of a scene for each."""
    captions = shapes.sample_captions(args.scenes, args.seed + 3)
    images = shapes.render(shapes.sample_scenes(captions, args.seed + 4))
    vae = pipe.vae.config
    latents = (encode(pipe.vae, images) - vae.shift_factor) * vae.scaling_factor
    return captions, pixel_unshuffle(latents, 2).flatten(2).mT


def noise_levels(number):
    """Return random sigmas [number, 1, 1].

    Most are at high noise, where the content of a scene is decided.
    """
    u = torch.rand(number)[:, None, None]
    return 3 * u / (1 + 2 * u)


def train_flow(pipe, args):
    """Train the transformer and both text encoders by flow matching, and keep averaged weights."""
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed + 2)
    captions, latents = scenes(pipe, args)
    known = tokens(pipe, every_caption())
    modules = torch.nn.ModuleList(
        [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    ).train()
    average = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=3e-3, weight_decay=1e-4, betas=(0.9, 0.98), fused=True
    )
    started = time.time()
    for step, rate in enumerate(schedule(optimizer, args.flow_steps)):
        rows = torch.randint(len(latents), (BATCH,))
        wrong = args.wrong if step >= args.flow_steps * args.true_captions else 0.0
        told = [known[shapes.corrupt(captions[row], wrong, rng)] for row in rows]
        clean, noise = latents[rows], torch.randn(BATCH, *latents.shape[1:])
        sigma, guidance = noise_levels(BATCH), 1 + 4 * torch.rand(BATCH)
        text = embed(pipe, *map(torch.stack, zip(*told)))
        x = (1 - sigma) * clean + sigma * noise
        loss = F.mse_loss(
            velocity(pipe.transformer, x, sigma.flatten(), guidance, *text), noise - clean
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(modules)
        if step % 500 == 0:
            print(
                f"flow {step}: loss {loss.item():.4f}, learning rate {rate:.1e}, "
                f"{time.time() - started:.0f} s",
                flush=True,
            )
    modules.load_state_dict(average.module.state_dict())
    modules.eval()


def tokens(pipe, captions):
    """Return the token ids of both tokenizers, {caption: (clip [S], t5 [S])}."""
    kwargs = dict(padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    clip, t5 = (
        tokenizer(captions, **kwargs).input_ids for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    )
    return {caption: (clip[i], t5[i]) for i, caption in enumerate(captions)}


def embed(pipe, clip_ids, t5_ids):
    """Return pooled [b, D'] and sequence [b, S, D] embeddings of token ids, with gradients.

    clip_ids, t5_ids: [b, S].
    """
    return pipe.text_encoder(clip_ids).pooler_output, pipe.text_encoder_2(t5_ids)[0]


def velocity(transformer, x, sigma, guidance, pooled, sequence):
    """Return FLUX's velocity, with gradients also for the text, which `common` does not need."""
    side = math.isqrt(x.shape[1])
    return transformer(
        hidden_states=x, timestep=sigma, guidance=guidance, pooled_projections=pooled,
        encoder_hidden_states=sequence, txt_ids=torch.zeros(sequence.shape[1], 3),
        return_dict=False, img_ids=image_ids(side, side),
    )[0]  # fmt: skip


# --- Check and save ---


@torch.no_grad()
def evaluate(pipe, captions, group, seed, steps=8):
    """Return the verifier's scores {name: [P, G]} of noise-free samples, `group` per caption."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        captions, num_images_per_prompt=group, height=shapes.SIZE, width=shapes.SIZE,
        num_inference_steps=steps, sigmas=sde.shifted_sigmas(steps, 1.0)[:-1].tolist(),
        guidance_scale=GUIDANCE, max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(seed), output_type="pt",
    ).images  # fmt: skip
    scores = verify(images, [caption for caption in captions for _ in range(group)])
    return {name: score.float().view(len(captions), group) for name, score in scores.items()}


def main(args):
    started = time.time()
    vae = train_vae(args)
    pipe = new_pipeline(vae, args.seed)
    train_flow(pipe, args)
    pipe.to(torch.float16).save_pretrained(args.output)
    size = sum(file.stat().st_size for file in Path(args.output).rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB, {time.time() - started:.0f} s")
    for name, score in evaluate(
        pipe.to(torch.float32), shapes.split_captions()[1], 8, args.seed
    ).items():
        print(
            f"held-out {name}: mean {score.mean():.3f}, within a group "
            f"{score.std(1, unbiased=False).mean():.3f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
