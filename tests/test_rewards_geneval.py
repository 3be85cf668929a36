"""The reward geneval: its rules against a transcription of GenEval's definitions, colours against
open_clip and PIL, and a real Mask R-CNN with weights made by hand on drawn pictures whose answer is
known."""

import json
import random

import numpy as np
import open_clip
import pytest
import torch
from learned import as_pil, clip_folder, photo, score_all
from PIL import Image
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from common.errors import InputError
from common.prompts import read_prompts
from common.rewards import geneval, table
from common.rewards.clip import Clip
from common.rewards.geneval import CLASSES, COLOURS, Item
from common.rewards.weights import Source

# --- The rules ---


def transcribed_relations(a, b):
    """GenEval, appendix: centres must differ by more than .1 of both sizes, and the rest must make
    up more than half of the distance."""
    a, b = np.array(a, dtype=float).reshape(2, 2), np.array(b, dtype=float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    rest = np.abs(offset) - 0.1 * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    rest = np.where(rest > 0, rest, 0) * np.sign(offset)
    if (np.abs(rest) < 1e-3).all():
        return set()
    x, y = rest / np.sqrt((offset**2).sum())
    return {
        name
        for name, true in {
            "left of": x < -0.5,
            "right of": x > 0.5,
            "above": y < -0.5,
            "below": y > 0.5,
        }.items()
        if true
    }


def transcribed_verdict(objects, include, exclude, colour):
    """objects {class: boxes, best first}; colour {box: its colour}. All of include, none of
    exclude; colour and position by the best ones."""
    verdict, matched = True, []
    for wish in include:
        best = objects.get(wish["class"], [])[: wish["count"]]
        good = len(best) >= wish["count"]
        if good and "color" in wish:
            good = sum(colour[box] == wish["color"] for box in best) >= wish["count"]
        if good and "position" in wish:
            expected, target = wish["position"]
            good = matched[target] is not None
            for box in best if good else []:
                for other in matched[target]:
                    good = good and expected in transcribed_relations(box, other)
        matched.append(best if good else None)
        verdict = verdict and good
    too_many = any(len(objects.get(wish["class"], [])) >= wish["count"] for wish in exclude)
    return verdict and not too_many


def scenes(number):
    """Random objects of three classes, and wishes of each of GenEval's six kinds."""
    choose = random.Random(0)
    for _ in range(number):
        classes = choose.sample(["dog", "bus", "tv remote"], 3)
        objects = {}
        for name in classes[: choose.randint(1, 3)]:
            corners = [(choose.randint(0, 60), choose.randint(0, 60)) for _ in range(4)]
            sizes = [(choose.randint(1, 40), choose.randint(1, 40)) for _ in range(4)]
            boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, sizes)]
            objects[name] = boxes[: choose.choice([1, 1, 1, 2, 3, 4])]
        colour = {box: choose.choice(COLOURS[:2]) for boxes in objects.values() for box in boxes}
        include = [{"class": classes[0], "count": choose.choice([1, 1, 2, 3])}]
        exclude = []
        kind = choose.choice(["single", "two", "counting", "colors", "position", "color_attr"])
        if kind in ("two", "position", "color_attr"):
            include.append({"class": classes[1], "count": 1})
        if kind == "counting":
            exclude = [{"class": classes[0], "count": include[0]["count"] + 1}]
        if kind in ("colors", "color_attr"):
            for wish in include:
                wish["color"] = choose.choice(COLOURS[:2])
        if kind == "position":
            include[1]["position"] = [choose.choice(geneval.RELATIONS), 0]
        yield kind, objects, include, exclude, colour


def test_the_verdict_is_genevals():
    right = {}
    for kind, objects, include, exclude, colour in scenes(4000):
        found = {name: [Item(box) for box in boxes] for name, boxes in objects.items()}
        ours = geneval.passed(
            found, include, exclude, lambda _, items, c=colour: [c[item.box] for item in items]
        )
        assert ours == transcribed_verdict(objects, include, exclude, colour)
        assert geneval.flaw(include, exclude) == ""
        right.setdefault(kind, []).append(ours)
    assert all(0.02 < np.mean(verdicts) < 0.9 for verdicts in right.values()) and len(right) == 6


def test_relations_are_genevals():
    choose, seen = random.Random(1), set()
    for _ in range(3000):
        boxes = []
        for _ in range(2):
            x, y = choose.randint(0, 50), choose.randint(0, 50)
            boxes.append((x, y, x + choose.randint(0, 30), y + choose.randint(0, 30)))
        ours = geneval.relations(*boxes)
        assert ours == transcribed_relations(*boxes)
        seen.add(frozenset(ours))
    assert len(seen) == 9  # none, each alone, and the four corners


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
AT = [(0, 0, 10, 10), (40, 0, 50, 10), (0, 40, 10, 50), (40, 40, 50, 50)]


