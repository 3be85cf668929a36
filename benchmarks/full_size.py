"""One whole GRPO step of a full-size model with random weights on a GPU: seconds, memory, ratio, transformer's share.

    python -m benchmarks.full_size --model flux            # FLUX.1-dev, 720x720, LoRA, one group of 12, T = 16
    python -m benchmarks.full_size --model wan2.1-1.3b     # 480x832x53, LoRA, one group of 8, T = 16
    python -m benchmarks.full_size --model tiny-flux       # the same script in small, on a CPU too

Transformer and VAE have the size of the released ones. The text encoders have their width but few layers: a prompt is
encoded once in a run, before the step. grpo_base.py runs as it is, from a pipeline folder, for two steps; the second
counts. The share is that of the transformer's forward and backward passes, between synchronised clocks.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

import grpo_base
from benchmarks.results import write
from common import arguments, models
from common.runtime import Runtime
from lab.building import clip_tokenizer, t5_tokenizer

CAPTIONS = ["a red circle", "a blue square and a green cross"]
SETTINGS = {
    "flux": dict(group_size=12, lora_rank=64, gradient_checkpointing=True, micro_batch=1),
    "wan2.1-1.3b": dict(group_size=8, best_of=0, lora_rank=64, gradient_checkpointing=True, micro_batch=1),
    "tiny-flux": dict(group_size=4, lora_rank=2, micro_batch=2),
}


@dataclass
class Args:
    model: str = "flux"
    """flux, wan2.1-1.3b or tiny-flux."""
    write: bool = True
    """Rewrite its part of benchmarks/RESULTS.md."""


def flux():
    tokenizer, tokenizer_2 = clip_tokenizer(CAPTIONS, 77), t5_tokenizer(CAPTIONS, 512)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, num_hidden_layers=1, num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer_2), d_model=4096, d_kv=64, d_ff=1024, num_layers=1, num_heads=8)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=CLIPTextModel(clip), text_encoder_2=T5EncoderModel(t5),
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16, sample_size=1024,
            scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
        ),
        transformer=FluxTransformer2DModel(guidance_embeds=True),
    )  # fmt: skip


def wan():
    tokenizer = t5_tokenizer(CAPTIONS, 512)
    umt5 = UMT5Config(vocab_size=len(tokenizer), d_model=4096, d_kv=64, d_ff=1024, num_layers=1, num_heads=8)
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(umt5), vae=AutoencoderKLWan(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    )  # fmt: skip


def build(model, folder):
    """A folder with the full-size pipeline, random weights in bf16, made where there is room and speed for them."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            {"flux": flux, "wan2.1-1.3b": wan}[model]().save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.cuda.empty_cache()
    return str(folder)


class Share:
    """Seconds inside the trained modules' forward passes, and inside the backward passes, which are theirs alone."""

    def __init__(self):
        self.seconds = 0.0

    def clocked(self, function):
        def measured(*args, **kwargs):
            self._wait()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self._wait()
            self.seconds += time.perf_counter() - started
            return result

        return measured

    @staticmethod
    def _wait():
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def main(args):
    share, steps = Share(), []
    prepare, backward, summarise = Runtime.prepare, Runtime.backward, Runtime.summarise

    def prepared(run, model):
        optimizer = prepare(run, model)
        for module in model.trainable.values():
            module.forward = share.clocked(module.forward)
        return optimizer

    def summarised(run, *rest):  # once a step, after the update
        steps.append(share.seconds)
        share.seconds = 0.0
        return summarise(run, *rest)

    Runtime.prepare, Runtime.summarise = prepared, summarised
    Runtime.backward = lambda run, loss: share.clocked(backward)(run, loss)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prompts.txt").write_text("\n".join(CAPTIONS))
        source = args.model if args.model.startswith("tiny") else build(args.model, f"{folder}/model")
        settings = dict(models.settings(args.model), **SETTINGS[args.model], prompts_per_step=1, steps=2)
        settings |= dict(reward=("jpeg",), prompts=f"{folder}/prompts.txt", eval_prompts="", save_every=0)
        settings["offload_encoders"] = True
        settings = {name: value for name, value in settings.items() if name != "source"}
        run_args = arguments.defaults(grpo_base.Args, source, **settings, tracker="none", output=f"{folder}/run")
        grpo_base.main(run_args)
        row = json.loads((Path(folder) / "run/metrics.jsonl").read_text().splitlines()[1])
    seconds = sum(row[f"{part}_seconds"] for part in ("rollout", "reward", "update"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else "-"
    cells = {
        "model": f"{args.model}, LoRA, 1 x {run_args.group_size} samples",
        "device": device,
        "step s": f"{seconds:.1f}",
        "of it rollout, reward, update s": ", ".join(
            f"{row[f'{part}_seconds']:.1f}" for part in ("rollout", "reward", "update")
        ),
        "transformer's share": f"{steps[1] / seconds:.3f}",
        "peak memory": memory,
        "ratio error": f"{row['ratio_error']:.1e}",
    }
    lines = [f"| {' | '.join(line)} |" for line in (cells, ["---"] * len(cells), cells.values())]
    print(*lines, sep="\n")
    if args.write:
        write(f"A full-size step (`python -m benchmarks.full_size --model {args.model}`)", lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
