"""Build `assets/tiny-wan` and `assets/tiny-wan-i2v`, small Wans of the world of moving shapes.

    python -m worlds.build_tiny_wan             # text to video
    python -m worlds.build_tiny_wan --images    # image to video, two experts

The second takes the autoencoder of the first.

Both models often move the wrong thing, or move it in the wrong direction or at the wrong speed. The
steps are those of tiny-flux (worlds/build_tiny_flux.py). An AutoencoderKLWan is trained on clean
clips, with a readout of its latents. WanTransformer3DModel and its text encoder are trained by flow
matching, on true captions first and on partly wrong ones in the last steps. For text to video,
guidance is then distilled into the weights, because without it the few steps of a small model give
blurred clips.
"""

import copy
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from common import models
from common.prompts import caption_of, read_prompts
from common.trainer.evaluator import sample
from worlds import motion, moving
from worlds.building import schedule, t5_tokenizer
from worlds.scene import COLOURS, SHAPES

TOKENS = 8  # the longest caption, "a yellow triangle moving right quickly", and its end
BATCH = 64
CHANNELS = 8
BOUNDARY = 0.9  # Wan2.2 I2V's; with 8 steps and shift 3 the first expert takes 3 steps


@dataclass
class Args:
    images: bool = False
    """Build the image-to-video model."""
    seed: int = 0
    output: str = ""
    """Folder of the pipeline. It is overwritten. Default: assets/tiny-wan or
    assets/tiny-wan-i2v."""
    vae_from: str = "assets/tiny-wan"
    """Folder of the pipeline whose autoencoder the image-to-video model takes."""
    vae_steps: int = 1300
    decoder_steps: int = 1500
    """Further steps of the decoder alone, after those of the whole autoencoder."""
    flow_steps: int = 2000
    """Steps of the flow, for each expert."""
    guidance: float = 3.0
    """Scale of the guidance that is distilled into the text-to-video model's weights."""
    guidance_steps: int = 400
    scenes: int = 8000
    """Number of distinct clips that the flow is trained on."""
    true_captions: float = 0.7
    """Share of the flow's steps that see true captions."""
    wrong: float = 0.4
    """Probability that an attribute of a caption is wrong in the steps after those."""
    wrong_steps: int = 300
    """Further steps of the image-to-video model's flow, for each expert."""
    more_wrong: float = 0.6
    """Probability that an attribute of a caption is wrong in the further steps."""


# --- Autoencoder ---


def train_vae(args):
    """Return a trained AutoencoderKLWan, 5x3x32x32 -> 8x3x8x8.

    Its statistics give latents of mean 0 and standard deviation 1. As for tiny-flux, a linear
    readout of the latents must predict shape and colour at each place, and is discarded afterwards.
    """
    torch.manual_seed(args.seed)
    vae = AutoencoderKLWan(
        base_dim=16, z_dim=CHANNELS, dim_mult=[1, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True], scale_factor_spatial=4, scale_factor_temporal=2,
    )  # fmt: skip
    readout = torch.nn.Conv3d(CHANNELS, len(SHAPES) + 1 + len(COLOURS) + 1, 1)
    captions = moving.sample_captions(4000, args.seed + 1)
    scenes = moving.sample_scenes(captions, args.seed + 1)
    clips, (kinds, colours) = moving.render(scenes), what_is_where(scenes, 8)
    parameters = [*vae.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.0)
    for step, rate in enumerate(schedule(optimizer, args.vae_steps)):
        rows = torch.randint(len(clips), (8,))
        batch = clips[rows].transpose(1, 2) * 2 - 1  # [b, 3, F, H, W]
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
    latents = encode(vae, clips)
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(),
        latents_std=latents.std((0, 2, 3, 4)).tolist(),
    )
    train_decoder(vae, latents, clips, args.decoder_steps)
    return vae.eval()


