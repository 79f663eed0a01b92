"""Crops, the alternating flip, and random erasing."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# (smallest, largest), as in torchvision.
CROP_RATIO = (3 / 4, 4 / 3)  # columns / rows
ERASING_SCALE = (0.02, 1 / 3)  # area of the box, as a share of the image
ERASING_RATIO = (0.3, 3.3)  # rows / columns


def pad_crop(key, image, augment):
    """Pads uint8[H,W,C], crops H x W at a random offset. Source: torchvision's RandomCrop."""
    padding, zero = augment.crop_padding, augment.crop_padding_mode == "zero"
    pads = ((padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(image, pads, mode="constant" if zero else "reflect")
    top, left = (jax.random.uniform(key, (2,)) * (2 * padding + 1)).astype(jnp.int32)
    return lax.dynamic_slice(padded, (top, left, 0), image.shape)


def make_crop(augment, *, size: int, seed: int, steps_per_epoch: int) -> Callable | None:
    """Returns the `crop` of `data.Stream.batches` for augment.crop = "resized", else None.

    It crops a stored image of any size and resizes it to (size, size), on the host. The box is a
    function of (seed, epoch, index) only.
    """
    if augment.crop != "resized":
        return None

    def crop(image, step, index):
        import cv2

        # The data order uses the low end of the counter; these words do not overlap it.
        words = np.random.Philox(key=[seed, step // steps_per_epoch], counter=[0, 0, index + 1, 0])
        uniform = (words.random_raw((10, 4)) >> np.uint64(11)) * 2.0**-53
        top, left, rows, columns = crop_box(uniform, *image.shape[:2], augment.crop_scale)
        image = image[top : top + rows, left : left + columns]
        method = cv2.INTER_AREA if rows * columns > size * size else cv2.INTER_LINEAR
        return cv2.resize(image, (size, size), interpolation=method).reshape(size, size, -1)

    return crop


def crop_box(uniform, height, width, scale):
    """Returns (top, left, rows, columns) of a crop with an area share in `scale`.

    It is the first of ten candidates that fits, else the largest centered box of an allowed aspect
    ratio. `uniform`, float64[10,4] in [0, 1), draws them. Source: torchvision's RandomResizedCrop.
    """
    low, high = map(math.log, CROP_RATIO)
    for share, log_aspect, down, right in uniform:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(low + (high - low) * log_aspect)
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = int(down * (height - rows + 1)), int(right * (width - columns + 1))
            return top, left, rows, columns
    rows = min(height, max(1, round(width / CROP_RATIO[0])))
    columns = min(width, max(1, round(height * CROP_RATIO[1])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def alternating_flip(images, epoch):
    """Returns bool[B]: whether each image is mirrored in this epoch; the next epoch inverts it.

    Source: Jordan 2024 (airbench). A batch contains no indices, so a hash of the image's bytes
    identifies it and decides for epoch 0.
    """
    flat = images.reshape(images.shape[0], -1).astype(jnp.uint32)
    weights = np.arange(flat.shape[1], dtype=np.uint32) * np.uint32(2654435762) + np.uint32(1)
    mixed = jnp.sum(flat * weights, axis=1, dtype=jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # murmur3's finalizer
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return ((mixed >> 31).astype(jnp.int32) + epoch) % 2 == 1


def random_erasing(key, image, augment):
    """Sets a random box of a normalized image, float32[H,W,C], to zero, which is the mean color.

    Erases with probability `augment.erasing_prob`. The box is the first of ten candidates that is
    smaller than the image; if there is none, nothing is erased. Source: Zhong et al. 2017;
    torchvision's RandomErasing.
    """
    height, width, _ = image.shape
    uniform = jax.random.uniform(key, (41,))
    share, log_aspect, down, right = uniform[:40].reshape(4, 10)
    smallest, largest = ERASING_SCALE
    low, high = map(math.log, ERASING_RATIO)
    area = height * width * (smallest + (largest - smallest) * share)
    aspect = jnp.exp(low + (high - low) * log_aspect)
    rows = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    columns = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    top = (down * (height - rows + 1)).astype(jnp.int32)
    left = (right * (width - columns + 1)).astype(jnp.int32)
    fits = (rows < height) & (columns < width)
    box = jnp.stack([top, left, rows, columns])[:, jnp.argmax(fits)]
    erased = fits.any() & (uniform[40] < augment.erasing_prob)
    return jnp.where((erased & in_box(*box, height, width))[..., None], 0.0, image)


def in_box(top, left, rows, columns, height, width):
    """Returns bool[H,W]: whether a pixel lies in the box."""
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    return (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns)
