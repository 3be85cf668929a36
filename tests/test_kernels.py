"""Attention kernels: what they are given under CUDA's autocast rules, and which of them serve both
rollout and update."""

import inspect
from typing import get_args, get_type_hints

import pipelines
import pytest
import torch
from accelerate import Accelerator
from cuda_rules import CudaAutocast, ops
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from common import cli, models
from common.args import Args, defaults
from common.errors import InputError
from common.memory import activations
from common.models.flux import Flux
from common.models.hunyuan import HunyuanVideo
from common.models.qwen import QwenImage
from common.models.sd import StableDiffusion
from common.models.wan import Wan
from common.models.z_image import ZImage
from common.trainer import compiling

OPTIONS = get_args(get_type_hints(Args)["attention"])
TORCHS = ("torch.nn.functional.scaled_dot_product_attention(", "flex_attention.flex_attention(")
FAMILIES = {
    "flux": (pipelines.flux, Flux, dict(height=32, width=32)),
    "qwen": (pipelines.qwen, QwenImage, dict(height=32, width=32)),
    "wan": (pipelines.wan, Wan, dict(height=32, width=32, frames=5)),
    "hunyuan": (pipelines.hunyuan, HunyuanVideo, dict(height=32, width=32, frames=5)),
}


@pytest.fixture(autouse=True)
def cudnn():
    """cuDNN's attention as it was, after the test."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("autocast", [True, False])
def test_the_rules_are_those_of_cuda(autocast):
    assert {"rms_norm", "layer_norm", "pow", "softmax"} <= ops("FP32") | ops("FP32_SET_OPT_DTYPE")
    assert {"linear", "scaled_dot_product_attention"} <= ops("LOWER_PRECISION_FP")
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    weight = torch.randn(8, 8, dtype=torch.bfloat16)
    with CudaAutocast(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        normed = torch.nn.functional.rms_norm(x, (8,))
        found = [normed, x**2, x.softmax(-1), torch.nn.functional.layer_norm(x, (8,))]
        product = torch.nn.functional.linear(normed.to(x), weight)
    expected = torch.float32 if autocast else torch.bfloat16
    assert {value.dtype for value in found} == {expected} and product.dtype == torch.bfloat16
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):  # a CPU's own rules
            assert torch.nn.functional.rms_norm(x, (8,)).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_are_in_float32_and_values_are_not(family, monkeypatch):
    """So a kernel that is no operation of torch, which autocast casts for, fails. The weights are
    in float32, as in training all of them."""
    make, cls, size = FAMILIES[family]
    pipe = make()
    model, given = cls(pipe, **size), []
    honest = attention_dispatch.dispatch_attention_fn

    def attention(query, key, value, **settings):
        given.append((query.dtype, key.dtype, value.dtype))
        return honest(query, key, value, **settings)

    monkeypatch.setattr(
        inspect.getmodule(type(pipe.transformer)), "dispatch_attention_fn", attention
    )
    cond = {name: value[None].expand(1, *value.shape) for name, value in model.blank().items()}
    with torch.no_grad(), CudaAutocast(), torch.autocast("cpu", torch.bfloat16):
        model.velocity(torch.zeros(1, *model.noise_shape), torch.tensor(0.5), cond)
    assert set(given) & {(torch.float32, torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("backend", OPTIONS)
def test_every_kernel_to_choose_is_one_that_autocast_casts_for(backend):
    kernel = _AttentionBackendRegistry._backends[AttentionBackendName(backend)]
    assert any(call in inspect.getsource(kernel) for call in TORCHS)


def test_memory_is_counted_by_the_rules_of_torchs_header():
    for names, rule in (
        (activations.FLOAT32, "FP32"),
        (activations.FLOAT32_RESULTS, "FP32_SET_OPT_DTYPE"),
    ):
        assert {name.partition(".")[0] for name in names} <= ops(rule)


def test_flex_needs_compilation(monkeypatch):
    with pytest.raises(InputError, match="--attention flex: without --compile"):
        cli.check(defaults(Args, attention="flex"))


# --- Kernels that serve both passes ---


def test_cudnn_serves_stable_diffusion_in_one_pass_only_and_is_off_there():
    """torch serves heads of 160 by cuDNN without gradients, and by another kernel with them."""
    flux = Flux(pipelines.flux(), height=32, width=32)
    sd = StableDiffusion(pipelines.sd(), height=64, width=64)
    compiling.settle_attention(flux, "native")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    compiling.settle_attention(sd, "native")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    compiling.settle_attention(flux, "_native_cudnn")
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("flag", ["--attention", "DIFFUSERS_ATTN_BACKEND"])
@pytest.mark.parametrize("family", ["qwen", "hunyuan"])
def test_cudnn_is_off_where_its_backward_pass_gives_nan(family, flag, monkeypatch):
    """Tokens % 128 == 64 and a mask: pytorch issue 196678. Text has 512 or 256 tokens."""
    make, cls, _ = FAMILIES[family]
    pipe = make()
    if family == "qwen":
        unit, rest = 2 * pipe.vae_scale_factor, {}
    else:
        unit = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size
        rest = {"frames": 1}
    good = dict(height=2 * unit, width=2 * unit, **rest)  # 4 tokens
    bad = dict(height=8 * unit, width=8 * unit, **rest)  # 64 tokens
    compiling.settle_attention(cls(pipe, **bad), "native")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    compiling.settle_attention(cls(pipe, **good), "native")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    backend = "_native_cudnn"
    if flag != "--attention":
        monkeypatch.setenv(flag, backend)
        backend = "native"
    compiling.settle_attention(cls(pipe, **good), backend)
    with pytest.raises(InputError, match=f"{flag}.*_native_cudnn: cuDNN's attention does not"):
        compiling.settle_attention(cls(pipe, **bad), backend)


def test_cudnn_is_off_for_z_image_whose_captions_have_a_mask_of_any_length():
    compiling.settle_attention(ZImage(pipelines.z_image(), height=32, width=32), "native")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("named", ["flex", "flash", "xformers", "sage"])
def test_a_kernel_that_the_environment_names_is_checked_as_the_flag_is(named, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", named)
    with pytest.raises(InputError, match=f"DIFFUSERS_ATTN_BACKEND={named}: "):
        compiling.check_attention(defaults(Args))
    # the flag is the stronger one
    compiling.check_attention(defaults(Args, attention="_native_math"))


def test_a_run_settles_its_kernels_and_moves_no_module_that_is_placed(train, monkeypatch):
    """Accelerate 1.10 to 1.14 move a module unless they are told not to, also shards that wait on
    the CPU."""
    asked, placed, honest = [], [], Accelerator.prepare_model

    def prepare(accelerator, module, device_placement=None, evaluation_mode=False):
        placed.append(device_placement)
        return honest(accelerator, module, device_placement, evaluation_mode)

    monkeypatch.setattr(Accelerator, "prepare_model", prepare)
    monkeypatch.setattr(compiling, "settle_attention", lambda *words: asked.append(words))
    train(steps=1, reward=("jpeg",), save_every=0)
    ((model, backend),) = asked
    assert isinstance(model, models.family_of("tiny-flux")) and backend == "native"
    assert placed == [False]
