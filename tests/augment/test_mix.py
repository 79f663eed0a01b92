"""mix.py against the distributions of the mixup and cutmix papers, and on padded batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augment_helpers import SIGNIFICANCE, as_bytes, batch_of, make, options, small_images
from scipy import stats

from vit_jax.augment import mix


def draw(count, **changes):
    group = options(**changes)
    keys = jax.random.split(jax.random.key(10), count)
    weights, lam = jax.jit(jax.vmap(lambda k: mix.draw_mix(k, group, 16, 16)))(keys)
    return np.asarray(weights), np.asarray(lam)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_weights_are_beta_distributed(alpha):
    """One weight per batch, as the labels show; the pixels agree with the labels."""
    count = 2000
    images, labels = small_images(4, side=2), np.array([0, 1, 0, 1])
    fn, batch = make(num_classes=2, mixup_alpha=alpha), batch_of(images, labels)
    keys = jax.random.split(jax.random.key(12), count)
    out, soft = jax.jit(jax.vmap(lambda k: fn(k, batch, epoch=0)))(keys)
    lam = np.asarray(soft)[:, np.arange(4), labels]
    np.testing.assert_array_equal(lam, lam[:, :1].repeat(4, axis=1))
    assert stats.kstest(lam[:, 0], stats.beta(alpha, alpha).cdf).pvalue > SIGNIFICANCE
    x, lam = images / 255, lam[:, :, None, None, None]
    mixed = lam * x + (1 - lam) * np.roll(x, -1, axis=0)
    np.testing.assert_allclose(out, mixed, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.8, 1.0, 2.0, 8.0])
def test_the_error_of_interpolated_quantiles(alpha):
    """The distribution function of a draw is its uniform number, to the step of the quantiles."""
    group = options(mixup_alpha=alpha)
    keys = jax.random.split(jax.random.key(11), 20_000)
    _, lam = jax.jit(jax.vmap(lambda k: mix.draw_mix(k, group, 1, 1)))(keys)
    uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1)))(keys)
    error = np.abs(stats.beta(alpha, alpha).cdf(lam) - np.float64(uniform)).max()
    assert error < (1 / 4096 if alpha != 1 else 1e-6)


def test_the_draw_has_no_loop():
    group = options(mixup_alpha=0.8, cutmix_alpha=1.0)
    program = str(jax.make_jaxpr(lambda k: mix.draw_mix(k, group, 16, 16))(jax.random.key(0)))
    assert "random_bits" in program and "while" not in program and "scan" not in program


def test_cutmix_labels_match_pixels():
    count = 32
    images = np.broadcast_to(np.arange(count)[:, None, None, None], (count, 16, 16, 3))
    fn = jax.jit(make(num_classes=count, cutmix_alpha=1.0))
    for seed in range(8):
        batch = batch_of(images.astype(np.uint8), np.arange(count))
        out, soft = fn(jax.random.key(seed), batch, epoch=0)
        source = as_bytes(out)[..., 0]
        shares = []
        for i in range(count):
            own, other = source[i] == i, source[i] == (i + 1) % count
            assert (own | other).all()
            assert other.sum() == other.any(axis=1).sum() * other.any(axis=0).sum()
            assert float(soft[i, i]) == own.mean()  # multiples of 1/256 are exact
            assert float(soft[i, (i + 1) % count]) == other.mean()
            shares.append(other.sum())
        assert len(set(shares)) == 1  # one box per batch


def test_cutmix_areas_are_distributed_as_in_the_paper():
    rng = np.random.default_rng(4)
    expected = []
    for _ in range(4000):
        side = math.sqrt(1 - rng.beta(1.0, 1.0))
        cut, (y, x) = int(16 * side), rng.integers(0, 16, 2)
        rows = min(16, y - cut // 2 + cut) - max(0, y - cut // 2)
        columns = min(16, x - cut // 2 + cut) - max(0, x - cut // 2)
        expected.append(1 - rows * columns / 256)
    weights, lam = draw(4000, cutmix_alpha=1.0)
    np.testing.assert_array_equal(lam, weights.mean(axis=(1, 2)))
    assert stats.ks_2samp(lam, expected).pvalue > SIGNIFICANCE


def test_mix_prob_and_half_of_cutmix_are_the_observed_rates():
    weights, lam = draw(4000, mixup_alpha=1.0, cutmix_alpha=1.0, mix_prob=0.8)
    mixed = (weights != 1).any(axis=(1, 2))
    # A cutmix box can be empty, but almost never is at 16x16.
    cut = mixed & ((weights == 0) | (weights == 1)).all(axis=(1, 2))
    assert abs(mixed.mean() - 0.8) < 0.03
    assert abs(cut.sum() / mixed.sum() - 0.5) < 0.03
    assert (lam[~mixed] == 1).all()


def test_padding_is_not_mixed_in_and_labels_sum_to_one():
    images = np.concatenate([np.full((5, 4, 4, 3), 10), np.full((3, 4, 4, 3), 200)])
    batch = batch_of(images.astype(np.uint8), [1, 2, 3, 4, 5, 9, 9, 9], mask=np.arange(8) < 5)
    fn = jax.jit(make(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1))
    for seed in range(4):
        out, soft = fn(jax.random.key(seed), batch, epoch=0)
        np.testing.assert_allclose(np.asarray(out)[:5], 10 / 255, rtol=1e-6)
        assert np.allclose(np.asarray(soft)[:5, 9], 0.01)  # label smoothing only
        np.testing.assert_allclose(np.asarray(soft).sum(axis=1), 1, rtol=1e-6)
        assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("mask", "expected"),  # rows of the partners of the valid rows
    [
        ("11111111", [1, 2, 3, 4, 5, 6, 7, 0]),
        ("11111000", [1, 2, 3, 4, 0]),
        ("11111110", [1, 2, 3, 4, 5, 6, 0]),
        ("10000000", [0]),
    ],
)
def test_partners_are_the_next_valid_rows(mask, expected):
    mask = np.array([c == "1" for c in mask])
    rows = np.asarray(jax.jit(mix.partner)(jnp.arange(8), jnp.asarray(mask)))
    np.testing.assert_array_equal(rows[mask], expected)


def test_mixing_can_be_switched_off_by_a_traced_bool():
    images = small_images(8)
    fn = jax.jit(make(mixup_alpha=1.0, cutmix_alpha=1.0))
    plain = jax.jit(make())(jax.random.key(0), batch_of(images), epoch=0)
    off = fn(jax.random.key(0), batch_of(images), epoch=0, mix=jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, off, plain)
    on, _ = fn(jax.random.key(0), batch_of(images), epoch=0, mix=jnp.asarray(True))
    assert (np.asarray(on) != np.asarray(plain[0])).any()
