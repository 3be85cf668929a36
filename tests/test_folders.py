"""Folders of models as half a download, a wrong copy or a hostile hand leaves them: one line that
names folder, file and cure, and never a weight that started at random."""

import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from common import hub, models
from common.errors import InputError
from common.models import folder
from common.prompts import read_prompts

FLUX, T5, CLIP = (
    "transformer/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors",
    "text_encoder/model.safetensors",
)  # fmt: skip


@pytest.fixture
def copy(tmp_path):
    """copy(name of an embedded model) -> a folder with a copy of it"""

    def made(name="tiny-flux"):
        return Path(shutil.copytree(models.ASSETS / name, tmp_path / "model"))

    return made


def write(file, text):
    return lambda model: (model / file).write_text(text)


def cut(file, length):
    return lambda model: os.truncate(model / file, length)


def without(file):
    return lambda model: (
        shutil.rmtree(model / file) if (model / file).is_dir() else (model / file).unlink()
    )


def setting(file, **values):
    def change(model):
        (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), **values}))

    return change


def weights(file, change):
    def changed(model):
        state = load_file(model / file)
        change(state, sorted(state)[5])
        save_file(state, model / file, metadata={"format": "pt"})

    return changed


def code(part, file):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch RAN",)

    def change(model):
        for path in (model / part).glob("*.safetensors"):
            path.unlink()
        torch.save({"weight": Evil()}, model / part / file)

    return change


def shards(table):
    def change(model):
        without(FLUX)(model)
        write(f"{FLUX}.index.json", json.dumps({"weight_map": table}))(model)

    return change


