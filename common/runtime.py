"""Accelerate, trainable weights, rows of processes, checkpoints, resume, export: what no method changes."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, get_peft_model_state_dict

from common import errors
from common.errors import InputError, RunError

# Settings that may change when a run goes on; any other difference makes it another run.
FREE = ("output", "resume", "steps", "save_every", "sample_every", "eval_every", "tracker", "watch", "reward_batch")
FREE += ("judge_url", "judge_timeout", "judge_retries", "judge_concurrency")

# Largest |rho - 1| before the first update that is still rounding: float32, and bf16 autocast.
RATIO_LIMIT = {"no": 1e-4, "bf16": 0.05}


class Runtime:
    """One process of a run. The B rows of a step are dealt out in contiguous chunks; a group may span processes."""

    def __init__(self, args):
        self.args = args
        on_gpu = torch.cuda.is_available()
        self.precision = "bf16" if on_gpu else "no"
        self.dtype = (
            torch.bfloat16 if on_gpu else torch.float32
        )  # of the forward pass, and of all weights that are not trained
        state = PartialState(cpu=not on_gpu)
        self.device, self.is_main, self.world = state.device, state.is_main_process, state.num_processes
        rows = args.prompts_per_step * args.group_size
        if rows % self.world:
            raise InputError(
                f"--prompts-per-step {args.prompts_per_step} x --group-size {args.group_size} = {rows} samples "
                f"cannot be dealt evenly to {self.world} processes"
            )
        self.output = Path(broadcast_object_list([_output_folder(args) if self.is_main else None])[0])
        self.accelerator = Accelerator(
            mixed_precision=self.precision,
            cpu=not on_gpu,
            log_with=None if args.tracker == "none" else args.tracker,
            project_dir=self.output,
        )
        self.frozen = {}
        self.step = self.saved = 0  # finished steps, and those that a checkpoint holds
        self._check_output()
        self.checkpoint = self._find_checkpoint()

    # --- Rows ---

    def rows(self, number):
        """Global indices of this process's rows out of `number`: [number / world], contiguous."""
        share = number // self.world
        return torch.arange(share) + share * self.accelerator.process_index

    def gather(self, local):
        """[b, ...] of each process -> [B, ...] on all of them, in global row order."""
        return self.accelerator.gather(local)

    def local(self, value):
        """[P, G] -> this process's rows [b]."""
        return value.flatten()[self.rows(value.numel()).to(value.device)]

    def micro_batches(self, kept, size):
        """kept [P, G] bool, the same on every process -> local indices of this process's kept rows, by `size`.

        Every process gets equally many micro-batches (sharded and data-parallel modules hang otherwise): one with
        fewer kept rows runs a row that is not kept, whose weight the script sets to 0.
        """
        chunks = kept.flatten().cpu().view(self.world, -1)
        number = max(math.ceil(chunk.sum().item() / size) for chunk in chunks)
        mine = chunks[self.accelerator.process_index]
        batches = list(mine.nonzero().flatten().split(size)) if mine.any() else []
        return batches + [(~mine).nonzero().flatten()[:1]] * (number - len(batches))

    # --- Weights ---

    def keep_initial(self, model):
        """Before `prepare`: makes `initial_weights` work. Full weights get a frozen copy; a LoRA needs none."""
        if not self.args.lora_rank and not self.frozen:  # one copy, whoever asks for it
            self.frozen = copy.deepcopy(model.trainable)
            for module in self.frozen.values():
                module.requires_grad_(False).eval().to(self.device, self.dtype)

    def prepare(self, model):
        """Moves the model to the device, makes its weights or a LoRA trainable in float32, returns the optimizer.

        model.trainable then holds the prepared modules.
        """
        args = self.args
        for name, module in model.pipe.components.items():
            if isinstance(module, torch.nn.Module):
                waits = args.offload_encoders and name in model.encoders
                module.requires_grad_(False).eval().to("cpu" if waits else self.device)
        for module in model.trainable.values():
            if args.gradient_checkpointing:
                module.enable_gradient_checkpointing()
            if args.lora_rank:
                torch.manual_seed(args.seed)  # the same adapter on every process
                targets = args.lora_targets or model.lora_targets
                try:
                    module.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=targets))
                except (ValueError, re.error) as error:  # no layer of that name, or no regular expression
                    raise InputError(f"--lora-targets {targets!r}: {error}") from None
                for weight in _trained(module):
                    weight.data = weight.data.float()
            else:
                module.float().requires_grad_(True)
        self._claim_output()
        model.trainable = {name: self.accelerator.prepare(module) for name, module in model.trainable.items()}
        self.model = model
        weights = self.weights()
        optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.print(
            f"{args.model}: training {sum(w.numel() for w in weights) / 1e6:.2f}M weights"
            f"{' (LoRA)' * bool(args.lora_rank)} on {self.world} x {self.device.type}, "
            f"{args.prompts_per_step} x {args.group_size} samples a step, into {self.output}"
        )
        return self.optimizer

    def weights(self):
        """The trained weights, a list of tensors."""
        return _trained(torch.nn.ModuleList(self.model.trainable.values()))

    @contextlib.contextmanager
    def plain_modules(self):
        """Inside, model.velocity can be differentiated otherwise than by `backward`: processes exchange nothing."""
        trained = self.model.trainable
        self.model.trainable = {name: self.accelerator.unwrap_model(module) for name, module in trained.items()}
        try:
            yield
        finally:
            self.model.trainable = trained

    @contextlib.contextmanager
    def initial_weights(self):
        """Inside, model.velocity is that before training: the LoRA is off, or the frozen copy stands in."""
        trained = self.model.trainable
        with torch.no_grad(), self.accelerator.autocast():
            modules = [] if self.frozen else [self.accelerator.unwrap_model(module) for module in trained.values()]
            for module in modules:
                module.disable_adapters()
            self.model.trainable = self.frozen or trained
            try:
                yield
            finally:
                self.model.trainable = trained
                for module in modules:
                    module.enable_adapters()

    def exchange_gradients(self, now):
        """Whether processes exchange gradients in the next forward and backward pass; until then each adds up its own.

        Data parallelism decides in the forward pass, so `no_sync` around a backward pass alone does nothing.
        """
        for module in self.model.trainable.values():
            if isinstance(module, torch.nn.parallel.DistributedDataParallel):
                module.require_backward_grad_sync = now

    def backward(self, loss):
        """Adds the gradients of this process's share of the loss."""
        self.accelerator.backward(loss * self.world)  # data parallelism averages, the loss is a sum

    def update(self):
        """Clips the gradients, steps the optimizer, and returns the norm before clipping."""
        weights = self.weights()
        norm = self.accelerator.clip_grad_norm_(weights, self.args.max_grad_norm)
        if not torch.isfinite(norm):
            raise RunError(
                f"the gradient norm is {norm.item()}: lower --learning-rate and go on from {self.output}/checkpoints"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def summarise(self, diagnostics, updates):
        """The micro-batches' loss.diagnostics -> one number each, over all rows, processes and updates."""
        names = ("ratio_error", "clip_fraction", "approx_kl", "loss", "rows")
        if not diagnostics:
            return dict.fromkeys(names[:4], 0.0)
        local = torch.stack(
            [torch.stack([part[name] for name in names]) for part in diagnostics]
        )  # [micro-batches, names]
        total = self.gather(local.sum(0, keepdim=True)).sum(0)
        worst = self.gather(local[:, :1].amax(0)).max()
        rows = total[-1]
        return {
            "ratio_error": worst.item(),
            "clip_fraction": (total[1] / rows).item(),
            "approx_kl": (total[2] / rows).item(),
            "loss": (total[3] / updates).item(),
        }

    def check_ratio(self, error):
        """Stops a run whose first ratio is not 1: its policy gradient would be that of another policy."""
        if not error <= RATIO_LIMIT[self.precision]:
            raise RunError(
                f"the ratio is off by {error:.1e} before the first update (limit {RATIO_LIMIT[self.precision]:.0e}): "
                "rollout and update see different weights, dtypes, guidance or conditioning"
            )

    # --- Checkpoints ---

    def save(self, step, stateful):
        """checkpoints/step_NNNNNN with all of `stateful`, written beside and renamed.

        stateful: {name: module, or other object with state_dict and load_state_dict, or dictionary}
        """
        if self.is_main:
            final = self.output / "checkpoints" / f"step_{step:06d}"
            beside = final.with_name(f".{final.name}.tmp")
            shutil.rmtree(beside, ignore_errors=True)
            try:
                beside.mkdir(parents=True)
                for name, thing in stateful.items():
                    torch.save(self._state(thing), beside / f"{name}.pt")
                (beside / "checkpoint.json").write_text(json.dumps({"step": step, "names": sorted(stateful)}))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(beside, final)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
                shutil.rmtree(beside, ignore_errors=True)
                raise RunError(
                    f"cannot save {final} ({error}); is the disk full? Earlier checkpoints are intact"
                ) from None
        self.saved = step
        self.accelerator.wait_for_everyone()

    def rescue(self):
        """Saves the steps that are finished, if no checkpoint holds them yet."""
        if self.step > self.saved:
            self.save(self.step, self.stateful)
            self.print(f"saved {self.step} steps in {self.output}/checkpoints; go on with --resume latest")

    def _find_checkpoint(self):
        """(folder, what its checkpoint.json says) of --resume; None without one, or before the first save."""
        if not self.args.resume:
            return None
        if self.args.resume == "latest":
            folder = max(self.output.glob("checkpoints/step_*"), default=None)
            if folder is None:
                self.print(f"{self.output} has no checkpoint yet: starting from the beginning")
                return None
        else:
            folder = Path(self.args.resume)
        try:
            about = json.loads((folder / "checkpoint.json").read_text())
        except (OSError, ValueError):
            raise InputError(
                f"--resume: {folder} is no checkpoint; give `latest` or a {self.output}/checkpoints/step_NNNNNN"
            ) from None
        if about["step"] > self.args.steps:
            raise InputError(f"--steps {self.args.steps}: {folder} is already at step {about['step']}")
        return folder, about

    def resume(self, stateful):
        """Loads the checkpoint of --resume into `stateful` and returns its step; 0 without one."""
        self.stateful = stateful
        errors.rescues[:] = [self.rescue]
        if self.checkpoint is None:
            return 0
        folder, about = self.checkpoint
        for names, verb in (
            (set(stateful) - set(about["names"]), "lacks"),
            (set(about["names"]) - set(stateful), "also has"),
        ):
            if names:
                raise InputError(
                    f"--resume: {folder} {verb} {', '.join(sorted(names))}: it is another script's checkpoint"
                )
        for name, thing in stateful.items():
            try:
                self._load_state(thing, torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True))
            except Exception as error:  # whatever a broken file makes torch say
                raise InputError(f"--resume: {folder}/{name}.pt does not load: {str(error).splitlines()[0]}") from None
        self.print(f"resuming {self.output} at step {about['step']}")
        self.saved = self.step = about["step"]
        return self.step

    def _state(self, thing):
        """What is saved of a thing; of a module the weights that are trained and no others: a LoRA's base stays out."""
        if isinstance(thing, dict):
            return thing
        if not isinstance(thing, torch.nn.Module):
            return thing.state_dict()
        module = self.accelerator.unwrap_model(thing)
        frozen = {name for name, weight in module.named_parameters() if not weight.requires_grad}
        return {name: value for name, value in module.state_dict().items() if name not in frozen}

    def _load_state(self, thing, state):
        if isinstance(thing, dict):
            return thing.update(state)
        if not isinstance(thing, torch.nn.Module):
            return thing.load_state_dict(state)
        expected = self._state(thing)
        if expected.keys() != state.keys():
            raise ValueError(f"it has {len(state)} weights, {len(expected)} are trained here")
        self.accelerator.unwrap_model(thing).load_state_dict(state, strict=False)

    def export(self):
        """export/: the LoRA, or the whole trained pipeline, for plain diffusers; returns the line that loads it."""
        folder, pipe = self.output / "export", self.model.pipe
        if self.is_main:
            if self.args.lora_rank:
                layers = {name: get_peft_model_state_dict(getattr(pipe, name)) for name in self.model.trainable}
                self.model.save_lora(folder, layers)
            else:
                for module in (getattr(pipe, name) for name in self.model.trainable):
                    if module.dtype != self.dtype:  # float32 master weights back to the dtype of the forward pass
                        module.to(self.dtype)
                pipe.save_pretrained(folder)
        self.accelerator.wait_for_everyone()
        return (
            f'pipe.load_lora_weights("{folder}")'
            if self.args.lora_rank
            else f'{type(pipe).__name__}.from_pretrained("{folder}")'
        )

    def print(self, *words):
        if self.is_main:
            print(*words, flush=True)

    # --- The output folder ---

    def _check_output(self):
        """An output folder that holds a run needs --resume, and the same settings as before."""
        config = self.output / "config.json"
        if config.exists() and not self.args.resume:
            raise InputError(
                f"--output {self.output} already holds a run: go on with --resume latest, or choose another folder"
            )
        now = self._settings()
        try:
            before = json.loads(config.read_text()) if config.exists() else now
        except (OSError, ValueError):
            raise InputError(f"--output {self.output}: its config.json cannot be read; choose another folder") from None
        for name in sorted({*before, *now} - set(FREE)):
            if before.get(name) != now.get(name):
                raise InputError(
                    f"--resume: {self.output} was started with {name} {before.get(name)!r}, now it is {now.get(name)!r}"
                )

    def _claim_output(self):
        """Writes config.json: from here on the folder is this run's."""
        if self.is_main:
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                write_text(self.output / "config.json", json.dumps(self._settings(), indent=2) + "\n")
            except OSError as error:
                raise InputError(f"--output {self.output}: cannot write there ({error.strerror})") from None
        self.accelerator.wait_for_everyone()

    def _settings(self):
        return {"script": _script(), **json.loads(json.dumps(dataclasses.asdict(self.args)))}


def write_text(path, text):
    """Writes beside and renames: a killed process leaves the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


def _trained(module):
    return [weight for weight in module.parameters() if weight.requires_grad]


def _script():
    return Path(sys.argv[0]).stem


def _output_folder(args):
    """--output, or runs/SCRIPT-MODEL-N: the next free N, and with --resume the newest that exists."""
    if args.output:
        return args.output
    name = f"{_script()}-{Path(args.model).name}"
    taken = [
        int(path.name.rpartition("-")[2])
        for path in Path("runs").glob(f"{name}-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    if args.resume and not taken:
        raise InputError(f"--resume: there is no runs/{name}-N; name the run with --output")
    return f"runs/{name}-{max(taken, default=0) + (not args.resume)}"
