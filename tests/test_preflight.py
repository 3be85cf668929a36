"""How a run fits into memory: what is counted, what is chosen, what is refused."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from conftest import ROOT
from peft import LoraConfig

import bpgo
import grpo_base
from benchmarks import memory
from common import models
from common.args import defaults
from common.errors import InputError
from common.memory import activations, bytes, fit, host, turns, ways
from common.memory.bytes import Launch
from common.trainer import disk, sharding

GIB = 2**30
ON_A_CPU = Launch(torch.bfloat16, "cpu")


@pytest.fixture
def tiny():
    return models.load("tiny-flux", torch.float32)


def size(module):
    return sum(weight.numel() for weight in module.parameters())


# --- What is counted ---


def counted(model, args, shards=1, **more):
    """Return the bytes by kind, without the samples."""
    kinds = bytes.process_bytes(model, args, launch=ON_A_CPU, shards=shards, **more)
    samples = ("latents", "last latents", "conditioning", "pixels")
    return {name: kinds[name] for name in kinds if name not in samples}


def test_memory_of_full_weights_and_of_a_lora(tiny):
    n = size(tiny.pipe.transformer)
    encoders = size(tiny.pipe.text_encoder) + size(tiny.pipe.text_encoder_2)
    others = encoders + size(tiny.pipe.vae)
    args = defaults(grpo_base.Args, ema=0.9)
    full = {
        "trained weights": 4 * n,
        "frozen weights": 0,
        "gradients": 4 * n,
        "optimizer": 8 * n,
        "average": 4 * n,
    }
    rest = {
        "encoders, VAE": 4 * others,
        "rewards": 7,
        "activations": 100,
        "encoders for new prompts": 0,
        "decoding": 8 * 50,
    }
    given = dict(activations=100, decoding=50, rewards=7)
    args.decode_batch = 8
    found = counted(tiny, args, **given)
    assert found == {**full, **rest, "weights of a pass": 2 * n}  # autocast's copies

    split = {name: value / 4 for name, value in full.items()}
    transformer = tiny.pipe.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    outside = n - sum(map(size, blocks))
    # in bfloat16 two blocks and what is outside of all blocks, in float32 the gradients of one
    rest["weights of a pass"] = 8 * max(map(size, blocks)) + 6 * outside
    found = counted(tiny, args, shards=4, **given)
    assert found == {**split, **rest, "gradients": 4 * n}
    assert counted(tiny, args, shards=4, keep_initial=True)["frozen weights"] == 2 * n / 4

    args.exchange_often = True
    args.offload_encoders = True
    rest["encoders, VAE"] = 4 * size(tiny.pipe.vae)
    rest["encoders for new prompts"] = 4 * encoders
    assert counted(tiny, args, shards=4, **given) == {**split, **rest}

    tiny.pipe.transformer.requires_grad_(False)
    tiny.pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=tiny.lora_targets)
    )
    lora = size(tiny.pipe.transformer) - n
    found = counted(tiny, defaults(grpo_base.Args, lora_rank=4))
    assert found["trained weights"] == 4 * lora
    assert found["frozen weights"] == 2 * n
    assert not found["average"]


def test_data_parallelism_copies_gradients_and_offloaded_shards_are_on_the_host(tiny):
    args = defaults(grpo_base.Args)
    alone = bytes.process_bytes(tiny, args, Launch(torch.float32, "cuda"))
    two = bytes.process_bytes(tiny, args, Launch(torch.float32, "cuda", world=2, per_machine=2))
    assert two["gradients"] == 2 * alone["gradients"]
    assert two["latents"] == alone["latents"] / 2
    offloaded = Launch(torch.float32, "cuda", world=2, per_machine=2, sharded=True, offloads=True)
    kinds = bytes.process_bytes(tiny, args, offloaded, shards=2)
    assert not any(kinds[name] for name in bytes.ON_THE_HOST)


def test_disk_of_checkpoints_and_export():
    assert disk.checkpoint_bytes(10, ema=False) == 4 * 10 * 3
    assert disk.checkpoint_bytes(10, ema=True) == 4 * 10 * 4
    assert disk.export_bytes(10, pipeline=1000, lora=False, ema=False) == 1000
    assert disk.export_bytes(10, pipeline=1000, lora=True, ema=True) == 2 * 4 * 10
    assert disk.checkpoints_at_once(50, save_every=20, keep=0) == 3
    assert disk.checkpoints_at_once(50, save_every="auto", keep=0) == 3
    assert disk.checkpoints_at_once(50, save_every=20, keep=0, start=40) == 1
    assert disk.checkpoints_at_once(50, save_every=20, keep=1) == 2
    assert disk.checkpoints_at_once(50, save_every=0, keep=2) == 1


def test_a_checkpoint_is_as_large_as_estimated(train, tiny):
    folder, _ = train(steps=1, ema=0.9)
    expected = disk.checkpoint_bytes(size(tiny.pipe.transformer), ema=True)
    found = sum(file.stat().st_size for file in (folder / "checkpoints/step_000001").iterdir())
    assert found == pytest.approx(expected, rel=0.02)


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 * GIB))
    new = tmp_path / "not/yet"
    disk.check(new, checkpoint=GIB, number=2, export=GIB)
    match = "3 checkpoints of 1.00 GiB and an export of 1.00 GiB do not fit .* 3.00 GiB free"
    with pytest.raises(InputError, match=match):
        disk.check(new, checkpoint=GIB, number=3, export=GIB)


def test_a_run_whose_checkpoints_do_not_fit_is_refused(train, monkeypatch):
    free = int(0.05 * GIB)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(InputError, match="2 checkpoints of 0.03 GiB .* 0.05 GiB free"):
        train(save_every=1)


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-sd", "tiny-wan-i2v"])
@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_activations_without_contents_are_those_of_a_real_pass(name, lora):
    real = models.load(name, torch.float32)
    outline = models.outline(name, torch.float32, 0)
    for model in (real, outline):
        for module in model.trainable.values():
            module.requires_grad_(not lora)
            if lora:
                module.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=model.lora_targets))
    for checkpointing in (False, True):
        found = activations.row_bytes(outline, torch.float32, checkpointing)
        assert found == activations.count(real, torch.float32, checkpointing)
    assert 0 < found < activations.row_bytes(outline, torch.float32, False)
    assert real.unwanted == {}  # guidance would take what counting left there
    for module in real.trainable.values():
        assert all(weight.grad is None for weight in module.parameters())
    assert all(weight.device.type == "meta" for weight in outline.pipe.vae.parameters())


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-wan"])
def test_decoding_without_contents_takes_what_real_decoding_takes(name):
    found = activations.decoded_bytes(models.outline(name, torch.float32, 0))
    real = models.load(name, torch.float32)
    assert found == pytest.approx(activations.count_decoded(real), rel=1e-3)
    pixels = 3 * real.height * real.width * getattr(real, "frames", 1)
    assert found > 3 * 4 * pixels, "the last layers have more channels than pixels have"


def test_allocations_are_counted_until_they_are_freed():
    with activations.Allocations() as found:
        kept = torch.ones(1000)
        view = kept[:10].view(2, 5)
        kept += 1
        assert found.live == 4000
        large = torch.cat([kept, kept])
        del large, kept
        assert (found.live, found.peak) == (4000, 12000)
        del view
        assert (found.live, found.peak) == (0, 12000)


def test_passes_are_counted_by_the_rules_that_autocast_has_on_gpus():
    """Norms are computed in float32 there, in bfloat16 on a CPU."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    macros = header.read_text().replace(", ", ".")
    rules = macros[macros.index("#define AT_FORALL_FP32(") :]
    for name in activations.FLOAT32 + activations.FLOAT32_RESULTS:
        assert f"_({name})" in rules, name
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    functions = [
        lambda: torch.nn.functional.layer_norm(x, (8,)),
        lambda: torch.nn.functional.rms_norm(x, (8,)),
        lambda: x**2,
        lambda: x.softmax(-1),
        lambda: x.sum(0),
    ]
    with activations.cuda_rules():
        assert all(function().dtype == torch.bfloat16 for function in functions)
        with activations.autocast(torch.bfloat16):
            assert all(function().dtype == torch.float32 for function in functions)
            assert torch.nn.functional.linear(x, x).dtype == torch.bfloat16
    with activations.autocast(torch.bfloat16):
        assert functions[0]().dtype == torch.bfloat16


