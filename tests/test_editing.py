"""Editing models against their own pipelines, prompts with source images, and rewards that see the
source."""

import json
from functools import partial

import editing
import numpy as np
import open_clip
import pipelines
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from common import models, sde
from common.args import Args
from common.errors import InputError
from common.models.flux import FluxKontext
from common.models.qwen_edit import QwenImageEdit
from common.prompts import caption_of, fields_of, images_of, pictures, read_prompts
from common.reporting.pictures import beside_sources
from common.rewards import Rewards
from common.rewards.judge import JudgeEdit
from common.rewards.preserve import Preserve
from common.rewards.scorer import scores_of
from common.rewards.weights import Source

WORDS = ["make the red circle blue", "remove the square"]
SIZE = dict(height=32, width=64)


@pytest.fixture
def images(tmp_path):
    """One of the samples' size and one of their ratio."""
    return [
        str(editing.save(tmp_path / f"{number}.png", *size, seed=number))
        for number, size in enumerate([(64, 32), (100, 50)])
    ]


def official(model, prompt, noise, sigmas):
    """The pipeline's own sample [1, 3, H, W] of one prompt."""
    pipe = model.pipe
    pipe.set_progress_bar_config(disable=True)
    settings = dict(
        SIZE, prompt=caption_of(prompt), latents=noise, num_inference_steps=len(sigmas) - 1,
        sigmas=sigmas[:-1].tolist(), output_type="pt",
    )  # fmt: skip
    sources = [Image.open(path) for path in images_of(prompt)]
    if isinstance(model, QwenImageEdit):
        settings |= dict(negative_prompt=" ", true_cfg_scale=model.guidance)
        return pipe(image=sources, **settings).images
    # its default is an area of 1024x1024, and one of the sizes of its training for the source
    settings |= dict(max_area=32 * 64, _auto_resize=False, max_sequence_length=32)
    source = sources[0].resize((64, 32), Image.Resampling.LANCZOS)
    return pipe(image=source, guidance_scale=model.guidance, **settings).images


FAMILIES = {
    "kontext": (pipelines.kontext, FluxKontext, 1),
    "qwen-edit": (pipelines.qwen_edit, QwenImageEdit, 1),
    "qwen-edit, two": (pipelines.qwen_edit, QwenImageEdit, 2),
    "qwen-edit 2511": (partial(pipelines.qwen_edit, zero_cond_t=True), QwenImageEdit, 1),
}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_ode_sampler_gives_the_pipelines_own_edits(family, guidance, images):
    make, cls, number = FAMILIES[family]
    model = cls(make(), **SIZE, guidance=guidance)
    model.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    orders = (images, images[::-1])
    prompts = ["\t".join([*paths[:number], text]) for paths, text in zip(orders, WORDS)]
    sigmas = model.sigmas(3, 1.0)
    noise = sde.RowNoise(0, 0, range(2))(model.noise_shape)
    velocity = partial(model.velocity, cond=model.encode(prompts))
    latents, _ = sde.rollout(velocity, noise, sigmas, torch.zeros(3), None)
    ours = model.decode(latents[:, -1])
    theirs = torch.cat([official(model, *row, sigmas) for row in zip(prompts, noise[:, None])])
    assert ours.std() > 0.05 and (ours[0] - ours[1]).abs().max() > 1e-2
    assert (ours - theirs).abs().max() <= 1e-5
    # the source decides the sample
    other = model.encode([prompts[1].rpartition("\t")[0] + f"\t{WORDS[0]}"])
    first = {name: value[:1] for name, value in model.encode(prompts).items()}
    assert (model.velocity(noise[:1], 0.5, other) - model.velocity(noise[:1], 0.5, first)).any()


def test_a_blank_conditioning_has_the_shapes_of_a_real_one_with_two_images(images):
    model = QwenImageEdit(pipelines.qwen_edit(), **SIZE)
    model.sources = 2
    real, blank = model.encode(["\t".join([*images, WORDS[0]])]), model.blank()
    assert real.keys() == blank.keys()
    assert all(value.shape == real[name].shape[1:] for name, value in blank.items())


@torch.no_grad()
def test_batched_guidance_equals_sequential(images):
    found = []
    for batched in (False, True):
        model = QwenImageEdit(pipelines.qwen_edit(), **SIZE, guidance=4, batched_guidance=batched)
        cond = model.encode([f"{path}\t{text}" for path, text in zip(images, WORDS)])
        found.append(model.velocity(sde.RowNoise(0, 0, range(2))(model.noise_shape), 0.8, cond))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


