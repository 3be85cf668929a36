"""Accelerate, trainable weights, rows of processes, checkpoints, resume, export: what no method changes."""

import contextlib
import copy
import dataclasses
import gc
import math
import os
import re
import shlex
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch.nn.functional import pad

from common import checkpoints, compiling, errors, export, loading, preflight, run_folder, sharding
from common.errors import InputError, RunError

# Of the forward pass, and of all weights that are not trained: Accelerate's word for it, and the dtype.
PRECISION = {"cuda": ("bf16", torch.bfloat16), "cpu": ("no", torch.float32)}
# Largest |rho - 1| before the first update that can be rounding: float32, and bf16 autocast.
RATIO_LIMIT = {"no": 1e-4, "bf16": 0.05}


AUTO_STEPS, AUTO_SECONDS = 20, 1800.0  # between checkpoints, whichever comes first
LOST = 255  # in the place of a signal's number: a process cannot go on


class Processes:
    """One process of a launch and the others: what training and evaluate.py share."""

    def __init__(self, args):
        if "PYTORCH_ALLOC_CONF" not in os.environ:  # samples, passes and encoders of many sizes leave gaps otherwise
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        self.args, on_gpu = args, torch.cuda.is_available()
        gc.collect()  # what an earlier run of this program held (--calibrate), before memory is counted
        if on_gpu:
            torch.cuda.empty_cache()
        self.precision, self.dtype = PRECISION["cuda" if on_gpu else "cpu"]
        state = processes(args)
        self.device, self.is_main, self.world = state.device, state.is_main_process, state.num_processes
        self.index = state.process_index
        self.sharding = sharding.take_plugin()

    @property
    def score_batch(self):
        """Rows decoded and scored together: micro-batches until they make up a batch of the rewards."""
        return self.args.micro_batch * max(1, self.args.reward_batch // self.args.micro_batch)

    def adapt(self, module, targets, rank):
        """Adds a LoRA with float32 weights."""
        from peft import LoraConfig

        torch.manual_seed(self.args.seed)  # the same one on every process
        try:
            module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        except (ValueError, re.error) as error:  # no layer of that name, or no regular expression
            raise InputError(f"--lora-targets {targets!r}: {error}") from None
        for weight in _trained(module):
            weight.data = weight.data.float()
        for part in module.modules() if self.precision != "no" else ():
            if hasattr(part, "cast_input_dtype_enabled"):
                part.cast_input_dtype_enabled = False  # to float32, and autocast would cast it back

    def settle(self, model):
        """Moves what is not trained to the device; with --offload-encoders text and image encoders wait on the CPU."""
        for name, module in model.pipe.components.items():
            if isinstance(module, torch.nn.Module) and name not in model.trainable:
                waits = self.args.offload_encoders and name in model.encoders
                module.requires_grad_(False).eval().to("cpu" if waits else self.device)

    def place(self, model):
        """Moves all of the model to the device, to sample and not to train."""
        accelerator = Accelerator(mixed_precision=self.precision, cpu=self.device.type == "cpu")
        self.settle(model)
        for name, module in model.trainable.items():
            module.requires_grad_(False).eval().to(self.device)
            model.trainable[name] = accelerator.prepare_model(module, evaluation_mode=True)

    def together(self, thing):
        """All processes together: the list of what each of them has."""
        return gather_object([thing]) if self.world > 1 else [thing]

    def first(self, reason):
        """All processes together: the first reason that one of them has, "" if none has any."""
        return next(filter(None, self.together(reason)), "")

    @staticmethod
    def print(*words):
        """On the main process."""
        if PartialState().is_main_process:
            print(*words, flush=True)


class Runtime(Processes):
    """One process of a run. The B rows of a step are dealt out in contiguous chunks; a group may span processes."""

    def __init__(self, args, scorers=None):
        super().__init__(args)
        self.scorers, on_gpu = list((scorers or {}).values()), self.device.type == "cuda"
        self.shards = sharding.on_a_machine(self.world)  # processes that share one copy of sharded weights
        if args.exchange_often and not self.sharding:
            raise InputError(
                "--exchange-often belongs to sharded weights (configs/fsdp2.yaml); --no-exchange-often goes on with a "
                "run that was sharded"
            )
        rows = args.prompts_per_step * args.group_size
        if rows % self.world:
            raise InputError(
                f"--prompts-per-step {args.prompts_per_step} x --group-size {args.group_size} = {rows} samples "
                f"cannot be dealt evenly to {self.world} processes"
            )
        self.output, _ = self.find(args)
        if args.compile:
            compiling.check(self.device)
        self.name = ""  # what checkpoints call the run, on the main process
        self.accelerator = Accelerator(
            mixed_precision=self.precision,
            cpu=not on_gpu,
            log_with=None if args.tracker == "none" else args.tracker,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # they are constants
            project_dir=self.output,
        )
        self.batch = batch_size(args, rows // self.world)  # rows of a forward pass
        self.frozen = {}
        self.activations = 0  # bytes of a pass, where they were counted
        self.turns = False  # whether the processes of a machine load one after another
        self.asked = dataclasses.replace(args)  # what config.json says: each machine chooses the rest by its own memory
        preflight.settle(self, self.scorers)
        self.mesh = sharding.mesh_of(self.device, self.world, self.shards) if self.sharding else None
        self.step = self.saved = 0  # finished steps, and those that a checkpoint holds
        self.moved = False  # whether the step that is not finished has changed the weights
        self.kept = {}  # the method's own states after the last finished step
        self.signal = 0  # the number of the one that asked this process to stop
        self.sampling = False  # whether all processes are between two questions for signals
        self.last_saved = time.monotonic()
        self.blame, self.cure = lambda: "lower --learning-rate", None  # what to say of a gradient that is no number
        self.changes = run_folder.check(self.output, self.asked)
        self.checkpoint = run_folder.find_checkpoint(self) if args.resume else None  # (folder, step, states)
        self.turn = loading.Turn() if self.turns else None  # until `prepare` has moved the model

    @staticmethod
    def find(args):
        """The folder of a run, the same on every process, and the settings that it was started with, {} before that."""
        is_main = processes(args).is_main_process
        chosen = run_folder.choose(args) if is_main or args.resume else None  # what is wrong with --resume, all say
        folder = Path(broadcast_object_list([chosen])[0])
        return folder, run_folder.before(folder, args)

    # --- Rows ---

    def rows(self, number):
        """Global indices of this process's rows out of `number`: [number / world], contiguous."""
        share = number // self.world
        return torch.arange(share) + share * self.index

    def gather(self, local):
        """[b, ...] of each process -> [B, ...] on all of them, in global row order."""
        return self.accelerator.gather(local)

    def local(self, value):
        """[P, G] -> this process's rows [b]."""
        return value.flatten()[self.rows(value.numel()).to(value.device)]

    def batches(self, number):
        """Indices of `number` rows, by `batch`; -1, the last row once more, fills up the last of them. Who samples by
        them has changed nothing yet: between them a run can be stopped, and after them, without a loss."""
        for rows in pad(torch.arange(number), (0, -number % self.batch), value=-1).split(self.batch):
            self.check_signals()
            self.sampling = True
            yield rows
            self.sampling = False
        self.check_signals()

    def micro_batches(self, kept):
        """kept [P, G] bool, the same on every process -> local indices of this process's kept rows, by `batch`, and -1,
        the last row, as a filler, whose weight the script sets to 0.

        All have one shape: of another one the kernels round otherwise than the rollout's did. And every process gets
        equally many (sharded and data-parallel modules hang otherwise).
        """
        chunks = kept.flatten().cpu().view(self.world, -1)
        number = max(math.ceil(chunk.sum().item() / self.batch) for chunk in chunks)
        mine = chunks[self.index].nonzero().flatten()
        # each another tensor: the script asks which of them is the last
        return list(pad(mine, (0, number * self.batch - len(mine)), value=-1).split(self.batch)) if number else []

    # --- Weights ---

    def keep_initial(self, model):
        """Before `prepare`: makes `initial_weights` work. Full weights get a frozen copy then; a LoRA needs none."""
        if not self.args.lora_rank:
            self.frozen = dict.fromkeys(model.trainable)

    def prepare(self, model):
        """Moves the model to the device, makes its weights or a LoRA trainable in float32, returns the optimizer.

        model.trainable then holds the prepared modules.
        """
        args = self.args
        for module in model.trainable.values():
            module.requires_grad_(False).eval()
            if args.gradient_checkpointing or (self.sharding and self.sharding.activation_checkpointing):
                module.enable_gradient_checkpointing()
            if args.attention != "native":
                compiling.set_attention(module, args.attention)
            if args.lora_rank:
                self.adapt(module, args.lora_targets or model.lora_targets, args.lora_rank)
        preflight.check(self, model)
        if self.is_main:
            self.name, moved = run_folder.claim(self.output, self.asked, self.checkpoint and self.checkpoint[:2])
            if moved:
                self.print(moved)
        self.settle(model)
        for name, module in model.trainable.items():
            if not self.sharding:
                module.to(self.device)  # where there is room for the copy
            if name in self.frozen:
                self.frozen[name] = self._place(copy.deepcopy(module), model)
            self._place(module, model)
            if not args.lora_rank:
                module.float().requires_grad_(True)
        if self.turn:
            self.turn.end()
        self.accelerator.wait_for_everyone()
        for name, module in model.trainable.items():
            model.trainable[name] = self.accelerator.prepare_model(module, evaluation_mode=bool(self.sharding))
        self.model = model
        # for good: between two passes a sharded module may show others
        self.trained = weights = _trained(torch.nn.ModuleList(model.trainable.values()))
        optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.average = _average(weights, args.ema) if args.ema else None
        self.print(
            f"{args.model}: training {sum(w.numel() for w in weights) / 1e6:.2f}M weights"
            f"{' (LoRA)' * bool(args.lora_rank)} on {self.world} x {self.device.type}"
            f"{', sharded' * bool(self.sharding)}"
            f"{f' by {self.shards}' * (bool(self.sharding) and self.shards < self.world)}, "
            f"{args.prompts_per_step} x {args.group_size} samples a step, into {self.output}"
        )
        return self.optimizer

    def _place(self, module, model):
        """Moves a module to the device, or shards it there; with --compile its blocks are compiled."""
        if self.args.compile:
            compiling.compile_blocks(module, model.blocks, self.batch)
        if self.sharding:
            return sharding.shard(module, model.blocks, self.sharding, self.mesh, self.dtype)
        return module.to(self.device)

    def weights(self):
        """The trained weights, a list of tensors."""
        return self.trained

    @contextlib.contextmanager
    def plain_modules(self):
        """Inside, model.velocity can be differentiated otherwise than by `backward`: processes exchange nothing."""
        if self.sharding:
            raise InputError("sharded weights can be differentiated by the update only; take configs/ddp.yaml")
        if self.args.attention != "native":
            raise InputError(f"--attention {self.args.attention} cannot be differentiated twice; leave it out")
        trained = self.model.trainable
        self.model.trainable = {name: self.accelerator.unwrap_model(module) for name, module in trained.items()}
        try:
            with compiling.off():
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

        Data parallelism decides in the forward pass, so `no_sync` around a backward pass alone does nothing. Sharded
        weights need whole gradients until then; --exchange-often saves that memory.
        """
        for module in self.model.trainable.values():
            if self.sharding:
                module.set_requires_gradient_sync(now or self.args.exchange_often)
                module.set_requires_all_reduce(now)  # with the other machines
            elif isinstance(module, torch.nn.parallel.DistributedDataParallel):
                module.require_backward_grad_sync = now

    def backward(self, loss):
        """Adds the gradients of this process's share of the loss."""
        self.accelerator.backward(loss * self.world)  # data parallelism averages, the loss is a sum

    def update(self):
        """Clips the gradients, steps the optimizer, and returns the norm before clipping."""
        weights = self.weights()
        norm = sharding.whole(self.accelerator.clip_grad_norm_(weights, self.args.max_grad_norm))
        if not torch.isfinite(norm):
            self.cure = (
                ("--learning-rate", self.args.learning_rate / 10) if self.moved else ("--seed", self.args.seed + 1)
            )
            raise RunError(f"the gradient norm of step {self.step} is {norm.item()}; {self.blame()}")
        self.moved = True
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.step(weights)
        return norm

    def summarise(self, diagnostics):
        """loss.diagnostics, a list of each update's micro-batches -> one number each, over all rows, processes and
        updates; and of each update N after the first, whose ratio has moved, clip_fraction_N and approx_kl_N."""
        names = ("ratio_error", "clip_fraction", "approx_kl", "loss", "rows")
        later = {name: n for n in range(2, len(diagnostics) + 1) for name in (f"clip_fraction_{n}", f"approx_kl_{n}")}
        if not any(diagnostics):
            return dict.fromkeys([*names[:4], *later], 0.0)
        number = [len(update) for update in diagnostics]
        local = torch.stack([torch.stack([part[name] for name in names]) for update in diagnostics for part in update])
        sums = torch.stack([part.sum(0) for part in (local, *local.split(number))])  # [1 + updates, names]
        total = self.gather(sums[None]).sum(0)
        worst = self.gather(local[:, :1].amax(0)).max()
        clipped, kl = total[:, 1:3].div(total[:, 4:].clamp(min=1)).T.tolist()  # of no rows: 0
        return {
            "ratio_error": worst.item(),
            "clip_fraction": clipped[0],
            "approx_kl": kl[0],
            "loss": (total[0, 3] / len(diagnostics)).item(),
            **{name: (clipped if name.startswith("clip") else kl)[n] for name, n in later.items()},
        }

    def check_ratio(self, error):
        """Stops a run whose first ratio is not 1: its policy gradient would be that of another policy, and what is
        beyond the clip range would be clipped on one side: an error of the ratio that the sign of A chooses."""
        limit = min(RATIO_LIMIT[self.precision], self.args.clip_range)
        if not error <= limit:
            raise RunError(
                f"the ratio is off by {error:.1e} before the first update (limit {limit:.0e}"
                f"{', the clip range' * (limit == self.args.clip_range)}): rollout and update see different weights, "
                "dtypes, guidance, conditioning or kernels"
            )

    # --- Checkpoints ---

    def save(self, step, stateful):
        """checkpoints/step_NNNNNN with all of `stateful`: {name: module, or other object with state_dict and
        load_state_dict, or dictionary}."""
        if self._any(not self._finite()):
            raise errors.Diverged(f"the weights after step {step} are no numbers: lower --learning-rate")
        states = {name: self._state(thing) for name, thing in stateful.items()}
        shares = {name: sharding.local(state) for name, state in states.items() if sharding.has_shards(state)}
        others = {name: state for name, state in states.items() if name not in shares}
        parts = {name: self.shards * (name in shares) for name in sorted(states)}
        self._together(self.is_main, checkpoints.begin, self.output, step)
        self._together(self.is_main, checkpoints.put, self.output, step, others)
        here, part = sharding.writes(self.mesh) if shares else (False, None)
        self._together(here, checkpoints.put, self.output, step, shares, part)
        keep = self.args.keep_checkpoints
        self._together(self.is_main, checkpoints.publish, self.output, step, parts, self.name, keep)
        every, self.saved, self.last_saved = step - self.saved, step, time.monotonic()
        if self.is_main and self.args.save_every == "auto" and every < AUTO_STEPS:
            preflight.warn_of_disk(self, step, every)
        errors.last_checkpoint = str(self.output / "checkpoints" / checkpoints.name_of(step))

    def due(self, step):
        """All processes together: whether a checkpoint of this many steps is due. By --save-every auto, where a step
        takes long, more often: of half an hour no more than that is lost."""
        every = self.args.save_every
        if step == self.args.steps or every != "auto":
            return step == self.args.steps or bool(every) and step % every == 0
        return self._any(step % AUTO_STEPS == 0 or time.monotonic() - self.last_saved > AUTO_SECONDS)

    def _together(self, here, action, output, step, *arguments):
        """A part of saving, on the processes that are `here`: where it fails on one, all of them stop."""
        reason = ""
        try:
            if here:
                action(output, step, *arguments)
        except (OSError, RuntimeError) as error:
            reason = f"{error}"
        if reason := self.first(reason):
            checkpoints.discard(output, step)
            raise RunError(
                f"cannot save step {step} in {output}/checkpoints ({reason}); is the disk full? "
                "Earlier checkpoints are intact"
            )

    def finish(self, step):
        """Counts a step as finished: from now on `rescue` saves it."""
        self.step, self.moved = step, False
        self.kept = {name: copy.deepcopy(state) for name, state in self.stateful.items() if isinstance(state, dict)}

    def check_signals(self):
        """Between steps, and between samples: if a process got a signal, saves on all of them and raises Stopped."""
        caught = torch.tensor([self.signal], device=self.device)
        number = int(self.gather(caught).max()) if self.world > 1 else self.signal
        if number == LOST:
            raise RunError(
                "another process of this run cannot go on; what it said stands above or in its machine's log"
            )
        if number:
            self.rescue()
            raise errors.Stopped(number, f"{signal.Signals(number).name}: stopped after {self.step} steps")

    def alarm(self):
        """Tells the other processes that this one cannot go on, where they will ask: while all are sampling, unless
        they wait for its share of the weights first. Returns whether they heard it: then all of them rescue. Else says
        what is lost."""
        heard, lost = self.sampling and not self.sharding, self.step - self.saved
        if not heard and lost > 0:
            print(
                f"the last {lost} steps are lost, as the other processes wait for this one and cannot save them; a "
                "smaller --save-every loses less",
                flush=True,
            )
        if heard and self.world > 1:
            self.gather(torch.tensor([LOST], device=self.device))
        return heard

    def rescue(self, error=None):
        """Saves the finished steps, also in the middle of another that has not changed the weights yet, unless a
        checkpoint holds them or they are no good; and says how to go on after this error."""
        errors.rescues.clear()  # once: a disk that is full stays full
        diverged = self._any(isinstance(error, errors.Diverged) or not self._finite())
        if self.step > self.saved and not self.moved and not diverged:
            self.save(self.step, {**self.stateful, **self.kept})
        if diverged:
            self.cure = ("--learning-rate", self.args.learning_rate / 10)
        if self.saved and not diverged:
            output = shlex.quote(str(self.output))
            self.print(f"{self.saved} steps are saved; go on with --output {output} --resume latest")
        if self.saved and self.cure:
            self.print(f"to get past this, in a new run: {run_folder.new_run(self.output, self.saved, *self.cure)}")

    def _finite(self):
        return all(weight.isfinite().all() for weight in map(sharding.mine, self.trained))

    def _any(self, here):
        """All processes together: whether it is so on one of them."""
        return bool(self.gather(torch.tensor([here], device=self.device)).any())

    def resume(self, stateful):
        """Loads the checkpoint of --resume into `stateful` and returns its step; 0 without one."""
        if self.average:
            stateful["ema"] = self.average
        self.stateful = stateful
        errors.rescues[:], errors.alarms[:], errors.last_checkpoint = [self.rescue], [self.alarm], ""
        if self.checkpoint is None:
            return 0
        folder, step, states = self.checkpoint
        self.checkpoint = None  # gigabytes
        for names, verb in ((set(stateful) - set(states), "lacks"), (set(states) - set(stateful), "also has")):
            if names:
                raise InputError(
                    f"--resume: {folder} {verb} {', '.join(sorted(names))}: it is another script's checkpoint"
                )
        for name, thing in stateful.items():
            try:
                self._load_state(thing, states[name])
            except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise InputError(f"--resume: {folder}/{name}.pt does not fit: {reason}") from None
        for group in self.optimizer.param_groups:  # the state has those that it was saved with
            group.update(lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        self.print(f"resuming {self.output} at step {step}{f', from here on with {self.changes}' * bool(self.changes)}")
        self.saved = self.step = step
        errors.last_checkpoint = str(folder)
        return step

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
            if {name: type(value) for name, value in thing.items()} != {n: type(value) for n, value in state.items()}:
                raise ValueError(f"it is {state}")
            return thing.update(state)
        if not isinstance(thing, torch.nn.Module):
            sharded = thing is self.optimizer or thing is self.average
            thing.load_state_dict(sharding.deal(state, self.mesh if sharded else None))
            if thing is self.optimizer and not all(map(_belong, thing.state, thing.state.values())):
                raise ValueError("its moments are those of other weights")
            return None
        expected = self._state(thing)
        if expected.keys() != state.keys():
            raise ValueError(f"it has {len(state)} weights, {len(expected)} are trained here")
        self.accelerator.unwrap_model(thing).load_state_dict(sharding.deal(state, self.mesh), strict=False)

    def export(self):
        """export/: the LoRA, or the whole trained pipeline, for plain diffusers; returns the line that loads it. With
        --ema the averaged weights go to export_ema/, and stay in the model: a run ends with this."""
        folder = self.output / "export"
        line = export.write(self, folder)
        if self.average:
            self.average.copy_to(self.weights())
            line += f"; the averaged one: {export.write(self, folder.with_name('export_ema'))}"
        return line


def processes(args):
    """The processes of this launch, which wait for one another as long as --process-timeout says."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=args.process_timeout))


def batch_size(args, share):
    """Rows of every forward pass of a process that has a `share` of the samples, at most --micro-batch: by them the
    rollout comes out even, or a minibatch of what is trained on, whichever takes fewer fillers."""
    rows = math.ceil(share / args.group_size * math.ceil((args.best_of or args.group_size) / args.minibatches))
    sizes = [math.ceil(number / math.ceil(number / args.micro_batch)) for number in (share, rows)]

    def cost(size):  # a backward pass takes as long as two forward passes
        return math.ceil(share / size) * size + 3 * args.minibatches * math.ceil(rows / size) * size

    return min(sizes, key=cost)


def _average(weights, decay):
    from diffusers.training_utils import EMAModel

    return EMAModel(weights, decay=decay)


def _belong(weight, moments):
    """Whether AdamW's moments are this weight's: torch asks only when it uses them."""
    return all(getattr(moments.get(name), "shape", None) == weight.shape for name in ("exp_avg", "exp_avg_sq"))


def _trained(module):
    return [weight for weight in module.parameters() if weight.requires_grad]
