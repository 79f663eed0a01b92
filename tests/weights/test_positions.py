"""Resized position embeddings; tests/parity compares the torch methods."""

import numpy as np
import pytest
from scipy import ndimage

from vit_jax.weights import resize_positions


@pytest.mark.parametrize(
    ("grid", "new"), [((14, 14), (24, 24)), ((4, 7), (9, 3)), ((8, 8), (3, 5)), ((1, 4), (3, 1))]
)
def test_zoom_equals_scipy(grid, new):
    table = np.random.default_rng(0).normal(size=(1, 1 + grid[0] * grid[1], 6)).astype(np.float32)
    got = resize_positions(table, grid, new, method="zoom", class_token=True)
    factors = (new[0] / grid[0], new[1] / grid[1], 1)
    expected = ndimage.zoom(table[0, 1:].reshape(*grid, 6), factors, order=1)
    np.testing.assert_allclose(got[0, 1:].reshape(*new, 6), expected, atol=1e-5)
    assert (got[:, :1] == table[:, :1]).all()


def test_resizing_to_the_same_grid_changes_nothing():
    table = np.random.default_rng(0).normal(size=(1, 12, 4)).astype(np.float32)
    for method in ("zoom", "bicubic", "bilinear"):
        got = resize_positions(table, (3, 4), (3, 4), method=method, class_token=False)
        np.testing.assert_array_equal(got, table)
