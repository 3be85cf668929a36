"""Prompt files as people write them, and the order in which a run visits them."""

from collections import Counter

import pytest

from common.errors import InputError
from common.prompts import prompts_of_step, read_prompts


def written(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    return path


# --- Files ---


@pytest.mark.parametrize(
    "content, prompts",
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),  # no newline at the end
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),  # byte-order mark
        (b"one\r\n\r\ntwo\r\n", ["one", "two"]),
        (b"\n\n  one  \n \t \n\ntwo\n\n", ["one", "two"]),
        (b"same\nother\nsame\nsame\n", ["same", "other", "same", "same"]),
        (b'a "quoted", comma = sign\n# no comment\n', ['a "quoted", comma = sign', "# no comment"]),
    ],
)
def test_lines(tmp_path, content, prompts):
    assert read_prompts(written(tmp_path, content)) == prompts
    assert read_prompts(str(written(tmp_path, content))) == prompts


@pytest.mark.parametrize(
    "prompt",
    ["a 🦊 and a 👩‍🚀 at 5 °C", "חתול על מחצלת", "قطة \u200fتجلس على\u200e الأريكة", "一只猫坐在垫子上", "x" * 10_000],
)
def test_any_text_comes_back_unchanged(tmp_path, prompt):
    assert read_prompts(written(tmp_path, f"first\n{prompt}\nlast\n".encode())) == ["first", prompt, "last"]


def test_bad_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b"\xef\xbb\xbf\n  \r\n\t\n")
    (tmp_path / "latin1.txt").write_bytes("one\ncafé\n".encode("latin-1"))
    (tmp_path / "utf16.txt").write_bytes("one\ntwo\n".encode("utf-16"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    (tmp_path / "folder").mkdir()
    for name, reason in {
        "missing.txt": "No such file",
        "folder": "Is a directory",
        "empty.txt": "no prompt in it",
        "blank.txt": "no prompt in it",
        "latin1.txt": "not UTF-8 text (byte 7)",
        "utf16.txt": "not UTF-8 text (byte 0)",
        "image.png": "not UTF-8 text (byte 0)",
    }.items():
        with pytest.raises(InputError) as error:
            read_prompts(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and reason in str(error.value)
        assert "\n" not in str(error.value)


# --- Order ---

PROMPTS = [f"prompt {i}" for i in range(12)]


@pytest.mark.parametrize("number", [1, 3, 4, 12])
@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_each_epoch_visits_each_prompt_once(number, seed):
    steps = 12 // number
    epochs = [
        [p for step in range(e * steps, (e + 1) * steps) for p in prompts_of_step(PROMPTS, step, number, seed)]
        for e in range(5)
    ]
    assert all(sorted(epoch) == sorted(PROMPTS) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5  # every epoch in another order


@pytest.mark.parametrize("number", [5, 7])
def test_epochs_run_across_steps(number):
    visited = [p for step in range(12) for p in prompts_of_step(PROMPTS, step, number, seed=0)]
    assert set(Counter(visited).values()) == {number}  # 12 steps of `number` prompts are `number` epochs
    for epoch in range(number):
        assert sorted(visited[12 * epoch : 12 * epoch + 12]) == sorted(PROMPTS)
    one_by_one = [p for i in range(12 * number) for p in prompts_of_step(PROMPTS, i, 1, seed=0)]
    assert visited == one_by_one  # the size of a step does not change the order


def test_order_depends_on_the_step_and_seed_alone():
    forward = [prompts_of_step(PROMPTS, step, 5, seed=3) for step in range(20)]
    assert [prompts_of_step(PROMPTS, step, 5, seed=3) for step in reversed(range(20))] == forward[::-1]
    assert prompts_of_step(PROMPTS, 17, 5, seed=3) == forward[17]
    orders = {tuple(p for step in range(12) for p in prompts_of_step(PROMPTS, step, 5, s)) for s in range(50)}
    assert len(orders) == 50


def test_seeds_do_not_share_epochs():
    orders = {(tuple(prompts_of_step(PROMPTS, epoch, 12, seed))) for seed in range(30) for epoch in range(30)}
    assert len(orders) == 900


def test_more_prompts_a_step_than_there_are():
    step = prompts_of_step(PROMPTS, 0, 30, seed=0)
    assert sorted(step[:12]) == sorted(step[12:24]) == sorted(PROMPTS)
    assert len(step) == 30 and len(set(step[24:])) == 6
    assert step[24:] + prompts_of_step(PROMPTS, 1, 30, seed=0)[:6] == prompts_of_step(PROMPTS, 2, 12, seed=0)


def test_a_single_prompt():
    assert prompts_of_step(["only"], 7, 3, seed=0) == ["only"] * 3


def test_duplicates_are_visited_as_often_as_they_stand():
    visited = [p for step in range(4) for p in prompts_of_step(["a", "b", "a", "c"], step, 1, seed=0)]
    assert Counter(visited) == {"a": 2, "b": 1, "c": 1}
