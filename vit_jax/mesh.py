"""The device mesh and how arrays lie on it: axes `data` and `fsdp`, batches split over both."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax.errors import UserError


def make_mesh(data, fsdp):
    """A (data, fsdp) mesh over all devices; data = 0 takes what fsdp leaves.

    Raises UserError when the product is not the number of devices.
    """
    n = jax.device_count()
    sizes = (data or n // fsdp, fsdp)
    if np.prod(sizes) != n:
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} does not make {n} devices"
        )
    # Explicit axes, the default of newer jax, fail in flax.linen at the class token's concat.
    return jax.make_mesh(sizes, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh):
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_sharding(mesh, shapes):
    """A sharding for each array of a state: its largest axis that `fsdp` divides is split over it.

    The first axis counts the replicas and is never split. Arrays under 2**12 elements, and all of
    them when fsdp is 1, are replicated.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(x):
        axes = [a for a in range(1, x.ndim) if x.shape[a] % fsdp == 0]
        if fsdp == 1 or x.size < 2**12 or not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda a: x.shape[a])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(sharding, shapes)
