"""Two processes, data-parallel and sharded, against one: Accelerate launches them, and they meet
over gloo."""

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pipelines
import pytest
import smooth
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import ROOT, launch, launched, metrics, weights
from diffusers import FluxPipeline

import bpgo
import grpo_base
import self_paced
import slas
from common import cli, errors, models
from common.trainer import checkpoints, sharding
from common.trainer.processes import processes
from common.trainer.runtime import Runtime, batch_size
from common.trainer.signals import LOST

SMALL = dict(
    prompts_per_step=3, group_size=4, sampling_steps=4, micro_batch=6, minibatches=1, steps=4, save_every=2,
    eval_every=0, sample_every=0, tracker="none", learning_rate=1e-5, reward=("red",),
)  # fmt: skip
PARTS = dict(
    best_of=2, minibatches=2, micro_batch=1, clip_range=1e-6, aggregate="advantages",
    reward=("red", f"{ROOT}/tests/smooth.py:green=2"), watch=(f"{ROOT}/tests/smooth.py:blue",),
)  # fmt: skip
MOVING = {**SMALL, "model": "tiny-wan-i2v", "steps": 2, "micro_batch": 3, "reward": ("change",)}
RUNS = {
    f"{script.__name__}-{kind}": (
        script,
        {**SMALL, "lora_rank": 4 * (kind == "lora"), "reward": rewards},
    )
    for script, rewards in {
        **dict.fromkeys((grpo_base, bpgo, slas), ("red",)),
        self_paced: smooth.COLOURS,
    }.items()
    for kind in ("full", "lora")
}
RUNS |= {
    "experts": (grpo_base, MOVING),
    "window": (grpo_base, {**MOVING, "sde_window": 1}),  # steps that train one expert alone
    "average": (grpo_base, {**SMALL, "kl_coef": 0.1, "best_of": 2, "ema": 0.9}),
    # three rows a part, wherever their processes are: of two parts, one may have all of its rows in
    # one process
    "parts": (grpo_base, SMALL | PARTS),
}
# a prompt without any score, once in the middle and once at the end, where one process has less to
# do than the other
MASKED = {
    f"{script.__name__}_masked": (
        script,
        {**SMALL, "steps": 2, "micro_batch": 2, "reward": ("picky",)},
    )
    for script in (grpo_base, bpgo, slas, self_paced)
}
MASKED["self_paced_masked"][1].update(reward=("picky", "green"), thresholds=(0.5,))
RUNS |= MASKED
SOME = {
    "ddp": ("grpo_base-full", "slas-full", "self_paced-lora", "experts", "parts", *MASKED),
    "fsdp2": ("grpo_base-full", "bpgo-lora", "window", "average"),
}
ALL = dict.fromkeys(SOME, tuple(RUNS))


def words(script, settings, output):
    lists = {
        name: value if isinstance(value, tuple) else (value,) for name, value in settings.items()
    }
    flags = [
        word
        for name, values in lists.items()
        for word in (f"--{name.replace('_', '-')}", *map(str, values))
    ]
    return [script.__file__, *flags, f"--output={output}"]


