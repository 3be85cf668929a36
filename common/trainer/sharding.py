"""Weights sharded over processes by torch's FSDP2 (`fully_shard`), as Accelerate's launcher and
config file ask for it (configs/fsdp2.yaml).

Accelerate's own `prepare` shards one model together with its optimizer, and on GPUs only. Wan2.2
trains two experts with one optimizer, and the tests shard on CPUs. So the plugin is read here, and
each module is sharded by itself.
"""

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common import errors, models
from common.errors import InputError
from common.trainer.checkpoint_files import Pieces

asked = False  # whether the launcher asked for FSDP, for another run of this program


def take_plugin() -> Any:
    """Return Accelerate's FSDP plugin if the launcher asked for it, else None.

    It is removed from the environment: otherwise the Accelerator would shard, too. launch.py has
    checked its settings.
    """
    global asked
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true" and not asked:
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    with errors.loading("fsdp_config", do="write it as in configs/fsdp2.yaml"):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    asked = True
    return plugin


def own_plugin() -> Any:
    """Return the plugin of configs/fsdp2.yaml, for weights that only fit sharded."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_offload=False, reshard_after_forward=True, activation_checkpointing=True
    )


def mesh_of(device: torch.device, world: int, shards: int, timeout: timedelta) -> DeviceMesh:
    """Return a mesh of `world` processes, in rows of `shards` with one copy of the weights each.

    If a row is a machine, weights do not cross the network, only gradients do, once an update.
    Dimensions ("replicas", "shards"), or ("shards",) for a single row. timeout: how long processes
    wait for one another in the groups of the mesh.
    """
    if shards == world:
        mesh = init_device_mesh(device.type, (shards,), mesh_dim_names=("shards",))
    else:
        names = ("replicas", "shards")
        mesh = init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=names)
    # older releases of torch have the second name alone, newer ones deprecate it
    name = "set_timeout" if hasattr(distributed_c10d, "set_timeout") else "_set_pg_timeout"
    for group in mesh.get_all_groups():
        # groups of a part of the processes have torch's default, 10 minutes on GPUs
        getattr(distributed_c10d, name)(timeout, group)
    return mesh


def offloads(plugin: Any, device_type: str) -> bool:
    """Return whether the shards wait on the CPU between passes."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(plugin.cpu_offload, CPUOffloadPolicy) and device_type != "cpu"


def shard(
    module: torch.nn.Module,
    blocks: Sequence[str],
    plugin: Any,
    mesh: DeviceMesh,
    dtype: torch.dtype,
) -> torch.nn.Module:
    """Shard a module's weights in place, block by block, and return the module.

    Blocks are the classes that the config file names, or else those in `blocks`. Passes see the
    weights in `dtype`; gradients are averaged in float32.
    """
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
    names = _names(module, blocks, plugin.transformer_cls_names_to_wrap or blocks)
    for part in [part for part in module.modules() if type(part).__name__ in names]:
        fully_shard(part, **settings)
    return fully_shard(module, **settings)


def _names(module: torch.nn.Module, blocks: Sequence[str], given: Sequence[str]) -> set[str]:
    """Return the names of the classes that are sharded one by one.

    A configuration may name the blocks of other families. Raises InputError for a name of no class,
    and if the module has none of them: then all of its weights would be gathered at once.
    """
    names = {name.strip() for name in given}
    present = {type(part).__name__ for part in module.modules()}
    unknown = sorted(names - present - models.blocks())
    if unknown or not names & present:
        wrong = ", ".join(unknown or sorted(names))
        raise InputError(
            f"fsdp_transformer_layer_cls_to_wrap {wrong}: a {type(module).__name__} has no such "
            f"part. Write {','.join(blocks)}, or leave the line out."
        )
    return names


def mesh_in(state: Any) -> DeviceMesh | None:
    """Return the mesh of the first sharded tensor in a state; None without one."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        return next(filter(None, map(mesh_in, state)), None)
    return state.device_mesh if is_sharded(state) else None


def part_of(mesh: DeviceMesh) -> tuple[int, bool]:
    """Return the number of this process's shard, and whether it writes it into a checkpoint.

    The processes of the first row write.
    """
    first_row = mesh.ndim == 1 or mesh.get_local_rank("replicas") == 0
    return mesh.get_local_rank("shards"), first_row


def local(state: Any) -> Any:
    """Return a state with this process's shard, {"shard": tensor}, for each sharded tensor."""
    if isinstance(state, dict):
        return {name: local(value) for name, value in state.items()}
    if isinstance(state, list):
        return [local(value) for value in state]
    return {"shard": state.to_local()} if is_sharded(state) else state


def distribute(state: Any, mesh: DeviceMesh | None = None) -> Any:
    """Return a state that any number of processes wrote, its tensors sharded over the mesh.

    Without a mesh its tensors are whole.
    """
    if isinstance(state, dict):
        return {name: distribute(value, mesh) for name, value in state.items()}
    if isinstance(state, list):
        return [distribute(value, mesh) for value in state]
    if isinstance(state, Pieces):
        state = torch.cat(state.tensors)
    if mesh is None or not isinstance(state, torch.Tensor) or not state.dim():
        return state
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(0)]
    if mesh.ndim == 2:
        placements = [Replicate(), Shard(0)]
    return distribute_tensor(state, mesh, placements, src_data_rank=None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor put together on the CPU by all processes; any other as it is."""
    return tensor.full_tensor().cpu() if is_sharded(tensor) else tensor


def is_sharded(thing: Any) -> bool:
    """Return whether it is a DTensor; importing that class would take half a second."""
    return hasattr(thing, "full_tensor")
