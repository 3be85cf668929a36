"""Checkpoints of a run that goes on, and going on from them.

`stateful` is all that a checkpoint holds: {name: module, or another object with state_dict and
load_state_dict, or dictionary}. The files: checkpoints.py."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import errors
from common.errors import InputError, RunError
from common.memory import preflight
from common.trainer import checkpoints, run_folder, sharding
from common.trainer.processes import Processes

AUTO_STEPS, AUTO_SECONDS = 20, 1800.0  # between checkpoints, whichever comes first


class Saving(Processes):
    """The part of a Runtime that saves and resumes."""

    step = saved = 0  # finished steps, and those that a checkpoint holds
    last_saved = 0.0  # when, by time.monotonic
    stateful, kept = (
        {},
        {},
    )  # what a checkpoint holds; the method's own of it as it was after the last finished step
    name = ""  # what checkpoints call the run, on the main process
    checkpoint = None  # (folder, step, states) of --resume, until they are loaded
    changes = ""  # the settings that --resume came with, as a line

    def claim(self) -> None:
        """Writes config.json: from here on the folder is this run's. Raises InputError where
        nothing can be written."""
        if self.is_main:
            self.name, moved = run_folder.claim(
                self.output, self.asked, self.checkpoint and self.checkpoint[:2]
            )
            if moved:
                self.print(moved)

    def due(self, step: int) -> bool:
        """All processes together: whether a checkpoint of this many steps is due. By --save-every
        auto, where a step takes long, more often: of half an hour no more than that is lost."""
        every = self.args.save_every
        if step == self.args.steps or every != "auto":
            return step == self.args.steps or bool(every) and step % every == 0
        return self.any(step % AUTO_STEPS == 0 or time.monotonic() - self.last_saved > AUTO_SECONDS)

    def save(self, step: int, stateful: dict[str, Any]) -> None:
        """All processes together: writes checkpoints/step_NNNNNN. Raises RunError where the disk
        does not take it, and Diverged for weights that are no numbers."""
        if self.any(not self.finite()):
            raise errors.Diverged(
                f"the weights after step {step} are no numbers: lower --learning-rate"
            )
        states = {name: self._state(thing) for name, thing in stateful.items()}
        shares = {
            name: sharding.local(state)
            for name, state in states.items()
            if sharding.has_shards(state)
        }
        others = {name: state for name, state in states.items() if name not in shares}
        parts = {name: self.shards * (name in shares) for name in sorted(states)}
        self._on_disk(self.is_main, checkpoints.begin, self.output, step)
        self._on_disk(self.is_main, checkpoints.put, self.output, step, others)
        here, part = sharding.writes(self.mesh) if shares else (False, None)
        self._on_disk(here, checkpoints.put, self.output, step, shares, part)
        keep = self.args.keep_checkpoints
        self._on_disk(self.is_main, checkpoints.publish, self.output, step, parts, self.name, keep)
        every, self.saved, self.last_saved = step - self.saved, step, time.monotonic()
        if self.is_main and self.args.save_every == "auto" and every < AUTO_STEPS:
            preflight.warn_of_disk(self, step, every)
        errors.last_checkpoint = str(self.output / "checkpoints" / checkpoints.name_of(step))

    def _on_disk(self, here: bool, action: Callable, output: Path, step: int, *arguments) -> None:
        """A part of saving, on the processes that are `here`: where it fails on one, all of them
        stop."""
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

    def finish(self, step: int) -> None:
        """Counts a step as finished: from now on `rescue` saves it."""
        self.step, self.moved = step, False
        self.kept = {
            name: copy.deepcopy(state)
            for name, state in self.stateful.items()
            if isinstance(state, dict)
        }

    def resume(self, stateful: dict[str, Any]) -> int:
        """Loads the checkpoint of --resume into `stateful` and returns its step; 0 without one.
        Raises InputError where it does not fit."""
        if self.average:
            stateful["ema"] = self.average
        self.stateful = stateful
        self.watch()
        errors.last_checkpoint = ""
        if self.checkpoint is None:
            return 0
        folder, step, states = self.checkpoint
        self.checkpoint = None  # gigabytes
        for names, verb in (
            (set(stateful) - set(states), "lacks"),
            (set(states) - set(stateful), "also has"),
        ):
            if names:
                raise InputError(
                    f"--resume: {folder} {verb} {', '.join(sorted(names))}: it is another "
                    "script's checkpoint"
                )
        for name, thing in stateful.items():
            try:
                self._load_state(thing, states[name])
            except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise InputError(f"--resume: {folder}/{name}.pt does not fit: {reason}") from None
        for group in self.optimizer.param_groups:  # the state has those that it was saved with
            group.update(lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        self.print(
            f"resuming {self.output} at step "
            f"{step}{f', from here on with {self.changes}' * bool(self.changes)}"
        )
        self.saved = self.step = step
        errors.last_checkpoint = str(folder)
        return step

    def _state(self, thing: Any) -> dict:
        """What is saved of a thing; of a module the weights that are trained and no others: a
        LoRA's base stays out, and its buffers too, of Stable Diffusion 3.5 most of a GiB."""
        if isinstance(thing, dict):
            return thing
        if not isinstance(thing, torch.nn.Module):
            return thing.state_dict()
        module = self.accelerator.unwrap_model(thing)
        trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
        return {
            n: value
            for n, value in module.state_dict().items()
            if n in trained or not self.args.lora_rank
        }

    def _load_state(self, thing: Any, state: dict) -> None:
        if isinstance(thing, dict):
            if {name: type(value) for name, value in thing.items()} != {
                n: type(value) for n, value in state.items()
            }:
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
        self.accelerator.unwrap_model(thing).load_state_dict(
            sharding.deal(state, self.mesh), strict=False
        )


def _belong(weight: torch.Tensor, moments: dict) -> bool:
    """Whether AdamW's moments are this weight's: torch asks only when it uses them."""
    return all(
        getattr(moments.get(name), "shape", None) == weight.shape
        for name in ("exp_avg", "exp_avg_sq")
    )