def test_rewards_are_counted_once_and_a_judge_in_this_process_too():
    class Judge:
        def __init__(self, module):
            self.model = module
            self.name = "judge"

    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    judge = Judge(torch.nn.Linear(2, 2))
    scorer = SimpleNamespace(module=module, head=module[0], judge=judge, words=["a"])
    other = SimpleNamespace(client=judge)
    assert sum(map(size, bytes.reward_modules([scorer, other]))) == 40 + 6


def test_the_table_in_the_docs_is_not_stale():
    assert memory.row("sd1.4", True) in memory.PAGE.read_text()


# --- What is chosen ---


class Processes:
    """The processes of a launch, with a memory of so many GiB each; keeps what they print."""

    def __init__(self, monkeypatch, gib, world=1, device="cuda", dtype=torch.bfloat16, fsdp=False):
        monkeypatch.setattr(fit, "free_bytes", lambda device, world: gib * GIB)
        self.device = torch.device(device)
        self.dtype = dtype
        self.world = world
        self.per_machine = min(world, 8)
        self.fsdp = SimpleNamespace(activation_checkpointing=True) if fsdp else None
        self.offloads = False
        self.said = []

    def collect(self, thing):
        return [thing] * self.world

    def print(self, *words):
        self.said.append(" ".join(map(str, words)))


