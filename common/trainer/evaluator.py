"""Held-out evaluation: noise-free samples of fixed prompts from fixed initial noise, scored.

The Evaluator does it during training. Programs that sample outside of a run use `load_to_sample`
and `sample`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from common import models, sde
from common.args import Args, score_batch
from common.errors import InputError, phase
from common.models.family import Family
from common.rewards import Rewards, weighted_sum
from common.trainer.checkpoints import Checkpoints
from common.trainer.log import SHOWN, Log
from common.trainer.processes import Processes

NOISE = 2**31 - 1  # the "step" whose noise an evaluation starts from; no training step has it


def load_to_sample(
    name: str, prompts: Sequence[str], processes: Processes, **settings: Any
) -> Family:
    """Load a model for sampling outside of a run, with a run's devices, dtypes and autocast.

    settings: those of models.load. No weight requires gradients. Raises InputError.
    """
    model = models.load(name, processes.dtype, prompts, **settings)
    models.place(model, processes.device, model.offload_encoders)
    for part, module in model.trainable.items():
        module.requires_grad_(False).eval().to(processes.device)
        model.trainable[part] = processes.prepare(module, trains=False)
    return model


@torch.no_grad()
def sample(
    model: Family,
    prompts: list[str],
    streams: torch.Tensor,
    sigmas: torch.Tensor,
    micro_batch: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> torch.Tensor:
    """Return noise-free samples of b prompts, [b, C, H, W] (clips [b, F, C, H, W]) in [0, 1].

    streams [b] int: which fixed noise each starts from; sigmas [T+1]; micro_batch: rows of a pass.
    """
    cond = model.encode(prompts)
    media = []
    for rows in torch.arange(len(prompts)).split(micro_batch):
        x = sde.RowNoise(seed, NOISE, streams[rows], device)(model.noise_shape)
        velocity = partial(model.velocity, cond=models.take(cond, rows))
        latents, _ = sde.rollout(velocity, x, sigmas, torch.zeros(len(sigmas) - 1), None)
        media.append(model.decode(latents[:, -1]))
    return torch.cat(media)


class Evaluator:
    """Scores noise-free samples of held-out prompts, during training and for a method's prior."""

    def __init__(
        self,
        args: Args,
        model: Family,
        rewards: Rewards,
        prompts: list[str],
        processes: Processes,
        checkpoints: Checkpoints,
    ) -> None:
        self.model = model
        self.rewards = rewards
        self.prompts = prompts
        self.processes = processes
        self.checkpoints = checkpoints
        self.eval_every = args.eval_every
        self.sample_every = args.sample_every
        self.micro_batch = args.micro_batch
        self.score_batch = score_batch(args.micro_batch, args.reward_batch)
        self.sigmas = model.sigmas(args.sampling_steps, args.shift)  # [T+1]
        self.held_out = self._held_out(args)  # model of --eval-height and --eval-width
        steps = args.eval_steps or args.sampling_steps
        self.held_out_sigmas = self.held_out.sigmas(steps, args.shift)

    def _held_out(self, args: Args) -> Family:
        height, width = args.eval_height, args.eval_width
        if not height and not width:
            return self.model
        try:
            return self.model.resized(height, width)
        except InputError as error:
            words = str(error).replace("--height", "--eval-height")
            raise InputError(words.replace("--width", "--eval-width")) from error

    def smoke_test(self, prompt: str) -> None:
        """Run model and rewards on one sample of nothing, so that what fails, fails now.

        Raises InputError.
        """
        self.rewards.smoke_test(self.model.try_out(prompt), prompt)
        if self.held_out is not self.model and self.due(0):
            self.rewards.smoke_test(self.held_out.try_out(prompt), prompt)

    def due(self, step: int, last: bool = False) -> bool:
        """Return whether held-out samples are scored or pictured before this step."""
        return bool(self.prompts) and (
            self._every(self.eval_every, step, last) or self._every(self.sample_every, step, last)
        )

    def run(self, step: int, log: Log, last: bool = False) -> dict[str, torch.Tensor]:
        """Return the metrics eval_reward and eval_NAME, means over the prompts; log a picture.

        Before a step that only --sample-every names, 16 prompts are sampled and nothing returned.
        """
        scored = self._every(self.eval_every, step, last)
        pictured = self._every(self.sample_every, step, last)
        prompts = self.prompts if scored else self.prompts[:SHOWN]
        scores, media = self.sample_and_score(
            prompts, shown=SHOWN if pictured else 0, held_out=True
        )
        reward = weighted_sum(scores, self.rewards.weights)
        if pictured:
            words = self.rewards.words(media) if self.processes.is_main else []
            log.samples(step, media, prompts, reward, words)
        if not scored:
            return {}
        means = {f"eval_{name}": score.nanmean() for name, score in scores.items()}
        return {"eval_reward": reward.nanmean(), **means}

    @staticmethod
    def _every(interval: int, step: int, last: bool) -> bool:
        return interval > 0 and (last or step % interval == 0)

    def sample_and_score(
        self,
        prompts: list[str],
        shown: int = 0,
        names: Iterable[str] | None = None,
        weights: Callable[[], AbstractContextManager] = nullcontext,
        held_out: bool = False,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Score one noise-free sample of each of n prompts.

        shown: how many samples are returned, too; names: the rewards, None for all; weights: a
        context to sample in, such as Policy.reference; held_out: whether size and denoising steps
        are those of --eval-height, --eval-width and --eval-steps. Returns {name: [n]}, the same on
        every process, and up to `shown` of this process's samples, on the main process those of the
        first prompts. Raises RunError, Stopped.
        """
        processes = self.processes
        # every process takes an equal share: the first prompts fill up the last share
        share = math.ceil(len(prompts) / processes.world)
        numbers = processes.rows(share * processes.world) % len(prompts)
        parts, pictures = [], []
        for part in numbers.split(self.score_batch):
            self.checkpoints.stop_if_asked()
            own = [prompts[number] for number in part]
            with weights(), phase("the evaluation", memory="lower --micro-batch"):
                media = sample(
                    self.held_out if held_out else self.model,
                    own,
                    streams=part,
                    sigmas=self.held_out_sigmas if held_out else self.sigmas,
                    micro_batch=self.micro_batch,
                    device=processes.device,
                )
            parts.append(self.rewards.score(media, own, names))
            pictures += media[: max(0, shown - len(pictures))].cpu()
        scores = {}
        for name in parts[0]:
            local = torch.cat([part[name] for part in parts])
            scores[name] = processes.gather(local)
        # all of them are checked: a scorer may have failed on a row that only fills up
        everyone = [prompts[i % len(prompts)] for i in range(share * processes.world)]
        self.rewards.check({name: score[:, None] for name, score in scores.items()}, everyone)
        scores = {name: score[: len(prompts)] for name, score in scores.items()}
        return scores, torch.stack(pictures) if pictures else None

    def score_media(
        self,
        make: Callable[[list[str]], torch.Tensor],
        prompts: list[str],
        names: Iterable[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Score the media that `make` gives of prompts: {name: [n]}, the same on every process.

        Used by bpgo.py --prior first-frame.

        Every process scores all of them: a judge may answer each differently, the main one counts.
        Raises RunError.
        """
        parts = []
        for start in range(0, len(prompts), self.score_batch):
            part = prompts[start : start + self.score_batch]
            parts.append(self.rewards.score(make(part), part, names))
        gathered = {}
        for name in parts[0]:
            local = torch.cat([part[name] for part in parts])
            gathered[name] = self.processes.gather(local[None]).T  # [n, processes]
        self.rewards.check(gathered, prompts)
        return {name: scores[:, 0] for name, scores in gathered.items()}
