"""lab.compare: seeds of one setting become one line, and the numbers of the table are NumPy's."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

import bpgo
import grpo_base
from common.args import defaults
from common.errors import InputError
from common.reporting.files import write_rows
from common.trainer import run_folder
from lab import compare

STEPS = 12


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(name, script, ...) -> a run's folder, with config.json as the scripts write it, and its
    rows of metrics."""

    def run(name, script=grpo_base, evaluations=True, lost=(), steps=STEPS, **settings):
        monkeypatch.setattr("sys.argv", [script.__file__])
        args = defaults(
            script.Args, **{"reward": ("verifier", "jpeg=2"), "watch": ("clip",), **settings}
        )
        folder = tmp_path / name
        run_folder.claim(folder, args, checkpoint=None, step=0)
        random = np.random.default_rng(args.seed)
        rows = [{"step": step, "ratio_error": 0.0} for step in range(steps)]
        for metric in ("reward_mean", "verifier_mean", "jpeg_mean", "clip_mean"):
            for row in rows:
                row[metric] = float(random.normal())
        for row in rows[::4] if evaluations else ():
            row |= {
                f"eval_{name}": float(random.normal())
                for name in ("reward", "verifier", "jpeg", "clip")
            }
        for step in lost:
            rows[step]["reward_mean"] = math.nan  # null in the file
        write_rows(folder / "metrics.jsonl", rows)
        return folder, rows

    return run


def compared(folder, *runs):
    compare.main(compare.Args(tuple(map(str, runs)), str(folder / "compare")))
    return json.loads((folder / "compare/compare.json").read_text(), parse_constant=pytest.fail)


def test_seeds_of_one_setting_are_one_line_with_mean_and_range(made, tmp_path, capsys):
    runs = [made(f"bpgo-{seed}", bpgo, seed=seed, micro_batch=1 + seed) for seed in range(3)]
    runs += [made(f"base-{seed}", seed=seed) for seed in range(2)]
    rows = compared(tmp_path, *(folder for folder, _ in runs))
    assert [(row["setting"], row["runs"], row["steps"]) for row in rows[::4]] == [
        ("bpgo", 3, 12),
        ("grpo_base", 2, 12),
    ]
    shown = [
        ("reward", "the sum"),
        ("verifier", "trained"),
        ("jpeg", "trained"),
        ("clip", "watched"),
    ]
    assert [(row["reward"], row["kind"]) for row in rows[:4]] == shown
    for row, name in zip(rows, ("reward", "verifier", "jpeg", "clip")):
        evaluations = np.array(
            [[r[f"eval_{name}"] for r in own if f"eval_{name}" in r] for _, own in runs[:3]]
        )
        assert row["samples"] == "held-out" and row["start"] == pytest.approx(
            evaluations[:, 0].mean(), abs=1e-12
        )
        expected = evaluations[:, -1].mean(), evaluations[:, -1].min(), evaluations[:, -1].max()
        assert (row["end"], row["lowest"], row["highest"]) == pytest.approx(expected, abs=1e-12)
    with (tmp_path / "compare/compare.csv").open() as file:
        assert [row["end"] for row in csv.DictReader(file)] == [str(row["end"]) for row in rows]
    said = capsys.readouterr().out.splitlines()
    assert said[0].split(" | ")[3:] == [
        *(f"{name} ({kind})" for name, kind in shown[:-1]),
        "clip (watched) |",
    ]
    assert said[2].startswith(f"| bpgo | 3 | 12 | {rows[0]['start']:.3f} -> {rows[0]['end']:.3f} (")
    with Image.open(tmp_path / "compare/compare.png") as picture:
        assert picture.width > 1000


def test_a_setting_that_changes_numbers_is_another_line_and_names_it(made, tmp_path):
    runs = [
        made("a", bpgo, alpha=0.1)[0],
        made("b", bpgo, alpha=0.9)[0],
        made("c", bpgo, alpha=0.9, seed=7)[0],
    ]
    runs.append(made("d", bpgo, alpha=0.9, learning_rate=1e-3)[0])
    rows = compared(tmp_path, *runs)
    assert [(row["setting"], row["runs"]) for row in rows[::4]] == [
        ("learning_rate=0.0002 alpha=0.1", 1), ("learning_rate=0.0002 alpha=0.9", 2),
        ("learning_rate=0.001 alpha=0.9", 1),
    ]  # fmt: skip


def test_a_step_counts_where_all_runs_have_it(made):
    (one, first), (two, second) = made("one", lost=[3], steps=7), made("two", seed=1, lost=[5])
    (group,) = compare.settings([compare.read(one), compare.read(two)])
    series = group.series("reward_mean")
    assert list(series) == [0, 1, 2, 4, 6]
    a, b = first[4]["reward_mean"], second[4]["reward_mean"]
    assert series[4] == pytest.approx(((a + b) / 2, min(a, b), max(a, b)))


def test_of_seeds_of_different_length_the_ends_are_of_steps_that_both_have(made, tmp_path):
    (one, first), (two, second) = made("one", steps=9), made("two", seed=1, steps=6)
    (row, *_) = compared(tmp_path, one, two, f"{one}/../one")  # one that is named twice is one
    at = [
        rows[4]["eval_reward"] for rows in (first, second)
    ]  # evaluations of steps 0, 4 and 8, and of 0 and 4
    assert row["runs"] == 2 and (row["lowest"], row["highest"]) == pytest.approx((min(at), max(at)))


def test_without_evaluations_the_ends_are_means_of_five_steps(made, tmp_path, capsys):
    folder, rows = made("run", evaluations=False, reward=("verifier",), watch=(), lost=[0])
    (row,) = compared(tmp_path, folder)
    values = [row["verifier_mean"] for row in rows]
    assert (row["samples"], row["reward"]) == ("training", "verifier")
    assert (row["start"], row["end"]) == pytest.approx((np.mean(values[:5]), np.mean(values[-5:])))
    assert ", training |" in capsys.readouterr().out


def test_a_reward_that_a_run_does_not_have_is_none(made, tmp_path):
    folders = [made("one", watch=())[0], made("two", watch=("motion",))[0]]
    rows = compared(tmp_path, *folders)
    assert [row["runs"] for row in rows] == [2, 2, 2, 2]  # what is watched makes no other setting
    assert [row["end"] for row in rows if row["reward"] == "motion"] == [None]


def test_of_a_reward_that_some_runs_watch_those_count(made):
    (one, rows), (two, _) = made("one"), made("two", seed=1)
    write_rows(two / "metrics.jsonl", [{"step": n, "reward_mean": 0.0} for n in range(STEPS)])
    (group,) = compare.settings([compare.read(one), compare.read(two)])
    assert (
        group.series("clip_mean")[3] == (rows[3]["clip_mean"],) * 3
        and len(group.series("reward_mean")) == STEPS
    )
    assert group.ends("clip")[1][0] == rows[8]["eval_clip"]


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "is no run's folder"),
        ("{", "is no run's folder"),
        ("[]", "holds no run"),
        ("{}", "holds no run"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(content, said, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=said):
        compare.main(compare.Args((str(tmp_path),), str(tmp_path / "compare")))
    assert not (tmp_path / "compare").exists()
