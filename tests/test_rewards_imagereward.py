"""ImageReward: against a float32 transcription of the official model, layer by layer on the
official names."""

import math

import pytest
import torch
import torch.nn.functional as F
from learned import (
    PROMPTS,
    SHAPES,
    as_pil,
    check_contract,
    check_half_precision,
    loaded,
    photo,
    photos,
)
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)
from transformers import BertTokenizer

from common.rewards.imagereward import ImageReward

WIDTH, LAYERS, HEADS, SIZE, PATCH = 32, 2, 4, 56, 14
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "circle",
    "photo",
    "of",
    "an",
    "astronaut",
    "riding",
]
WORDS += [
    "horse",
    "two",
    "cats",
    "dog",
    "snow",
    "on",
    "the",
    "matterhorn",
    "x",
    "very",
    "long",
    "prompt",
    "about",
]
WORDS += [
    "many",
    "things",
    "that",
    "nobody",
    "can",
    "count",
    "and",
    "goes",
    ",",
    "!",
    "&",
    "##s",
    "cat",
]


class Small(ImageReward):
    vision = dict(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, image_size=SIZE, patch_size=PATCH,
    )  # fmt: skip
    text = dict(
        hidden_size=24, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        vocab_size=60, encoder_hidden_size=WIDTH, max_position_embeddings=40, bos_token_id=2,
    )  # fmt: skip


