"""The examples that a trained model is evaluated on, and its logits for them."""

import pathlib

import numpy as np

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.inference.classify import make_classify


def load_examples(loaded, name=None, split=None):
    """Returns the split a model is evaluated on, as (data.Dataset or data.Stream, split name).

    A run that streamed its data is evaluated on a Stream: only the images of the split are
    decoded, during classification, and nothing is cached.

    Args:
      loaded: a model from `vit_jax.load`.
      name: an image folder or a TFDS name, its images cropped to the model's size. None: the data
        that the run was trained on.
      split: a TFDS split. None: the run's test split, or its validation split if it has no test
        split. For a folder: `test` if it exists, else `train`.
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
    examples = data.open_split(
        name,
        split or "test",
        data_dir=config.data.dir or None,
        image_size=image_size or None,
        streaming=config.data.streaming,
    )
    strangers = set(examples.class_names) - set(loaded.class_names)
    if strangers:
        raise UserError(
            f"{name} has classes that the model lacks ({', '.join(sorted(strangers)[:5])}); "
            f"it has {', '.join(loaded.class_names[:20])}"
        )
    if tuple(examples.image_shape) != tuple(loaded.image_shape):
        raise UserError(
            f"the images of {name} are {examples.image_shape}, the model takes "
            f"{tuple(loaded.image_shape)}"
        )
    return examples, split or "test"


def classify_examples(loaded, examples):
    """Classifies every image of a split once.

    Args:
      loaded: a model from `vit_jax.load`.
      examples: a split from `load_examples`.
    Returns:
      (logits float32[N, classes], labels int[N] numbered by the model's classes, indices int[N]
      into `examples`).
    """
    config = loaded.config
    classify = make_classify(loaded, batch_size=config.eval_batch_size)
    order = data.eval_order(examples.num_examples, config.eval_batch_size)
    logits, labels, indices = [], [], []
    for rows, batch in zip(order, _batches(examples, order, config), strict=True):
        valid = batch["mask"]
        logits.append(classify(batch["image"][valid]))
        labels.append(batch["label"][valid])
        indices.append(rows[valid])
    to_model = np.array([loaded.class_names.index(name) for name in examples.class_names])
    return np.concatenate(logits), to_model[np.concatenate(labels)], np.concatenate(indices)


def _batches(examples, order, config):
    """Yields {"image", "label", "mask"} on the host for each row of `order`."""
    if isinstance(examples, data.Stream):
        threads, rows = config.data.streaming_threads, np.arange(order.shape[1])
        steps = range(len(order))
        yield from examples.batches(order.__getitem__, steps, rows=rows, threads=threads)
        return
    for indices in order:
        images, labels = examples.examples(indices)
        yield {"image": images, "label": labels, "mask": indices >= 0}