@functools.cache
def full_size(name, lora_rank):
    """Return the outline of a released model as `settle` makes it."""
    args = defaults(bpgo.Args, name, lora_rank=lora_rank)
    return honest_outline(args, torch.bfloat16)


honest_outline = fit.outline
row_bytes = functools.cache(activations.row_bytes)  # half a minute each
decoded_bytes = functools.cache(activations.decoded_bytes)


@pytest.fixture
def released(monkeypatch):
    """Make `settle` count the released sizes, on a host with much memory."""
    monkeypatch.setattr(models, "outline", lambda name, *_, **settings: memory.full_size(name, 0))
    monkeypatch.setattr(fit, "outline", lambda args, dtype: full_size(args.model, args.lora_rank))
    monkeypatch.setattr(activations, "row_bytes", row_bytes)
    monkeypatch.setattr(activations, "decoded_bytes", decoded_bytes)
    monkeypatch.setattr(turns, "copied", lambda model: {})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**50))
    monkeypatch.setattr(sys, "argv", ["bpgo.py"])


# What this code chose when passes were first counted by the rules of CUDA, December 2026:
# (model, LoRA rank, processes, GiB of each, with --micro-batch auto,
#  offloaded encoders, exchanged often, micro-batch, rows of a pass, shards); None: refused
CHOSEN = [
    ("flux", 0, 1, 80, None),
    ("flux", 0, 1, 140, None),
    ("flux", 0, 8, 80, (True, True, 8, 4, 8)),
    ("flux", 0, 16, 80, (True, True, 4, 2, 8)),
    ("flux", 0, 16, 30, (True, True, 4, 2, 16)),
    ("flux", 0, 8, 24, None),
    ("flux", 64, 1, 80, (False, False, 8, 8, 1)),
    ("flux", 64, 8, 80, (False, False, 8, 4, 1)),
    ("flux", 64, 1, 48, (True, False, 4, 4, 1)),
    ("flux", 64, 8, 24, (True, False, 4, 4, 8)),
    ("qwen-image", 64, 1, 80, (True, False, 4, 4, 1)),
    ("qwen-image", 64, 1, 48, None),
    ("qwen-image", 64, 8, 48, (True, False, 8, 8, 8)),
    ("qwen-image", 64, 1, 140, (False, False, 16, 16, 1)),
    ("wan2.2-i2v", 64, 1, 80, None),
    ("wan2.2-i2v", 64, 8, 80, (True, False, 1, 1, 8)),
    ("wan2.2-i2v", 64, 8, 48, (True, False, 1, 1, 8)),
    ("wan2.2-i2v", 64, 1, 140, (False, False, 1, 1, 1)),
    ("sd1.4", 0, 1, 48, (False, False, 4, 4, 1)),
    ("sd1.4", 64, 8, 24, (False, False, 4, 4, 1)),
]


