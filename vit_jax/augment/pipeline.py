"""Augmentation on the device: (key, uint8 batch) -> float32 images and soft labels, inside jit.

Everything is off by default and switched on by the `augment` group of the config. The order is
fixed: crop -> flip -> policy -> colour jitter (uint8 up to here) -> normalize -> erasing ->
mixup / cutmix.

**Randomness.** For each operation, image i of the global batch draws from a key of its own,
fold_in(fold_in(key, the operation's number), i): no two images share a draw, batch size and device
count change none, and switching one operation on leaves the draws of the others alone. Only mixup
and cutmix per batch draw once for all.

**References.** Policies follow torchvision: operations, ranges, nearest resampling, black fill.
Every operation works on a batch in which each image has an operation and a magnitude of its own
(a `lax.switch` under vmap would compute every branch anyway, with less shared): geometry is one
gather, the enhancements one blend, the tone curves one look-up table. All equal PIL byte for byte,
quirks of its float arithmetic included, apart from Rotate and the shears: their float32 matrices
take a neighbouring pixel for one or two pixels of about one image in a thousand.
"""

import difflib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vit_jax.errors import UserError

OPS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert",
)  # fmt: skip
_OP = {name: index for index, name in enumerate(OPS)}
_SIGNED = (_OP["ShearX"], _OP["Sharpness"])  # first and last operation with a sign
_NUM_RANDOM_OPS = 14  # RandAugment and TrivialAugment draw from all but Invert

