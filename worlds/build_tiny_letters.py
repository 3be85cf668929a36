"""Build `assets/tiny-letters`, a small FLUX that writes words and misspells them.

    python -m worlds.build_tiny_letters         # about ten minutes of one core, seeded

There are four steps, all from one seed. An AutoencoderKL is trained on rendered words. The T5
encoder is taught to say for each letter of a caption which one it is, and the how-manieth, because
FLUX gives its text no positions. A FluxTransformer2DModel and both text encoders are trained by
flow matching in the latent space. Then the folder is written. The flow is trained on true captions
first; in the last steps each letter of a caption is wrong with probability `--wrong`. So the base
model can write every letter but misspells, which reinforcement learning can improve. The words are
random letters: the model never sees a word of the prompt files.
"""

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
from worlds import letters
from worlds.build_tiny_flux import encode
from worlds.building import clip_tokenizer, schedule, t5_tokenizer

T5_TOKENS = 14  # of the longest caption, 'a shop window with "BREAD" on it', and its end
CLIP_TOKENS = 15  # one more, for its beginning
BATCH = 32
PICTURES = 2000  # that the flow is trained on
GRID = letters.HEIGHT // 16, letters.WIDTH // 16  # tokens of a picture: two for each letter


@dataclass
class Args:
    seed: int = 0
    output: str = "assets/tiny-letters"
    """Folder of the pipeline. It is overwritten."""
    vae_steps: int = 400
    text_steps: int = 300
    flow_steps: int = 420
    words: int = 4000
    """Number of distinct pictures that the autoencoder is trained on."""
    true_captions: float = 0.6
    """Share of the flow's steps that see true captions."""
    wrong: float = 0.4
    """Probability that a letter of a caption is wrong in the steps after those."""


# --- Autoencoder ---


def train_vae(args, words, images):
    """Return a trained AutoencoderKL, 32x80x3 -> 4x10x8.

    Its scaling and shift give latents of mean 0 and standard deviation 1. In training a linear
    readout of the latents of a slot must predict its letter, and is discarded afterwards: the flow
    learns letters earlier if the latents encode them (as in worlds/build_tiny_flux.py).
    """
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=8,
        norm_num_groups=4, sample_size=letters.WIDTH, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    readout = torch.nn.Conv2d(8, len(letters.ALPHABET) + 1, kernel_size=(4, 2), stride=(4, 2))
    shown = torch.tensor([slots(word) for word in words])  # [n, slots]
    parameters = [*vae.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    for step, rate in enumerate(schedule(optimizer, args.vae_steps)):
        rows = torch.randint(len(images), (8,))
        batch = images[rows] * 2 - 1
        posterior = vae.encode(batch).latent_dist
        latents = posterior.sample()
        rebuilt = vae.decode(latents).sample
        told = F.cross_entropy(readout(latents)[:, :, 0], shown[rows])
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


def slots(word):
    """Return the index of the letter in each slot, the size of the alphabet for a blank."""
    found = [letters.ALPHABET.index(letter) for letter in word]
    return found + [len(letters.ALPHABET)] * (letters.SLOTS - len(word))


# --- Text ---


def new_pipeline(vae, seed):
    """Return the pipeline with an untrained transformer and text encoders."""
    torch.manual_seed(seed)
    corpus = [form.replace('"{}"', "") for form in letters.CAPTIONS]
    tokenizer = clip_tokenizer(corpus, CLIP_TOKENS, marks='"')
    tokenizer_2 = t5_tokenizer(corpus, T5_TOKENS, letters.ALPHABET, marks='"')
    for caption in letters.captions(["B" * letters.SLOTS] * len(letters.CAPTIONS)):
        assert len(tokenizer(caption).input_ids) <= CLIP_TOKENS, caption
        assert len(tokenizer_2(caption).input_ids) <= T5_TOKENS, caption
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            dropout_rate=0.0, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=4, attention_head_dim=16,
        num_attention_heads=8, joint_attention_dim=64, pooled_projection_dim=32,
        guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for name, layer in transformer.named_modules():
        if name.endswith(".linear") or name == "proj_out":
            # every block starts as the identity (adaLN-Zero, 2212.09748)
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2, transformer=transformer,
    )  # fmt: skip


def tokens(pipe, captions):
    """Return the token ids of both tokenizers: CLIP's [n, S'], T5's [n, S]."""
    return tuple(
        tokenizer(
            captions, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        ).input_ids
        for tokenizer, longest in ((pipe.tokenizer, CLIP_TOKENS), (pipe.tokenizer_2, T5_TOKENS))
    )


