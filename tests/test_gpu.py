"""What only a GPU can show, on one: bash run.sh test -m gpu -n0. All other tests hide GPUs."""

import os

import pipelines
import pytest
import torch
from gpus import wants_gpu

from common import sde
from common.models.flux import Flux
from common.models.sd import StableDiffusion
from common.trainer import compiling

GPU = pytest.mark.gpu


def test_other_tests_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["pytest"], False),
        (["pytest", "-m", "not slow"], False),
        (["pytest", "-m", "not slow and not gpu"], False),
        (["pytest", "-m", "gpu"], True),
        (["pytest", "-m", "slow or gpu", "-n0"], True),
    ],
)
def test_a_gpu_is_seen_only_if_it_is_asked_for(words, wanted):
    assert wants_gpu(words) == wanted


@GPU
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}, {"attention": "_native_math"}], ids=str)
def test_in_bf16_the_ratio_is_one(train, settings):
    _, rows = train(reward=("jpeg",), save_every=0, **settings)
    assert [row["ratio_error"] for row in rows] == [0, 0]


@GPU
@pytest.mark.parametrize("size", [40, 80, 160])
def test_rollout_and_update_take_one_kernel_for_the_heads_of_stable_diffusion(size):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        model = StableDiffusion(pipelines.sd(), height=64, width=64)
        compiling.settle_attention(model, "native")
        shape, device = (2, 8, 256, size), torch.device("cuda")
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
        with torch.no_grad():
            sampled = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        q.requires_grad_()
        trained = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert torch.equal(sampled, trained)
        trained.sum().backward()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@GPU
def test_a_pass_waits_for_the_gpu_at_most_once():
    model = Flux(pipelines.flux(), height=32, width=32)
    model.pipe.transformer.to("cuda")
    cond = {name: value[None].cuda() for name, value in model.blank().items()}
    x = torch.randn(1, *model.noise_shape, device="cuda")
    sigma = torch.tensor(0.5)  # on the CPU, as sigmas are in a run
    model.velocity(x, sigma, cond)  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.velocity(x, sigma, cond)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
def test_a_rollout_does_not_wait_for_the_gpu_and_its_noise_is_that_of_a_cpu():
    sigmas = sde.shifted_sigmas(4, 1.0)
    s = sde.diffusion_coefficients(sigmas, 0.3, "dance")
    expected = sde.RowNoise(0, 0, range(2))((16, 4))
    start, noise = sde.RowNoise(0, 0, range(2), "cuda"), sde.RowNoise(0, 1, range(2), "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = start((16, 4))
        sde.rollout(lambda x, sigma: -x, x, sigmas, s, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(x.cpu(), expected)