# AutoAugment's CIFAR-10 policy (Cubuk et al. 2018, table 7, in torchvision's order): twenty-five
# pairs of operation, probability, magnitude 0..9 (0 where the operation has none).
_AUTOAUGMENT = (
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

# What each operation folds into the key. Never renumber: it would change every run.
_CROP, _FLIP, _POLICY, _JITTER, _ERASE, _MIX, _MIX_BATCH = range(7)


def normalize(images, mean, std):
    """uint8[B,H,W,C] -> float32: (x / 255 - mean) / std, the bits of ToTensor() + Normalize().

    A table of the 256 values a channel, computed by numpy: XLA would turn the divisions by
    constants into multiplications by their reciprocals, which round differently.
    """
    if images.dtype != jnp.uint8:
        raise UserError(f"normalize takes uint8 images, got {images.dtype}")
    values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    table = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    channels = images.shape[-1]
    return jnp.asarray(np.broadcast_to(table, (256, channels)))[images, jnp.arange(channels)]


def make_augment(augment, *, mean, std, num_classes, label_smoothing=0.0):
    """Builds fn(key, batch, *, epoch, mix=True) -> (float32[B,H,W,C], float32[B,num_classes]).

    `batch` is {"image": uint8[B,H,W,C], "label": int32[B], "mask": bool[B]}; rows outside the mask
    are never mixed into others. `epoch` is an int32 scalar (read by the alternating flip only);
    `mix` a bool scalar, False leaves mixup and cutmix out. Labels are one-hot, smoothed as in torch
    (smoothing spread over all classes), then mixed. With everything off this is normalize and
    one-hot. Raises UserError when traced with images that `check_image_shape` rejects.
    """

    def augment_batch(key, batch, *, epoch, mix=True):
        images = batch["image"]
        num_images, height, width, _ = images.shape
        check_image_shape(augment, images.shape[1:])

        def keys_for(operation):  # one key an image
            operation_key = jax.random.fold_in(key, operation)
            return jax.vmap(jax.random.fold_in, (None, 0))(operation_key, jnp.arange(num_images))

        # Decided on the image as stored, before the crop changes its bytes.
        if augment.flip == "random":
            flip = _uniform(keys_for(_FLIP), 1)[:, 0] < 0.5
        elif augment.flip == "alternating":
            flip = (_hash_bit(images) + epoch) % 2 == 1

        if augment.crop == "pad":
            padding, mode = augment.crop_padding, augment.crop_padding_mode
            images = _pad_crop(keys_for(_CROP), images, padding, mode)
        elif augment.crop == "resized":
            top, left, rows, columns = _random_boxes(
                _uniform(keys_for(_CROP), 40), height, width, augment.crop_scale, augment.crop_ratio
            )
            images = resized_crop(images, top, left, rows, columns)
        if augment.flip != "none":
            images = jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
        if augment.policy != "none":
            rounds = _draw_policy(keys_for(_POLICY), augment, height, width)
            # A scan, not a Python loop: each round reads finished images. Unrolled, the compiler
            # fuses the rounds and computes the earlier anew for every pixel of the later.
            images, _ = lax.scan(lambda x, r: (apply_ops(x, *r), None), images, rounds)
        if any(augment.color_jitter):
            images = _color_jitter(keys_for(_JITTER), images, augment.color_jitter)
        images = normalize(images, mean, std)
        if augment.erasing_prob > 0:
            images = _erase(keys_for(_ERASE), images, augment)

        labels = jax.nn.one_hot(batch["label"], num_classes, dtype=jnp.float32)
        if label_smoothing:
            labels = labels * (1 - label_smoothing) + label_smoothing / num_classes
        mixing = augment.mix_prob > 0 and (augment.mixup_alpha > 0 or augment.cutmix_alpha > 0)
        if not mixing or mix is False:
            return images, labels
        if augment.mix_per == "image":
            keys = keys_for(_MIX)
        else:
            keys = jax.random.fold_in(key, _MIX_BATCH)[None]
        weights, lam = jax.vmap(lambda k: _draw_mix(k, augment, height, width))(keys)
        weights, lam = jnp.where(mix, weights, 1.0)[..., None], jnp.where(mix, lam, 1.0)[:, None]
        return (
            weights * images + (1 - weights) * _partner(images, batch["mask"]),
            lam * labels + (1 - lam) * _partner(labels, batch["mask"]),
        )

    return augment_batch


# ---------------------------------------------------------------- crop, flip, erasing, mixing


def _uniform(keys, count):
    """keys[B] -> float32[B, count], uniform on [0, 1)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


def _below(uniform, count):
    """Uniform on [0, 1) -> a whole number, uniform on 0 .. count - 1."""
    return jnp.floor(uniform * count).astype(jnp.int32)


def _pad_crop(keys, images, padding, mode):
    """Pads all four sides and cuts the input's size out at a uniform offset (torchvision
    RandomCrop): the same offsets -padding .. padding in both directions."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, pads, mode="constant" if mode == "zero" else "reflect")
    offsets = _below(_uniform(keys, 2), 2 * padding + 1)
    return jax.vmap(lambda image, at: lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(
        padded, offsets
    )


def _random_boxes(draws, height, width, scale, ratio, *, erasing=False):
    """Boxes (top, left, rows, columns), each int32[B], of a share of the area uniform in `scale`
    and a log-uniform aspect in `ratio`: the first that fits of the ten tries in `draws`, uniform
    float32[B,40].

    torchvision's get_params. A crop's aspect is columns / rows and its fallback the largest centred
    box of an allowed aspect; an erased box's aspect is rows / columns, it is smaller than the image
    and its fallback is empty.
    """
    area, log_aspect, down, right = jnp.moveaxis(draws.reshape(-1, 4, 10), 1, 0)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = jnp.exp(low + (high - low) * log_aspect)
    rows = jnp.round(jnp.sqrt(area * aspect if erasing else area / aspect)).astype(jnp.int32)
    columns = jnp.round(jnp.sqrt(area / aspect if erasing else area * aspect)).astype(jnp.int32)
    if erasing:
        fits = (rows < height) & (columns < width)
        fallback = 0, 0
    else:
        fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
        fallback = (
            min(height, max(1, round(width / ratio[0]))),
            min(width, max(1, round(height * ratio[1]))),
        )
    first = jnp.argmax(fits, axis=1)[:, None]
    found = jnp.any(fits, axis=1)

    def pick(values, otherwise):
        return jnp.where(found, jnp.take_along_axis(values, first, axis=1)[:, 0], otherwise)

    top = _below(down, height - rows + 1)
    left = _below(right, width - columns + 1)
    return (
        pick(top, (height - fallback[0]) // 2),
        pick(left, (width - fallback[1]) // 2),
        pick(rows, fallback[0]),
        pick(columns, fallback[1]),
    )


def resized_crop(images, top, left, rows, columns):
    """Cuts the boxes (int32[B] each) out of uint8[B,H,W,C] and scales them to H, W, bilinearly.

    PIL's crop().resize(BILINEAR): across, rounded to uint8, then down, rounded. A box is never
    larger than the image, so antialiasing, which acts on reduction only, has no part in it. Within
    one level of PIL, whose weights are fixed-point.
    """

    def weights(start, length, size):  # [B, size out, size in]
        centre = start[:, None] + (jnp.arange(size) + 0.5) * (length / size)[:, None]
        source = jnp.arange(size)
        distance = jnp.abs(source + 0.5 - centre[..., None])
        inside = (source >= start[:, None]) & (source < (start + length)[:, None])
        hat = jnp.where(inside[:, None], jnp.maximum(0.0, 1.0 - distance), 0.0)
        return hat / hat.sum(axis=-1, keepdims=True)

    _, height, width, _ = images.shape
    images = images.astype(jnp.float32)
    across, down = weights(left, columns, width), weights(top, rows, height)
    # The highest precision: bfloat16 or TF32 passes would be a level or two off.
    images = jnp.einsum("bow,bhwc->bhoc", across, images, precision="highest")
    images = jnp.einsum("boh,bhwc->bowc", down, jnp.floor(images + 0.5), precision="highest")
    return jnp.clip(jnp.floor(images + 0.5), 0, 255).astype(jnp.uint8)


def _hash_bit(images):
    """uint8[B,...] -> int32[B] of 0 or 1: a coin tossed by the image's own bytes.

    The alternating flip (Jordan 2024, airbench) needs to know an image again in the next epoch; a
    batch carries no index, its bytes are as good.
    """
    flat = images.reshape(images.shape[0], -1).astype(jnp.uint32)
    weights = np.arange(flat.shape[1], dtype=np.uint32) * np.uint32(2654435762) + np.uint32(1)
    mixed = jnp.sum(flat * weights, axis=1, dtype=jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # murmur3's finalizer
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed >> 31).astype(jnp.int32)


def _inside(top, left, rows, columns, height, width):
    """Boxes, int32[B] or scalars -> bool[B, H, W] or [H, W]: is the pixel in the box?"""
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    top, left, rows, columns = (jnp.asarray(v)[..., None, None] for v in (top, left, rows, columns))
    return (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns)


def _erase(keys, images, augment):
    """Random erasing (Zhong et al. 2017; torchvision RandomErasing), on normalized images: a box
    of zeros (the mean colour) or of standard normal noise."""
    height, width = images.shape[1:3]
    draws = _uniform(keys, 41)
    erased = draws[:, 40] < augment.erasing_prob
    scale, ratio = augment.erasing_scale, augment.erasing_ratio
    boxes = _random_boxes(draws[:, :40], height, width, scale, ratio, erasing=True)
    erased = (erased[:, None, None] & _inside(*boxes, height, width))[..., None]
    if augment.erasing_mode == "noise":
        noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        fill = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(noise_keys)
    else:
        fill = 0.0
    return jnp.where(erased, fill, images)


def _draw_mix(key, augment, height, width):
    """One draw -> (float32[H,W] weight of the image itself at each pixel, lam: their mean).

    mixup (Zhang et al. 2017): lam ~ Beta(alpha, alpha) everywhere. cutmix (Yun et al. 2019): 0 in
    a box of share 1 - lam whose centre is uniform, clipped to the image; lam becomes what is left
    exactly. `mix_prob` to mix at all, `mix_switch_prob` for cutmix where both are on (timm).
    """
    mix, switch, *centre = jax.random.uniform(jax.random.fold_in(key, 0), (4,))
    both = augment.mixup_alpha > 0 and augment.cutmix_alpha > 0
    cutmix = switch < augment.mix_switch_prob if both else jnp.array(augment.cutmix_alpha > 0)
    alpha = jnp.where(cutmix, augment.cutmix_alpha, augment.mixup_alpha)
    lam = jax.random.beta(jax.random.fold_in(key, 1), alpha, alpha)
    size = jnp.array([height, width])
    cut = (size * jnp.sqrt(1 - lam)).astype(jnp.int32)
    low = _below(jnp.array(centre), size) - cut // 2
    kept = ~_inside(*low, *cut, height, width)  # what lies outside the image is not counted
    weights = jnp.where(cutmix, kept, lam)
    lam = jnp.where(cutmix, jnp.sum(kept) / (height * width), lam)
    mixed = mix < augment.mix_prob
    return jnp.where(mixed, weights, 1.0), jnp.where(mixed, lam, 1.0)


def _partner(x, mask):
    """[B, ...] and bool[B] -> [B, ...]: for each row that `mask` marks valid, the row to mix with.

    It is the next row if that is valid, else the first valid row, so valid rows mix with valid
    rows only. Without gaps in the mask no image meets itself and no pair is mixed twice. On
    several devices the shift moves one row between neighbors and the gather sends one row.
    """
    num_rows = len(mask)
    first = jnp.min(jnp.where(mask, jnp.arange(num_rows), num_rows - 1))
    next_is_valid = jnp.roll(mask, -1).reshape(-1, *[1] * (x.ndim - 1))
    # A gather with an index array: a scalar index would gather the batch on every device.
    return jnp.where(next_is_valid, jnp.roll(x, -1, axis=0), x[first[None]])


# ---------------------------------------------------------------- policies and colour


def _draw_policy(keys, augment, height, width):
    """keys[B] -> op int32[rounds, B], an index into OPS, and magnitude float32[rounds, B].

    The ranges are torchvision's. RandAugment (Cubuk et al. 2019) and AutoAugment reach shear 0.3,
    150/331 of the image's side, 30 degrees, factor 1 +- 0.9, 4 bits, threshold 0; TrivialAugment
    (Mueller & Hutter 2021, "wide") shear 0.99, 32 pixels, 135 degrees, 1 +- 0.99, 2 bits, 0.
    RandAugment's magnitude m is timm's (rand-mM-mstdS: 0..10, plus normal noise, clipped) and means
    m/10 of the range; torchvision's own integer scale has 31 bins, its 9 is our 3.
    """
    wide = augment.policy == "trivialaugment"
    shear, degrees, factor, bits = (0.99, 135.0, 0.99, 2.0) if wide else (0.3, 30.0, 0.9, 4.0)
    shift_x, shift_y = (32.0, 32.0) if wide else (150 / 331 * width, 150 / 331 * height)
    # Magnitudes at strength 0 and 1, in the order of OPS.
    none = jnp.array([0.0] * 10 + [8.0, 255.0, 0.0, 0.0, 0.0])
    full = jnp.array(
        [0.0, shear, shear, shift_x, shift_y, degrees, *[factor] * 4, bits, 0.0, 0.0, 0.0, 0.0]
    )
    rounds = {"randaugment": augment.randaugment_num_ops, "trivialaugment": 1, "autoaugment": 2}
    rounds = rounds[augment.policy]
    # Four uniform numbers a round: which, sign, strength, whether. [rounds, B] each.
    draws = jnp.moveaxis(_uniform(keys, 4 * rounds).reshape(-1, rounds, 4), 0, 2)
    which, sign, strength, whether = jnp.moveaxis(draws, 1, 0)
    op = _below(which, _NUM_RANDOM_OPS)
    if augment.policy == "autoaugment":
        pair = _below(which[0], len(_AUTOAUGMENT))  # one choice for both rounds
        ops = np.array([[_OP[name] for name, _, _ in pair] for pair in _AUTOAUGMENT])
        numbers = np.array([[step[1:] for step in pair] for pair in _AUTOAUGMENT], np.float32)
        probability, strength = jnp.asarray(numbers)[pair].T
        strength = strength / 9
        op = jnp.where(whether < probability, jnp.asarray(ops)[pair].T, _OP["Identity"])
    elif augment.policy == "trivialaugment":
        strength = _below(strength, 31) / 30
    else:
        strength = jnp.full_like(strength, augment.randaugment_magnitude)
        if augment.randaugment_magnitude_std > 0:
            noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
            noise = jax.vmap(lambda key: jax.random.normal(key, (rounds,)))(noise_keys)
            strength += augment.randaugment_magnitude_std * noise.T
        strength = jnp.clip(strength, 0, 10) / 10
    magnitude = none[op] + (full - none)[op] * strength
    # Whole pixels and thresholds that float32 just missed, which would jump by one.
    whole = jnp.round(magnitude)
    magnitude = jnp.where(jnp.abs(magnitude - whole) < 1e-4, whole, magnitude)
    negative = (sign < 0.5) & (op >= _SIGNED[0]) & (op <= _SIGNED[1])
    return op, jnp.where(negative, -magnitude, magnitude)


def apply_ops(images, op, magnitude):
    """Applies to each of uint8[B,H,W,3] the operation OPS[op], int32[B], at magnitude float32[B].

    Magnitudes are torchvision's: Shear*: the slope; Translate*: pixels, cut to whole ones; Rotate:
    degrees counter-clockwise; Brightness, Color, Contrast, Sharpness: the factor minus 1;
    Posterize: bits kept; Solarize: the threshold; the others ignore it.
    """
    op, magnitude = jnp.asarray(op), jnp.asarray(magnitude, jnp.float32)
    per_image = op[:, None, None, None]
    # All three read the input, not each other: a chain would be recomputed for every neighbour.
    return jnp.where(
        per_image < _OP["Brightness"],
        _warp(images, op, magnitude),
        jnp.where(
            per_image <= _OP["Sharpness"],
            _enhance(images, op, 1 + magnitude),
            _tone_curve(images, op, magnitude),
        ),
    )


def _warp(images, op, magnitude):
    """The geometry operations, identity for the rest: PIL's nearest affine transform.

    PIL maps an output pixel's centre to the input in 16.16 fixed point and takes the pixel it falls
    in; black outside.
    """
    _, height, width, _ = images.shape

    def on(name, value=magnitude):
        return jnp.where(op == _OP[name], value, 0.0)

    angle = on("Rotate") * (math.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pixels = jnp.trunc(magnitude)
    x_by_y, y_by_x = on("ShearX") - sin, on("ShearY") + sin
    # Where the centre of output pixel (0, 0) falls: rotations turn about the image's centre.
    x_start = (cos + x_by_y) / 2 - on("TranslateX", pixels)
    y_start = (cos + y_by_x) / 2 - on("TranslateY", pixels)
    x_start += (1 - cos) * (width / 2) + sin * (height / 2)
    y_start += (1 - cos) * (height / 2) - sin * (width / 2)

    def fixed(value):
        return jnp.floor(value * 65536 + 0.5).astype(jnp.int32)[:, None, None]

    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    x_in = (fixed(x_start) + fixed(cos) * x + fixed(x_by_y) * y) >> 16
    y_in = (fixed(y_start) + fixed(y_by_x) * x + fixed(cos) * y) >> 16
    inside = (x_in >= 0) & (x_in < width) & (y_in >= 0) & (y_in < height)
    y_in, x_in = jnp.where(inside, y_in, 0), jnp.where(inside, x_in, 0)
    warped = jax.vmap(lambda image, y, x: image[y, x])(images, y_in, x_in)
    return jnp.where(inside[..., None], warped, jnp.uint8(0))


def _gray(images):
    """uint8[B,H,W,3] -> int32[B,H,W,1]: PIL's convert("L"), ITU-R 601-2 luma in 16 bits."""
    weighted = images.astype(jnp.int32) * jnp.array([19595, 38470, 7471])
    return (weighted.sum(axis=-1, keepdims=True) + 0x8000) >> 16


def _enhance(images, op, factor):
    """PIL's ImageEnhance: moves each image away from (factor > 1) or towards (< 1) a degenerate
    one: black (Brightness), gray (Color), its mean gray (Contrast), smoothed (Sharpness)."""
    _, height, width, _ = images.shape
    pixels, gray = images.astype(jnp.int32), _gray(images)
    count = height * width
    mean = (2 * gray.sum(axis=(1, 2), keepdims=True) + count) // (2 * count)
    # ImageFilter.SMOOTH: 3x3 ones with a 5 in the middle, over 13, rounded; the border is kept.
    window = sum(
        pixels[:, y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)
    )
    smooth = (2 * (window + 4 * pixels[:, 1:-1, 1:-1]) + 13) // 26
    smooth = pixels.at[:, 1:-1, 1:-1].set(smooth)
    op = op[:, None, None, None]
    degenerate = jnp.where(
        op == _OP["Sharpness"],
        smooth,
        jnp.where(op == _OP["Color"], gray, jnp.where(op == _OP["Contrast"], mean, 0)),
    )
    product = factor[:, None, None, None] * (pixels - degenerate).astype(jnp.float32)
    # PIL rounds the product, then the sum. A compiler would fuse the two into one rounding and be
    # a level off now and then; it cannot see through this maximum, which changes -0.0 only.
    bits = lax.bitcast_convert_type(product, jnp.int32)
    product = lax.bitcast_convert_type(jnp.maximum(bits, -0x7FFFFFFF), jnp.float32)
    return jnp.clip(degenerate.astype(jnp.float32) + product, 0, 255).astype(jnp.uint8)


def _tone_curve(images, op, magnitude):
    """Posterize, Solarize, AutoContrast, Equalize, Invert (PIL's ImageOps), identity for the rest:
    a table of 256 values an image and channel, looked up once."""
    batch, height, width, channels = images.shape
    flat = images.reshape(batch, -1, channels).astype(jnp.int32)
    value = jnp.arange(256)[:, None]  # tables are [B, 256, C]
    op, magnitude = op[:, None, None], magnitude[:, None, None]
    low, high = flat.min(axis=1, keepdims=True), flat.max(axis=1, keepdims=True)

    dropped = 8 - jnp.round(magnitude).astype(jnp.int32)
    posterize = (value >> dropped) << dropped
    solarize = jnp.where(value < magnitude, value, 255 - value)

    span = jnp.maximum(high - low, 1)
    above = jnp.clip(value - low, 0, span)
    gcd, start, too_low = map(jnp.asarray, _autocontrast_ties())
    stretched = _divide(255 * above, span)
    whole = stretched * span == 255 * above  # there PIL's float64 may fall just below
    tie = start[span] + low * (gcd[span] + 1) + _divide(above * gcd[span], span)
    autocontrast = stretched - (whole & too_low[tie])
    autocontrast = jnp.where(high > low, autocontrast, value)

    # A scatter: on a CPU ten to two hundred times faster than sorting or comparing with all 256.
    zeros = jnp.zeros((256, channels), jnp.int32)
    count = jax.vmap(lambda v: zeros.at[v, jnp.arange(channels)].add(1))(flat)
    step = (height * width - jnp.take_along_axis(count, high, axis=1)) // 255
    below = jnp.cumsum(count, axis=1) - count
    equalize = jnp.minimum(_divide(step // 2 + below, jnp.maximum(step, 1)), 255)
    equalize = jnp.where(step > 0, equalize, value)

    table = jnp.broadcast_to(value, (batch, 256, channels))
    for name, curve in (
        ("Posterize", posterize), ("Solarize", solarize), ("AutoContrast", autocontrast),
        ("Equalize", equalize), ("Invert", 255 - value),
    ):  # fmt: skip
        table = jnp.where(op == _OP[name], curve, table)
    looked_up = jnp.take_along_axis(table.astype(jnp.uint8), flat, axis=1)
    return looked_up.reshape(images.shape)


def _divide(n, d):
    """n // d of whole numbers, 0 <= n < 2**22, 0 < d, in float32, which vectorises. The half keeps
    a whole quotient from falling below itself."""
    return ((n + 0.5) / d).astype(jnp.int32)


@functools.cache
def _autocontrast_ties():
    """Where PIL's `int(value * scale + offset)` in float64 falls one below a whole number.

    The exact 255 (value - low) / span is whole at the multiples of span / gcd(span, 255) only.
    Returns (gcd[span], start[span], too_low): entry start + low (gcd + 1) + multiple is 0 or 1.
    """
    gcd = np.gcd(np.arange(256), 255)
    start = np.cumsum((256 - np.arange(256)) * (gcd + 1))
    start = np.concatenate([[0], start[:-1]])
    too_low = []
    for span in range(256):
        low, multiple = np.arange(256 - span)[:, None], np.arange(gcd[span] + 1)
        scale = 255.0 / max(span, 1)
        computed = (low + multiple * (span // gcd[span])) * scale + -low * scale
        too_low.append((computed.astype(np.int32) < multiple * (255 // gcd[span])).ravel())
    return gcd.astype(np.int32), start.astype(np.int32), np.concatenate(too_low)


def _color_jitter(keys, images, strengths):
    """torchvision ColorJitter: brightness, contrast and saturation by a factor uniform in
    1 +- strength (not below 0), hue by a shift uniform in +- strength, in an order of its own for
    each image. A strength of 0 leaves its operation out."""
    ops = (_OP["Brightness"], _OP["Contrast"], _OP["Color"], -1)  # -1: hue
    on = [i for i in range(4) if strengths[i] > 0]
    low = jnp.array([max(0.0, 1 - strengths[i]) if i < 3 else -strengths[3] for i in on])
    high = jnp.array([1 + strengths[i] if i < 3 else strengths[3] for i in on])
    draws = _uniform(keys, 8)
    amounts = low + (high - low) * draws[:, jnp.array(on)]
    order = jnp.argsort(draws[:, 4 + jnp.array(on)], axis=1)
    amounts = jnp.take_along_axis(amounts, order, axis=1)

    def turn(images, op_and_amount):
        op, amount = op_and_amount
        enhanced = _enhance(images, op, amount)
        if strengths[3] > 0:
            shifted = shift_hue(images, jnp.trunc(amount * 255).astype(jnp.int32))
            enhanced = jnp.where((op == -1)[:, None, None, None], shifted, enhanced)
        return enhanced, None

    images, _ = lax.scan(turn, images, (jnp.array([ops[i] for i in on])[order].T, amounts.T))
    return images


def shift_hue(images, shift):
    """Adds int32[B], modulo 256, to the hue byte of PIL's HSV of uint8[B,H,W,3]; equals
    convert("HSV"), numpy addition, convert("RGB")."""
    red, green, blue = jnp.moveaxis(images.astype(jnp.int32), -1, 0)
    value = jnp.maximum(red, jnp.maximum(green, blue))
    chroma = value - jnp.minimum(red, jnp.minimum(green, blue))
    sixths = jnp.where(
        value == red,
        green - blue + jnp.where(green < blue, 6 * chroma, 0),
        jnp.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green),
    )  # the hue in units of 1 / (6 chroma), below 6 chroma
    hue = jnp.asarray(_hue_bytes())[3 * chroma * (chroma - 1) + sixths].astype(jnp.int32)
    hue = jnp.where(chroma == 0, 0, hue)
    hue = (hue + shift[:, None, None]) & 255
    saturation = _divide(255 * chroma, jnp.maximum(value, 1))

    sector = lax.div(6 * hue, 255)
    rest = 6 * hue - 255 * sector

    def darker(share):  # value * (1 - share / 255**2), rounded; never half-way
        return lax.div(2 * value * (65025 - share) + 65025, 130050)

    p, q, t = darker(255 * saturation), darker(saturation * rest), darker(saturation * (255 - rest))
    sector = jnp.where(sector == 6, 0, sector)
    channels = ((value, q, p, p, t, value), (t, value, value, q, p, p), (p, p, t, value, value, q))
    return jnp.stack([_choose(sector, c) for c in channels], axis=-1).astype(jnp.uint8)


def _choose(index, values):
    """index int32[...] in 0 .. n-1, n arrays of its shape -> values[index] element by element."""
    chosen = values[0]
    for i, value in enumerate(values[1:], start=1):
        chosen = jnp.where(index == i, value, chosen)
    return chosen


@functools.cache
def _hue_bytes():
    """PIL's hue byte for a hue of n / (6 chroma), at index 3 chroma (chroma - 1) + n.

    A table, since PIL rounds to float32 on the way: where 255 n / (6 chroma) is whole, its byte is
    at times one below, and no arithmetic on the device would follow it everywhere.
    """
    chroma = np.repeat(np.arange(1, 256), 6 * np.arange(1, 256))
    n = np.arange(len(chroma)) - 3 * chroma * (chroma - 1)
    primary = 2 * ((n + chroma) // (2 * chroma))  # the nearest of red 0, green 2, blue 4, red 6
    offset = n - primary * chroma
    beside = ((chroma - np.abs(offset)) / chroma).astype(np.float32)
    hue = (primary % 6 + np.sign(offset) * (1 - beside.astype(np.float64))).astype(np.float32)
    hue = np.fmod(hue.astype(np.float64) / 6 + 1, 1).astype(np.float32)
    return (hue.astype(np.float64) * 255).astype(np.uint8)


# ---------------------------------------------------------------- the config


_CHOICES = {
    "crop": ("none", "pad", "resized", "decoded"),
    "crop_padding_mode": ("zero", "reflect"),
    "flip": ("none", "random", "alternating"),
    "policy": ("none", "randaugment", "trivialaugment", "autoaugment"),
    "erasing_mode": ("zero", "noise"),
    "mix_per": ("batch", "image"),
}
_LIMITS = {  # inclusive; a pair is held to them in both numbers
    "crop_padding": (1, None),
    "crop_scale": (0, 1),
    "crop_ratio": (0, None),
    "randaugment_num_ops": (1, None),
    "randaugment_magnitude": (0, 10),
    "randaugment_magnitude_std": (0, None),
    "erasing_prob": (0, 1),
    "erasing_scale": (0, 1),
    "erasing_ratio": (0, None),
    "mixup_alpha": (0, None),
    "cutmix_alpha": (0, None),
    "mix_prob": (0, 1),
    "mix_switch_prob": (0, 1),
}


def validate(augment, *, batch_size):
    """Raises UserError, one line, for whatever the `augment` config cannot mean.

    `batch_size` is global. What depends on the images is checked by `check_image_shape`.
    """
    for name, choices in _CHOICES.items():
        value = augment[name]
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"augment.{name} is {value!r}; there are {', '.join(choices)}{hint}")
    for name, (low, high) in _LIMITS.items():
        value = augment[name]
        pair = name.endswith(("_scale", "_ratio"))
        if pair and (len(value) != 2 or value[0] > value[1]):
            raise UserError(f"augment.{name} is {value}: give (smallest, largest)")
        values = tuple(value) if pair else (value,)
        if name.endswith("_ratio") and min(values) <= 0:
            raise UserError(f"augment.{name} is {value}: aspect ratios are above 0")
        # Written so that NaN fails too.
        if not all(low <= v <= (math.inf if high is None else high) for v in values):
            allowed = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"augment.{name} is {value}: it must be {allowed}")
    jitter = augment.color_jitter
    if len(jitter) != 4 or not all(v >= 0 for v in jitter) or not jitter[3] <= 0.5:
        raise UserError(
            f"augment.color_jitter is {tuple(jitter)}: give four strengths (brightness, contrast, "
            "saturation, hue), none negative, hue at most 0.5"
        )
    for name in ("mixup_alpha", "cutmix_alpha"):
        if augment[name] > 0 and batch_size < 2:
            raise UserError(
                f"augment.{name} is {augment[name]} with batch_size {batch_size}: mixing needs at "
                f"least 2 images a batch; raise batch_size or set augment.{name} to 0"
            )


def check_image_shape(augment, image_shape):
    """Raises UserError if the `augment` config does not suit images of (H, W, C)."""
    height, width, channels = image_shape
    largest = min(height, width) - 1
    if augment.crop == "pad" and augment.crop_padding > largest:
        raise UserError(
            f"config.augment.crop_padding={augment.crop_padding} is too large for images of "
            f"{height}x{width} pixels: use at most {largest}"
        )
    color = {"policy": augment.policy != "none", "color_jitter": any(augment.color_jitter)}
    for name, is_on in color.items():
        if is_on and channels != 3:
            raise UserError(
                f"config.augment.{name}={augment[name]} needs RGB images, but the images have "
                f"{channels} channels: set it to {'none' if name == 'policy' else '0,0,0,0'}"
            )


def describe(augment):
    """The operations switched on, in the order they are applied, one readable line each."""
    a, lines = augment, []

    def between(pair):
        return f"{pair[0]:.3g} to {pair[1]:.3g}"

    if a.crop == "pad":
        lines.append(f"random crop, {a.crop_padding} pixels of {a.crop_padding_mode} padding")
    elif a.crop == "resized":
        scale, ratio = between(a.crop_scale), between(a.crop_ratio)
        lines.append(f"random resized crop, area {scale}, aspect {ratio}")
    elif a.crop == "decoded":
        scale, ratio = between(a.crop_scale), between(a.crop_ratio)
        lines.append(f"random resized crop of the stored image, area {scale}, aspect {ratio}")
    if a.flip != "none":
        lines.append(f"{a.flip} horizontal flip")
    if a.policy == "randaugment":
        noise = f" +- {a.randaugment_magnitude_std:g}" if a.randaugment_magnitude_std else ""
        strength = f"magnitude {a.randaugment_magnitude:g}{noise} of 10"
        lines.append(f"RandAugment, {a.randaugment_num_ops} operations of {strength}")
    elif a.policy == "trivialaugment":
        lines.append("TrivialAugment (wide)")
    elif a.policy == "autoaugment":
        lines.append("AutoAugment (CIFAR-10 policy)")
    if any(a.color_jitter):
        names = ("brightness", "contrast", "saturation", "hue")
        on = [f"{name} {v:g}" for name, v in zip(names, a.color_jitter, strict=True) if v]
        lines.append(f"colour jitter, {', '.join(on)}")
    if a.erasing_prob > 0:
        area = between(a.erasing_scale)
        how = f"probability {a.erasing_prob:g}, area {area}"
        lines.append(f"random erasing with {a.erasing_mode}, {how}")
    if a.mix_prob > 0 and (a.mixup_alpha > 0 or a.cutmix_alpha > 0):
        alphas = {"mixup": a.mixup_alpha, "cutmix": a.cutmix_alpha}
        on = [f"{name} Beta({v:g}, {v:g})" for name, v in alphas.items() if v]
        how = f"probability {a.mix_prob:g}"
        if len(on) == 2:
            how += f", of that cutmix {a.mix_switch_prob:g}"
        lines.append(f"{' or '.join(on)}, {how}, drawn per {a.mix_per}")
    return lines
