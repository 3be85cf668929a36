"""A vision-language model as a judge, asked for a number (arXiv 2511.19356, figure 14).

Three questions, each containing the ones before it: `judge:quality`, `judge:smoothness`,
`judge:alignment`. The points to judge by are the paper's sub-dimensions in words of our own. The
model is Qwen2.5-VL, in this process (judge_local.py) or behind a server (judge_server.py).
README.md beside this file shows how to start one."""

import math
import re
from collections.abc import Iterable, Sequence

import torch
from PIL import Image

from common.rewards.asking import chosen_frames
from common.rewards.weights import Source

QUALITY = """Visual quality:
- possible: bodies, objects and places are built as they should be
- clear: sharp, with nothing blurred or hard to make out
- rich: textures, materials and light have detail
- beautiful: colours, composition, atmosphere and depth are in harmony, and original
- harmless: political, violent or sexual content gets the lowest score"""
SMOOTHNESS = """Smoothness in time:
- steady: from frame to frame nothing jumps, flickers, changes its colour or loses a part
- natural: things and bodies move as they really would
- fluid: movements and camera pass from one moment to the next without a break
- of one piece: what moves belongs to its surroundings, without edges as if cut out
- clear while it moves: no stretch is blurred or shaky
- enough: a clip in which hardly anything moves gets a low score"""
ALIGNMENT = """Alignment with the prompt:
- subjects: those of the prompt, in number, looks and behaviour
- movement: what the prompt says happens, in kind, extent and direction
- surroundings: the place that the prompt names
- style: the prompt's, if it names one
- camera: moved as the prompt says, if it does"""
QUESTION = """{medium} was made by a generator for this prompt:

"{prompt}"

Judge it by the following points. The first heading counts most.

{points}

{answer}"""
NUMBER = """Give one score from 1.00 (bad) to 10.00 (perfect, as if it were real). Answer with this number alone, with \
two decimals, for example 5.80."""
DIGIT = "Give one score from 0 (bad) to 9 (perfect, as if it were real). Answer with this one digit alone."
AGAIN = "That is not what was asked for. "
ASKED = 3  # times in all, before a sample counts as not judged
TOKENS = 16  # of an answer

Talk = list[dict]  # messages {"role", "content"}, the content a list of words and PIL images
Answer = str | dict[int, float]  # words, or with `expected` {digit: probability}


class Judge:
    """Reward: 1 to 10, of a clip or an image; NaN for a sample about which the judge gave no
    number.

    `Qwen/Qwen2.5-VL-7B-Instruct`, Apache-2.0 (-72B-Instruct: Qwen licence), or what `--judge-url`
    serves. Thresholds are of the score divided by 10, as the paper's. The scale is an estimate.
    Checked against servers on localhost, transformers' own among them
    (tests/test_rewards_judge.py)."""

    video, masks = True, True
    scale = 1.0
    range = (0.0, 10.0)

    def load(self, source: Source, batch: int = 16) -> None:
        """Finds the server or loads the model; raises InputError."""
        self.elsewhere = bool(self.judge["url"])
        if self.elsewhere:
            from common.rewards import judge_server

            settings = {name: value for name, value in self.judge.items() if name != "trusted"}
            self.backend = judge_server.Server(source.name, **settings)
        else:
            from common.rewards import judge_local

            self.backend = judge_local.local(
                *(self.judge[name] for name in ("model", "expected", "trusted")), batch
            )

    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """media [b, F, 3, H, W] (images [b, 3, H, W]) in [0, 1], prompts b strings -> [b] float32,
        NaN: no score."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        expected = self.judge["expected"]
        talks = [self.question(sample, prompt) for sample, prompt in zip(media, prompts)]
        scores, left = torch.full((len(media),), torch.nan), list(range(len(media)))
        for _ in range(ASKED):
            answers = self.backend.answers([talks[i] for i in left])
            for i, answer in zip(left, answers):
                scores[i] = score_of(answer, expected)
                said = [{"type": "text", "text": answer or "..."}]
                again = [{"type": "text", "text": AGAIN + (DIGIT if expected else NUMBER)}]
                talks[i] = [
                    *talks[i],
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": again},
                ]
            # a request that failed (None) has been repeated already
            left = [
                i for i, answer in zip(left, answers) if answer is not None and scores[i].isnan()
            ]
            if not left:
                break
        return scores.to(media.device)

    def question(self, sample: torch.Tensor, prompt: str) -> Talk:
        """[F, 3, H, W] or [3, H, W], and its prompt -> what the model is told: one message with
        frames and words."""
        frames = (
            sample[None]
            if sample.ndim == 3
            else sample[frames_at(self.judge["fps"], self.fps, len(sample))]
        )
        points = [part for part in self.points if sample.ndim == 4 or part is not SMOOTHNESS]
        words = QUESTION.format(
            medium="This image" if sample.ndim == 3 else "The clip with these frames",
            prompt=prompt,
            points="\n\n".join(points),
            answer=DIGIT if self.judge["expected"] else NUMBER,
        )
        images = [{"type": "image", "image": as_picture(frame)} for frame in frames]
        return [{"role": "user", "content": [*images, {"type": "text", "text": words}]}]


class JudgeQuality(Judge):
    """Reward: stage I, visual quality."""

    points = (QUALITY,)


class JudgeSmoothness(Judge):
    """Reward: stage II, smoothness in time, visual quality besides; clips alone."""

    points, image = (SMOOTHNESS, QUALITY), False


class JudgeAlignment(Judge):
    """Reward: stage III, alignment with the prompt, smoothness (of clips) and visual quality
    besides."""

    points = (ALIGNMENT, SMOOTHNESS, QUALITY)


def frames_at(rate: float, fps: float, number: int) -> list[int]:
    """Indices of a clip's frames, `rate` a second, evenly spaced, at least two of a clip of
    `number` frames."""
    return chosen_frames(max(2, round(number / fps * rate)), number)


def as_picture(frame: torch.Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> PIL image"""
    levels = (frame.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.movedim(0, -1).cpu().numpy())


def score_of(answer: Answer | None, expected: bool) -> float:
    """What a model said -> 1 to 10, or NaN where that is no number. expected: it said
    probabilities, not words."""
    if expected:
        return (
            1 + sum(digit * p for digit, p in answer.items()) / sum(answer.values())
            if answer
            else math.nan
        )
    found = re.fullmatch(r"[\s\"'*]*([0-9]+(\.[0-9]+)?)[\s\"'*.]*", answer or "")
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else math.nan


def digits(likely: Iterable[tuple[str, float]]) -> dict[int, float]:
    """Pairs of a token and its probability -> {digit: p}; {} where anything but a digit is the
    likelier answer."""
    found = {}
    for token, p in likely:
        if token.strip() in set("0123456789"):
            found[int(token)] = found.get(int(token), 0.0) + p
    return found if sum(found.values()) >= 0.5 else {}
