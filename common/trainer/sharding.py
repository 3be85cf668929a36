"""Weights sharded over processes: torch's FSDP2 (`fully_shard`), as Accelerate's launcher and
config file ask for it.

Accelerate's own `prepare` shards one model, together with its optimizer, and on GPUs only. Wan2.2
trains two experts with one optimizer, and whoever has no GPUs wants to see it work: so the plugin
is read here, and each expert is sharded by itself. configs/fsdp2.yaml is such a file."""

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.errors import InputError
from common.trainer.checkpoints import Pieces

if TYPE_CHECKING:  # --help need not wait for it
    from accelerate.utils import FullyShardedDataParallelPlugin

asked = False  # whether the launcher did, for another run of this program (--calibrate)


def take_plugin() -> "FullyShardedDataParallelPlugin | None":
    """Accelerate's FSDP plugin if the launcher asked for it, else None. It is taken out of the
    environment: otherwise the Accelerator would shard too. Raises InputError for DeepSpeed, and for
    FSDP1."""
    global asked
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError(
            "DeepSpeed wants a model and its optimizer in one engine, which two experts are not; "
            "configs/fsdp2.yaml shards weights, gradients and optimizer as its stage 3 does"
        )
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true" and not asked:
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "only FSDP2 is supported: write fsdp_version: 2, as configs/fsdp2.yaml does"
        )
    from accelerate.utils import FullyShardedDataParallelPlugin

    asked = True
    return FullyShardedDataParallelPlugin()


def own_plugin() -> "FullyShardedDataParallelPlugin":
    """What configs/fsdp2.yaml asks for, where no config file asks for anything and weights fit only
    so."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_offload=False, reshard_after_forward=True, activation_checkpointing=True
    )


def on_a_machine(processes: int) -> int:
    """All processes together: how many of them each machine has, as the launcher says; all of them
    where it has one, or another one has more."""
    from accelerate.utils import gather_object

    own = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    alike = processes == 1 or set(gather_object([own])) == {own}
    return own if own > 1 and alike and processes % own == 0 else processes


def mesh_of(device: torch.device, processes: int, shards: int) -> DeviceMesh:
    """The processes in rows of `shards`, each row with all weights among its processes: where these
    are the processes of a machine, no weights cross the network, only their gradients do, once an
    update. Dimensions ("replicas", "shards"); of a single row ("shards",)."""
    rows, names = (processes // shards, shards), ("replicas", "shards")
    kept = slice(rows[0] == 1, None)
    return init_device_mesh(device.type, rows[kept], mesh_dim_names=names[kept])


def offloads(plugin: "FullyShardedDataParallelPlugin", device_type: str) -> bool:
    """Whether the shards wait on the CPU between passes. The plugin holds a policy, which is true
    in any case."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(plugin.cpu_offload, CPUOffloadPolicy) and device_type != "cpu"


def shard(
    module: torch.nn.Module,
    blocks: Sequence[str],
    plugin: "FullyShardedDataParallelPlugin",
    mesh: DeviceMesh,
    dtype: torch.dtype,
) -> torch.nn.Module:
    """Shards a module's weights in place, block by block: those of the classes that the config file
    names, or else of the names in `blocks`. The forward and backward passes see them in `dtype`;
    gradients are averaged in float32. Returns the module."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # a timestep of 999.3 would be 1000 in bfloat16
    )
    settings = dict(mesh=mesh, mp_policy=policy, reshard_after_forward=plugin.reshard_after_forward)
    if offloads(plugin, mesh.device_type):
        settings["offload_policy"] = CPUOffloadPolicy()
    # FLUX's single blocks return views, which nobody writes to
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    names = plugin.transformer_cls_names_to_wrap or blocks
    for part in [part for part in module.modules() if type(part).__name__ in names]:
        fully_shard(part, **settings)
    return fully_shard(module, **settings)


def writes(mesh: DeviceMesh) -> tuple[bool, int]:
    """Whether this process writes its shards into a checkpoint, as one of the first row does; and
    the number of it."""
    return mesh.ndim == 1 or mesh.get_local_rank("replicas") == 0, mesh.get_local_rank("shards")


def has_shards(state: Any) -> bool:
    """Whether a state (dictionaries, lists, tensors) holds a sharded tensor."""
    if isinstance(state, (dict, list)):
        return any(map(has_shards, state.values() if isinstance(state, dict) else state))
    return is_sharded(state)


def local(state: Any) -> Any:
    """A state with this process's share, {"shard": tensor}, in place of each sharded tensor: what
    it writes into a checkpoint."""
    if isinstance(state, dict):
        return {name: local(value) for name, value in state.items()}
    if isinstance(state, list):
        return [local(value) for value in state]
    return {"shard": mine(state)} if is_sharded(state) else state


def deal(state: Any, mesh: DeviceMesh | None = None) -> Any:
    """The reverse, from a checkpoint that any number of processes wrote: tensors as they are
    sharded over the mesh, or whole ones without a mesh."""
    if isinstance(state, dict):
        return {name: deal(value, mesh) for name, value in state.items()}
    if isinstance(state, list):
        return [deal(value, mesh) for value in state]
    if isinstance(state, Pieces):
        state = torch.cat(state.tensors)
    if mesh is None or not isinstance(state, torch.Tensor) or not state.dim():
        return state
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    return distribute_tensor(
        state, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)], src_data_rank=None
    )


def mine(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a sharded tensor; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All processes together: a sharded tensor put together on the CPU; any other as it is."""
    return tensor.full_tensor().cpu() if is_sharded(tensor) else tensor


def is_sharded(thing: Any) -> bool:
    """Whether it is torch's DTensor, told by what it can do: importing the class takes half a
    second."""
    return hasattr(thing, "full_tensor")
