"""Read what a launcher, its configuration file or a shell left in the environment.

Accelerate and torch take settings from variables. The supported ones are listed here, and any other
is refused by name: a gradient that is quietly divided, or weights that are not sharded, cost a
night. Processes of a launch meet here, too.
"""

import os
import threading
import time
from datetime import timedelta

import torch

from common import errors
from common.errors import InputError

OFF = ("", "0", "false", "no", "none", "off", "n", "f")
TRUTH = (*OFF[1:], "1", "true", "yes", "on", "y", "t")
ANY = None
# {variable: the values that are supported, in lower case}; ANY has no effect on the numbers
ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": ("no", "bf16"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
    "ACCELERATE_DYNAMO_BACKEND": OFF,
    "ACCELERATE_DYNAMO_MODE": ANY,  # the next four need a backend
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ANY,
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ANY,
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": ANY,
    "ACCELERATE_USE_FSDP": ("true", "false"),
    "ACCELERATE_USE_CPU": TRUTH,
    "ACCELERATE_CPU_AFFINITY": TRUTH,
    "ACCELERATE_DEBUG_MODE": TRUTH,
    "ACCELERATE_CONFIG_FILE": ANY,
    "ACCELERATE_ENABLE_RICH": ANY,
    "ACCELERATE_LOG_LEVEL": ANY,
    "ACCELERATE_NUM_PROCESSES": ANY,
}
FSDP = {
    "FSDP_VERSION": ("2",),
    "FSDP_RESHARD_AFTER_FORWARD": TRUTH,
    "FSDP_OFFLOAD_PARAMS": TRUTH,
    "FSDP_ACTIVATION_CHECKPOINTING": TRUTH,
    "FSDP_AUTO_WRAP_POLICY": ("transformer_based_wrap", "no_wrap"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ANY,
    # of Accelerate's own checkpoints, which are not written
    "FSDP_STATE_DICT_TYPE": ("sharded_state_dict", "full_state_dict"),
    "FSDP_SHARDING_STRATEGY": ("full_shard", "1"),
    # the launcher sets these by itself, and FSDP2 does not read them
    "FSDP_BACKWARD_PREFETCH": ("backward_pre", "backward_post", "no_prefetch", "none"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": TRUTH,
    "FSDP_SYNC_MODULE_STATES": TRUTH,
    "FSDP_USE_ORIG_PARAMS": TRUTH,
    "FSDP_MIN_NUM_PARAMS": ANY,
}
CURES = {
    "ACCELERATE_MIXED_PRECISION": "Passes are in bfloat16 on GPUs and in float32 on CPUs.",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--micro-batch splits a batch, at the same gradient.",
    "ACCELERATE_DYNAMO_BACKEND": "--compile compiles the model's blocks.",
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed is not supported: it needs one model and one optimizer in one engine. "
        "configs/fsdp2.yaml shards weights, gradients and optimizer as its stage 3 does."
    ),
    "ACCELERATE_USE_MEGATRON_LM": "configs/fsdp2.yaml shards weights, gradients and optimizer.",
    "ACCELERATE_TORCH_DEVICE": "CUDA_VISIBLE_DEVICES chooses the GPU.",
    "FSDP_VERSION": "FSDP1 is not supported. Write fsdp_version: 2, as configs/fsdp2.yaml does.",
    "FSDP_STATE_DICT_TYPE": "Each process writes its share of a checkpoint; the export is whole.",
    "FSDP_SHARDING_STRATEGY": "fsdp_reshard_after_forward chooses it in FSDP2.",
}
# what MPI leaves in a shell: the numbers of processes, and the prefixes of all its variables
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
MPI = ("OMPI_COMM_WORLD_", "PMI_RANK", "PMI_SIZE", "MV2_COMM_WORLD_", "MPI_LOCAL")
TORCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
BFLOAT16 = 8  # compute capability of the first GPUs that have it
NOTICE = 30.0  # seconds after which a process reports whom it waits for


def check(on_gpu: bool) -> None:
    """Raise InputError for a setting in the environment that is not supported."""
    _check("ACCELERATE_", ACCELERATE)
    if on_gpu:
        _check_bfloat16()
    if on_gpu and _lower("ACCELERATE_USE_CPU") not in OFF:
        raise InputError(
            "ACCELERATE_USE_CPU: this machine has a GPU, which would be used. Hide it with "
            "CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    if _lower("ACCELERATE_USE_FSDP") == "true":
        os.environ.setdefault("FSDP_VERSION", "1")  # Accelerate's default
        _check("FSDP_", FSDP)


def _check_bfloat16() -> None:
    """Raise InputError for a GPU without bfloat16, which torch would emulate slowly."""
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        if major < BFLOAT16:
            raise InputError(
                f"GPU {number}, {torch.cuda.get_device_name(number)} of compute capability "
                f"{major}.{minor}: it has no bfloat16, in which passes are computed. Use one of "
                f"{BFLOAT16}.0 or newer (A100, RTX 30, L4, H100), or hide it with "
                "CUDA_VISIBLE_DEVICES= to train a small model on the CPU."
            )


def _check(prefix: str, supported: dict[str, tuple[str, ...] | None]) -> None:
    for name in sorted(name for name in os.environ if name.startswith(prefix)):
        values = supported.get(name, OFF)
        if values is ANY or _lower(name) in (*values, ""):
            continue
        shown = ("true", "false") if values is TRUTH else values
        choice = "Unset it" if values is OFF else f"Supported is {' or '.join(shown)}"
        key = name.removeprefix("ACCELERATE_").lower()
        raise InputError(
            f"{name}={os.environ[name]:.60} ({key} in Accelerate's configuration): not supported. "
            f"{choice}. {CURES.get(name, '')}".strip()
        )


def settle() -> int:
    """Return the number of processes of this launch, and remove what does not belong to it.

    A launch of several processes has WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
    Without them what MPI, Slurm or an earlier launch left in the shell has no effect. Raises
    InputError if a part of them is missing.
    """
    world = _number("WORLD_SIZE", 1)
    if world > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
            if not os.environ.get(name):
                raise InputError(
                    f"WORLD_SIZE={world}: {name} is not set. Start the processes with accelerate "
                    "launch or torchrun, or unset WORLD_SIZE to train with one."
                )
        if not _number("RANK", 0) < world:
            raise InputError(f"RANK={os.environ['RANK']}: must be below WORLD_SIZE={world}.")
        _number("MASTER_PORT", 0)
        _number("LOCAL_RANK", 0)
        return world
    several = [name for name in SIZES if _lower(name) not in ("", "0", "1")]
    if several:
        errors.warn(
            f"{several[0]}={os.environ[several[0]]} is ignored: this process trains alone. Start "
            "several with accelerate launch or torchrun"
        )
    empty = [name for name in TORCH if not _lower(name)]
    for name in [*empty, *(name for name in os.environ if name.startswith(MPI))]:
        os.environ.pop(name, None)
    if "LOCAL_RANK" in os.environ or _lower("ACCELERATE_USE_FSDP") == "true":
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    return 1


def meet(world: int, timeout_minutes: float) -> dict:
    """Return the arguments with which PartialState makes the group, once all processes are here.

    A group of one process needs no network. Raises InputError that names the ranks that did not
    come, or the address that did not answer.
    """
    if torch.distributed.is_initialized():  # by an earlier run of this program
        return {}
    if world == 1:
        return {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    rank, host, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    here = f"rank {rank} of {world}, at {host}:{port}"
    until = f"for at most {timeout_minutes:g} minutes (--process-timeout)"
    alone = "if this process is alone, unset WORLD_SIZE, RANK and LOCAL_RANK"
    started = time.monotonic()
    late = threading.Timer(
        NOTICE, errors.warn, [f"{here}: waits for rank 0 to answer, {until}; {alone}"]
    )
    late.daemon = True
    late.start()
    try:
        store = torch.distributed.TCPStore(
            host,
            int(port),
            world,
            # torchrun's agent has the store already
            is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(minutes=timeout_minutes),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except Exception as error:  # torch's DistNetworkError and DistStoreError
        raise InputError(
            f"{here}: there was no connection within {timeout_minutes:g} minutes, "
            f"--process-timeout ({errors.described(error)}). Check that rank 0 runs, its address "
            f"and the port; {alone}."
        ) from error
    finally:
        late.cancel()
    # processes that torchrun starts again meet anew
    store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    store.set(f"here {rank}", "1")
    everybody = [f"here {other}" for other in range(world)]
    noticed = False
    while not store.check(everybody):
        waited = time.monotonic() - started
        if waited < 60 * timeout_minutes and (noticed or waited < NOTICE):
            time.sleep(0.1)
            continue
        lacking = [other for other in range(world) if not store.check([everybody[other]])]
        names = f"rank{'s' * (len(lacking) > 1)} {', '.join(map(str, lacking[:8]))}"
        names += f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        if waited >= 60 * timeout_minutes:
            raise InputError(
                f"{here}: {names} did not come within {timeout_minutes:g} minutes, "
                f"--process-timeout. Start all {world} processes; {alone}."
            )
        errors.warn(f"{here}: waits for {names}, {until}; {alone}")
        noticed = True
    return {"store": store, "rank": rank, "world_size": world}


def _lower(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def _number(name: str, default: int) -> int:
    """Return a variable as a number, the default if it is not set. Raises InputError."""
    value = os.environ.get(name, "").strip()
    if value and not value.isdecimal():
        raise InputError(f"{name}={value:.60}: must be a number. Unset it, or launch again.")
    return int(value or default)