def released_cases():
    """Return the cases above; those of models that take long to build are marked."""
    cases = []
    for case in CHOSEN:
        marks = pytest.mark.long if case[0] in ("qwen-image", "wan2.2-i2v") else ()
        cases.append(pytest.param(*case, marks=marks))
    return cases


@pytest.mark.parametrize("name, lora, world, gib, chosen", released_cases())
def test_released_models_run_as_they_did(name, lora, world, gib, chosen, released, monkeypatch):
    processes = Processes(monkeypatch, gib, world)
    args = defaults(bpgo.Args, name, lora_rank=lora)
    assert args.micro_batch == "auto", "the default of a full-size model"
    before = dataclasses.replace(args)
    if chosen is None:
        with pytest.raises(InputError, match=f"--model {name}: each process needs at least"):
            fit.settle(args, processes, {}, keep_initial=False)
        return
    found = fit.settle(args, processes, {}, keep_initial=False)
    assert args == before, "the settings that were given do not change"
    values = (
        found.args.offload_encoders,
        found.args.exchange_often,
        found.args.micro_batch,
        found.batch,
        found.shards,
    )
    assert values == chosen
    assert found.sharded == (found.shards > 1)
    assert found.args.decode_batch == 1, "a micro-batch, before it grew"
    assert found.args.gradient_checkpointing == (name != "sd1.4"), "its activations fit"
    assert found.turn is None
    changed = chosen[:3] != (False, False, 1)
    assert len(processes.said) == changed
    assert all(f"{ways.ROOM * gib:.1f} GiB" in line for line in processes.said)


OFFLOADED = "configs/fsdp2_offload.yaml --num_processes 1 bpgo.py --lora-rank 64"
EIGHT_BITS = "accelerate launch bpgo.py --lora-rank 64 --frozen-8bit (rounded"


@pytest.mark.parametrize(
    "gib, commands",
    [
        (80, ["--lora-rank 64", "configs/fsdp2.yaml --num_processes 4"]),
        (48, ["--lora-rank 64", "configs/fsdp2.yaml --num_processes 8"]),
        (24, [EIGHT_BITS, OFFLOADED, "configs/fsdp2_multi_node.yaml --num_processes 16"]),
    ],
)
def test_a_refusal_lists_commands_that_fit(gib, commands, released, monkeypatch):
    processes = Processes(monkeypatch, gib)
    args = defaults(bpgo.Args, "flux")
    with pytest.raises(InputError) as refused:
        fit.settle(args, processes, {}, keep_initial=False)
    words = str(refused.value)
    assert all(command in words for command in commands), words
    assert words.count("bpgo.py") == len(commands)


def test_offloaded_weights_are_only_offered_if_the_host_has_room(released, monkeypatch):
    processes = Processes(monkeypatch, 24)
    monkeypatch.setattr(host, "free", lambda: 30 * GIB)  # 24 of FLUX, 9 of its encoders
    with pytest.raises(InputError) as refused:
        fit.settle(defaults(bpgo.Args, "flux"), processes, {}, keep_initial=False)
    assert "fsdp2_offload" not in str(refused.value)


