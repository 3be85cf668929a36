"""Measure GRPO steps of a full-size model with random weights on one GPU against their floor.

It reports seconds, memory, FLOPs and the ratio.

    python -m benchmarks.full_size --model flux            # FLUX.1-dev, 720x720, LoRA of rank 64
    python -m benchmarks.full_size --model wan2.1-1.3b     # 480x832x53, LoRA of rank 64
    python -m benchmarks.full_size --model flux --compile  # with compiled blocks
    python -m benchmarks.full_size --model tiny-flux       # a small model, also on a CPU
    python -m benchmarks.full_size --wheels                # list packages for pip download, for a
                                                           # machine without a network

Each phase ends with a JSON line, so that a run that is cut short has said something: `built`,
`matmul` (the card's rate), `floor` (one micro-batch, which warms up as well), of each step
`rollout`, `reward`, `update`, and `total`; or `stopped`, with the ratio's alarm. Transformer and
VAE have the size of the released ones and are made where they are used: nothing is written or read.
The text encoders have their width but few layers: a prompt is encoded once, before the steps.
grpo_base.py runs as it is.

The floor is the bare transformer without a LoRA on the same rows in the same passes: T forwards,
and as many forwards and backwards as the update has, to the inputs alone, from one micro-batch
timed by itself. FLOPs are those that torch counts in these passes; of the backward pass with what
checkpointing computes again."""

import importlib.metadata
import json
import re
import statistics
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

import grpo_base
from benchmarks import memory
from benchmarks.replaced import replaced
from benchmarks.results import write
from common import models
from common.args import defaults
from common.errors import RunError
from common.trainer import Checkpoints, Clock, Policy, compiling
from worlds.building import clip_tokenizer, t5_tokenizer

CAPTIONS = ["a red circle", "a blue square and a green cross"]
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    model: str = "flux"
    """flux, wan2.1-1.3b or tiny-flux."""
    rows: int = 2
    """Samples of a step, one group."""
    steps: int = 2
    """Training steps; the last one counts."""
    sampling_steps: int = 16
    """T: denoising steps."""
    micro_batch: int = 1
    """Rows of a pass."""
    lora_rank: int = 64
    """Rank of the LoRA; 0: all weights."""
    compile: bool = False
    """Compile the transformer's blocks, as the scripts do."""
    wheels: bool = False
    """Print the packages that this needs, NAME==VERSION, as they are installed here, and nothing
    else."""
    write: bool = True
    """Rewrite its part of benchmarks/RESULTS.md."""


# --- The model ---


def flux():
    tokenizer, tokenizer_2 = clip_tokenizer(CAPTIONS, 77), t5_tokenizer(CAPTIONS, 512)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, num_hidden_layers=1, num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(tokenizer_2), d_model=4096, d_kv=64, d_ff=1024, num_layers=1, num_heads=8
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=CLIPTextModel(clip), text_encoder_2=T5EncoderModel(t5),
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16,
            sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=FluxTransformer2DModel(guidance_embeds=True),
    )  # fmt: skip


def wan():
    tokenizer = t5_tokenizer(CAPTIONS, 512)
    umt5 = UMT5Config(
        vocab_size=len(tokenizer), d_model=4096, d_kv=64, d_ff=1024, num_layers=1, num_heads=8
    )
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(umt5), vae=AutoencoderKLWan().float(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    )  # fmt: skip


def build(name, dtype, prompts=(), trust_remote_code=False, source="", **settings):
    """Return a model with random bf16 weights, in place of models.load, on a GPU if possible."""
    with memory.weights_in_bfloat16(), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipe = {"flux": flux, "wan2.1-1.3b": wan}[name]()
    return memory.FAMILIES[name](pipe, **settings)


def outline(name, dtype, large, trust_remote_code=False, **settings):
    """Take the place of models.outline: return the released sizes, text encoders too."""
    return memory.full_size(name, 0)


def family_of(name, source=""):
    """Take the place of models.family_of, which would read the released files."""
    return memory.FAMILIES[name]


