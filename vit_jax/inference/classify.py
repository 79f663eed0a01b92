"""Classification of images and of splits: uint8 pixels in, logits and attention maps out."""

import functools
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from vit_jax import augment, data
from vit_jax.errors import UserError, expand_home
from vit_jax.parallel import mesh as mesh_lib


def prepare(image, image_shape):
    """Crops and resizes uint8[h, w, 3] RGB of any size to the model's uint8[H, W, C].

    Takes the largest centered crop of the model's aspect ratio, as `config.data.image_size` does in
    training. C is 1 or 3.
    """
    H, W, C = image_shape
    image = data.center_crop_resize(image, H, W)
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if C == 1 else image


def make_classify(trained, *, batch_size=64, attention=False):
    """Returns classify(uint8[N, H, W, C]) -> float32[N, classes] logits of a TrainedModel.

    Images run in batches of `batch_size`, rounded up to a multiple of the device count. With
    `attention`, classify returns (logits, maps): maps is float32[N, L, h, tokens, tokens], the
    attention of every layer and head, taken from the same forward pass.
    """
    model, params, config = trained
    mesh = mesh_lib.make_mesh(0, 1)
    batch_size += -batch_size % mesh.size
    params = jax.device_put(params, mesh_lib.replicated(mesh))

    mean, std = tuple(config.data.mean), tuple(config.data.std)

    def classify(images):
        outputs = []
        starts = range(0, len(images), batch_size)
        for start in tqdm.tqdm(starts, "classifying", leave=False, delay=1, disable=None):
            batch = images[start : start + batch_size]
            padded = np.zeros((batch_size, *batch.shape[1:]), np.uint8)
            padded[: len(batch)] = batch
            padded = jax.device_put(padded, mesh_lib.batch_sharding(mesh))
            outputs.append(jax.device_get(_forward(model, mean, std, attention, params, padded)))
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(images)], *outputs)

    return classify


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _forward(model, mean, std, attention, params, images):
    x = augment.normalize(images, mean, std)
    if not attention:
        return model.apply({"params": params}, x)
    logits, state = model.apply({"params": params}, x, mutable="intermediates")
    blocks = [state["intermediates"][f"block_{i}"] for i in range(model.depth)]
    return logits, jnp.stack([block["attn"]["attention"][0] for block in blocks], axis=1)


def load_examples(trained, name=None, split=None):
    """Returns the split a TrainedModel is evaluated on: (data.Dataset or data.Stream, split name).

    Args:
      trained: a TrainedModel. If its run streamed its data, the split is a Stream.
      name: an image folder or a TFDS name; its images are cropped to the model's size. None: the
        data that the run was trained on. If classes have only numbers as names, class i is taken
        as the model's class i.
      split: a TFDS split. None: for the run's own data, its test split, or its validation split if
        it has no test split; for a folder, see `data.held_out_split`; for a TFDS name, "test".
    Raises UserError if the data does not exist, has a class that the model lacks, or has images of
    another shape than the model's.
    """
    config, (H, W, _) = trained.config, trained.image_shape
    if name is None:
        split = split or config.data.test_split or config.data.val_split
        name, image_size = config.data.name, config.data.image_size
    elif H != W:
        raise UserError(f"the model takes {H}x{W} images, but --data is cropped to squares only")
    else:
        image_size = H
        folder = expand_home(name.removeprefix("folder:"))
        if folder.is_dir():
            name = f"folder:{folder}"
            split = split or data.held_out_split(folder)
    split = split or "test"
    examples = data.open_split(
        name,
        split,
        data_dir=config.data.dir or None,
        image_size=image_size or None,
        streaming=config.data.streaming,
    )
    unknown = sorted(set(examples.class_names) - set(trained.class_names))
    if unknown and _only_numbered(trained, examples):
        print(f"the classes of {name} have no names: they are matched by number", file=sys.stderr)
    elif unknown:
        raise UserError(
            f"{name} has classes that the model lacks ({', '.join(unknown[:5])}); "
            f"the model's classes are {', '.join(trained.class_names[:20])}"
        )
    given, expected = tuple(examples.image_shape), tuple(trained.image_shape)
    if given != expected:
        raise UserError(f"the images of {name} are {given}, but the model takes {expected}")
    return examples, split


def classify_examples(trained, examples):
    """Classifies every image of a split from `load_examples`, in order.

    Returns logits, float32[N, classes], and labels, int[N], numbered by the model's classes.
    """
    config = trained.config
    classify = make_classify(trained, batch_size=config.eval_batch_size)
    if isinstance(examples, data.Stream):
        order = data.eval_order(examples.num_examples, config.eval_batch_size)
        batches = examples.batches(
            order.__getitem__,
            range(len(order)),
            rows=np.arange(order.shape[1]),
            threads=config.data.streaming_threads,
        )
        text = "reading and classifying"
        batches = tqdm.tqdm(batches, text, len(order), leave=False, delay=1, disable=None)
        parts = zip(*((classify(b["image"]), b["label"]) for b in batches), strict=True)
        logits, labels = (np.concatenate(part)[: examples.num_examples] for part in parts)
    else:
        logits, labels = classify(examples.images), examples.labels
    return logits, class_numbers(trained, examples)[labels]


def class_numbers(trained, examples):
    """Returns int[n], the model's number of each class of a split from `load_examples`."""
    if set(examples.class_names) <= set(trained.class_names):
        return np.array([trained.class_names.index(name) for name in examples.class_names])
    return np.arange(len(trained.class_names))  # `load_examples` has checked _only_numbered


def _only_numbered(trained, examples):
    """Returns whether the classes are named "0", "1", ..., as in TFDS's cifar10_1."""
    return tuple(examples.class_names) == tuple(map(str, range(len(trained.class_names))))
