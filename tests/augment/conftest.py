"""Images that the tests of augmentation share."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def images():
    """64 images: noise, smooth ramps, narrow ranges, a single value, two values."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    ramp = np.add.outer(3 * np.arange(32), 2 * np.arange(32))[..., None]
    for i in range(64):
        if i % 4 == 1:
            x[i] = ramp + rng.integers(0, 60, 3) + rng.integers(0, 20, (32, 32, 3))
        elif i % 4 == 2:
            low, high = sorted(rng.integers(0, 256, 2))
            x[i] = low + x[i].astype(int) * (high - low) // 255
        elif i % 8 == 3:
            x[i] = rng.integers(0, 256)
        elif i % 8 == 7:
            two = rng.integers(0, 256, 2)
            x[i] = np.where(rng.random((32, 32, 1)) < rng.random(), *two)
    return x