@torch.no_grad()
def test_the_middle_of_a_source_of_another_ratio_is_edited(tmp_path, images):
    wide = Image.open(images[0])
    padded = Image.new("RGB", (64, 64), "red")
    padded.paste(wide, (0, 16))
    padded.save(tmp_path / "square.png")
    model = FluxKontext(pipelines.kontext(), **SIZE)
    tokens = [
        model.encode([f"{path}\ta fox"])["references"]
        for path in (images[0], tmp_path / "square.png")
    ]
    assert torch.equal(*tokens)


def test_the_gradient_of_a_step_is_that_of_plain_pytorch(images):
    """The transformer's own call, and the surrogate of Flow-GRPO's transition, written again."""
    model = FluxKontext(pipelines.kontext(), **SIZE, guidance=2.5)
    transformer = model.pipe.transformer
    cond = model.encode([f"{path}\t{text}" for path, text in zip(images, WORDS)])
    x, x_next = torch.randn(2, 2, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    sigma, sigma_next, s, advantages = 0.8, 0.7, 0.6, torch.tensor([1.3, -0.4])

    _, log_prob, _ = sde.sde_step(
        model.velocity(x, sigma, cond), x, sigma, sigma_next, s, x_next=x_next
    )
    (-advantages * (log_prob - log_prob.detach()).exp()).mean().backward()
    ours = {name: weight.grad for name, weight in transformer.named_parameters()}
    transformer.zero_grad(set_to_none=True)

    rows, columns = 2, 4
    ids = torch.tensor(
        [(image, row, column) for image in (0.0, 1.0) for row in range(rows)
         for column in range(columns)]
    )  # fmt: skip
    velocity = transformer(
        hidden_states=torch.cat([x, cond["references"]], 1),
        encoder_hidden_states=cond["encoder_hidden_states"],
        pooled_projections=cond["pooled_projections"],
        timestep=torch.full((2,), sigma),
        guidance=torch.full((2,), 2.5),
        txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3),
        img_ids=ids,
    ).sample[:, : rows * columns]
    dt = sigma_next - sigma
    drift = velocity + s**2 / (2 * sigma) * (x + (1 - sigma) * velocity)
    mean, std = x + drift * dt, s * (-dt) ** 0.5
    log_prob = torch.distributions.Normal(mean, std).log_prob(x_next).mean((1, 2))
    (-advantages * (log_prob - log_prob.detach()).exp()).mean().backward()
    for name, weight in transformer.named_parameters():
        assert (ours[name] - weight.grad).abs().max() <= 1e-5 * max(1, weight.grad.abs().max())
    assert sum(weight.grad.abs().sum() for weight in transformer.parameters()) > 1e-3


# --- Prompts ---


def test_lines_of_text_and_of_json_hold_one_image_or_several(tmp_path, images):
    (tmp_path / "a.txt").write_text("0.png\tone\n0.png\t1.png\ttwo\nno\timage\n")
    assert read_prompts(tmp_path / "a.txt") == [
        f"{images[0]}\tone", f"{images[0]}\t{images[1]}\ttwo", "no image"
    ]  # fmt: skip
    rows = [
        {"prompt": "one", "image": "0.png", "text": "STOP"},
        {"prompt": "two", "images": ["0.png", images[1]]},
        {"prompt": "none"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(tmp_path / "a.jsonl")
    assert found == [f"{images[0]}\tone", f"{images[0]}\t{images[1]}\ttwo", "none"]
    assert [fields_of(prompt) for prompt in found] == [{"text": "STOP"}, {}, {}]
    assert [images_of(prompt) for prompt in found] == [images[:1], images, []]
    assert caption_of(found[1]) == "two"


@pytest.mark.parametrize(
    "row", [dict(image=5), dict(image=""), dict(images="0.png"), dict(images=[1]),
            dict(image="0.png", images=["0.png"])]
)  # fmt: skip
def test_an_image_that_is_no_path_is_one_clear_line(tmp_path, images, row):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "one", **row}))
    with pytest.raises(InputError, match="row 1 of .* must have its images as one path"):
        read_prompts(tmp_path / "a.jsonl")


def test_sources_that_a_model_cannot_take_are_one_clear_line(tmp_path, images, monkeypatch):
    one, two = images[0], "\t".join(images)
    cases = [
        ([f"{two}\ta fox"], FluxKontext, "'a fox' has 2 images, and this model takes 1"),
        (["a fox"], FluxKontext, "'a fox' has no image. Write lines IMAGE <tab> CAPTION"),
        ([f"{one}\ta", f"{two}\tb"], QwenImageEdit, "'b' has 2 images, and the first prompt has 1"),
        ([f"{two}\t{two}\ta"], QwenImageEdit, "'a' has 4 images, and this model takes 3"),
        ([f"{one}\t{tmp_path}/none.png\ta"], QwenImageEdit, "there is no image .*none.png"),
    ]
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "0.png").read_bytes()[:100])
    cases.append(([f"{one}\t{cut}\ta"], QwenImageEdit, "cut.png does not load"))
    deep = tmp_path / "deep.tiff"
    Image.fromarray(np.arange(48, dtype=np.float32).reshape(6, 8)).save(deep)
    cases.append(([f"{deep}\ta"], FluxKontext, "deep.tiff .*more than 8 bits"))
    for prompts, cls, line in cases:
        with pytest.raises(InputError, match=line):
            cls.check(prompts)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(InputError, match="0.png does not load .DecompressionBombError"):
        FluxKontext.check([f"{one}\ta"])


