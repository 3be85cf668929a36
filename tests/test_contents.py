"""What people give as --model, or have in its folder, that is something else: the line says what it
is and what to do."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import huggingface_hub
import pipelines
import pytest
import torch
from diffusers import ControlNetModel
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from common import hub, models
from common.errors import InputError
from common.models import contents

FLUX = "transformer/diffusion_pytorch_model.safetensors"
CLIP = "text_encoder/model.safetensors"


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(models.ASSETS / "tiny-flux", tmp_path / "model"))


def line_of(place):
    with pytest.raises(InputError) as error:
        models.load(str(place), torch.float32)
    line = str(error.value)
    assert line.startswith("model") and "\n" not in line and len(line) < 700
    return line


# --- Files in the place of weights ---


class Scale(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def scripted(path):
    torch.jit.save(torch.jit.trace(Scale(), torch.ones(2)), path)


def archive(path):
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("readme.txt", "weights")


def in_eight_bits(path):
    state = load_file(path)
    key = max(state, key=lambda name: state[name].numel())
    state[key] = state[key].to(torch.float8_e4m3fn)
    save_file(state, path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 23802932552\n"
FILES = {
    "pointer": (lambda path: path.write_text(POINTER), "pointer of git-lfs.*run `git lfs pull` in"),
    "page": (
        lambda path: path.write_text("\n <!DOCTYPE html><html><title>Sign in</title>"),
        "is a web page; download it again, after `hf auth login`",
    ),
    "refusal": (
        lambda path: path.write_text("Access to model x/y is restricted. You must be logged in."),
        "is text .access to model x/y is restricted.* download it again",
    ),
    "json": (lambda path: path.write_text('{"error": "not found"}'), "is text .{\"error\""),
    "nothing": (lambda path: path.write_text(""), "is empty; download it again"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\x03\0\0\0" + bytes(99)), "GGUF file, quantized"),
    "program": (scripted, "is a TorchScript program; give the model's weights"),
    "archive": (archive, "is a zip file; unpack it"),
    "torch.save": (lambda path: torch.save({"a": torch.ones(1)}, path), "file of torch.save under"),
    "8 bits": (in_eight_bits, r"is quantized \(F8_E4M3\); give the model in full precision"),
}  # fmt: skip


@pytest.mark.parametrize("file", [FLUX, CLIP])
@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_not_weights_is_called_what_it_is(what, file, model):
    make, words = FILES[what]
    make(model / file)
    line = line_of(model)
    assert str(model / file) in line
    assert re.search(words, line), line


def test_only_files_that_are_read_have_to_be_weights(model):
    """Who pulls the safetensors alone with git-lfs has pointers beside them."""
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        (model / "transformer" / name).write_text(POINTER)
    assert models.load(str(model), torch.float32).pipe.transformer is not None


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "quanto", "gguf"])
def test_a_quantized_part_is_refused_with_its_method(part, method, model):
    config = json.loads((model / part / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True}
    (model / part / "config.json").write_text(json.dumps(config))
    assert f"it is quantized ({method} in its config.json)" in line_of(model)


MISSING = {
    "gguf": ("flux1-dev-Q4_K_S.gguf", "but GGUF files, which are quantized, which are not"),
    "flax": ("diffusion_flax_model.msgpack", "but Flax weights, which are not supported"),
    "onnx": ("model.onnx", "but ONNX files"),
    "half": ("x.safetensors.incomplete", "its download did not finish; download the whole model"),
    "another name": ("flux_dev.safetensors", "but flux_dev.safetensors: give the one that is"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSING)
def test_what_is_there_instead_of_the_weights_is_named(what, model):
    name, words = MISSING[what]
    (model / FLUX).rename(model / "transformer" / name)
    line = line_of(model)
    assert f"has no {FLUX}" in line and words in line


# --- Variants ---


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_folder_with_one_variant_of_its_weights_is_loaded(size, tmp_path):
    """In one file, or in shards with a table."""
    pipe = pipelines.sd()
    pipe.save_pretrained(tmp_path / "plain")
    for name in ("unet", "text_encoder", "vae"):
        part = getattr(pipe, name)
        shutil.copytree(tmp_path / "plain" / name, tmp_path / "half" / name)
        for path in (tmp_path / "half" / name).glob("*.safetensors"):
            path.unlink()
        part.half().save_pretrained(tmp_path / "half" / name, variant="fp16", max_shard_size=size)
    for path in (tmp_path / "plain").iterdir():
        if not (tmp_path / "half" / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / "half" / path.name)
    files = {path.name for path in (tmp_path / "half").rglob("*.safetensors")}
    assert files and all(".fp16" in name for name in files)
    assert any("-of-" in name for name in files) == (size != "1GB")
    ours = models.load(str(tmp_path / "half"), torch.float32, height=32, width=32)
    theirs = models.load(str(tmp_path / "plain"), torch.float32, height=32, width=32)
    for name, weight in theirs.pipe.unet.state_dict().items():
        assert torch.equal(ours.pipe.unet.state_dict()[name], weight.half().float())
    table = next((tmp_path / "half/unet").glob("*.safetensors"))
    table.unlink()
    assert "has no unet/diffusion_pytorch_model" in line_of(tmp_path / "half") or size == "1GB"


def test_of_several_variants_one_has_to_be_chosen(model):
    for variant in ("fp16", "bf16"):
        name = FLUX.replace(".safetensors", f".{variant}.safetensors")
        shutil.copy(model / FLUX, model / name)
    (model / FLUX).unlink()
    assert "model.bf16.safetensors, diffusion_pytorch_model.fp16.safetensors: give" in line_of(
        model
    )


# --- Something else as --model ---


def lora(folder):
    folder.mkdir()
    state = {"transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 4)}
    save_file(state, folder / "pytorch_lora_weights.safetensors")


def adapter(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def controlnet(folder):
    ControlNetModel(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        conditioning_embedding_out_channels=(4, 8),
    ).save_pretrained(folder)  # fmt: skip


def run(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model": "tiny-flux"}')
    (folder / "metrics.jsonl").write_text("")


def checkpoint(folder):
    folder.mkdir()
    state = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}
    save_file(state, folder / "v1-5-pruned.safetensors")


def cache(folder):
    (folder / "snapshots/0a1b").mkdir(parents=True)
    (folder / "blobs").mkdir()


def half(folder):
    place = folder / ".cache/huggingface/download/unet"
    place.mkdir(parents=True)
    (place / "x.incomplete").write_bytes(b"1")


def nested(folder):
    (folder / "FLUX.1-dev").mkdir(parents=True)
    (folder / "FLUX.1-dev/model_index.json").write_text("{}")


FOLDERS = {
    "a LoRA": (lora, "it is a LoRA. Give the model that it adapts as --model"),
    "an adapter": (adapter, "it is a LoRA. "),
    "a ControlNet": (controlnet, "it is a ControlNetModel alone. Give the folder of a whole"),
    "a run": (run, "it is the folder of a run. Give its export/"),
    "a checkpoint": (checkpoint, "its v1-5-pruned.safetensors is a single file of weights."),
    "a cache": (cache, "it is a folder of the hub's cache. Give its OWNER/NAME, or "),
    "half a download": (half, "its download did not finish. Download it again"),
    "a folder around it": (nested, "a pipeline is inside it. Give "),
    "nothing": (Path.mkdir, "it is empty. Give the folder of a whole diffusers pipeline"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_is_no_pipeline_is_called_what_it_is(what, tmp_path):
    make, words = FOLDERS[what]
    make(tmp_path / "given")
    assert f"{tmp_path}/given has no model_index.json: {words}" in line_of(tmp_path / "given")


def test_a_part_of_a_pipeline_names_the_folder_above(model):
    line = line_of(model / "transformer")
    assert f"it is a FluxTransformer2DModel alone. Give {model}." in line


SINGLE = {
    "unet.safetensors": ({"double_blocks.0.img_attn.qkv.weight": 1}, "a single file of weights."),
    "style.safetensors": ({"lora_unet_down.lora_down.weight": 1}, "is a LoRA. Give the model that"),
    "canny.safetensors": ({"control_model.input_blocks.0.0.weight": 1}, "is a ControlNet. Give"),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_file_as_model_is_called_what_it_is(name, tmp_path):
    state, words = SINGLE[name]
    save_file({key: torch.ones(1) for key in state}, tmp_path / name)
    assert words in line_of(tmp_path / name)


def test_other_single_files(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "v1.ckpt")
    assert "is a single file of weights. Convert it with diffusers" in line_of(tmp_path / "v1.ckpt")
    (tmp_path / "q4.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert "is a GGUF file, quantized" in line_of(tmp_path / "q4.gguf")
    (tmp_path / "notes.txt").write_text("flux")
    assert "is a file. Give the folder of a whole" in line_of(tmp_path / "notes.txt")


# --- On the hub ---


@pytest.mark.parametrize("answers", [True, False])
def test_a_repository_without_an_index_is_told_from_a_hub_that_is_silent(answers, monkeypatch):
    def download(repository, file, local_files_only=False, **settings):
        if local_files_only or not answers:
            raise LocalEntryNotFoundError("not in the cache")
        raise EntryNotFoundError("404: Entry Not Found")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "settle", lambda: None)
    line = line_of("somebody/a-lora")
    own = "model: somebody/a-lora has no model_index.json on the hub: it is a LoRA, a part or a"
    assert line.startswith(own) == answers
    assert ("check the spelling and the network" in line) != answers


def test_the_heads_of_real_weights_are_silent(tmp_path):
    for path in models.ASSETS.glob("tiny-*/*/*.safetensors"):
        assert contents.of_weights(path) == "", path
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert contents.of_weights(tmp_path / "pytorch_model.bin") == ""
