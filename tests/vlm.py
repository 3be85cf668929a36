"""Small random Qwen2-VL and Qwen2.5-VL in transformers' own classes and files, byte by byte
tokenizers included."""

import torch
from learned import randomised
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# what Qwen2.5-VL's own template does with text and pictures
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' "
    "%}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in "
    "message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    made.add_tokens(SPECIAL, special_tokens=True)
    made.eos_token = "<|im_end|>"
    return made


def ids(tokens):
    """Where the special tokens are, as the configurations call them."""
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    return {
        f"{name.replace('_pad', '')}_token_id": tokens.convert_tokens_to_ids(f"<|{name}|>")
        for name in names
    }  # fmt: skip


def text(tokens, **settings):
    return dict(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2],
                         "rope_theta": 1e4},
        bos_token_id=None, eos_token_id=tokens.convert_tokens_to_ids("<|im_end|>"), **settings,
    )  # fmt: skip


def qwen2_vl_config(tokens):
    vision = dict(depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2, num_heads=2)
    return Qwen2VLConfig(
        text_config=text(tokens), vision_config=vision, **ids(tokens), tie_word_embeddings=True
    )


def save_judge(folder, seed=0):
    """A Qwen2.5-VL in a folder whose every answer is one digit, 1 to 9: all else is suppressed, and
    digits end it."""
    tokens = tokenizer()
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32,
        fullatt_block_indexes=[1], window_size=56,
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text(tokens), vision_config=vision, **ids(tokens), tie_word_embeddings=False
    )  # fmt: skip
    model = randomised(Qwen2_5_VLForConditionalGeneration(config), seed)
    digits = tokens.convert_tokens_to_ids(list("123456789"))
    others = [i for i in range(len(tokens)) if i not in digits]
    model.generation_config = GenerationConfig(
        suppress_tokens=others, eos_token_id=digits, pad_token_id=others[-1]
    )
    model.save_pretrained(folder)
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(min_pixels=56**2, max_pixels=56**2), tokens, Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def clips(number, frames=8, side=64, seed=0):
    """[number, frames, 3, side, side] of plain colours that change from frame to frame: JPEG hardly
    alters them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, frames, 3, 1, 1, generator=generator).expand(-1, -1, -1, side, side)
