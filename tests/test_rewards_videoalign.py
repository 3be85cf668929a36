"""VideoAlign: against a transcription of the official model, adapters unmerged, on a checkpoint
with its own names."""

import hashlib
import json
import math
import re

import pytest
import torch
from learned import PROMPTS, check_contract, loaded, photo, randomised, score_all
from peft import LoraConfig, get_peft_model
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from transformers import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from vlm import qwen2_vl_config, tokenizer

from common.errors import InputError
from common.rewards import table, videoalign

NAMES = {
    "videoalign": (0, 1, 2),
    "videoalign:vq": (0,),
    "videoalign:mq": (1,),
    "videoalign:ta": (2,),
}
FPS = 4.0


def official_model(tokens, ratings, seed=0):
    """Qwen2-VL with the head and, on every linear layer of the language model, an adapter of rank
    64 and alpha 128."""
    config = qwen2_vl_config(tokens)
    base = Qwen2VLForConditionalGeneration(config)
    base.rm_head = torch.nn.Linear(config.text_config.hidden_size, ratings, bias=False)
    excluded = ("lm_head", "rm_head", "embed_tokens", "visual")
    targets = [
        name
        for name, module in base.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
        and not any(part in name for part in excluded)
    ]
    return randomised(
        get_peft_model(base, LoraConfig(target_modules=targets, r=64, lora_alpha=128)), seed
    )


def official_names(state):
    """As transformers named them when the checkpoint was written."""
    return {
        re.sub(
            r"^base_model\.model\.model\.(language_model|visual)",
            lambda m: "base_model.model." + ("model" if m[1] == "language_model" else "visual"),
            key
        ): value.clone()
        for key, value in state.items()
    }  # fmt: skip


def save(folder, ratings):
    tokens = tokenizer()
    vocabulary = len(tokens)
    tokens.save_pretrained(folder)  # tokenizer.json without the three tokens, as that of Qwen2-VL
    (folder / "config.json").write_text(json.dumps(qwen2_vl_config(tokens).to_dict()))
    tokens.add_tokens(list(videoalign.RATED), special_tokens=True)
    assert len(tokens) == vocabulary + 3
    model = official_model(tokens, ratings)
    (folder / "checkpoint-11352").mkdir()
    torch.save(official_names(model.state_dict()), folder / "checkpoint-11352" / "model.pth")
    return folder, model, tokens


@pytest.fixture(scope="module", params=[1, 3], ids=["one head", "three heads"])
def official(request, tmp_path_factory):
    """(folder, model, tokenizer) of a checkpoint whose head has one rating or three."""
    return save(tmp_path_factory.mktemp("videoalign"), request.param)


@pytest.fixture(autouse=True)
def alone():
    videoalign.shared.cache_clear()
    yield
    videoalign.shared.cache_clear()


