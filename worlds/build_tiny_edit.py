"""Build `assets/tiny-edit`, a small FLUX Kontext of the edit world that often makes the wrong edit.

    python -m worlds.build_tiny_edit            # seeded

It starts from `assets/tiny-flux`: the same autoencoder, and the weights of transformer and text
encoders as far as words and positions are the same. Then all but the autoencoder is trained by flow
matching, with the latents of the source as reference tokens. In the last steps each attribute of an
instruction is wrong with probability `--wrong`, and the result has an object of another colour with
probability `--careless`. So the base model knows every edit but often makes another one.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import FluxKontextPipeline, FluxPipeline
from torch.nn.functional import pixel_unshuffle
from transformers import CLIPTextModel, T5EncoderModel

from common import models
from common.models.flux import FluxKontext
from common.prompts import caption_of, read_prompts
from common.prompts.pictures import sources
from common.trainer.evaluator import sample
from worlds import edits
from worlds.build_tiny_flux import embed, encode, noise_levels
from worlds.building import clip_tokenizer, schedule, t5_tokenizer
from worlds.scene import COLOURS, RELATIONS, SHAPES
from worlds.shapes import render

TOKENS = 12  # the longest instruction, "add a yellow triangle right of the black circle", and ends
BATCH = 64
WORDS = " ".join(["make the a an remove add it", *COLOURS, *SHAPES, *RELATIONS])


@dataclass
class Args:
    seed: int = 0
    output: str = "assets/tiny-edit"
    """Folder of the pipeline. It is overwritten."""
    start: str = "assets/tiny-flux"
    """Folder of the pipeline whose autoencoder and weights it starts from."""
    steps: int = 2000
    scenes: int = 20_000
    """Number of distinct edits that the flow is trained on, and as many again with faults."""
    true_share: float = 0.75
    """Share of the steps that see true instructions and results."""
    wrong: float = 0.35
    """Probability that an attribute of an instruction is wrong in the steps after those."""
    careless: float = 0.25
    """Probability that the result of an edit has another fault in the steps after those."""
    rate: float = 2e-3
    """Peak learning rate."""


def new_pipeline(start: str) -> FluxKontextPipeline:
    """Return the pipeline with the weights that instructions share with captions."""
    flux = FluxPipeline.from_pretrained(start, dtype=torch.float32)
    tokenizer, tokenizer_2 = clip_tokenizer([WORDS], TOKENS), t5_tokenizer([WORDS], TOKENS)
    text, text_2 = flux.text_encoder.config, flux.text_encoder_2.config
    text.vocab_size, text.max_position_embeddings = len(tokenizer), TOKENS
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    text_2.vocab_size = len(tokenizer_2)
    encoder, encoder_2 = CLIPTextModel(text), T5EncoderModel(text_2)
    copy(flux.text_encoder, encoder, flux.tokenizer, tokenizer)
    copy(flux.text_encoder_2, encoder_2, flux.tokenizer_2, tokenizer_2)
    return FluxKontextPipeline(
        scheduler=flux.scheduler, vae=flux.vae, transformer=flux.transformer,
        text_encoder=encoder, tokenizer=tokenizer,
        text_encoder_2=encoder_2, tokenizer_2=tokenizer_2,
    )  # fmt: skip


@torch.no_grad()
def copy(old, new, old_tokenizer, tokenizer):
    """Copy the weights of a text encoder; of embeddings the rows of the tokens that both know."""
    before, words = old.state_dict(), old_tokenizer.get_vocab()
    both = [(words[word], index) for word, index in tokenizer.get_vocab().items() if word in words]
    from_rows, to_rows = torch.tensor(both).T
    for name, weight in new.state_dict().items():
        if weight.shape == before[name].shape:
            weight.copy_(before[name])
        elif len(weight) == len(tokenizer):
            weight[to_rows] = before[name][from_rows]
        else:  # positions
            weight[: len(before[name])] = before[name]


def tokens(vae, images):
    """Return the packed latents [n, L, C] of images [n, 3, H, W] in [0, 1]."""
    latents = (encode(vae, images) - vae.config.shift_factor) * vae.config.scaling_factor
    return pixel_unshuffle(latents, 2).flatten(2).mT


def data(vae, args, careless):
    """Return edits, the shapes of their sources, and latents [n, L, C] of sources and results."""
    wanted, shapes, before, after = edits.sample(args.scenes, args.seed + 1, careless)
    return wanted, shapes, tokens(vae, render(before)), tokens(vae, render(after))


def train(pipe, args):
    """Train the transformer and both text encoders by flow matching, and keep averaged weights."""
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed + 2)
    known = {}
    modules = torch.nn.ModuleList(
        [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    ).train()
    average = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=args.rate, weight_decay=1e-4, betas=(0.9, 0.98), fused=True
    )
    ids = FluxKontext(pipe, height=edits.SIZE, width=edits.SIZE).positions("cpu")
    wanted, shapes, before, after = data(pipe.vae, args, careless=0.0)
    started = time.time()
    for step, rate in enumerate(schedule(optimizer, args.steps)):
        wrong = 0.0
        if step >= args.steps * args.true_share:
            wrong = args.wrong
        if step == int(args.steps * args.true_share):
            wanted, shapes, before, after = data(pipe.vae, args, args.careless)
        rows = torch.randint(len(after), (BATCH,))
        told = [edits.write(edits.corrupt(wanted[row], shapes[row], wrong, rng)) for row in rows]
        clean, noise = after[rows], torch.randn(BATCH, *after.shape[1:])
        sigma, guidance = noise_levels(BATCH), 1 + 4 * torch.rand(BATCH)
        pooled, sequence = embed(pipe, *text_ids(pipe, told, known))
        x = torch.cat([(1 - sigma) * clean + sigma * noise, before[rows]], 1)
        velocity = pipe.transformer(
            hidden_states=x, timestep=sigma.flatten(), guidance=guidance, img_ids=ids,
            pooled_projections=pooled, encoder_hidden_states=sequence,
            txt_ids=torch.zeros(sequence.shape[1], 3), return_dict=False,
        )[0][:, : clean.shape[1]]  # fmt: skip
        loss = F.mse_loss(velocity, noise - clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(modules)
        if step % 50 == 0:
            print(
                f"flow {step}: loss {loss.item():.4f}, learning rate {rate:.1e}, "
                f"{time.time() - started:.0f} s, {time.process_time():.0f} s of a core",
                flush=True,
            )
    modules.load_state_dict(average.module.state_dict())
    modules.eval()


def text_ids(pipe, instructions, known):
    """Return the ids [b, S] of both tokenizers; known: those of instructions that were seen."""
    kwargs = dict(padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    for text in set(instructions) - known.keys():
        known[text] = [
            tokenizer(text, **kwargs).input_ids[0]
            for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
        ]
    return [torch.stack(ids) for ids in zip(*(known[text] for text in instructions))]


@torch.no_grad()
def evaluate(folder, group, seed, every=1):
    """Return the verifier's scores {name: [P, G]} of noise-free samples, `group` per prompt.

    The prompts are every `every`th held-out line.
    """
    prompts = read_prompts(models.ASSETS / "prompts/edits_heldout.txt")[::every]
    lines = [line for line in prompts for _ in range(group)]
    size = edits.SIZE
    model = models.load(folder, torch.float32, lines, height=size, width=size, guidance=3.5)
    streams = torch.arange(len(lines)) + seed
    images = sample(model, lines, streams, sigmas=model.sigmas(8, 1.0), micro_batch=128)
    captions, before = list(map(caption_of, lines)), sources(lines, size, size)[:, 0]
    parts = zip(images.split(128), torch.arange(len(lines)).split(128))
    scores = [edits.verify(x, [captions[i] for i in rows], before[rows]) for x, rows in parts]
    return {
        name: torch.cat([part[name] for part in scores]).float().view(-1, group)
        for name in scores[0]
    }


def main(args):
    started = time.time()
    pipe = new_pipeline(args.start)
    train(pipe, args)
    pipe.to(torch.float16).save_pretrained(args.output)
    size = sum(file.stat().st_size for file in Path(args.output).rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB, {time.time() - started:.0f} s")
    for name, score in evaluate(args.output, 4, args.seed, every=4).items():
        print(
            f"held-out {name}: mean {score.mean():.3f}, within a group "
            f"{score.std(1, unbiased=False).mean():.3f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
