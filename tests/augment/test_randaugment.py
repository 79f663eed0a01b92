"""randaugment.py against the distributions in the paper."""

import jax
import numpy as np
from augment_helpers import SIGNIFICANCE, options
from scipy import stats

from vit_jax.augment import pil
from vit_jax.augment.randaugment import draw_ops


def draw(count, **changes):
    group = options(**changes)
    keys = jax.random.split(jax.random.key(7), count)
    op, magnitude = jax.jit(jax.vmap(lambda k: draw_ops(k, group, 32, 32), out_axes=1))(keys)
    return np.asarray(op), np.asarray(magnitude)


def test_randaugment_draws_operations_uniformly_and_magnitudes_as_configured():
    op, magnitude = draw(7000, policy="randaugment", randaugment_magnitude=9.0)
    assert op.shape == (2, 7000)
    table = np.zeros((14, 14))
    np.add.at(table, tuple(op), 1)  # rounds are independent
    assert stats.chisquare(table.ravel()).pvalue > SIGNIFICANCE
    reach = [0, 0.27, 0.27, *[150 / 331 * 32 * 0.9] * 2, 27, *[0.81] * 4, 4.4, 25.5, 0, 0]
    for i, value in enumerate(reach):
        np.testing.assert_allclose(np.abs(magnitude[op == i]), value, rtol=1e-5, atol=1e-5)
        negative = int((magnitude[op == i] < 0).sum())
        if 1 <= i <= 9:
            total = int((op == i).sum())
            assert stats.binomtest(negative, total, 0.5).pvalue > SIGNIFICANCE
        else:
            assert negative == 0
    op, magnitude = draw(7000, policy="randaugment", randaugment_magnitude_std=0.5)
    noisy = np.abs(magnitude[op == pil.OPS.index("Rotate")]) / 3
    assert noisy.max() == 10  # clipped
    below = noisy[noisy < 9]  # half of a normal distribution, unaffected by clipping
    assert stats.kstest(9 - below, stats.halfnorm(0, 0.5).cdf).pvalue > SIGNIFICANCE
