"""The policy: the weights in training, their optimizer, and the initial weights.

A training step is

    with policy.sampling():                  rollout, without gradients
        policy.velocity(x, sigma, cond)
    with policy.sync_gradients(last):        one forward and backward pass of the update
        policy.velocity(x, sigma, cond)
        with policy.reference(): ...         the same by the initial weights, for the KL term
        policy.backward(loss)
    policy.clip_gradients(max_norm)
    policy.step()
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from common.args import Args
from common.errors import RunError, phase, warn
from common.memory import MemoryPlan
from common.models import eight_bits, lora, place
from common.models.family import Family
from common.trainer import compiling, sharding
from common.trainer.processes import Processes

# Largest |ratio - 1| before the first update that can be rounding: float32, and bf16 autocast.
RATIO_LIMIT = {"no": 1e-4, "bf16": 0.05}


class Policy:
    """A model in training.

    model      its trained modules are placed, sharded or compiled, with a LoRA or without
    weights    the trained tensors, float32; sharded ones as they are sharded
    size       number of trained weights, those of all shards together
    optimizer  AdamW on them
    average    their moving average (--ema), diffusers' EMAModel, or None
    updates    number of optimizer steps of this process

    keep_initial: whether `reference` is needed. It takes a frozen copy of all weights, or of the
    LoRA of --init-lora; a new LoRA is switched off instead. Raises InputError for --lora-targets,
    --init-lora or --attention that the model does not support.
    """

    def __init__(
        self,
        model: Family,
        args: Args,
        processes: Processes,
        plan: MemoryPlan,
        keep_initial: bool,
    ) -> None:
        self.model = model
        self.processes = processes
        self.lora_rank = args.lora_rank
        self.init_lora = args.init_lora
        self.compiled_rows = plan.batch if args.compile else 0
        self.clip_range = args.clip_range
        self.attention = args.attention
        self.exchange_often = args.exchange_often
        self.updates = 0
        self.warned_of_ratio = False
        self.sampled_with = {}  # settings of the last pass without gradients
        self.fsdp = processes.fsdp
        if plan.sharded and not self.fsdp:
            self.fsdp = sharding.own_plugin()
        self.mesh = None
        if self.fsdp:
            self.mesh = processes.mesh(plan.shards)
        self._prepare_modules(args, keep_initial=keep_initial)
        self._place(args, plan, keep_initial=keep_initial)
        modules = torch.nn.ModuleList(model.trainable.values())
        self.weights = [weight for weight in modules.parameters() if weight.requires_grad]
        self.size = sum(weight.numel() for weight in self.weights)
        optimizer = torch.optim.AdamW(
            self.weights,
            lr=args.learning_rate,
            eps=args.adam_eps,
            weight_decay=args.weight_decay,
            fused=True,
        )
        self.optimizer = processes.accelerator.prepare(optimizer)
        self.average = None
        if args.ema:
            from diffusers.training_utils import EMAModel

            self.average = EMAModel(self.weights, decay=args.ema)
        self._describe(args, plan)

    def _prepare_modules(self, args: Args, keep_initial: bool) -> None:
        compiling.settle_attention(self.model, args.attention)
        recompute = args.gradient_checkpointing
        if self.fsdp and self.fsdp.activation_checkpointing:
            recompute = True
        for module in self.model.trainable.values():
            module.requires_grad_(False).eval()
            if recompute:
                module.enable_gradient_checkpointing()
            if args.attention != "native":
                compiling.set_attention(module, args.attention)
        if args.lora_rank:
            lora.adapt_model(
                self.model,
                **args.lora_settings(),
                init=args.init_lora,
                seed=args.seed,
                autocast=self.processes.precision != "no",
            )
        if args.init_lora and keep_initial:
            for module in self.model.trainable.values():
                lora.keep_initial(module)

    def _place(self, args: Args, plan: MemoryPlan, keep_initial: bool) -> None:
        """Move the model to the device and wrap its modules; where memory is scarce, in turn."""
        if args.frozen_8bit:
            eight_bits.quantize(self.model, self.processes.device)
        place(self.model, self.processes.device, offload_encoders=args.offload_encoders)
        self.frozen = {}  # copies of the trained modules with their initial weights
        for name, module in self.model.trainable.items():
            if not self.fsdp:
                module.to(self.processes.device)  # there is room for the copy
            if keep_initial and not args.lora_rank:
                self.frozen[name] = self._wrap(copy.deepcopy(module), args, rows=plan.batch)
            self._wrap(module, args, rows=plan.batch)
            if not args.lora_rank:
                for weight_name, weight in module.float().named_parameters():
                    weight.requires_grad_(self.model.learns(weight_name))
        if plan.turn:
            plan.turn.end()
        self.processes.accelerator.wait_for_everyone()
        for name, module in self.model.trainable.items():
            self.model.trainable[name] = self.processes.prepare(module, trains=not self.fsdp)

    def _wrap(self, module: torch.nn.Module, args: Args, rows: int) -> torch.nn.Module:
        """Compile a module's blocks (--compile) and move or shard it."""
        if args.compile:
            compiling.compile_blocks(module, self.model.blocks, rows)
        if self.fsdp:
            dtype = self.processes.dtype
            return sharding.shard(module, self.model.blocks, self.fsdp, self.mesh, dtype)
        return module.to(self.processes.device)

    def _describe(self, args: Args, plan: MemoryPlan) -> None:
        world = self.processes.world
        words = f"{args.model}: training {self.size / 1e6:.2f}M weights"
        if args.lora_rank:
            words += " (LoRA)"
        if args.frozen_8bit:
            words += ", frozen layers in 8 bits"
        words += f" on {world} x {self.processes.device.type}"
        if self.fsdp:
            words += ", sharded"
            if plan.shards < world:
                words += f" by {plan.shards}"
        words += f", {args.prompts_per_step} x {args.group_size} samples a step"
        self.processes.print(words)

    # --- Passes ---

    def region(self, function: Callable) -> Callable:
        """Return a pure function of a pass's tensors, with --compile compiled as one region."""
        if not self.compiled_rows:
            return function
        return compiling.region(function, self.compiled_rows)

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the model's velocity [n, ...] float32 at x [n, ...] and sigma (a scalar).

        Raises RunError if a pass with gradients has other settings than the last one without.
        """
        velocity = self.model.velocity(x, sigma, cond)
        settings = self._settings_of_pass(x, cond)
        if not torch.is_grad_enabled():
            self.sampled_with = settings
        for name, sampled in self.sampled_with.items():
            if settings[name] != sampled:
                raise RunError(
                    f"rollout and update differ in {name}: {sampled} and {settings[name]}. The "
                    "update would train another policy than the one that sampled. See "
                    "ratio_error in docs/troubleshooting.md"
                )
        return velocity

    def _settings_of_pass(self, x: torch.Tensor, cond: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return what rollout and update must have in common, {name: value}."""
        inputs = {"x": x, **cond}
        # what DDP wraps: its own flag is always True. Accelerate's unwrap_model visits every layer
        modules = {
            name: getattr(part, "module", part) for name, part in self.model.trainable.items()
        }
        return {
            "guidance": (self.model.guidance, self.model.guidance_2),
            "--batched-guidance": self.model.batched_guidance,
            "dropout (training mode)": {name: part.training for name, part in modules.items()},
            "dtype": {name: value.dtype for name, value in inputs.items()},
            "shape": {name: tuple(value.shape) for name, value in inputs.items()},
        }

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Compute without gradients inside: the rollout."""
        flags = "lower --micro-batch or --prompts-per-step, or add --offload-encoders"
        with torch.no_grad(), phase("the rollout", memory=flags):
            yield

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Compute with the initial weights inside, without gradients.

        A new LoRA is switched off. Otherwise a frozen copy replaces the trained weights.
        """
        accelerator = self.processes.accelerator
        trained = self.model.trainable
        adapted = []
        if not self.frozen:
            adapted = [accelerator.unwrap_model(module) for module in trained.values()]
        with torch.no_grad(), accelerator.autocast():
            for module in adapted:
                if self.init_lora:
                    module.set_adapter(lora.INITIAL)
                else:
                    module.disable_adapters()
            self.model.trainable = self.frozen or trained
            try:
                yield
            finally:
                self.model.trainable = trained
                for module in adapted:
                    if self.init_lora:
                        module.set_adapter(lora.TRAINED)
                    else:
                        module.enable_adapters()

    @contextlib.contextmanager
    def sync_gradients(self, now: bool) -> Iterator[None]:
        """Do one forward and backward pass of the update inside.

        now: whether the processes exchange gradients in it; until then each sums up its own.
        Sharded weights need room for whole gradients until then, which --exchange-often saves.
        """
        flags = (
            "lower --micro-batch, add --gradient-checkpointing or --exchange-often, or train a "
            "LoRA (--lora-rank)"
        )
        with phase("the update", memory=flags), contextlib.ExitStack() as stack:
            for module in self.model.trainable.values():
                if self.fsdp:
                    module.set_requires_gradient_sync(now or self.exchange_often)
                    module.set_requires_all_reduce(now)  # with the other machines
                elif not now:
                    stack.enter_context(self.processes.accelerator.no_sync(module))
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this process's part of the loss, a scalar."""
        # data parallelism averages over processes, and the loss is a sum
        self.processes.accelerator.backward(loss * self.processes.world)

    # --- The optimizer's step ---

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to max_norm; return their norm before, a scalar."""
        norm = self.processes.accelerator.clip_grad_norm_(self.weights, max_norm)
        return sharding.whole(norm)

    def step(self) -> None:
        """Step the optimizer, clear the gradients, and update the average."""
        self.updates += 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.step(self.weights)

    def check_ratio(self, error: float) -> None:
        """Raise RunError if the ratio measured before the first update cannot be 1 plus rounding.

        error: max |ratio - 1|. Above the clip range it warns, once: the first update uses the exact
        ratio, but later ones start from log-probabilities with this error.
        """
        limit = RATIO_LIMIT[self.processes.precision]
        if not error <= limit:
            raise RunError(
                f"the ratio is off by {error:.1e} before the first update (limit {limit:.0e}): "
                "rollout and update differ in weights, dtype, guidance or conditioning. See "
                "ratio_error in docs/troubleshooting.md"
            )
        if error > self.clip_range and not self.warned_of_ratio:
            self.warned_of_ratio = True
            if self.processes.is_main:
                warn(
                    f"ratio_error {error:.1e} is above --clip-range {self.clip_range:g}: rollout "
                    "and update take kernels that round differently, or compute different "
                    "policies. The first update of a step is not affected; later ones clip too "
                    "early or too late. See docs/troubleshooting.md to tell a kernel from a bug"
                )

    # --- What a checkpoint holds ---

    def state(self) -> dict[str, Any]:
        """Return {name: stateful object} of the optimizer, the trained modules and the average."""
        states = {"optimizer": _OptimizerState(self.optimizer, self.mesh)}
        for name, module in self.model.trainable.items():
            plain = self.processes.accelerator.unwrap_model(module)
            states[name] = _ModuleState(plain, lora=bool(self.lora_rank), mesh=self.mesh)
        if self.average:
            states["ema"] = _AverageState(self.average, self.mesh)
        return states


class _ModuleState:
    """The trained weights of a module. Of a LoRA neither the base nor buffers are saved."""

    def __init__(self, module: torch.nn.Module, lora: bool, mesh: Any) -> None:
        self.module = module
        self.lora = lora
        self.mesh = mesh

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = self.module.state_dict()
        if not self.lora:
            return state
        named = self.module.named_parameters()
        trained = {name for name, weight in named if weight.requires_grad}
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        expected = self.state_dict()
        if expected.keys() != state.keys():
            raise ValueError(f"it has {len(state)} weights, {len(expected)} are trained here")
        self.module.load_state_dict(sharding.distribute(state, self.mesh), strict=False)


class _OptimizerState:
    """The optimizer's moments. The learning rate, eps and weight decay stay those of this run."""

    def __init__(self, optimizer: torch.optim.Optimizer, mesh: Any) -> None:
        self.optimizer = optimizer
        self.mesh = mesh

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        settings = []
        for group in self.optimizer.param_groups:
            settings.append({name: group[name] for name in ("lr", "eps", "weight_decay")})
        self.optimizer.load_state_dict(sharding.distribute(state, self.mesh))
        for weight, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # torch would look at the shape when it steps
                if getattr(moments.get(name), "shape", None) != weight.shape:
                    raise ValueError("its moments are those of other weights")
        for group, own in zip(self.optimizer.param_groups, settings):
            group.update(own)


class _AverageState:
    """The moving average of the weights."""

    def __init__(self, average: Any, mesh: Any) -> None:
        self.average = average
        self.mesh = mesh

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(sharding.distribute(state, self.mesh))
