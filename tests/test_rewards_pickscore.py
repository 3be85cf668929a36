"""PickScore: against the formula of its model card, with transformers' own processor and
tokenizer."""

import json

import open_clip
import pytest
import torch
from learned import (
    PROMPTS,
    SHAPES,
    as_pil,
    check_contract,
    check_half_precision,
    loaded,
    photo,
    photos,
    randomised,
)
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from common.errors import InputError
from common.rewards import table
from common.rewards.pickscore import PickScore

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in the layout of the hub: config.json and model.safetensors, old numbers of
    positions included."""
    folder = tmp_path_factory.mktemp("pickscore")
    vision = dict(SMALL, image_size=56, patch_size=14)
    config = CLIPConfig(
        text_config=dict(SMALL, eos_token_id=2), vision_config=vision, projection_dim=48
    )
    model = randomised(CLIPModel(config), seed=1)
    model.logit_scale.data.fill_(4.6)
    config.save_pretrained(folder)
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file({**model.state_dict(), **positions}, folder / "model.safetensors")
    return folder


def clip_tokenizer():
    """transformers' tokenizer over the vocabulary that open_clip ships."""
    simple = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in simple.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(simple.bpe_ranks), model_max_length=77)


def model_card(folder, image, prompt):
    """Of one picture and one prompt."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    words = clip_tokenizer()(
        [prompt], padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        image_embs = model.get_image_features(
            **processor([as_pil(image)], return_tensors="pt")
        ).pooler_output
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(**words).pooler_output
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        return (model.logit_scale.exp() * (text_embs @ image_embs.T)[0]).item()


def test_pickscore_is_the_model_cards(folder):
    scorer = loaded(PickScore, "pickscore", folder)
    images = [photo(*shape, seed=i) for i, shape in enumerate([*SHAPES, (56, 59)])]
    ours = [scorer.score(image[None], [prompt]).item() for image, prompt in zip(images, PROMPTS)]
    expected = [model_card(folder, image, prompt) for image, prompt in zip(images, PROMPTS)]
    assert ours == pytest.approx(expected, abs=1e-3)  # of about 100
    assert max(ours) - min(ours) > 2


def test_contract(folder):
    check_contract(
        lambda batch: loaded(PickScore, "pickscore", folder, batch),
        photos(6),
        PROMPTS,
        tolerance=1e-3,
    )


def test_the_configuration_is_found_beside_a_file(folder):
    media = photos(2)
    whole, file = (
        loaded(PickScore, "pickscore", folder),
        loaded(PickScore, "pickscore", folder / "model.safetensors"),
    )
    assert torch.equal(whole.score(media, PROMPTS[:2]), file.score(media, PROMPTS[:2]))


def test_a_broken_configuration_is_one_line(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="--reward-path pickscore=.* does not load") as error:
        table.load(["pickscore"], [], [f"pickscore={tmp_path}"])
    assert "\n" not in str(error.value)
    about = json.loads((folder / "config.json").read_text())
    about["projection_dim"] = 40
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"size mismatch for \w+_projection.weight"):
        loaded(PickScore, "pickscore", tmp_path)


def test_half_precision_is_close(folder, monkeypatch):
    check_half_precision(
        monkeypatch,
        lambda batch: loaded(PickScore, "pickscore", folder, batch),
        photos(6),
        PROMPTS,
        0.3,
    )
