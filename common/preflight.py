"""What can be known before the first rollout: whether the weights fit into memory, and the checkpoints on the disk.

The estimate leaves activations out (benchmarks/memory.py counts them), so what it refuses cannot work.
"""

import math
import os
import shutil

import psutil
import torch

from common.errors import InputError


def memory(model, args, precision, shards=1):
    """Bytes that one of `shards` processes holds from start to end, by kind. precision: bytes of a weight in the
    forward pass. The model's modules are as the Runtime makes them before it moves them: a LoRA is there already."""
    weights = {name: number(module) for name, module in _modules(model)}
    trained = trained_number(model, args)
    master = 4 * trained / shards
    base = precision * (sum(weights[name] for name in model.trainable) - trained * bool(args.lora_rank))
    waiting = model.encoders if args.offload_encoders else ()
    others = sum(number for name, number in weights.items() if name not in (*model.trainable, *waiting))
    unsharded = shards == 1 or not args.exchange_often
    return {
        "trained weights": master,
        "frozen weights": base / shards if args.lora_rank or args.kl_coef else 0.0,
        "gradients": 4 * trained if unsharded else master,
        "optimizer": 2 * master,
        "average": master * bool(args.ema),
        "encoders, VAE": precision * others,
    }


def samples(model, args, world=1):
    """Bytes that one of `world` processes holds of its samples, by kind: the latents of a rollout with all steps, and
    the pixels of a micro-batch."""
    rows = args.prompts_per_step * args.group_size / world
    pixels = 3 * model.height * model.width * getattr(model, "frames", 1)
    return {
        "latents": 4 * rows * (args.sampling_steps + 1) * math.prod(model.noise_shape),
        "pixels": 4 * min(args.micro_batch, rows) * pixels,
    }


def disk(model, args, precision, start=0):
    """(bytes of one checkpoint, how many are there at once, bytes of the export)"""
    trained = trained_number(model, args)
    checkpoint = 4 * trained * (3 + bool(args.ema))
    saves = math.ceil(args.steps / args.save_every) - start // args.save_every if args.save_every else 1
    pipeline = precision * sum(number(module) for _, module in _modules(model))
    export = (1 + bool(args.ema)) * (4 * trained if args.lora_rank else pipeline)
    return checkpoint, min(saves, args.keep_checkpoints + 1) if args.keep_checkpoints else saves, export


def check(run, model):
    """Raises InputError if the memory or the disk cannot be enough."""
    args, precision = run.args, run.dtype.itemsize
    kinds = memory(model, args, precision, run.world if run.sharding else 1) | samples(model, args, run.world)
    need = sum(kinds.values())
    if run.device.type == "cuda":
        have = torch.cuda.mem_get_info(run.device)[0]
    else:  # what is loaded is there already, and all processes share the rest
        loaded = sum(_bytes(module) for _, module in _modules(model))
        have = psutil.virtual_memory().available / run.world + loaded
    if need > have:
        listed = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in kinds.items() if size)
        raise InputError(
            f"--model {args.model}: each process would hold {need / 2**30:.1f} GiB before any activation ({listed}), "
            f"{have / 2**30:.1f} GiB are free; make fewer or smaller samples (--height, --width), train a LoRA "
            "(--lora-rank), add --offload-encoders, or shard over more processes (configs/fsdp2.yaml, --exchange-often)"
        )
    if run.is_main:
        _check_disk(run, *disk(model, args, precision, run.checkpoint[1] if run.checkpoint else 0))


def _check_disk(run, checkpoint, number, export):
    there = next(folder for folder in (run.output, *run.output.absolute().parents) if os.path.exists(folder))
    need, have = checkpoint * number + export, shutil.disk_usage(there).free
    if need > have:
        raise InputError(
            f"--output {run.output}: {number} checkpoints of {checkpoint / 2**30:.2f} GiB and the export's "
            f"{export / 2**30:.2f} GiB do not fit on the disk, which has {have / 2**30:.2f} GiB free; set "
            "--keep-checkpoints, a larger --save-every, or another --output"
        )


def trained_number(model, args):
    """How many weights are trained."""
    if args.lora_rank:
        return sum(w.numel() for module in model.trainable.values() for w in module.parameters() if w.requires_grad)
    return sum(map(number, model.trainable.values()))


def _modules(model):
    return [(name, part) for name, part in model.pipe.components.items() if isinstance(part, torch.nn.Module)]


def number(module):
    return sum(weight.numel() for weight in module.parameters())


def _bytes(module):
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())
