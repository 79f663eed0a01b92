"""The device mesh and how arrays lie on it: axes `data` and `fsdp`, batches split over both."""

import contextlib
import math
import os
import pathlib
import subprocess

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax.errors import UserError, expand_home

# An array of fewer elements is not split: its share would not be worth the message.
_SMALLEST_SPLIT = 2**12


def keep_compiled():
    """Keeps compiled programs from run to run: a command's second start is much shorter."""
    if not jax.config.jax_compilation_cache_dir:
        cache = expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "vit_jax" / "xla"))


def check_backend():
    """Raises UserError if JAX cannot start, or fell back to the CPU despite an NVIDIA GPU.

    JAX_PLATFORMS=cpu chooses the CPU, and an empty CUDA_VISIBLE_DEVICES hides the GPUs. This starts
    JAX's backend.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    try:
        backend = jax.default_backend()
    except RuntimeError as e:  # of a platform that JAX_PLATFORMS requires
        raise UserError(f"JAX cannot start: {_first_line(e)}") from e
    if backend != "cpu" or jax.config.jax_platforms or hidden:
        return
    if gpu := _nvidia_gpu():
        try:
            jax.devices("cuda")
        except RuntimeError as e:
            raise UserError(
                f"this machine has {gpu}, but JAX did not start CUDA ({_first_line(e)}): install "
                "'jax[cuda13]' and a driver for it, or set JAX_PLATFORMS=cpu to run on the CPU"
            ) from e


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _nvidia_gpu():
    """The first NVIDIA GPU, by name if nvidia-smi tells it; None if there is none."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
        for line in listed.stdout.splitlines():
            if line.startswith("GPU "):
                return line.split(" (UUID")[0]
    return "an NVIDIA GPU" if pathlib.Path("/dev/nvidia0").exists() else None


def make_mesh(data, fsdp, devices=None):
    """A (data, fsdp) mesh over a list of devices, by default all; data = 0 takes what fsdp leaves.

    Raises UserError when the product is not the number of devices.
    """
    n = len(devices or jax.devices())
    sizes = (data or n // fsdp, fsdp)
    if np.prod(sizes) != n:
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} does not make {n} devices"
        )
    # Explicit axes, the default of newer jax, fail in flax.linen at the class token's concat.
    types = (AxisType.Auto,) * 2
    return jax.make_mesh(sizes, ("data", "fsdp"), axis_types=types, devices=devices)


def put(tree, shardings):
    """Arrays of the host onto the devices; `shardings` is one for all or a tree of them.

    With several processes every process holds the whole of each array and puts its own devices'
    part: nothing passes between them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put_array(x, sharding):
        x = np.asarray(x)
        # The callback's parts are put explicitly, so that a transfer guard lets them through.
        index = sharding.addressable_devices_indices_map(x.shape)
        parts = [jax.device_put(x[i], device) for device, i in index.items()]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(put_array, tree, shardings)


def local_rows(sharding, num_rows):
    """int[b]: the rows of a sharded batch that lie on this process's devices, ascending."""
    slices = sharding.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[i] for i in slices]))


def put_rows(tree, rows, num_rows, sharding):
    """Global arrays [num_rows, ...] of which this process holds `rows` on the host."""

    def put_array(x):
        shape = (num_rows, *x.shape[1:])
        parts = []
        for device, (i, *_) in sharding.addressable_devices_indices_map(shape).items():
            first, stop = np.searchsorted(rows, np.arange(num_rows)[i][[0, -1]])
            parts.append(jax.device_put(x[first : stop + 1], device))
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return jax.tree.map(put_array, tree)


def fetch(tree):
    """Arrays of the devices as numpy arrays on the host, whole even where it holds only a part."""

    def fetch_array(x):
        if isinstance(x, jax.Array) and not x.is_fully_replicated and jax.process_count() > 1:
            # One array at a time, so that no device ever holds the whole state.
            x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
        return jax.device_get(x)

    return jax.tree.map(fetch_array, tree) if jax.process_count() > 1 else jax.device_get(tree)


def replicated(mesh):
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_sharding(mesh, shapes):
    """A sharding for each array of a state: its largest axis that `fsdp` divides is split over it.

    The first axis counts the replicas and is never split. Arrays under 4,096 elements, and all of
    them when fsdp is 1, are replicated.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(x):
        axes = [a for a in range(1, x.ndim) if x.shape[a] % fsdp == 0]
        if fsdp == 1 or x.size < _SMALLEST_SPLIT or not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda a: x.shape[a])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(sharding, shapes)


def describe(mesh, state):
    """The rule by which a state lies on the mesh, and its bytes, in a line.

    `state` is a tree of arrays or jax.ShapeDtypeStruct that know their sharding.
    """
    fsdp, leaves = mesh.shape["fsdp"], jax.tree.leaves(state)
    whole = sum(x.size * x.dtype.itemsize for x in leaves)
    device = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    rule = f"batches over {mesh.size} devices; " if mesh.size > 1 else ""
    rule += "weights and optimizer state "
    if fsdp == 1:
        rule += "whole on each device"
    else:
        split = [x for x in leaves if not x.sharding.is_fully_replicated]
        rule += (
            f"over fsdp: the largest axis that {fsdp} divides, in {len(split)} of {len(leaves)} "
            f"arrays (whole where under {_SMALLEST_SPLIT:,} elements)"
        )
    return f"{rule}; {device / 1e6:,.1f} MB a device of {whole / 1e6:,.1f} MB"
