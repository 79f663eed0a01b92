"""Batches on the devices, from a resident or a streamed split, for training and evaluation.

A resident split is replicated on every device, and each step gathers its rows there. A streamed
split is decoded ahead of the step; each process decodes only its own rows. Both yield the same
batches in the same order: {"image": uint8[B, H, W, C], "label": int32[B], "mask": bool[B]}, sharded
over the mesh.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import augment, data, seeds, step
from vit_jax.durations import Plan
from vit_jax.parallel import mesh as mesh_lib


class Feed(NamedTuple):
    """The training batches of a split."""

    inputs: Callable[[int], Iterator[tuple]]  # i -> the inputs of each step after step i
    input_shapes: tuple  # the inputs of a step as jax.ShapeDtypeStruct
    batch: Callable[..., dict[str, jax.Array]]  # (step from 0, *inputs) -> batch, inside jit
    vmap_axes: tuple  # the axis of seeds in each input


def make_feed(
    split: data.Dataset | data.Stream, config: ConfigDict, plan: Plan, mesh: Mesh
) -> Feed:
    """Returns a split's Feed; batch_size is rounded up to a multiple of devices x microbatches."""
    num_rows = _round_up(config.batch_size, mesh.size * config.accumulate_steps)

    @functools.lru_cache(maxsize=2)  # a stream reads batches of the next epoch before this one ends
    def epoch_order(epoch, seed):
        """Returns int32[steps_per_epoch, B] of an epoch, counted from 0; -1 for no example."""
        order = data.epoch_order(plan.num_examples, plan.batch_size, seed=seed, epoch=epoch)
        padding = num_rows - plan.batch_size
        return np.pad(order, ((0, 0), (0, padding)), constant_values=-1)

    make = _streamed_feed if config.data.streaming else _resident_feed
    return make(split, config, plan, mesh, epoch_order)


def _resident_feed(split, config, plan, mesh, epoch_order):
    """Returns a Feed whose inputs are the entire split and the row order of the step's epoch."""
    arrays, everywhere = _arrays(split), mesh_lib.replicated(mesh)
    spe = plan.steps_per_epoch

    def orders(epoch):
        return seeds.stack([epoch_order(epoch, seed) for seed in seeds.seeds_of(config)])

    def inputs(after):
        on_devices, order = mesh_lib.to_devices(arrays, everywhere), None
        for i in range(after, plan.total_steps):
            if order is None or i % spe == 0:
                order = mesh_lib.to_devices(orders(i // spe), everywhere)
            yield on_devices, order

    def batch(step_index, arrays, order):
        rows = step.gather(arrays, order[step_index % spe])
        return jax.lax.with_sharding_constraint(rows, mesh_lib.batch_sharding(mesh))

    # The seeds share the split, and each has its own order.
    return Feed(inputs, _shapes((arrays, orders(0)), everywhere), batch, vmap_axes=(None, 0))


def _streamed_feed(split, config, plan, mesh, epoch_order):
    """Returns a Feed whose only input is the step's batch."""
    seed, spe = config.seed, plan.steps_per_epoch

    def order(i):
        return epoch_order(i // spe, seed)[i % spe]

    def inputs(after):
        size = config.data.image_size
        crop = augment.make_crop(config.augment, size=size, seed=seed, steps_per_epoch=spe)
        steps = range(after, plan.total_steps)
        return ((batch,) for batch in _streamed(split, order, steps, config, mesh, crop))

    rows = len(order(0))
    batch = {
        "image": np.empty((rows, *split.image_shape), np.uint8),
        "label": np.empty(rows, np.int32),
        "mask": np.empty(rows, np.bool_),
    }
    shapes = _shapes((batch,), mesh_lib.batch_sharding(mesh))
    return Feed(inputs, shapes, batch=lambda step_index, batch: batch, vmap_axes=(None,))


def make_eval_batches(
    split: data.Dataset | data.Stream, config: ConfigDict, mesh: Mesh
) -> Callable[[], Iterator[dict[str, jax.Array]]]:
    """Returns a function that yields every example of a split once, in masked batches."""
    order = data.eval_order(split.num_examples, _round_up(config.eval_batch_size, mesh.size))
    if config.data.streaming:
        steps = range(len(order))
        return lambda: _streamed(split, order.__getitem__, steps, config, mesh)
    everywhere = mesh_lib.replicated(mesh)
    arrays = mesh_lib.to_devices(_arrays(split), everywhere)
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


def _round_up(size, multiple):
    return size + -size % multiple


def _arrays(split):
    return {"image": split.images, "label": split.labels}


def _shapes(arrays, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)