def chosen_for(name, lora_rank, gib, row_bytes):
    """Return the plan of one GPU, for activations that were counted elsewhere."""
    launch = Launch(torch.bfloat16, "cuda")
    counter = ways.Counter(
        full_size(name, lora_rank), launch, row_bytes=row_bytes, decoded_bytes=GIB
    )
    return ways.plan(defaults(bpgo.Args, name, lora_rank=lora_rank), counter, gib * GIB)


def test_the_encoders_visit_does_not_limit_the_rows_of_a_pass(released):
    """10 GiB of encoders leave no room beside a pass of one row, and need none when they wait."""
    found = chosen_for("sd3.5-medium", 32, 20, {True: 0.4 * GIB})
    assert found.args.offload_encoders
    assert found.batch >= ways.ENOUGH


def test_a_slower_way_is_taken_for_four_times_the_rows(released):
    counted = {False: 2 * GIB, True: 0.25 * GIB}
    found = {gib: chosen_for("sd1.4", 0, gib, counted) for gib in (24, 32, 48)}
    assert {gib: plan.args.gradient_checkpointing for gib, plan in found.items()} == {
        24: True,  # from 1 row to 8 and more
        32: False,
        48: False,
    }
    assert found[24].batch >= ways.ENOUGH
    assert 1 < found[32].batch < found[48].batch


@pytest.mark.parametrize("asked", [1, 4])
def test_a_micro_batch_that_was_given_stays_and_a_larger_one_is_proposed(
    asked, released, monkeypatch
):
    processes = Processes(monkeypatch, 80)
    args = defaults(bpgo.Args, "flux", lora_rank=64, micro_batch=asked)
    found = fit.settle(args, processes, {}, keep_initial=False)
    assert (found.args.micro_batch, found.args.decode_batch, found.batch) == (asked, asked, asked)
    (line,) = processes.said
    assert f"--micro-batch 8 --decode-batch {asked}" in line


def test_on_a_cpu_auto_is_one_row(released, monkeypatch):
    processes = Processes(monkeypatch, 80, device="cpu")
    args = defaults(bpgo.Args, "flux", lora_rank=64)
    assert fit.settle(args, processes, {}, keep_initial=False).batch == 1


def test_a_launch_with_fsdp2_stays_sharded(released, monkeypatch):
    processes = Processes(monkeypatch, 80, world=8, fsdp=True)
    args = defaults(bpgo.Args, "flux")
    found = fit.settle(args, processes, {}, keep_initial=True)
    assert (found.sharded, found.shards, found.args.exchange_often) == (True, 8, True)


def small(monkeypatch, gib, **settings):
    """Return (settings of tiny-flux, processes), as if tiny-flux were a large model."""
    monkeypatch.setattr(fit, "SMALL", 0)
    values = dict(prompts_per_step=2, group_size=4, sampling_steps=4, micro_batch=8) | settings
    processes = Processes(monkeypatch, gib, device="cpu", dtype=torch.float32)
    return defaults(grpo_base.Args, **values), processes


def test_the_ways_are_tried_from_the_fastest_to_the_smallest(monkeypatch):
    one = dict(decode_batch=1)  # decoding takes less than any pass
    args, processes = small(monkeypatch, 0, **one)
    launch = fit.launch_of(processes)
    counter = ways.Counter(fit.outline(args, torch.float32), launch)
    tried = ways.ways(args, launch)
    assert [way.chosen for way in tried] == [
        (),
        ("--offload-encoders",),
        ("--offload-encoders", "--gradient-checkpointing"),
    ]
    batch = ways.as_asked(args, launch).batch
    sizes = [counter.total(way, batch) for way in tried]
    assert sizes == sorted(sizes, reverse=True)
    for way, total in zip(tried, sizes):
        args, processes = small(monkeypatch, (total / ways.ROOM + 1000) / GIB, **one)
        found = fit.settle(args, processes, {}, keep_initial=False)
        assert found.args == way.args
        assert all(flag in " ".join(processes.said) for flag in way.chosen)
    args, processes = small(monkeypatch, (sizes[-1] / ways.ROOM - 1000) / GIB, **one)
    with pytest.raises(InputError, match="each process needs at least 0.0 GiB .* --micro-batch 1"):
        fit.settle(args, processes, {}, keep_initial=False)


