"""Small pipelines with random weights, of the real classes, with real tokenizers."""

import torch
import vlm
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from worlds import shapes
from worlds.building import clip_tokenizer, t5_tokenizer

CORPUS = [caption for task in shapes.captions().values() for caption in task]


def clip_text(tokenizer, width, longest, cls=CLIPTextModel, **config):
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
            **{"num_hidden_layers": 1, **config},
            num_attention_heads=2, max_position_embeddings=longest,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def flux():
    """Any size in multiples of 16 -> a token for 16x16 pixels, as FLUX.1-dev."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(CORPUS, 77), t5_tokenizer(CORPUS, 32)
    return FluxPipeline(
        vae=AutoencoderKL(
            block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=2,
            sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip_text(tokenizer, 16, 77), tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
            )
        ),
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=12,
            num_attention_heads=1, joint_attention_dim=16, pooled_projection_dim=16,
            guidance_embeds=True, axes_dims_rope=(4, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def kontext():
    """FLUX's parts; an image is as many reference tokens as a sample has tokens."""
    pipe = FluxKontextPipeline(**flux().components)
    pipe.text_encoder_2.eval()  # without dropout
    return pipe


def sd(blocks=3):
    """32x32 -> latents [4, 8, 8], or with more blocks larger images; the scheduler's settings are
    Stable Diffusion 1.4's."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(CORPUS, 12)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(*(8,) * (blocks - 1), 16),
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks, latent_channels=4, norm_num_groups=4,
            sample_size=32, scaling_factor=0.18215,
        ),
        text_encoder=clip_text(tokenizer, 16, 12), tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
            attention_head_dim=2, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd3(t5=True):
    """32x32 -> latents [4, 8, 8] in 16 tokens; the settings of VAE and scheduler are Stable
    Diffusion 3.5's. t5: whether it has that encoder, which many leave out."""
    torch.manual_seed(0)
    tokenizers = [clip_tokenizer(CORPUS, 20), clip_tokenizer(CORPUS, 20), t5_tokenizer(CORPUS, 24)]
    with_projection = dict(cls=CLIPTextModelWithProjection, num_hidden_layers=2)
    return StableDiffusion3Pipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4,
            sample_size=32, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip_text(tokenizers[0], 8, 20, **with_projection, projection_dim=6),
        tokenizer=tokenizers[0],
        text_encoder_2=clip_text(tokenizers[1], 12, 20, **with_projection, projection_dim=10),
        tokenizer_2=tokenizers[1], tokenizer_3=tokenizers[2] if t5 else None,
        text_encoder_3=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizers[2]), d_model=24, d_kv=8, d_ff=32, num_layers=1,
                num_heads=2, dropout_rate=0.0
            )
        ) if t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            attention_head_dim=12, num_attention_heads=2, joint_attention_dim=24,
            caption_projection_dim=24, pooled_projection_dim=16, pos_embed_max_size=8,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def qwen():
    """32x32 -> latents [4, 16, 16] in 64 tokens of 16 channels."""
    torch.manual_seed(0)
    tokenizer = vlm.tokenizer()
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
    text = vlm.text(tokenizer, max_position_embeddings=1024)
    return QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **vlm.ids(tokenizer))
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.2, 1.0],
        ),
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=12,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )  # fmt: skip


def qwen_edit(zero_cond_t=False):
    """As qwen, with images. zero_cond_t: as the 2511 model."""
    parts = qwen().components
    torch.manual_seed(0)
    parts["transformer"] = QwenImageTransformer2DModel.from_config(
        parts["transformer"].config, zero_cond_t=zero_cond_t
    )
    tokenizer = parts["tokenizer"]
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=vlm.TEMPLATE
    )
    return QwenImageEditPlusPipeline(**parts, processor=processor)


def qwen3(tokenizer, layers, cls=Qwen3Model):
    return cls(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, head_dim=8,
            num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=1024, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
        )
    )  # fmt: skip


