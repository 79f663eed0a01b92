"""policy.py against the distributions in the papers, and against PIL."""

import math
from itertools import permutations

import jax
import numpy as np
from augment_helpers import SIGNIFICANCE, by_pil, options, shift_hue_by_pil
from scipy import stats

from vit_jax.augment import draws, pil, policy


def draw(count, **changes):
    group = options(**changes)
    keys = jax.random.split(jax.random.key(7), count)
    op, magnitude = jax.jit(lambda k: policy.draw_policy(k, group, 32, 32))(keys)
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


def test_trivialaugment_draws_uniformly_over_operations_and_31_strengths():
    op, magnitude = draw(14000, policy="trivialaugment")
    assert op.shape == (1, 14000)
    assert stats.chisquare(np.bincount(op[0], minlength=14)).pvalue > SIGNIFICANCE
    rotation = magnitude[op == pil.OPS.index("Rotate")]
    bins = np.bincount(np.round(np.abs(rotation) / 4.5).astype(int))
    assert len(bins) == 31 and stats.chisquare(bins).pvalue > SIGNIFICANCE
    for name, (low, high) in {
        "ShearX": (-0.99, 0.99), "TranslateY": (-32, 32), "Color": (-0.99, 0.99),
        "Posterize": (2, 8), "Solarize": (0, 255), "Equalize": (0, 0),
    }.items():  # fmt: skip
        values = magnitude[op == pil.OPS.index(name)]
        np.testing.assert_allclose((values.min(), values.max()), (low, high), rtol=1e-6)


def test_autoaugment_draws_pairs_at_the_frequencies_of_its_table():
    """Each (first, second) pair of operations has the frequency that the table implies."""
    count = 25000
    op, magnitude = draw(count, policy="autoaugment")
    names = np.array(pil.OPS)[op]
    expected = {}
    for (a, p, _), (b, q, _) in policy.AUTOAUGMENT:
        for first, chance in ((a, p), ("Identity", 1 - p)):
            for second, other in ((b, q), ("Identity", 1 - q)):
                cell = first, second
                expected[cell] = expected.get(cell, 0) + chance * other / 25
    assert len(policy.AUTOAUGMENT) == 25 and math.isclose(sum(expected.values()), 1)
    observed = {cell: 0 for cell in expected}
    for cell in zip(*names, strict=True):
        observed[cell] += 1  # KeyError if a pair is not in the policy
    cells = [c for c in expected if expected[c] > 0]
    assert sum(observed[c] for c in cells) == count  # pairs of probability 0 never occur
    frequencies = [expected[c] * count for c in cells]
    assert stats.chisquare([observed[c] for c in cells], frequencies).pvalue > SIGNIFICANCE
    rotated = names[0] == "Rotate"  # its only strength is 2 of 9
    np.testing.assert_allclose(np.abs(magnitude[0][rotated]), 30 * 2 / 9, rtol=1e-6)
    solarize = magnitude[names == "Solarize"]
    np.testing.assert_allclose(np.unique(solarize), [28.3333, 113.3333, 170, 198.3333], rtol=1e-5)


def test_color_jitter_composes_as_torchvision_does(images):
    """Each image equals one of the 24 orders of the four PIL operations; the orders vary."""
    strengths = (0.4, 0.4, 0.4, 0.1)
    keys = jax.random.split(jax.random.key(0), 64)
    out = np.asarray(jax.jit(policy.color_jitter, static_argnums=2)(keys, images, strengths))
    uniform = np.asarray(draws.uniform(keys, 8))
    low = np.float32([0.6, 0.6, 0.6, -0.1])
    amounts = low + (np.float32([1.4, 1.4, 1.4, 0.1]) - low) * uniform[:, :4]
    orders = set()
    for i in range(0, 64, 4):  # the noise images; others can be equal in several orders
        for order in permutations(range(4)):
            image = images[i]
            for step in order:
                amount = float(amounts[i, step])
                if step == 3:
                    image = shift_hue_by_pil(image, int(amount * 255))
                else:
                    name = ("Brightness", "Contrast", "Color")[step]
                    image = by_pil(image, name, amount - 1)
            if np.array_equal(image, out[i]):
                orders.add(order)
                break
        else:
            raise AssertionError(f"image {i} does not equal any order of the operations")
    assert len(orders) >= 6
    assert amounts[:, :3].min() < 0.65 and amounts[:, :3].max() > 1.35
