"""What is refused before the first rollout, and the count of memory behind docs/train.md's
table."""

import contextlib
import functools
import json
import os
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from conftest import ROOT
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

import bpgo
import grpo_base
from benchmarks import memory
from common import cli, models
from common.errors import InputError
from common.memory import counting, preflight
from common.trainer import fisher, sharding

GIB = 2**30


@pytest.fixture
def tiny():
    return models.load("tiny-flux", torch.float32)


def size(module):
    return sum(weight.numel() for weight in module.parameters())


def test_memory_of_full_weights_and_of_a_lora(tiny):
    n, others = size(tiny.pipe.transformer), sum(map(size, (tiny.pipe.vae, tiny.pipe.text_encoder)))
    others += size(tiny.pipe.text_encoder_2)
    args = cli.defaults(grpo_base.Args, ema=0.9)
    full = {
        "trained weights": 4 * n,
        "frozen weights": 0,
        "gradients": 4 * n,
        "optimizer": 8 * n,
        "average": 4 * n,
    }
    rest = {"encoders, VAE": 2 * others, "rewards": 0, "activations": 100}
    found = counting.memory(tiny, args, 2, activations=100)
    assert found == {**full, **rest, "weights of a pass": 2 * n}  # autocast's copies
    split = {name: value / 4 for name, value in full.items()}
    block = max(map(size, tiny.pipe.transformer.transformer_blocks))
    rest["weights of a pass"] = 8 * block  # in bfloat16 two blocks, in float32 the gradients of one
    assert counting.memory(tiny, args, 2, 4, activations=100) == {
        **split,
        **rest,
        "gradients": 4 * n,
    }
    assert counting.memory(tiny, args, 2, 4, initial=True)["frozen weights"] == 2 * n / 4
    args.exchange_often = args.offload_encoders = True
    rest["encoders, VAE"] = 2 * size(tiny.pipe.vae)
    rest["activations"] = 2 * others - rest["encoders, VAE"]  # the encoders come for a moment
    assert counting.memory(tiny, args, 2, 4, activations=100) == {**split, **rest}

    tiny.pipe.transformer.requires_grad_(False)
    tiny.pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=tiny.lora_targets)
    )
    lora = size(tiny.pipe.transformer) - n
    found = counting.memory(tiny, cli.defaults(grpo_base.Args, lora_rank=4), 2)
    assert (
        found["trained weights"] == 4 * lora
        and found["frozen weights"] == 2 * n
        and not found["average"]
    )


def test_disk_of_checkpoints_and_export(tiny):
    n = size(tiny.pipe.transformer)
    args = cli.defaults(grpo_base.Args, steps=50, save_every=20)
    checkpoint, number, export = counting.disk(tiny, args, 4)
    assert (checkpoint, number) == (12 * n, 3) and export == 4 * sum(
        size(part) for part in tiny.pipe.components.values() if isinstance(part, torch.nn.Module)
    )
    assert counting.disk(tiny, args, 4, start=40)[1] == 1
    args.keep_checkpoints, args.ema = 1, 0.9
    assert counting.disk(tiny, args, 4)[:2] == (16 * n, 2)


def test_a_checkpoint_is_as_large_as_estimated(train, tiny):
    folder, _ = train(steps=1, ema=0.9)
    expected = counting.disk(tiny, cli.defaults(grpo_base.Args, ema=0.9), 4)[0]
    found = sum(file.stat().st_size for file in (folder / "checkpoints/step_000001").iterdir())
    assert found == pytest.approx(expected, rel=0.02)


def test_too_little_disk_is_one_line_before_the_first_rollout(train, monkeypatch, tmp_path):
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(0.05 * GIB))
    )
    with pytest.raises(
        InputError,
        match=r"2 checkpoints of 0.03 GiB and the export's 0.\d\d GiB do not fit .* 0.05 GiB",
    ):
        train(save_every=1)
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_one_line_before_the_first_rollout(train, monkeypatch):
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=int(0.001 * GIB))
    )
    with pytest.raises(InputError, match=r"each process would hold 0.0 GiB \(trained weights"):
        train()


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-sd", "tiny-wan-i2v"])
@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_activations_without_contents_are_those_of_a_real_pass(name, lora):
    real, outline = models.load(name, torch.float32), models.outline(name, torch.float32, 0)
    for model in (real, outline):
        for module in model.trainable.values():
            module.requires_grad_(not lora)
            if lora:
                module.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=model.lora_targets))
    counted = [
        counting.activations(outline, torch.float32, checkpointing)
        for checkpointing in (False, True)
    ]
    assert counted == [
        counting.count(real, torch.float32, checkpointing) for checkpointing in (False, True)
    ]
    assert 0 < counted[1] < counted[0]
    assert (
        real.unwanted == {}
    )  # nothing of the counting stays: guidance takes what is here for the empty prompt
    assert all(weight.device.type == "meta" for weight in outline.pipe.vae.parameters())