def test_what_a_run_chose_is_printed_and_not_written_into_its_settings(train, monkeypatch, capsys):
    args, processes = small(monkeypatch, 0)
    launch = fit.launch_of(processes)
    counter = ways.Counter(fit.outline(args, torch.float32), launch)
    offloaded = ways.ways(args, launch)[1]
    total = counter.total(offloaded, ways.as_asked(args, launch).batch)
    small(monkeypatch, (total / ways.ROOM + 1000) / GIB)
    folder, _ = train(steps=1, minibatches=args.minibatches)
    assert "tiny-flux: chose --offload-encoders for" in capsys.readouterr().out
    assert not json.loads((folder / "config.json").read_text())["offload_encoders"]


def test_two_machines_shard_inside_each_before_over_both():
    launch = Launch(torch.bfloat16, "cuda", world=16, per_machine=8)
    args = defaults(grpo_base.Args, "flux", micro_batch=1)
    found = [(way.shards, way.chosen[-1:]) for way in ways.ways(args, launch)]
    assert found == [
        (1, ()),
        (1, ("--offload-encoders",)),
        (8, ("sharded",)),
        (8, ("--exchange-often",)),
        (16, ("sharded over all machines",)),
    ]


def test_a_small_model_runs_as_asked(monkeypatch):
    processes = Processes(monkeypatch, 0, world=4, device="cpu", dtype=torch.float32)
    args = defaults(grpo_base.Args, micro_batch=10)
    found = fit.settle(args, processes, {}, keep_initial=True)
    assert found == ways.MemoryPlan(dataclasses.replace(args, decode_batch=10), batch=8)
    assert processes.said == []
    processes.fsdp = SimpleNamespace(activation_checkpointing=False)
    found = fit.settle(args, processes, {}, keep_initial=True)
    assert (found.sharded, found.shards) == (True, 4)


def test_exchange_often_without_sharded_weights_is_refused(monkeypatch):
    processes = Processes(monkeypatch, 80)
    args = defaults(grpo_base.Args, exchange_often=True)
    with pytest.raises(InputError, match="--exchange-often: it needs sharded weights"):
        fit.settle(args, processes, {}, keep_initial=False)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_offload"])
