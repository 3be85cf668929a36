"""The attacker sees what went wrong; `python -m benchmarks.attacks` attacks 300 times."""

import json
import random
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks import attacks, silent
from common.trainer import checkpoint_files

GOOD = "error: --steps 0: must be from 1\n"
TRACE = "Traceback (most recent call last):\n  File x\nKeyError: 1\n"


def verdict(tmp_path, said="", code=0, seconds=1.0, memory=0, **attack):
    (tmp_path / "stderr.txt").write_text(said)
    status = -code if code < 0 else code << 8
    return attacks.verdict(
        attacks.Attack("SIGTERM", [], **attack), tmp_path, status, seconds, memory
    )[0]


def test_an_attack_that_ends_well(tmp_path):
    assert verdict(tmp_path) == "its end"
    assert verdict(tmp_path, GOOD, 2) == "one line"
    assert (
        verdict(tmp_path, "╭─ Parsing error ─╮\n│ --stepz │\n│ For full helptext, see --help │", 2)
        == "one line"
    )
    assert verdict(tmp_path, code=-signal.SIGTERM) == "one line"


@pytest.mark.parametrize(
    "given, result",
    [
        (dict(said=TRACE, code=1), "a traceback"),
        (dict(said=GOOD + TRACE, code=1), "a traceback"),
        (dict(code=1), "0 lines"),
        (dict(said=GOOD * 2, code=2), "2 lines"),
        (dict(said=f"error: {'x' * 2000}", code=2), "1 lines"),
        (dict(seconds=attacks.WAIT + 1), "a hang"),
        (dict(code=-signal.SIGXCPU), "a hang"),
        (dict(code=-signal.SIGSEGV), "an end by signal"),
        (dict(memory=attacks.MEMORY + 1), "too much memory"),
    ],
)
def test_an_attack_that_does_not(given, result, tmp_path):
    assert verdict(tmp_path, **given) == result


def test_steps_that_are_lost_are_seen(tmp_path):
    (tmp_path / "run/export").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"reward_mean": 0}\n' * 2 + '{"eval_reward": 0}\n')
    assert verdict(tmp_path, GOOD, 1) == "a loss"
    for step in (1, 2):
        checkpoint_files.begin(tmp_path / "run", step)
        checkpoint_files.put(tmp_path / "run", step, {"prior": {}})
        checkpoint_files.publish(tmp_path / "run", step, {"prior": 0})
        assert verdict(tmp_path, GOOD, 1) == ("a loss" if step == 1 else "one line")
    assert verdict(tmp_path) == "its end"
    (tmp_path / "run/export").rmdir()
    assert verdict(tmp_path) == "a loss"


def test_what_an_attack_had_to_leave_alone(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("a")
    assert verdict(tmp_path, kept=((kept, b"a"),)) == "its end"
    assert verdict(tmp_path, kept=((kept, b"b"),)) == "a loss"


def test_what_is_wrong_in_silence_is_seen(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    for place in (whole, tmp_path):
        (place / "run/export").mkdir(parents=True)

    def write(place, gradient, steps=1):
        row = json.dumps({"reward_mean": 0.5, "grad_norm": gradient}) + "\n"
        (place / "run/metrics.jsonl").write_text(steps * row + '{"eval_reward": 0}\n')

    write(whole, 0.2)
    monkeypatch.setitem(attacks._finished, "plain", whole)
    given = dict(twin=attacks.Attack("plain", []), saved=False)
    for gradient, steps, result in (
        (0.2001, 1, "its end"),  # rounding
        (0.05, 1, "wrong in silence"),  # a quarter
        (0.2, 2, "wrong in silence"),
    ):
        write(tmp_path, gradient, steps)
        assert verdict(tmp_path, **given) == result
    assert verdict(tmp_path, GOOD, 2, **given) == "one line"
    other = dict(saved=False, wrong=lambda folder: "other pixels")
    assert verdict(tmp_path, **other) == "wrong in silence"
    assert verdict(tmp_path, saved=False, wrong=lambda folder: "") == "its end"


@pytest.mark.parametrize("kind", silent.KINDS)
def test_every_kind_of_silence_can_be_drawn(kind, tmp_path):
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        attack = silent.KINDS[kind](random.Random(number), folder)
        assert attack.what and (attack.wrong or attack.twin)


@pytest.mark.slow
def test_a_round_of_attacks_leaves_every_run_whole():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.attacks", "--number", "35"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "35 of 35 without traceback, hang or loss" in done.stdout
