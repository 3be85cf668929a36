"""What the machine, a signal or a user's code can do to a run: one line, and no finished step is
lost."""

import importlib
import io
import os
import signal
import sys

import pytest
import torch

from common import errors
from common.errors import InputError, RunError
from common.rewards import Rewards
from common.trainer import Policy, checkpoint_files

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


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """error.log goes into a folder of the test."""
    monkeypatch.setattr(errors, "run_folder", tmp_path)


# --- The one line ---


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "CUDA out of memory"),
        (OSError(28, "No space left on device", "metrics.jsonl"), "No space left on device: 'metr"),
        (RuntimeError("[gloo] connection closed"), "another process of this run ended"),
        (RuntimeError("a bug"), "RuntimeError: a bug"),
    ],
)
def test_an_exception_is_one_line_and_its_traceback_goes_to_the_log(error, words, capsys, tmp_path):
    assert ended(lambda: raises(error)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert line.endswith(f"(traceback: {tmp_path}/error.log)")
    log = (tmp_path / "error.log").read_text()
    assert log.startswith("Traceback") and type(error).__name__ in log


def test_an_error_of_ours_alone_has_no_traceback(capsys, tmp_path):
    assert ended(lambda: raises(InputError("--steps 0: must be from 1."))) == 2
    assert capsys.readouterr().err == "error: --steps 0: must be from 1.\n"
    assert not (tmp_path / "error.log").exists()


def test_a_log_that_cannot_be_written_is_left_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "run_folder", tmp_path / "gone")
    assert ended(lambda: raises(KeyError("a bug"))) == 1
    assert capsys.readouterr().err == "error: KeyError: 'a bug'\n"


def test_a_line_is_no_longer_than_a_person_reads_and_moves_no_cursor(capsys):
    assert ended(lambda: raises(InputError(f"no \x1b[2J{'a' * 5000}; take another"))) == 2
    line = capsys.readouterr().err
    assert line.startswith(r"error: no \x1b[2Jaaa")
    assert line.endswith("aaa; take another\n")
    assert len(line) < 1220


class Silent(Exception):
    def __str__(self):
        raise ValueError("not even this")


class Interrupt(BaseException):
    pass


ANYTHING = [
    KeyboardInterrupt(),
    SystemExit(3),
    MemoryError(),
    Silent(),
    Interrupt(),
    ValueError("x" * 9999),
]


@pytest.mark.parametrize("error", ANYTHING, ids=lambda error: type(error).__name__)
def test_whatever_loading_raises_is_one_input_error(error):
    with pytest.raises(InputError) as caught, errors._own_interrupt():
        with errors.loading("model", "some/folder", do="name another"):
            raise error
    words = str(caught.value)
    assert words.startswith(f"model some/folder does not load ({type(error).__name__}")
    advice = "" if isinstance(error, MemoryError) else "; name another"  # it would not help
    assert words.endswith(f"){advice}") and len(words) < 700
    assert caught.value.__cause__ is error


def test_a_module_that_hides_another_is_shown_with_its_place(tmp_path, monkeypatch):
    """As the folder wandb/ that W&B leaves in a working directory, or a file called random.py."""
    (tmp_path / "hidden_folder").mkdir()
    (tmp_path / "hidden_file.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, place in (("hidden_folder", ""), ("hidden_file", ".py")):
        with pytest.raises(InputError) as raised, errors.loading("--tracker", name):
            importlib.import_module(name).init()
        words = f"AttributeError: module '{name}' has no attribute 'init'"
        assert f"({words} (imported from {tmp_path}/{name}{place}))" in str(raised.value)
    with pytest.raises(InputError) as raised, errors.loading("a reward"):
        raise AttributeError("'Own' object has no attribute 'score'", name="score", obj=object())
    assert "imported from" not in str(raised.value)


@pytest.mark.parametrize("error", [InputError("a"), RunError("a"), errors.Stopped(15, "a")])
def test_our_own_errors_pass_through_loading_and_phases(error):
    with pytest.raises(type(error), match="^a$") as caught:
        with errors.loading("model"), errors.phase("the update"):
            raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "words",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried",
        "CUDA error: out of memory",  # of pinned memory: an AcceleratorError
    ],
)
def test_a_phase_names_itself_and_what_helps_when_memory_ran_out(words):
    with pytest.raises(errors.LocalError, match=r"^out of memory in the update .*; add --some$"):
        with errors.phase("the update", memory="add --some"):
            raise RuntimeError(words)
    with pytest.raises(errors.LocalError, match=rf"^the update failed: .*{__file__}, line \d+"):
        with errors.phase("the update", memory="add --some"):
            raise KeyError("a bug")


