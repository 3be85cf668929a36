"""--frozen-8bit: the frozen layers of a LoRA's base in 8 bits, counted and compared."""

import dataclasses

import pipelines
import pytest
import torch

import grpo_base
from common import cli
from common.args import defaults
from common.errors import InputError
from common.memory import bytes, fit
from common.memory.bytes import Launch
from common.models import eight_bits, lora
from common.models.flux import Flux

LORA = dict(lora_rank=2, gradient_checkpointing=True, frozen_8bit=True)
INT8 = pytest.mark.skipif(
    not eight_bits.importlib.util.find_spec("torchao"), reason="needs torchao"
)


def adapted():
    """A FLUX of two blocks in bfloat16 with a LoRA that changes nothing yet."""
    torch.manual_seed(0)
    pipe = pipelines.flux()
    model = Flux(pipe, height=32, width=32)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.to(torch.bfloat16).requires_grad_(False)
    lora.adapt_model(model, targets="", rank=2, alpha=4.0, seed=0, autocast=True)
    return model


def velocity(model, x, cond):
    with torch.autocast("cpu", torch.bfloat16):
        return model.velocity(x, torch.tensor(0.5), cond)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@INT8
def test_velocities_are_nearer_to_those_of_16_bits_than_these_are_to_those_of_32():
    model = adapted()
    x = torch.randn(2, *model.noise_shape)
    cond = {name: torch.randn(2, *value.shape) for name, value in model.blank().items()}
    with torch.no_grad():
        expected = velocity(model, x, cond)
    eight_bits.quantize(model, torch.device("cpu"))
    with torch.no_grad():
        sampled = velocity(model, x, cond)
    model.trainable["transformer"].enable_gradient_checkpointing()
    trained = velocity(model, x, cond)
    assert torch.equal(trained.detach(), sampled), "rollout and update"
    assert 0 < distance(sampled, expected) < 0.006, "bfloat16 alone moves them by .006"
    trained.sum().backward()
    weights = [w for w in model.trainable["transformer"].parameters() if w.requires_grad]
    assert weights and all(w.dtype == torch.float32 for w in weights)
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)


@INT8
def test_a_layers_output_has_autocasts_dtype_as_a_plain_layer_has():
    model = adapted()
    eight_bits.quantize(model, torch.device("cpu"))
    layer = next(eight_bits.encoders_layers(model))
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@INT8
def test_the_count_is_what_the_layers_take():
    model = adapted()
    args = defaults(grpo_base.Args, "tiny-flux", micro_batch=1, **LORA)
    launch = Launch(torch.bfloat16, "cuda")
    plain = bytes.process_bytes(model, dataclasses.replace(args, frozen_8bit=False), launch)
    kinds = bytes.process_bytes(model, args, launch)
    largest = max(sum(layer.weight.numel() for layer in b) for b in eight_bits.blocks_of(model))
    assert kinds["weights of a pass"] == plain["weights of a pass"] + 2 * largest
    eight_bits.quantize(model, torch.device("cpu"))
    frozen = 0
    for weight in model.trainable["transformer"].parameters():
        if not weight.requires_grad:
            frozen += stored(weight)
    assert kinds["frozen weights"] == frozen < plain["frozen weights"]
    encoders = 0
    for name in ("text_encoder", "text_encoder_2", "vae"):
        encoders += sum(map(stored, getattr(model.pipe, name).parameters()))
    assert kinds["encoders, VAE"] == encoders < plain["encoders, VAE"]


def stored(weight):
    """Return the bytes of a weight, of one in 8 bits with its scales."""
    parts = [getattr(weight, name, None) for name in ("qdata", "scale", "zero_point")]
    return sum(part.nbytes for part in parts if part is not None) or weight.nbytes


@INT8
def test_a_run_in_8_bits_has_a_ratio_of_1_and_learns_what_one_in_16_bits_learns(train, bf16):
    same = dict(lora_rank=4, gradient_checkpointing=True, learning_rate=1e-3)
    _, expected = train(**same)
    folder, rows = train(**same, frozen_8bit=True, output="eight")
    assert all(row["ratio_error"] == 0.0 for row in rows)
    for row, other in zip(rows, expected):
        assert row["reward_mean"] == pytest.approx(other["reward_mean"], abs=0.02)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.2)
    assert (folder / "export" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(lora_rank=0), "needs --lora-rank above 0"),
        (dict(gradient_checkpointing=False), "without --gradient-checkpointing"),
    ],
)
def test_what_8_bits_cannot_serve_is_refused(changed, message):
    args = defaults(grpo_base.Args, **{**LORA, **changed})
    with pytest.raises(InputError, match=f"--frozen-8bit: {message}"):
        cli.check(args)


def test_several_processes_are_refused():
    args = defaults(grpo_base.Args, **LORA)
    with pytest.raises(InputError, match="--frozen-8bit: it is for one process"):
        fit._check_launch(args, Launch(torch.bfloat16, "cuda", world=2, per_machine=2))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(eight_bits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--frozen-8bit: the package is missing"):
        eight_bits.check()
