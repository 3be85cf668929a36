"""Print how each named model would run on 1 and 8 GPUs of several sizes, without a GPU.

    python -m benchmarks.plans                       # the whole table takes an hour on two cores
    python -m benchmarks.plans --model flux --gib 24 80 --measure

common/memory/ chooses, as it does before a run. For each plan for one GPU, --measure runs a rollout
pass, a decode and two passes of the update on tensors without contents. It adds up what they
allocate; the peak must not exceed the count."""

import contextlib
from dataclasses import dataclass

import torch
import tyro

import grpo_base
from benchmarks import memory
from benchmarks.results import write
from common import loss, models, sde
from common.args import defaults, score_batch
from common.memory import activations, bytes
from common.memory.bytes import Launch
from common.memory.ways import Counter, Way, plan
from common.models.family import Family


@dataclass
class Args:
    model: tuple[str, ...] = tuple(memory.COMPONENTS)
    """Named models, as --list-models of the scripts prints them. Default: all large ones."""
    gpus: tuple[int, ...] = (1, 8)
    """Numbers of GPUs of one machine."""
    gib: tuple[float, ...] = (24, 48, 80, 141)
    """Memory of a GPU in GB, as it is sold. A part of it is not free: 80 GB have 79 GiB."""
    trained: tuple[str, ...] = ("LoRA", "all")
    """What is trained: LoRA, all, or both."""
    measure: bool = False
    """Measure the plans for one GPU, allocation by allocation."""
    write: bool = False
    """Write the table into benchmarks/RESULTS.md."""


def free(gb):
    """Return the bytes that are free on a GPU sold as so many GB: 80 have 79 GiB."""
    return {24: 23.5, 48: 47.4, 80: 79.0, 141: 140.0}.get(gb, gb) * 2**30


def cell(name, found, counter):
    """Return what a plan chose, in a few words; "-" if nothing fits."""
    if found is None:
        return "-"
    asked = defaults(grpo_base.Args, name)
    words = [f"{found.batch} row" if found.batch == 1 else f"{found.batch} rows"]
    if found.args.offload_encoders:
        words.append("encoders wait")
    if found.args.gradient_checkpointing != asked.gradient_checkpointing:
        words.append("checkpointing")
    if found.sharded:
        words.append(f"sharded by {found.shards}")
    if found.args.exchange_often:
        words.append("exchange often")
    if found.host_latents:
        words.append("latents on the host")
    return f"{', '.join(words)}: {counted(found, counter) / 2**30:.1f}"


def counted(found, counter):
    """Return the bytes that a plan counts."""
    return counter.total(Way(found.args, found.shards), found.batch)


# --- Measuring ---


def measured(model: Family, args, found, dtype=torch.bfloat16):
    """Return the largest number of bytes that a step on one GPU allocates, {part: bytes}.

    found: the plan. Everything is allocated here: weights, moments of the optimizer, samples.
    """
    encoders = 0
    if not found.args.offload_encoders:
        for name, module in bytes.modules(model):
            encoders += bytes.number(module) if name in model.encoders else 0
    with activations.without_contents(), activations.Allocations() as allocated:
        held = [torch.empty(encoders, dtype=dtype)]
        with on_fake_cpu(model):
            return _step(model, args, found, allocated, held, dtype)


@contextlib.contextmanager
def on_fake_cpu(model):
    """Replace the weights of trained modules (float32) and of the VAE by empty tensors."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(activations.on_fake_cpu(model.pipe.vae))
        for module in model.trainable.values():
            stack.enter_context(activations.on_fake_cpu(module, trained=torch.float32))
        yield


def _step(model, args, found, allocated, held, dtype):
    for module in model.trainable.values():
        if found.args.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        for weight in module.parameters():
            if weight.requires_grad:
                held += [torch.zeros_like(weight), torch.zeros_like(weight)]
    rows = args.prompts_per_step * args.group_size
    n = found.batch
    levels = 1 if found.host_latents else args.sampling_steps + 2
    held.append(torch.empty(rows, levels, *model.noise_shape))
    cond = {key: value.expand(rows, *value.shape).clone() for key, value in model.blank().items()}
    model.unwanted = {k: v[0] for k, v in cond.items() if k == "encoder_hidden_states"}
    index = torch.arange(n)
    peaks = {"resident": allocated.live}

    def velocity():
        with activations.autocast(dtype):
            return model.velocity(x, 1.0, models.take(cond, index))

    with activations.cuda_rules():
        x = torch.zeros(n, *model.noise_shape)
        with torch.no_grad():
            sde.sde_step(velocity(), x, 0.9, 0.8, 0.3, noise=torch.zeros_like(x))
        peaks["rollout"] = allocated.peak
        scored = min(rows, score_batch(n, args.reward_batch))
        model.decode_batch = found.args.decode_batch
        model.decode(torch.zeros(scored, *model.noise_shape))
        peaks["with decoding"] = allocated.peak
        for _ in range(2):  # the second pass adds to gradients that exist
            _, log_prob, _ = sde.sde_step(velocity(), x, 0.9, 0.8, 0.3, x_next=torch.zeros_like(x))
            ratio = torch.exp(log_prob - log_prob.detach())
            loss.clipped_surrogate(ratio, torch.zeros(n), 1e-4).sum().backward()
        peaks["with the update"] = allocated.peak
    for module in model.trainable.values():
        module.disable_gradient_checkpointing()
        for weight in module.parameters():
            weight.grad = None
    model.unwanted = {}
    return peaks


# --- The table ---


def rows_of_table(args):
    """Yield the cells of each row."""
    for name in args.model:
        decoding = None  # counted once: it does not depend on what is trained
        for trained in args.trained:
            lora = trained == "LoRA"
            model = memory.full_size(name, lora)
            settings = defaults(grpo_base.Args, name, lora_rank=memory.RANK if lora else 0)
            if decoding is None:
                decoding = activations.decoded_bytes(model)
            row_bytes = {}
            for gpus in args.gpus:
                launch = Launch(torch.bfloat16, "cuda", world=gpus, per_machine=gpus)
                counter = Counter(
                    model,
                    launch,
                    keep_initial=settings.kl_coef > 0,
                    row_bytes=row_bytes,
                    decoded_bytes=decoding,
                )
                cells = [f"`{name}`", trained, str(gpus)]
                for gb in args.gib:
                    found = plan(settings, counter, free(gb))
                    words = cell(name, found, counter)
                    if args.measure and found and gpus == 1:
                        peak = max(measured(model, settings, found).values())
                        if peak > counted(found, counter):
                            raise SystemExit(
                                f"{name} {trained} {gb} GB: {words}, but {peak:,} bytes measured"
                            )
                        words += f" (measured {peak / 2**30:.1f})"
                    cells.append(words)
                yield cells


def main(args):
    sizes = [f"{gb:g} GB" for gb in args.gib]
    lines = [["`--model`", "trained", "GPUs", *sizes], ["---"] * (3 + len(sizes))]
    lines = [f"| {' | '.join(line)} |" for line in lines]
    print(*lines, sep="\n")
    for cells in rows_of_table(args):
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.write:
        write("Plans by count: rows of a pass, choices, GiB (`python -m benchmarks.plans`)", lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
