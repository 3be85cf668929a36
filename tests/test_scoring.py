"""Scoring of samples while the next ones are sampled: a real server on localhost judges, and
waits."""

import os
import signal
import threading

import pytest
import torch
from conftest import weights
from test_rewards_judge import colour_score, quick, serve  # noqa: F401, fixtures

from common import errors, models, sde
from common.args import Args
from common.rewards import Rewards, Scoring
from common.trainer import checkpoint_files

SETTINGS = dict(
    micro_batch=2,
    reward_batch=2,
    steps=2,
    learning_rate=1e-3,
    judge_model="m",
    reward=("judge:alignment",),
)


def judged(handler, number, body):
    handler.say(colour_score(body))


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_scores_are_those_of_all_samples_at_once_in_their_order(size, away):
    """Eleven samples that come by four, the twelfth a filler."""
    model = models.load("tiny-flux", torch.float32, decode_batch=1)
    captions = ["a red circle", "two blue squares"] * 5 + ["a green cross"]
    rewards = Rewards(Args(reward=("verifier", "jpeg")), captions)
    x0 = torch.randn(12, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    expected = rewards.score(model.decode(x0[:11]), captions)
    rewards.scorers["verifier"].elsewhere = away
    scoring = rewards.begin(model.decode, captions, size)
    for part in x0.split(4):
        scoring.add(part)
    found = scoring.result()
    assert list(found) == list(rewards.scorers)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.long
def test_a_server_judges_while_the_next_samples_are_drawn(train, serve, monkeypatch):  # noqa: F811
    """The first answer of each step waits for the second rollout, which no run that scores
    afterwards begins."""
    honest, begun, waited = sde.rollout, threading.Semaphore(0), []

    def rollout(*words, **settings):
        begun.release()
        return honest(*words, **settings)

    def behave(handler, number, body):
        if number == 3:  # the first two are those of the trial before the run
            waited.append(begun.acquire(timeout=20) and begun.acquire(timeout=20))
        judged(handler, number, body)

    monkeypatch.setattr(sde, "rollout", rollout)
    url, _ = serve(behave)
    folder, rows = train(judge_url=url, **SETTINGS)
    assert waited == [True]

    # and the numbers are those of a judge that is asked afterwards, bit for bit
    monkeypatch.setattr(Scoring, "add", lambda scoring, x0: scoring.latents.extend(x0))
    after, expected = train(judge_url=url, output="afterwards", **SETTINGS)
    assert rows == expected
    assert all(
        torch.equal(value, weights(after, 2)[name]) for name, value in weights(folder, 2).items()
    )


def test_a_server_that_goes_in_the_middle_of_a_rollout_ends_the_run(train, serve, capfd):  # noqa: F811
    url, server = serve(judged)
    honest = server.behave

    def behave(handler, number, body):
        if number > 12:  # of eight a step
            server.alive = lambda: False
            return handler.hang_up()
        honest(handler, number, body)

    server.behave = behave
    with pytest.raises(SystemExit) as ended:
        errors.run(
            lambda _: train(judge_url=url, judge_retries=1, **{**SETTINGS, "steps": 5}), None
        )
    said = capfd.readouterr()
    assert ended.value.code == 1 and "Traceback" not in said.err
    assert f"error: reward judge:alignment: the server at --judge-url {url} is gone" in said.err
    assert "1 steps are saved" in said.out


def test_a_signal_does_not_wait_for_the_server(train, serve, capfd, tmp_path):  # noqa: F811
    """The rows under way are finished, whatever the judge says of those before."""
    done, url = threading.Event(), ""

    def behave(handler, number, body):
        if number == 10:  # the first of the second step
            os.kill(os.getpid(), signal.SIGTERM)
            done.wait(60)
        judged(handler, number, body)

    url, _ = serve(behave)
    try:
        with pytest.raises(SystemExit) as ended:
            errors.run(
                lambda _: train(judge_url=url, **{**SETTINGS, "steps": 5, "save_every": 0}), None
            )
        assert ended.value.code == 128 + signal.SIGTERM and not done.is_set()
    finally:
        done.set()
    assert "stopped: SIGTERM: stopped after 1 steps" in capfd.readouterr().err
    assert checkpoint_files.newest_first(tmp_path / "run")