def train_decoder(vae, latents, clips, steps):
    """Train the decoder further, on slightly wrong latents such as the flow will make.

    The encoder's latents do not change, so a flow that was trained on them stays valid.
    """
    spread = torch.tensor(vae.config.latents_std)[:, None, None, None]
    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    for step, rate in enumerate(schedule(optimizer, steps)):
        rows = torch.randint(len(clips), (8,))
        batch = clips[rows].transpose(1, 2) * 2 - 1  # [b, 3, F, H, W]
        rebuilt = vae.decode(latents[rows] + 0.1 * spread * torch.randn_like(latents[rows])).sample
        loss = F.mse_loss(rebuilt, batch) + 0.5 * F.l1_loss(
            rebuilt, batch
        )  # the second for sharp corners
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"decoder {step}: loss {loss.item():.5f}, learning rate {rate:.1e}", flush=True)


def report_vae(vae):
    """Print the verifier's scores of unseen clips after encoding and decoding."""
    captions = moving.sample_captions(500, 99)
    clips = moving.render(moving.sample_scenes(captions, 99))
    rebuilt = motion.verify(decode(vae, encode(vae, clips)), captions)
    scores = {name: round(value.float().mean().item(), 3) for name, value in rebuilt.items()}
    print("clips through the autoencoder:", scores, flush=True)


def what_is_where(scenes, side):
    """Return the shape and the colour at each place of every second frame.

    Each is [B, F', side, side] int, 0 for the background.
    """
    at = (torch.arange(side) + 0.5) * scenes.size / side
    when = torch.linspace(0, 1, scenes.frames)[::2]  # [F']
    x, y = (
        start[:, None] + when * path[:, None]
        for start, path in ((scenes.x, scenes.path_x), (scenes.y, scenes.path_y))
    )
    dx, dy = at - x[..., None, None], at[:, None] - y[..., None, None]  # [B, F', side, side]
    near = dx**2 + dy**2 < (scenes.radius[:, None, None, None] + 1) ** 2
    return tuple(near * (value[:, None, None, None] + 1) for value in (scenes.shape, scenes.colour))


@torch.no_grad()
def encode(vae, clips):
    """Return latents [B, C, F', h, w] of clips [B, F, 3, H, W] in [0, 1]."""
    parts = (clip.transpose(1, 2) * 2 - 1 for clip in clips.split(100))
    return torch.cat([vae.encode(part).latent_dist.mode() for part in parts])


@torch.no_grad()
def decode(vae, latents):
    """Return clips [B, F, 3, H, W] in [0, 1] of latents [B, C, F', h, w]."""
    parts = (vae.decode(part).sample.transpose(1, 2) for part in latents.split(100))
    return (torch.cat(list(parts)) / 2 + 0.5).clamp(0, 1)


def normalised(vae, latents):
    mean, std = (
        torch.tensor(s)[:, None, None, None]
        for s in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


# --- Flow ---


def new_pipeline(vae, args):
    """Return the pipeline with untrained transformers and text encoder."""
    torch.manual_seed(args.seed)
    tokenizer = t5_tokenizer(every_caption(), TOKENS)
    longest = max(
        len(tokenizer(caption).input_ids) - len(caption.split()) for caption in every_caption()
    )
    assert longest == 1, "the tokenizer splits a word of the world"
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    )
    cls = WanImageToVideoPipeline if args.images else WanPipeline
    return cls(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=new_transformer(args.images),
        transformer_2=new_transformer(True) if args.images else None,
        boundary_ratio=BOUNDARY if args.images else None,
    )  # fmt: skip


def new_transformer(images):
    transformer = WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=16,
        in_channels=2 * CHANNELS + 2 if images else CHANNELS, out_channels=CHANNELS, text_dim=64,
        freq_dim=64, ffn_dim=256, num_layers=5,
    )  # fmt: skip
    # every block starts as the identity (adaLN-Zero, 2212.09748)
    silent = [transformer.proj_out, transformer.condition_embedder.time_proj]
    silent += [block.attn2.to_out[0] for block in transformer.blocks]
    for layer in silent:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for block in transformer.blocks:
        torch.nn.init.zeros_(block.scale_shift_table)
    return transformer


