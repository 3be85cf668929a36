"""GenEval (arXiv 2310.11513) as a reward: whether an image shows the objects that its prompt names.

The prompts are lines of JSONL in GenEval's own format, as in its evaluation_metadata.jsonl and in
Flow-GRPO's training set:

    {"tag": "counting", "include": [{"class": "bus", "count": 3}],
     "exclude": [{"class": "bus", "count": 4}], "prompt": "a photo of three buses"}

    geneval          0 to 1, the partial credit that Flow-GRPO (2505.05470) trains on
    geneval:passed   1 or 0, GenEval's own verdict

The official detector is Mask2Former of mmdet. Here it is torchvision's Mask R-CNN, trained on the
same classes of COCO. Thresholds, rules, and colours by CLIP are the official ones. Because of the
detector a score is not comparable with a published one.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.models import detection

from common import errors
from common.prompts import fields_of
from common.rewards import pixels, weights
from common.rewards.clip import Clip

PUBLISHED = detection.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1
OTHER_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
CLASSES = [OTHER_NAMES.get(name, name) for name in PUBLISHED.meta["categories"]]  # by label
COLOURS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = ("left of", "right of", "above", "below")
TEMPLATES = ("a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object")
GREY = 153  # level of the background of a crop, #999
# GenEval's settings: the least confidence of an object, and that for counting; the most objects of
# a class; and the share of their sizes by which the centres of two objects must differ.
CONFIDENT, CONFIDENT_COUNTING, MOST, APART = 0.3, 0.9, 16, 0.1


class Item(NamedTuple):
    """Hold a detected object: its box (left, top, right, bottom) in pixels, and its mask [H, W]."""

    box: Sequence[float]
    mask: torch.Tensor | None = None


Found = dict[str, list[Item]]  # {class: objects}, the most confident first
ColoursOf = Callable[[str, list[Item]], list[str]]  # (class, objects) -> the colour of each


# --- The rules ---


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Return which of RELATIONS hold for a box relative to another one."""
    offset, sizes = [], []
    for low, high in ((0, 2), (1, 3)):
        offset.append((box[low] + box[high] - other[low] - other[high]) / 2)
        sizes.append(abs(box[high] - box[low]) + abs(other[high] - other[low]))
    beyond = [math.copysign(max(abs(by) - APART * size, 0), by) for by, size in zip(offset, sizes)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    across, down = (by / math.hypot(*offset) for by in beyond)
    holds = (across < -0.5, across > 0.5, down < -0.5, down > 0.5)
    return {name for name, true in zip(RELATIONS, holds) if true}


def passed(found: Found, include: list[dict], exclude: list[dict], colours_of: ColoursOf) -> bool:
    """Return whether an image has all objects of `include`, and fewer than each of `exclude`.

    Colour and position are checked for the `count` most confident objects of a class.
    """
    groups, right = [], True
    for wish in include:
        items = found.get(wish["class"], [])[: wish["count"]]
        fits = len(items) == wish["count"]
        if fits and "color" in wish:
            fits = set(colours_of(wish["class"], items)) == {wish["color"]}
        if fits and "position" in wish:
            fits = _placed(items, wish["position"], groups)
        groups.append(items if fits else None)
        right = right and fits
    return right and all(len(found.get(w["class"], [])) < w["count"] for w in exclude)


def credit(found: Found, include: list[dict], colours_of: ColoursOf) -> float:
    """Return 0 to 1: the mean over the wishes for numbers, colours and positions.

    A number n instead of c gives 1 - |n - c| / c, at least 0. A colour gives the share of objects
    that have it, and a position 1 or 0; both give 0 if the number is wrong.
    """
    groups, parts = [], []
    for wish in include:
        items, count = found.get(wish["class"], []), wish["count"]
        fits = len(items) == count
        parts.append(max(0.0, 1 - abs(len(items) - count) / count))
        if "color" in wish:
            named = colours_of(wish["class"], items).count(wish["color"]) if fits else 0
            parts.append(named / count)
            fits = fits and named == count
        if "position" in wish:
            fits = fits and _placed(items, wish["position"], groups)
            parts.append(float(fits))
        groups.append(items if fits else None)
    return sum(parts) / len(parts)


def _placed(items: list[Item], position: list, groups: list[list[Item] | None]) -> bool:
    """Return whether every object has a relation to every object of an earlier group.

    position: [relation, number of the group]; groups: None for one that is wrong itself.
    """
    relation, number = position
    if groups[number] is None:
        return False
    return all(
        relation in relations(item.box, other.box) for item in items for other in groups[number]
    )


def flaw(include: object, exclude: object) -> str:
    """Return what is wrong with the fields include and exclude of a prompt, "" if nothing."""
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        return "include must be a list of objects, and exclude a list"
    for number, wish in enumerate([*include, *exclude]):
        if not isinstance(wish, dict) or not {"class", "count"} <= wish.keys():
            return f"{str(wish)[:60]} needs class and count"
        if wish["class"] not in CLASSES:
            return f"{wish['class']!r} is not a class of COCO"
        if type(wish["count"]) is not int or wish["count"] < 1:
            return f"count {wish['count']!r} is not a number above 0"
        if wish.get("color", COLOURS[0]) not in COLOURS:
            return f"{wish['color']!r} is not one of {', '.join(COLOURS)}"
        if "position" in wish and not _is_position(wish["position"], number):
            return f"position {wish['position']!r} is not [RELATION, NUMBER of an earlier object]"
    return ""


def _is_position(position: object, number: int) -> bool:
    return (
        isinstance(position, list)
        and len(position) == 2
        and position[0] in RELATIONS
        and position[1] in range(number)
    )


# --- Objects and colours in an image ---


def detector() -> detection.MaskRCNN:
    """Return torchvision's Mask R-CNN with random weights. It drops objects below CONFIDENT."""
    return detection.maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=len(CLASSES), box_score_thresh=CONFIDENT
    )