# --- Finished steps ---


def fail_in_step(monkeypatch, number, error):
    """Make the first backward pass of the step with this number raise."""
    honest, steps = Policy.step, []
    backward = Policy.backward

    def step(policy):
        honest(policy)
        steps.append(1)

    def fail(policy, loss):
        if len(steps) == number:
            raise error
        backward(policy, loss)

    monkeypatch.setattr(Policy, "step", step)
    monkeypatch.setattr(Policy, "backward", fail)


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyError("a bug"), RunError("no")])
def test_finished_steps_are_saved_whatever_ends_the_run(
    train, monkeypatch, capsys, tmp_path, error
):
    fail_in_step(monkeypatch, 1, error)
    assert ended(lambda: train(steps=3, save_every=0)) == 1
    said = capsys.readouterr()
    assert f"1 steps are saved; continue with --output {tmp_path}/run --resume latest" in said.out
    assert len([line for line in said.err.splitlines() if "error: " in line]) == 1
    folders = checkpoint_files.newest_first(tmp_path / "run")
    assert [path.name for path in folders] == ["step_000001"]


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


# --- Rewards are a user's code ---


class Reward:
    scale, range, video = 1.0, (0.0, 1.0), False

    def __init__(self, score):
        self.score = lambda media, prompts: score(media)


def rewards_of(**scorers):
    """Return the Rewards of these scorers, as if --reward had loaded them."""
    found = object.__new__(Rewards)
    found.scorers = scorers
    found.weights = dict.fromkeys(scorers, 1.0)
    found.aggregate = "rewards"
    found.failures = {}
    return found


@pytest.mark.parametrize(
    "error", [*ANYTHING, GeneratorExit()], ids=lambda error: type(error).__name__
)
def test_whatever_a_reward_raises_is_that_rewards_error(error):
    rewards = rewards_of(
        bad=Reward(lambda media: raises(error)), fine=Reward(lambda media: media.mean((1, 2, 3)))
    )
    with errors.one_line():  # where Ctrl-C has a class of its own
        scores = rewards.score(torch.zeros(2, 3, 4, 4), ["a", "b"])
    assert scores["fine"].isfinite().all()
    gathered = {name: value[:, None] for name, value in scores.items()}
    with pytest.raises(RunError, match="reward bad") as caught:
        rewards.check(gathered, ["a", "b"])
    words = str(caught.value)
    assert len(words) < 900
    memory = isinstance(error, MemoryError)
    assert ("--reward-batch" if memory else type(error).__name__) in words


def test_ctrl_c_while_a_reward_computes_ends_the_run(capsys):
    rewards = rewards_of(slow=Reward(lambda media: os.kill(os.getpid(), signal.SIGINT)))
    assert ended(lambda: rewards.score(torch.zeros(1, 3, 4, 4), ["a"])) == 130
    assert capsys.readouterr().err.startswith("stopped: SIGINT")
    with pytest.raises(KeyboardInterrupt):  # outside of a run, too
        rewards.score(torch.zeros(1, 3, 4, 4), ["a"])
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
def test_scores_with_a_graph_of_another_type_or_no_tensors_are_taken(kind):
    rewards = rewards_of(r=Reward(lambda media: kind(torch.tensor([0.5, 0.25]))))
    values = rewards.score(torch.zeros(2, 3, 4, 4), ["a", "b"])["r"]
    assert values.tolist() == [0.5, 0.25]
    assert values.dtype == torch.float32
    assert not values.requires_grad


@pytest.mark.parametrize(
    "score",
    [
        lambda m: torch.zeros(len(m), device="meta"),
        lambda m: None,
        lambda m: ["a"] * len(m),
        lambda m: m.zero_().mean((1, 2, 3)),  # changes the media
    ],
    ids=["meta", "None", "text", "changes"],
)
def test_what_is_no_score_is_refused(score):
    rewards = rewards_of(bad=Reward(score))
    scores = rewards.score(torch.ones(2, 3, 4, 4), ["a", "b"])
    with pytest.raises(RunError, match="reward bad"):
        rewards.check({"bad": scores["bad"][:, None]}, ["a", "b"])
