"""The world of letters and tiny-letters: renderer and reader, captions and tokenizers, where the
base model is, and where training takes it."""

import os
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, metrics
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

import grpo_base
from common import models, sde
from common.args import defaults
from common.prompts import read_prompts
from common.reporting import captions as under
from common.reporting import pictures
from common.rewards import ocr, table
from lab import readers
from worlds import build_tiny_letters, letters

PRESET = models.settings("tiny-letters")
HELD_OUT = read_prompts(PRESET["eval_prompts"])


@pytest.fixture(scope="module")
def pipe():
    return FluxPipeline.from_pretrained(PRESET["source"], dtype=torch.float32)


# --- Words ---


def test_words_are_of_the_alphabet_and_held_out_ones_are_never_trained_on():
    train, held_out = letters.split_words()
    assert len(held_out) == 64 and len(train) == 128
    assert set(train) | set(held_out) == set(letters.WORDS) and len(set(letters.WORDS)) == 192
    assert all(3 <= len(word) <= 5 and set(word) <= set(letters.ALPHABET) for word in letters.WORDS)
    args = build_tiny_letters.Args()
    built = letters.random_words(args.words, random.Random(args.seed))
    assert len(built) == args.words and not set(built) & set(letters.WORDS)
    assert {len(word) for word in built} == {3, 4, 5}


def test_the_prompt_files_are_those_of_the_words():
    for name, words in zip(("prompts", "eval_prompts"), letters.split_words()):
        assert read_prompts(PRESET[name]) == letters.captions(words)
        asked = [ocr.wanted_text(prompt) for prompt in letters.captions(words)]
        assert asked == [word.lower() for word in words]


def test_letters_are_wrong_as_often_as_asked():
    rng = random.Random(0)
    wrong = [letters.misspell("BREAD", 0.4, rng) for _ in range(2000)]
    share = sum(a != b for word in wrong for a, b in zip(word, "BREAD")) / 10_000
    assert share == pytest.approx(0.4, abs=0.02)  # 4 standard deviations
    assert all(len(word) == 5 and set(word) <= set(letters.ALPHABET) for word in wrong)
    assert letters.misspell("BREAD", 0.0, rng) == "BREAD"


# --- Renderer and reader ---


def test_rendered_words_are_read_exactly():
    words = letters.WORDS + letters.random_words(300, random.Random(1))
    images = letters.render(words)
    assert images.shape == (492, 3, 32, 80) and 0 <= images.min() and images.max() <= 1
    read, quality = letters.read(images)
    assert read == words
    assert quality.min() > 0.999
    assert letters.templates()[:, letters.EMPTY].max() == 0


def test_reading_survives_noise_and_other_colours():
    words = letters.random_words(100, random.Random(2))
    images = letters.render(words)
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert letters.read(images + noise)[0] == words
    assert letters.read(1 - images)[0] == words  # bright letters on a dark ground
    red_on_green = letters.render(words, ink=(0.8, 0.1, 0.1), ground=(0.1, 0.6, 0.2))
    assert letters.read(red_on_green)[0] == words


def test_what_is_no_letter_is_not_read_as_one():
    images = letters.render(["BREAD", "TEA", "LAMP"])
    images[0, :, 4:28, 16:32] = images[0, :, :1, :1]  # B EAD
    images[1, :, 4:28, 16:32] = 0  # a block over the E
    images[2] = images[2, :, :1, :1]  # nothing at all
    words, quality = letters.read(images)
    assert words == ["BEAD", "T?A", ""]
    assert quality[0] > 0.999 and quality[1] < 0.95 and quality[2] == 0


def test_the_rewards_follow_the_rule_of_ocr_whole():
    images = letters.render(["BREAD", "BREAK", "BREAD", "BRE", "XXXXX"])
    prompts = ['a sign that says "BREAD"'] * 5
    scorers = table.load(["letters", "letters:quality"], prompts)
    score = scorers["letters"].score(images, prompts)
    assert score.tolist() == pytest.approx([1, 0.8, 1, 0.6, 0])
    assert scorers["letters:quality"].score(images, prompts).tolist() == pytest.approx([1] * 5)
    surplus = scorers["letters"].score(images[:1], ['"EAD"'])
    assert surplus.item() == pytest.approx(1 / 3)


