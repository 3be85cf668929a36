"""What the processes of a machine copy while they load a model, and their turns."""

import ctypes
import gc
import os
import threading
from types import SimpleNamespace

import pipelines
import psutil
import pytest
import torch
from test_preflight import plan_of, size

import bpgo
import grpo_base
from common import cli, models
from common.errors import InputError
from common.memory import loading, preflight
from common.trainer import sharding


def test_weights_of_the_runs_dtype_are_mapped_and_others_copied(tmp_path):
    pipe = pipelines.flux()
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    copies = loading.copied(models.outline(str(tmp_path), torch.float32, 0))
    assert copies == {
        "vae": 0,
        "text_encoder": 0,
        "text_encoder_2": 0,
        "transformer": 4 * size(pipe.transformer),
    }
    copies = loading.copied(models.outline(str(tmp_path), torch.bfloat16, 0))
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
    grown, counted = 1024 * (private() - before), sum(loading.copied(model).values())
    total = size(pipe.transformer) * dtype.itemsize
    assert (counted > 0.9 * total) == (dtype == torch.bfloat16)
    assert abs(grown - counted) < 0.25 * total, (grown, counted, total)


def test_processes_load_by_turns_where_all_at_once_do_not_fit(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for have, turns in ((800, False), (799, True), (100 + 7 * 20, True)):
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda have=have: SimpleNamespace(available=have)
        )
        assert loading.by_turns("flux", 100, 20) == turns
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=100 + 7 * 20 - 1)
    )
    with pytest.raises(
        InputError, match="8 processes on this machine keep 0.0 GiB of its memory each"
    ):
        loading.by_turns("flux", 100, 20)


def test_what_stays_on_the_host_is_counted(monkeypatch):
    """On GPUs what is loaded goes there, but for encoders that wait, and for shards that do."""
    found = []
    monkeypatch.setattr(loading, "by_turns", lambda name, each, stays: found.append((each, stays)))
    plan = plan_of(monkeypatch, 10**12)
    plan.run.dtype, plan.run.device, trained = (
        torch.bfloat16,
        torch.device("cuda"),
        plan.model.pipe.transformer,
    )
    plan.model = models.outline("tiny-flux", torch.bfloat16, 0)
    parts = loading.copied(plan.model)
    each, waiting = sum(parts.values()), sum(parts[name] for name in plan.model.encoders)
    args = cli.defaults(bpgo.Args, prior="sft")
    plan.by_turns(args)
    args.offload_encoders = True
    plan.by_turns(args)
    plan.run.sharding, plan.run.shards = sharding.own_plugin(), 4
    plan.by_turns(args)
    copy = 2 * size(trained)
    assert found == [(each, 0), (each, waiting), (each + copy, waiting)]


def test_the_weights_of_the_start_are_counted_whatever_asks_for_them(monkeypatch):
    plan = plan_of(monkeypatch, 0)
    plain = plan.kinds(cli.defaults(bpgo.Args), 1)
    copy = {"frozen weights": 4 * size(plan.model.pipe.transformer)}
    assert plan.kinds(cli.defaults(bpgo.Args, prior="sft"), 1) == plain | copy
    assert plan.kinds(cli.defaults(grpo_base.Args, kl_coef=0.1), 1) == plain | copy
    assert not cli.keeps_initial(cli.defaults(bpgo.Args, prior="first-frame"))


def test_a_turn_waits_for_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "LOCK", tmp_path / "lock")
    first, begun = loading.Turn(), threading.Event()

    def second():
        turn = loading.Turn()
        begun.set()
        turn.end()

    thread = threading.Thread(target=second)
    thread.start()
    assert not begun.wait(0.3)
    first.end()
    thread.join(10)
    assert begun.is_set()


def test_a_turn_ends_when_the_model_is_where_it_belongs(train, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "LOCK", tmp_path / "lock")
    plan_of(monkeypatch, 10**12)  # as if it were a large model
    monkeypatch.setattr(preflight.Plan, "by_turns", lambda plan, args: True)
    honest, held = models.load, []

    def load(*words, **settings):
        held.append(threading.Thread(target=loading.Turn, daemon=True))
        held[-1].start()
        held[-1].join(0.2)
        held.append(held[-1].is_alive())
        return honest(*words, **settings)

    monkeypatch.setattr(models, "load", load)
    train(steps=1)
    held[0].join(10)
    assert held[1] and not held[0].is_alive()