@pytest.mark.parametrize(
    "objects, include, expected",
    [
        ({}, [DOG], 0),
        ({"dog": 1}, [DOG], 1),
        ({"dog": 2}, [DOG], 0),
        ({"dog": 1}, [DOG, CAT], 0.5),
        ({"dog": 3}, [{"class": "dog", "count": 4}], 0.75),
        ({"dog": 6}, [{"class": "dog", "count": 4}], 0.5),
        ({"dog": 9}, [{"class": "dog", "count": 4}], 0),  # Flow-GRPO's code would give -0.25
        ({"dog": 1}, [{**DOG, "color": "red"}], 1),
        ({"dog": 1}, [{**DOG, "color": "blue"}], 0.5),
        ({"dog": 2}, [{"class": "dog", "count": 2, "color": "red"}], 0.75),
        ({"dog": 1, "cat": 1}, [DOG, {**CAT, "position": ["left of", 0]}], 2 / 3),
        ({"dog": 1, "cat": 2}, [CAT, {**DOG, "position": ["left of", 0]}], 1 / 3),
        ({"dog": 1, "cat": 1}, [{**DOG, "color": "blue"}, {**CAT, "color": "red"}], 3 / 4),
    ],
)
def test_partial_credit_by_hand(objects, include, expected):
    """The first object of each class is red, the others are green."""
    found = {name: [Item(box) for box in AT[:1] * (n > 0)] for name, n in objects.items()}
    for name, n in objects.items():
        found[name] += [Item(AT[1 + i % 3]) for i in range(n - 1)]

    def colours_of(name, items):
        return ["red" if item.box == AT[0] else "green" for item in items]

    assert geneval.credit(found, include, colours_of) == pytest.approx(expected)


@pytest.mark.parametrize(
    "line, said",
    [
        ({"prompt": "a dog"}, "needs the field 'include', which 'a dog' lacks"),
        ({"prompt": "a dog", "include": []}, "must be a list of objects"),
        ({"prompt": "a dog", "include": [{"class": "dog"}]}, "needs class and count"),
        ({"prompt": "a fox", "include": [{"class": "fox", "count": 1}]}, "'fox' is not a class"),
        ({"prompt": "a dog", "include": [{**DOG, "count": 0}]}, "not a number above 0"),
        ({"prompt": "a dog", "include": [{**DOG, "color": "cyan"}]}, "'cyan' is not one of red"),
        ({"prompt": "a", "include": [{**DOG, "position": ["above", 0]}]}, "of an earlier object"),
    ],
)
def test_wishes_that_cannot_be_judged_are_refused(line, said, tmp_path):
    path = tmp_path / "prompts.jsonl"
    good = {"prompt": "a cat", "include": [CAT], "tag": "single_object"}
    path.write_text("\n".join(map(json.dumps, (good, line))))
    with pytest.raises(InputError) as error:
        table.load(["geneval"], read_prompts(path))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert "lacks" in said or f"row 2 of {path}" in str(error.value)


# --- Colours ---


