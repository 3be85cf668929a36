"""The latents of a step: held once, on the device or on the host, with the same numbers."""

import dataclasses
import gc
import math

import pytest
import torch
from conftest import weights

import bpgo
import grpo_base
import slas
from benchmarks import memory
from common import sde
from common.args import defaults
from common.memory import bytes, fit
from common.memory.bytes import Launch
from common.memory.ways import MemoryPlan
from common.rewards.rewards import Scoring
from common.trainer import Latents, MicroBatch, Policy

GIB = 2**30
SHAPE = (16, 16)  # of a latent of tiny-flux
SMALL = dict(group_size=10, sampling_steps=8, micro_batch=4)  # the last pass has padding rows


def held():
    """Return the bytes of all tensors that have latents of tiny-flux, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.shape[-2:] == SHAPE:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_a_step_holds_its_latents_once(train, monkeypatch):
    before = held()
    found = {"when all are sampled": [], "in the update": []}
    honest_result, honest_step = Scoring.result, Policy.step

    def result(scoring):
        found["when all are sampled"].append(held() - before)
        return honest_result(scoring)

    def step(policy):
        found["in the update"].append(held() - before)
        honest_step(policy)

    monkeypatch.setattr(Scoring, "result", result)
    monkeypatch.setattr(Policy, "step", step)
    train(grpo_base, steps=2, **SMALL)
    row = 4 * math.prod(SHAPE)
    b, levels, n = 2 * SMALL["group_size"], SMALL["sampling_steps"] + 1, SMALL["micro_batch"]
    # all levels, the last one for the rewards, and what a pass works on
    for where, sizes in found.items():
        assert len(sizes) == 2 and max(sizes) <= row * (b * (levels + 1) + 12 * n), where


@pytest.mark.parametrize("script, settings", [(grpo_base, {}), (slas, dict(gamma="auto"))])
def test_latents_on_the_host_change_no_number(script, settings, train, monkeypatch):
    expected, rows = train(script, "device", steps=2, save_every=2, **SMALL, **settings)
    honest = fit.as_asked
    monkeypatch.setattr(
        fit, "as_asked", lambda *words: dataclasses.replace(honest(*words), host_latents=True)
    )
    found, other_rows = train(script, "host", steps=2, save_every=2, **SMALL, **settings)
    assert rows == other_rows
    before, after = weights(expected, 2), weights(found, 2)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
def test_micro_batches_fill_the_tensor_and_read_it(on_host):
    plan = MemoryPlan(defaults(grpo_base.Args), batch=2, host_latents=on_host)
    latents = Latents(3, 5, (4, 2), torch.device("cpu"), plan)
    indices = [torch.tensor(rows) for rows in ([0, 1], [2, -1], [2, 0])]
    first, last, other = (MicroBatch(index, index, index >= 0) for index in indices)
    assert latents.part(first).shape == (2, 5, 4, 2)
    assert latents.part(last).shape == (1, 5, 4, 2)
    assert all(latents.part(first)[:, t].is_contiguous() for t in range(5)), "copied in one piece"
    expected = torch.randn(3, 5, 4, 2)
    latents.part(first).copy_(expected[:2])
    latents.part(last).copy_(expected[2:])
    for mb in (first, last, other):
        assert torch.equal(latents.at(mb, 3), expected[mb.index, 3])


def test_a_rollout_fills_the_tensor_that_it_is_given_without_padding_rows():
    sigmas = sde.shifted_sigmas(4, 1.0)
    s = sde.diffusion_coefficients(sigmas, 0.7, "dance")
    x = torch.randn(3, 4, 2)

    def sampled(out=None):
        noise = sde.RowNoise(0, 0, range(3))
        return sde.rollout(lambda x, sigma: -x, x, sigmas, s, noise, out=out)

    expected, log_probs = sampled()
    out = torch.empty(2, 5, 4, 2)
    latents, same = sampled(out)
    assert latents is out
    assert torch.equal(out, expected[:2])
    assert torch.equal(same, log_probs)


def test_large_latents_are_counted_on_the_host():
    """Wan 1.3B: clips of 5.6 MB at each of 17 noise levels."""
    wan = memory.full_size("wan2.1-1.3b", True)
    args = defaults(bpgo.Args, "wan2.1-1.3b", lora_rank=64, micro_batch=1, decode_batch=1)
    one, eight = (Launch(torch.bfloat16, "cuda", world=world) for world in (1, 8))
    row = 4 * 16 * 14 * 60 * 104
    b = args.prompts_per_step * args.group_size
    assert bytes.latent_bytes(wan, args, one) == b * 17 * row > 10 * GIB
    kinds = bytes.process_bytes(wan, args, one)
    assert (kinds["latents"], kinds["last latents"]) == (0, b * row)
    assert bytes.latents_on_host(wan, args, eight)
    few = dataclasses.replace(args, prompts_per_step=1)
    assert bytes.process_bytes(wan, few, eight)["latents"] == args.group_size / 8 * 17 * row
    on_a_cpu = Launch(torch.bfloat16, "cpu")
    assert bytes.process_bytes(wan, args, on_a_cpu)["latents"] == b * 17 * row