def test_attention_that_is_differentiated_twice_is_refused_where_its_scores_do_not_fit(monkeypatch):
    large = models.outline("tiny-flux", torch.float32, 0, height=256, width=256)
    module = large.pipe.transformer.requires_grad_(True)
    plain = counting.activations(large, torch.float32, False)
    with sdpa_kernel(SDPBackend.MATH):
        scores = counting.activations(large, torch.float32, False)
    tokens = large.noise_shape[0] + large.blank()["encoder_hidden_states"].shape[0]
    blocks = len(module.transformer_blocks) + len(module.single_transformer_blocks)
    assert scores - plain >= 0.9 * blocks * module.config.num_attention_heads * tokens**2 * 4
    run = SimpleNamespace(
        args=SimpleNamespace(model="tiny-flux"), batch=3, dtype=torch.float32, world=1
    )
    run.device, run.plain_modules = torch.device("cpu"), contextlib.nullcontext
    monkeypatch.setattr(preflight, "SMALL", 0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=6 * scores - 1))
    fisher.TrustRegion(run, 1e-4)
    with pytest.raises(
        InputError, match="attention scores of every block are kept: .* for 3 rows, .* --gamma"
    ):
        fisher.TrustRegion(run, 1e-4, large)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=6 * scores))
    fisher.TrustRegion(run, 1e-4, large)


def test_rewards_are_counted_once_and_a_judge_in_this_process_too():
    class Judge:
        def __init__(self, module):
            self.model, self.name = module, "judge"

    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    scorer = SimpleNamespace(
        module=module, head=module[0], judge=Judge(torch.nn.Linear(2, 2)), words=["a"]
    )
    other = SimpleNamespace(client=scorer.judge)
    assert sum(map(size, counting.reward_modules([scorer, other]))) == 40 + 6


def test_the_table_in_the_docs_is_not_stale():
    assert memory.row("sd1.4", True) in memory.PAGE.read_text()


# --- What is chosen before anything is loaded ---


def plan_of(monkeypatch, available, **settings):
    """What tiny-flux takes by itself where so many bytes are free, as if it were a large model."""
    monkeypatch.setattr(preflight, "SMALL", 0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    args = cli.defaults(
        grpo_base.Args,
        **{**dict(prompts_per_step=2, group_size=4, sampling_steps=4, micro_batch=8), **settings},
    )
    run = SimpleNamespace(
        args=args, world=1, shards=1, sharding=None, dtype=torch.float32, device=torch.device("cpu"),
        batch=args.micro_batch, precision="no", print=print, asked=replace(args), together=lambda one: [one],
    )  # fmt: skip
    return preflight.Plan(run, [])


@pytest.mark.long
def test_what_decides_is_chosen_from_the_memory_that_is_free(train, monkeypatch, capsys):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    plan = plan_of(monkeypatch, 0)
    args = plan.run.args
    sizes = [
        sum(plan.kinds(replace(args, **dict.fromkeys(way, True)), 1).values())
        for way in plan.ways()
    ]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 3
    alone, plan.run.world = plan.kinds(args, 1)["gradients"], 2
    assert plan.kinds(args, 1)["gradients"] == 2 * alone  # buckets of data parallelism
    loaded = []
    for size_, way in zip(sizes, plan.ways()):
        plan_of(monkeypatch, size_ / preflight.ROOM + 1000)
        monkeypatch.setattr(preflight, "check", lambda run, model: loaded.append(run.args))
        folder, _ = train(output=f"{len(way)}", steps=1)
        assert [
            name
            for name in ("offload_encoders", "gradient_checkpointing")
            if getattr(loaded[-1], name)
        ] == [*way]
        assert ("--offload-encoders" in capsys.readouterr().out) == ("offload_encoders" in way)
        plan_of(monkeypatch, 2**40)  # a larger machine goes on: nothing has to be chosen
        train(output=f"{len(way)}", steps=2, resume="latest")
        assert (
            not loaded[-1].offload_encoders and "from here on with" not in capsys.readouterr().out
        )
        config = json.loads((folder / "config.json").read_text())
        assert not any(
            config[name]
            for name in ("offload_encoders", "gradient_checkpointing", "exchange_often")
        )
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    plan_of(monkeypatch, sizes[-1] / preflight.ROOM - 1000)
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(
        InputError, match=r"each process would hold 0.0 GiB .*; what fits: .* --micro-batch 1"
    ):
        train(output="none")


full_size, activations = (
    functools.cache(memory.full_size),
    functools.cache(counting.activations),
)  # seconds each


@pytest.mark.parametrize(
    "name, lora, world, gib, ways, offers",
    [
        ("flux", 0, 1, 80, None, ["--lora-rank 64", "--num_processes 4"]),
        ("flux", 0, 1, 48, None, ["--lora-rank 64", "--num_processes 8"]),
        ("flux", 64, 1, 48, (), []),
        ("flux", 0, 8, 80, ("offload_encoders", "sharded", "exchange_often"), []),
        ("flux", 0, 16, 80, ("offload_encoders", "sharded", "exchange_often"), []),
        (
            "flux",
            0,
            16,
            30,
            ("offload_encoders", "sharded", "exchange_often", "sharded over all machines"),
            [],
        ),
        ("wan2.1-1.3b", 0, 8, 80, (), []),
    ],
)
def test_full_sizes_fit_or_are_told_a_command_that_does(
    name, lora, world, gib, ways, offers, monkeypatch, capsys
):
    monkeypatch.setattr(preflight.Plan, "outline", lambda plan, rank: full_size(name, rank))
    monkeypatch.setattr(counting, "activations", activations)
    monkeypatch.setattr(preflight, "free", lambda run: gib * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**50))
    args = cli.defaults(bpgo.Args, name, lora_rank=lora)
    run = SimpleNamespace(
        args=args, world=world, shards=min(world, 8), sharding=None, dtype=torch.bfloat16,
        device=torch.device("cpu"), batch=1, print=print, asked=replace(args), together=lambda one: [one] * world,
    )  # fmt: skip
    args.micro_batch = 1
    if ways is None:
        monkeypatch.setattr(sys, "argv", ["bpgo.py", "--model", name])
        with pytest.raises(InputError) as refused:
            preflight.settle(run, [])
        assert all(f"{words}" in str(refused.value) for words in offers), refused.value
        assert str(refused.value).count("bpgo.py --model flux") == len(offers)
    else:
        preflight.settle(run, [])
        assert [
            name for name in ways if name not in preflight.SHARDED and not getattr(args, name)
        ] == []
        assert run.shards == (world if "sharded over all machines" in ways else min(world, 8))
        assert bool(run.sharding) == ("sharded" in ways) and args.exchange_often == (
            "exchange_often" in ways
        )
        assert run.activations > GIB
        words = r"(\d+) rows a pass would fit, too, .* --micro-batch \1 --decode-batch 1"
        said = re.search(words, capsys.readouterr().out)
        assert_most_rows(run, int(said[1]) if said else 1)