def official_colours(folder, image, name, boxes, masks):
    """GenEval's color_classification with PIL and open_clip; image [3, H, W]."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    picture = as_pil(image)
    blank = Image.new("RGB", picture.size, color="#999")
    with torch.no_grad():
        classifier = []
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} {name}",
                f"a photo of a {colour}-colored {name}",
                f"a photo of a {colour} object",
            ]
            embedded = model.encode_text(tokenizer(texts))
            mean = (embedded / embedded.norm(dim=-1, keepdim=True)).mean(0)
            classifier.append(mean / mean.norm())
        crops = []
        for box, mask in zip(boxes, masks):
            part = Image.composite(picture, blank, Image.fromarray(mask.numpy()))
            crops.append(transform(part.crop(box)))
        features = model.encode_image(torch.stack(crops))
        features = features / features.norm(dim=-1, keepdim=True)
        return [COLOURS[i] for i in (100 * features @ torch.stack(classifier).T).argmax(1)]


def test_colours_are_those_of_the_official_code(tmp_path):
    folder = clip_folder(tmp_path / "clip", seed=3)
    clip = Clip()
    clip.load(Source("clip", {"clip": str(folder)}), 4)
    choose = random.Random(0)
    image = photo(90, 120, seed=5)
    boxes, masks = [], []
    for seed in range(24):
        left, top = choose.uniform(0, 80), choose.uniform(0, 60)
        boxes.append((left, top, left + choose.uniform(3, 40), top + choose.uniform(3, 30)))
        generator = torch.Generator().manual_seed(seed)
        masks.append(torch.rand(90, 120, generator=generator) > 0.3)
    items = [Item(box, mask) for box, mask in zip(boxes, masks)]
    ours = geneval.Colours(clip).of(image * 255, "bench", items)
    assert ours == official_colours(folder, image, "bench", boxes, masks)
    assert len(set(ours)) > 1


# --- Drawn pictures, a real detector ---

SIDE, OBJECT = 96, 16  # pixels of a picture and of an object
SOLID, HOLLOW = "clock", "donut"


class Backbone(nn.Module):
    """How far each pixel is from grey, and the mean of that over an object's size around it."""

    out_channels = 2

    def __init__(self):
        super().__init__()
        self.apart = nn.Conv2d(3, 6, 1)
        self.sum = nn.Conv2d(6, 1, 1, bias=False)

    def forward(self, x):
        far = self.sum(self.apart(x).relu()).clamp(0, 1)
        mean = nn.functional.avg_pool2d(far, OBJECT, stride=1, padding=OBJECT // 2)
        return torch.cat([far, mean[..., : x.shape[-2], : x.shape[-1]]], dim=1)


class Predictor(nn.Module):
    """Scores of the classes and no change of the boxes."""

    def __init__(self, inputs, classes):
        super().__init__()
        self.scores, self.classes = nn.Linear(inputs, classes), classes

    def forward(self, x):
        return self.scores(x), x.new_zeros(len(x), 4 * self.classes)


def small_detector():
    """torchvision's Mask R-CNN for squares of one size, with weights that are not set."""
    return MaskRCNN(
        Backbone(),
        min_size=SIDE,
        max_size=SIDE,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(((OBJECT,),), ((1.0,),)),
        rpn_head=RPNHead(2, 1),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_head=nn.Flatten(),
        box_predictor=Predictor(2 * 49, len(CLASSES)),
        box_score_thresh=geneval.CONFIDENT,
        mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        mask_head=nn.Identity(),
        mask_predictor=nn.Conv2d(2, len(CLASSES), 1),
    )


@torch.no_grad()
def set_by_hand(model):
    for weight in model.parameters():
        weight.zero_()
    apart, heads = model.backbone.apart, model.roi_heads
    apart.weight[:3, :, 0, 0], apart.weight[3:, :, 0, 0] = torch.eye(3), -torch.eye(3)
    apart.bias[:3], apart.bias[3:] = -0.5, 0.5
    model.backbone.sum.weight.fill_(4.0)
    model.rpn.head.conv[0][0].weight[1, 1, 1, 1] = 1.0  # the mean is how much of an object is there
    model.rpn.head.cls_logits.weight[0, 1] = 1.0
    inner = torch.zeros(7, 7)
    inner[2:5, 2:5] = 1 / 9
    outer = (1 - 9 * inner) / 40
    scores = heads.box_predictor.scores
    for name, centre in ((SOLID, 1), (HOLLOW, -1)):  # the ring is there, the centre is or is not
        scores.weight[CLASSES.index(name), :49] = 30 * (outer + centre * inner).flatten()
    scores.bias.fill_(-30.0)
    scores.bias[0] = 0.0
    scores.bias[CLASSES.index(SOLID)], scores.bias[CLASSES.index(HOLLOW)] = -52.5, -21.0
    heads.mask_predictor.weight[:, 0] = 20.0
    heads.mask_predictor.bias.fill_(-10.0)
    return model


def picture(*things):
    """[3, SIDE, SIDE] of (class, left, top, colour): squares on grey."""
    image = torch.full((3, SIDE, SIDE), 0.5)
    for name, left, top, colour in things:
        ink = torch.tensor(colour)[:, None, None]
        image[:, top : top + OBJECT, left : left + OBJECT] = ink
        if name == HOLLOW:
            image[:, top + 4 : top + 12, left + 4 : left + 12] = 0.5
    return image


RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
ONE, TWO, THREE = ({"class": SOLID, "count": n} for n in (1, 2, 3))
RING = {"class": HOLLOW, "count": 1}
PICTURES = {
    "empty": picture(),
    "a clock": picture((SOLID, 10, 20, RED)),
    "a donut": picture((HOLLOW, 10, 20, RED)),
    "three clocks": picture((SOLID, 5, 5, RED), (SOLID, 40, 30, BLUE), (SOLID, 70, 70, RED)),
    "a clock left of a donut": picture((SOLID, 8, 40, RED), (HOLLOW, 66, 44, BLUE)),
    "a clock above a donut": picture((SOLID, 40, 8, RED), (HOLLOW, 42, 66, BLUE)),
}
LEFT = [RING, {**ONE, "position": ["left of", 0]}]
ANSWERS = [  # tag, include, exclude, {picture: (credit, verdict)}
    ("single_object", [ONE], [], {"empty": (0, 0), "a clock": (1, 1), "a donut": (0, 0)}),
    ("single_object", [RING], [], {"a clock": (0, 0), "a donut": (1, 1)}),
    ("two_object", [ONE, RING], [], {"a clock": (0.5, 0), "a clock left of a donut": (1, 1)}),
    ("counting", [THREE], [], {"a clock": (1 / 3, 0), "three clocks": (1, 1)}),
    ("counting", [TWO], [THREE], {"three clocks": (0.5, 0)}),
    ("counting", [TWO], [], {"three clocks": (0.5, 1)}),
    (
        "position",
        LEFT,
        [],
        {"a clock left of a donut": (1, 1), "a clock above a donut": (2 / 3, 0), "empty": (0, 0)},
    ),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geneval")
    torch.save(set_by_hand(small_detector()).state_dict(), folder / "detector.pth")
    clip_folder(folder / "clip")
    path = folder / "detector.pth"
    return [f"geneval={path}", f"geneval:passed={path}", f"clip={folder / 'clip'}"]


@pytest.fixture
def scorers(paths, monkeypatch):
    monkeypatch.setattr(geneval, "detector", small_detector)
    return table.load(["geneval", "geneval:passed"], [], paths, reward_batch=3)


def prompts_of(folder, rows):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return read_prompts(path)


def test_drawn_pictures_get_the_score_that_is_known(scorers, tmp_path):
    rows, media, known = [], [], []
    for tag, include, exclude, answers in ANSWERS:
        for name, answer in answers.items():
            rows.append(dict(prompt=name, tag=tag, include=include, exclude=exclude))
            media.append(PICTURES[name])
            known.append(answer)
    scores = score_all(scorers, torch.stack(media), prompts_of(tmp_path, rows))
    assert scores["geneval"].tolist() == pytest.approx([credit for credit, _ in known])
    assert scores["geneval:passed"].tolist() == [verdict for _, verdict in known]


def test_boxes_and_masks_are_the_drawn_ones(scorers):
    image = PICTURES["a clock above a donut"]
    (output,) = scorers["geneval"].detector(image[None])
    found = geneval.objects(output)
    assert {name: len(items) for name, items in found.items()} == {SOLID: 1, HOLLOW: 1}
    for name, corner in ((SOLID, (40, 8)), (HOLLOW, (42, 66))):
        (item,) = found[name]
        assert item.box == pytest.approx([*corner, *(c + OBJECT for c in corner)], abs=1)
        left, top = corner
        inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        inside[top - 2 : top + OBJECT + 2, left - 2 : left + OBJECT + 2] = True
        assert not item.mask[~inside].any(), name
        assert item.mask[top + 1 : top + 3, left + 1 : left + 15].all(), name
        centre = item.mask[top + 6 : top + 10, left + 6 : left + 10]
        assert centre.all() if name == SOLID else not centre.any()


def test_thresholds_and_the_most_of_a_class():
    output = {
        "scores": torch.tensor([0.95, 0.5, 0.29] + [0.6] * 20),
        "labels": torch.tensor([CLASSES.index("dog")] * 3 + [CLASSES.index("tv remote")] * 20),
        "boxes": torch.arange(92.0).view(23, 4),
        "masks": torch.ones(23, 1, 4, 4),
    }
    found = geneval.objects(output)
    assert [item.box[0] for item in found["dog"]] == [0, 4] and len(found["tv remote"]) == 16
    assert {name: len(items) for name, items in geneval.objects(output, True).items()} == {"dog": 1}


def test_colours_reach_the_score(scorers, tmp_path):
    """Whatever a CLIP of random weights calls the square, that colour is right and others not."""
    image = PICTURES["a clock"]
    scorer = scorers["geneval:passed"]
    found = geneval.objects(scorer.detector(image[None])[0])
    (colour,) = scorer.colours.of(image * 255, SOLID, found[SOLID])
    rows = [{"prompt": "a", "include": [{**ONE, "color": wanted}]} for wanted in COLOURS]
    prompts = prompts_of(tmp_path, rows)
    scores = score_all({"passed": scorer}, image.expand(10, -1, -1, -1), prompts)["passed"]
    assert scores.tolist() == [float(wanted == colour) for wanted in COLOURS]


def test_the_official_names_are_the_detectors():
    assert len(CLASSES) == 91 and len(set(CLASSES)) == 82 and CLASSES[85] == "clock"
    assert {"computer keyboard", "computer mouse", "tv remote", "hair drier"} <= set(CLASSES)
    model = geneval.detector()
    count = sum(weight.numel() for weight in model.parameters())
    assert count == geneval.PUBLISHED.meta["num_params"]
    assert model.roi_heads.score_thresh == geneval.CONFIDENT


def test_missing_weights_name_the_address_and_the_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(InputError) as error:
        table.load(["geneval"], [])
    message = str(error.value)
    assert f"reward geneval: {geneval.PUBLISHED.url} does not load" in message
    assert "give --reward-path geneval=FILE" in message and "\n" not in message
