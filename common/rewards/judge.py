"""Score samples with a vision-language model as a judge (arXiv 2511.19356).

Three questions, each of which contains the ones before it: `judge:quality`, `judge:smoothness`,
`judge:alignment` (judge_questions.py). Others show the judge the source images of an edit too:
`judge:edit`, `judge:preserve`, and `judge:present`, `judge:similar`, `judge:held` for a product in
a person's hands. The model is Qwen2.5-VL, in this process (judge_local.py) or behind a server
(judge_server.py). README.md in this folder shows how to start one.
"""

from collections.abc import Sequence

import torch

from common.rewards.judge_answers import score_in
from common.rewards.judge_questions import (
    ALIGNMENT,
    DIGIT,
    EDITED,
    HELD,
    NUMBER,
    PRESENT,
    PRESERVED,
    QUALITY,
    SIMILAR,
    SMOOTHNESS,
    Failure,
    asked_again,
    expected_score,
    question,
)
from common.rewards.weights import Source

ASKED = 3  # times in all, before a sample counts as not judged


class Judge:
    """Score a clip or an image from 1 to 10, or NaN if the judge's answer has no score.

    `Qwen/Qwen2.5-VL-7B-Instruct`, Apache-2.0 (-72B-Instruct: Qwen licence), or the model that
    `--judge-url` serves. Thresholds apply to the score divided by 10, as in the paper. The scale is
    an estimate. Tests run it against servers on localhost, among them that of transformers
    (tests/test_rewards_judge.py).
    """

    video = True
    masks = True
    scale = 1.0
    range = (0.0, 10.0)

    def load(self, source: Source, batch: int = 16) -> None:
        """Connect to the server or load the model. Raises InputError."""
        self.missing = {}  # {kind of failure: the last cause} of samples without a score
        settings = self.judge
        self.elsewhere = bool(settings["url"])
        if self.elsewhere:
            from common.rewards.judge_server import Server

            self.backend = Server(
                source.name,
                settings["url"],
                model=settings["model"],
                expected=settings["expected"],
                timeout=settings["timeout"],
                retries=settings["retries"],
                concurrency=settings["concurrency"],
            )
        else:
            from common.rewards.judge_local import local

            self.backend = local(
                settings["model"],
                settings["expected"],
                trusted=settings["trusted"],
                batch=batch,
            )

    def score(
        self, media: torch.Tensor, prompts: Sequence[str], source: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, F, 3, H, W] or [b, 3, H, W] in [0, 1].

        source: the images before the edit, [b, N, 3, H, W].
        """
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        expected = self.judge["expected"]
        read = expected_score if expected else score_in
        wanted = DIGIT if expected else NUMBER
        before = [None] * len(media) if source is None else source
        talks = list(map(self.question, media, prompts, before))
        scores = torch.full((len(media),), torch.nan)
        left = list(range(len(media)))
        for _ in range(ASKED):
            answers = self.backend.answers([talks[i] for i in left])
            unclear = []
            for i, answer in zip(left, answers):
                if isinstance(answer, Failure):  # the backend has repeated the request already
                    self._miss(answer.kind, answer.cause)
                    continue
                scores[i] = read(answer)
                if scores[i].isnan():
                    talks[i] = asked_again(talks[i], said=answer, answer=wanted)
                    unclear.append((i, answer))
            left = [i for i, _ in unclear]
            if not left:
                break
        for _, answer in unclear:
            said = repr(answer) if answer else "nothing that can be read"
            self._miss("no score", f"asked {ASKED} times, the judge last answered {said:.300}")
        return scores.to(media.device)

    def _miss(self, kind: str, cause: str) -> None:
        """Keep why a sample has no score, as the latest cause."""
        self.missing.pop(kind, None)
        self.missing[kind] = cause

    def question(
        self, sample: torch.Tensor, prompt: str, source: torch.Tensor | None = None
    ) -> list[dict]:
        """Return the conversation that asks about a sample [F, 3, H, W] or [3, H, W]."""
        return question(
            sample,
            prompt,
            points=self.points,
            rate=self.judge["fps"],
            fps=self.fps,
            answer=DIGIT if self.judge["expected"] else NUMBER,
            source=source,
        )


class JudgeQuality(Judge):
    """Score visual quality, stage I of the paper."""

    points = (QUALITY,)


class JudgeSmoothness(Judge):
    """Score smoothness in time and visual quality of clips, stage II of the paper."""

    points = (SMOOTHNESS, QUALITY)
    image = False


class JudgeAlignment(Judge):
    """Score alignment with the prompt, smoothness (clips) and visual quality, stage III."""

    points = (ALIGNMENT, SMOOTHNESS, QUALITY)


class JudgeOfEdits(Judge):
    """Show the judge the source images and the edited one, as Edit-R1 (2510.16888) does."""

    video = False
    fields = ("source",)


class JudgeEdit(JudgeOfEdits):
    """Score whether the instruction was followed, and what it does not mention preserved."""

    points = (EDITED, PRESERVED)


class JudgePreserve(JudgeOfEdits):
    """Score whether what the instruction does not mention was preserved."""

    points = (PRESERVED,)


class JudgePresent(JudgeOfEdits):
    """Score whether a product of the sources is there: the first of SLAS's appendix I."""

    points = (PRESENT,)


class JudgeSimilar(JudgeOfEdits):
    """Score whether the product looks as in its source: the second of SLAS's appendix I."""

    points = (SIMILAR,)


class JudgeHeld(JudgeOfEdits):
    """Score whether the product is held as in reality: the third of SLAS's appendix I."""

    points = (HELD,)