# --- Measuring ---


class Phases:
    """Prints what each phase took, as a JSON line; `found` keeps the last of each kind."""

    def __init__(self):
        self.started = time.perf_counter()
        self.found = {}

    def say(self, phase, **numbers):
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        if peak:
            numbers["peak_gib"] = round(peak / 2**30, 2)
            torch.cuda.reset_peak_memory_stats()
        self.found[phase] = numbers
        at = round(time.perf_counter() - self.started, 1)
        print(json.dumps({"phase": phase, "at": at, **numbers}), flush=True)


def seconds_of(action, device, number=3):
    """Return the median seconds of `number` calls, after one that does not count."""
    clock = Clock(device)
    times = []
    for _ in range(number + 1):
        action()
        times.append(clock.lap())
    return statistics.median(times[1:])


def matmul_rate(device, dtype):
    """Return the FLOP/s of a large matrix product: what the card can do in practice."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device)


def floor(policy, rows, phases):
    """Time the transformer without its LoRA on one micro-batch, and count its FLOPs."""
    model, processes = policy.model, policy.processes
    x = torch.randn(rows, *model.noise_shape, device=processes.device, requires_grad=True)
    cond = model.encode(CAPTIONS[:1] * rows)

    def forward():
        with torch.no_grad():
            model.velocity(x, torch.tensor(0.5), cond)

    def both():
        model.velocity(x, torch.tensor(0.5), cond).sum().backward()
        policy.optimizer.zero_grad()

    adapted = []
    if policy.lora_rank:
        unwrap = processes.accelerator.unwrap_model
        adapted = [unwrap(module) for module in model.trainable.values()]
    for module in adapted:
        module.disable_adapters()
    rate = phases.found["matmul"]["tflops"] * 1e12
    numbers = {"rows": rows, "tokens": tokens(model)}
    with compiling.off():
        for name, action in (("forward", forward), ("forward_backward", both)):
            seconds = seconds_of(action, processes.device)
            with FlopCounterMode(display=False) as counter:
                action()
            flops = counter.get_total_flops()
            numbers[f"{name}_s"] = seconds
            numbers[f"{name}_tflop"] = flops / 1e12
            numbers[f"{name}_mfu"] = flops / seconds / rate
    for module in adapted:
        module.enable_adapters()
    phases.say("floor", **numbers)


def tokens(model):
    """Return the tokens of one row."""
    first, *rest = model.noise_shape
    patch = getattr(next(iter(model.trainable.values())).config, "patch_size", 1)
    if not isinstance(patch, (tuple, list)):
        return first if len(rest) == 1 else first * rest[0]
    return torch.Size(rest).numel() // torch.Size(patch).numel()


def watched(phases, steps):
    """Return {name: class}, which take the place of grpo_base's own: they report each phase."""
    names = iter(["rollout", "reward", "update"] * steps)

    class WatchedClock(Clock):
        def lap(self):
            seconds = super().lap()
            phases.say(next(names), s=seconds)
            return seconds

    class WatchedPolicy(Policy):
        def __init__(self, model, args, processes, plan, keep_initial):
            modules = torch.nn.ModuleList(model.trainable.values())
            phases.say("built", weights=sum(weight.numel() for weight in modules.parameters()))
            super().__init__(model, args, processes, plan, keep_initial)
            self.rows = plan.batch  # of a pass
            rate = matmul_rate(processes.device, processes.dtype)
            phases.say("matmul", tflops=rate / 1e12)

    class Unsaved(Checkpoints):
        """Writes no weights."""

        def resume(self, policy, own=None):
            floor(policy, policy.rows, phases)
            return super().resume(policy, own)

        def _check_disk(self, start):
            pass

        def save(self):
            pass

        def export(self):
            return "nothing was written"

    return {"Clock": WatchedClock, "Policy": WatchedPolicy, "Checkpoints": Unsaved}


