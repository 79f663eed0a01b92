"""geometric.py against PIL, and against the distributions of torchvision and the papers."""

import jax
import numpy as np
import pytest
from augment_helpers import SIGNIFICANCE, as_bytes, batch_of, make, small_images
from scipy import stats

from vit_jax.augment import geometric


def test_crop_boxes_have_a_uniform_area_and_a_log_uniform_aspect_ratio():
    uniform = np.random.default_rng(5).random((4000, 10, 4))
    boxes = np.array([geometric.crop_box(u, 300, 200, (0.08, 1.0)) for u in uniform])
    top, left, rows, columns = boxes.T
    assert top.min() == left.min() == 0 and rows.min() > 0 and columns.min() > 0
    assert (top + rows).max() == 300 and (left + columns).max() == 200
    aspect = columns / rows
    assert 0.74 < aspect.min() < 0.76 and 1.3 < aspect.max() < 1.35
    area = rows * columns / 300 / 200
    assert area.min() < 0.1 and area.max() > 0.8
    # Boxes that do not fit are rejected: none of a quarter of the image.
    small = area < 0.25
    assert stats.kstest(area[small], stats.uniform(0.08, 0.17).cdf).pvalue > SIGNIFICANCE
    low, high = np.log(geometric.CROP_RATIO)
    log_uniform = stats.uniform(low, high - low).cdf
    assert stats.kstest(np.log(aspect[small]), log_uniform).pvalue > SIGNIFICANCE
    # None of the ten candidates fits: the center crop, as wide or high as allowed.
    misfit = np.full((10, 4), 0.999)
    assert geometric.crop_box(misfit, 10, 400, (0.08, 1.0)) == (0, 193, 10, 13)
    assert geometric.crop_box(misfit, 400, 10, (0.08, 1.0)) == (193, 0, 13, 10)


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


def test_erased_boxes_have_the_configured_rate_area_aspect_ratio_and_fill():
    count = 2000
    white = np.full((count, 32, 32, 3), 255, np.uint8)
    fn = jax.jit(make(erasing_prob=0.25))
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
    assert (out[erased] == 0).all()
