"""geometric.py against PIL, and against the distributions of torchvision and the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augment_helpers import SIGNIFICANCE, as_bytes, batch_of, make, small_images
from PIL import Image
from scipy import stats

from vit_jax.augment import geometric


def test_resized_crop_is_within_one_level_of_pil(images):
    rng = np.random.default_rng(2)
    rows, columns = rng.integers(1, 33, (2, 64))
    top, left = rng.integers(0, 33 - rows), rng.integers(0, 33 - columns)
    out = np.asarray(jax.jit(geometric.resized_crop)(images, top, left, rows, columns)).astype(int)
    for i in range(64):
        box = left[i], top[i], left[i] + columns[i], top[i] + rows[i]
        scaled = Image.fromarray(images[i]).crop(box).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.abs(out[i] - np.asarray(scaled)).max() <= 1


def test_crop_boxes_have_a_uniform_area_and_a_log_uniform_aspect_ratio():
    uniform = jnp.asarray(np.random.default_rng(5).random((4000, 40), np.float32))
    random_boxes = jax.jit(geometric.random_boxes, static_argnums=(1, 2, 3, 4))
    boxes = random_boxes(uniform, 32, 32, (0.08, 1.0), (3 / 4, 4 / 3))
    top, left, rows, columns = map(np.asarray, boxes)
    assert top.min() == left.min() == 0 and rows.min() > 0 and columns.min() > 0
    assert (top + rows).max() == (left + columns).max() == 32
    aspect = columns / rows
    assert np.all((columns + 0.5) / (rows - 0.5) >= 3 / 4)
    assert np.all((columns - 0.5) / (rows + 0.5) <= 4 / 3)
    assert abs(np.median(np.log(aspect))) < 0.03  # log-uniform is symmetric about a square
    # The area is uniform until boxes are rejected because they do not fit.
    area = rows * columns / 1024
    small = area[(area > 0.1) & (area < 0.5)]
    assert stats.kstest(small, stats.uniform(0.1, 0.4).cdf).statistic < 0.05
    fallback = random_boxes(uniform[:4], 8, 32, (1.0, 1.0), (0.5, 2.0))
    np.testing.assert_array_equal(np.stack(fallback), [[0] * 4, [8] * 4, [8] * 4, [16] * 4])


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_pad_crop_cuts_the_padded_image_at_uniform_offsets(mode):
    count = 4096
    y, x = np.mgrid[:32, :32]
    image = np.stack([y + 1, x + 1, 7 * y + x & 255], axis=-1).astype(np.uint8)
    fn = jax.jit(make(crop="pad", crop_padding=4, crop_padding_mode=mode))
    out, _ = fn(jax.random.key(2), batch_of(np.broadcast_to(image, (count, 32, 32, 3))), epoch=0)
    out = as_bytes(out)
    down, right = out[:, 16, 16, 0].astype(int) - 17 + 4, out[:, 16, 16, 1].astype(int) - 17 + 4
    pads = ((4, 4), (4, 4), (0, 0))
    padded = np.pad(image, pads, mode="constant" if mode == "zero" else "reflect")
    for i in range(0, count, 17):
        cut = padded[down[i] : down[i] + 32, right[i] : right[i] + 32]
        np.testing.assert_array_equal(out[i], cut)
    cells = np.bincount(down * 9 + right, minlength=81)
    assert len(cells) == 81
    assert stats.chisquare(cells).pvalue > SIGNIFICANCE


def flipped(before, after):
    """bool[B]: whether each image was mirrored; fails if one is neither mirrored nor equal."""
    mirrored = (after == before[:, :, ::-1]).all(axis=(1, 2, 3))
    assert np.all(mirrored | (after == before).all(axis=(1, 2, 3)))
    return mirrored


def test_random_flip_mirrors_half_of_the_images_independently():
    images = small_images(4000)
    out, _ = jax.jit(make(flip="random"))(jax.random.key(3), batch_of(images), epoch=0)
    mirrored = flipped(images, as_bytes(out))
    assert stats.binomtest(int(mirrored.sum()), 4000, 0.5).pvalue > SIGNIFICANCE
    runs = np.sum(mirrored[1:] != mirrored[:-1])  # neighbors are independent
    assert stats.binomtest(int(runs), 3999, 0.5).pvalue > SIGNIFICANCE


def test_alternating_flip_inverts_each_epoch_and_follows_the_image():
    images = small_images(4000)
    fn = jax.jit(make(flip="alternating"))
    epochs = [
        flipped(images, as_bytes(fn(jax.random.key(e), batch_of(images), epoch=e)[0]))
        for e in range(4)
    ]
    assert stats.binomtest(int(epochs[0].sum()), 4000, 0.5).pvalue > SIGNIFICANCE
    for e in range(1, 4):
        np.testing.assert_array_equal(epochs[e], ~epochs[e - 1])
    # The decision depends on the image, not on its position in the batch.
    moved = flipped(
        images[::-1], as_bytes(fn(jax.random.key(9), batch_of(images[::-1]), epoch=0)[0])
    )
    np.testing.assert_array_equal(moved[::-1], epochs[0])


@pytest.mark.parametrize("mode", ["zero", "noise"])
def test_erased_boxes_have_the_configured_rate_area_aspect_ratio_and_fill(mode):
    count = 2000
    white = np.full((count, 32, 32, 3), 255, np.uint8)
    fn = jax.jit(make(erasing_prob=0.25, erasing_mode=mode))
    out = np.asarray(fn(jax.random.key(8), batch_of(white), epoch=0)[0])
    erased = (out != 1).any(axis=-1)
    hit = erased.any(axis=(1, 2))
    assert stats.binomtest(int(hit.sum()), count, 0.25).pvalue > SIGNIFICANCE
    areas = []
    for box in erased[hit]:
        rows, columns = int(box.any(axis=1).sum()), int(box.any(axis=0).sum())
        assert box.sum() == rows * columns, "the erased pixels are not a rectangle"
        assert (rows + 0.5) * (columns + 0.5) >= 0.02 * 1024
        assert (rows - 0.5) * (columns - 0.5) <= 1024 / 3
        assert (rows + 0.5) / (columns - 0.5) >= 0.3 and (rows - 0.5) / (columns + 0.5) <= 3.3
        areas.append(rows * columns / 1024)
    assert stats.kstest(areas, stats.uniform(0.02, 1 / 3 - 0.02).cdf).pvalue > SIGNIFICANCE
    inside = out[erased]
    if mode == "zero":
        assert (inside == 0).all()
    else:
        assert stats.kstest(inside.ravel()[::7], "norm").pvalue > SIGNIFICANCE