def test_the_published_reader_reads_the_renders():
    pytest.importorskip("rapidocr")
    words = letters.random_words(160, random.Random(5)) + letters.split_words()[1][:40]
    read = ocr.Reader().read(letters.render(words))
    right = sum(ocr.plain(a) == ocr.plain(b) for a, b in zip(read, words))
    assert right >= 190, [
        pair for pair in zip(read, words) if ocr.plain(pair[0]) != pair[1].lower()
    ]


# --- The model ---


def test_it_is_a_plain_pipeline_of_real_classes(pipe):
    classes = [type(part) for part in pipe.components.values() if part is not None]
    real = (AutoencoderKL, FluxTransformer2DModel, CLIPTextModel, T5EncoderModel)
    assert {*real, CLIPTokenizer, T5Tokenizer} <= set(classes)
    files = [file for file in (models.ASSETS / "tiny-letters").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8e6
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                dtypes = {tensors.get_tensor(key).dtype for key in tensors.keys()}
            assert dtypes == {torch.float16}, file


def test_captions_survive_the_tokenizers(pipe):
    for caption in read_prompts(PRESET["prompts"]) + HELD_OUT:
        word = caption.split('"')[1]
        ids = pipe.tokenizer_2(caption).input_ids
        assert len(ids) <= pipe.tokenizer_2.model_max_length == build_tiny_letters.T5_TOKENS
        pieces = pipe.tokenizer_2.convert_ids_to_tokens(ids)
        start = pieces.index("▁" + '"')
        assert "".join(pieces[start + 1 : start + 1 + len(word)]) == word  # a piece a letter
        assert pipe.tokenizer_2.decode(ids, skip_special_tokens=True) == caption
        clip = pipe.tokenizer(caption).input_ids
        assert len(clip) <= build_tiny_letters.CLIP_TOKENS
        assert pipe.tokenizer.unk_token_id not in clip[:-1]


def test_the_builders_slots_name_the_letter_of_each():
    assert build_tiny_letters.slots("BAY") == [1, 0, 18, 19, 19]
    assert build_tiny_letters.slots("YYYYY") == [18] * 5


def test_the_autoencoder_keeps_what_is_written(pipe):
    words = letters.split_words()[1][:24]
    latents = build_tiny_letters.encode(pipe.vae, letters.render(words))
    assert latents.shape == (24, 8, 4, 10)
    with torch.no_grad():
        rebuilt = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert letters.read(rebuilt)[0] == words


@pytest.fixture(scope="module")
def samples(pipe):
    """(prompts, images) of the base model: two noise-free samples of each held-out caption."""
    return HELD_OUT * 2, build_tiny_letters.draw(pipe, HELD_OUT * 2, seed=0)


def test_the_base_model_draws_every_letter_well(samples):
    prompts, images = samples
    assert images.shape == (128, 3, 32, 80)
    read, quality = letters.read(images)
    assert quality.mean() > 0.9
    pairs = [
        pair for word, prompt in zip(read, prompts) for pair in zip(word, prompt.split('"')[1])
    ]
    asked = {letter for _, letter in pairs}
    assert len(asked) >= 17 and asked == {letter for letter, wanted in pairs if letter == wanted}


@pytest.mark.parametrize("reward", ["ocr", "letters"])
def test_the_base_model_misspells_with_a_wide_spread(samples, reward):
    if reward == "ocr":
        pytest.importorskip("rapidocr")
    prompts, images = samples
    score = table.load([reward], prompts)[reward].score(images, prompts)
    assert 0.55 <= score.mean() <= 0.67
    assert score.view(2, -1).std(0, unbiased=False).mean() >= 0.08  # of two samples each


@torch.no_grad()
def test_it_samples_as_its_pipeline_does(pipe):
    prompts = HELD_OUT[:3]
    model = models.load("tiny-letters", torch.float32, prompts, height=32, width=80)
    assert model.noise_shape == (10, 32)
    noise, sigmas = sde.RowNoise(0, 0, range(3))(model.noise_shape), sde.shifted_sigmas(8, 1.0)
    velocity = partial(model.velocity, cond=model.encode(prompts))
    latents, _ = sde.rollout(velocity, noise, sigmas, torch.zeros(8), None)
    official = pipe(
        prompts, height=32, width=80, num_inference_steps=8, sigmas=sigmas[:-1].tolist(),
        latents=noise, output_type="pt", max_sequence_length=build_tiny_letters.T5_TOKENS,
    ).images  # fmt: skip
    assert official.std() > 0.05
    assert (model.decode(latents[:, -1]) - official).abs().max() <= 1e-5


# --- Training ---


def test_every_script_has_defaults_for_it():
    args = defaults(grpo_base.Args, "tiny-letters")
    assert args.reward == ("ocr",) and args.watch == ("letters",)
    assert (args.height, args.width) == (32, 80)


def test_a_run_writes_what_is_read_under_the_pictures(train, monkeypatch):
    pytest.importorskip("rapidocr")
    lines = []
    put = under.put
    monkeypatch.setattr(
        under, "put", lambda *args, **more: (lines.append(args[2]), put(*args, **more))
    )
    folder, rows = train(model="tiny-letters", steps=1, sample_every=1, sampling_steps=8)
    assert {"ocr_mean", "letters_mean"} <= rows[0].keys()
    assert (folder / "samples/step_000000.png").is_file() and len(lines) == 32  # before and after
    assert all(line.startswith("\nreads ") for line in lines)
    export = FluxPipeline.from_pretrained(folder / "export", dtype=torch.float32)
    images = build_tiny_letters.draw(export, HELD_OUT[:4], seed=0)
    assert images.shape == (4, 3, 32, 80) and letters.read(images)[1].mean() > 0.8


def test_pictures_without_a_reader_have_the_reward_alone(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(under, "put", lambda axis, prompt, end, **more: lines.append(end))
    images = torch.rand(2, 3, 8, 8)
    pictures.save_grid(tmp_path / "a.png", images, ["a", "b"], [0.5, 0.25])
    pictures.save_grid(tmp_path / "b.png", images, ["a", "b"], [0.5, 0.25], ["BRED", "中"])
    assert lines == ["\n0.50", "\n0.25", "\nreads 'BRED': 0.50", "\nreads '\\u4e2d': 0.25"]


def test_without_the_reader_a_run_says_what_to_install(monkeypatch, train):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(Exception, match="reward ocr needs the package rapidocr") as error:
        train(model="tiny-letters")
    assert ocr.INSTALL in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["grpo_base", "bpgo", "slas", "self_paced"])
def test_a_method_teaches_it_to_spell(script, tmp_path):
    pytest.importorskip("rapidocr")
    words = [sys.executable, str(ROOT / f"{script}.py"), "--model", "tiny-letters"]
    done = subprocess.run(
        [*words, "--output", str(tmp_path / "run"), "--tracker", "none"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics(tmp_path / "run") if "eval_reward" in row]
    for name in ("eval_ocr", "eval_letters"):
        assert rows[-1][name] - rows[0][name] >= 0.15, name


@pytest.mark.long
def test_a_few_steps_on_the_exact_reader_raise_the_reward(train):
    _, rows = train(
        model="tiny-letters", reward=("letters",), watch=(), steps=8, group_size=8, minibatches=2,
        prompts_per_step=8, sampling_steps=8, micro_batch=64, eval_every=8,
    )  # fmt: skip
    evaluations = [row["eval_letters"] for row in rows if "eval_letters" in row]
    assert len(evaluations) == 2 and evaluations[1] - evaluations[0] >= 0.04


# --- The proxy against the truth ---


def run(ocr, read):
    return {"ocr": ocr, "letters": read}


def test_the_table_of_readers_by_hand():
    base = {0: run((0.6, 0.8), (0.6, 0.7)), 1: run((0.6, 0.9), (0.6, 0.7))}
    other = {1: run((0.5, 0.9), (0.5, 0.9)), 7: run((0.5, 0.7), (0.5, 0.7))}
    lines = readers.table({"grpo_base.py": base, "slas.py": other}).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith(
        "| grpo_base.py | 2 | 0.600 -> **0.850** | 0.600 -> **0.700** | +0.150 ["
    )
    assert lines[2].endswith("] |  |")
    # no gap, and of the seed that both have .9 against .7
    assert lines[3].startswith("| slas.py | 2 | 0.500 -> **0.800** | 0.500 -> **0.800** | +0.000 [")
    assert lines[3].endswith("| +0.200 |")


def test_a_run_counts_from_its_second_evaluation_on(tmp_path):
    lines = '{"step": 0, "eval_ocr": 0.5, "eval_letters": 0.25}\n{"step": 1, "reward_mean": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert readers.ends(tmp_path) == readers.ends(tmp_path / "none") == {}
    more = '{"step": 9, "eval_ocr": 0.75, "eval_letters": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(lines + more)
    assert readers.ends(tmp_path) == {"ocr": (0.5, 0.75), "letters": (0.25, 0.5)}