def objects(output: dict[str, torch.Tensor], counting: bool = False) -> Found:
    """Return the objects in the detector's output for one image, at most MOST of a class."""
    least = CONFIDENT_COUNTING if counting else CONFIDENT
    found = {}
    for row in output["scores"].argsort(descending=True).tolist():
        items = found.setdefault(CLASSES[output["labels"][row]], [])
        if output["scores"][row] > least and len(items) < MOST:
            items.append(Item(output["boxes"][row].tolist(), output["masks"][row, 0] > 0.5))
    return {name: items for name, items in found.items() if items}


def crop(levels: torch.Tensor, item: Item) -> torch.Tensor:
    """Return the box of an object in levels [3, H, W], grey outside of its mask.

    Coordinates are rounded as by PIL; what is outside of the image is black.
    """
    if item.mask is not None:
        levels = torch.where(item.mask, levels, GREY)
    left, top, right, bottom = map(round, item.box)
    height, width = levels.shape[-2:]
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    inside = levels[:, max(top, 0) : bottom, max(left, 0) : right]
    edges = (max(-left, 0), max(right - width, 0), max(-top, 0), max(bottom - height, 0))
    return F.pad(inside, edges)


class Colours:
    """Name the colour of objects with a CLIP model, as GenEval does."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.known = {}  # {class: embeddings [D, 10]}

    def of(self, levels: torch.Tensor, name: str, items: list[Item]) -> list[str]:
        """Return the colour of each object of a class in an image of levels [3, H, W]."""
        self.clip.module = weights.placed(self.clip.module, levels.device)
        with weights.autocast(levels.device):
            crops = [self.clip.media(crop(levels, item)[None] / 255).float() for item in items]
            wanted = self._texts(name, levels.device)
        return [COLOURS[i] for i in (F.normalize(torch.cat(crops), dim=-1) @ wanted).argmax(1)]

    def _texts(self, name: str, device: torch.device) -> torch.Tensor:
        """Return the normalised embeddings [D, 10] of a class in each colour, means of 3 texts."""
        if name not in self.known:
            texts = [form.format(colour, name) for colour in COLOURS for form in TEMPLATES]
            embedded = F.normalize(self.clip.texts(texts, device).float(), dim=-1)
            means = embedded.view(len(COLOURS), len(TEMPLATES), -1).mean(1)
            self.known[name] = F.normalize(means, dim=-1).T
        return self.known[name]


# --- The rewards ---


class GenEval:
    """Score images by the partial credit of GenEval's wishes, 0 to 1, as Flow-GRPO trains.

    The detector is torchvision's maskrcnn_resnet50_fpn_v2 (46M weights, BSD-3), in float32. Colours
    come from the reward `clip`. Tests compare the rules with a transcription of GenEval's, and find
    objects in drawn pictures (tests/test_rewards_geneval.py). The scale is an estimate.
    """

    video = False
    fields = ("include",)
    scale = 0.3
    range = (0.0, 1.0)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for the first prompt whose wishes cannot be judged."""
        for prompt in prompts:
            wishes = fields_of(prompt)
            wrong = flaw(wishes["include"], wishes.get("exclude", []))
            if wrong:
                raise ValueError(f"{prompt[:60]!r}: {wrong}")

    def load(self, source: weights.Source, batch: int = 16) -> None:
        """Load the detector and CLIP. Raises InputError if weights are missing or do not fit."""
        path = PUBLISHED.url
        if source.given:
            path = source.find("", PUBLISHED.url.rpartition("/")[2])
            state = weights.read(source.name, path)
        else:
            do = f"download it where there is a network, and give --reward-path {source.name}=FILE"
            with errors.loading(f"reward {source.name}:", PUBLISHED.url, do=do):
                state = PUBLISHED.get_state_dict(progress=False, check_hash=True)
        self.batch = batch
        self.detector = weights.fill(source.name, detector(), state, path)
        self.clip = Clip()
        self.clip.load(source.of("clip"), batch)
        self.colours = Colours(self.clip)

    @torch.no_grad()
    def score(
        self, media: torch.Tensor, prompts: Sequence[str], include: Sequence[list[dict]]
    ) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, 3, H, W] in [0, 1] with b prompts."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        self.detector = self.detector.to(media.device)
        levels = pixels.levels(media)
        outputs = [out for part in levels.split(self.batch) for out in self.detector(part / 255)]
        scores = [self._judged(*row) for row in zip(levels, outputs, prompts, include)]
        return torch.tensor(scores, dtype=torch.float32, device=media.device)

    def _judged(
        self, levels: torch.Tensor, output: dict, prompt: str, include: list[dict]
    ) -> float:
        """Return the score of one image of levels [3, H, W] from the detector's output."""
        wishes = fields_of(prompt)
        found = objects(output, counting=wishes.get("tag") == "counting")

        def colours_of(name: str, items: list[Item]) -> list[str]:
            return self.colours.of(levels, name, items)

        return self.verdict(found, include, wishes.get("exclude", []), colours_of)

    def verdict(
        self, found: Found, include: list[dict], exclude: list[dict], colours_of: ColoursOf
    ) -> float:
        """Return the score of the objects in an image. `exclude` does not change it."""
        return credit(found, include, colours_of)


class GenEvalPassed(GenEval):
    """Score images by GenEval's verdict, 1 or 0."""

    scale = 0.4

    def verdict(
        self, found: Found, include: list[dict], exclude: list[dict], colours_of: ColoursOf
    ) -> float:
        """Return 1 if all wishes are met, else 0."""
        return float(passed(found, include, exclude, colours_of))