INDEX = "model_index.json"
# what is done to the folder, and words of the error: mostly the part that is at fault
WRONG = {
    "weights cut short": (cut(T5, 5000), "text_encoder_2 does not load"),
    "weights of no length": (cut(CLIP, 0), f"{CLIP} is empty; download it again"),
    "weights with a broken head": (
        write(CLIP, "\x10" + "\0" * 7 + "{" * 40), "text_encoder does not load",
    ),
    "a pointer": (
        write(FLUX, "version https://git-lfs.github.com/spec/v1\n"),
        f"{FLUX} is a pointer of git-lfs, not the weights; run `git lfs pull`",
    ),
    "no weights": (without(FLUX), f"has no {FLUX}"),
    "a shard that is missing": (
        shards({"a": "1.st"}), "has no transformer/1.st",
    ),
    "a table of shards that is none": (shards(["a"]), "transformer does not load"),
    "no part": (without("vae"), "has no vae"),
    "no config": (without("vae/config.json"), "has no vae/config.json"),
    "half a config": (write("vae/config.json", '{"_class'), "vae does not load"),
    "a config that is a list": (write("scheduler/scheduler_config.json", "[]"), "scheduler does"),
    "a tokenizer without its config": (
        without("tokenizer/tokenizer_config.json"), "no tokenizer/tokenizer_config",
    ),
    "a tokenizer without words": (without("tokenizer_2/tokenizer.json"), "tokenizer_2 (has|does)"),
    "a tokenizer of few words": (
        lambda model: (
            without("tokenizer/tokenizer.json")(model), write("tokenizer/merges.txt", "")(model),
        ),
        "tokenizer (has|does)",
    ),
    "fewer layers than weights": (
        setting("transformer/config.json", num_layers=1), "transformer do not fit .* too many",
    ),
    "fewer layers than an encoder's": (
        setting("text_encoder/config.json", num_hidden_layers=1), "text_encoder do not fit",
    ),
    "more layers than weights": (
        setting("transformer/config.json", num_layers=3), "lack transformer_blocks.2",
    ),
    "a billion layers": (
        setting("transformer/config.json", num_layers=10**9), r"num_layers is 1e\+09",
    ),
    "a billion blocks": (
        setting("vae/config.json", num_res_blocks=10**9), r"num_res_blocks is 1e\+09",
    ),
    "another width": (setting("transformer/config.json", num_attention_heads=5), "expected shape"),
    "a word for a number": (
        setting("transformer/config.json", num_layers="two"), "transformer does not load",
    ),
    "a scale that is none": (
        setting("vae/config.json", scaling_factor=None), "scaling_factor None",
    ),
    "an endless schedule": (
        setting("scheduler/scheduler_config.json", num_train_timesteps=10**10), "num_train_time",
    ),
    "a weight too few": (
        weights(CLIP, lambda state, key: state.pop(key)), "text_encoder do not fit .* lack",
    ),
    "a weight of another shape": (
        weights(FLUX, lambda state, key: state.update({key: state[key][:-1].clone()})),
        "transformer does not load",
    ),
    "weights that are not finite": (
        weights(FLUX, lambda state, key: state[key].fill_(torch.nan)),
        "not finite, nor is .* of its transformer",
    ),
    "weights that hold code": (
        code("transformer", "diffusion_pytorch_model.bin"), "holds Python code .posix system.",
    ),
    "an encoder that holds code": (code("text_encoder", "pytorch_model.bin"), "holds Python"),
    "an index whose class is a list": (setting(INDEX, _class_name=["FluxPipeline"]), "not load"),
    "an index without a class": (setting(INDEX, _class_name=None), "is a None. Supported are"),
    "an index that is a list": (write(INDEX, "[]"), "model_index.json does not load"),
    "an index nested deep": (write(INDEX, '{"a":' * 100_000), "model_index.json does not load"),
    "an index with a part of no library": (setting(INDEX, vae="AutoencoderKL"), "index.json does"),
    "an index with a part of no module": (
        setting(INDEX, vae=["_import_structure", "x"]), "its vae brings Python code",
    ),
    "an index with a part of nothing": (
        setting(INDEX, vae=["_objects", "x"]), "its vae brings Python code",
    ),
    "an index with an unknown part": (setting(INDEX, vae=["diffusers", "Nope"]), "Nope"),
    "an index with a wrong part": (
        setting(INDEX, vae=["diffusers", "UNet2DConditionModel"]), "vae is UNet2DConditionModel",
    ),
    "an index with a class that hides which weights it loaded": (
        setting(INDEX, text_encoder=["transformers", "AutoModel"]), "text_encoder is AutoModel",
    ),
    "an index with a model as a tokenizer": (
        setting(INDEX, tokenizer=["diffusers", "AutoencoderKL"]), "tokenizer is AutoencoderKL",
    ),
    "an index without a part": (setting(INDEX, transformer=[None, None]), "transformer"),
    "another model's transformer": (
        lambda model: shutil.copy(
            models.ASSETS / "tiny-wan/transformer/config.json", model / "transformer"
        ),
        "config.json is of WanTransformer3DModel, not FluxTransformer2DModel",
    ),
    "a module of the machine": (
        setting(INDEX, scheduler=["os", "system"]), "brings Python code. Add --trust-remote-code",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_broken_folder_is_one_line_with_folder_file_and_cure(what, copy, monkeypatch, tmp_path):
    change, words = WRONG[what]
    monkeypatch.chdir(tmp_path)
    model = copy()
    change(model)
    with pytest.raises(InputError) as error:
        models.load(str(model), torch.float32).try_out("a red circle")
    line = str(error.value)
    assert re.search(words, line) and "\n" not in line and len(line) < 1000
    assert line.startswith("model") and str(model) in line
    assert re.search("download|git lfs|as safetensors|--trust-remote-code|Supported (are|is)", line)
    assert not (tmp_path / "RAN").exists()


def test_a_flux_index_over_the_parts_of_wan(copy):
    model = copy("tiny-wan")
    setting(INDEX, _class_name="FluxPipeline")(model)
    with pytest.raises(InputError, match="its vae is AutoencoderKLWan"):
        models.load(str(model), torch.float32)


def test_experts_that_the_index_promises_and_lacks(copy):
    model = copy("tiny-wan-i2v")
    setting(INDEX, boundary_ratio=0.9, transformer_2=[None, None])(model)
    loaded = models.load(str(model), torch.float32, height=32, width=32, frames=5)
    with pytest.raises(InputError, match="a forward pass failed: .*transformer_2"):
        loaded.try_out(read_prompts(models.settings("tiny-wan-i2v")["eval_prompts"])[0])


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-sd", "tiny-wan", "tiny-wan-i2v"])
def test_whole_folders_pass_and_load_as_diffusers_loads_them(name):
    family = models.family_of(name)
    folder.check(family, models.ASSETS / name)
    ours, theirs = (
        models.load(name, torch.float32).pipe,
        family.pipeline.from_pretrained(models.ASSETS / name),
    )
    assert ours.config == theirs.config
    for part, module in theirs.components.items():
        assert type(getattr(ours, part)) is type(module)
        if isinstance(module, torch.nn.Module):
            state = getattr(ours, part).state_dict()
            assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_stable_diffusions_safety_checker_comes_from_a_pipelines_module(copy):
    """As the index of CompVis/stable-diffusion-v1-4 has it."""
    model = copy("tiny-sd")
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    vision = dict(small, image_size=32, patch_size=16)
    config = CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(model / "safety_checker")
    CLIPImageProcessor().save_pretrained(model / "feature_extractor")
    index = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
    }
    setting(INDEX, feature_extractor=["transformers", "CLIPImageProcessor"], **index)(model)
    pipe = models.load(str(model), torch.float32).pipe
    assert (
        type(pipe.safety_checker) is StableDiffusionSafetyChecker
        and pipe.feature_extractor is not None
    )
    cut("safety_checker/model.safetensors", 100)(model)
    with pytest.raises(InputError, match="safety_checker does not load"):
        models.load(str(model), torch.float32)


def test_a_machine_without_a_network_is_asked_for_the_hub_once(monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(timeout)
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.settle.cache_clear()
    try:
        for name in ("nobody/nothing", "nobody/else"):
            with pytest.raises(InputError, match=f"model {name} does not load .*spelling"):
                models.load(name, torch.float32)
    finally:
        hub.settle.cache_clear()
    assert asked == [hub.PATIENCE]
