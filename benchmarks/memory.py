"""GPU memory that each model takes, counted without a GPU; writes README's table.

    python -m benchmarks.memory

The modules have the released sizes and tensors without contents (FakeTensorMode). Weights, gradients and optimizer are
counted by common/preflight.py, as before every run. Activations are the tensors that autograd keeps in one pass of one
row at the model's default size, with gradient checkpointing: the blocks' inputs, and all of the largest block, which is
computed again. Guidance against the empty prompt is a second pass. Not counted: what a kernel needs while it runs, and
the allocator's gaps; allow for a tenth more.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import transformers
import tyro
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode

import grpo_base
from common import arguments, models, preflight
from common.models.flux import Flux
from common.models.hunyuan import HunyuanVideo
from common.models.sd import StableDiffusion
from common.models.wan import Wan, WanImageToVideo

README = Path(__file__).resolve().parents[1] / "README.md"
ROOM = 70.0  # GiB of an 80 GB GPU that this may take
RANK = 64
WAN = dict(num_attention_heads=40, ffn_dim=13824, num_layers=40)
SMALL_WAN = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)


@dataclass
class Args:
    write: bool = True
    """Write the table into README.md; it is printed in any case."""


# --- The released sizes ---


def t5():
    config = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    return transformers.T5EncoderModel(transformers.T5Config(**config, feed_forward_proj="gated-gelu"))


def umt5():
    config = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**config, feed_forward_proj="gated-gelu"))


def clip():
    config = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config, projection_dim=768))


def llama():
    config = dict(
        vocab_size=128320, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    )
    return transformers.LlamaModel(transformers.LlamaConfig(**config, num_key_value_heads=8))


def kl_vae(**config):
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=1024, **config,
    )  # fmt: skip


def wan(experts=1, channels=16, **config):
    names = ("transformer", "transformer_2")[:experts]
    made = {name: diffusers.WanTransformer3DModel(in_channels=channels, **config) for name in names}
    return dict(made, text_encoder=umt5(), vae=diffusers.AutoencoderKLWan())


COMPONENTS = {
    "flux": lambda: dict(
        transformer=diffusers.FluxTransformer2DModel(guidance_embeds=True), text_encoder=clip(), text_encoder_2=t5(),
        vae=kl_vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    ),
    "sd1.4": lambda: dict(
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768), text_encoder=clip(), vae=kl_vae()
    ),
    "wan2.1-1.3b": lambda: wan(**SMALL_WAN),
    "wan2.1-14b": lambda: wan(**WAN),
    "wan2.2-i2v": lambda: wan(experts=2, channels=36, **WAN),
    "hunyuan": lambda: dict(
        transformer=diffusers.HunyuanVideoTransformer3DModel(guidance_embeds=True), text_encoder=llama(),
        text_encoder_2=clip(), vae=diffusers.AutoencoderKLHunyuanVideo(),
    ),
}  # fmt: skip


FAMILIES = {
    "flux": Flux, "sd1.4": StableDiffusion, "wan2.1-1.3b": Wan, "wan2.1-14b": Wan, "wan2.2-i2v": WanImageToVideo,
    "hunyuan": HunyuanVideo,
}  # fmt: skip


def inputs(name, settings):
    """What the transformer of a model gets for one row."""
    half, single = dict(dtype=torch.bfloat16), dict(dtype=torch.float32)
    height, width = settings["height"], settings["width"]
    when = torch.ones(1, **single)
    if name == "flux":
        tokens = height // 16 * (width // 16)
        return dict(
            hidden_states=torch.zeros(1, tokens, 64, **single), timestep=when, guidance=when,
            encoder_hidden_states=torch.zeros(1, 512, 4096, **half), pooled_projections=torch.zeros(1, 768, **half),
            img_ids=torch.zeros(tokens, 3, **single), txt_ids=torch.zeros(512, 3, **single),
        )  # fmt: skip
    if name == "sd1.4":
        latents = torch.zeros(1, 4, height // 8, width // 8, **single)
        return dict(sample=latents, timestep=when, encoder_hidden_states=torch.zeros(1, 77, 768, **half))
    latents = torch.zeros(
        1, 36 if name == "wan2.2-i2v" else 16, (settings["frames"] - 1) // 4 + 1, height // 8, width // 8, **single
    )
    if name == "hunyuan":
        return dict(
            hidden_states=latents, timestep=when, guidance=when, pooled_projections=torch.zeros(1, 768, **half),
            encoder_hidden_states=torch.zeros(1, 256, 4096, **half),
            encoder_attention_mask=torch.ones(1, 256, dtype=torch.bool),
        )  # fmt: skip
    return dict(hidden_states=latents, timestep=when, encoder_hidden_states=torch.zeros(1, 512, 4096, **half))


# --- Counting ---


class Kept:
    """Inside, counts the bytes that autograd keeps for the backward pass, weights left out, each storage once."""

    def __init__(self, module):
        self.weights = {weight.untyped_storage()._cdata for weight in module.parameters()}
        self.seen, self.tensors = {}, []

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.seen[storage._cdata] = storage.nbytes()
            self.tensors.append(tensor)  # alive, so that no other storage gets its address
        return tensor

    @property
    def bytes(self):
        return sum(self.seen.values())

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def on_fake_cpu(module):
    """A module on the meta device, from now on on a CPU that holds nothing: attention is counted as GPUs do it."""
    for part in module.modules():
        for key, weight in part._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                part._parameters[key] = torch.nn.Parameter(empty, weight.requires_grad)
        for key, buffer in part._buffers.items():
            part._buffers[key] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    return module


def activations(module, blocks, values):
    """(bytes kept by one pass with gradient checkpointing, those of the largest block)"""
    largest, before = 0, {}

    def entered(block, *_):
        before[block] = kept.bytes

    def left(block, *_):
        nonlocal largest
        largest = max(largest, kept.bytes - before[block])

    parts = [part for part in module.modules() if type(part).__name__ in blocks]
    handles = [part.register_forward_pre_hook(entered) for part in parts]
    handles += [part.register_forward_hook(left) for part in parts]
    with Kept(module) as kept, torch.autocast("cpu", torch.bfloat16):
        module(**values, return_dict=False)
    for handle in handles:
        handle.remove()
    module.enable_gradient_checkpointing()
    with Kept(module) as kept, torch.autocast("cpu", torch.bfloat16):
        module(**values, return_dict=False)
    return kept.bytes, largest


def full_size(name, lora):
    """(the model as common/preflight.py looks at it, bytes of activations)"""
    family, settings = FAMILIES[name], models.settings(name)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            components = COMPONENTS[name]()
        model = SimpleNamespace(
            pipe=SimpleNamespace(components=components), encoders=family.encoders,
            trainable={key: components[key] for key in family.trained if key in components},
        )  # fmt: skip
        for module in model.trainable.values():
            module.requires_grad_(not lora)
            if lora:
                module.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=family.lora_targets))
        first = next(iter(model.trainable.values()))
        with FakeTensorMode():
            kept, largest = activations(on_fake_cpu(first), family.blocks, inputs(name, settings))
    finally:
        torch.set_default_dtype(torch.float32)
    passes = 1 + (family.negative and settings["guidance"] != 1)
    return model, passes * kept + largest


def held(name, model, lora, gpus, often):
    """Bytes of weights, gradients and optimizer on each of so many GPUs, often: with --exchange-often."""
    args = arguments.defaults(grpo_base.Args, name, lora_rank=RANK * lora, offload_encoders=True, exchange_often=often)
    always = sum(preflight.memory(model, args, 2, gpus).values())
    if gpus > 1:  # two blocks are whole for a moment, in bfloat16: the one that computes, and the next one
        parts = (part for module in model.trainable.values() for part in module.modules())
        return always + 4 * max(preflight.number(p) for p in parts if type(p).__name__ in FAMILIES[name].blocks)
    return always + (0 if lora else 2 * preflight.trained_number(model, args))  # autocast's copies of the weights


def row(name, lora):
    """The first of the configurations in which a model fits."""
    model, kept = full_size(name, lora)
    for gpus in (1, 2, 4, 8, 16, 32):
        for often in (False, True) if gpus > 1 else (False,):
            size = (held(name, model, lora, gpus, often) + kept) / 2**30
            if size <= ROOM:
                config = "one_process" if gpus == 1 else "fsdp2_two_experts" if name == "wan2.2-i2v" else "fsdp2"
                config = ("fsdp2_multi_node" if gpus > 8 else config) + ".yaml" + " --exchange-often" * often
                return f"| `{name}` | {'LoRA' if lora else 'all'} | `{config}` | {gpus} | {size:.0f} |"
    return f"| `{name}` | {'LoRA' if lora else 'all'} | more than 32 GPUs | | |"


def main(args):
    lines = [
        "| `--model` | trained | configuration | GPUs, at least | GiB on each |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in COMPONENTS:
        for lora in (True, False):
            lines.append(row(name, lora))
            print(lines[-1], flush=True)
    if args.write:
        part = re.compile(r"(?<=<!-- memory -->\n).*?(?=<!-- /memory -->)", re.S)
        README.write_text(part.sub(lambda _: "\n".join(lines) + "\n", README.read_text()))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