def test_a_photograph_is_turned_before_it_is_cropped(tmp_path):
    upright = Image.open(editing.save(tmp_path / "a.png", 24, 48))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    found = [pictures.sources([f"{tmp_path}/{n}.png\tx"], 48, 24) for n in "ab"]
    assert torch.equal(*found)
    shown = torch.from_numpy(np.array(upright)).movedim(-1, 0)
    assert torch.equal((found[0][0, 0] * 255).round().byte(), shown)


# --- Rewards ---


class Same:
    """Score 1 for a sample that equals its first source."""

    video, scale, range, fields = False, 0.1, (None, 1.0), ("source", "weight")

    def score(self, media, prompts, source, weight):
        assert source.shape == (len(prompts), 1, *media.shape[1:]) and len(weight) == len(prompts)
        return 1 - (media - source[:, 0]).abs().amax((1, 2, 3))


def test_a_reward_gets_the_source_and_the_fields_of_its_prompt(tmp_path, images):
    rows = [{"prompt": text, "image": path, "weight": 1} for path, text in zip(images, WORDS)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = read_prompts(tmp_path / "a.jsonl")
    media = pictures.sources(prompts, 32, 64)[:, 0]
    assert scores_of(Same(), media, prompts).tolist() == [1, 1]
    assert (scores_of(Same(), media.flip(0), prompts) < 0.9).all()
    clips = media[:, None].repeat(1, 3, 1, 1, 1)  # frames of a clip with the same first frame
    assert scores_of(Same(), clips, prompts).tolist() == [1, 1]


def test_a_reward_without_a_source_is_refused_before_it_loads():
    with pytest.raises(InputError, match="reward preserve compares samples with their source"):
        Rewards(Args(reward=("preserve",)), ["a fox"])


@torch.no_grad()
def test_preserve_is_the_cosine_of_clips_embeddings(images):
    path = str(models.ASSETS / "tiny-clip")
    reward = Preserve()
    reward.load(Source("preserve", {"clip": path}))
    media = torch.rand(2, 3, 32, 32)
    source = pictures.sources([f"{images[0]}\t{images[1]}\ta"] * 2, 32, 32)
    found = reward.score(media, ["a", "a"], source)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")

    def embedded(image):
        levels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        embedding = model.eval().encode_image(transform(Image.fromarray(levels))[None])
        return torch.nn.functional.normalize(embedding, dim=-1)[0]

    for row in range(2):
        cosines = [embedded(media[row]) @ embedded(image) for image in source[row]]
        assert abs(found[row] - max(cosines)) <= 1e-5
    copies = reward.score(source[:, 0], ["a", "a"], source)
    assert (copies - 1).abs().max() <= 1e-5


def test_the_judge_sees_the_sources_first_and_then_the_edit(images):
    judge = JudgeEdit()
    judge.judge, judge.fps = dict(fps=2.0, expected=False), 15.0
    source = pictures.sources(["\t".join([*images, WORDS[0]])], 32, 64)[0]
    sample = torch.rand(3, 32, 64)
    (message,) = judge.question(sample, WORDS[0], source)
    *shown, words = message["content"]
    assert len(shown) == 3
    for part, image in zip(shown, [*source, sample]):
        pixels = torch.from_numpy(np.array(part["image"])).movedim(-1, 0)
        assert torch.equal(pixels, (image * 255).round().byte())
    for said in ("The last image was made", WORDS[0], "Instruction:", "Preservation:", "1.00"):
        assert said in words["text"]


# --- Pictures of a run ---


def test_the_pictures_show_source_before_and_after(tmp_path, images):
    prompts = [f"{path}\t{text}" for path, text in zip(images, WORDS)]
    source = pictures.sources(prompts, 32, 64)[:, 0]
    before, after = torch.randint(0, 256, (2, 2, 3, 32, 64)) / 255
    assert torch.equal(beside_sources(tmp_path, before, prompts), torch.cat([source, before], 3))
    for _ in range(2):
        found = beside_sources(tmp_path, after, prompts)
        assert (found - torch.cat([source, before, after], 3)).abs().max() < 1e-6
