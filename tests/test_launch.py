"""What a launcher, its configuration or a shell leaves in the environment: supported, refused by
name, or without effect."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from torch.distributed.fsdp import FSDPModule

from common import models
from common.errors import InputError
from common.trainer import Processes, launch, sharding


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No variable of this shell, and no group of an earlier test; both are put back."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", *launch.MPI)):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    monkeypatch.setattr(sharding, "asked", False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def put(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


# --- Accelerate's settings ---

REFUSED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
    "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_USE_FSDP": "yes",  # Accelerate shards for "true" alone
    "ACCELERATE_SPLIT_BATCHES": "1",
    "ACCELERATE_TORCH_DEVICE": "cuda:1",
    "ACCELERATE_GRADIENT_CLIPPING": "0.5",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_of_accelerate_that_is_not_supported_is_refused_by_name(name, monkeypatch):
    put(monkeypatch, **{name: REFUSED[name]})
    key = name.removeprefix("ACCELERATE_").lower()
    with pytest.raises(InputError, match=rf"^{name}={REFUSED[name]} \({key} in .*not supported"):
        Processes()


def test_what_the_launcher_sets_by_itself_is_supported(monkeypatch):
    put(
        monkeypatch,
        ACCELERATE_MIXED_PRECISION="bf16",
        ACCELERATE_DYNAMO_BACKEND="NO",
        ACCELERATE_DYNAMO_MODE="default",
        ACCELERATE_DYNAMO_USE_FULLGRAPH="False",
        ACCELERATE_USE_CPU="False",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1",
    )
    accelerator = Processes().accelerator
    assert accelerator.mixed_precision == ("bf16" if torch.cuda.is_available() else "no")
    assert accelerator.gradient_accumulation_steps == 1


def test_a_gpu_is_not_hidden_by_accelerates_flag(monkeypatch):
    put(monkeypatch, ACCELERATE_USE_CPU="true")
    launch.check(on_gpu=False)
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES= to train on the CPU"):
        launch.check(on_gpu=True)


# --- FSDP ---

ODD = {
    "FSDP_VERSION": ("1", "FSDP1 is not supported"),
    "FSDP_RESHARD_AFTER_FORWARD": ("HYBRID_SHARD", "Supported is true or false"),
    "FSDP_OFFLOAD_PARAMS": ("sometimes", "Supported is true or false"),
    "FSDP_AUTO_WRAP_POLICY": ("SIZE_BASED_WRAP", "transformer_based_wrap or no_wrap"),
    "FSDP_STATE_DICT_TYPE": ("LOCAL_STATE_DICT", "Supported is sharded_state_dict"),
    "FSDP_SHARDING_STRATEGY": ("SHARD_GRAD_OP", "fsdp_reshard_after_forward"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("auto", "Supported is"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("true", "Unset it"),
    "FSDP_IGNORED_MODULES": ("proj_out", "Unset it"),
    "FSDP_MIXED_PRECISION_POLICY": ("fp16", "Unset it"),
    "FSDP_BACKWARD_PREFETCH": ("BACKWARD_MAYBE", "backward_pre"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_value_of_fsdps_configuration_is_one_line(name, monkeypatch):
    value, words = ODD[name]
    put(monkeypatch, **{name: value})
    launch.check(on_gpu=False)  # without FSDP it is a leftover
    put(monkeypatch, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    put(monkeypatch, **{name: value})
    with pytest.raises(InputError, match=words) as error:
        Processes()
    assert str(error.value).startswith(f"{name}={value} ({name.lower()} in Accelerate's")


def test_fsdp_without_a_version_is_fsdp1(monkeypatch):
    put(monkeypatch, ACCELERATE_USE_FSDP="true")
    with pytest.raises(InputError, match="FSDP1 is not supported"):
        Processes()


@pytest.mark.parametrize(
    "given, wrong",
    [
        ("FluxTransformerBloc", "FluxTransformerBloc"),
        ("FluxTransformerBlock,FluxSingelTransformerBlock", "FluxSingelTransformerBlock"),
        ("WanTransformerBlock", "WanTransformerBlock"),
    ],
)
def test_classes_to_wrap_that_match_nothing_are_refused(given, wrong):
    """The first left all weights in one piece, the second half of them."""
    flux = models.load("tiny-flux", torch.float32)
    with pytest.raises(InputError, match=f"_cls_to_wrap {wrong}: a FluxTransformer2DModel has no"):
        sharding._names(flux.pipe.transformer, flux.blocks, given.split(","))


@pytest.mark.parametrize("given", ["FluxTransformerBlock, FluxSingleTransformerBlock", None])
def test_classes_to_wrap_of_all_families_shard_the_models_own(given):
    flux = models.load("tiny-flux", torch.float32)
    text = (ROOT / "configs/fsdp2.yaml").read_text()
    given = given or re.search(r"layer_cls_to_wrap: (\S+)", text)[1]
    found = sharding._names(flux.pipe.transformer, flux.blocks, given.split(","))
    assert set(flux.blocks) <= found


@pytest.mark.parametrize(
    "given", ["WanTransformerBlok", "WanTransformerBlock,WanAttentionBlock", "UNet2DConditionModel"]
)
def test_a_configuration_whose_classes_match_nothing_does_not_shard_the_root_alone(
    given, monkeypatch, port
):
    """From the variables that the launcher makes of fsdp_transformer_layer_cls_to_wrap on."""
    launched(monkeypatch, port, 0, 1)
    put(monkeypatch, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    put(monkeypatch, FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
    put(monkeypatch, FSDP_TRANSFORMER_CLS_TO_WRAP=given)
    processes = Processes(timeout_minutes=0.5)
    wan = models.load("tiny-wan", torch.float32)
    settings = dict(plugin=processes.fsdp, mesh=processes.mesh(1), dtype=torch.float32)
    with pytest.raises(InputError, match=f"_cls_to_wrap {given.split(',')[-1]}: .* WanTransf"):
        sharding.shard(wan.pipe.transformer, wan.blocks, **settings)
    settings["plugin"].transformer_cls_names_to_wrap = ["WanTransformerBlock"]
    module = sharding.shard(wan.pipe.transformer, wan.blocks, **settings)
    parts = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    assert parts == ["", *(f"blocks.{number}" for number in range(len(module.blocks)))]


# --- One process ---

LEFTOVERS = {
    "Open MPI": dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="2"),
    "Intel MPI": dict(PMI_SIZE="2", PMI_RANK="1", MPI_LOCALNRANKS="2", MPI_LOCALRANKID="1"),
    "MVAPICH": dict(MV2_COMM_WORLD_SIZE="8", MV2_COMM_WORLD_LOCAL_RANK="3"),
    "Slurm": dict(SLURM_NTASKS="16", SLURM_PROCID="5", SLURM_LOCALID="1"),
    "torchrun": dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="192.0.2.1"),
    "half a torchrun": dict(LOCAL_RANK="3", RANK="3", MASTER_ADDR="nowhere.invalid"),
    "an address": dict(MASTER_ADDR="192.0.2.1", MASTER_PORT="1"),
    "nothing in it": dict(LOCAL_RANK="", WORLD_SIZE="", RANK=""),
}


@pytest.mark.parametrize("what", LEFTOVERS)
def test_leftovers_of_another_launch_do_not_change_a_single_process(what, monkeypatch, capsys):
    put(monkeypatch, **LEFTOVERS[what])
    started = time.monotonic()
    processes = Processes(timeout_minutes=0.2)
    assert (processes.rank, processes.world, processes.is_main) == (0, 1, True)
    assert processes.gather(torch.tensor([3.0])).tolist() == [3.0]
    assert time.monotonic() - started < 5
    said = capsys.readouterr().err
    assert said.count("is ignored: this process trains alone") == ("MPI" in what or "MV" in what)


def test_sharding_one_process_needs_no_address(monkeypatch):
    put(monkeypatch, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    processes = Processes(timeout_minutes=0.2)
    assert processes.fsdp and processes.mesh(1).size() == 1


# --- Several ---


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(WORLD_SIZE="2"), "WORLD_SIZE=2: MASTER_ADDR is not set"),
        (dict(WORLD_SIZE="two"), "WORLD_SIZE=two: must be a number"),
        (
            dict(WORLD_SIZE="2", RANK="2", LOCAL_RANK="0", MASTER_ADDR="::1", MASTER_PORT="1"),
            "RANK=2: must be below WORLD_SIZE=2",
        ),
    ],
)
def test_half_a_launch_is_one_line(values, words, monkeypatch):
    put(monkeypatch, **values)
    with pytest.raises(InputError, match=words):
        Processes()


def launched(monkeypatch, port, rank, world):
    values = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
    put(monkeypatch, MASTER_ADDR="127.0.0.1", **{name: str(v) for name, v in values.items()})


def test_ranks_that_do_not_come_are_named(monkeypatch, port, capsys):
    """Rank 2 of four comes."""
    launched(monkeypatch, port, 0, 4)
    monkeypatch.setattr(launch, "NOTICE", 1.0)

    def come():
        store = torch.distributed.TCPStore("127.0.0.1", int(port), 4, False, wait_for_workers=False)
        torch.distributed.PrefixStore("0", store).set("here 2", "1")

    threading.Timer(0.3, come).start()
    with pytest.raises(InputError, match="ranks 1, 3 did not come within 0.05 minutes") as error:
        Processes(timeout_minutes=0.05)
    assert str(error.value).startswith(f"rank 0 of 4, at 127.0.0.1:{port}: ")
    said = capsys.readouterr().err
    assert said.count("waits for ranks 1, 3, for at most 0.05 minutes (--process-timeout)") == 1


def test_a_rank_that_finds_nobody_names_the_address(monkeypatch, port, capsys):
    launched(monkeypatch, port, 1, 2)
    monkeypatch.setattr(launch, "NOTICE", 0.5)
    with pytest.raises(InputError, match="no connection within 0.03 minutes, --process-timeout"):
        Processes(timeout_minutes=0.03)
    assert f"at 127.0.0.1:{port}: waits for rank 0 to answer" in capsys.readouterr().err


def test_two_processes_meet(monkeypatch, port):
    code = (
        "from common.trainer import Processes; import json\n"
        "p = Processes(1.0); print(json.dumps([p.rank, p.world, p.collect(p.rank)]))"
    )
    runs = []
    for rank in ("0", "1"):
        group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_PORT=port)
        environment = {**os.environ, **group, "MASTER_ADDR": "127.0.0.1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        words = [sys.executable, "-c", code]
        runs.append(
            subprocess.Popen(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        )
    found = [json.loads(run.communicate(timeout=120)[0].splitlines()[-1]) for run in runs]
    assert found == [[0, 2, [0, 1]], [1, 2, [0, 1]]]


# --- Groups of processes ---

MESH = """
import sys
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from common.trainer import sharding

torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
name = "set_timeout" if hasattr(distributed_c10d, "set_timeout") else "_set_pg_timeout"
given, honest = [], getattr(distributed_c10d, name)


def set_timeout(timeout, group):
    given.append((group.size(), timeout.total_seconds()))
    honest(timeout, group)


setattr(distributed_c10d, name, set_timeout)
sharding.mesh_of(torch.device("cpu"), world=4, shards=2, timeout=timedelta(minutes=7))
print(given)
"""


def test_groups_of_a_part_of_the_processes_wait_as_long_as_all():
    command = [sys.executable, "-c", MESH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[(2, 420.0), (2, 420.0)]"], done.stderr


# --- GPUs ---


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (9, 0), (10, 0)])
def test_a_gpu_without_bfloat16_is_refused(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla T4")
    capabilities = [(9, 0), capability]
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    if capability >= (8, 0):
        return launch.check(on_gpu=True)
    line = rf"GPU 1, Tesla T4 of compute capability {capability[0]}.{capability[1]}: it has no bf"
    with pytest.raises(InputError, match=line):
        launch.check(on_gpu=True)
    launch.check(on_gpu=False)
