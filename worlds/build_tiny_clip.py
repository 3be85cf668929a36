"""Build `assets/tiny-clip`, a small CLIP of the shapes world: a learned reward with some errors.

    python -m worlds.build_tiny_clip            # 6 minutes on one busy core, seeded

It is trained as CLIP (arXiv 2103.00020): each image picks its caption among those of the batch, and
each caption its image. For each image the batch also has a caption that differs in one attribute.
The model is imperfect on purpose: it is small, stops early, and one attribute in ten of its
captions is wrong. If a generator gains on it without gaining on the verifier, that is reward
hacking: `--reward clip --reward-path clip=assets/tiny-clip --watch verifier` shows it.
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file

from common.args import Scored
from common.rewards import Rewards
from worlds import shapes
from worlds.build_tiny_flux import every_caption
from worlds.building import clip_tokenizer, schedule

TOKENS = 10  # the longest caption and its ends
GROUP = 12  # images of a caption in the check, as in training


@dataclass
class Args:
    seed: int = 0
    output: str = "assets/tiny-clip"
    """Folder in open_clip's layout. It is overwritten."""
    steps: int = 500
    batch: int = 128
    wrong: float = 0.1
    """Probability that an attribute of a caption is wrong."""
    scenes: int = 20_000
    """Number of distinct training scenes."""


def configuration(words):
    """Return open_clip_config.json of a model for `words` tokens, with a million weights."""
    vision = dict(image_size=shapes.SIZE, patch_size=8, width=128, head_width=32, layers=4)
    text = dict(context_length=TOKENS, vocab_size=words, width=96, heads=4, layers=2)
    text |= dict(
        hf_tokenizer_name="tokenizer", pool_type="eos", eos_id=1
    )  # of worlds.building.clip_tokenizer
    preprocess = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", resize_mode="squash")
    return {
        "model_cfg": dict(embed_dim=64, vision_cfg=vision, text_cfg=text),
        "preprocess_cfg": preprocess,
    }


def train(args, config, tokenizer):
    """Return the trained open_clip.CLIP in eval mode."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = open_clip.CLIP(**config["model_cfg"])
    captions = shapes.sample_captions(args.scenes, args.seed + 1)
    images = shapes.render(shapes.sample_scenes(captions, args.seed + 2)) * 2 - 1
    ids = tokenizer(
        every_caption(), padding="max_length", max_length=TOKENS, return_tensors="pt"
    ).input_ids
    known = dict(zip(every_caption(), ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    started = time.time()
    for step, rate in enumerate(schedule(optimizer, args.steps)):
        rows = torch.randint(len(images), (args.batch,))
        told = [shapes.corrupt(captions[row], args.wrong, rng) for row in rows]
        words = torch.stack(
            [known[caption] for caption in told + [shapes.change_one(c, rng) for c in told]]
        )
        noisy = images[rows] + 0.1 * torch.randn(args.batch, *images.shape[1:])
        seen, said, scale = model(noisy, words)
        logits = scale * seen @ said.T  # [batch, 2 batch]
        same = torch.tensor(
            [[a == b for b in told] for a in told]
        )  # a caption that is there twice is no mistake
        logits[:, : args.batch][same & ~torch.eye(args.batch, dtype=torch.bool)] = -1e4
        target = torch.arange(args.batch)
        loss = (
            F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : args.batch].T, target)
        ) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=4.6)
        if step % 100 == 0:
            print(
                f"clip {step}: loss {loss.item():.3f}, rate {rate:.1e}, "
                f"{time.time() - started:.0f} s",
                flush=True,
            )
    return model.eval()


def save(model, config, tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


def check(folder, seed, number=None):
    """Return the correlations of the reward `clip` with the verifier, {over all, within a group}.

    They are measured on held-out captions (all, or `number`), with GROUP scenes of each and four
    attributes in ten wrong.
    """
    rng = random.Random(seed)
    captions = [caption for caption in shapes.split_captions()[1][:number] for _ in range(GROUP)]
    images = shapes.render(
        shapes.sample_scenes([shapes.corrupt(c, 0.4, rng) for c in captions], seed + 9)
    )
    paths = (f"clip={folder}",)
    args = Scored(reward=("clip", "verifier"), reward_path=paths, reward_batch=128)
    rewards = Rewards(args, captions)
    scores = rewards.score(images, captions)
    scores = {name: values.view(-1, GROUP) for name, values in scores.items()}
    rewards.check(scores, captions[::GROUP])
    proxy, exact = scores["clip"], scores["verifier"]
    inside = [scores - scores.mean(1, keepdim=True) for scores in (proxy, exact)]
    print(f"{folder}: within a group the score's standard deviation is {inside[0].std():.3f}")
    return {
        name: torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        for name, (a, b) in {"over all": (proxy, exact), "within a group": inside}.items()
    }


def main(args):
    started, folder = time.time(), Path(args.output)
    tokenizer = clip_tokenizer(every_caption(), TOKENS)
    config = configuration(len(tokenizer))
    save(train(args, config, tokenizer), config, tokenizer, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB, {time.time() - started:.0f} s")
    for name, correlation in check(folder, args.seed).items():
        print(f"correlation with the verifier {name}: {correlation:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
