"""Counting a split exactly: every example once, whatever the batch size and device count.

As a command: python -m vit_jax.evaluate --workdir D [--split test] [--step N|best] [--json]
"""

import argparse
import functools
import json

import jax
import numpy as np

from vit_jax import data, mesh, step
from vit_jax.errors import run_command
from vit_jax.loading import load


def make_evaluate(eval_step, the_mesh, *, num_seeds=1):
    """evaluate(params, batches) -> a list of {"loss", "accuracy", "count"}, one a replica.

    `batches` yields global batches on the devices, padded and masked; the arrays of `params` lead
    with [num_seeds]. Sums stay on the device to the end.
    """
    everywhere = mesh.replicated(the_mesh)
    eval_step = step.over_seeds(eval_step, num_seeds, (0, None))

    @functools.partial(jax.jit, out_shardings=everywhere)
    def add(sums, params, batch):
        return jax.tree.map(lambda a, b: a + b, sums, eval_step(params, batch))

    def evaluate(params, batches):
        zeros = np.zeros(num_seeds)
        sums = {"loss": np.float32(zeros), "correct": np.int32(zeros), "count": np.int32(zeros)}
        sums = mesh.put(sums, everywhere)
        for batch in batches:
            sums = add(sums, params, batch)
        sums = jax.device_get(sums)
        return [
            {"loss": float(loss) / int(n), "accuracy": int(correct) / int(n), "count": int(n)}
            for loss, correct, n in zip(sums["loss"], sums["correct"], sums["count"], strict=True)
        ]

    return evaluate


def batch_order(num_examples, batch_size, the_mesh):
    """int32[steps, B]: every index once, in order; B is the batch size rounded up to the mesh."""
    return data.eval_indices(num_examples, batch_size + -batch_size % the_mesh.size)


def resident_batches(split_data, order, the_mesh):
    """Yields the batches of a resident split {"image", "label"}; order as of `batch_order`."""
    gather = jax.jit(step.gather, out_shardings=mesh.batch_sharding(the_mesh))
    for indices in order:
        yield gather(split_data, mesh.put(indices, mesh.replicated(the_mesh)))


def main():
    """The command: the accuracy and loss of a run's weights on one split."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.evaluate", description=main.__doc__)
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--split", help="a TFDS split; default: the run's test_split")
    parser.add_argument("--step", default="last", help="a saved step, best or last (default)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    model, params, config = load(args.workdir, args.step)
    split = args.split or config.data.test_split
    examples = data.load_split(
        config.data.name,
        split,
        data_dir=config.data.dir or None,
        image_size=config.data.image_size or None,
    )
    the_mesh = mesh.make_mesh(0, 1)
    evaluate = make_evaluate(
        step.make_eval_step(model, mean=config.data.mean, std=config.data.std), the_mesh
    )
    resident = {"image": examples.images, "label": examples.labels}
    resident = jax.device_put(resident, mesh.replicated(the_mesh))
    order = batch_order(examples.num_examples, config.eval_batch_size, the_mesh)
    params = jax.tree.map(lambda p: p[None], params)
    (result,) = evaluate(params, resident_batches(resident, order, the_mesh))
    if args.json:
        print(json.dumps({"split": split, **result}))
    else:
        print(
            f"{split}: accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f}, "
            f"{result['count']} images"
        )


if __name__ == "__main__":
    run_command(main)