def test_sharding_by_itself_is_that_of_the_shipped_configuration(name, monkeypatch):
    flags = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["fsdp_config"]
    monkeypatch.setattr(sharding, "asked", False, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch hands the file on
    for flag, value in flags.items():
        monkeypatch.setenv(flag.upper(), str(value))
    shipped = sharding.take_plugin()
    own = sharding.own_plugin()
    assert sharding.take_plugin()  # of the run after a calibration
    for what in ("fsdp_version", "reshard_after_forward", "activation_checkpointing"):
        flag = flags[f"fsdp_{what.removeprefix('fsdp_')}"]
        assert getattr(shipped, what) == getattr(own, what) == flag, what
    offloaded = name == "fsdp2_offload"
    assert sharding.offloads(shipped, "cuda") == offloaded
    assert not sharding.offloads(own, "cuda")
    assert not sharding.offloads(shipped, "cpu")


# --- Limits of containers and jobs ---


def groups(root, lines, files):
    """Write a machine's /proc/self/cgroup and the files of its groups: {path: content}."""
    for path, content in {"proc/self/cgroup": lines, **files}.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
NO_LIMIT = "9223372036854771712\n"  # version 1 writes this
LIMITED = {  # name: (/proc/self/cgroup, files, GiB that are left; None: no limit)
    "a container of version 2": (
        "0::/\n",
        {f"{V2}/memory.max": 6 * GIB, f"{V2}/memory.current": 2 * GIB},
        4,
    ),
    "a cache that can be dropped": (
        "0::/job\n",
        {
            f"{V2}/job/memory.max": 6 * GIB,
            f"{V2}/job/memory.current": 5 * GIB,
            f"{V2}/job/memory.stat": f"anon {GIB}\ninactive_file {3 * GIB}\nactive_file 0\n",
        },
        4,
    ),
    "the limit of a group above": (
        "0::/pod/box\n",
        {
            f"{V2}/pod/box/memory.max": "max\n",
            f"{V2}/pod/box/memory.current": GIB,
            f"{V2}/pod/memory.max": 3 * GIB,
            f"{V2}/pod/memory.current": 2 * GIB,
        },
        1,
    ),
    "a service that is slowed down": (
        "0::/a.service\n",
        {
            f"{V2}/a.service/memory.max": "max\n",
            f"{V2}/a.service/memory.high": 2 * GIB,
            f"{V2}/a.service/memory.current": 0,
        },
        2,
    ),
    "a job of version 1": (
        "9:name=systemd:/\n5:cpuset,memory:/slurm/uid_1/job_7\n0::/\n",
        {
            f"{V1}/slurm/uid_1/job_7/memory.limit_in_bytes": 8 * GIB,
            f"{V1}/slurm/uid_1/job_7/memory.usage_in_bytes": 5 * GIB,
            f"{V1}/slurm/uid_1/job_7/memory.stat": f"cache 7\ntotal_inactive_file {2 * GIB}\n",
            f"{V1}/memory.limit_in_bytes": NO_LIMIT,
            f"{V1}/memory.usage_in_bytes": 90 * GIB,
        },
        5,
    ),
    "a container of version 1, with its host's path": (
        "4:memory:/docker/0a1b\n",
        {f"{V1}/memory.limit_in_bytes": 2 * GIB, f"{V1}/memory.usage_in_bytes": GIB},
        1,
    ),
    "more used than allowed": (
        "0::/\n",
        {f"{V2}/memory.max": GIB, f"{V2}/memory.current": 2 * GIB},
        0,
    ),
    "no limit": ("0::/user\n", {f"{V2}/user/memory.max": "max\n"}, None),
    "not Linux": ("", {}, None),
    "nonsense": ("7\n:::\n0::/x\n", {f"{V2}/x/memory.max": "much"}, None),
}


@pytest.mark.parametrize("what", LIMITED)
def test_the_free_memory_is_that_of_the_container(what, tmp_path, monkeypatch):
    lines, files, left = LIMITED[what]
    groups(tmp_path, lines, {path: str(content) for path, content in files.items()})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    assert host.free(tmp_path) == (64 if left is None else left) * GIB
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=GIB // 2))
    assert host.free(tmp_path) == min(GIB // 2, (64 if left is None else left) * GIB)


def test_a_preflight_counts_with_the_memory_of_the_container(tmp_path, monkeypatch):
    groups(tmp_path, "0::/\n", {f"{V2}/memory.max": f"{GIB}", f"{V2}/memory.current": "0"})
    inside = functools.partial(host.free, tmp_path)
    monkeypatch.setattr(host, "free", inside)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    assert fit.free_bytes(torch.device("cpu"), 4) == GIB / 4


def test_a_disk_without_a_size_is_unknown_and_not_full(tmp_path, monkeypatch):
    """Mounted buckets report zeros."""
    nothing = SimpleNamespace(total=0, used=0, free=0)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: nothing)
    disk.check(tmp_path, checkpoint=GIB, number=2, export=GIB)
    full = SimpleNamespace(total=GIB, used=GIB, free=0)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(InputError, match="0.00 GiB free"):
        disk.check(tmp_path, checkpoint=GIB, number=2, export=GIB)
