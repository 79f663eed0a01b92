"""PIL's image operations on a batch, each image with its own operation and magnitude.

All equal PIL byte for byte, except that Rotate, ShearX, and ShearY pick a neighboring pixel for one
or two pixels in about one in a thousand images (float32 matrices). A `lax.switch` under vmap would
compute every branch: here geometry is one gather, the enhancements are one blend, and the tone
curves are one table lookup.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

OPS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
OP = {name: index for index, name in enumerate(OPS)}


def apply_ops(images, op, magnitude):
    """Applies to uint8[B,H,W,3] the operations OPS[op], int32[B], at magnitude float32[B].

    Magnitudes are torchvision's: the slope for ShearX and ShearY; pixels, truncated to integers,
    for TranslateX and TranslateY; degrees counterclockwise for Rotate; the factor minus 1 for
    Brightness, Color, Contrast, and Sharpness; the number of bits kept for Posterize; the threshold
    for Solarize. The other operations ignore it.
    """
    per_image = op[:, None, None, None]
    # All three read the input, not each other: a chain would be recomputed for every neighbor.
    return jnp.where(
        per_image < OP["Brightness"],
        _warp(images, op, magnitude),
        jnp.where(
            per_image <= OP["Sharpness"],
            _enhance(images, op, 1 + magnitude),
            _tone_curve(images, op, magnitude),
        ),
    )


def _warp(images, op, magnitude):
    """Applies the geometric operations, identity for the rest.

    PIL maps an output pixel's center to the input in 16.16 fixed point and takes the pixel it falls
    in, or black outside the image.
    """
    _, height, width, _ = images.shape

    def on(name):
        return jnp.where(op == OP[name], magnitude, 0.0)

    angle = on("Rotate") * (math.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x_by_y, y_by_x = on("ShearX") - sin, on("ShearY") + sin
    # Where the center of output pixel (0, 0) falls: rotations turn about the image's center.
    x_start = (cos + x_by_y) / 2 - jnp.trunc(on("TranslateX"))
    y_start = (cos + y_by_x) / 2 - jnp.trunc(on("TranslateY"))
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


def _smooth(pixels):
    """Applies PIL's ImageFilter.SMOOTH, 3x3 ones with a 5 in the middle, except to the border."""
    height, width = pixels.shape[1:3]
    window = sum(
        pixels[:, y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)
    )
    smooth = (2 * (window + 4 * pixels[:, 1:-1, 1:-1]) + 13) // 26
    return pixels.at[:, 1:-1, 1:-1].set(smooth)


def _enhance(images, op, factor):
    """Applies PIL's ImageEnhance: blends each image with a degenerate one.

    It is black for Brightness, gray for Color, the mean gray for Contrast, smoothed for Sharpness.
    """
    _, height, width, _ = images.shape
    pixels, count = images.astype(jnp.int32), height * width
    weighted = pixels * jnp.array([19595, 38470, 7471])  # PIL's luma, ITU-R 601-2 in 16 bits
    gray = (weighted.sum(axis=-1, keepdims=True) + 0x8000) >> 16
    mean = (2 * gray.sum(axis=(1, 2), keepdims=True) + count) // (2 * count)
    op = op[:, None, None, None]
    degenerate = jnp.where(
        op == OP["Sharpness"],
        _smooth(pixels),
        jnp.where(op == OP["Color"], gray, jnp.where(op == OP["Contrast"], mean, 0)),
    )
    product = factor[:, None, None, None] * (pixels - degenerate).astype(jnp.float32)
    # PIL rounds the product, then the sum. A compiler would fuse both into one rounding and
    # sometimes be off by a level. It cannot see through this maximum, which only changes -0.0.
    bits = lax.bitcast_convert_type(product, jnp.int32)
    product = lax.bitcast_convert_type(jnp.maximum(bits, -0x7FFFFFFF), jnp.float32)
    return jnp.clip(degenerate.astype(jnp.float32) + product, 0, 255).astype(jnp.uint8)


def _tone_curve(images, op, magnitude):
    """Applies PIL's ImageOps, identity for the rest: 256 values per image and channel."""
    batch, _, _, channels = images.shape
    flat = images.reshape(batch, -1, channels).astype(jnp.int32)
    value = jnp.arange(256)[:, None]  # tables are [B, 256, C]
    op, magnitude = op[:, None, None], magnitude[:, None, None]
    low, high = flat.min(axis=1, keepdims=True), flat.max(axis=1, keepdims=True)
    dropped = 8 - jnp.round(magnitude).astype(jnp.int32)
    curves = {
        "Posterize": (value >> dropped) << dropped,
        "Solarize": jnp.where(value < magnitude, value, 255 - value),
        "AutoContrast": _autocontrast_curve(value, low, high),
        "Equalize": _equalize_curve(value, flat, high),
    }
    table = jnp.broadcast_to(value, (batch, 256, channels))
    for name, curve in curves.items():
        table = jnp.where(op == OP[name], curve, table)
    looked_up = jnp.take_along_axis(table.astype(jnp.uint8), flat, axis=1)
    return looked_up.reshape(images.shape)


def _autocontrast_curve(value, low, high):
    """Returns int32[B,256,C], which stretches low .. high, int32[B,1,C], to 0 .. 255."""
    span = jnp.maximum(high - low, 1)
    above = jnp.clip(value - low, 0, span)
    gcd, start, too_low = map(jnp.asarray, _autocontrast_ties())
    stretched = _divide(255 * above, span)
    exact = stretched * span == 255 * above  # there PIL's float64 may fall just below
    tie = start[span] + low * (gcd[span] + 1) + _divide(above * gcd[span], span)
    return jnp.where(high > low, stretched - (exact & too_low[tie]), value)


def _equalize_curve(value, flat, high):
    """Returns int32[B,256,C] from the histogram of flat, int32[B,HW,C], with maximum `high`."""
    _, num_pixels, channels = flat.shape
    # A scatter: on a CPU, 10 to 200 times as fast as sorting or comparing with all 256 values.
    zeros = jnp.zeros((256, channels), jnp.int32)
    count = jax.vmap(lambda v: zeros.at[v, jnp.arange(channels)].add(1))(flat)
    step = (num_pixels - jnp.take_along_axis(count, high, axis=1)) // 255
    below = jnp.cumsum(count, axis=1) - count
    curve = jnp.minimum(_divide(step // 2 + below, jnp.maximum(step, 1)), 255)
    return jnp.where(step > 0, curve, value)


def _divide(n, d):
    """Returns n // d of integers, 0 <= n < 2**22 and 0 < d, in float32, which vectorizes."""
    return ((n + 0.5) / d).astype(jnp.int32)  # the half: an exact n / d may round down


@functools.cache
def _autocontrast_ties():
    """Tabulates when PIL's `int(value * scale + offset)` in float64 is one below the exact value.

    The exact value, 255 (value - low) / span, is an integer only if value - low is a multiple of
    span / gcd(span, 255). Returns (gcd[span], start[span], too_low): the entry of `too_low` at
    start + low (gcd + 1) + multiple is True if PIL's value is one too low.
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
