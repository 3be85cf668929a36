"""Captions under pictures: whatever a prompt holds is drawn, in its own place, without boxes."""

import warnings

import matplotlib.pyplot as plt
import pytest
import torch

from common.reporting import captions, pictures

HARD = [
    "a $x_1$ red $\\frac{1}{2$ circle $", "costs $5 and $6", "一只红色的狐狸在雪地里奔跑" * 5,
    "ثعلب أحمر", "🦊 fox", "w" * 300, "W" * 60, "bell\x07 and \x00 nul", "%s {} \\n _ ^", "", "x",
    "a red circle left of a blue square and so on " * 8,
]  # fmt: skip


@pytest.mark.parametrize(
    "words, lines, expected",
    [
        ("a red circle", 2, ["a red", "circle"]),
        ("a red circle", 1, ["a r..."]),
        ("abcdefghijkl", 3, ["abcdef", "ghijkl"]),
        ("abcdefghijklmn", 2, ["abcdef", "ghi..."]),
        ("a bcdefghijkl m", 3, ["a", "bcdefg", "hij..."]),
        ("short", 3, ["short"]),
        ("", 3, []),
    ],
)
def test_lines_break_between_words_and_the_rest_is_cut(words, lines, expected):
    assert captions.wrapped(words, lines, fits=lambda line: len(line) <= 6) == expected


def test_letters_that_no_font_has_are_written_as_numbers():
    assert captions.drawable("a réd circle")[0] == "a réd circle"
    assert captions.drawable("a\x07b\ue123")[0] == "a\\u0007b\\ue123"
    words, families = captions.drawable("狐")
    assert words in ("狐", "\\u72d0") and (len(families) > 1) == (words == "狐")


@pytest.mark.parametrize(
    "save, shape", [(pictures.save_grid, (3, 8, 8)), (pictures.save_strips, (2, 3, 8, 8))]
)
def test_any_prompt_is_drawn_without_boxes_and_beside_the_others(
    save, shape, tmp_path, monkeypatch
):
    titles = []

    def kept(figure):
        renderer = figure.canvas.get_renderer()
        titles.extend(
            (axis.title.get_window_extent(renderer), axis)
            for axis in figure.axes
            if axis.title.get_text()
        )
        images.extend(
            axis.images[0].get_window_extent(renderer) for axis in figure.axes if axis.images
        )

    images = []
    monkeypatch.setattr(plt, "close", kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Glyph ... missing from font(s)"
        save(tmp_path / "samples.png", torch.rand(len(HARD), *shape), HARD, torch.rand(len(HARD)))
    monkeypatch.undo()
    plt.close("all")
    boxes = [box for box, _ in titles]
    assert len(boxes) == len(HARD) and (tmp_path / "samples.png").stat().st_size > 1000
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), HARD[i]
        assert not any(box.shrunk(0.99, 0.9).overlaps(image) for image in images), HARD[i]


def test_a_curve_without_points_is_not_named(tmp_path, monkeypatch):
    labels = []
    real = plt.Axes.legend
    monkeypatch.setattr(plt.Axes, "legend", lambda axis: labels.extend(real(axis).get_texts()))
    rows = [{"step": 0, "reward_mean": 1.0}, {"step": 1, "reward_mean": 2.0}]
    names = {"reward_mean": "training samples", "eval_reward": "held-out prompts"}
    pictures.save_curves(tmp_path / "reward.png", rows, names, "reward")
    pictures.save_curves(tmp_path / "none.png", [], names, "reward")
    assert [label.get_text() for label in labels] == ["training samples"]
