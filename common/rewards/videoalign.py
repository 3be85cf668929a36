"""VideoAlign's VideoReward (arXiv 2501.13918): visual quality, motion quality and text alignment of
a clip.

Qwen2-VL-2B reads the clip and a fixed question in which three tokens of its own stand where the
ratings belong (videoalign.txt, word for word as in training; MIT, Kling Team); a linear layer reads
the rating off the state at each of them."""

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
MEAN, STD = (
    (3.6757, 1.1646, 2.8105),
    (2.2476, 1.3811, 2.5121),
)  # of the ratings in the training data
LORA = 2.0  # alpha 128 over rank 64, of the adapters in the checkpoint
RATE, FEWEST, MOST = 2.0, 4, 768  # frames a second, and in all
SMALLEST, LARGEST, SIDE = (
    128 * 28**2,
    448**2,
    28,
)  # pixels of a frame, and what its sides are multiples of
QUESTION = Path(__file__).with_suffix(".txt").read_text()
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
)


class Rated(torch.nn.Module):
    """Qwen2-VL with a rating instead of a next token."""

    def __init__(self, config: Qwen2VLConfig, ratings: int) -> None:
        super().__init__()
        self.model = Qwen2VLModel(config)
        self.rm_head = torch.nn.Linear(config.text_config.hidden_size, ratings, bias=False)

    def forward(self, inputs: Mapping[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
        """A batch of the processor's, and the numbers of the three tokens -> [b, 3]"""
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
    """model.pth's weights under the names of Rated, with the adapters added to the layers that they
    adapt."""
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
    """The model, loaded once for all of its ratings."""
    return Ratings(weights.Source("videoalign", {"videoalign": given} if given else None), batch)


class Ratings:
    """The model with its processor: clips and prompts -> standardised ratings [b, 3]."""

    def __init__(self, source: weights.Source, batch: int) -> None:
        path = source.find(REPO, FILE)
        about, vocabulary = (
            source.find(BASE, file, beside=True) for file in ("config.json", "tokenizer.json")
        )
        try:
            config = Qwen2VLConfig(**json.loads(about.read_text()))
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=str(vocabulary), pad_token="<|endoftext|>"
            )
        except Exception as error:  # whatever a broken file makes tokenizers say
            raise InputError(
                f"reward videoalign: {about} and {vocabulary} are not Qwen2-VL's ({error!r})"
            ) from None
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
        """Clips [b, F, 3, H, W] in [0, 1] of b prompts -> ratings VQ, MQ, TA [b, 3]; the last ones
        are remembered."""
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
    """[F, 3, H, W] in [0, 1] -> the frames that the model sees, levels [f, 3, h, w]: two a second,
    an even number. Raises InputError for a single frame."""
    length = len(clip)
    if length < 2:
        raise InputError("reward videoalign: takes clips of two frames or more; give --frames")
    number = min(max(length / fps * RATE, FEWEST), min(MOST, length) // 2 * 2)
    at = torch.linspace(0, length - 1, round(number / 2) * 2).round().long()
    levels = pixels.levels(clip[at.to(clip.device)]).byte()
    size = resized(*clip.shape[-2:])
    return resize(levels, list(size), InterpolationMode.BICUBIC, antialias=True).float()


def resized(height: int, width: int) -> tuple[int, int]:
    """Sides of a frame as the model sees it: multiples of 28, of about the same shape, of 100,352
    to 200,704 pixels."""
    h, w = (max(SIDE, round(side / SIDE) * SIDE) for side in (height, width))
    factor = (height * width / LARGEST) ** 0.5
    if h * w > LARGEST:
        return tuple(int(side / factor / SIDE) * SIDE for side in (height, width))
    if h * w < SMALLEST:
        factor = (SMALLEST / (height * width)) ** 0.5
        return tuple(-int(-side * factor // SIDE) * SIDE for side in (height, width))
    return h, w


class VideoAlign:
    """Reward: the sum of the three ratings, typically -3 to 5; no bounds. Clips alone.

    `KwaiVGI/VideoReward` (checkpoint-11352/model.pth, 5 GB), Apache-2.0, with config.json and
    tokenizer.json of `Qwen/Qwen2-VL-2B-Instruct`, Apache-2.0. Two frames a second by --fps, of at
    most 448 x 448 pixels. Checked against a transcription of the official code on transformers'
    Qwen2-VL (tests/test_rewards_videoalign.py). The scales are estimates."""

    video, image = True, False
    scale = 1.5
    range = (None, None)
    parts = (0, 1, 2)

    def load(self, source: weights.Source, batch: int = 16) -> None:
        """Fetches the weights; raises InputError if they are missing or do not fit."""
        self.ratings = shared(source.given or source.of("videoalign").given, batch)

    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """media [b, F, 3, H, W] in [0, 1], prompts b strings -> [b] float32."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        return self.ratings.rate(media, list(prompts), self.fps)[:, self.parts].sum(1)


class VisualQuality(VideoAlign):
    """Reward: the rating of visual quality alone."""

    scale, parts = 0.6, (0,)


class MotionQuality(VideoAlign):
    """Reward: the rating of motion quality alone."""

    scale, parts = 0.6, (1,)


class TextAlignment(VideoAlign):
    """Reward: the rating of text alignment alone."""

    scale, parts = 0.6, (2,)