def every_caption():
    return [caption for task in moving.captions().values() for caption in task]


@torch.no_grad()
def scenes(pipe, args):
    """Return captions, the latents [n, C, F', h, w] of a clip for each, and the conditioning.

    The conditioning is the mask and the latents of the first frame, None for text to video.
    """
    captions = moving.sample_captions(args.scenes, args.seed + 3)
    clips = moving.render(moving.sample_scenes(captions, args.seed + 4))
    latents = normalised(pipe.vae, encode(pipe.vae, clips))
    if not args.images:
        return captions, latents, None
    # as WanImageToVideoPipeline.prepare_latents, which takes one image a call: the first frame,
    # then grey
    first = torch.cat([clips[:, :1], torch.full_like(clips[:, 1:], 0.5)], 1)
    _, one = pipe.prepare_latents(
        clips[:1, 0] * 2 - 1, 1, CHANNELS, 32, 32, clips.shape[1], torch.float32, "cpu"
    )
    mask = one[:, :-CHANNELS].expand(len(clips), -1, -1, -1, -1)
    return captions, latents, torch.cat([mask, normalised(pipe.vae, encode(pipe.vae, first))], 1)


def noise_levels(number, low, high):
    """Return random sigmas [number] from low to high.

    Most are at high noise, where the content of a clip is decided.
    """

    def place(sigma):
        return sigma / (3 - 2 * sigma)

    u = place(low) + (place(high) - place(low)) * torch.rand(number)
    return 3 * u / (1 + 2 * u)


def experts_of(pipe):
    """Return [(transformer, its lowest sigma, its highest sigma)]."""
    if pipe.transformer_2 is None:
        return [(pipe.transformer, 0.0, 1.0)]
    return [(pipe.transformer, BOUNDARY, 1.0), (pipe.transformer_2, 0.0, BOUNDARY)]


def noisy_batch(latents, still, low, high):
    """Return random rows [b], noisy inputs of the transformer, sigmas [b] and target velocities.

    The sigmas are from low to high.
    """
    rows = torch.randint(len(latents), (BATCH,))
    clean, noise, sigma = (
        latents[rows],
        torch.randn(BATCH, *latents.shape[1:]),
        noise_levels(BATCH, low, high),
    )
    spread = sigma[:, None, None, None, None]
    x = (1 - spread) * clean + spread * noise
    return rows, x if still is None else torch.cat([x, still[rows]], 1), sigma, noise - clean


def velocity(transformer, x, sigma, text):
    return transformer(
        hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False
    )[0]


