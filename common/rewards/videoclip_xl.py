"""VideoCLIP-XL (arXiv 2410.00741): how well a clip matches a long description.

The image encoder is ViCLIP's (arXiv 2307.06942): CLIP's ViT-L/14 in which the patches of all frames
attend to each other. The text encoder is CLIP's with 248 positions, the first 20 of which are those
of CLIP (Long-CLIP, 2403.15378). Both are built from open_clip's transformer, whose weights have the
same names as the checkpoint's.
"""

import math

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, TextTransformer, Transformer

from common.errors import InputError
from common.rewards import pixels, weights
from common.rewards.cosine import Cosine

FRAMES = 8  # of a clip are looked at
CONTEXT = 248  # tokens of a prompt
KEPT = 20  # positions whose embedding is CLIP's own


class ClipOfFrames(torch.nn.Module):
    """Encode clips [b, F, 3, H, W] to [b, D] with ViCLIP: all frames' patches in one sequence."""

    def __init__(
        self, size: int, patch: int, width: int, layers: int, heads: int, output: int
    ) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = torch.nn.Parameter(torch.zeros(width))
        self.positional_embedding = torch.nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.temporal_positional_embedding = torch.nn.Parameter(torch.zeros(1, FRAMES, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, act_layer=QuickGELU)
        self.proj = torch.nn.Parameter(torch.zeros(width, output))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Return embeddings [b, D] of normalised frames [b, F, 3, H, W]."""
        x = self.conv1(clips.transpose(1, 2)).flatten(3)  # [b, W, F, N]
        x = (
            x.permute(0, 2, 3, 1)
            + self.positional_embedding[1:]
            + self.temporal_positional_embedding[:, :, None]
        )
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([first, x.flatten(1, 2)], dim=1)))
        return self.ln_post(x[:, 0]) @ self.proj


class TwoEncoders(torch.nn.Module):
    """Hold both encoders, `text` and `video`."""

    def __init__(
        self,
        size: int = 224,
        patch: int = 14,
        video: tuple[int, int, int] = (1024, 24, 16),
        text: tuple[int, int, int] = (768, 12, 12),
        output: int = 768,
        vocabulary: int = 49408,
    ) -> None:
        """Build the encoders. video, text: (width, layers, heads)."""
        super().__init__()
        self.size = size
        self.video, (width, layers, heads) = ClipOfFrames(size, patch, *video, output), text
        self.text = TextTransformer(
            CONTEXT, vocabulary, width, heads, layers, output_dim=output, act_layer=QuickGELU
        )


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of VideoCLIP-XL.bin under the names of TwoEncoders.

    The two tables of positions become one: CLIP's for the first 20, then the new ones.
    """
    named = {}
    for key, value in state.items():
        if key.startswith("vision_model.vision_encoder."):
            named["video." + key.removeprefix("vision_model.vision_encoder.")] = value
        elif key.startswith("text_model.") and not key.endswith(
            (".logit_scale", ".positional_embedding_res")
        ):
            named["text." + key.removeprefix("text_model.")] = value
    old, new = (
        named.get("text.positional_embedding"),
        state.get("text_model.positional_embedding_res"),
    )
    if old is not None and new is not None:
        named["text.positional_embedding"] = torch.cat([old[:KEPT], new[KEPT:]])
    return named


def sizes(state: dict[str, torch.Tensor]) -> dict[str, int | tuple[int, int, int]]:
    """Return the arguments of TwoEncoders that fit its weights, {} if some weights are missing.

    An attention head has 64 dimensions, as in every CLIP.
    """
    try:
        width, _, _, patch, _ = state["video.conv1.weight"].shape
        places, output = len(state["video.positional_embedding"]) - 1, state["video.proj"].shape[1]
        vocabulary, told = state["text.token_embedding.weight"].shape
    except (KeyError, ValueError):
        return {}

    def part(name: str, width: int) -> tuple[int, int, int]:
        blocks = {
            key.split(".")[3] for key in state if key.startswith(f"{name}.transformer.resblocks.")
        }
        return width, len(blocks), max(1, width // 64)

    encoders = dict(video=part("video", width), text=part("text", told))
    return dict(
        size=patch * math.isqrt(places),
        patch=patch,
        output=output,
        vocabulary=vocabulary,
        **encoders,
    )


class VideoClipXL(Cosine):
    """Score clips of at least 8 frames by the cosine with the prompt, typically 0.1 to 0.35.

    Weights: `alibaba-pai/VideoCLIP-XL` (VideoCLIP-XL.bin), CC BY-NC-SA 4.0, not for commercial use.
    For n frames the model sees `frames[:: n // 8][:8]`, each squashed to 224x224 without
    antialiasing, with ImageNet's mean and std. Its demo does so with OpenCV, whose fixed-point
    bilinear weights change some pixels by one level. Prompts are cut at 248 tokens. Tests compare
    it with a float32 transcription of the official model (tests/test_rewards_videoclip_xl.py). The
    scale is an estimate.
    """

    repo, file = "alibaba-pai/VideoCLIP-XL", "VideoCLIP-XL.bin"
    video, image = True, False
    scale = 0.02

    def build(self, source: weights.Source) -> torch.nn.Module:
        """Load the weights and return the module with them."""
        path = source.find(self.repo, self.file)
        self.tokens = open_clip.SimpleTokenizer(context_length=CONTEXT)
        state = renamed(weights.read(source.name, path))
        module = TwoEncoders(**sizes(state))
        self.size = module.size
        return weights.fill(source.name, module, state, path)

    def media(self, clips: torch.Tensor) -> torch.Tensor:
        """Return embeddings [b, D] of clips [b, F, 3, H, W] in [0, 1].

        Raises InputError for clips of fewer than 8 frames.
        """
        if clips.shape[1] < FRAMES:
            raise InputError(
                f"reward videoclip-xl: needs clips of {FRAMES} frames or more, these have "
                f"{clips.shape[1]}. Increase --frames."
            )
        clips = pixels.levels(clips[:, :: clips.shape[1] // FRAMES][:, :FRAMES])
        frames = F.interpolate(clips.flatten(0, 1), (self.size, self.size), mode="bilinear").round()
        return self.module.video(
            pixels.normalised(frames.unflatten(0, clips.shape[:2]), pixels.IMAGENET)
        )

    def texts(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """Return embeddings [n, D] of n prompts."""
        return self.module.text(self.tokens(prompts).to(device))
