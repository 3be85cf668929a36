"""Count the GPU memory that each model takes, without a GPU; writes the table in docs/train.md.

    python -m benchmarks.memory

The modules have the released sizes and tensors without contents (FakeTensorMode). common/memory/
counts weights, gradients, optimizer and samples, and adds up what the pass of a row and its
decoding allocate at the model's default size, with gradient checkpointing, as before every run. Not
counted: rewards, the workspace of kernels, and the allocator's gaps; a tenth of the memory is left
for them."""

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
import tyro
from peft import LoraConfig

import grpo_base
from common import models
from common.args import defaults
from common.memory.activations import decoded_bytes, row_bytes
from common.memory.bytes import Launch, process_bytes, total
from common.memory.ways import ROOM as SHARE
from common.models.flux import Flux, FluxKontext
from common.models.flux2 import Flux2Klein
from common.models.hunyuan import HunyuanVideo
from common.models.qwen import QwenImage
from common.models.qwen_edit import QwenImageEdit
from common.models.sd import StableDiffusion
from common.models.sd3 import StableDiffusion3
from common.models.wan import Wan, WanImageToVideo
from common.models.z_image import ZImage

PAGE = Path(__file__).resolve().parents[1] / "docs/train.md"
ROOM = SHARE * 79  # GiB of an 80 GB GPU that this may take
RANK = 64
WAN = dict(num_attention_heads=40, ffn_dim=13824, num_layers=40)
SMALL_WAN = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
TI2V = dict(
    in_channels=48, out_channels=48, num_attention_heads=24, ffn_dim=14336, num_layers=30
)  # fmt: skip
TI2V_VAE = dict(
    base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12,
    out_channels=12, patch_size=2, scale_factor_spatial=16,
)  # fmt: skip

SIXTEEN_CHANNELS = dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
SD3 = dict(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip

KLEIN_4B = dict(
    num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
    guidance_embeds=False,
)  # fmt: skip


@dataclass
class Args:
    write: bool = True
    """Write the table into docs/train.md; it is printed in any case."""


# --- The released sizes ---


def t5():
    config = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    return transformers.T5EncoderModel(
        transformers.T5Config(**config, feed_forward_proj="gated-gelu")
    )


def umt5():
    config = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(**config, feed_forward_proj="gated-gelu")
    )


def clip():
    config = dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config, projection_dim=768))


def clip_with_projection(width, layers, heads):
    config = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**config, projection_dim=width)
    )


def llama():
    config = dict(
        vocab_size=128320,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    return transformers.LlamaModel(transformers.LlamaConfig(**config, num_key_value_heads=8))


def qwen():
    text = dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3(cls):
    """Return Qwen3 4B as an instance of a class."""
    return cls(
        transformers.Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
        )
    )  # fmt: skip


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
        transformer=diffusers.FluxTransformer2DModel(guidance_embeds=True), text_encoder=clip(),
        text_encoder_2=t5(),
        vae=kl_vae(**SIXTEEN_CHANNELS, scaling_factor=0.3611, shift_factor=0.1159),
    ),
    "sd1.4": lambda: dict(
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        text_encoder=clip(), vae=kl_vae()
    ),
    "sd3.5-medium": lambda: dict(
        transformer=diffusers.SD3Transformer2DModel(**SD3),
        text_encoder=clip_with_projection(768, 12, 12),
        text_encoder_2=clip_with_projection(1280, 32, 20), text_encoder_3=t5(),
        vae=kl_vae(**SIXTEEN_CHANNELS, scaling_factor=1.5305, shift_factor=0.0609),
    ),
    "qwen-image": lambda: dict(
        transformer=diffusers.QwenImageTransformer2DModel(), text_encoder=qwen(),
        vae=diffusers.AutoencoderKLQwenImage()
    ),
    "z-image": lambda: dict(
        transformer=diffusers.ZImageTransformer2DModel(),
        text_encoder=qwen3(transformers.Qwen3Model),
        vae=kl_vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    ),
    "flux2-klein-4b": lambda: dict(
        transformer=diffusers.Flux2Transformer2DModel(**KLEIN_4B),
        text_encoder=qwen3(transformers.Qwen3ForCausalLM), vae=diffusers.AutoencoderKLFlux2(),
    ),
    "flux-kontext": lambda: COMPONENTS["flux"](),
    "qwen-image-edit": lambda: COMPONENTS["qwen-image"](),
    "wan2.1-1.3b": lambda: wan(**SMALL_WAN),
    "wan2.1-14b": lambda: wan(**WAN),
    "wan2.2-ti2v-5b": lambda: dict(
        transformer=diffusers.WanTransformer3DModel(**TI2V), text_encoder=umt5(),
        vae=diffusers.AutoencoderKLWan(**TI2V_VAE),
    ),
    "wan2.2-i2v": lambda: wan(experts=2, channels=36, **WAN),
    "hunyuan": lambda: dict(
        transformer=diffusers.HunyuanVideoTransformer3DModel(guidance_embeds=True),
        text_encoder=llama(), text_encoder_2=clip(), vae=diffusers.AutoencoderKLHunyuanVideo(),
    ),
}  # fmt: skip


