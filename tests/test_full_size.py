"""benchmarks/full_size.py in small: what it says, phase by phase, before anybody has paid for a
GPU."""

import json

import pipelines
import pytest
import torch
from diffusers import FluxPipeline

import grpo_base
from benchmarks import full_size
from common import models
from common.args import defaults
from common.memory import fit
from common.memory.bytes import Launch
from common.memory.ways import Counter, plan, ways
from common.trainer import policy


def said(capfd):
    lines = capfd.readouterr().out.splitlines()
    return [json.loads(line[line.index("{") :]) for line in lines if '{"phase"' in line]


def test_every_phase_ends_with_a_line_and_the_pipeline_never_touches_the_disk(
    bf16, monkeypatch, capfd
):
    """The way of a full size, from a pipeline made in memory, with a small one."""
    for table in (models.MODELS, grpo_base.Args.SETTINGS):
        monkeypatch.setitem(table, "flux", {**table["flux"], "height": 32, "width": 32})
    monkeypatch.setattr(full_size, "flux", pipelines.flux)
    monkeypatch.setattr(full_size, "outline", lambda *args, **settings: None)
    monkeypatch.setattr(FluxPipeline, "save_pretrained", None)
    before = grpo_base.Policy, models.load
    full_size.main(full_size.Args(rows=2, steps=2, sampling_steps=4, lora_rank=2, write=False))
    assert (grpo_base.Policy, models.load) == before
    rows = said(capfd)
    steps = ["rollout", "reward", "update"]
    assert [row["phase"] for row in rows] == ["built", "matmul", "floor", *steps, *steps, "total"]
    floor, total = rows[2], rows[-1]
    assert floor["rows"] == 1 and floor["tokens"] == 4 and total["ratio error"] == "0.0e+00"
    assert (
        1.8 < floor["forward_backward_tflop"] / floor["forward_tflop"] < 3.2
    )  # with what checkpointing repeats
    assert 0 < floor["forward_mfu"] < 1 and "2 trained" in total["model"]  # 0.6 of 3


@pytest.mark.parametrize("gib, fits", [(47.4, True), (23.5, False)], ids=["48 GB", "24 GB"])
def test_flux_is_counted_once_before_its_weights_are_made(gib, fits, monkeypatch):
    """A LoRA on one GPU of 48 GB: the outline has no contents, so they are not in the memory that
    is measured."""
    monkeypatch.setattr(models, "outline", full_size.outline)
    args = defaults(
        grpo_base.Args, "flux", lora_rank=64, prompts_per_step=1, group_size=2, micro_batch=1
    )
    model = fit.outline(args, torch.bfloat16)
    transformer = model.trainable["transformer"]
    weights = list(transformer.parameters())
    assert all(weight.is_meta for weight in weights)
    frozen = sum(weight.numel() for weight in weights if not weight.requires_grad)
    # activations are counted elsewhere, and take seconds; a row's pass takes less than 2 GiB
    kept = {True: 2 * 2**30}
    counter = Counter(
        model, Launch(torch.bfloat16, "cuda"), row_bytes=kept, decoded_bytes=4 * 2**30
    )
    found = plan(args, counter, gib * 2**30)
    assert bool(found) == fits
    for way in ways(args, counter.launch):
        assert counter.kinds(way, rows=1)["frozen weights"] == 2 * frozen


def test_a_ratio_that_is_off_is_a_result(monkeypatch, capfd):
    monkeypatch.setattr(policy, "RATIO_LIMIT", {"no": -1.0})
    full_size.main(full_size.Args("tiny-flux", steps=1, sampling_steps=3, lora_rank=2, write=False))
    last = said(capfd)[-1]
    assert last["phase"] == "stopped" and "ratio is off by" in last["why"]


def test_the_packages_that_it_needs_are_listed_with_all_that_they_need(capfd):
    full_size.main(full_size.Args(wheels=True))
    listed = dict(line.split("==") for line in capfd.readouterr().out.split())
    assert listed["torch"] == torch.__version__.partition("+")[0] and {
        "diffusers",
        "peft",
        "safetensors",
        "numpy",
        "tyro",
    } <= set(listed)
