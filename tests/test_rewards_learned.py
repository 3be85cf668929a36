"""Learned rewards in a run: where weights are found, the frames of clips, what is only watched,
every bad input."""

import importlib
import json
import shutil

import huggingface_hub
import open_clip
import pytest
import torch
from conftest import ROOT
from learned import CONFIG, PROMPTS, as_pil, clip_folder, photos, score_all

import bpgo
import grpo_base
import self_paced
import slas
from common import rewards
from common.errors import InputError
from common.prompts import read_prompts
from common.prompts.sets import HPSV2
from common.rewards import table, weights
from common.rewards.clip import HPSv2
from common.rewards.scorer import chosen_frames
from common.rewards.weights import Source
from worlds import build_tiny_clip
from worlds.building import clip_tokenizer

LEARNED = (
    "hpsv2",
    "hpsv2.1",
    "clip",
    "clip-h",
    "pickscore",
    "aesthetic",
    "imagereward",
    "videoclip-xl",
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hugging Face cache and no network; put(repo, file, path) fills it, as a download
    would have."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repo, file, path, kind="models"):
        folder = cache / f"{kind}--{repo.replace('/', '--')}"
        target = folder / "snapshots" / ("0" * 40) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs/main").write_text("0" * 40)
        shutil.copy(path, target)

    return put


def refused(*args, **kwargs):
    """The one line with which rewards.load refuses this."""
    with pytest.raises(InputError) as error:
        table.load(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Weights ---


@pytest.mark.parametrize("name", LEARNED)
def test_missing_weights_name_the_file_the_hub_and_the_flag(hub, name):
    message = refused([name], ["a dog"])
    name = "clip" if name == "aesthetic" else name  # which asks for the CLIP below it first
    module, _, attribute = rewards.REWARDS[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    assert message.startswith(f"reward {name}: {cls.file} of {cls.repo} does not load")
    assert (
        f"hf download {cls.repo} {cls.file}" in message and f"--reward-path {name}=FILE" in message
    )


def test_weights_of_the_cache_are_found(tmp_path, hub, monkeypatch):
    folder = clip_folder(tmp_path / "clip")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", CONFIG)
    model = open_clip.create_model(f"local-dir:{folder}")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "hps.pt")
    hub(HPSv2.repo, HPSv2.file, tmp_path / "hps.pt")
    found = table.load(["hpsv2"], [])
    given = table.load(["hpsv2"], [], [f"hpsv2={tmp_path / 'hps.pt'}"], reward_batch=2)
    media = photos(3)
    scores = [score_all(scorers, media, PROMPTS[:3])["hpsv2"] for scorers in (found, given)]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-6, rtol=0)
    assert given["hpsv2"].batch == 2 and found["hpsv2"].batch == 16


def test_a_file_beside_the_weights_wins_over_the_hub(tmp_path, hub):
    (tmp_path / "weights.pt").write_text("")
    (tmp_path / "hub.txt").write_text("")
    hub("some/one", "vocab.txt", tmp_path / "hub.txt")
    source = Source("r", {"r": str(tmp_path / "weights.pt")})
    assert source.find("some/one", "weights.pt") == tmp_path / "weights.pt"
    assert "snapshots" in str(source.find("some/one", "vocab.txt", beside=True))
    (tmp_path / "vocab.txt").write_text("")
    assert source.find("some/one", "vocab.txt", beside=True) == tmp_path / "vocab.txt"


@pytest.mark.parametrize(
    "spec, words",
    [
        ("clip", "--reward-path clip: write NAME=FILE"),
        ("clip=", "--reward-path clip=: write NAME=FILE"),
        ("clap=assets", "there is no 'clap'; did you mean clip"),
        ("clip=no/such/file.pt", "--reward-path clip=no/such/file.pt: there is no no/such/file.pt"),
    ],
)
def test_bad_path(spec, words):
    assert words in refused(["jpeg"], [], [spec])


def test_a_folder_without_the_weights_is_refused(tmp_path):
    message = refused(["hpsv2"], [], [f"hpsv2={tmp_path}"])
    assert f"there is no file {tmp_path}/HPS_v2_compressed.pt" in message


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder, other = (
        clip_folder(tmp_path / "one"),
        clip_folder(tmp_path / "two", config={**CONFIG, "embed_dim": 40}),
    )
    file = "open_clip_model.safetensors"
    shutil.copy(other / file, folder / file)
    message = refused(["clip"], [], [f"clip={folder}"])
    assert (
        f"reward clip: checkpoint {folder}/{file} does not load" in message
        and "size mismatch" in message
    )
    deeper = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "layers": 3}}
    shutil.copy(clip_folder(tmp_path / "three", config=deeper) / file, folder / file)
    assert 'Unexpected key(s) in state_dict: "visual.transformer.resblocks.2' in refused(
        ["clip"], [], [f"clip={folder}"]
    )
    shutil.copy(clip_folder(tmp_path / "four") / file, tmp_path / "three" / file)
    assert 'Missing key(s) in state_dict: "visual.transformer.resblocks.2' in refused(
        ["clip"], [], [f"clip={tmp_path / 'three'}"]
    )


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"version https://git-lfs.github.com/spec/v1\n"]
)
@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, file):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match="reward r: checkpoint .* does not load ") as error:
        weights.read("r", tmp_path / file)
    assert "\n" not in str(error.value)


