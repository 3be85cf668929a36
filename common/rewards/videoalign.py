"""VideoAlign (arXiv 2501.13918): visual quality, motion quality and text alignment of a clip.

Its model VideoReward is Qwen2-VL-2B with a fixed question about the clip (videoalign.txt, word for
word as in training; MIT, Kling Team). The question has a special token for each of three ratings. A
linear layer computes each rating from the state at its token.
"""

import functools
import json
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from common.errors import InputError
from common.rewards import pixels, weights

REPO, FILE = "KwaiVGI/VideoReward", "checkpoint-11352/model.pth"
BASE = "Qwen/Qwen2-VL-2B-Instruct"
RATED = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
MEAN = (3.6757, 1.1646, 2.8105)  # of the ratings in the training data
STD = (2.2476, 1.3811, 2.5121)
LORA = 2.0  # alpha 128 over rank 64, of the adapters in the checkpoint
RATE, FEWEST, MOST = 2.0, 4, 768  # frames a second, and in all
SMALLEST, LARGEST = 128 * 28**2, 448**2  # pixels of a frame
SIDE = 28  # divides the sides of a frame
QUESTION = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


class Rated(torch.nn.Module):
    """Compute ratings instead of a next token with Qwen2-VL."""

    def __init__(self, config: Qwen2VLConfig, ratings: int) -> None:
        super().__init__()
        self.model = Qwen2VLModel(config)
        self.rm_head = torch.nn.Linear(config.text_config.hidden_size, ratings, bias=False)

    def forward(self, inputs: Mapping[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
        """Return ratings [b, 3] of a processor's batch; tokens: ids of the three rating tokens."""
        ids = inputs["input_ids"]
        words = self.model.get_input_embeddings()(ids)
        video = inputs["pixel_values_videos"].to(words.dtype)
        seen = self.model.visual(video, grid_thw=inputs["video_grid_thw"]).pooler_output
        at = (ids == self.model.config.video_token_id)[..., None]
        # as the official code, without position_ids: one line of positions, not Qwen2-VL's time,
        # height and width
        states = self.model.language_model(
            inputs_embeds=words.masked_scatter(at, seen.to(words.dtype)),
            attention_mask=inputs["attention_mask"],
        ).last_hidden_state
        columns = torch.stack([(ids == token).int().argmax(1) for token in tokens], 1)  # [b, 3]
        ratings = self.rm_head(
            states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))
        )  # [b, 3, 1 or 3]
        return ratings[..., 0] if ratings.shape[-1] == 1 else ratings.diagonal(dim1=1, dim2=2)


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of model.pth under the names of Rated, with the adapters merged."""
    named = {}
    for key, value in state.items():
        if "lora_" in key or "lm_head" in key:
            continue
        if key.endswith(".base_layer.weight"):
            adapter = key.removesuffix("base_layer.weight")
            up, down = (state.get(f"{adapter}lora_{side}.default.weight") for side in "BA")
            if up is not None and down is not None:
                value = (value.double() + LORA * up.double() @ down.double()).to(value.dtype)
        key = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        key = re.sub(r"^model\.", "model.language_model.", key)
        named[re.sub(r"^visual\.", "model.visual.", key)] = value
    return named


@functools.lru_cache(maxsize=1)  # four rewards, one model
def shared(given: Path | None, batch: int) -> "Ratings":
    """Return the model. It is loaded once for all of its ratings."""
    return Ratings(weights.Source("videoalign", {"videoalign": given} if given else None), batch)


class Ratings:
    """Rate clips with the model and its processor."""

    def __init__(self, source: weights.Source, batch: int) -> None:
        path = source.find(REPO, FILE)
        about = source.find(BASE, "config.json", beside=True)
        vocabulary = source.find(BASE, "tokenizer.json", beside=True)
        config = Qwen2VLConfig(**json.loads(about.read_text(encoding="utf-8")))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(vocabulary), pad_token="<|endoftext|>"
        )
        tokenizer.add_tokens(list(RATED), special_tokens=True)
        self.batch, self.tokens = batch, tokenizer.convert_tokens_to_ids(list(RATED))
        frames = Qwen2VLVideoProcessor(do_resize=False, do_sample_frames=False)
        self.processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, frames)
        state = renamed(weights.read("videoalign", path))
        config.text_config.vocab_size = len(tokenizer)
        ratings = len(state.get("rm_head.weight", "1"))
        self.module = weights.fill("videoalign", Rated(config, ratings), state, path)
        # media, prompts and what came out: the four rewards ask one after the other
        self.last = (lambda: None), None, None

    @torch.no_grad()
    def rate(self, media: torch.Tensor, prompts: list[str], fps: float) -> torch.Tensor:
        """Return standardised ratings VQ, MQ, TA [b, 3] of clips [b, F, 3, H, W] in [0, 1].

        The last ratings are kept, because four rewards may ask for the same clips.
        """
        if self.last[0]() is media and self.last[1] == prompts:
            return self.last[2]
        device = media.device
        # bfloat16, as the official code: float16 overflows in Qwen2-VL
        self.module.to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
        found = []
        for i in range(0, len(prompts), self.batch):
            clips = [seen(clip, fps) for clip in media[i : i + self.batch]]
            # a prompt that spells a control token must not become one
            told = [prompt.replace("<|", "< |") for prompt in prompts[i : i + self.batch]]
            words = [CHAT.format(QUESTION.format(text_prompt=prompt)) for prompt in told]
            inputs = self.processor(text=words, videos=clips, padding=True, return_tensors="pt").to(
                device
            )
            found.append(self.module(inputs, self.tokens).float())
        ratings = torch.cat(found)
        ratings = (ratings - ratings.new_tensor(MEAN)) / ratings.new_tensor(STD)
        self.last = weakref.ref(media), prompts, ratings
        return ratings


def seen(clip: torch.Tensor, fps: float) -> torch.Tensor:
    """Return the model's frames, levels [f, 3, h, w], for a clip [F, 3, H, W] in [0, 1].

    f is even, with two frames per second. Raises InputError for a single frame.
    """
    length = len(clip)
    if length < 2:
        raise InputError("reward videoalign: needs clips of two frames or more. Increase --frames.")
    number = min(max(length / fps * RATE, FEWEST), min(MOST, length) // 2 * 2)
    at = torch.linspace(0, length - 1, round(number / 2) * 2).round().long()
    levels = pixels.levels(clip[at.to(clip.device)]).byte()
    size = resized(*clip.shape[-2:])
    return resize(levels, list(size), InterpolationMode.BICUBIC, antialias=True).float()


def resized(height: int, width: int) -> tuple[int, int]:
    """Return height and width of a frame for the model.

    They are multiples of 28 with about the same proportions, and 100,352 to 200,704 pixels.
    """
    h, w = (max(SIDE, round(side / SIDE) * SIDE) for side in (height, width))
    factor = (height * width / LARGEST) ** 0.5
    if h * w > LARGEST:
        return tuple(int(side / factor / SIDE) * SIDE for side in (height, width))
    if h * w < SMALLEST:
        factor = (SMALLEST / (height * width)) ** 0.5
        return tuple(-int(-side * factor // SIDE) * SIDE for side in (height, width))
    return h, w


class VideoAlign:
    """Score clips by the sum of the three ratings, typically -3 to 5 and without bounds.

    Weights: `KwaiVGI/VideoReward` (checkpoint-11352/model.pth, 5 GB), Apache-2.0, with config.json
    and tokenizer.json of `Qwen/Qwen2-VL-2B-Instruct`, Apache-2.0. The model sees two frames per
    second by --fps, of at most 448 x 448 pixels. Tests compare it with a transcription of the
    official code on transformers' Qwen2-VL (tests/test_rewards_videoalign.py). The scales are
    estimates.
    """

    video, image = True, False
    scale = 1.5
    range = (None, None)
    parts = (0, 1, 2)

    def load(self, source: weights.Source, batch: int = 16) -> None:
        """Load the weights. Raises InputError if they are missing or do not fit."""
        self.ratings = shared(source.given or source.of("videoalign").given, batch)

    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [b] float32 of clips [b, F, 3, H, W] in [0, 1] with b prompts."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        return self.ratings.rate(media, list(prompts), self.fps)[:, self.parts].sum(1)


class VisualQuality(VideoAlign):
    """Score clips by visual quality only."""

    scale, parts = 0.6, (0,)


class MotionQuality(VideoAlign):
    """Score clips by motion quality only."""

    scale, parts = 0.6, (1,)


class TextAlignment(VideoAlign):
    """Score clips by text alignment only."""

    scale, parts = 0.6, (2,)