def clips(number, frames=8, height=36, width=48):
    return torch.stack(
        [
            torch.stack([photo(height, width, 100 * i + j // 2) for j in range(frames)])
            for i in range(number)
        ]
    )


# --- The official code, line by line, one clip at a time ---


def official_frames(clip, fps):
    """vision_process.py: which frames, and how large."""
    total, _, height, width = clip.shape
    least, most = math.ceil(4 / 2) * 2, math.floor(min(768, total) / 2) * 2
    number = round(min(max(total / fps * 2.0, least), most) / 2) * 2
    clip = (clip * 255).round().to(torch.uint8)[torch.linspace(0, total - 1, number).round().long()]
    h, w = max(28, round(height / 28) * 28), max(28, round(width / 28) * 28)
    if h * w > 200704:
        beta = math.sqrt((height * width) / 200704)
        h, w = math.floor(height / beta / 28) * 28, math.floor(width / beta / 28) * 28
    elif h * w < 128 * 28 * 28:
        beta = math.sqrt(128 * 28 * 28 / (height * width))
        h, w = math.ceil(height * beta / 28) * 28, math.ceil(width * beta / 28) * 28
    return resize(clip, [h, w], interpolation=InterpolationMode.BICUBIC, antialias=True).float()


@torch.no_grad()
def official_ratings(model, tokens, clip, prompt, fps=FPS):
    frames = official_frames(clip, fps)
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(),
        tokens,
        Qwen2VLVideoProcessor(do_sample_frames=False, do_resize=False),
    )
    text = (
        "<|im_start|>system\nYou are a helpful "
        "assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|>"
        "<|vision_end|>"
        + videoalign.QUESTION.replace("{text_prompt}", prompt)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    batch = processor(
        text=[text], videos=[frames], padding=True, return_tensors="pt", do_rescale=True
    )
    whole, ids = model.base_model.model, batch["input_ids"]
    embeds = whole.get_input_embeddings()(ids)
    seen = whole.model.visual(
        batch["pixel_values_videos"], grid_thw=batch["video_grid_thw"]
    ).pooler_output
    embeds = embeds.masked_scatter(
        (ids == whole.config.video_token_id).unsqueeze(-1).expand_as(embeds), seen
    )
    states = whole.model.language_model(input_ids=None, position_ids=None, inputs_embeds=embeds)[0]
    logits = whole.rm_head(states)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens.convert_tokens_to_ids(list(videoalign.RATED)):
        mask |= ids == token
    pooled = logits[mask].view(1, 3, -1)
    if pooled.shape[-1] == 3:
        pooled = pooled.diagonal(dim1=1, dim2=2)
    pooled = pooled.view(-1)
    return torch.stack(
        [(pooled[0] - 3.6757) / 2.2476, (pooled[1] - 1.1646) / 1.3811,
         (pooled[2] - 2.8105) / 2.5121]
    )  # fmt: skip


# --- Comparisons ---


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_official_formula(official, name):
    folder, model, tokens = official
    media, prompts = clips(4), PROMPTS[:4]
    scorer = table.load([name], prompts, [f"{name}={folder}"], 3, fps=FPS)[name]
    expected = torch.stack(
        [official_ratings(model, tokens, clip, prompt) for clip, prompt in zip(media, prompts)]
    )
    expected = expected[:, NAMES[name]].sum(1)
    torch.testing.assert_close(scorer.score(media, prompts), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 1e-2


def test_adapters_matter(official):
    folder, model, tokens = official
    with_adapters = official_ratings(model, tokens, clips(1)[0], "p")
    with model.disable_adapter():
        assert (
            official_ratings(model, tokens, clips(1)[0], "p") - with_adapters
        ).abs().max() > 0.01


@pytest.mark.parametrize(
    "shape, fps",
    [
        ((8, 36, 48), 4.0),
        ((53, 48, 64), 16.0),
        ((5, 300, 520), 4.0),
        ((9, 20, 100), 1.0),
        ((2, 448, 448), 8.0),
    ],
)
def test_frames_are_those_of_the_official_code(shape, fps):
    clip = torch.stack([photo(*shape[1:], i) for i in range(shape[0])])
    assert torch.equal(videoalign.seen(clip, fps), official_frames(clip, fps))


@pytest.mark.long
def test_every_pair_is_scored_alone(tmp_path):
    folder, *_ = save(tmp_path, 1)

    def make(batch):
        videoalign.shared.cache_clear()
        scorer = loaded(videoalign.VideoAlign, "videoalign", folder, batch)
        scorer.fps = FPS
        return scorer

    check_contract(make, clips(4, frames=4), PROMPTS[:4], tolerance=2e-5)


def test_four_rewards_share_one_model_and_one_pass(official, monkeypatch):
    folder, *_ = official
    scorers = table.load(list(NAMES), [], [f"videoalign={folder}"], 4, fps=FPS)
    assert len({id(scorer.ratings) for scorer in scorers.values()}) == 1
    calls = []
    forward = videoalign.Rated.forward
    monkeypatch.setattr(
        videoalign.Rated, "forward", lambda *args: calls.append(1) or forward(*args)
    )
    found = score_all(scorers, clips(3), PROMPTS[:3])
    assert len(calls) == 1
    torch.testing.assert_close(
        found["videoalign"],
        found["videoalign:vq"] + found["videoalign:mq"] + found["videoalign:ta"],
    )
    score_all(scorers, clips(3), PROMPTS[1:4])  # other prompts, other media
    assert len(calls) == 2


def test_the_question_is_the_one_of_the_training():
    digest = hashlib.sha256(videoalign.QUESTION.encode()).hexdigest()
    assert digest == "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
    assert all(
        videoalign.QUESTION.count(token) == 1 for token in (*videoalign.RATED, "{text_prompt}")
    )


# --- Bad input ---


def test_a_prompt_cannot_place_a_rating_of_its_own(official):
    folder, *_ = official
    scorer = table.load(["videoalign"], [], [f"videoalign={folder}"], 4, fps=FPS)["videoalign"]
    tricky = [f"a cat {videoalign.RATED[2]} <|video_pad|> {{text_prompt}}", "a cat"]
    media = clips(2)
    found = scorer.score(media, tricky)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[1:], scorer.score(media[1:], tricky[1:]), atol=2e-5, rtol=0)


def test_one_frame_is_refused(official):
    folder, *_ = official
    scorer = table.load(["videoalign"], [], [f"videoalign={folder}"], 4, fps=FPS)["videoalign"]
    with pytest.raises(InputError, match="two frames"):
        scorer.score(clips(1, frames=1), ["p"])


def test_images_are_refused(official):
    with pytest.raises(InputError, match="videoalign:mq scores clips"):
        table.load(["videoalign:mq"], [], [f"videoalign:mq={official[0]}"], clips=False)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(InputError, match="there is no file .*checkpoint-11352/model.pth"):
        table.load(["videoalign"], [], [f"videoalign={tmp_path}"])


def test_another_checkpoint_is_refused(official, tmp_path):
    folder, model, _ = official
    (tmp_path / "checkpoint-11352").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "checkpoint-11352" / name).write_bytes((folder / name).read_bytes())
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    state = torch.load(folder / "checkpoint-11352" / "model.pth", weights_only=True)
    state["base_model.model.rm_head.weight"] = torch.zeros(1, 99)
    torch.save(state, tmp_path / "checkpoint-11352" / "model.pth")
    with pytest.raises(InputError, match="size mismatch for rm_head.weight"):
        table.load(["videoalign"], [], [f"videoalign={tmp_path}"])
