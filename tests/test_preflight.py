"""What is refused before the first rollout, and the count of memory behind README's table."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig

import grpo_base
from benchmarks import memory
from common import arguments, models, preflight
from common.errors import InputError

GIB = 2**30


@pytest.fixture
def tiny():
    return models.load("tiny-flux", torch.float32)


def size(module):
    return sum(weight.numel() for weight in module.parameters())


def test_memory_of_full_weights_and_of_a_lora(tiny):
    n, others = size(tiny.pipe.transformer), sum(map(size, (tiny.pipe.vae, tiny.pipe.text_encoder)))
    others += size(tiny.pipe.text_encoder_2)
    args = arguments.defaults(grpo_base.Args, ema=0.9)
    full = {"trained weights": 4 * n, "frozen weights": 0, "gradients": 4 * n, "optimizer": 8 * n, "average": 4 * n}
    assert preflight.memory(tiny, args, 2) == {**full, "encoders, VAE": 2 * others}
    split = {name: value / 4 for name, value in full.items()}
    assert preflight.memory(tiny, args, 2, shards=4) == {
        **split, "gradients": 4 * n, "encoders, VAE": 2 * others,
    }  # fmt: skip
    args.exchange_often = args.offload_encoders = True
    assert preflight.memory(tiny, args, 2, shards=4) == {**split, "encoders, VAE": 2 * size(tiny.pipe.vae)}

    tiny.pipe.transformer.requires_grad_(False)
    tiny.pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=tiny.lora_targets))
    lora = size(tiny.pipe.transformer) - n
    found = preflight.memory(tiny, arguments.defaults(grpo_base.Args, lora_rank=4), 2)
    assert found["trained weights"] == 4 * lora and found["frozen weights"] == 2 * n and not found["average"]


def test_disk_of_checkpoints_and_export(tiny):
    n = size(tiny.pipe.transformer)
    args = arguments.defaults(grpo_base.Args, steps=50, save_every=20)
    checkpoint, number, export = preflight.disk(tiny, args, 4)
    assert (checkpoint, number) == (12 * n, 3) and export == 4 * sum(
        size(part) for part in tiny.pipe.components.values() if isinstance(part, torch.nn.Module)
    )
    assert preflight.disk(tiny, args, 4, start=40)[1] == 1
    args.keep_checkpoints, args.ema = 1, 0.9
    assert preflight.disk(tiny, args, 4)[:2] == (16 * n, 2)


def test_a_checkpoint_is_as_large_as_estimated(train, tiny):
    folder, _ = train(steps=1, ema=0.9)
    expected = preflight.disk(tiny, arguments.defaults(grpo_base.Args, ema=0.9), 4)[0]
    found = sum(file.stat().st_size for file in (folder / "checkpoints/step_000001").iterdir())
    assert found == pytest.approx(expected, rel=0.02)


def test_too_little_disk_is_one_line_before_the_first_rollout(train, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(0.05 * GIB)))
    with pytest.raises(
        InputError, match=r"2 checkpoints of 0.03 GiB and the export's 0.\d\d GiB do not fit .* 0.05 GiB"
    ):
        train(save_every=1)
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_one_line_before_the_first_rollout(train, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(0.001 * GIB)))
    with pytest.raises(InputError, match=r"each process would hold 0.0 GiB before any activation \(trained weights"):
        train()


def test_activations_without_contents_are_those_of_a_real_pass(tiny):
    module = tiny.pipe.transformer.requires_grad_(True)
    values = dict(
        hidden_states=torch.randn(1, 64, module.config.in_channels), timestep=torch.ones(1), guidance=torch.ones(1),
        encoder_hidden_states=torch.randn(1, 16, module.config.joint_attention_dim), txt_ids=torch.zeros(16, 3),
        pooled_projections=torch.randn(1, module.config.pooled_projection_dim), img_ids=torch.zeros(64, 3),
    )  # fmt: skip
    real = memory.activations(module, tiny.blocks, values)
    module.disable_gradient_checkpointing()
    with memory.FakeTensorMode() as mode:
        fake = memory.activations(
            memory.on_fake_cpu(module), tiny.blocks, {k: mode.from_tensor(v) for k, v in values.items()}
        )
    assert fake == real and 0 < real[1] and real[0] < real[1] * 8
