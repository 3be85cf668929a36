"""Text rendering: whether an image shows the text that its prompt asks for.

This is the second task of Flow-GRPO (arXiv 2505.05470). The reader is PP-OCRv6, PaddleOCR's small
models for detection (10 MB) and recognition (21 MB). The package rapidocr contains their weights,
so nothing is downloaded.

    wanted   the field "text" of the prompt's line, else the part in double quotes of the caption
    read     what the reader finds, line by line, without lines of a confidence below 0.5
    both     without spaces, in lower case
    ocr            1 if `read` contains `wanted`, else as ocr:whole
    ocr:whole      1 - min(edit distance, length of `wanted`) / length of `wanted`
    ocr:second     as ocr, with another model for recognition: --reward-path ocr:second=FILE.onnx
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.errors import InputError
from common.prompts import fields_of
from common.rewards import pixels
from common.rewards.weights import Source

INSTALL = "pip install 'rapidocr>=3.10' 'onnxruntime<1.27'"  # hpsv2's protobuf is too old for 1.27
DETECTION, RECOGNITION = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"
LINE = 64  # pixels; an image of at most this height is read as one line, without detection
CONFIDENT = 0.5  # PaddleOCR's threshold for a line
LONGEST = 960  # pixels of the longest side in detection, PaddleOCR's limit
HEIGHT, WIDTH = 48, 320  # pixels of a line in recognition; a shorter one is padded to the width


# --- The rule ---


def wanted_text(prompt: str) -> str:
    """Return the text that a prompt asks for, without spaces and in lower case.

    Raises ValueError if there is none.
    """
    text = fields_of(prompt).get("text")
    if text is None:
        parts = prompt.split('"')
        if len(parts) < 3:
            raise ValueError(
                f'{prompt[:80]!r} has no text in double quotes, and its line has no field "text"'
            )
        text = parts[1]
    if not isinstance(text, str) or not plain(text):
        raise ValueError(f"the text that {prompt[:80]!r} asks for is {text!r}, not words")
    return plain(text)


def plain(text: str) -> str:
    """Return text without spaces and in lower case."""
    return text.replace(" ", "").lower()


def edit_distance(a: str, b: str) -> int:
    """Return the least number of letters inserted, deleted or replaced that turn a into b."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            replaced = before + (letter != other)
            before = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, replaced)
    return row[-1]


def agreement(read: str, wanted: str, whole: bool = False) -> float:
    """Return 0 to 1: how well the text that was read agrees with the wanted one, both `plain`.

    whole: count surplus text as wrong. Otherwise any text that contains the wanted one gets 1.
    """
    if not whole and wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


# --- The reader ---


class Reader:
    """Read pictures with rapidocr on one thread of the CPU, `batch` lines at a time."""

    def __init__(self, batch: int = 16, recognition: Path | None = None) -> None:
        """Load the weights.

        recognition: another recognition model of PaddleOCR in ONNX, with its letters inside.
        Raises ImportError, and any exception of rapidocr.
        """
        import rapidocr

        folder = Path(rapidocr.__file__).parent / "models"
        self.engine = rapidocr.RapidOCR(
            params={
                # rapidocr downloads nothing if it gets paths
                "Det.model_path": str(folder / DETECTION),
                "Rec.model_path": str(recognition or folder / RECOGNITION),
                "Det.limit_side_len": LONGEST,
                "Det.limit_type": "max",
                "Rec.rec_batch_num": batch,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Global.log_level": "critical",
            }
        )
        self.engine.recognize_txt([np.zeros((HEIGHT, WIDTH, 3), np.uint8)])  # loads the weights

    def read(self, images: torch.Tensor) -> list[str]:
        """Return the text in each of the images [b, 3, H, W], RGB in [0, 1], with lines joined."""
        pictures = pixels.levels(images).byte().permute(0, 2, 3, 1).cpu().numpy()
        # rapidocr, as PaddleOCR, takes arrays with the channels blue, green, red
        pictures = [np.ascontiguousarray(picture[:, :, ::-1]) for picture in pictures]
        one_line = images.shape[-2] <= LINE
        if one_line:
            lines = [[picture] for picture in pictures]
        else:
            lines = [self._detected(picture) for picture in pictures]
        found = iter(self._recognised([line for part in lines for line in part], not one_line))
        texts = ["".join(next(found) for _ in part) for part in lines]
        return texts

    def _detected(self, picture: np.ndarray) -> list[np.ndarray]:
        """Return the lines of text in a picture [H, W, 3], from top to bottom."""
        from rapidocr.main import RapidOCRError

        try:
            return self.engine.detect_and_crop(picture, {})[0]
        except RapidOCRError:  # raised for a picture without text
            return []

    def _recognised(self, lines: list[np.ndarray], padded: bool) -> list[str]:
        """Return the text of each line [h, w, 3], "" for one that cannot be read with confidence.

        Only lines of equal width are read together: padding to a longer line changes what is read.
        padded: whether lines are padded to a width of at least WIDTH pixels.
        """
        widths = [math.ceil(HEIGHT * line.shape[1] / line.shape[0]) for line in lines]
        if padded:
            widths = [max(width, WIDTH) for width in widths]
        texts = [""] * len(lines)
        for width in sorted(set(widths)):
            rows = [row for row, own in enumerate(widths) if own == width]
            self.engine.text_rec.rec_image_shape = [3, HEIGHT, width]
            found = self.engine.recognize_txt([lines[row] for row in rows])
            for row, text, confidence in zip(rows, found.txts, found.scores):
                if confidence >= CONFIDENT:
                    texts[row] = text
        return texts


# --- The rewards ---


class Ocr:
    """Score images by the text that they show, 0 to 1, by Flow-GRPO's rule for images.

    Further text costs nothing, so a policy can raise the score by writing more. Watch `ocr:whole`.
    The weights are PaddleOCR's PP-OCRv6, Apache-2.0. Tests read rendered text and compare the rule
    with a transcription (tests/test_rewards_ocr.py).
    """

    whole = False
    video = False
    scale = 0.2
    range = (0.0, 1.0)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for the first prompt that asks for no text."""
        for prompt in prompts:
            wanted_text(prompt)

    def load(self, source: Source, batch: int = 16) -> None:
        """Load the reader. Raises InputError if its package is missing."""
        try:
            import onnxruntime  # noqa: F401
            import rapidocr  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"reward {source.name} needs the package {error.name}, which is not installed. "
                f"Run {INSTALL}."
            ) from None
        self.reader = Reader(batch, source.given)

    def text_in(self, media: torch.Tensor) -> list[str]:
        """Return the text that is read in each of media [b, 3, H, W] in [0, 1]."""
        return self.reader.read(media)

    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, 3, H, W] in [0, 1] with b prompts."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        pairs = zip(self.reader.read(media), prompts)
        scores = [agreement(plain(text), wanted_text(p), self.whole) for text, p in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=media.device)


class OcrWhole(Ocr):
    """Score images by the text that they show, 0 to 1, and count surplus text as wrong."""

    whole = True


class OcrSecond(Ocr):
    """Score as `ocr` does, with a second recognition model.

    If the two scores move apart in training, the policy fools the first model.
    """

    def load(self, source: Source, batch: int = 16) -> None:
        """Load the reader. Raises InputError if no model is given."""
        if source.given is None:
            raise InputError(
                f"reward {source.name} needs a second recognition model. Give --reward-path "
                f"{source.name}=FILE.onnx, a model of PaddleOCR in ONNX."
            )
        super().load(source, batch)
