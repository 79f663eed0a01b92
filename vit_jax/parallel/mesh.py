"""The device mesh, with axes `data` and `fsdp`, and how arrays are sharded over it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a (data, fsdp) mesh over a list of devices (default: all).

    `data` = 0 means all devices divided by `fsdp`. Raises UserError if the product is not the
    number of devices.
    """
    n = len(devices or jax.devices())
    sizes = (data or n // fsdp, fsdp)
    if math.prod(sizes) != n:
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} must equal the device count, {n}: "
            f"set fsdp to a divisor of {n} and data to 0"
        )
    # With explicit axes, the default of newer jax, flax.linen fails at the class token's concat.
    types = (AxisType.Auto,) * 2
    return jax.make_mesh(sizes, ("data", "fsdp"), axis_types=types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_sharding(mesh: Mesh, shapes: Any) -> Any:
    """Returns a sharding for each array: the largest axis divisible by `fsdp` is split over `fsdp`.

    Arrays of fewer than 4,096 elements are replicated: sharding would cost more than it saves.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(x):
        axes = [axis for axis, size in enumerate(x.shape) if size % fsdp == 0]
        if fsdp == 1 or x.size < 2**12 or not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda a: x.shape[a])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(sharding, shapes)


def to_devices(tree: Any, shardings: Any) -> Any:
    """Transfers host arrays, which every process has in full, to one sharding or one per array."""
    shardings = jax.tree.broadcast(shardings, tree)
    return jax.tree.map(lambda x, s: _transfer(x.shape, s, x.__getitem__), tree, shardings)


def local_rows(sharding: NamedSharding, num_rows: int) -> np.ndarray:
    """Returns int[b]: the rows of a sharded batch that are on this process's devices, ascending."""
    slices = sharding.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[i] for i in slices]))


def put_rows(tree: Any, rows: np.ndarray, num_rows: int, sharding: NamedSharding) -> Any:
    """Transfers host arrays of this process's `rows` into global arrays [num_rows, ...]."""

    def transfer(x):
        def shard(index):
            first, stop, _ = index[0].indices(num_rows)
            return x[slice(*np.searchsorted(rows, (first, stop)))]

        return _transfer((num_rows, *x.shape[1:]), sharding, shard)

    return jax.tree.map(transfer, tree)


def _transfer(shape, sharding, shard):
    """Returns a global array; `shard(index)` returns its part for one of this process's devices."""
    # jax.make_array_from_callback would transfer implicitly, which a transfer guard rejects.
    indices = sharding.addressable_devices_indices_map(shape)
    shards = [jax.device_put(shard(index), device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def to_host(tree: Any) -> Any:
    """Copies device arrays to numpy arrays, in full, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    # One array at a time is replicated, so no device ever stores the entire state.
    with jax.transfer_guard("allow"):  # process_allgather fetches without jax.device_get
        return multihost_utils.process_allgather(tree, tiled=True)


def describe(mesh: Mesh, state: Any) -> str:
    """Describes, in one line, how a tree of jax.ShapeDtypeStruct is sharded, and its bytes."""
    leaves = jax.tree.leaves(state)
    total = sum(x.size * x.dtype.itemsize for x in leaves)
    device = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    batches = f"batches over {mesh.size} devices; " if mesh.size > 1 else ""
    rule = "replicated" if mesh.shape["fsdp"] == 1 else "over fsdp"
    return (
        f"{batches}weights and optimizer state {rule}; {device / 1e6:,.1f} MB per device of "
        f"{total / 1e6:,.1f} MB"
    )
