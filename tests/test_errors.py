"""What a machine, a signal or somebody's code can do to a run: one line each, and no finished step
is lost."""

import io
import os
import re
import signal
import sys

import pytest
import torch

from common import errors, rewards
from common.errors import InputError, RunError
from common.trainer import checkpoints
from common.trainer.runtime import Runtime

SAY = "a réd circle 中"


def ended(action):
    """The exit code of a program that does this; 0 if it comes to its end."""
    try:
        errors.run(lambda _: action(), None)
    except SystemExit as exit:
        return exit.code
    return 0


def raises(error):
    raise error


# --- The machine ---


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), r"out of memory \(MemoryError\): lower --micro-batch"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory .*--lora-rank",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to"),
            "out of memory .*CUDA out of memory",
        ),
        (
            OSError(28, "No space left on device", "metrics.jsonl"),
            "No space left on device: 'metrics.jsonl'",
        ),
        (RuntimeError("[gloo] connection closed"), "another process of this run is gone"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error, words, capsys):
    assert ended(lambda: raises(error)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{words}", line)


def test_a_line_is_no_longer_than_a_person_reads_and_moves_no_cursor(capsys):
    assert ended(lambda: raises(InputError(f"no \x1b[2J{'a' * 5000}; take another"))) == 2
    line = capsys.readouterr().err
    assert (
        line.startswith(r"error: no \x1b[2Jaaa")
        and line.endswith("aaa; take another\n")
        and len(line) < 1020
    )


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        errors.run(lambda _: raises(RuntimeError("a bug")), None)


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyError("a bug")])
def test_finished_steps_are_saved_whatever_ends_the_run(
    train, monkeypatch, capsys, tmp_path, error
):
    real = Runtime.update
    monkeypatch.setattr(
        Runtime, "update", lambda run: raises(error) if run.step == 1 else real(run)
    )
    code = 0
    try:
        code = ended(lambda: train(steps=3, save_every=0))
    except KeyError:
        code = "traceback"
    assert code == ("traceback" if isinstance(error, KeyError) else 1)
    assert "1 steps are saved; go on with" in capsys.readouterr().out
    assert [path.name for path in checkpoints.newest_first(tmp_path / "run")] == ["step_000001"]


# --- Streams ---


def full_device():
    return open("/dev/full", "w")


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("stream", [full_device, closed_pipe])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_run_outlives_its_output(monkeypatch, stream, name, capsys):
    done = []
    with stream() as broken:
        monkeypatch.setattr(sys, name, broken)
        code = ended(
            lambda: [
                (print("x" * 99, flush=True), sys.stderr.write("y\n"), done.append(i))
                for i in range(3)
            ]
        )
        monkeypatch.undo()
    assert code == 0 and done == [0, 1, 2]
    if name == "stdout":
        assert "warning: standard output ended early: [Errno" in capsys.readouterr().err


def test_letters_that_the_terminal_lacks_are_written_as_numbers(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert ended(lambda: (print(SAY), raises(InputError(SAY)))) == 2
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        assert rb"a r\xe9d circle \u4e2d" in stream.buffer.getvalue()


# --- Rewards are anybody's code ---


class Reward:
    scale, range, video = 1.0, (0.0, 1.0), False

    def __init__(self, score):
        self.score = lambda media, prompts: score(media)


class Silent(Exception):
    def __str__(self):
        raise ValueError("not even this")


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(3),
        MemoryError(),
        Silent(),
        GeneratorExit(),
        ValueError("x" * 9999),
    ],
)
def test_whatever_a_reward_raises_is_that_rewards_error(error):
    scorers = {
        "bad": Reward(lambda media: raises(error)),
        "fine": Reward(lambda media: media.mean((1, 2, 3))),
    }
    with errors.one_line():  # where Ctrl-C has a class of its own
        scores = rewards.score(scorers, torch.zeros(2, 3, 4, 4), ["a", "b"])
    assert scores["fine"].isfinite().all()
    with pytest.raises(
        RunError, match=f"^reward bad raised {type(error).__name__}: .*line \\d+"
    ) as caught:
        rewards.check_finite(
            {name: value[:, None] for name, value in scores.items()}, scorers, ["a", "b"]
        )
    assert len(str(caught.value)) < 900


def test_ctrl_c_while_a_reward_computes_ends_the_run(capsys):
    scorers = {"slow": Reward(lambda media: os.kill(os.getpid(), signal.SIGINT))}
    assert ended(lambda: rewards.score(scorers, torch.zeros(1, 3, 4, 4), ["a"])) == 130
    assert capsys.readouterr().err.startswith("stopped: SIGINT")
    with pytest.raises(KeyboardInterrupt):  # outside of a run, too
        rewards.score(scorers, torch.zeros(1, 3, 4, 4), ["a"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "kind",
    [
        lambda v: v.requires_grad_(True) * 1,
        lambda v: v.to(torch.float64).requires_grad_(True),
        lambda v: v.half(),
        lambda v: v.tolist(),
        lambda v: v.numpy(),
    ],
)
def test_scores_with_a_graph_of_another_type_or_no_tensors_are_taken(kind, train, monkeypatch):
    values = rewards.score(
        {"r": Reward(lambda m: kind(torch.tensor([0.5, 0.25])))}, torch.zeros(2, 3, 4, 4), "ab"
    )["r"]
    assert (
        values.tolist() == [0.5, 0.25]
        and values.dtype == torch.float32
        and not values.requires_grad
    )


@pytest.mark.parametrize(
    "score, words",
    [
        (lambda m: torch.zeros(len(m), device="meta"), "NotImplementedError"),
        (lambda m: None, "raised"),
        (lambda m: ["a"] * len(m), "raised"),
        (lambda m: m.zero_().mean((1, 2, 3)), "changed the media"),
    ],
)
def test_what_is_no_score_is_refused(score, words):
    scorers = {"bad": Reward(score)}
    scores = rewards.score(scorers, torch.ones(2, 3, 4, 4), ["a", "b"])
    with pytest.raises(RunError, match=f"reward bad .*{words}"):
        rewards.check_finite({"bad": scores["bad"][:, None]}, scorers, ["a", "b"])