def assert_most_rows(run, rows):
    """They fit into three quarters of the memory, and twice as many do not, or are not there."""
    plan, share = (
        preflight.Plan(run, []),
        run.args.prompts_per_step * run.args.group_size // run.world,
    )
    now, more = (
        sum(plan.kinds(replace(run.args, micro_batch=n), plan.shards(()), batch=n).values())
        <= 0.75 / 0.9 * plan.have
        for n in (rows, 2 * rows)
    )
    assert rows == 1 or now and (not more or 2 * rows > share)


@pytest.mark.parametrize(
    "asked, gib, least", [("auto", 80, 8), ("auto", 60, 2), ("auto", 48, 1), (1, 80, 1)]
)
def test_on_a_gpu_a_pass_takes_the_rows_that_fit(asked, gib, least, monkeypatch, capsys):
    monkeypatch.setattr(preflight.Plan, "outline", lambda plan, rank: full_size("flux", rank))
    monkeypatch.setattr(counting, "activations", activations)
    monkeypatch.setattr(preflight, "free", lambda run: gib * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**50))
    args = cli.defaults(bpgo.Args, "flux", lora_rank=64)
    assert args.micro_batch == "auto", "the default of a full-size model"
    run = SimpleNamespace(
        args=args, world=1, shards=1, sharding=None, dtype=torch.bfloat16, device=torch.device("cuda"), batch=1,
        print=print, asked=replace(args, micro_batch=asked), together=lambda one: [one],
    )  # fmt: skip
    args.micro_batch = 1
    preflight.settle(run, [])
    rows, said = args.micro_batch, capsys.readouterr().out
    assert rows >= least and (f"--micro-batch {rows}, for" in said) == (rows > 1)
    assert args.decode_batch == (1 if rows > 1 else 0) and ("would fit, too" in said) == (
        asked == 1
    )
    kinds = preflight.Plan(run, []).kinds(args, 1, batch=rows)
    assert kinds["activations"] == run.activations
    if asked == "auto":
        assert_most_rows(run, rows)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_offload"])
def test_sharding_by_itself_is_that_of_the_shipped_configuration(name, monkeypatch):
    flags = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["fsdp_config"]
    monkeypatch.setattr(sharding, "asked", False, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch hands the file on
    for flag, value in flags.items():
        monkeypatch.setenv(flag.upper(), str(value))
    shipped, own = sharding.take_plugin(), sharding.own_plugin()
    assert sharding.take_plugin()  # of the run after a calibration
    for what in ("fsdp_version", "reshard_after_forward", "activation_checkpointing"):
        assert (
            getattr(shipped, what)
            == getattr(own, what)
            == flags[f"fsdp_{what.removeprefix('fsdp_')}"]
        ), what
    offloaded = name == "fsdp2_offload"
    assert sharding.offloads(shipped, "cuda") == offloaded and not sharding.offloads(own, "cuda")
    assert not sharding.offloads(shipped, "cpu")