def measured(args, phases, folder):
    """Run grpo_base.main; return its settings, and what it logged of the last step."""
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    run_args = defaults(
        grpo_base.Args,
        args.model,
        prompts=f"{folder}/prompts.txt",
        eval_prompts="",
        reward=("jpeg",),
        output=f"{folder}/run",
        tracker="none",
        save_every=0,
        steps=args.steps,
        prompts_per_step=1,
        group_size=args.rows,
        best_of=0,
        minibatches=1,
        sampling_steps=args.sampling_steps,
        micro_batch=args.micro_batch,
        lora_rank=args.lora_rank,
        compile=args.compile,
    )
    loading = {}
    if not args.model.startswith("tiny"):
        loading = {"load": build, "outline": outline, "family_of": family_of}
    with replaced(models, **loading), replaced(grpo_base, **watched(phases, args.steps)):
        log = grpo_base.main(run_args)
    return run_args, next(row for row in log.rows if row["step"] == args.steps - 1)


def summary(args, run_args, row, phases):
    """Return the numbers of the last step, {column: cell}."""
    one, rate = phases.found["floor"], phases.found["matmul"]["tflops"]
    passes, T = -(-args.rows // one["rows"]), args.sampling_steps
    trained = max(1, round(run_args.timestep_fraction * (T - 1)))
    bare_seconds = passes * (T * one["forward_s"] + trained * one["forward_backward_s"])
    tflop = passes * (T * one["forward_tflop"] + trained * one["forward_backward_tflop"])
    seconds = {part: row[f"{part}_seconds"] for part in ("rollout", "reward", "update")}
    passing = seconds["rollout"] + seconds["update"]
    peaks = [phases.found[part].get("peak_gib", "-") for part in ("rollout", "reward", "update")]
    model = f"{args.model}, {f'LoRA {args.lora_rank}' if args.lora_rank else 'all weights'}"
    if args.compile:
        model += ", compiled"
    return {
        "model": f"{model}, {args.rows} rows, T = {T}, {trained} trained",
        "rollout, reward, update s": ", ".join(f"{value:.2f}" for value in seconds.values()),
        "over the floor": f"{sum(seconds.values()) / bare_seconds:.3f}",
        "tokens/s": f"{args.rows * one['tokens'] * (T + trained) / passing:.0f}",
        "TFLOP of a forward": f"{one['forward_tflop'] / one['rows']:.3f}",
        "matmul TFLOP/s": f"{rate:.1f}",
        "of it, forward and step": f"{one['forward_mfu']:.2f}, {tflop / passing / rate:.2f}",
        "peak GiB, rollout, reward, update": ", ".join(map(str, peaks)),
        "ratio error": f"{row['ratio_error']:.1e}",
    }


def wheels():
    """Return the packages of requirements.txt and all that they need here, NAME==VERSION."""
    from packaging.requirements import Requirement

    found = {}
    queue = [
        Requirement(line)
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    ]
    while queue:
        need = queue.pop()
        name = re.sub("[-_.]+", "-", need.name.lower())
        try:
            about = importlib.metadata.distribution(need.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another machine
        if name not in found:
            found[name] = f"{name}=={about.version}"
            further = map(Requirement, about.requires or ())
            extras = [{"extra": extra} for extra in (*need.extras, "")]
            queue += [
                r
                for r in further
                if r.marker is None or any(r.marker.evaluate(extra) for extra in extras)
            ]
    return sorted(found.values())


def main(args):
    if args.wheels:
        print(*wheels(), sep="\n")
        return
    phases = Phases()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_args, row = measured(args, phases, Path(folder))
        except RunError as error:  # a ratio that is off is a result
            phases.say("stopped", why=str(error))
            return
    cells = summary(args, run_args, row, phases)
    phases.say("total", **cells)
    lines = [f"| {' | '.join(line)} |" for line in (cells, ["---"] * len(cells), cells.values())]
    if args.write:
        words = f"--model {args.model}"
        if args.compile:
            words += " --compile"
        if not args.lora_rank:
            words += " --lora-rank 0"
        write(f"Full-size steps (`python -m benchmarks.full_size {words}`)", lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