FAMILIES = {
    "flux": Flux, "sd1.4": StableDiffusion, "sd3.5-medium": StableDiffusion3,
    "qwen-image": QwenImage, "z-image": ZImage, "flux2-klein-4b": Flux2Klein,
    "flux-kontext": FluxKontext, "qwen-image-edit": QwenImageEdit,
    "wan2.1-1.3b": Wan, "wan2.1-14b": Wan, "wan2.2-ti2v-5b": Wan,
    "wan2.2-i2v": WanImageToVideo, "hunyuan": HunyuanVideo,
}  # fmt: skip


def flow(**others):
    return dict(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **others)


OTHERS = dict.fromkeys(FAMILIES, flow) | {
    "sd1.4": lambda: dict(
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ),
    "qwen-image-edit": lambda: flow(processor=None),
    "wan2.2-ti2v-5b": lambda: flow(expand_timesteps=True),
    "wan2.2-i2v": lambda: flow(boundary_ratio=0.9),
}


@contextlib.contextmanager
def weights_in_bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def full_size(name, lora, **settings):
    """The model as `models.outline` makes it from the released folder, a LoRA or all of its weights
    to be trained."""
    family, own = FAMILIES[name], models.settings(name)
    with weights_in_bfloat16(), torch.device("meta"):
        parts = COMPONENTS[name]()
        if family.vae_dtype:
            parts["vae"].float()
    tokenizers = {
        part.replace("text_encoder", "tokenizer"): Tokenizer(parts[part])
        for part in parts
        if "text" in part
    }
    size = {key: own[key] for key in ("height", "width", "frames", "guidance") if key in own}
    model = family(family.pipeline(**parts, **tokenizers, **OTHERS[name]()), **{**size, **settings})
    for module in model.trainable.values():
        module.requires_grad_(not lora)
        if lora:
            with torch.device("meta"):
                module.add_adapter(
                    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=family.lora_targets)
                )
    return model


class Tokenizer:
    """What the count asks a tokenizer."""

    def __init__(self, encoder):
        self.model_max_length = 77 if type(encoder).__name__.startswith("CLIP") else 512


def row(name, lora):
    """Return the table's row of a model: the first launch in which it fits."""
    model = full_size(name, lora)
    rank = RANK if lora else 0
    args = defaults(grpo_base.Args, name, lora_rank=rank, offload_encoders=True, micro_batch=1)
    args = dataclasses.replace(args, gradient_checkpointing=True, decode_batch=1)
    kept = row_bytes(model, torch.bfloat16, True)
    decoding = decoded_bytes(model)
    start = f"| `{name}` | {'LoRA' if lora else 'all'} |"
    end = f"| {kept / 2**30:.1f} |"
    for gpus in (1, 2, 4, 8, 16, 32):
        launch = Launch(torch.bfloat16, "cuda", world=gpus, sharded=gpus > 1)
        for often in (False, True) if gpus > 1 else (False,):
            tried = dataclasses.replace(args, exchange_often=often)
            kinds = process_bytes(
                model, tried, launch=launch, shards=gpus, activations=kept, decoding=decoding
            )
            size = total(kinds) / 2**30
            if size <= ROOM:
                return f"{start} `{configuration(name, gpus, often)}` | {gpus} | {size:.0f} {end}"
    return f"{start} more than 32 GPUs | | {end}"


def configuration(name, gpus, often):
    """Return the file in configs/ for so many GPUs, and --exchange-often if it is needed."""
    file = "fsdp2_two_experts.yaml" if name == "wan2.2-i2v" else "fsdp2.yaml"
    if gpus == 1:
        file = "one_process.yaml"
    if gpus > 8:
        file = "fsdp2_multi_node.yaml"
    return f"{file} --exchange-often" if often else file


def main(args):
    lines = [
        "| `--model` | trained | configuration | 80 GB GPUs, at least | GiB on each | "
        "a row's pass |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in COMPONENTS:
        for lora in (True, False):
            lines.append(row(name, lora))
            print(lines[-1], flush=True)
    if args.write:
        part = re.compile(r"(?<=<!-- memory -->\n).*?(?=<!-- /memory -->)", re.S)
        PAGE.write_text(
            part.sub(lambda _: "\n".join(lines) + "\n", PAGE.read_text(encoding="utf-8")),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
