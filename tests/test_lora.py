"""LoRAs: alpha, what an export holds, and training that starts from one."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, metrics, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bpgo
import grpo_base
from common import cli, errors, models
from common.args import defaults
from common.models import lora, lora_file
from common.prompts import read_prompts
from common.trainer import Policy, export, run_folder
from evaluation import trained

NAMES = ["tiny-flux", "tiny-sd", "tiny-wan", "tiny-wan-i2v"]


def adapted(name, alpha, rank=2, seed=0):
    """A model with a LoRA that changes its velocities."""
    model = models.load(name, torch.float32)
    for module in model.trainable.values():
        module.requires_grad_(False).eval()
    lora.adapt_model(model, targets="", rank=rank, alpha=alpha, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.trainable.values():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def save(model, folder):
    modules = dict(model.trainable)
    states = {name: export.trained_weights(m, torch.float32, lora=True) for name, m in modules.items()}
    export._save_lora(model, folder, modules, states)
    return folder


@torch.no_grad()
def velocities(model):
    """At two noise levels: of two experts both compute. [2, ...]"""
    prompts = read_prompts(models.settings(model_name(model))["prompts"])[:1]
    cond = model.encode(prompts)
    x = torch.randn(1, *model.noise_shape, generator=torch.Generator().manual_seed(5))
    return torch.cat([model.velocity(x, torch.tensor(sigma), cond) for sigma in (0.97, 0.03)])


def model_name(model):
    return model.source.name


def merged_by_hand(name, files):
    """The model with B A alpha / rank added to its weights, alpha from tensors or else the rank."""
    model = models.load(name, torch.float32)
    for part, file in files.items():
        with safe_open(file, "numpy") as opened:
            saved = {key: opened.get_tensor(key) for key in opened.keys()}
        state = model.trainable[part].state_dict()
        plain = {f"lora_{part}_{key.removesuffix('.weight')}".replace(".", "_"): key for key in state}
        number = 0
        for key, down in saved.items():
            if key.endswith(".lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                up, alpha = saved[f"{layer}.lora_B.weight"], saved.get(f"{layer}.alpha", len(down))
                target = f"{layer.partition('.')[2]}.weight"
            elif key.endswith(".lora_down.weight"):
                layer = key.removesuffix(".lora_down.weight")
                up, alpha = saved[f"{layer}.lora_up.weight"], saved[f"{layer}.alpha"]
                target = plain[layer]
            else:
                continue
            change = float(alpha) / len(down) * up.astype(np.float64) @ down.astype(np.float64)
            state[target] += torch.tensor(change, dtype=torch.float32)
            number += 1
        assert number > 5
    return model


# --- Alpha ---


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_loader_gives_an_exported_lora_the_strength_of_the_training(name, times, tmp_path):
    """alpha = times the rank: diffusers, and loaders that read alpha tensors or take the rank."""
    model = adapted(name, alpha=2.0 * times)
    expected = velocities(model)
    folder = save(model, tmp_path / "export")
    plain = models.load(name, torch.float32)
    base = velocities(plain)
    plain.load_lora(folder)
    assert (velocities(plain) - expected).abs().max() <= 2e-5
    part = next(iter(model.trainable))
    files = {part: folder / "pytorch_lora_weights.safetensors"}
    if len(model.trainable) > 1:
        files["transformer_2"] = folder / "transformer_2/pytorch_lora_weights.safetensors"
    assert (velocities(merged_by_hand(name, files)) - expected).abs().max() <= 2e-5
    if name == "tiny-sd":
        found = velocities(merged_by_hand(name, {"unet": folder / "kohya/lora.safetensors"}))
        assert (found - expected).abs().max() <= 2e-5
    assert (base - expected).abs().max() > 1e-2


def test_alpha_is_twice_the_rank_unless_it_is_given(train):
    assert defaults(grpo_base.Args, lora_rank=4).lora_settings()["alpha"] == 8
    assert defaults(grpo_base.Args, lora_rank=4, lora_alpha=2).lora_settings()["alpha"] == 2
    settings = dict(lora_rank=4, steps=1)
    _, usual = train(output="usual", **settings)
    _, same = train(output="same", lora_alpha=8.0, **settings)
    _, other = train(output="other", lora_alpha=4.0, **settings)
    # B is 0 at first, so alpha scales its gradient, and A has none
    norms = [rows[0]["grad_norm"] for rows in (usual, same, other)]
    assert norms[0] == norms[1] == pytest.approx(2 * norms[2], rel=1e-5)


def as_of_0_1_0(folder):
    """Take the settings out of config.json that version 0.1.0 did not have."""
    config = json.loads((folder / "config.json").read_text())
    for name in ("lora_alpha", *run_folder.ADDED):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))


def test_a_run_of_an_older_version_keeps_alpha_at_its_rank(train, monkeypatch):
    settings = dict(lora_rank=4, lora_alpha=4.0, save_every=1, learning_rate=1e-3)
    whole, rows = train(output="whole", steps=3, **settings)
    old, _ = train(output="old", steps=2, **settings)
    as_of_0_1_0(old)
    words = ["grpo_base.py", f"--output={old}", "--resume=latest", "--steps=3"]
    monkeypatch.setattr(sys, "argv", words)
    grpo_base.main(cli.parse(grpo_base.Args, ""))
    assert metrics(old) == rows
    assert all(torch.equal(weights(old, 3)[k], v) for k, v in weights(whole, 3).items())
    as_of_0_1_0(old)
    for folder in (old / "checkpoints/step_000003", old / "export"):
        found = []
        for run in (old, whole):
            model = models.load("tiny-flux", torch.float32)
            trained.load(model, trained.find(run / folder.relative_to(old)))
            found.append(velocities(model))
        assert torch.equal(*found)


# --- AdamW's eps ---


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_grad_rms_is_the_norm_over_the_root_of_the_number_of_weights(train, script):
    folder, rows = train(script, lora_rank=2, steps=1)
    number = sum(weight.numel() for weight in weights(folder, 1).values())
    assert rows[0]["grad_rms"] == pytest.approx(rows[0]["grad_norm"] / number**0.5, rel=1e-6) > 0


def test_eps_decides_the_step_when_it_is_far_above_the_gradients(train):
    settings = dict(lora_rank=2, steps=1, learning_rate=1e-3, weight_decay=0.0)
    moved = []
    for eps in (1e-8, 1.0):
        folder, rows = train(output=f"eps-{eps}", adam_eps=eps, **settings)
        state = weights(folder, 1)
        moved.append(max(v.abs().max().item() for k, v in state.items() if ".lora_B." in k))
    assert moved[0] == pytest.approx(1e-3, rel=1e-3)  # B was 0; a first step has the rate's size
    assert moved[1] < 1e-3 * rows[0]["grad_norm"] * 1.01


def test_a_resumed_run_has_its_own_eps(train):
    train(steps=1)
    folder, _ = train(steps=2, adam_eps=1e-3, resume="latest")
    (group,) = weights(folder, 2, "optimizer")["param_groups"]
    assert group["eps"] == 1e-3
