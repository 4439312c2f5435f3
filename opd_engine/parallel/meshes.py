"""Device meshes of a run's ranks, and the groups behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed import ProcessGroup, init_device_mesh

from opd_engine.parallel.launch import World

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh


def split_world(world: World, tp_size: int) -> tuple[DeviceMesh | None, DeviceMesh | None]:
    """(data-parallel, tensor-parallel) meshes; None for a dimension of one rank. Tensor-parallel ranks are neighbours.

    Raises: ValueError where tp_size does not divide the ranks that were started.
    Communicates: every rank of the world must call.
    """
    if tp_size < 1 or world.world_size % tp_size != 0:
        raise ValueError(f"tp_size: wanted a divisor of the {world.world_size} ranks that were started, got {tp_size}")
    if world.group is None:
        return None, None
    shape = (world.world_size // tp_size, tp_size)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("dp", "tp"))
    return tuple(mesh[name] if size > 1 else None for name, size in zip(("dp", "tp"), shape))


def mesh_group(mesh: DeviceMesh | None) -> ProcessGroup | None:
    """The group of a mesh of one dimension. Raises: ValueError for more dimensions."""
    if mesh is None:
        return None
    if mesh.ndim != 1:
        raise ValueError(f"mesh: wanted one dimension, got {mesh.ndim} ({mesh.mesh_dim_names}); give a slice of it")
    return mesh.get_group()
