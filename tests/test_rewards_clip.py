"""CLIP scores, HPSv2, LAION aesthetic: against open_clip's own transforms, the official hpsv2
scorer, and formulas."""

import gzip
import importlib
import json
import os
import time

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from learned import (
    CONFIG,
    PROMPTS,
    SHAPES,
    as_pil,
    check_contract,
    check_half_precision,
    clip_folder,
    loaded,
    photo,
    photos,
    randomised,
)
from PIL import Image

from common.rewards import pixels
from common.rewards.aesthetic import Aesthetic
from common.rewards.clip import Clip, ClipH, HPSv2, HPSv21

# --- Pixels ---


@pytest.mark.parametrize("size", [(56, 56), (31, 200), (150, 90)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [*SHAPES, (720, 720), (480, 832)])
def test_resize_is_pils(shape, size, mode):
    image = photo(*shape, seed=0)
    expected = as_pil(image).resize(
        size[::-1], {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[mode]
    )
    expected = torch.from_numpy(np.array(expected)).movedim(-1, 0).float()
    ours = pixels.resize_as_pil(pixels.levels(image[None]), *size, mode)[0]
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [*SHAPES, (56, 56), (56, 57), (113, 115), (56, 59)])
def test_transform_is_open_clips(shape, mode):
    transform = open_clip.image_transform(56, False, resize_mode=mode)
    resize = {"shortest": pixels.shortest_side, "squash": pixels.squashed}[mode]
    image = photo(*shape, seed=1)
    ours = pixels.normalised(resize(pixels.levels(image[None]), 56))[0]
    assert ours.shape == (3, 56, 56)
    torch.testing.assert_close(ours, transform(as_pil(image)), atol=1e-6, rtol=0)


# --- CLIP ---


def open_clip_score(folder, image, prompt):
    """With open_clip's own factory, transform, tokenizer and forward pass, of one picture and one
    prompt."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        seen = model.encode_image(transform(as_pil(image))[None], normalize=True)
        told = model.encode_text(
            open_clip.get_tokenizer(f"local-dir:{folder}")([prompt]), normalize=True
        )
    return (seen @ told.T).item()


@pytest.mark.parametrize("cls, mode", [(Clip, "shortest"), (ClipH, "squash")])
def test_clip_is_open_clips(tmp_path, cls, mode):
    folder = clip_folder(tmp_path / "clip", resize_mode=mode, interpolation="bicubic")
    scorer = loaded(cls, "clip", folder)
    images = [photo(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    ours = [scorer.score(image[None], [prompt]).item() for image, prompt in zip(images, PROMPTS)]
    expected = [open_clip_score(folder, image, prompt) for image, prompt in zip(images, PROMPTS)]
    assert ours == pytest.approx(expected, abs=1e-5) and max(ours) - min(ours) > 0.02


def test_weights_of_a_named_architecture(tmp_path, monkeypatch):
    """A plain file of weights takes the table's architecture and the class's preprocessing."""
    (tmp_path / "small-clip.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "small-clip.json")
    monkeypatch.setattr(Clip, "architecture", "small-clip")
    folder = clip_folder(tmp_path / "clip", mean=pixels.OPENAI[0], std=pixels.OPENAI[1])
    model = open_clip.create_model(f"local-dir:{folder}")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
        tmp_path / "clip.pt",
    )
    media = photos(3)
    ours = loaded(Clip, "clip", tmp_path / "clip.pt").score(media, PROMPTS[:3])
    assert torch.equal(ours, loaded(Clip, "clip", folder).score(media, PROMPTS[:3]))


@pytest.mark.parametrize("cls, name", [(Clip, "clip"), (HPSv2, "hpsv2"), (HPSv21, "hpsv2.1")])
def test_contract(tmp_path, cls, name):
    folder = clip_folder(tmp_path / name)
    check_contract(lambda batch: loaded(cls, name, folder, batch), photos(6), PROMPTS)


def test_each_prompt_is_embedded_once(tmp_path):
    scorer, asked = loaded(Clip, "clip", clip_folder(tmp_path / "clip")), []
    texts = scorer.texts
    scorer.texts = lambda prompts, device: asked.append(prompts) or texts(prompts, device)
    media = photos(6)
    first = scorer.score(media, ["a", "b", "a", "a", "c", "b"])
    again = scorer.score(media[:3], ["d", "b", "a"])
    assert asked == [["a", "b", "c"], ["d"]] and len(scorer.known) == 4
    torch.testing.assert_close(again[1:], first[1:3], atol=1e-6, rtol=0)


def test_memory_of_prompts_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("common.rewards.cosine.REMEMBERED", 3)
    scorer, media = loaded(Clip, "clip", clip_folder(tmp_path / "clip")), photos(2)
    before = scorer.score(media, ["a", "b"])
    scorer.score(media, ["c", "d"])
    assert set(scorer.known) == {"c", "d"}
    torch.testing.assert_close(scorer.score(media, ["a", "d"])[0], before[0], atol=1e-6, rtol=0)


def test_half_precision_is_close(tmp_path, monkeypatch):
    folder = clip_folder(tmp_path / "clip")
    check_half_precision(
        monkeypatch, lambda batch: loaded(Clip, "clip", folder, batch), photos(6), PROMPTS, 3e-3
    )


# --- HPSv2 against the official scorer ---


@pytest.fixture
def official(monkeypatch):
    """hpsv2.img_score, which reads open_clip's vocabulary because its wheel lacks its own."""
    ours = os.path.join(os.path.dirname(open_clip.__file__), "bpe_simple_vocab_16e6.txt.gz")
    real = gzip.open
    lacks = "bpe_simple_vocab_16e6.txt.gz"
    monkeypatch.setattr(
        gzip, "open", lambda path, *a: real(ours if str(path).endswith(lacks) else path, *a)
    )
    return importlib.import_module("hpsv2.img_score")


def official_model(img_score, monkeypatch):
    """What its initialize_model makes, but with random weights in place of 4 GB from the hub:
    score() fills it."""
    make = img_score.create_model_and_transforms
    model, _, transform = make(
        "ViT-H-14", None, precision="amp", light_augmentation=True, output_dict=True
    )
    monkeypatch.setattr(img_score, "model_dict", {"model": model, "preprocess_val": transform})
    return model


def test_hpsv2_is_the_official_scorer(tmp_path, monkeypatch, official):
    small = json.loads(json.dumps(CONFIG))
    small["vision_cfg"] |= {"image_size": 224, "patch_size": 32}
    factory = importlib.import_module("hpsv2.src.open_clip.factory")
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-H-14", small)
    model = randomised(official_model(official, monkeypatch), seed=3)
    torch.save(
        {"state_dict": {k: v.half() for k, v in model.state_dict().items()}}, tmp_path / "hps.pt"
    )
    (tmp_path / "small-hps.json").write_text(json.dumps(small))
    open_clip.add_model_config(tmp_path / "small-hps.json")
    monkeypatch.setattr(HPSv2, "architecture", "small-hps")
    scorer = loaded(HPSv2, "hpsv2", tmp_path / "hps.pt")

    shapes = [(224, 224), (300, 417), (512, 128), (64, 96), (101, 99), (720, 720)]
    images = [photo(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = [
        official.score(as_pil(x), p, cp=tmp_path / "hps.pt")[0] for x, p in zip(images, PROMPTS)
    ]
    ours = [scorer.score(image[None], [prompt]).item() for image, prompt in zip(images, PROMPTS)]
    assert ours == pytest.approx(expected, abs=1e-4) and max(ours) - min(ours) > 0.02
    batch = torch.stack([images[0]] * 6)
    expected = [
        official.score(as_pil(images[0]), prompt, cp=tmp_path / "hps.pt")[0] for prompt in PROMPTS
    ]
    assert scorer.score(batch, PROMPTS).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_hpsv2_at_full_size_is_the_official_scorer(tmp_path, monkeypatch, official):
    """ViT-H-14 with random weights: 12 GB of memory, and minutes on a CPU. Prints the seconds of
    both."""
    torch.manual_seed(0)
    model = official_model(official, monkeypatch)
    torch.save(
        {"state_dict": {k: v.half() for k, v in model.state_dict().items()}}, tmp_path / "hps.pt"
    )
    scorer = loaded(HPSv2, "hpsv2", tmp_path / "hps.pt", batch=16)
    on_gpu = torch.cuda.is_available()
    shapes = [(224, 224), (300, 417), (512, 128)]
    images = [photo(*shape, seed=i) for i, shape in enumerate(shapes)]
    place = "cuda" if on_gpu else "cpu"
    expected = [
        official.score(as_pil(x), p, cp=tmp_path / "hps.pt")[0] for x, p in zip(images, PROMPTS)
    ]
    ours = [
        scorer.score(image[None].to(place), [prompt]).item()
        for image, prompt in zip(images, PROMPTS)
    ]
    assert ours == pytest.approx(expected, abs=1e-3 if on_gpu else 1e-4)
    many, prompts = (
        torch.stack([photo(224, 224, seed=i) for i in range(16)]),
        [PROMPTS[i // 4] for i in range(16)],
    )
    seconds = []
    for job in (
        lambda: scorer.score(many.to(place), prompts).cpu(),
        lambda: [
            official.score(as_pil(many[i]), prompts[i], cp=tmp_path / "hps.pt") for i in range(16)
        ],
    ):
        scorer.known, started = {}, time.perf_counter()
        job()
        seconds.append(time.perf_counter() - started)
    print(f"16 images: {seconds[0]:.1f} s batched, {seconds[1]:.1f} s by the official scorer")
    assert not on_gpu or seconds[1] >= 5 * seconds[0]


# --- LAION aesthetic ---


class OfficialMLP(torch.nn.Module):
    """The published layers, with the dropout that stands between them; it is off in eval mode."""

    def __init__(self, width):
        super().__init__()
        layers = [torch.nn.Linear(width, 1024), torch.nn.Dropout(0.2), torch.nn.Linear(1024, 128)]
        layers += [torch.nn.Dropout(0.2), torch.nn.Linear(128, 64), torch.nn.Dropout(0.1)]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(64, 16), torch.nn.Linear(16, 1))


@pytest.fixture
def aesthetic(tmp_path):
    """(folder of the clip, file of the head, the head)"""
    mlp = randomised(OfficialMLP(CONFIG["embed_dim"]), seed=5)
    torch.save(mlp.state_dict(), tmp_path / "head.pth")
    return clip_folder(tmp_path / "clip"), tmp_path / "head.pth", mlp


def test_aesthetic_is_the_published_formula(aesthetic):
    folder, head, mlp = aesthetic
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    scorer = loaded(Aesthetic, "aesthetic", head, clip=folder)
    for i, shape in enumerate(SHAPES):
        image = photo(*shape, seed=i)
        with torch.no_grad():
            embedding = model.eval().encode_image(transform(as_pil(image))[None])
        expected = mlp.layers(F.normalize(embedding)).item()
        assert scorer.score(image[None], [""]).item() == pytest.approx(expected, abs=2e-4)


def test_aesthetic_contract(aesthetic):
    folder, head, _ = aesthetic
    check_contract(
        lambda batch: loaded(Aesthetic, "aesthetic", head, batch, clip=folder),
        photos(6),
        PROMPTS,
        reads_prompts=False,
    )


def test_aesthetic_in_half_precision(aesthetic, monkeypatch):
    folder, head, _ = aesthetic
    make = lambda batch: loaded(Aesthetic, "aesthetic", head, batch, clip=folder)  # noqa: E731
    check_half_precision(monkeypatch, make, photos(6), PROMPTS, 3e-3)
