"""The run's folder, its checkpoints, and the signal that stops a run.

Everything that must survive a restart is a state: an object with state_dict and load_state_dict, or
a dictionary. The policy has some (weights, optimizer, average); a method may add its own.
"""

import contextlib
import copy
import dataclasses
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from common import errors
from common.args import Args
from common.errors import InputError, RunError
from common.trainer import checkpoint_files, disk, export, run_folder, sharding
from common.trainer.lock import Lock
from common.trainer.policy import Policy
from common.trainer.processes import Processes

AUTO_SECONDS = 1800.0  # the longest time between checkpoints of --save-every auto
# Signals by which a cluster announces the end of a job's time. They may come twice, from Slurm and
# from the launcher. A handler that a user's code has set for one of them stays.
NOTICES = (signal.SIGUSR1, signal.SIGUSR2)


class Checkpoints:
    """The run's folder `output` and its checkpoints.

    Chooses and locks the folder, and reads the checkpoint that --resume names. Raises InputError if
    --output and --resume do not fit each other, the settings are those of another run, or another
    process uses the folder.

    output     the folder, absolute: a user's code may change the working directory
    shown      the folder as the user knows it, for messages
    """

    def __init__(self, args: Args, processes: Processes) -> None:
        self.args = dataclasses.replace(args)  # as the user gave them: config.json
        self.processes = processes
        self.lock = None  # of the folder, on the main process
        self.shown, self.changes = processes.from_main(self._enter)  # shown: as the user knows it
        self.output = self.shown.absolute()
        self.step = 0  # finished steps
        self.saved = 0  # finished steps that a checkpoint holds
        self.last_saved = 0.0  # when, by time.monotonic
        self.signal = 0  # number of the signal that asked this process to stop
        self.policy = None  # from `resume` on
        self.own = {}  # {name: state} of the method
        self.kept = {}  # {name: state} of the method after the last finished step
        self.updates = 0  # of the policy after that step
        self.checkpoint = self._read()  # (folder, step, states) until `resume` has loaded it

    def _enter(self) -> tuple[Path, str]:
        """Choose the folder, take its lock, and return it with the settings that changed."""
        folder = run_folder.choose(self.args)
        changes = run_folder.check(folder, self.args)
        self.lock = Lock(folder.absolute(), str(folder))
        return folder, changes

    def _read(self) -> tuple[Path, int, dict[str, dict]] | None:
        """Return the newest complete checkpoint that --resume allows, None without one."""
        folders = run_folder.find_checkpoint(self.shown, self.args)
        for folder in folders:
            step, states, reason = 0, {}, ""
            try:
                step, states = checkpoint_files.read(folder)
                reason = self._unfit(folder, step, states)
            except checkpoint_files.Broken as error:
                reason = errors.text(error)
            reason = self.processes.first(reason)
            if not reason and step > self.args.steps:
                raise InputError(
                    f"--steps {self.args.steps}: {folder} is already at step {step}. Raise "
                    "--steps, or begin a new run with an earlier checkpoint (--resume CHECKPOINT "
                    "--output NEW)."
                )
            if not reason:
                return folder.absolute(), step, states
            self.processes.print(f"passing over {folder}: {reason}")
        if folders:
            raise InputError(f"--resume {self.args.resume}: no checkpoint can be loaded.")
        if self.args.resume:
            self.processes.print(f"{self.shown} has no checkpoint yet: starting at step 0")
        return None

    def _unfit(self, folder: Path, step: int, states: dict[str, dict]) -> str:
        number = checkpoint_files.number_of(folder)
        if number is not None and number != step:
            return f"its checkpoint.json has step {step}"
        processes = self.processes
        name = checkpoint_files.not_finite(states, rank=processes.rank, world=processes.world)
        return f"its {name} is not finite" if name else ""

    # --- Resuming ---

    def resume(self, policy: Policy, own: dict[str, Any] | None = None) -> int:
        """Claim the folder, load the checkpoint of --resume, and return its number of steps.

        own: {name: state} of the method. Raises InputError if the checkpoint does not fit.
        From now on an error that ends the program saves the finished steps first.
        """
        self.policy = policy
        self.own = own or {}
        folder, step, states = self.checkpoint or (None, 0, {})
        self.checkpoint = None  # gigabytes
        self._check_lock()
        if self.processes.is_main:
            with contextlib.suppress(OSError):  # of a folder that `claim` will refuse
                self._check_disk(step)
            run_folder.claim(self.output, self.args, checkpoint=folder, step=step)
        errors.run_folder = self.output
        self.processes.print(f"writing into {self.shown}")
        things = {**policy.state(), **self.own}
        if folder:
            self._load(things, folder, states)
            changes = f", from now on with {self.changes}" if self.changes else ""
            self.processes.print(f"resuming {self.shown} at step {step}{changes}")
        self.last_saved = time.monotonic()
        self.saved = step
        self.finish(step)
        errors.rescue = self.rescue
        return step

    def _load(self, things: dict[str, Any], folder: Path, states: dict[str, dict]) -> None:
        if things.keys() != states.keys():
            names = ", ".join(sorted(things.keys() ^ states.keys()))
            raise InputError(
                f"--resume: {folder} is a checkpoint of other settings or another script: only one "
                f"of them has {names}."
            )
        for name, thing in things.items():
            with errors.loading(f"--resume: {folder}/{name}.pt"):
                if isinstance(thing, dict):
                    _fill(thing, states[name])
                else:
                    thing.load_state_dict(states[name])

    # --- Steps, and the signals that end them ---

    def steps(self, stop: int) -> Iterator[int]:
        """Yield the steps that are left. Meanwhile a signal only sets a flag: see stop_if_asked."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
            handlers[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
        for number in NOTICES:
            if signal.getsignal(number) == signal.SIG_DFL:
                handlers[number] = signal.SIG_DFL

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = self.signal or number
            words = f"\n{signal.Signals(number).name}: saving after this update"
            if number not in NOTICES:
                signal.signal(number, handlers[number])  # the same again ends the run at once
                words += "; once more stops at once"
            with contextlib.suppress(RuntimeError):  # it may interrupt another print
                self.processes.print(words)

        try:
            for number in handlers:
                signal.signal(number, note)
            yield from range(self.step, stop)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def stop_if_asked(self) -> None:
        """Save and raise Stopped on every process if one of them got a signal.

        It is safe wherever the weights have not changed since the last finished step.
        """
        number = self.signal
        if self.processes.world > 1:
            caught = torch.tensor([self.signal], device=self.processes.device)
            number = int(self.processes.gather(caught).max())
        if number:
            self.rescue()
            name = signal.Signals(number).name
            raise errors.Stopped(number, f"{name}: stopped after {self.step} steps")

    def finish(self, step: int) -> None:
        """Count a step as finished: from now on `save` and `rescue` save it."""
        self.step = step
        self.updates = self.policy.updates
        self.kept = {name: copy.deepcopy(_state(thing)) for name, thing in self.own.items()}

    # --- Saving ---

    def due(self) -> bool:
        """Return whether the finished step is to be saved.

        With --save-every auto a slow run saves more often: half an hour of work is the most that
        can be lost.
        """
        every = self.args.save_every
        if self.step == self.args.steps:
            return True
        if every == "auto":
            late = time.monotonic() - self.last_saved > AUTO_SECONDS
            return self.processes.any(self.step % disk.AUTO_STEPS == 0 or late)
        return every > 0 and self.step % every == 0

    def save(self) -> None:
        """Write the finished step to checkpoints/step_NNNNNN, all processes together.

        Raises RunError if the disk is full, Diverged if a state is not finite.
        """
        self._check_lock()
        states = {
            **{name: _state(thing) for name, thing in self.policy.state().items()},
            **self.kept,
        }
        local = {name: sharding.local(state) for name, state in states.items()}
        name = self.processes.first(checkpoint_files.not_finite(local))
        if name:
            raise errors.Diverged(
                f"the {name} is not finite after step {self.step}. Lower --learning-rate."
            )
        meshes = {name: sharding.mesh_in(state) for name, state in states.items()}
        mesh = next(filter(None, meshes.values()), None)
        part, writes = sharding.part_of(mesh) if mesh else (None, False)
        whole = {name: state for name, state in states.items() if not meshes[name]}
        shards = {name: state for name, state in local.items() if meshes[name]}
        number = mesh.size(mesh.ndim - 1) if mesh else 0
        parts = {name: number if meshes[name] else 0 for name in sorted(states)}
        output, step, is_main = self.output, self.step, self.processes.is_main
        self._write(is_main, lambda: checkpoint_files.begin(output, step))
        self._write(is_main, lambda: checkpoint_files.put(output, step, whole))
        self._write(writes, lambda: checkpoint_files.put(output, step, shards, part=part))
        keep = self.args.keep_checkpoints
        self._write(is_main, lambda: checkpoint_files.publish(output, step, parts, keep=keep))
        self.saved = step
        self.last_saved = time.monotonic()

    def _check_lock(self) -> None:
        """Raise RunError on every process if another run has taken the folder over."""
        reason = self.processes.together(bool(self.lock), lambda: self.lock.check())
        if reason:
            errors.rescue = None
            raise RunError(reason)

    def _check_disk(self, start: int) -> None:
        args = self.args
        number = disk.checkpoints_at_once(
            args.steps, args.save_every, keep=args.keep_checkpoints, start=start
        )
        number -= len(checkpoint_files.newest_first(self.output))  # they are on the disk already
        checkpoint, export_size = self._sizes()
        disk.check(self.output, checkpoint, number=max(0, number), export=export_size)

    def _sizes(self) -> tuple[int, int]:
        """Return the bytes of one checkpoint, and of the export."""
        trained = self.policy.size
        ema, lora = self.args.ema > 0, self.args.lora_rank > 0
        weights = 0
        for part in self.policy.model.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                weights += sum(weight.numel() for weight in part.parameters())
        pipeline = self.processes.dtype.itemsize * weights
        export_size = disk.export_bytes(trained, pipeline, lora=lora, ema=ema)
        return disk.checkpoint_bytes(trained, ema=ema), export_size

    def _write(self, here: bool, action: Callable[[], None]) -> None:
        """Do a part of saving on the processes that are `here`; if it fails on one, all stop."""
        reason = self.processes.together(here, action)
        if reason:
            checkpoint_files.discard(self.output, self.step)
            errors.rescue = None  # a full disk stays full
            raise RunError(
                f"cannot save step {self.step} in {self.shown}/checkpoints ({reason}). Is the "
                "disk full? Earlier checkpoints are intact."
            )

    def rescue(self, error: Exception | None = None) -> None:
        """Save the finished steps before the program ends, unless the weights have changed since.

        It is also called in the middle of a step that has only sampled.
        """
        errors.rescue = None  # once
        unchanged = self.policy.updates == self.updates
        if self.step > self.saved and unchanged and not isinstance(error, errors.Diverged):
            self.save()
        if self.saved:
            output = shlex.quote(str(self.shown))
            self.processes.print(
                f"{self.saved} steps are saved; continue with --output {output} --resume latest"
            )

    # --- The end ---

    def export(self) -> str:
        """Write the trained weights to export/ (the average to export_ema/) for plain diffusers.

        Returns the Python line that loads them. With --ema the policy has the averaged weights
        afterwards. Raises RunError.
        """
        policy, processes = self.policy, self.processes
        lora = bool(self.args.lora_rank)
        place = self.output / "export"
        line = export.write(policy.model, place, lora, processes, shown=self.shown / "export")
        if policy.average:
            policy.average.copy_to(policy.weights)
            place = self.output / "export_ema"
            shown = self.shown / "export_ema"
            averaged = export.write(policy.model, place, lora, processes, shown=shown)
            line = f"{line}; the averaged one: {averaged}"
        errors.rescue = None  # nothing is left to save, and it holds the model
        if self.lock:
            self.lock.release()
        return line


def _state(thing: Any) -> dict:
    return thing if isinstance(thing, dict) else thing.state_dict()


def _fill(thing: dict, state: dict) -> None:
    """Put a saved state into a method's dictionary. Raises ValueError for another kind of state."""
    for name, value in thing.items():
        if type(state.get(name)) is not type(value):
            raise ValueError(f"it lacks {name}")
    thing.update({name: state[name] for name in thing})
