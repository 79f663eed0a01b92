"""Counting a split exactly: every example once, whatever the batch size and device count.

As a command, with intervals, classes, confusions and calibration:

    python -m vit_jax.evaluate --workdir D [--data FOLDER] [--split test] [--step N|best] [--json]
"""

import argparse
import functools
import json
import pathlib

import jax
import numpy as np

from vit_jax import data, mesh, step
from vit_jax.errors import UserError, run_command
from vit_jax.inference.classify import make_classify
from vit_jax.inference.scores import score
from vit_jax.inference.trained import load


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


def load_examples(loaded, name=None, split=None):
    """(data.Dataset, its labels by the model's classes, split) that a model is evaluated on.

    Args:
      loaded: what `vit_jax.load` gave.
      name: a folder of class folders or a TFDS name, its images fitted to the model's; None: the
        data that the run was trained on.
      split: a TFDS split; None: the run's test split, or its validation split where it reads none.
        Of a folder its `test`, or all of it where it has no such part.
    Raises UserError for data that does not exist or has a class that the model lacks.
    """
    config, (H, W, _) = loaded.config, loaded.image_shape
    if name is None:
        split = split or config.data.test_split or config.data.val_split
        name, image_size = config.data.name, config.data.image_size
    else:
        if H != W:
            raise UserError(f"the model takes {H}x{W} images, data can be cropped to squares only")
        image_size = H
        folder = pathlib.Path(name.removeprefix("folder:"))
        if folder.is_dir():
            name = f"folder:{folder}"
            split = split or ("test" if (folder / "test").is_dir() else "train")
    examples = data.load_split(
        name,
        split or "test",
        data_dir=config.data.dir or None,
        image_size=image_size or None,
        skip_bad=config.data.on_bad_image == "skip",
    )
    strangers = set(examples.class_names) - set(loaded.class_names)
    if strangers:
        raise UserError(
            f"{name} has classes that the model lacks ({', '.join(sorted(strangers)[:5])}); "
            f"it has {', '.join(loaded.class_names[:20])}"
        )
    if list(examples.images.shape[1:]) != list(loaded.image_shape):
        raise UserError(
            f"the images of {name} are {examples.images.shape[1:]}, the model takes "
            f"{tuple(loaded.image_shape)}"
        )
    index = np.array([loaded.class_names.index(c) for c in examples.class_names])
    return examples, index[examples.labels], split or "test"


def main():
    """The command: what a run's weights are worth on one split or folder."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.evaluate", description=main.__doc__)
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument(
        "--data", help="a folder of class folders or a TFDS name; default: the run's"
    )
    parser.add_argument("--split", help="a TFDS split; default: the run's test_split")
    parser.add_argument("--step", default="last", help="a saved step, best or last (default)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    mesh.keep_compiled()
    mesh.check_backend()
    loaded = load(args.workdir, args.step)
    examples, labels, split = load_examples(loaded, args.data, args.split)
    classify = make_classify(loaded, batch_size=loaded.config.eval_batch_size)
    result = score(classify(examples.images), labels, loaded.class_names)
    if args.json:
        print(json.dumps({"split": split, "step": loaded.step, **result}))
    else:
        print(f"{split} of {examples.source}, step {loaded.step}", *table(result), sep="\n")


def table(result):
    """The lines that show what `scores.score` found."""
    low, high = result["accuracy_interval"]
    yield (
        f"accuracy {result['accuracy']:.2%} (95% interval {low:.2%} to {high:.2%}), "
        f"loss {result['loss']:.4f}, ECE {result['ece']:.2%}, {result['count']:,} images"
    )
    confusion = np.array(result["confusion"])
    np.fill_diagonal(confusion, 0)
    width = max(len("class"), *(len(c["class"]) for c in result["classes"]))
    yield f"\n{'class':{width}}  accuracy  95% interval       images  most taken for"
    for c, row in zip(result["classes"], confusion, strict=True):
        if not c["count"]:
            yield f"{c['class']:{width}}         -                          0"
            continue
        low, high = c["interval"]
        worst = np.argsort(-row, kind="stable")[:2]
        taken = ", ".join(f"{result['classes'][j]['class']} {row[j]}" for j in worst if row[j])
        yield (
            f"{c['class']:{width}}  {c['accuracy']:8.2%}  {low:7.2%} to {high:7.2%}  "
            f"{c['count']:6,}  {taken}"
        ).rstrip()


if __name__ == "__main__":
    run_command(main)
