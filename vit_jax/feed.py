"""Batches on the devices, from a resident or a streamed split, for training and evaluation.

A resident split is replicated on every device, and a step gathers its rows there. A streamed split
is decoded ahead, by each process only its own rows. Both yield the same batches in the same order,
{"image": uint8[B, H, W, C], "label": int32[B], "mask": bool[B]}, sharded over the mesh.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import augment, data, seeds, step
from vit_jax.durations import Plan
from vit_jax.parallel import mesh as mesh_lib


def make_feed(
    split: data.Dataset | data.Stream, config: ConfigDict, plan: Plan, mesh: Mesh
) -> "ResidentFeed | StreamedFeed":
    """The training batches of a `data.Dataset` or a `data.Stream`."""
    kind = ResidentFeed if isinstance(split, data.Dataset) else StreamedFeed
    return kind(split, config, plan, mesh)


class _Feed:
    """The base class. B is the batch size rounded up to a multiple of devices x microbatches."""

    def __init__(self, split, config, plan, mesh):
        self._split, self._config, self._plan, self._mesh = split, config, plan, mesh
        multiple = mesh.size * config.accumulate_steps
        self._num_rows = config.batch_size + -config.batch_size % multiple

    def _order(self, epoch, seed):
        """int32[steps_per_epoch, B] of an epoch, counted from 0; -1 for no example."""
        batch_size = self._plan.batch_size
        order = data.epoch_order(self._plan.num_examples, batch_size, seed=seed, epoch=epoch)
        return np.pad(order, ((0, 0), (0, self._num_rows - batch_size)), constant_values=-1)


class ResidentFeed(_Feed):
    """The step's inputs are the entire split and the epoch's order of rows."""

    vmap_axes = (None, 0)  # the seeds share the split, and each has its own order

    def inputs(self, after: int) -> Iterator[tuple]:
        """Yields (split, order) for each step after step `after`; see `input_shapes`."""
        split, spe = to_devices(self._split, self._mesh), self._plan.steps_per_epoch
        order = None
        for i in range(after, self._plan.total_steps):
            if order is None or i % spe == 0:
                orders = [self._order(i // spe, seed) for seed in seeds.seeds_of(self._config)]
                everywhere = mesh_lib.replicated(self._mesh)
                order = mesh_lib.to_devices(seeds.stack(orders), everywhere)
            yield split, order

    def input_shapes(self) -> tuple:
        """The inputs as jax.ShapeDtypeStruct."""
        split, everywhere = self._split, mesh_lib.replicated(self._mesh)
        order = np.zeros((self._plan.steps_per_epoch, self._num_rows), np.int32)
        order = seeds.stack([order for _ in seeds.seeds_of(self._config)])
        arrays = {"image": split.images, "label": split.labels}, order
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arrays
        )

    def batch(
        self, step_index: jax.Array, split: dict[str, jax.Array], order: jax.Array
    ) -> dict[str, jax.Array]:
        """The batch of a step, counted from 0, inside jit."""
        batch = step.gather(split, order[step_index % self._plan.steps_per_epoch])
        return jax.lax.with_sharding_constraint(batch, mesh_lib.batch_sharding(self._mesh))


class StreamedFeed(_Feed):
    """The step's input is its batch."""

    vmap_axes = (None,)

    def inputs(self, after: int) -> Iterator[tuple]:
        """Yields (batch,) for each step after step `after`."""
        seed, spe = self._config.seed, self._plan.steps_per_epoch
        # Batches of the next epoch are read before this one ends.
        epoch_order = functools.lru_cache(maxsize=2)(lambda epoch: self._order(epoch, seed))
        crop = augment.make_crop(
            self._config.augment,
            size=self._config.data.image_size,
            seed=seed,
            steps_per_epoch=spe,
        )
        order = lambda i: epoch_order(i // spe)[i % spe]  # noqa: E731
        steps = range(after, self._plan.total_steps)
        for batch in _streamed(self._split, order, steps, self._config, self._mesh, crop):
            yield (batch,)

    def input_shapes(self) -> tuple:
        """The input as jax.ShapeDtypeStruct."""
        sharding, rows = mesh_lib.batch_sharding(self._mesh), self._num_rows
        shapes: dict[str, Any] = {
            "image": (self._split.image_shape, np.uint8),
            "label": ((), np.int32),
            "mask": ((), np.bool_),
        }
        return (
            {
                name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
                for name, (shape, dtype) in shapes.items()
            },
        )

    def batch(self, step_index: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The batch of a step."""
        return batch


def to_devices(split: data.Dataset, mesh: Mesh) -> dict[str, jax.Array]:
    """Replicates {"image": uint8[N, H, W, C], "label": int32[N]} of a split on every device."""
    arrays = {"image": split.images, "label": split.labels}
    return mesh_lib.to_devices(arrays, mesh_lib.replicated(mesh))


def make_eval_batches(
    split: data.Dataset | data.Stream, config: ConfigDict, mesh: Mesh
) -> Callable[[], Iterator[dict[str, jax.Array]]]:
    """Returns a function that yields every example of a split once, in masked batches."""
    batch_size = config.eval_batch_size + -config.eval_batch_size % mesh.size
    order = data.eval_order(split.num_examples, batch_size)
    if not isinstance(split, data.Dataset):
        steps = range(len(order))
        return lambda: _streamed(split, order.__getitem__, steps, config, mesh)
    arrays, everywhere = to_devices(split, mesh), mesh_lib.replicated(mesh)
    gather = jax.jit(step.gather, out_shardings=mesh_lib.batch_sharding(mesh))
    return lambda: (gather(arrays, mesh_lib.to_devices(rows, everywhere)) for rows in order)


def _streamed(split, order, steps, config, mesh, crop=None):
    """Yields global batches on the devices; transfers two batches ahead."""
    sharding, num_rows = mesh_lib.batch_sharding(mesh), len(order(steps[0]))
    rows = mesh_lib.local_rows(sharding, num_rows)
    ahead, threads = collections.deque(), config.data.streaming_threads
    for batch in split.batches(order, steps, rows=rows, threads=threads, crop=crop):
        ahead.append(mesh_lib.put_rows(batch, rows, num_rows, sharding))
        if len(ahead) > 2:
            yield ahead.popleft()
    yield from ahead
