"""pil.py against PIL itself."""

import jax
import numpy as np
import pytest
from augment_helpers import by_pil

from vit_jax.augment import pil

pytestmark = pytest.mark.usefixtures("optimized")  # the operations of a user's programs
BATCH = 64
ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")
apply_ops = jax.jit(pil.apply_ops)


@pytest.mark.parametrize("name", pil.OPS)
def test_operation_equals_pil(images, name):
    reach = {"Shear": 0.99, "Trans": 33.0, "Rotat": 135.0}.get(name[:5], 0.99)
    magnitudes = np.linspace(-reach, reach, BATCH)
    if name == "Posterize":
        magnitudes = 1 + np.arange(BATCH) % 8
    elif name == "Solarize":
        magnitudes = np.linspace(0, 256, BATCH)
    elif name in ENHANCEMENTS:  # fiftieths: a fused multiply-add would round to another level
        magnitudes = np.round(magnitudes * 50) / 50
    magnitudes = magnitudes.astype(np.float32)
    out = apply_ops(images, np.full(BATCH, pil.OPS.index(name), np.int32), magnitudes)
    expected = [by_pil(x, name, float(m)) for x, m in zip(images, magnitudes, strict=True)]
    different = (np.asarray(out) != np.stack(expected)).any(axis=-1)
    # float32 sines and slopes may put a pixel on the other side of a boundary.
    allowed = 1e-3 if name in ("Rotate", "ShearX", "ShearY") else 0
    assert different.mean(axis=(1, 2)).max() <= allowed
    if name != "Identity":
        assert (np.asarray(out) != images).any(), "the operation did nothing"


def test_each_image_gets_its_own_operation(images):
    ops = np.arange(BATCH, dtype=np.int32) % len(pil.OPS)
    magnitudes = np.full(BATCH, 0.5, np.float32)
    magnitudes[ops == pil.OPS.index("Posterize")] = 3
    out = np.asarray(apply_ops(images, ops, magnitudes))
    for i in range(BATCH):
        expected = by_pil(images[i], pil.OPS[ops[i]], float(magnitudes[i]))
        np.testing.assert_array_equal(out[i], expected, err_msg=pil.OPS[ops[i]])


def test_autocontrast_keeps_the_float64_quirks_of_pil():
    """Every pair of extremes whose range shares a factor with 255, and a hundred others."""
    rng = np.random.default_rng(1)
    pairs = [(low, low + span) for span in (51, 85, 102, 153, 170) for low in range(256 - span)]
    pairs += [tuple(sorted(p)) for p in rng.integers(0, 256, (100, 2))]
    pairs += [pairs[0]] * (-len(pairs) % BATCH)
    pixels = np.zeros((len(pairs), 32, 32, 3), np.uint8)
    for image, (low, high) in zip(pixels, pairs, strict=True):
        image[:] = np.clip(np.arange(1024).reshape(32, 32, 1) % 256, low, high)
    op = np.full(BATCH, pil.OPS.index("AutoContrast"), np.int32)
    for chunk in np.split(pixels, len(pairs) // BATCH):
        out = apply_ops(chunk, op, np.zeros(BATCH, np.float32))
        np.testing.assert_array_equal(out, [by_pil(x, "AutoContrast", 0) for x in chunk])