def two(folder, jobs, config, processes=2):
    """The command lines one after another, by two processes of one launch."""
    plan = folder / f"{config}.json"
    plan.write_text(json.dumps(jobs))
    done = launch(
        processes,
        str(ROOT / "tests/several_runs.py"),
        str(plan),
        config=ROOT / f"configs/{config}.yaml",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(
        f"on {processes} x cpu" + ", sharded" * config.startswith("fsdp2")
    ) == len(jobs)
    return done.stderr


def assert_rescued(folder, said):
    """One process of two had no memory in the third step's rollout: both finished steps were saved,
    by both."""
    assert "error: out of memory in the rollout (CUDA out of memory): lower --micro-batch" in said
    assert "error: another process of this run cannot go on" in said
    assert [path.name for path in checkpoints.newest_first(folder)] == ["step_000002"] and len(
        metrics(folder)
    ) == 2


def one(monkeypatch, name, folder, **changes):
    script, settings = RUNS[name]
    monkeypatch.setattr(sys, "argv", [script.__file__])
    script.main(cli.defaults(script.Args, **{**settings, "output": str(folder), **changes}))
    return folder


def assert_same(a, b, steps):
    """Runs a and b agree: in every number of the last `steps` steps, and in their weights."""
    rows = metrics(a)[-steps:], metrics(b)[-steps:]
    for row, other in zip(*rows, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            # two are rounding alone: the loss, a mean of advantages that cancel out, and |exp(0) -
            # 1|
            scale = {"loss": row["advantage_abs_mean"], "ratio_error": 1.0}.get(key, abs(value))
            assert abs(other[key] - value) <= 1e-5 * scale + 1e-9, (
                str(b),
                row["step"],
                key,
                value,
                other[key],
            )
    last = checkpoints.newest_first(a)[0]
    states = (checkpoints.read(folder / "checkpoints" / last.name)[1] for folder in (a, b))
    before, after = (sharding.deal(state) for state in states)
    assert before.keys() == after.keys()
    for name in ("transformer", "transformer_2", "ema"):
        for (key, value), (_, other) in zip(
            leaves(before.get(name, {})), leaves(after.get(name, {})), strict=True
        ):
            torch.testing.assert_close(
                torch.as_tensor(other), torch.as_tensor(value), rtol=0, atol=1e-5, msg=key
            )


def leaves(state, name=""):
    """(name, value) of everything in a tree of dictionaries and lists."""
    if not isinstance(state, (dict, list)):
        return [(name, state)]
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return [leaf for key, value in items for leaf in leaves(value, f"{name}.{key}")]


@pytest.mark.long
@pytest.mark.parametrize(
    "runs", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_two_processes_train_as_one(runs, tmp_path, monkeypatch):
    """A group of 4 in chunks of 6 rows spans both processes; the numbers of four steps, and the
    weights after them. Sharded, one run stops after two steps and goes on from its checkpoint, one
    exchanges gradients every time."""
    for config, names in runs.items():
        folder = tmp_path / config
        jobs = [words(*RUNS[name], folder / name) for name in names]
        if config == "fsdp2":
            jobs.insert(0, [*jobs[0], "--steps=2"])
            jobs[1] = [*jobs[1], "--resume=latest"]
            jobs.append([*words(*RUNS["average"], folder / "often"), "--exchange-often"])
        going_on = [name for name in names if "-" in name][
            : None if runs is ALL else 1
        ]  # of one script, or of all
        if config == "ddp":
            settings = {**SMALL, "micro_batch": 3, "save_every": 0}  # two rollouts a step
            jobs.append(["out of memory", *words(grpo_base, settings, folder / "rescued")])
        said = two(
            tmp_path, [*jobs, *(job for name in going_on for job in lower(folder, name))], config
        )
        if config == "ddp":
            assert_rescued(folder / "rescued", said)
        for name in going_on:
            assert_lower(folder, name)
    for name in dict.fromkeys([name for names in runs.values() for name in names]):
        alone = one(monkeypatch, name, tmp_path / "alone" / name)
        assert name not in MASKED or all(
            row["skipped_groups"] == 1 and row["grad_norm"] > 0 for row in metrics(alone)
        )
        for config in (config for config, names in runs.items() if name in names):
            assert metrics(tmp_path / config / name)[0]["reward_mean"] == pytest.approx(
                metrics(alone)[0]["reward_mean"], rel=1e-6
            )
            assert_same(alone, tmp_path / config / name, steps=len(metrics(alone)))
    assert_same(tmp_path / "alone/average", tmp_path / "fsdp2/often", steps=4)

    # what two processes left at step 2, sharded or not, one goes on with
    averaged = [config for config, names in runs.items() if "average" in names]
    for config in averaged:
        shutil.rmtree(tmp_path / config / "average/checkpoints/step_000004")
        shutil.copytree(tmp_path / config / "average", tmp_path / f"{config}-then-one")
        one(monkeypatch, "average", tmp_path / f"{config}-then-one", resume="latest")
        assert_same(tmp_path / "alone/average", tmp_path / f"{config}-then-one", steps=2)

    # both exports are plain pipelines, the average between the first and the last weights
    for config in averaged:
        raw, mean = (
            FluxPipeline.from_pretrained(
                tmp_path / config / "average" / name
            ).transformer.state_dict()
            for name in ("export", "export_ema")
        )
        kept = weights(tmp_path / "alone/average", 4)
        torch.testing.assert_close(dict(raw), kept, rtol=0, atol=1e-5)
        assert any((raw[name] - mean[name]).abs().max() > 1e-7 for name in raw)


@pytest.mark.long
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_stable_diffusion_3_and_qwen_image_train_on_two_processes_as_on_one(
    config, tmp_path, monkeypatch
):
    """Weights that are in no answer get no gradient: a process that waited for one would wait for
    ever."""
    for family in ("sd3", "qwen"):
        getattr(pipelines, family)().save_pretrained(tmp_path / family)
        folder = dict(
            model=str(tmp_path / family),
            prompts=models.settings("tiny-flux")["prompts"],
            guidance=2.0,
        )
        folder |= dict(
            height=32, width=32, sde="flow", shift=1.0, noise_level=0.8, steps=2, learning_rate=1e-3
        )
        for rank in (0, 2):
            monkeypatch.setitem(
                RUNS, f"{family}-{rank}", (grpo_base, {**SMALL, **folder, "lora_rank": rank})
            )
    names = [f"{family}-{rank}" for family in ("sd3", "qwen") for rank in (0, 2)]
    two(tmp_path, [words(*RUNS[name], tmp_path / config / name) for name in names], config)
    for name in names:
        alone = one(monkeypatch, name, tmp_path / "alone" / name)
        assert_same(alone, tmp_path / config / name, steps=2)
        assert metrics(alone)[0]["grad_norm"] > 0


@pytest.mark.slow
def test_two_machines_of_two_processes_train_as_one_process(tmp_path, monkeypatch):
    """Each machine holds all weights, sharded over its two processes: only gradients go from one to
    the other. The first machine writes the checkpoint, which one process goes on with."""
    names = {"grpo_base-full": "", "bpgo-lora": "", "average": "--exchange-often"}
    jobs = [
        ["two machines", *words(*RUNS[name], tmp_path / name), *flag.split()]
        for name, flag in names.items()
    ]
    jobs[0].append("--steps=2")
    two(tmp_path, [*jobs, [*jobs[0][:-1], "--resume=latest"]], "fsdp2", processes=4)
    for name in names:
        alone = one(monkeypatch, name, tmp_path / "alone" / name)
        assert_same(alone, tmp_path / name, steps=4)
        parts = json.loads(
            (tmp_path / name / "checkpoints/step_000004/checkpoint.json").read_text()
        )["parts"]
        assert parts["transformer"] == parts["optimizer"] == 2
    shutil.rmtree(tmp_path / "average/checkpoints/step_000004")
    one(monkeypatch, "average", tmp_path / "average", resume="latest", exchange_often=False)
    assert_same(tmp_path / "alone/average", tmp_path / "average", steps=2)


def lower(folder, name):
    """Goes on from an earlier checkpoint in a new run with a lower learning rate, and with that
    run's own last one."""
    script, new = RUNS[name][0].__file__, folder / f"{name}-lower"
    first = [
        f"--resume={folder / name}/checkpoints/step_000002",
        f"--output={new}",
        "--learning-rate=1e-12",
    ]
    return [
        [script, *first, "--steps=3"],
        [script, f"--resume={new}/checkpoints/step_000003", "--steps=4"],
    ]


def assert_lower(folder, name):
    new = folder / f"{name}-lower"
    assert metrics(new)[:2] == metrics(folder / name)[:2] and len(metrics(new)) == 4
    states = [
        sharding.deal(checkpoints.read(path)[1]["transformer"])
        for path in checkpoints.newest_first(new)
    ]
    assert len(states) == 3 and len(checkpoints.newest_first(folder / name)) == 2
    for after, before in zip(states, states[1:]):
        assert 0 < max((after[key] - value).abs().max() for key, value in before.items()) < 1e-9


def test_every_process_gets_as_many_micro_batches_and_can_tell_which_is_the_last():
    """Four rows are kept of one process's eight and none of the others': three micro-batches, and
    as many of filler, all of one shape."""
    kept = torch.zeros(4, 6, dtype=torch.bool)
    kept[0, [0, 2, 3, 5]] = kept[1, 1] = True
    for process in range(3):
        run = SimpleNamespace(world=3, index=process, batch=2)
        batches = Runtime.micro_batches(run, kept)
        assert [len(rows) for rows in batches] == [2, 2, 2]
        assert sum(rows is batches[-1] for rows in batches) == 1
        assert torch.cat(batches).tolist() == ([0, 2, 3, 5, 7, -1] if process == 0 else [-1] * 6)
    assert Runtime.micro_batches(run, torch.zeros(4, 6, dtype=torch.bool)) == []


@pytest.mark.parametrize(
    "share, settings, size",
    [
        (96, dict(micro_batch=96), 96),
        (96, dict(micro_batch=32), 32),
        (
            96,
            dict(micro_batch=96, minibatches=3),
            32,
        ),  # and not 96, of which two thirds would be filler
        (96, dict(micro_batch=96, best_of=4), 32),
        (16, dict(micro_batch=1, best_of=8, minibatches=2), 1),
        (10, dict(micro_batch=4), 4),
        (10, dict(micro_batch=8), 5),
        (9, dict(micro_batch=2), 2),
    ],
)
def test_rows_of_a_pass_leave_few_fillers(share, settings, size):
    args = cli.defaults(grpo_base.Args, group_size=12, **{"minibatches": 1, **settings})
    assert batch_size(args, share) == size


# --- Sharding ---


def test_every_familys_blocks_are_in_the_shipped_configurations():
    named = {
        name: set(
            re.search(r"layer_cls_to_wrap: (\S+)", (ROOT / f"configs/{name}.yaml").read_text())[
                1
            ].split(",")
        )
        for name in ("fsdp2", "fsdp2_offload", "fsdp2_multi_node", "fsdp2_two_experts")
    }
    families = [
        getattr(importlib.import_module(module), cls) for module, cls in models.FAMILIES.values()
    ]
    of_two = {block for family in families for block in family.blocks if len(family.trained) > 1}
    assert named.pop("fsdp2_two_experts") == of_two
    blocks = {block for family in families for block in family.blocks}
    assert all(classes == blocks for classes in named.values())


@pytest.mark.parametrize(
    "environment, line",
    [
        (dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="1"), "only FSDP2 is supported"),
        (
            dict(ACCELERATE_USE_DEEPSPEED="true"),
            "DeepSpeed wants a model and its optimizer in one engine",
        ),
    ],
)
def test_another_way_of_sharding_is_one_clear_line(train, monkeypatch, environment, line):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.InputError, match=line):
        train()


@pytest.fixture
def group_of_one(monkeypatch):
    """Inside, runs are those of a group of one process, as a launcher of several makes it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = dict(
        MASTER_ADDR="localhost", MASTER_PORT=port, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        PartialState().destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def test_processes_wait_for_one_another_as_long_as_a_flag_says(group_of_one):
    processes(cli.defaults(grpo_base.Args, process_timeout=45.0))
    group = torch.distributed.distributed_c10d._get_default_group()
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=45)


def test_a_run_leaves_the_processes_together_for_the_next_and_the_program_does_not(
    group_of_one, train
):
    train(steps=1)  # as a stage of --calibrate
    assert torch.distributed.is_initialized()
    errors.run(lambda args: None, None)
    assert not torch.distributed.is_initialized()


def test_exchanging_often_belongs_to_sharded_weights(train):
    with pytest.raises(errors.InputError, match="--exchange-often belongs to sharded weights"):
        train(exchange_often=True)


def test_a_process_without_memory_says_nothing_where_the_others_wait_for_its_shards(capsys):
    """They are in the middle of gathering weights: whatever it sent would be taken for those. What
    that loses, it says to whoever reads."""
    said = []
    run = SimpleNamespace(
        sampling=True, sharding=None, world=2, device=torch.device("cpu"), gather=said.append
    )
    run.step, run.saved = 25, 20
    assert Runtime.alarm(run) and said.pop().tolist() == [LOST]
    run.sharding = sharding.own_plugin()
    assert "lost" not in capsys.readouterr().out
    assert not Runtime.alarm(run) and not said
    assert capsys.readouterr().out.startswith(
        "the last 5 steps are lost, as the other processes wait for this one"
    )


def test_states_of_several_processes_are_put_together_in_order(tmp_path):
    whole = torch.arange(14.0).view(7, 2)
    checkpoints.begin(tmp_path, 3)
    checkpoints.put(tmp_path, 3, {"prior": {"mean": whole}})
    for part, rows in enumerate(whole.split(3)):
        checkpoints.put(
            tmp_path, 3, {"optimizer": {"state": {0: {"step": 5.0, "mean": {"shard": rows}}}}}, part
        )
    checkpoints.publish(tmp_path, 3, {"prior": 0, "optimizer": 3})
    step, states = checkpoints.read(tmp_path / "checkpoints/step_000003")
    assert step == 3 and torch.equal(states["prior"]["mean"], whole)
    (state,) = sharding.deal(states["optimizer"])["state"].values()
    assert state["step"] == 5.0 and torch.equal(state["mean"], whole)
    (tmp_path / "checkpoints/step_000003/optimizer.1.pt").unlink()
    with pytest.raises(checkpoints.Broken, match="its optimizer.1.pt does not load"):
        checkpoints.read(tmp_path / "checkpoints/step_000003")


# --- A process dies, the launcher is asked to stop ---


@pytest.mark.long
def test_a_launch_outlives_a_killed_process_and_a_signal(tmp_path):
    """When one of two is killed the other ends; when the launcher gets SIGTERM, both finish their
    step and save it."""
    settings = {
        **SMALL,
        "reward": ("verifier",),
        "prompts_per_step": 2,
        "steps": 1000,
        "save_every": 1,
    }
    settings["keep_checkpoints"] = 3
    run = tmp_path / "run"
    process = launched(2, *words(grpo_base, settings, run))
    while len(checkpoints.newest_first(run)) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    first = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(first[-1]), signal.SIGKILL)
    killed = time.time()
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and time.time() - killed < 60
    assert (
        said.count("error: another process of this run is gone") == 1
        and said.count("--resume latest") == 1
    )
    assert "[rank0]: Traceback" not in said
    last, _ = checkpoints.read(checkpoints.newest_first(run)[0])

    process = launched(2, *words(grpo_base, {**settings, "save_every": 0, "resume": "latest"}, run))
    while len(metrics(run)) < last + 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    saved, _ = checkpoints.read(checkpoints.newest_first(run)[0])
    assert saved == len(metrics(run)) >= last + 2
    assert f"{saved} steps are saved; go on with --output {run} --resume latest" in out
    assert f"stopped: SIGTERM: stopped after {saved} steps" in said
