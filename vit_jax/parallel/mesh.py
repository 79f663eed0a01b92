"""The device mesh, with axes `data` and `fsdp`, and how arrays are sharded over it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError

# Smaller arrays are replicated: sharding them would not pay for the communication.
_SMALLEST_SHARDED = 2**12


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a (data, fsdp) mesh over a list of devices (default: all).

    `data` = 0 means all devices divided by `fsdp`. Raises UserError if the product is not the
    number of devices.
    """
    n = len(devices or jax.devices())
    sizes = (data or n // fsdp, fsdp)
    if np.prod(sizes) != n:
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} must equal the device count, {n}: "
            f"set fsdp to a divisor of {n} and data to 0"
        )
    # With explicit axes, the default of newer jax, flax.linen fails at the class token's concat.
    types = (AxisType.Auto,) * 2
    return jax.make_mesh(sizes, ("data", "fsdp"), axis_types=types, devices=devices)


def to_devices(tree: Any, shardings: Any) -> Any:
    """Transfers host arrays to the devices; `shardings` is one for all arrays or a tree of them.

    Every process has each array in full and transfers its own devices' shards, without
    communication.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def transfer(x, sharding):
        x = np.asarray(x)
        # jax.make_array_from_callback would transfer implicitly, which a transfer guard rejects.
        index = sharding.addressable_devices_indices_map(x.shape)
        parts = [jax.device_put(x[i], device) for device, i in index.items()]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(transfer, tree, shardings)


def to_host(tree: Any) -> Any:
    """Copies device arrays to numpy arrays, in full, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def fetch(x):
        if isinstance(x, jax.Array) and not x.is_fully_replicated:
            # One array at a time, so that no device ever stores the entire state.
            x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
        return jax.device_get(x)

    return jax.tree.map(fetch, tree)


def local_rows(sharding: NamedSharding, num_rows: int) -> np.ndarray:
    """int[b]: the rows of a sharded batch that are on this process's devices, ascending."""
    slices = sharding.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[i] for i in slices]))


def put_rows(tree: Any, rows: np.ndarray, num_rows: int, sharding: NamedSharding) -> Any:
    """Transfers host arrays of this process's `rows` into global arrays [num_rows, ...].

    jax.make_array_from_process_local_data would transfer implicitly, which a transfer guard
    rejects.
    """

    def transfer(x):
        shape = (num_rows, *x.shape[1:])
        parts = []
        for device, (i, *_) in sharding.addressable_devices_indices_map(shape).items():
            first, stop = np.searchsorted(rows, np.arange(num_rows)[i][[0, -1]])
            parts.append(jax.device_put(x[first : stop + 1], device))
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return jax.tree.map(transfer, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_sharding(mesh: Mesh, shapes: Any) -> Any:
    """Returns a sharding for each array: its largest axis that `fsdp` divides is split over it.

    Arrays of fewer than 4,096 elements, and all arrays if fsdp is 1, are replicated.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(x):
        axes = [axis for axis, size in enumerate(x.shape) if size % fsdp == 0]
        if fsdp == 1 or x.size < _SMALLEST_SHARDED or not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda a: x.shape[a])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(sharding, shapes)


def describe(mesh: Mesh, state: Any) -> str:
    """Describes the sharding of a state, and its bytes, in one line.

    `state` is a tree of arrays or of jax.ShapeDtypeStruct with shardings.
    """
    fsdp, leaves = mesh.shape["fsdp"], jax.tree.leaves(state)
    total = sum(x.size * x.dtype.itemsize for x in leaves)
    device = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    rule = f"batches over {mesh.size} devices; " if mesh.size > 1 else ""
    rule += "weights and optimizer state "
    if fsdp == 1:
        rule += "replicated"
    else:
        sharded = [x for x in leaves if not x.sharding.is_fully_replicated]
        rule += (
            f"over fsdp: the largest axis that {fsdp} divides, in {len(sharded)} of {len(leaves)} "
            f"arrays (arrays under {_SMALLEST_SHARDED:,} elements are replicated)"
        )
    return f"{rule}; {device / 1e6:,.1f} MB per device of {total / 1e6:,.1f} MB"