def official_names():
    """{name: shape} of ImageReward.pt, by the sizes above."""
    names = {"cls_token": [1, 1, WIDTH], "pos_embed": [1, (SIZE // PATCH) ** 2 + 1, WIDTH]}
    names |= {
        "patch_embed.proj.weight": [WIDTH, 3, PATCH, PATCH],
        "patch_embed.proj.bias": [WIDTH],
        "norm": WIDTH,
    }
    for i in range(LAYERS):
        names |= {f"blocks.{i}.norm1": WIDTH, f"blocks.{i}.norm2": WIDTH}
        names |= {
            f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.proj": (WIDTH, WIDTH),
        }
        names |= {
            f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH),
        }
    names = {f"blip.visual_encoder.{name}": shape for name, shape in names.items()}
    text = {
        "embeddings.word_embeddings.weight": [60, 24],
        "embeddings.position_embeddings.weight": [40, 24],
    }
    text |= {"embeddings.position_ids": [1, 40], "embeddings.LayerNorm": 24}
    for i in range(LAYERS):
        for part, key in (("attention", 24), ("crossattention", WIDTH)):
            layer = f"encoder.layer.{i}.{part}"
            text |= {
                f"{layer}.self.query": (24, 24),
                f"{layer}.self.key": (24, key),
                f"{layer}.self.value": (24, key),
            }
            text |= {f"{layer}.output.dense": (24, 24), f"{layer}.output.LayerNorm": 24}
        layer = f"encoder.layer.{i}"
        text |= {f"{layer}.intermediate.dense": (96, 24), f"{layer}.output.dense": (24, 96)}
        text |= {f"{layer}.output.LayerNorm": 24}
    names |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    names |= {
        "blip.vision_proj": (16, WIDTH),
        "blip.text_proj": (16, 24),
    }  # for retrieval, not read
    widths = (24, 1024, 128, 64, 16, 1)
    names |= {f"mlp.layers.{i}": (b, a) for i, a, b in zip((0, 2, 4, 6, 7), widths, widths[1:])}
    return names


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(ImageReward.pt with random weights and its vocabulary beside, the weights)"""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in official_names().items():
        if isinstance(shape, int):  # a norm
            state[f"{name}.weight"] = 1 + 0.2 * torch.randn(shape, generator=generator)
            state[f"{name}.bias"] = 0.2 * torch.randn(shape, generator=generator)
        elif isinstance(shape, tuple):  # a linear layer
            state[f"{name}.weight"] = (
                torch.randn(shape, generator=generator) * 1.5 / shape[1] ** 0.5
            )
            state[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)
        else:
            state[name] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder / "ImageReward.pt", state


# --- The official model, as its med.py and vit.py compute it ---


def attention(w, name, x, of, mask=0.0):
    """Multi-head attention of BERT: x [b, S, D] looks at `of` [b, S', D']."""

    def heads(y, part):
        y = F.linear(y, w[f"{name}.self.{part}.weight"], w[f"{name}.self.{part}.bias"])
        return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    query, key, value = heads(x, "query"), heads(of, "key"), heads(of, "value")
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
    y = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return norm(w, f"{name}.output.LayerNorm", linear(w, f"{name}.output.dense", y) + x, 1e-12)


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def official_vision(w, image):
    """[3, SIZE, SIZE] -> [1, N + 1, WIDTH]"""
    w = {key.removeprefix("blip.visual_encoder."): value for key, value in w.items()}
    x = F.conv2d(
        image[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH
    )
    x = torch.cat([w["cls_token"], x.flatten(2).transpose(1, 2)], dim=1) + w["pos_embed"]
    for i in range(LAYERS):
        qkv = linear(w, f"blocks.{i}.attn.qkv", norm(w, f"blocks.{i}.norm1", x, 1e-6))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + linear(w, f"blocks.{i}.attn.proj", y.transpose(1, 2).flatten(2))
        y = F.gelu(linear(w, f"blocks.{i}.mlp.fc1", norm(w, f"blocks.{i}.norm2", x, 1e-6)))
        x = x + linear(w, f"blocks.{i}.mlp.fc2", y)
    return norm(w, "norm", x, 1e-6)


def official_score(w, tokenizer, image, prompt):
    bicubic, mean = InterpolationMode.BICUBIC, (0.48145466, 0.4578275, 0.40821073)
    transform = [Resize(SIZE, bicubic), CenterCrop(SIZE), ToTensor()]
    seen = official_vision(
        w, Compose([*transform, Normalize(mean, (0.26862954, 0.26130258, 0.27577711))])(image)
    )
    words = tokenizer(
        prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    t = {key.removeprefix("blip.text_encoder."): value for key, value in w.items()}
    x = (
        t["embeddings.word_embeddings.weight"][words.input_ids]
        + t["embeddings.position_embeddings.weight"][:35]
    )
    x = norm(t, "embeddings.LayerNorm", x, 1e-12)
    mask = (1.0 - words.attention_mask[:, None, None].float()) * -10000.0
    for i in range(LAYERS):
        x = attention(t, f"encoder.layer.{i}.attention", x, x, mask)
        x = attention(t, f"encoder.layer.{i}.crossattention", x, seen)
        y = F.gelu(linear(t, f"encoder.layer.{i}.intermediate.dense", x))
        x = norm(
            t,
            f"encoder.layer.{i}.output.LayerNorm",
            linear(t, f"encoder.layer.{i}.output.dense", y) + x,
            1e-12,
        )
    x = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = linear(w, f"mlp.layers.{i}", x)
    return ((x - 0.16717362830052426) / 1.0333394966054072).item()


def test_imagereward_is_the_official_model(checkpoint):
    path, state = checkpoint
    scorer, tokenizer = (
        loaded(Small, "imagereward", path),
        BertTokenizer(str(path.parent / "vocab.txt")),
    )
    assert len(tokenizer(PROMPTS[-1]).input_ids) > 35  # one is cut
    images = [photo(*shape, seed=i) for i, shape in enumerate([*SHAPES, (56, 57)])]
    ours = [scorer.score(image[None], [prompt]).item() for image, prompt in zip(images, PROMPTS)]
    expected = [
        official_score(state, tokenizer, as_pil(image), prompt)
        for image, prompt in zip(images, PROMPTS)
    ]
    assert ours == pytest.approx(expected, abs=2e-4, rel=1e-4) and max(ours) - min(ours) > 0.2
    other = [
        scorer.score(image[None], [PROMPTS[0]]).item() for image in images
    ]  # the image matters too
    assert max(other) - min(other) > 0.05


def test_contract(checkpoint):
    check_contract(
        lambda batch: loaded(Small, "imagereward", checkpoint[0], batch), photos(6), PROMPTS
    )


def test_half_precision_is_close(checkpoint, monkeypatch):
    check_half_precision(
        monkeypatch,
        lambda batch: loaded(Small, "imagereward", checkpoint[0], batch),
        photos(6),
        PROMPTS,
        0.02,
    )
