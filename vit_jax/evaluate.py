"""Exact evaluation of a split: every example counts once, at any batch size and device count."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vit_jax.parallel import mesh as mesh_lib


def make_evaluate(
    eval_step: Callable[[Any, Any], dict[str, jax.Array]], mesh: Mesh
) -> Callable[[Any, Iterable[Any]], dict[str, Any]]:
    """Returns evaluate(params, batches) -> {"loss", "accuracy", "count"}.

    `eval_step` is `step.make_eval_step`'s function, and `batches` yields its masked global batches,
    on the devices. The values are scalars, or arrays if the sums of `eval_step` are.
    """
    everywhere = mesh_lib.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def add(sums, params, batch):
        return jax.tree.map(lambda a, b: a + b, sums, eval_step(params, batch))

    def evaluate(params, batches):
        sums = None  # on the devices until the end
        for batch in batches:
            if sums is None:
                shapes = jax.eval_shape(eval_step, params, batch)
                zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
                sums = mesh_lib.to_devices(zeros, everywhere)
            sums = add(sums, params, batch)
        sums = jax.device_get(sums)
        loss, accuracy = (np.float64(sums[name]) / sums["count"] for name in ("loss", "correct"))
        return {"loss": loss, "accuracy": accuracy, "count": sums["count"]}

    return evaluate
