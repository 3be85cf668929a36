"""Measure what a training step costs over its floor: the bare transformer doing the same forwards
and backwards.

    python -m benchmarks.step    # tiny-flux, a 70M FLUX at 256x256; rewrites its part of RESULTS.md

The step is grpo_base.py's own, whole: noise, text embeddings, T forwards, transitions, decoding,
reward, advantages, n forwards and backwards, optimizer, log. The floor is T forwards without
gradients and n forwards and backwards of the same rows in the same micro-batches, inputs prepared,
nothing else; it is never compiled, where the step is. Steps and floors alternate in one process, so
that both see the same machine; the median of their ratios counts. The ratio of processor time
stands beside it: other programs on the machine hardly disturb that."""

import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
import tyro
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

import grpo_base
from benchmarks.replaced import replaced
from benchmarks.results import write
from common import models
from common.args import defaults
from common.memory import ways
from common.models.flux import image_ids
from common.trainer import Checkpoints, Clock, compiling

SMALL = dict(eval_every=0, sample_every=0, save_every=0, tracker="none")
_70M = dict(
    model="70m", steps=8, reward=("jpeg",), prompts_per_step=1, group_size=4, sampling_steps=4,
    micro_batch=4, height=256, width=256, prompts=models.MODELS["tiny-flux"]["prompts"],
    sde="dance", noise_level=0.3,
)  # fmt: skip
CASES = {  # targets and settings
    "tiny-flux, 32x32, P 8, G 12, T 8, verifier": (1.10, dict(model="tiny-flux", steps=12)),
    "70M FLUX, 256x256, P 1, G 4, T 4, JPEG": (1.03, _70M),
    "the same with `--compile`": (0.95, dict(_70M, compile=True)),
}


@dataclass
class Args:
    write: bool = True
    """Rewrite its part of benchmarks/RESULTS.md."""


def floor(policy, args):
    """Return the seconds of the bare transformer's share of one step, (by the clock, of the
    processor)."""
    model, processes = policy.model, policy.processes
    device = processes.device
    rows = args.prompts_per_step * args.group_size // processes.world
    cond = model.encode(["a red circle"] * rows)
    x = torch.randn(rows, *model.noise_shape, device=device)
    unit = 2 * model.pipe.vae_scale_factor
    batches = []
    # three minibatches make smaller passes than --micro-batch allows
    for index in torch.arange(rows).split(ways.batch_size(ways.resolved(args), rows)):
        n = len(index)
        inputs = {
            "hidden_states": x[index],
            "timestep": torch.full((n,), 0.5, device=device),
            "guidance": torch.full((n,), args.guidance, device=device),
            "txt_ids": torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=device),
            "img_ids": image_ids(model.height // unit, model.width // unit).to(device),
            "return_dict": False,
        }
        batches.append({**inputs, **models.take(cond, index)})
    transformer = model.trainable["transformer"]
    clock = Clock(device)
    processor = time.process_time()
    with compiling.off():
        for inputs in batches:
            with torch.no_grad():
                for _ in range(args.sampling_steps):
                    transformer(**inputs)
            for _ in range(args.sampling_steps - 1):
                transformer(**inputs)[0].sum().backward()
    seconds = clock.lap(), time.process_time() - processor
    policy.optimizer.zero_grad()
    return seconds


def measure(settings):
    """Return [((step s, floor s) by the clock, the same of the processor)] of alternating steps and
    floors.

    The first step (warm-up) and the last, which saves a checkpoint as well, are left out.
    """
    pairs = []

    class Alternating(Checkpoints):
        def steps(self, stop):
            for step in super().steps(stop):
                started, processor = time.perf_counter(), time.process_time()
                yield step
                own = time.perf_counter() - started, time.process_time() - processor
                pairs.append(list(zip(own, floor(self.policy, self.args))))

    with replaced(grpo_base, Checkpoints=Alternating), tempfile.TemporaryDirectory() as folder:
        args = defaults(grpo_base.Args, **{**SMALL, "output": f"{folder}/run", **settings})
        if args.model == "70m":
            args.model = seventy_million(f"{folder}/model")
        grpo_base.main(args)
    return pairs[1:-1]


def seventy_million(folder):
    """A random FLUX of 70M parameters, with tiny-flux's text encoders and an 8x VAE, as a pipeline
    folder."""
    torch.manual_seed(0)
    pipe = FluxPipeline.from_pretrained(models.settings("tiny-flux")["source"], dtype=torch.float32)
    pipe.register_modules(
        vae=AutoencoderKL(
            block_out_channels=(16, 16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4,
            norm_num_groups=8, sample_size=256, shift_factor=0.0, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=4, num_single_layers=8, attention_head_dim=64,
            num_attention_heads=8, joint_attention_dim=64, pooled_projection_dim=64,
            guidance_embeds=True, axes_dims_rope=(16, 24, 24),
        ),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def main(args):
    lines = [
        "| case | step s | floor s | ratio, median (all) | processor time | target |",
        "| --- " * 6 + "|",
    ]
    for name, (target, settings) in CASES.items():
        clock, processor = zip(*measure(settings))
        ratios = [step / bare for step, bare in clock]
        step, bare = (statistics.median(column) for column in zip(*clock))
        lines.append(
            f"| {name} | {step:.2f} | {bare:.2f} | {statistics.median(ratios):.3f} "
            f"({', '.join(f'{r:.2f}' for r in sorted(ratios))}) | "
            f"{statistics.median(step / bare for step, bare in processor):.3f} | {target} |"
        )
        print(lines[-1], flush=True)
    if args.write:
        write("A training step over the bare transformer (`python -m benchmarks.step`)", lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
