"""The rewards of a run: scorers and weights, from samples to the numbers that are trained on.

Shapes: P prompts, G samples of each, b samples of this process. NaN is a sample without a score.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from common import errors, groups
from common.errors import Diverged, InputError, RunError
from common.prompts import caption_of
from common.rewards import background, table
from common.rewards.scorer import out_of_range, scores_of

# Scores that tell all processes, once gathered, what happened on one of them.
FAILED = torch.inf  # the scorer raised
NOT_FINITE = -torch.inf  # the samples were not finite


def weighted_sum(
    scores: dict[str, torch.Tensor], weights: dict[str, float | torch.Tensor]
) -> torch.Tensor:
    """Return the sum over {name: weight} of weight * scores[name], of the shape of a score.

    A reward of weight 0 takes no part: its NaN does not make the sum NaN.
    """
    counted = {n: w for n, w in weights.items() if not isinstance(w, float) or w}
    return sum(weight * scores[name] for name, weight in counted.items())


def shares(
    scores: dict[str, torch.Tensor],
    weights: dict[str, float | torch.Tensor],
    parts: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """Return how much of what is added up each of several rewards is: {"share_NAME": 0 to 1}.

    scores {name: [P, G]}, weights {name: number or [P, 1]}. A share is the standard deviation of
    weight * score within a group, averaged over the groups and divided by the sum over the rewards;
    0 if no reward varies. A single reward has none. parts: one [P, G] for each reward, if these are
    added up instead of weight * score.
    """
    if len(weights) < 2:
        return {}
    added = parts if len(parts) > 1 else [weight * scores[n] for n, weight in weights.items()]
    spreads = torch.stack([groups.spread(part).nanmean() for part in added]).nan_to_num(0.0)
    fractions = spreads / spreads.sum().clamp(min=1e-30)
    return {f"share_{name}": share for name, share in zip(weights, fractions)}


class Rewards:
    """Scorers of --reward and --watch, and the weights of --reward.

    scorers {name: scorer}, in the order of the flags; weights {name: float}, as they count: with
    --reward-units spread a weight is divided by the scorer's scale.

    A scorer that raises must not stop its process while the others wait for its scores. So its
    samples score `FAILED`, the error is kept, and `check` raises it on every process.
    """

    def __init__(self, args: Any, prompts: list[str], clips: bool | None = None) -> None:
        """Load the scorers. Raise InputError.

        args: the settings of common.args (rewards, judge and fps); prompts: all that will be
        scored; clips: whether the model makes clips, None: unknown.
        """
        judge = {
            name.removeprefix("judge_"): value
            for name, value in vars(args).items()
            if name.startswith("judge_")
        }
        weights = table.parse(args.reward) if args.reward else {}  # evaluate.py can do without
        self.scorers = table.load(
            [*args.reward, *getattr(args, "watch", ())],  # evaluate.py has no --watch
            prompts,
            reward_path=args.reward_path,
            reward_batch=args.reward_batch,
            reward_frames=args.reward_frames,
            fps=args.fps,
            judge={**judge, "trusted": args.trust_remote_code},
            clips=clips,
        )
        if args.reward_units == "spread":
            weights = {name: w / self.scorers[name].scale for name, w in weights.items()}
        self.weights = weights
        self.aggregate = getattr(args, "aggregate", "rewards")  # evaluate.py has no --aggregate
        self.failures = {}  # {name: exception}, until `check`
        self.told = set()  # (name, kind) of the missing scores that the log has

    # --- Scores ---

    def begin(
        self, decode: Callable[[torch.Tensor], torch.Tensor], prompts: list[str], size: int
    ) -> "Scoring":
        """Return a Scoring of the samples of b prompts: `size` are decoded and scored together.

        decode: latents [n, ...] -> media [n, C, H, W] or [n, F, C, H, W] in [0, 1].
        """
        return Scoring(self, decode, prompts, size)

    def score(
        self, media: torch.Tensor, prompts: list[str], names: Iterable[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return {name: [b] float32} of media [b, ...] by every scorer, or by those of `names`.

        Raise nothing: `check` raises what a scorer raised.
        """
        return {name: self.score_by(name, media, prompts) for name in names or self.scorers}

    def score_by(self, name: str, media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return the scores [b] of one scorer, as `score` does."""
        try:
            with errors.phase(f"reward {name}", memory="lower --reward-batch"):
                if not media.isfinite().all():
                    raise Diverged(
                        "the samples are not finite: the weights diverged. Continue from an "
                        "earlier checkpoint in a new run (--resume RUN/checkpoints/step_NNNNNN "
                        "--output NEW) with a lower --learning-rate."
                    )
                scores = scores_of(self.scorers[name], media, prompts)
                return scores.masked_fill(scores == NOT_FINITE, FAILED)  # not a sign from us
        except BaseException as error:  # a user's code may even call sys.exit
            if errors.from_a_signal(error):
                raise
            return self.fail(name, error, len(prompts)).to(media.device)

    def fail(self, name: str, error: BaseException, number: int) -> torch.Tensor:
        """Keep the error of a scorer for `check`; return scores [number] that announce it."""
        self.failures[name] = error
        sign = NOT_FINITE if isinstance(error, Diverged) else FAILED
        return torch.full((number,), sign)

    def check(self, scores: dict[str, torch.Tensor], prompts: list[str]) -> None:
        """Raise RunError for scores {name: [P, G]} that cannot be trained on; P prompts.

        These are an exception of a scorer, a score that is not finite (NaN is allowed for a scorer
        with `masks`), and a reward without any score. Raise Diverged for samples that were not
        finite. Gathered scores make every process raise.
        """
        for name, values in scores.items():
            error = self.failures.pop(name, None)
            if (values == NOT_FINITE).any():
                message = _said(name, error) if error else "the samples are not finite"
                raise Diverged(message) from error
            if error:
                raise RunError(_said(name, error)) from error
            masks = getattr(self.scorers[name], "masks", False)
            missing = getattr(self.scorers[name], "missing", {})
            if masks and values.isnan().all():
                raise RunError(
                    f"reward {name} has no score for any of {values.numel()} samples"
                    f"{_last(missing)}"
                )
            for kind, cause in missing.items():
                if (name, kind) not in self.told:
                    self.told.add((name, kind))
                    errors.warn(f"reward {name}: a sample without a score is masked: {cause}")
            wrong = (~values.isfinite() & ~(values.isnan() & masks)).nonzero().tolist()
            if wrong:
                row, sample = wrong[0]
                raise RunError(
                    f"reward {name} is {values[row, sample].item()} for the prompt "
                    f"{prompts[row]!r} ({len(wrong)} of {values.numel()} samples), or it failed "
                    "in another process"
                )

    def smoke_test(self, media: torch.Tensor, prompt: str) -> None:
        """Score one sample, media [1, ...], before training; raise InputError for what fails."""
        for name, scores in self.score(media, [prompt]).items():
            error = self.failures.pop(name, None)
            if error:
                raise InputError(_said(name, error)) from error
            missing = getattr(self.scorers[name], "missing", {})
            if missing and scores.isnan().any():
                raise InputError(f"reward {name} has no score for a first sample{_last(missing)}.")
            if out_of_range(self.scorers[name], scores).any():
                raise InputError(
                    f"reward {name} scores {scores.item():g}, outside of its range "
                    f"{tuple(self.scorers[name].range)}. Correct the range; None is no bound."
                )

    def words(self, media: torch.Tensor) -> list[str]:
        """Return what the first scorer that reads text finds in images [n, 3, H, W], n strings.

        Empty for clips, and without such a scorer.
        """
        readers = [scorer for scorer in self.scorers.values() if hasattr(scorer, "text_in")]
        return readers[0].text_in(media) if readers and media.ndim == 4 else []

    # --- What is trained on ---

    @property
    def scale(self) -> float:
        """Return the typical standard deviation within a group of the weighted sum.

        This is the sum of |weight| * scale: an upper limit, reached by fully correlated rewards.
        """
        return sum(abs(weight) * self.scorers[name].scale for name, weight in self.weights.items())

    def terms(
        self, reward: torch.Tensor, scores: dict[str, torch.Tensor]
    ) -> list[tuple[torch.Tensor, float]]:
        """Return [(rewards [P, G], weight)]: what advantages are computed from, by --aggregate.

        "rewards": the weighted sum `reward` [P, G]; "advantages": each of the scores {name: [P, G]}
        alone, where a sample that lacks one score has none.
        """
        if self.aggregate == "rewards":
            return [(reward, 1.0)]
        missing = reward.isnan()
        return [(scores[n].masked_fill(missing, torch.nan), w) for n, w in self.weights.items()]

    def summary(
        self, scores: dict[str, torch.Tensor], parts: Sequence[torch.Tensor] = ()
    ) -> dict[str, torch.Tensor]:
        """Return the metrics {"NAME_mean"} of all scores {name: [P, G]}, and their `shares`.

        parts: see `shares`.
        """
        means = {f"{name}_mean": values.nanmean() for name, values in scores.items()}
        return means | shares(scores, self.weights, parts)

    def explain(
        self, scores: dict[str, torch.Tensor], advantages: torch.Tensor, prompts: list[str]
    ) -> str:
        """Return a line about the rewards of a step whose gradient is not finite.

        scores {name: [P, G]}, advantages [P, G], P prompts.
        """
        wrong = (~advantages.isfinite()).any(1).nonzero().flatten().tolist()
        listed = []
        for row in (wrong or range(len(prompts)))[:3]:
            given = ", ".join(f"{n} {_extremes(values[row])}" for n, values in scores.items())
            listed.append(f"{caption_of(prompts[row])[:100]!r} ({given})")
        if wrong:
            return (
                f"the advantages of {len(wrong)} prompts are not finite: {'; '.join(listed)}. "
                "Correct that reward, or remove the prompt from --prompts."
            )
        return (
            f"the rewards are not the cause: {'; '.join(listed)}. Start a new run with another "
            "--seed, or continue from an earlier checkpoint with a lower --learning-rate."
        )


class Scoring:
    """The scores of samples that come in order while others are still being sampled.

    Scorers with `elsewhere` (a judge's server) work in a thread from the first samples on, on one
    batch at a time. Without any of these, `result` does all the work.
    """

    def __init__(
        self,
        rewards: Rewards,
        decode: Callable[[torch.Tensor], torch.Tensor],
        prompts: list[str],
        size: int,
    ) -> None:
        self.rewards = rewards
        self.decode = decode
        self.prompts = prompts
        self.size = size
        scorers = rewards.scorers
        self.away = [name for name in scorers if getattr(scorers[name], "elsewhere", False)]
        self.here = [name for name in scorers if name not in self.away]
        self.latents = []  # of every sample so far
        self.begun = 0  # samples whose scoring has begun
        self.parts = {name: [] for name in scorers}  # scores [n] on the CPU or the device
        self.waiting = []  # a Future of {name: [n]} for each batch that is scored away

    def add(self, x0: torch.Tensor) -> None:
        """Add the latents [n, ...] of the next samples; those after the last prompt are padding."""
        self.latents.extend(x0)
        idle = not self.waiting or self.waiting[-1].done()
        if self.away and idle:
            self._score_batch()

    def result(self) -> dict[str, torch.Tensor]:
        """Return {name: [b] float32} of all samples."""
        while self._score_batch():
            pass
        device = self.latents[0].device
        for done in self.waiting:
            for name, scores in done.result().items():
                self.parts[name].append(scores)
        return {n: torch.cat([p.to(device) for p in part]) for n, part in self.parts.items()}

    def _score_batch(self) -> bool:
        """Decode the next batch and begin to score it; return whether there was one."""
        end = min(self.begun + self.size, len(self.prompts))
        prompts = self.prompts[self.begun : end]
        if not prompts or len(self.latents) < end:
            return False
        x0 = torch.stack(self.latents[self.begun : end])
        self.begun = end
        try:
            media = self.decode(x0)
            copy = media.cpu() if self.away else None
        except Exception as error:
            for name, part in self.parts.items():
                part.append(self.rewards.fail(name, error, len(prompts)))
            return True
        if self.away:
            if self.waiting:
                self.waiting[-1].result()  # one batch at a time: clips are large
            score = partial(self.rewards.score, copy, prompts, names=self.away)
            self.waiting.append(background.start(score))
        for name in self.here:
            self.parts[name].append(self.rewards.score_by(name, media, prompts))
        return True


def _said(name: str, error: BaseException) -> str:
    """Return the message of what scoring by a reward raised."""
    if isinstance(error, (InputError, RunError)):
        return str(error)
    return f"reward {name} failed: {errors.described(error)}"


def _last(missing: dict[str, str]) -> str:
    """Return ": CAUSE", the latest of {kind: cause} of missing scores; "" if there is none."""
    return f": {list(missing.values())[-1]}" if missing else ""


def _extremes(values: torch.Tensor) -> str:
    """Return the lowest and highest finite of the scores [G], in words."""
    known = values[values.isfinite()].tolist() or [torch.nan]
    return f"{min(known):.4g} to {max(known):.4g}"
