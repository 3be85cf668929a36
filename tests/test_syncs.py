"""How often a pass waits for the GPU: counted with fake CUDA tensors, without a GPU.

Copies between devices wait unless they are from pinned memory and need not, and so does reading a
value."""

import weakref

import pipelines
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo_base
from common import sde
from common.args import defaults
from common.memory import MemoryPlan
from common.models.flux import Flux, FluxKontext
from common.models.flux2 import Flux2Klein
from common.models.hunyuan import HunyuanVideo
from common.models.qwen import QwenImage
from common.models.qwen_edit import QwenImageEdit
from common.models.sd import StableDiffusion
from common.models.sd3 import StableDiffusion3
from common.models.wan import Wan
from common.trainer import Latents, MicroBatch, compiling

IMAGE = dict(height=32, width=32)
FAMILIES = {
    "flux": (pipelines.flux, Flux, IMAGE),
    "kontext": (pipelines.kontext, FluxKontext, IMAGE),
    "flux2": (pipelines.flux2, Flux2Klein, IMAGE),
    "sd": (pipelines.sd, StableDiffusion, dict(height=64, width=64)),
    "sd3": (pipelines.sd3, StableDiffusion3, IMAGE),
    "qwen": (pipelines.qwen, QwenImage, IMAGE),
    "qwen-edit": (pipelines.qwen_edit, QwenImageEdit, IMAGE),
    "wan": (pipelines.wan, Wan, dict(**IMAGE, frames=5)),
    "hunyuan": (pipelines.hunyuan, HunyuanVideo, dict(**IMAGE, frames=5)),
}


class Syncs(TorchDispatchMode):
    """Counts the operations that wait for the GPU; those of real CPU tensors are computed."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.pinned = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        to = torch.device(kwargs.get("device") or "cpu").type
        real = tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if real and to == "cpu":
            with no_dispatch():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        reads = name in ("_local_scalar_dense", "nonzero", "masked_select")
        copies = name == "_to_copy" and tensors[0].device.type != to and kwargs.get("device")
        if copies and kwargs.get("non_blocking"):
            copies = tensors[0].untyped_storage() not in self.pinned
        indexes = name in ("index", "index_put_", "copy_") and len(devices) > 1
        if reads or copies or indexes:
            self.found.append(name)
        made = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self.pinned.add(made.untyped_storage())
        return made


@pytest.fixture
def syncs():
    """Inside, what is made on "cuda" is fake; the operations that would wait, by name."""
    with FakeTensorMode(allow_non_fake_inputs=True), Syncs() as counter:
        yield counter.found


@pytest.mark.parametrize("transition", sde.TRANSITIONS)
def test_a_rollout_never_waits(transition, syncs):
    with no_dispatch():
        sigmas = sde.shifted_sigmas(4, 1.0)
        s = sde.diffusion_coefficients(sigmas, 0.3, transition)
        start, noise = (sde.RowNoise(0, step, range(2), "cuda") for step in range(2))
    x = start((16, 4))
    assert x.device.type == "cuda"
    latents, _ = sde.rollout(
        lambda x, sigma: x.clone(), x, sigmas, s, noise, sde.TRANSITIONS[transition]
    )
    assert latents.device.type == "cuda"
    assert syncs == []


def test_noise_is_drawn_while_the_pass_before_it_runs():
    """On a GPU a pass returns before it is computed, so what is called next runs beside it."""
    sigmas = sde.shifted_sigmas(4, 1.0)
    s = sde.diffusion_coefficients(sigmas, 0.3, "dance", window=(1, 2))
    called = []
    draw = sde.RowNoise(0, 0, range(2))

    def velocity(x, sigma):
        called.append("pass")
        return -x

    def noise(shape):
        called.append("noise")
        return draw(shape)

    sde.rollout(velocity, torch.randn(2, 3), sigmas, s, noise)
    assert called == ["pass", "pass", "noise", "pass", "noise", "pass"]


def test_scalars_of_a_region_are_filled_in_on_the_gpu(syncs):
    """Reading one inside of a compiled region would split it."""
    with no_dispatch():
        sigma = torch.tensor(0.5)
    x, here = torch.empty(2, 3, device="cuda"), torch.empty((), device="cuda")
    filled = compiling._on(x, sigma)
    assert filled.device.type == "cuda" and filled.shape == ()
    assert compiling._on(x, here) is here
    assert compiling._on(x, 1e-4) == 1e-4
    assert syncs == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_outside_its_module_never_waits(family, syncs):
    make, cls, size = FAMILIES[family]
    with no_dispatch():
        model = cls(make(), **size, guidance=1.0)
        blank = model.blank()
        sigma = torch.tensor(0.5)
    copied = {name: torch.empty_like(value, device="cuda") for name, value in blank.items()}
    cond = {name: value[None] for name, value in copied.items()}
    (module,) = model.trainable.values()
    model.trainable = {name: Outside(module) for name in model.trainable}
    model.velocity(torch.empty(1, *model.noise_shape, device="cuda"), sigma, cond)
    assert syncs == []


@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
def test_micro_batches_are_read_without_waiting(on_host, syncs):
    plan = MemoryPlan(defaults(grpo_base.Args), batch=2, host_latents=on_host)
    with no_dispatch():
        index = torch.tensor([2, -1])
    latents = Latents.__new__(Latents)  # pinned memory needs a GPU
    latents.device, latents.on_host = torch.device("cuda"), plan.host_latents
    latents.values = torch.empty(3, 5, 4, 2, device="cpu" if on_host else "cuda")
    mb = MicroBatch(index, torch.empty(2, dtype=torch.long, device="cuda"), None)
    assert latents.at(mb, 3).device.type == "cuda"
    assert not on_host or syncs == ["_to_copy"] * 2  # from pinned memory these do not wait
    assert on_host or syncs == []


class Outside:
    """A trained module of which only the inputs count."""

    def __init__(self, module):
        self.config = module.config

    def __call__(self, hidden_states=None, sample=None, **inputs):
        x = sample if hidden_states is None else hidden_states
        inputs = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        assert {value.device.type for value in inputs} == {"cuda"}
        return (x.clone(),)
