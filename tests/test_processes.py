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

import editing
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
from common import errors, models
from common.args import defaults
from common.memory import ways
from common.trainer import Processes, checkpoint_files, sharding

SMALL = dict(
    prompts_per_step=3, group_size=4, sampling_steps=4, micro_batch=6, minibatches=1, steps=4,
    save_every=2, eval_every=0, sample_every=0, tracker="none", learning_rate=1e-5, reward=("red",),
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
MASKED["self_paced_masked"][1].update(reward=("picky", "green"), thresholds=(0.5, 0.5))
for variant, name in (("released", "bpgo_masked"), ("v4", "self_paced_masked")):
    script, settings = MASKED[name]
    MASKED[f"{name}_{variant}"] = script, {**settings, "variant": variant, "alpha": 1.0}
RUNS |= MASKED
SOME = {
    "ddp": (
        "grpo_base-full",
        "slas-full",
        "self_paced-lora",
        "experts",
        "parts",
        "average",
        *MASKED,
    ),
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
    sharded = ", sharded" if config.startswith("fsdp2") else ""
    assert done.stdout.count(f"on {processes} x cpu{sharded}") == len(jobs)


def one(monkeypatch, name, folder, **changes):
    script, settings = RUNS[name]
    monkeypatch.setattr(sys, "argv", [script.__file__])
    script.main(defaults(script.Args, **{**settings, "output": str(folder), **changes}))
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
    last = checkpoint_files.newest_first(a)[0]
    states = (checkpoint_files.read(folder / "checkpoints" / last.name)[1] for folder in (a, b))
    before, after = (sharding.distribute(state) for state in states)
    assert before.keys() == after.keys()
    for name in ("transformer", "transformer_2", "ema"):
        for (key, value), (_, other) in zip(
            leaves(before.get(name, {})), leaves(after.get(name, {})), strict=True
        ):
            torch.testing.assert_close(
                torch.as_tensor(other),
                torch.as_tensor(value),
                rtol=0,
                atol=1e-5,
                msg=lambda m, key=key: f"{key}: {m}",
            )


def assert_same_gradients(a, b):
    """Adam's first moments, which are linear in the gradients, agree to rounding.

    The weights are not: Adam divides a gradient that is rounding alone by its own size.
    """
    last = checkpoint_files.newest_first(a)[0].name
    moments = []
    for folder in (a, b):
        state = checkpoint_files.read(folder / "checkpoints" / last)[1]["optimizer"]
        state = sharding.distribute(state)["state"]
        moments.append([state[key]["exp_avg"] for key in sorted(state)])
    largest = max(moment.abs().max() for moment in moments[0])
    for ours, theirs in zip(*moments, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * largest


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
        two(tmp_path, [*jobs, *(job for name in going_on for job in lower(folder, name))], config)
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
@pytest.mark.parametrize(
    "families",
    [("sd3", "qwen"), ("z_image",), ("flux2", "ti2v"), ("kontext",), ("qwen_edit",)],
    ids=" ".join,
)
def test_families_without_a_tiny_model_train_on_two_processes_as_on_one(
    families, config, tmp_path, monkeypatch
):
    """Weights that are in no answer get no gradient: a process that waited for one would wait for
    ever."""
    for family in families:
        getattr(pipelines, family)().save_pretrained(tmp_path / family)
        folder = dict(
            model=str(tmp_path / family),
            prompts=models.MODELS["tiny-flux"]["prompts"],
            guidance=2.0,
        )
        folder |= dict(
            height=32, width=32, sde="flow", shift=1.0, noise_level=0.8, steps=2, learning_rate=1e-4
        )
        if family in ("kontext", "qwen_edit"):
            lines = [
                f"{editing.save(tmp_path / f'{seed}.png', 32, 32, seed=seed)}\tmake it red"
                for seed in range(4)
            ]
            folder["prompts"] = str(tmp_path / "edits.txt")
            (tmp_path / "edits.txt").write_text("\n".join(lines))
        if family == "ti2v":
            folder |= dict(frames=5, reward=("change",))
        for rank in (0, 2):
            monkeypatch.setitem(
                RUNS, f"{family}-{rank}", (grpo_base, {**SMALL, **folder, "lora_rank": rank})
            )
    names = [f"{family}-{rank}" for family in families for rank in (0, 2)]
    two(tmp_path, [words(*RUNS[name], tmp_path / config / name) for name in names], config)
    for name in names:
        alone = one(monkeypatch, name, tmp_path / "alone" / name)
        assert_same(alone, tmp_path / config / name, steps=2)
        assert_same_gradients(alone, tmp_path / config / name)
        assert metrics(alone)[0]["grad_norm"] > 0


@pytest.mark.long
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_a_run_that_starts_from_a_lora_trains_on_two_processes_as_on_one(
    config, tmp_path, monkeypatch
):
    """The KL term's reference is the frozen copy of that LoRA, on both processes and after a
    resume."""
    settings = {**SMALL, "lora_rank": 4, "lora_alpha": 16.0}
    monkeypatch.setitem(RUNS, "first", (grpo_base, {**settings, "steps": 1, "learning_rate": 1e-2}))
    start = {**settings, "init_lora": str(one(monkeypatch, "first", tmp_path / "first") / "export")}
    start |= {"kl_coef": 10.0, "learning_rate": 1e-3}
    monkeypatch.setitem(RUNS, "from", (grpo_base, start))
    job = words(*RUNS["from"], tmp_path / config)
    two(tmp_path, [[*job, "--steps=2"], [*job, "--resume=latest"]], config)
    alone = one(monkeypatch, "from", tmp_path / "alone")
    assert_same(alone, tmp_path / config, steps=4)
    free = one(monkeypatch, "from", tmp_path / "free", kl_coef=0.0)
    assert metrics(free)[3]["grad_norm"] != pytest.approx(metrics(alone)[3]["grad_norm"], rel=1e-3)


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
    """Command lines: a new run with a lower learning rate begins with an earlier checkpoint, and
    continues."""
    script, new = RUNS[name][0].__file__, folder / f"{name}-lower"
    first = [
        f"--resume={folder / name}/checkpoints/step_000002",
        f"--output={new}",
        "--learning-rate=1e-12",
    ]
    return [
        [script, *first, "--steps=3"],
        [script, "--resume=latest", f"--output={new}", "--steps=4"],
    ]


def assert_lower(folder, name):
    new = folder / f"{name}-lower"
    assert metrics(new)[:2] == metrics(folder / name)[:2] and len(metrics(new)) == 4
    states = [
        sharding.distribute(checkpoint_files.read(path)[1]["transformer"])
        for path in checkpoint_files.newest_first(new)
    ]
    assert len(states) == 3 and len(checkpoint_files.newest_first(folder / name)) == 2
    for after, before in zip(states, states[1:]):
        assert 0 < max((after[key] - value).abs().max() for key, value in before.items()) < 1e-9


def test_every_process_gets_as_many_micro_batches():
    """Five rows are kept of one process's eight and none of the others': three micro-batches, and
    as many of padding rows, all of one shape."""
    kept = torch.zeros(4, 6, dtype=torch.bool)
    kept[0, [0, 2, 3, 5]] = kept[1, 1] = True
    processes = object.__new__(Processes)
    processes.world = 3
    processes.device = torch.device("cpu")
    for rank in range(3):
        processes.rank = rank
        batches = processes.micro_batches(kept, 2)
        assert [len(mb.index) for mb in batches] == [2, 2, 2]
        index = torch.cat([mb.index for mb in batches])
        real = torch.cat([mb.real for mb in batches])
        assert index.tolist() == ([0, 2, 3, 5, 7, -1] if rank == 0 else [-1] * 6)
        assert real.tolist() == (index >= 0).tolist()
    assert processes.micro_batches(torch.zeros(4, 6, dtype=torch.bool), 2) == []


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
    args = defaults(grpo_base.Args, group_size=12, **{"minibatches": 1, **settings})
    assert ways.batch_size(args, share) == size


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
        (dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="1"), "FSDP1 is not supported"),
        (dict(ACCELERATE_USE_DEEPSPEED="true"), "DeepSpeed is not supported"),
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
    Processes(timeout_minutes=45.0)
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
    with pytest.raises(errors.InputError, match="--exchange-often: it needs sharded weights"):
        train(exchange_often=True)


def test_states_of_several_processes_are_put_together_in_order(tmp_path):
    whole = torch.arange(14.0).view(7, 2)
    checkpoint_files.begin(tmp_path, 3)
    checkpoint_files.put(tmp_path, 3, {"prior": {"mean": whole}})
    for part, rows in enumerate(whole.split(3)):
        checkpoint_files.put(
            tmp_path, 3, {"optimizer": {"state": {0: {"step": 5.0, "mean": {"shard": rows}}}}}, part
        )
    checkpoint_files.publish(tmp_path, 3, {"prior": 0, "optimizer": 3})
    step, states = checkpoint_files.read(tmp_path / "checkpoints/step_000003")
    assert step == 3 and torch.equal(states["prior"]["mean"], whole)
    (state,) = sharding.distribute(states["optimizer"])["state"].values()
    assert state["step"] == 5.0 and torch.equal(state["mean"], whole)
    (tmp_path / "checkpoints/step_000003/optimizer.1.pt").unlink()
    with pytest.raises(checkpoint_files.Broken, match="optimizer.1.pt"):
        checkpoint_files.read(tmp_path / "checkpoints/step_000003")


# --- A process fails or dies, the launcher is asked to stop ---


@pytest.mark.long
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_a_process_that_fails_alone_ends_the_others(config, tmp_path):
    """One of two has no memory in the third step's second rollout. It names what helps, the other
    one does not wait for it, and the checkpoints are intact."""
    run = tmp_path / "run"
    settings = {**SMALL, "micro_batch": 3, "save_every": 1}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([["out of memory", *words(grpo_base, settings, run)]]))
    script = str(ROOT / "tests/several_runs.py")
    done = launch(2, script, str(plan), config=ROOT / f"configs/{config}.yaml")
    assert done.returncode != 0
    said = done.stderr
    assert (
        said.count("error: out of memory in the rollout (CUDA out of memory); lower --micro") == 1
    )
    assert "[rank0]: Traceback" not in said and "[rank1]: Traceback" not in said
    assert checkpoint_files.read(checkpoint_files.newest_first(run)[0])[0] == 2


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
    while len(checkpoint_files.newest_first(run)) < 2:
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
        said.count("another process of this run ended") == 1 and said.count("--resume latest") == 1
    )
    assert "[rank0]: Traceback" not in said
    last, _ = checkpoint_files.read(checkpoint_files.newest_first(run)[0])

    process = launched(2, *words(grpo_base, {**settings, "save_every": 0, "resume": "latest"}, run))
    while len(metrics(run)) < last + 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    saved, _ = checkpoint_files.read(checkpoint_files.newest_first(run)[0])
    assert saved == len(metrics(run)) >= last + 2
    assert f"{saved} steps are saved; continue with --output {run} --resume latest" in out
    assert f"stopped: SIGTERM: stopped after {saved} steps" in said


@pytest.mark.long
def test_a_launcher_sends_the_notice_of_slurm_on_when_it_is_told_to(tmp_path, monkeypatch):
    """With the variable of configs/slurm.sh; without it SIGUSR1 would end the launcher."""
    (value,) = re.findall(
        r"^export PET_SIGNALS_TO_HANDLE=(\S+)", (ROOT / "configs/slurm.sh").read_text(), re.M
    )
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", value)
    settings = {**SMALL, "reward": ("verifier",), "prompts_per_step": 2, "save_every": 0}
    run = tmp_path / "run"
    process = launched(2, *words(grpo_base, {**settings, "steps": 1000}, run))
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 1:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    out, said = process.communicate(timeout=120)
    saved, _ = checkpoint_files.read(checkpoint_files.newest_first(run)[0])
    assert saved == len(metrics(run)) >= 1
    assert f"stopped: SIGUSR1: stopped after {saved} steps" in said
