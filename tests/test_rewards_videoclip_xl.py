"""VideoCLIP-XL: against a float32 transcription of the official model on the official names, and
its frames."""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from learned import PROMPTS, check_contract, check_half_precision, loaded, photos

from common.errors import InputError
from common.rewards import table
from common.rewards.videoclip_xl import TwoEncoders, VideoClipXL, renamed, sizes

VIDEO, TEXT, OUT, SIZE, PATCH = (128, 2, 2), (64, 1, 1), 16, 28, 14  # width, layers, heads


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(VideoCLIP-XL.bin with random weights, the weights by their official names)"""
    generator, state = torch.Generator().manual_seed(0), {}

    def add(name, *shape):
        noise = torch.randn(shape, generator=generator)
        if "ln_" in name:
            noise = 0.2 * noise + name.endswith("weight")
        elif len(shape) > 1 and "embedding" not in name:
            noise = 1.5 * noise / math.prod(shape[1:]) ** 0.5
        state[name] = noise

    for prefix, (width, layers, _) in (
        ("vision_model.vision_encoder", VIDEO),
        ("text_model", TEXT),
    ):
        for i in range(layers):
            block = f"{prefix}.transformer.resblocks.{i}"
            for name, shape in (
                ("attn.in_proj_", (3 * width, width)),
                ("attn.out_proj.", (width, width)),
            ):
                add(f"{block}.{name}weight", *shape), add(f"{block}.{name}bias", shape[0])
            for name, shape in (
                ("mlp.c_fc", (4 * width, width)),
                ("mlp.c_proj", (width, 4 * width)),
            ):
                add(f"{block}.{name}.weight", *shape), add(f"{block}.{name}.bias", shape[0])
            for name in ("ln_1", "ln_2"):
                add(f"{block}.{name}.weight", width), add(f"{block}.{name}.bias", width)
    width = VIDEO[0]
    for name, *shape in (
        ("conv1.weight", width, 3, 1, PATCH, PATCH),
        ("class_embedding", width),
        ("proj", width, OUT),
        ("positional_embedding", (SIZE // PATCH) ** 2 + 1, width),
        ("temporal_positional_embedding", 1, 8, width),
        ("ln_pre.weight", width),
        ("ln_pre.bias", width),
        ("ln_post.weight", width),
        ("ln_post.bias", width),
    ):
        add(f"vision_model.vision_encoder.{name}", *shape)
    width = TEXT[0]
    for name, *shape in (
        ("token_embedding.weight", 49408, width),
        ("positional_embedding", 248, width),
        ("ln_final.weight", width),
        ("positional_embedding_res", 248, width),
        ("ln_final.bias", width),
        ("text_projection", width, OUT),
    ):
        add(f"text_model.{name}", *shape)
    state["vision_model.temp"], state["text_model.logit_scale"] = (
        torch.tensor(0.01),
        torch.tensor(4.6),
    )
    path = tmp_path_factory.mktemp("videoclip") / "VideoCLIP-XL.bin"
    torch.save(state, path)
    return path, state


# --- The official model, as its clip_vision.py and model_text_encoder.py compute it ---


def blocks(w, prefix, x, layers, heads, mask=None):
    """Residual attention blocks on x [S, D], one sample."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(layers):
        name = f"{prefix}.transformer.resblocks.{i}"
        qkv = (
            norm(f"{name}.ln_1", x) @ w[f"{name}.attn.in_proj_weight"].T
            + w[f"{name}.attn.in_proj_bias"]
        )
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in qkv.chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        y = ((scores if mask is None else scores + mask).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + y @ w[f"{name}.attn.out_proj.weight"].T + w[f"{name}.attn.out_proj.bias"]
        y = norm(f"{name}.ln_2", x) @ w[f"{name}.mlp.c_fc.weight"].T + w[f"{name}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ w[f"{name}.mlp.c_proj.weight"].T + w[f"{name}.mlp.c_proj.bias"]
    return x


def official_video(w, frames):
    """Eight frames [8, 3, SIZE, SIZE] -> [OUT]"""
    p = "vision_model.vision_encoder"
    x = F.conv3d(frames.transpose(0, 1)[None], w[f"{p}.conv1.weight"], stride=(1, PATCH, PATCH))[0]
    tokens = [w[f"{p}.class_embedding"] + w[f"{p}.positional_embedding"][0]]
    patches = x.flatten(2)  # [W, 8, N]
    for n in range(
        patches.shape[2]
    ):  # the official order: all frames of a patch, then the next patch
        for t in range(8):
            place = (
                w[f"{p}.positional_embedding"][1 + n]
                + w[f"{p}.temporal_positional_embedding"][0, t]
            )
            tokens.append(patches[:, t, n] + place)
    x = torch.stack(tokens)
    x = F.layer_norm(x, x.shape[-1:], w[f"{p}.ln_pre.weight"], w[f"{p}.ln_pre.bias"])
    x = blocks(w, p, x, *VIDEO[1:])[0]
    return (
        F.layer_norm(x, x.shape[-1:], w[f"{p}.ln_post.weight"], w[f"{p}.ln_post.bias"])
        @ w[f"{p}.proj"]
    )


def official_text(w, prompt):
    tokenizer = open_clip.SimpleTokenizer()
    ids = [49406, *tokenizer.encode(prompt), 49407]
    if len(ids) > 248:
        ids = [*ids[:247], 49407]
    ids = torch.tensor(ids + [0] * (248 - len(ids)))
    first = (torch.arange(248) < 20)[:, None]
    place = (
        w["text_model.positional_embedding"] * first
        + w["text_model.positional_embedding_res"] * ~first
    )
    mask = torch.full((248, 248), float("-inf")).triu(1)
    x = blocks(
        w, "text_model", w["text_model.token_embedding.weight"][ids] + place, *TEXT[1:], mask
    )
    x = F.layer_norm(
        x, x.shape[-1:], w["text_model.ln_final.weight"], w["text_model.ln_final.bias"]
    )
    return x[ids.argmax()] @ w["text_model.text_projection"]


def squashed(frame):
    """[3, H, W] in [0, 1] -> [3, SIZE, SIZE]: OpenCV's bilinear resize, pixel by pixel, and
    ImageNet's mean and std."""
    _, height, width = frame.shape
    out = torch.empty(3, SIZE, SIZE)
    for y in range(SIZE):
        for x in range(SIZE):
            at = ((y + 0.5) * height / SIZE - 0.5, (x + 0.5) * width / SIZE - 0.5)
            (top, left), total = map(math.floor, at), 0
            for dy in (0, 1):
                for dx in (0, 1):
                    weight = (1 - abs(at[0] - top - dy)) * (1 - abs(at[1] - left - dx))
                    row, column = (
                        min(max(top + dy, 0), height - 1),
                        min(max(left + dx, 0), width - 1),
                    )
                    total += weight * 255 * frame[:, row, column]
            out[:, y, x] = total.round()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (out / 255 - mean[:, None, None]) / std[:, None, None]


def test_videoclip_xl_is_the_official_model(checkpoint):
    path, w = checkpoint
    scorer = loaded(VideoClipXL, "videoclip-xl", path)
    long = " ".join(f"and then number {i}" for i in range(200))
    ours, expected = [], []
    for i, (frames, prompt) in enumerate([(8, "a red circle"), (17, PROMPTS[-1]), (53, long)]):
        clip = photos(frames, 40, 50, seed=100 * i)
        ours.append(scorer.score(clip[None], [prompt]).item())
        chosen = [clip[frames // 8 * k] for k in range(8)]
        seen, told = (
            official_video(w, torch.stack([squashed(frame) for frame in chosen])),
            official_text(w, prompt),
        )
        expected.append(F.cosine_similarity(seen, told, dim=0).item())
    assert ours == pytest.approx(expected, abs=1e-4) and max(ours) - min(ours) > 0.02


def test_contract(checkpoint):
    clips = photos(48, 30, 40).view(6, 8, 3, 30, 40)
    check_contract(
        lambda batch: loaded(VideoClipXL, "videoclip-xl", checkpoint[0], batch), clips, PROMPTS
    )


def test_the_order_of_the_frames_matters(checkpoint):
    scorer, clip = loaded(VideoClipXL, "videoclip-xl", checkpoint[0]), photos(8, 30, 40)[None]
    forward, backward = scorer.score(torch.cat([clip, clip.flip(1)]), ["a dog"] * 2)
    assert (forward - backward).abs() > 1e-3


def test_sizes_are_those_of_the_weights(checkpoint):
    state = renamed({**checkpoint[1]})
    found = dict(size=SIZE, patch=PATCH, video=VIDEO, text=TEXT, output=OUT, vocabulary=49408)
    assert sizes(state) == found
    with torch.device("meta"):
        released = TwoEncoders()
    expected = dict(
        size=224, patch=14, video=(1024, 24, 16), text=(768, 12, 12), output=768, vocabulary=49408
    )
    assert sizes(released.state_dict()) == expected
    assert sizes({}) == {}


def test_too_few_frames_and_image_models_are_refused(checkpoint):
    scorer = loaded(VideoClipXL, "videoclip-xl", checkpoint[0])
    with pytest.raises(InputError, match="needs clips of 8 frames or more, these have 5"):
        scorer.score(torch.rand(1, 5, 3, 28, 28), ["a"])
    with pytest.raises(
        InputError, match="videoclip-xl scores clips, and this --model makes images"
    ):
        table.load(["videoclip-xl"], [], [f"videoclip-xl={checkpoint[0]}"], clips=False)


def test_half_precision_is_close(checkpoint, monkeypatch):
    clips = photos(48, 30, 40).view(6, 8, 3, 30, 40)
    check_half_precision(
        monkeypatch,
        lambda batch: loaded(VideoClipXL, "videoclip-xl", checkpoint[0], batch),
        clips,
        PROMPTS,
        3e-3,
    )
