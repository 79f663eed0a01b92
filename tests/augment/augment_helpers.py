"""Configs, batches, and PIL references that the tests of augmentation share."""

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.augment import make_augment
from vit_jax.config import defaults

# The random tests have fixed keys, so each always passes or always fails. With another key, a
# correct sampler fails one with this probability.
SIGNIFICANCE = 1e-4


def options(**changes):
    """The `augment` config group with some fields changed."""
    group = defaults().augment
    for name, value in changes.items():
        group[name] = value
    return group


def make(num_classes=10, mean=(0.0,) * 3, std=(1.0,) * 3, label_smoothing=0.0, **changes):
    """The augmentation function with some fields of the config group changed."""
    return make_augment(
        options(**changes),
        mean=mean,
        std=std,
        num_classes=num_classes,
        label_smoothing=label_smoothing,
    )


def batch_of(images, labels=None, mask=None):
    """A batch; labels default to 0, 1, ..., 9, 0, ... and all rows to valid."""
    count = len(images)
    labels = np.arange(count) % 10 if labels is None else labels
    mask = np.ones(count, bool) if mask is None else mask
    return {
        "image": jnp.asarray(images),
        "label": jnp.asarray(labels, jnp.int32),
        "mask": jnp.asarray(mask),
    }


def as_bytes(images):
    """Inverts normalize with mean 0 and std 1."""
    return np.round(np.asarray(images) * 255).astype(np.uint8)


def small_images(count, seed=3, side=4):
    """Random images, uint8[count,side,side,3]."""
    shape = (count, side, side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def by_pil(pixels, name, magnitude):
    """PIL's result of one of pil.OPS on one image, uint8[H,W,3]."""
    image, affine = Image.fromarray(pixels), Image.Transform.AFFINE
    shift = int(magnitude)
    match name:
        case "ShearX":
            out = image.transform(image.size, affine, (1, magnitude, 0, 0, 1, 0))
        case "ShearY":
            out = image.transform(image.size, affine, (1, 0, 0, magnitude, 1, 0))
        case "TranslateX":
            out = image.transform(image.size, affine, (1, 0, -shift, 0, 1, 0))
        case "TranslateY":
            out = image.transform(image.size, affine, (1, 0, 0, 0, 1, -shift))
        case "Rotate":
            out = image.rotate(magnitude)
        case "Posterize":
            out = ImageOps.posterize(image, int(magnitude))
        case "Solarize":
            out = ImageOps.solarize(image, magnitude)
        case "AutoContrast" | "Equalize":
            out = getattr(ImageOps, name.lower())(image)
        case "Identity":
            out = image
        case _:
            out = getattr(ImageEnhance, name)(image).enhance(1 + magnitude)
    return np.asarray(out)
