"""Random sequences of PIL operations: RandAugment, TrivialAugment, AutoAugment, color jitter.

The policies follow torchvision: operations, ranges, nearest resampling, black fill.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from vit_jax.augment import draws, pil

_NUM_RANDOM_OPS = 14  # RandAugment and TrivialAugment draw from all operations but Invert

# AutoAugment's CIFAR-10 policy (Cubuk et al. 2018, table 7, in torchvision's order): 25 pairs of
# operation, probability, and magnitude 0..9 (0 if the operation has none).
AUTOAUGMENT = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)


def random_policy(keys, images, augment):
    """Applies the policy `augment.policy` to uint8[B,H,W,3], with keys[B]."""
    rounds = draw_policy(keys, augment, *images.shape[1:3])
    # A scan, not a Python loop: each round reads finished images. If the loop is unrolled, the
    # compiler fuses the rounds and recomputes the earlier ones for every pixel of the later ones.
    images, _ = lax.scan(lambda x, r: (pil.apply_ops(x, *r), None), images, rounds)
    return images


def draw_policy(keys, augment, height, width):
    """Draws op and magnitude of each round from keys[B], both [rounds,B].

    op is int32, an index into pil.OPS. magnitude is float32 in the units of `pil.apply_ops`, with a
    random sign if the operation has one.
    """
    rounds = {"randaugment": augment.randaugment_num_ops, "trivialaugment": 1, "autoaugment": 2}
    rounds = rounds[augment.policy]
    # Four uniform numbers per round, [rounds, B] each.
    uniform = jnp.moveaxis(draws.uniform(keys, 4 * rounds).reshape(-1, rounds, 4), 0, 2)
    which, sign, strength, chance = jnp.moveaxis(uniform, 1, 0)
    if augment.policy == "autoaugment":
        op, strength = _autoaugment(which[0], chance)
    else:
        op = draws.below(which, _NUM_RANDOM_OPS)
        if augment.policy == "trivialaugment":
            strength = draws.below(strength, 31) / 30
        else:
            strength = _randaugment_strength(keys, augment, strength.shape)
    lowest, highest = _magnitudes(augment.policy, height, width)
    magnitude = lowest[op] + (highest - lowest)[op] * strength
    # Integer pixels and thresholds that float32 just missed would be off by one.
    integer = jnp.round(magnitude)
    magnitude = jnp.where(jnp.abs(magnitude - integer) < 1e-4, integer, magnitude)
    negative = (sign < 0.5) & (op >= pil.FIRST_SIGNED) & (op <= pil.LAST_SIGNED)
    return op, jnp.where(negative, -magnitude, magnitude)


def _magnitudes(policy, height, width):
    """Returns the magnitudes of all operations at strength 0 and at strength 1, float32[15] each.

    The ranges are torchvision's. RandAugment (Cubuk et al. 2019) and AutoAugment reach shear 0.3,
    150/331 of the image's side, 30 degrees, factor 1 +- 0.9, 4 bits, threshold 0. TrivialAugment
    (Mueller & Hutter 2021, "wide") reaches shear 0.99, 32 pixels, 135 degrees, factor 1 +- 0.99,
    2 bits, threshold 0.
    """
    wide = policy == "trivialaugment"
    shear, degrees, factor, bits = (0.99, 135.0, 0.99, 2.0) if wide else (0.3, 30.0, 0.9, 4.0)
    shift_x, shift_y = (32.0, 32.0) if wide else (150 / 331 * width, 150 / 331 * height)
    geometry = [0.0, shear, shear, shift_x, shift_y, degrees]
    lowest = [0.0] * 10 + [8.0, 255.0, 0.0, 0.0, 0.0]
    highest = [*geometry, *[factor] * 4, bits, 0.0, 0.0, 0.0, 0.0]
    return jnp.array(lowest), jnp.array(highest)


def _autoaugment(which, chance):
    """Returns op int32[2,B] and strength float32[2,B] of the pair that which, float32[B], selects.

    An operation whose chance, float32[2,B], is not below its probability becomes Identity.
    """
    pair = draws.below(which, len(AUTOAUGMENT))
    ops = np.array([[pil.OP[name] for name, _, _ in pair] for pair in AUTOAUGMENT])
    numbers = np.array([[step[1:] for step in pair] for pair in AUTOAUGMENT], np.float32)
    probability, strength = jnp.asarray(numbers)[pair].T
    op = jnp.where(chance < probability, jnp.asarray(ops)[pair].T, pil.OP["Identity"])
    return op, strength / 9


def _randaugment_strength(keys, augment, shape):
    """Returns float32[rounds,B] in 0 .. 1 from `randaugment_magnitude` and its noise.

    The magnitude m is timm's (rand-mM-mstdS: 0 to 10, plus normal noise, clipped) and means
    m/10 of the range. torchvision's integer scale has 31 bins; its 9 is 3 here.
    """
    strength = jnp.full(shape, augment.randaugment_magnitude, jnp.float32)
    if augment.randaugment_magnitude_std > 0:
        noise = draws.normal(keys, shape[:1])
        strength += augment.randaugment_magnitude_std * noise.T
    return jnp.clip(strength, 0, 10) / 10


def color_jitter(keys, images, strengths):
    """Varies brightness, contrast, saturation, and hue of uint8[B,H,W,3] with keys[B].

    Source: torchvision's ColorJitter. Brightness, contrast, and saturation change by a factor
    uniform in 1 +- strength (at least 0), hue by a shift uniform in +- strength. Each image has its
    own order of operations. `strengths` are four numbers; 0 omits an operation.
    """
    hue = -1
    ops = (pil.OP["Brightness"], pil.OP["Contrast"], pil.OP["Color"], hue)
    on = [i for i in range(4) if strengths[i] > 0]
    low = jnp.array([max(0.0, 1 - strengths[i]) if i < 3 else -strengths[3] for i in on])
    high = jnp.array([1 + strengths[i] if i < 3 else strengths[3] for i in on])
    uniform = draws.uniform(keys, 8)
    amounts = low + (high - low) * uniform[:, jnp.array(on)]
    order = jnp.argsort(uniform[:, 4 + jnp.array(on)], axis=1)
    amounts = jnp.take_along_axis(amounts, order, axis=1)

    def jitter(images, op_and_amount):
        op, amount = op_and_amount
        jittered = pil.enhance(images, op, amount)
        if strengths[3] > 0:
            shifted = pil.shift_hue(images, jnp.trunc(amount * 255).astype(jnp.int32))
            jittered = jnp.where((op == hue)[:, None, None, None], shifted, jittered)
        return jittered, None

    ops = jnp.array([ops[i] for i in on])[order]
    images, _ = lax.scan(jitter, images, (ops.T, amounts.T))
    return images
