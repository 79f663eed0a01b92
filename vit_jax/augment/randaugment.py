"""RandAugment (Cubuk et al. 2019): a random sequence of PIL's operations for each image.

Operations, ranges, nearest resampling, and black fill follow torchvision.
"""

import jax
import jax.numpy as jnp
from jax import lax

from vit_jax.augment import pil


def randaugment(keys, images, augment):
    """Applies `augment.randaugment_num_ops` random operations to uint8[B,H,W,3], with keys[B]."""
    draw = jax.vmap(lambda key: draw_ops(key, augment, *images.shape[1:3]), out_axes=1)
    # A scan, not a Python loop: each round reads finished images. If the loop is unrolled, the
    # compiler fuses the rounds and recomputes the earlier ones for every pixel of the later ones.
    images, _ = lax.scan(lambda x, ops: (pil.apply_ops(x, *ops), None), images, draw(keys))
    return images


def draw_ops(key, augment, height, width):
    """Draws op, int32[rounds], an index into pil.OPS, and its magnitude, float32[rounds].

    The magnitude has the units of `pil.apply_ops`, and a random sign if the operation has one. The
    config's magnitude m is timm's (rand-mM-mstdS: 0 to 10, plus normal noise, clipped) and means
    m/10 of the range. torchvision's integer scale has 31 bins; its 9 is 3 here.
    """
    rounds = augment.randaugment_num_ops
    # Two of four numbers per round are used; drawing fewer would change every run.
    which, sign = jax.random.uniform(key, (4 * rounds,)).reshape(rounds, 4)[:, :2].T
    op = (which * len(pil.OPS)).astype(jnp.int32)
    strength = jnp.full(rounds, augment.randaugment_magnitude, jnp.float32)
    if augment.randaugment_magnitude_std > 0:
        noise = jax.random.normal(jax.random.fold_in(key, 1), (rounds,))
        strength += augment.randaugment_magnitude_std * noise
    # Shear 0.3, 150/331 of the side, 30 degrees, factor 1 +- 0.9, 8 to 4 bits, threshold 255 to 0.
    shifts = (150 / 331 * width, 150 / 331 * height)
    lowest = jnp.array([0.0] * 10 + [8.0, 255.0, 0.0, 0.0])
    highest = jnp.array([0.0, 0.3, 0.3, *shifts, 30.0, *[0.9] * 4, 4.0, 0.0, 0.0, 0.0])
    magnitude = lowest[op] + (highest - lowest)[op] * (jnp.clip(strength, 0, 10) / 10)
    # Integer pixels and thresholds that float32 just missed would be off by one.
    integer = jnp.round(magnitude)
    magnitude = jnp.where(jnp.abs(magnitude - integer) < 1e-4, integer, magnitude)
    signed = (op >= pil.OP["ShearX"]) & (op <= pil.OP["Sharpness"])
    return op, jnp.where(signed & (sign < 0.5), -magnitude, magnitude)
