"""Crops, the alternating flip, and random erasing.

Boxes are (top, left, rows, columns), each int32[B], in pixels.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vit_jax.augment import draws


def pad_crop(keys, images, padding, mode):
    """Pads all four sides and crops to the original size at a uniform offset.

    Source: torchvision's RandomCrop. Offsets are -padding .. padding in both directions.

    Args: keys[B]; images uint8[B,H,W,C]; padding in pixels; mode "zero" or "reflect".
    """
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, pads, mode="constant" if mode == "zero" else "reflect")
    offsets = draws.below(draws.uniform(keys, 2), 2 * padding + 1)
    return jax.vmap(lambda image, at: lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(
        padded, offsets
    )


def random_resized_crop(keys, images, scale, ratio):
    """Crops uint8[B,H,W,C] to random boxes and resizes them to H, W.

    Source: torchvision's RandomResizedCrop. `scale` is the range of the area as a share of the
    image, `ratio` the range of columns / rows.
    """
    height, width = images.shape[1:3]
    boxes = random_boxes(draws.uniform(keys, 40), height, width, scale, ratio)
    return resized_crop(images, *boxes)


def random_boxes(uniform, height, width, scale, ratio, *, erasing=False):
    """Draws boxes with an area uniform in `scale` and a log-uniform aspect ratio in `ratio`.

    Each box is the first of ten candidates that fits. They are computed from `uniform`,
    float[B,40] on [0, 1), a JAX array, or a NumPy array on the host. Source: torchvision's
    get_params. The aspect ratio of a crop is columns / rows, and its fallback is the largest
    centered box of an allowed ratio. The aspect ratio of an erased box is rows / columns; the box
    is smaller than the image, and its fallback is empty.
    """
    xp = uniform.__array_namespace__()
    area, log_aspect, down, right = uniform.reshape(-1, 4, 10).swapaxes(0, 1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = xp.exp(low + (high - low) * log_aspect)
    rows = xp.round(xp.sqrt(area * aspect if erasing else area / aspect)).astype(xp.int32)
    columns = xp.round(xp.sqrt(area / aspect if erasing else area * aspect)).astype(xp.int32)
    if erasing:
        fits = (rows < height) & (columns < width)
        most_rows, most_columns = 0, 0
    else:
        fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
        most_rows = min(height, max(1, round(width / ratio[0])))
        most_columns = min(width, max(1, round(height * ratio[1])))
    top = draws.below(down, height - rows + 1)
    left = draws.below(right, width - columns + 1)
    first = xp.argmax(fits, axis=1)[None, :, None]
    boxes = xp.take_along_axis(xp.stack([top, left, rows, columns]), first, axis=2)[..., 0]
    centered = (height - most_rows) // 2, (width - most_columns) // 2, most_rows, most_columns
    return tuple(xp.where(fits.any(axis=1), boxes, xp.array(centered)[:, None]))


def resized_crop(images, top, left, rows, columns):
    """Crops boxes from uint8[B,H,W,C] and resizes them to H, W bilinearly.

    Resizes horizontally, then vertically, each rounded to uint8. The result is within one level
    of PIL's crop().resize(BILINEAR), whose weights are fixed-point. Boxes are never larger than the
    image, so antialiasing, which only applies to reduction, has no effect.
    """

    def weights(start, length, size):  # [B, size out, size in]
        center = start[:, None] + (jnp.arange(size) + 0.5) * (length / size)[:, None]
        source = jnp.arange(size)
        distance = jnp.abs(source + 0.5 - center[..., None])
        inside = (source >= start[:, None]) & (source < (start + length)[:, None])
        hat = jnp.where(inside[:, None], jnp.maximum(0.0, 1.0 - distance), 0.0)
        return hat / hat.sum(axis=-1, keepdims=True)

    _, height, width, _ = images.shape
    images = images.astype(jnp.float32)
    across, down = weights(left, columns, width), weights(top, rows, height)
    # Highest precision: bfloat16 or TF32 passes would be off by a level or two.
    images = jnp.einsum("bow,bhwc->bhoc", across, images, precision="highest")
    images = jnp.einsum("boh,bhwc->bowc", down, jnp.floor(images + 0.5), precision="highest")
    return jnp.clip(jnp.floor(images + 0.5), 0, 255).astype(jnp.uint8)


def alternating_flip(images, epoch):
    """Returns bool[B]: whether each image is mirrored in this epoch; the next epoch inverts it.

    Source: Jordan 2024 (airbench). A batch contains no indices, so a hash of the
    image's bytes identifies it and decides for epoch 0.
    """
    flat = images.reshape(images.shape[0], -1).astype(jnp.uint32)
    weights = np.arange(flat.shape[1], dtype=np.uint32) * np.uint32(2654435762) + np.uint32(1)
    mixed = jnp.sum(flat * weights, axis=1, dtype=jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # murmur3's finalizer
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    hash_bit = (mixed >> 31).astype(jnp.int32)
    return (hash_bit + epoch) % 2 == 1


def box_mask(top, left, rows, columns, height, width):
    """Returns bool[B,H,W]: whether a pixel lies in the box; bool[H,W] for a box of scalars."""
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    top, left, rows, columns = (jnp.asarray(v)[..., None, None] for v in (top, left, rows, columns))
    return (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns)


def random_erasing(keys, images, augment):
    """Replaces a random box of normalized images with zeros (the mean color) or normal noise.

    Source: Zhong et al. 2017; torchvision's RandomErasing.

    Args: keys[B]; images float32[B,H,W,C]; augment the config group, for its `erasing_*` fields.
    """
    height, width = images.shape[1:3]
    uniform = draws.uniform(keys, 41)
    erased = uniform[:, 40] < augment.erasing_prob
    scale, ratio = augment.erasing_scale, augment.erasing_ratio
    boxes = random_boxes(uniform[:, :40], height, width, scale, ratio, erasing=True)
    erased = (erased[:, None, None] & box_mask(*boxes, height, width))[..., None]
    noise = augment.erasing_mode == "noise"
    return jnp.where(erased, draws.normal(keys, images.shape[1:]) if noise else 0.0, images)