def test_a_broken_configuration_is_refused(tmp_path):
    folder = clip_folder(tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    strange = [{**config, "model_cfg": {**CONFIG, "custom_text": True}}]
    strange += [{**config, "preprocess_cfg": {"resize_mode": "x"}}]
    for text in ("{", "[]", '{"model": 1}', *map(json.dumps, strange)):
        (folder / "open_clip_config.json").write_text(text)
        message = refused(["clip"], [], [f"clip={folder}"])
        assert f"reward clip: --reward-path clip={folder} does not load" in message


def test_names_are_looked_at_before_weights(hub):
    assert "there is no 'jpg'" in refused(["hpsv2", "jpg"], [])
    assert "has no caption" in refused(["clip", "verifier"], ["a dog"])


def test_a_reward_for_clips_on_an_image_model():
    assert "reward motion scores clips, and this --model makes images" in refused(
        ["motion"], [], clips=False
    )
    assert list(table.load(["motion"], [], clips=True)) == ["motion"]
    for script in (grpo_base, bpgo, slas, self_paced):
        with pytest.raises(InputError, match="motion:quality scores clips"):
            script.main(grpo_base.cli.defaults(script.Args, reward=("motion:quality",)))


# --- Frames of clips ---


@pytest.mark.parametrize(
    "which, number, chosen",
    [
        ("all", 3, [0, 1, 2]),
        ("first", 9, [0]),
        ("middle", 9, [4]),
        ("middle", 8, [4]),
        (1, 9, [4]),
        (2, 9, [0, 8]),
        (3, 9, [0, 4, 8]),
        (4, 53, [0, 17, 35, 52]),
        (9, 9, list(range(9))),
        (100, 5, list(range(5))),
    ],
)
def test_chosen_frames(which, number, chosen):
    assert chosen_frames(which, number) == chosen


@pytest.mark.parametrize("which", ["first", "middle", "all", 1, 2, 3])
def test_a_clip_scores_the_mean_of_its_chosen_frames(tmp_path, which):
    path, clips, prompts = (
        f"clip={clip_folder(tmp_path / 'clip')}",
        photos(15).view(3, 5, 3, 60, 80),
        PROMPTS[:3],
    )
    ours = score_all(table.load(["clip"], [], [path], reward_frames=which), clips, prompts)["clip"]
    image = table.load(["clip"], [], [path])
    frames = [score_all(image, clips[:, i], prompts)["clip"] for i in chosen_frames(which, 5)]
    torch.testing.assert_close(ours, torch.stack(frames).mean(0), atol=1e-6, rtol=0)


# --- In a run ---


def test_a_learned_reward_trains_with_its_flags(train, tmp_path):
    """With weights of one's own, beside a verifier that is only watched; trained, logged and
    evaluated."""
    (tmp_path / "held.txt").write_text("a red circle\na blue square\n")
    settings = dict(
        reward=("clip=2",), reward_path=(f"clip={clip_folder(tmp_path / 'clip')}",), reward_batch=3
    )
    settings |= dict(
        watch=("verifier", "jpeg"), eval_prompts=str(tmp_path / "held.txt"), eval_every=1
    )
    _, (row, final) = train(steps=1, learning_rate=1e-3, **settings)
    assert row["reward_mean"] == pytest.approx(2 * row["clip_mean"], abs=1e-5)
    for one in (row, final):
        assert one["eval_reward"] == pytest.approx(2 * one["eval_clip"], abs=1e-5)
        assert 0 <= one["eval_verifier"] <= 1 and one["eval_jpeg"] < 0
    assert row["clip_mean"] != 0 and 0 <= row["verifier_mean"] <= 1 and row["jpeg_mean"] < 0


WATCHED = ("jpeg", "verifier:quality")


@pytest.mark.parametrize("script", [grpo_base, bpgo, slas, self_paced])
def test_watching_changes_nothing_but_the_metrics(train, script):
    stages = ("verifier:layout", "verifier") if script is self_paced else ("verifier",)
    settings = dict(reward=stages, learning_rate=1e-3, save_every=0, best_of=2)
    settings |= dict(thresholds=(0.5, 0.5)) if script is self_paced else {}
    settings |= dict(prior="sft") if script is bpgo else {}
    _, expected = train(script, "plain", **settings)
    _, rows = train(script, "watched", watch=WATCHED, **settings)
    for row, plain in zip(rows, expected, strict=True):
        assert {name: row[name] for name in plain} == plain
        assert row.keys() - plain.keys() == {f"{name}_mean" for name in WATCHED}
        assert row["jpeg_mean"] < 0 < row["verifier:quality_mean"]


def test_watching_what_is_trained_on_counts_it_once(train):
    _, expected = train(output="plain", steps=1, learning_rate=1e-3)
    _, rows = train(output="watched", steps=1, learning_rate=1e-3, watch=("verifier",))
    assert rows == expected


def test_a_resumed_run_may_watch_something_else(train):
    train(steps=1, save_every=1)
    _, rows = train(steps=2, save_every=1, resume="latest", watch=("jpeg",))
    assert "jpeg_mean" not in rows[0] and "jpeg_mean" in rows[1]


# --- The official prompts of HPSv2 ---


@pytest.fixture
def official_prompts(tmp_path, monkeypatch, hub):
    """Three prompts of each style in the cache, as the hpsv2 package downloads them: {style:
    prompts}"""
    import hpsv2

    monkeypatch.setattr(hpsv2, "root_path", str(tmp_path / "hps"))
    monkeypatch.setattr(hpsv2.utils, "root_path", str(tmp_path / "hps"))
    styles = {style: [f"{style} {i}: a \u732b, \u00e9" for i in range(3)] for style in HPSV2}
    for style, prompts in styles.items():
        (tmp_path / "p.json").write_text(json.dumps(prompts))
        hub("zhwang/HPDv2", f"benchmark/{style}.json", tmp_path / "p.json", "datasets")
    return styles


def test_official_prompts(official_prompts):
    for style, prompts in official_prompts.items():
        assert read_prompts(f"hpsv2:{style}") == prompts
    assert read_prompts("hpsv2:all") == sum(official_prompts.values(), [])


def test_official_prompts_without_a_network_or_style(tmp_path, hub, monkeypatch):
    import hpsv2

    monkeypatch.setattr(hpsv2.utils, "root_path", str(tmp_path / "hps"))
    for name, words in (
        ("hpsv2:photo", "hpsv2:photo .* does not load"),
        ("hpsv2:cats", "no 'cats'"),
    ):
        with pytest.raises(InputError, match=words) as error:
            read_prompts(name)
        assert "\n" not in str(error.value)


# --- The proxy of the shapes world ---


def test_tiny_clip_is_built_and_reached_as_clip(tmp_path):
    """Its builder at a few steps: the folder's layout, its size, and its score by open_clip's own
    factory."""
    folder = tmp_path / "tiny-clip"
    tokenizer = clip_tokenizer(build_tiny_clip.every_caption(), build_tiny_clip.TOKENS)
    config = build_tiny_clip.configuration(len(tokenizer))
    small = build_tiny_clip.Args(steps=3, batch=16, scenes=64)
    build_tiny_clip.save(build_tiny_clip.train(small, config, tokenizer), config, tokenizer, folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    scorers = table.load(["clip"], [], [f"clip={folder}"])
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image, caption = photos(1, 32, 32), "a yellow triangle right of a black circle"
    words = open_clip.get_tokenizer(f"local-dir:{folder}")([caption])
    assert words.tolist()[0][0] == 0 and words.tolist()[0][-1] == 1  # nothing is cut off
    with torch.no_grad():
        seen = model.eval().encode_image(transform(as_pil(image[0]))[None], normalize=True)
        expected = (seen @ model.encode_text(words, normalize=True).T).item()
    assert score_all(scorers, image, [caption])["clip"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(
    not (ROOT / "assets/tiny-clip").is_dir(), reason="assets/tiny-clip is not built"
)
def test_tiny_clip_agrees_with_the_verifier_but_not_quite():
    correlation = build_tiny_clip.check(ROOT / "assets/tiny-clip", seed=1, number=32)
    assert 0.4 < correlation["within a group"] < 0.95