def qwen3_tokenizer():
    """Its template is Qwen3's for a single message: without thoughts, they are empty."""
    tokenizer = vlm.tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    return tokenizer


def z_image():
    """32x32 -> latents [4, 8, 8] in 16 tokens, which are filled up to 32."""
    torch.manual_seed(0)
    tokenizer = qwen3_tokenizer()
    pipe = ZImagePipeline(
        tokenizer=tokenizer, text_encoder=qwen3(tokenizer, layers=3),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4,
            sample_size=32, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[640, 64, 64],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )  # fmt: skip
    for token in (pipe.transformer.x_pad_token, pipe.transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # zeros at first
    return pipe


def flux2():
    """32x32 -> latents [16, 4, 4] in 16 tokens."""
    torch.manual_seed(0)
    tokenizer = qwen3_tokenizer()
    pipe = Flux2KleinPipeline(
        tokenizer=tokenizer,
        text_encoder=qwen3(tokenizer, layers=28, cls=Qwen3ForCausalLM),  # the 27th is used
        vae=AutoencoderKLFlux2(
            block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4,
            sample_size=32,
        ),
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip
    torch.nn.init.normal_(pipe.vae.bn.running_mean, std=0.3)  # zeros at first
    torch.nn.init.uniform_(pipe.vae.bn.running_var, 0.5, 2.0)  # ones at first
    return pipe


SMALL_VAE = dict(temperal_downsample=[False, True], scale_factor_spatial=4, scale_factor_temporal=2)


def wan(experts=1, images=False, vae=SMALL_VAE, patch_size=(1, 2, 2)):
    """Clips of 5 frames, 32x32 -> latents [4, 3, 8, 8]; other sizes with another VAE."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer(CORPUS, 12)
    channels = 4
    transformers = [
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, patch_size=patch_size,
            in_channels=2 * channels + vae["scale_factor_temporal"] if images else channels,
            out_channels=channels, text_dim=16, ffn_dim=32, num_layers=2, freq_dim=16,
        )
        for _ in range(experts)
    ]  # fmt: skip
    cls = WanImageToVideoPipeline if images else WanPipeline
    return cls(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                dropout_rate=0.0
            )
        ),
        vae=AutoencoderKLWan(
            **{**dict(base_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, z_dim=channels), **vae},
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.2, 1.0],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformers[0], transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=0.9 if experts == 2 else None,
    )  # fmt: skip


def ti2v():
    """Clips of 5 frames, 32x32 -> latents [4, 3, 4, 4]: Wan2.2's TI2V, with its kind of VAE."""
    vae = dict(is_residual=True, in_channels=12, out_channels=12, patch_size=2)
    pipe = wan(vae={**SMALL_VAE, **vae, "scale_factor_spatial": 8})
    pipe.register_to_config(expand_timesteps=True)
    return pipe


def hunyuan(width=8, layers=1, patch_size=1, patch_size_t=1):
    """Clips of 5 frames, 32x32 -> latents [4, 2, 4, 4]; `width` and `layers` of the VAE's
    blocks."""
    torch.manual_seed(0)
    tokenizer_2 = clip_tokenizer(CORPUS, 77)
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(
            LlamaConfig(
                vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
                pad_token_id=0,
            )
        ),
        tokenizer=llama_tokenizer(),
        text_encoder_2=clip_text(tokenizer_2, 8, 77), tokenizer_2=tokenizer_2,
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
            num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=patch_size,
            patch_size_t=patch_size_t, guidance_embeds=True,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 6),
        ),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(width,) * 4, layers_per_block=layers,
            norm_num_groups=min(4, width), scaling_factor=0.476986,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )  # fmt: skip


def llama_tokenizer():
    """A fast tokenizer as Llama's: bytes for letters, a token at the start."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<|begin_of_text|>", *letters])}
    trained = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        pad_token="<pad>",
        bos_token="<|begin_of_text|>",
        padding_side="right",
    )
