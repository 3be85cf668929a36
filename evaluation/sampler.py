"""Sample and score the parts of an evaluation, for each model with the same noise."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import RunError, phase
from common.models.family import Family
from common.rewards import Rewards
from common.trainer.evaluator import sample
from evaluation import layouts
from evaluation.folder import Folder


def check(rewards: Rewards, scores: dict[str, torch.Tensor], prompts: list[str]) -> None:
    """Raise RunError for scores {name: [n]} of n prompts that failed or cannot be counted.

    It is Rewards.check for a few samples: all of them may lack a score if the scorer has `masks`.
    """
    columns = {}
    for name, values in scores.items():
        if getattr(rewards.scorers[name], "masks", False):
            values = torch.where(values.isnan(), 0.0, values)
        columns[name] = values[:, None]
    rewards.check(columns, prompts)


@dataclass
class Sampler:
    """Make and score the samples of every model. A part is a tensor of samples, [n, 2]."""

    model: Family
    rewards: Rewards
    prompts: list[str]
    sigmas: torch.Tensor  # [T+1]
    micro_batch: int
    device: torch.device
    seed: int
    folder: Folder
    layout: layouts.Layout | None
    fps: float
    pictured: int  # number of prompts in the picture

    def begin(self) -> None:
        """Prepare the folder, on the main process. Raises OSError or InputError."""
        self.folder.begin()
        if self.layout:
            for name in self.folder.parts:
                self.layout.begin(self.folder.path, name)

    def lacks(self, name: str, number: int, part: torch.Tensor) -> bool:
        """Return whether a score or file of a model's part is missing."""
        scores = self.folder.parts[name].get(number)
        if scores is None:
            return True
        if any(len(scores.get(reward, ())) != len(part) for reward in self.rewards.scorers):
            return True
        return not all(path.exists() for path in self._files(name, part))

    def _files(self, name: str, part: torch.Tensor) -> list[Path]:
        """Return the files of a model's part."""
        samples = [tuple(pair) for pair in part.tolist()]
        paths = [self.folder.shown(name, s[0]) for s in samples if self._is_shown(s)]
        if self.layout:
            paths += [self.layout.path(self.folder.path, name, s) for s in samples]
        return paths

    def _is_shown(self, sample: tuple[int, int]) -> bool:
        """Return whether a sample is in the picture."""
        prompt, which = sample
        return bool(self.rewards.scorers) and which == 0 and prompt < self.pictured

    def sample(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """Return a part of a model's samples, [n, ...] in [0, 1].

        Raises RunError, on this process alone, for samples that are not finite.
        """
        with phase("sampling", memory="lower --micro-batch, or add --offload-encoders"):
            media = sample(
                self.model,
                [self.prompts[prompt] for prompt in part[:, 0]],
                streams=part[:, 1] * len(self.prompts) + part[:, 0],
                sigmas=self.sigmas,
                micro_batch=self.micro_batch,
                device=self.device,
                seed=self.seed,
            )
        if not media.isfinite().all():
            raise RunError(
                f"the samples of {name} are not finite: its weights diverged. Name an earlier "
                "checkpoint."
            )
        return media

    def score(self, media: torch.Tensor, part: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the scores {reward: [n]} of a part's samples, on the CPU.

        Never raises; `check` raises what failed here.
        """
        prompts = [self.prompts[prompt] for prompt in part[:, 0]]
        scores = self.rewards.score(media, prompts)
        return {name: values.cpu() for name, values in scores.items()}

    def keep(self, name: str, media: torch.Tensor, part: torch.Tensor) -> None:
        """Write the files of a part's samples. Raises OSError."""
        for pair, pixels in zip(part.tolist(), media):
            sample = tuple(pair)
            if self._is_shown(sample):
                self.folder.show(name, sample[0], pixels)
            if self.layout:
                layouts.write(self.layout.path(self.folder.path, name, sample), pixels, self.fps)

    def check(self, scores: list[dict[str, torch.Tensor]], part: torch.Tensor) -> None:
        """Raise RunError, on all processes, for scores of parts that cannot be counted.

        part: the samples of these parts, one after another.
        """
        joined = {}
        for name in self.rewards.scorers:
            joined[name] = torch.cat([found[name] for found in scores])
        check(self.rewards, joined, [self.prompts[prompt] for prompt in part[:, 0]])