def train_text(pipe, args):
    """Teach the T5 encoder letters and their places, through a linear readout of its outputs."""
    torch.manual_seed(args.seed + 1)
    words = letters.random_words(5000, random.Random(args.seed + 1))
    _, ids = tokens(pipe, letters.captions(words))
    alphabet = pipe.tokenizer_2.convert_tokens_to_ids(list(letters.ALPHABET))
    is_letter = torch.isin(ids, torch.tensor(alphabet))
    place = is_letter.cumsum(1) * is_letter - 1  # [n, S]: 0 to 4 for letters, else -1
    encoder = pipe.text_encoder_2.train()
    readout = torch.nn.Linear(encoder.config.d_model, len(letters.ALPHABET) * letters.SLOTS)
    known = dict(zip(alphabet, range(len(alphabet))))
    letter = torch.tensor([[known.get(i, 0) for i in row] for row in ids.tolist()])
    target = torch.where(is_letter, place * len(letters.ALPHABET) + letter, -100)
    parameters = [*encoder.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    for step, _ in enumerate(schedule(optimizer, args.text_steps)):
        rows = torch.randint(len(ids), (64,))
        told = readout(encoder(ids[rows])[0])
        loss = F.cross_entropy(told.flatten(0, 1), target[rows].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"text {step}: loss {loss.item():.4f}", flush=True)


# --- Flow ---


def train_flow(pipe, args, words, images):
    """Train the transformer and both text encoders by flow matching, and keep averaged weights."""
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed + 2)
    vae = pipe.vae.config
    latents = (encode(pipe.vae, images) - vae.shift_factor) * vae.scaling_factor
    latents = pixel_unshuffle(latents, 2).flatten(2).mT  # [n, L, C]
    modules = torch.nn.ModuleList(
        [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    ).train()
    average = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
    )
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=3e-3, weight_decay=1e-4, betas=(0.9, 0.98), fused=True
    )
    started = time.process_time()
    for step, rate in enumerate(schedule(optimizer, args.flow_steps, warmup=50)):
        rows = torch.randint(len(latents), (BATCH,))
        wrong = args.wrong if step >= args.flow_steps * args.true_captions else 0.0
        told = [letters.misspell(words[row], wrong, rng) for row in rows]
        forms = [rng.choice(letters.CAPTIONS) for _ in rows]
        ids = tokens(pipe, [form.format(word) for form, word in zip(forms, told)])
        clean, noise = latents[rows], torch.randn(BATCH, *latents.shape[1:])
        u = torch.rand(BATCH)[:, None, None]
        sigma = 2 * u / (1 + u)  # most at high noise, where letters are decided
        x = (1 - sigma) * clean + sigma * noise
        loss = F.mse_loss(velocity(pipe, x, sigma.flatten(), *ids), noise - clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(modules)
        if step % 100 == 0:
            print(
                f"flow {step}: loss {loss.item():.4f}, learning rate {rate:.1e}, "
                f"{time.process_time() - started:.0f} s of a core",
                flush=True,
            )
    modules.load_state_dict(average.module.state_dict())
    modules.eval()


def velocity(pipe, x, sigma, clip_ids, t5_ids):
    """Return FLUX's velocity, with gradients also for the text, which `common` does not need."""
    sequence = pipe.text_encoder_2(t5_ids)[0]
    return pipe.transformer(
        hidden_states=x, timestep=sigma, encoder_hidden_states=sequence,
        pooled_projections=pipe.text_encoder(clip_ids).pooler_output,
        txt_ids=torch.zeros(sequence.shape[1], 3), img_ids=image_ids(*GRID), return_dict=False,
    )[0]  # fmt: skip


# --- Check and save ---


@torch.no_grad()
def draw(pipe, captions, seed, steps=8):
    """Return noise-free samples of captions, [b, 3, 32, 80] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        captions, height=letters.HEIGHT, width=letters.WIDTH, num_inference_steps=steps,
        sigmas=sde.shifted_sigmas(steps, 1.0)[:-1].tolist(), max_sequence_length=T5_TOKENS,
        generator=torch.Generator().manual_seed(seed), output_type="pt",
    ).images  # fmt: skip


def main(args):
    started = time.process_time()
    words = letters.random_words(args.words, random.Random(args.seed))
    images = letters.render(words)
    pipe = new_pipeline(train_vae(args, words, images), args.seed)
    train_text(pipe, args)
    train_flow(pipe, args, words[:PICTURES], images[:PICTURES])
    pipe.to(torch.float16).save_pretrained(args.output)
    size = sum(file.stat().st_size for file in Path(args.output).rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB, {time.process_time() - started:.0f} s of a core")
    captions = letters.captions(letters.split_words()[1]) * 2
    score = letters.Letters().score(draw(pipe.to(torch.float32), captions, args.seed), captions)
    spread = score.view(2, -1).std(0, unbiased=False).mean()
    print(f"held-out reward letters: mean {score.mean():.3f}, within a caption {spread:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
