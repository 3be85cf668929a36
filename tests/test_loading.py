"""What the processes of a machine copy while they load a model, and their turns."""

import ctypes
import gc
import math
import os
import threading

import pipelines
import pytest
import torch
from test_preflight import size, small

import bpgo
from common import models
from common.args import defaults
from common.errors import InputError
from common.memory import bytes, fit, turns
from common.memory.bytes import Launch


def test_weights_of_the_runs_dtype_are_mapped_and_others_copied(tmp_path):
    pipe = pipelines.flux()
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    copies = turns.copied(models.outline(str(tmp_path), torch.float32, 0))
    assert copies == {
        "vae": 0,
        "text_encoder": 0,
        "text_encoder_2": 0,
        "transformer": 4 * size(pipe.transformer),
    }
    copies = turns.copied(models.outline(str(tmp_path), torch.bfloat16, 0))
    assert copies == {
        name: 2 * size(getattr(pipe, name)) * (name != "transformer") for name in copies
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_that_loads_takes_as_much_as_was_counted(tmp_path, dtype):
    """Pages of files that are mapped are no process's own: Linux counts those that it wrote to or
    made."""
    if not os.path.exists("/proc/self/smaps_rollup"):
        pytest.skip("this system does not say what a process has of its own")
    pipe = pipelines.flux()
    wide = dict(pipe.transformer.config, num_attention_heads=64, num_layers=2)
    pipe.transformer = type(pipe.transformer).from_config(wide)
    pipe.save_pretrained(tmp_path)

    def private():
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", int)(
            0
        )  # what was freed before would be taken again, and not counted
        lines = open("/proc/self/smaps_rollup").read().splitlines()
        return sum(
            int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Swap:"))
        )

    models.load(str(tmp_path), dtype)  # what is loaded besides, once
    before = private()
    model = models.load(str(tmp_path), dtype)
    grown, counted = 1024 * (private() - before), sum(turns.copied(model).values())
    total = size(pipe.transformer) * dtype.itemsize
    assert (counted > 0.9 * total) == (dtype == torch.bfloat16)
    assert abs(grown - counted) < 0.25 * total, (grown, counted, total)


def test_processes_load_by_turns_where_all_at_once_do_not_fit(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for free, expected in ((800, False), (799, True), (100 + 7 * 20, True)):
        assert turns.in_turns("flux", 100, 20, free) == expected
    with pytest.raises(
        InputError, match="loading it in 8 processes needs 0.0 GiB of this machine's memory"
    ):
        turns.in_turns("flux", 100, 20, 100 + 7 * 20 - 1)


def test_what_stays_on_the_host_is_counted():
    """On GPUs what is loaded goes there, except encoders that wait and offloaded shards."""
    model = models.outline("tiny-flux", torch.bfloat16, 0)
    copies = turns.copied(model)
    peak = sum(copies.values())
    waiting = sum(copies[name] for name in model.encoders)
    plain = defaults(bpgo.Args)
    offloaded = defaults(bpgo.Args, offload_encoders=True)

    def loading(args, shards=1, keep_initial=True, **launch):
        launch = Launch(torch.bfloat16, **launch)
        return turns.loading_bytes(
            model, args, launch=launch, shards=shards, keep_initial=keep_initial
        )

    assert loading(plain, device="cpu") == (0, 0)
    assert loading(plain, device="cuda") == (peak, 0)
    assert loading(offloaded, device="cuda") == (peak, waiting)
    copy = 2 * size(model.pipe.transformer)
    assert loading(offloaded, shards=4, device="cuda") == (peak + copy, waiting)
    assert loading(offloaded, shards=4, keep_initial=False, device="cuda") == (peak, waiting)
    shards = (4 + 2 + 4 * 4 + 8) * size(model.pipe.transformer) / 4  # gradients are whole
    sharded = dict(shards=4, device="cuda", sharded=True, offloads=True)
    assert loading(offloaded, **sharded) == (peak + copy, waiting + shards)
    rest = sum(copies[name] for name in copies if name not in model.trainable)
    assert loading(plain, shards=4, device="cpu") == (peak + copy, rest + shards)


def test_encoders_that_wait_are_counted_for_each_process_and_latents_too(monkeypatch):
    """What comes back from a GPU is not shared with the files any more."""
    model = models.outline("tiny-flux", torch.float32, 0)
    monkeypatch.setattr(turns, "copied", lambda model: {})  # files of the run's dtype
    args = defaults(bpgo.Args, offload_encoders=True)
    launch = Launch(torch.float32, "cuda", world=8, per_machine=8)

    def loading():
        return turns.loading_bytes(model, args, launch=launch, shards=1, keep_initial=False)

    waiting = 4 * sum(size(getattr(model.pipe, name)) for name in model.encoders)
    assert loading() == (0, waiting)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert not turns.in_turns("flux", *loading(), free=8 * waiting)
    with pytest.raises(InputError, match="leave out --offload-encoders"):
        turns.in_turns("flux", *loading(), free=8 * waiting - 1)
    latents = bytes.latent_bytes(model, args, launch)
    monkeypatch.setattr(bytes, "LARGE_LATENTS", latents - 1)
    assert loading() == (0, waiting + 2 ** math.ceil(math.log2(latents)))


def test_a_turn_waits_for_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "LOCK", tmp_path / "lock")
    first, begun = turns.Turn(), threading.Event()

    def second():
        turn = turns.Turn()
        begun.set()
        turn.end()

    thread = threading.Thread(target=second)
    thread.start()
    assert not begun.wait(0.3)
    first.end()
    thread.join(10)
    assert begun.is_set()


def test_settle_takes_the_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(turns, "in_turns", lambda name, peak, kept, free: True)
    args, processes = small(monkeypatch, gib=100)
    found = fit.settle(args, processes, {}, keep_initial=False)
    waiting = threading.Thread(target=turns.Turn, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    found.turn.end()
    waiting.join(10)
    assert not waiting.is_alive()


def test_the_turn_of_a_run_ends_when_its_model_is_on_its_device(train, tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(turns, "in_turns", lambda name, peak, kept, free: True)
    small(monkeypatch, gib=100)
    honest = models.load
    waiting = threading.Thread(target=turns.Turn, daemon=True)
    seen = []

    def load(*words, **settings):
        waiting.start()
        waiting.join(0.3)
        seen.append(waiting.is_alive())
        return honest(*words, **settings)

    monkeypatch.setattr(models, "load", load)
    train(steps=1)
    waiting.join(10)
    assert seen == [True]
    assert not waiting.is_alive()