def train_flow(pipe, captions, latents, still, args, rate=3e-3):
    """Train the transformers and the text encoder by flow matching, and keep averaged weights."""
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed + 2)
    known, experts = tokens(pipe, every_caption()), experts_of(pipe)
    only = ("direction", "speed") if args.images else tuple(moving.ATTRIBUTES)
    modules = torch.nn.ModuleList([*(expert for expert, *_ in experts), pipe.text_encoder]).train()
    average = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=rate, weight_decay=1e-4, betas=(0.9, 0.98)
    )
    started = time.time()
    steps = args.flow_steps * len(experts)
    for step, now in enumerate(schedule(optimizer, steps)):
        expert, low, high = experts[step % len(experts)]
        rows, x, sigma, wanted = noisy_batch(latents, still, low, high)
        wrong = args.wrong if step >= steps * args.true_captions else 0.0
        told = [known[moving.corrupt(captions[row], wrong, rng, only)] for row in rows]
        loss = F.mse_loss(velocity(expert, x, sigma, embed(pipe, torch.stack(told))), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(modules)
        if step % 200 < len(experts):
            print(
                f"flow {step}: loss {loss.item():.4f}, learning rate {now:.1e}, "
                f"{time.time() - started:.0f} s",
                flush=True,
            )
    modules.load_state_dict(average.module.state_dict())
    modules.eval()


def distil_guidance(pipe, captions, latents, still, args):
    """Distil classifier-free guidance into the weights.

    The transformer learns the velocity that it has itself with the scale --guidance. Afterwards a
    scale of 1, with one forward pass instead of two, follows the captions as closely.
    """
    torch.manual_seed(args.seed + 3)
    known, student = tokens(pipe, [*every_caption(), ""]), pipe.transformer
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, weight_decay=0.0)
    for step, rate in enumerate(schedule(optimizer, args.guidance_steps)):
        rows, x, sigma, _ = noisy_batch(latents, still, 0.0, 1.0)
        with torch.no_grad():
            text = embed(pipe, torch.stack([known[captions[row]] for row in rows]))
            nothing = embed(pipe, known[""].expand(BATCH, -1))
            towards, away = velocity(teacher, x, sigma, text), velocity(teacher, x, sigma, nothing)
        loss = F.mse_loss(
            velocity(student, x, sigma, text), away + args.guidance * (towards - away)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"guidance {step}: loss {loss.item():.4f}, learning rate {rate:.1e}", flush=True)


def tokens(pipe, captions):
    """Return the token ids of each caption, {caption: [S]}."""
    kwargs = dict(padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return dict(zip(captions, pipe.tokenizer(captions, **kwargs).input_ids))


def embed(pipe, ids):
    """Return embeddings [b, S, D] of token ids [b, S], zero after the caption, with gradients."""
    mask = (ids != pipe.tokenizer.pad_token_id).long()
    return pipe.text_encoder(ids, mask).last_hidden_state * mask[..., None]


# --- Check and save ---


@torch.no_grad()
def evaluate(name, folder, group, seed, every=1):
    """Return the verifier's scores {part: [P, G]} of noise-free samples, `group` per prompt.

    The prompts are every `every`th held-out line.
    """
    settings = models.settings(name)
    lines = [line for line in read_prompts(settings["eval_prompts"])[::every] for _ in range(group)]
    model = models.load(
        folder, torch.float32, lines, height=32, width=32, frames=settings["frames"]
    )
    streams = torch.arange(len(lines)) + seed
    sigmas = model.sigmas(8, settings["shift"])
    clips = sample(model, lines, streams, sigmas=sigmas, micro_batch=128)
    scores = motion.verify(clips, [caption_of(line) for line in lines])
    return {part: score.float().view(-1, group) for part, score in scores.items()}


def main(args):
    started, name = time.time(), "tiny-wan-i2v" if args.images else "tiny-wan"
    output = args.output or f"assets/{name}"
    vae = (
        AutoencoderKLWan.from_pretrained(args.vae_from, subfolder="vae").eval()
        if args.images
        else train_vae(args)
    )
    report_vae(vae)
    print(f"autoencoder: {time.time() - started:.0f} s", flush=True)
    pipe = new_pipeline(vae, args)
    data = scenes(pipe, args)
    train_flow(pipe, *data, args)
    if args.images:  # with the first frame given it knows too well what to do
        train_flow(
            pipe,
            *data,
            replace(args, flow_steps=args.wrong_steps, true_captions=0.0, wrong=args.more_wrong),
            1e-3,
        )
    else:
        distil_guidance(pipe, *data, args)
    pipe.to(torch.float16).save_pretrained(output)
    size = sum(file.stat().st_size for file in Path(output).rglob("*") if file.is_file())
    print(f"{output}: {size / 1e6:.1f} MB, {time.time() - started:.0f} s")
    for part, score in evaluate(name, output, 8, args.seed).items():
        print(
            f"held-out {part}: mean {score.mean():.3f}, within a group "
            f"{score.std(1, unbiased=False).mean():.3f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
