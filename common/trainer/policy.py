"""The weights in training and their update.

keep_initial, prepare              before the first step: what is trained, the optimizer
initial_weights, plain_modules     contexts for other passes than the update's
exchange_gradients, backward       a micro-batch
update                             the optimizer's step, with clipped gradients
check_ratio                        whether rollout and update saw the same weights
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from common.errors import InputError, RunError
from common.memory import preflight
from common.trainer import compiling, placing, sharding
from common.trainer.processes import Processes

if TYPE_CHECKING:  # they load more than torch
    from diffusers.training_utils import EMAModel

    from common.models.family import Family

# Largest |rho - 1| before the first update that can be rounding: float32, and bf16 autocast.
RATIO_LIMIT = {"no": 1e-4, "bf16": 0.05}


class Update(Processes):
    """The part of a Runtime that holds what is trained: `model`, `optimizer`, `trained` (the weights), `average` (of
    --ema)."""

    frozen = {}  # copies of what is trained as it was before, where `initial_weights` needs them
    moved = False  # whether the step that is not finished has changed the weights
    cure = None  # (flag, value): the setting of a new run that may get past what ended this one

    @staticmethod
    def blame() -> str:
        """What to say of a gradient that is no number; the scripts put something better in its
        place."""
        return "lower --learning-rate"

    def keep_initial(self, model: "Family") -> None:
        """Before `prepare`: makes `initial_weights` work. Full weights get a frozen copy then; a
        LoRA needs none."""
        if not self.args.lora_rank:
            self.frozen = dict.fromkeys(model.trainable)

    def prepare(self, model: "Family") -> torch.optim.Optimizer:
        """Moves the model to the device, makes its weights or a LoRA trainable in float32, returns
        the optimizer; model.trainable then holds the prepared modules. Raises InputError for what
        does not fit, before it moves."""
        args = self.args
        for module in model.trainable.values():
            module.requires_grad_(False).eval()
            if args.gradient_checkpointing or (
                self.sharding and self.sharding.activation_checkpointing
            ):
                module.enable_gradient_checkpointing()
            if args.attention != "native":
                compiling.set_attention(module, args.attention)
        if args.lora_rank:
            placing.adapt(self, model, args.lora_targets, args.lora_rank)
        preflight.check(self, model)
        self.claim()
        self._place(model)
        self.model = model
        # for good: between two passes a sharded module may show others
        self.trained = weights = placing.trained(torch.nn.ModuleList(model.trainable.values()))
        optimizer = torch.optim.AdamW(
            weights, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
        )
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

    def _place(self, model: "Family") -> None:
        """Moves the model, where memory is scarce in turn with a machine's other processes, and
        prepares it."""
        placing.settle(self, model)
        for name, module in model.trainable.items():
            if not self.sharding:
                module.to(self.device)  # where there is room for the copy
            if name in self.frozen:
                self.frozen[name] = placing.put(self, copy.deepcopy(module), model)
            placing.put(self, module, model)
            if not self.args.lora_rank:
                for name, weight in module.float().named_parameters():
                    weight.requires_grad_(model.learns(name))
        if self.turn:
            self.turn.end()
        self.accelerator.wait_for_everyone()
        for name, module in model.trainable.items():
            model.trainable[name] = self.accelerator.prepare_model(
                module, evaluation_mode=bool(self.sharding)
            )

    def weights(self) -> list[torch.Tensor]:
        """The trained weights; sharded ones as they are sharded."""
        return self.trained

    def finite(self) -> bool:
        """Whether all of this process's share of the weights are numbers."""
        return all(weight.isfinite().all() for weight in map(sharding.mine, self.trained))

    @contextlib.contextmanager
    def plain_modules(self) -> Iterator[None]:
        """Inside, model.velocity can be differentiated otherwise than by `backward`: processes
        exchange nothing. Raises InputError for sharded weights, and for --attention."""
        if self.sharding:
            raise InputError(
                "sharded weights can be differentiated by the update only; take configs/ddp.yaml"
            )
        if self.args.attention != "native":
            raise InputError(
                f"--attention {self.args.attention} cannot be differentiated twice; leave it out"
            )
        trained = self.model.trainable
        self.model.trainable = {
            name: self.accelerator.unwrap_model(module) for name, module in trained.items()
        }
        try:
            with compiling.off():
                yield
        finally:
            self.model.trainable = trained

    @contextlib.contextmanager
    def initial_weights(self) -> Iterator[None]:
        """Inside, model.velocity is that before training: the LoRA is off, or the frozen copy
        stands in."""
        trained = self.model.trainable
        with torch.no_grad(), self.accelerator.autocast():
            modules = (
                []
                if self.frozen
                else [self.accelerator.unwrap_model(module) for module in trained.values()]
            )
            for module in modules:
                module.disable_adapters()
            self.model.trainable = self.frozen or trained
            try:
                yield
            finally:
                self.model.trainable = trained
                for module in modules:
                    module.enable_adapters()

    def exchange_gradients(self, now: bool) -> None:
        """Whether processes exchange gradients in the next forward and backward pass; until then
        each adds up its own.

        Data parallelism decides in the forward pass, so `no_sync` around a backward pass alone does
        nothing. Sharded weights need whole gradients until then; --exchange-often saves that
        memory."""
        for module in self.model.trainable.values():
            if self.sharding:
                module.set_requires_gradient_sync(now or self.args.exchange_often)
                module.set_requires_all_reduce(now)  # with the other machines
            elif isinstance(module, torch.nn.parallel.DistributedDataParallel):
                module.require_backward_grad_sync = now

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of this process's share of the loss, a scalar."""
        self.accelerator.backward(loss * self.world)  # data parallelism averages, the loss is a sum

    def update(self) -> torch.Tensor:
        """Clips the gradients, steps the optimizer, and returns the norm before clipping, a scalar.
        Raises RunError for one that is no number."""
        weights = self.weights()
        norm = sharding.whole(self.accelerator.clip_grad_norm_(weights, self.args.max_grad_norm))
        if not torch.isfinite(norm):
            self.cure = (
                ("--learning-rate", self.args.learning_rate / 10)
                if self.moved
                else ("--seed", self.args.seed + 1)
            )
            raise RunError(
                f"the gradient norm of step {self.step} is {norm.item()}; {self.blame()}"
            )
        self.moved = True
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.step(weights)
        return norm

    def check_ratio(self, error: float) -> None:
        """Raises RunError for a first ratio that is not 1 (error: max |rho - 1|): its policy
        gradient would be that of another policy, and what is beyond the clip range clipped on one
        side: an error that the sign of A chooses."""
        limit = min(RATIO_LIMIT[self.precision], self.args.clip_range)
        if not error <= limit:
            raise RunError(
                f"the ratio is off by {error:.1e} before the first update (limit {limit:.0e}"
                f"{', the clip range' * (limit == self.args.clip_range)}): rollout and update "
                "see different weights, "
                "dtypes, guidance, conditioning or kernels"
            )


def _average(weights: list[torch.Tensor], decay: float) -> "EMAModel":
    from diffusers.training_utils import EMAModel

    return EMAModel(weights, decay=decay)
