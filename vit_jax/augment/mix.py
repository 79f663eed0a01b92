"""Mixup and cutmix: each image and its label are blended with another image of the batch."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.augment.geometric import in_box


def _beta_quantiles(alpha):
    """Returns float32[4097]: the quantiles of Beta(alpha, alpha) at equal steps from 0 to 1."""
    from scipy.special import betaincinv  # slow to import: only for recipes that mix

    return jnp.asarray(betaincinv(alpha, alpha, np.linspace(0, 1, 4097)), jnp.float32)


def _draw_from(key, quantiles):
    """Draws float32[] from a distribution, given its quantiles: interpolates between two of them.

    jax.random.beta uses rejection sampling, a loop of unknown length.
    """
    place = jax.random.uniform(key) * (len(quantiles) - 1)
    i = place.astype(jnp.int32)
    return quantiles[i] + (place - i) * (quantiles[i + 1] - quantiles[i])


def draw_mix(key, augment, height, width, *, mix=True):
    """Draws (float32[H,W], float32[]): an image's own weight at each pixel, and the mean weight.

    With mixup (Zhang et al. 2017) the weight is lam ~ Beta(alpha, alpha) everywhere. With cutmix
    (Yun et al. 2019) it is 0 in a box of area share 1 - lam with a uniform center, clipped to the
    image, and 1 elsewhere. A draw mixes with probability `mix_prob`, unless `mix` is false; if both
    are on, half of the draws use cutmix, as in timm.
    """
    mixes, switch, *center = jax.random.uniform(jax.random.fold_in(key, 0), (4,))
    both = augment.mixup_alpha > 0 and augment.cutmix_alpha > 0
    cutmix = switch < 0.5 if both else jnp.array(augment.cutmix_alpha > 0)
    alphas = [a for a in (augment.mixup_alpha, augment.cutmix_alpha) if a > 0]
    quantiles = jnp.where(cutmix, _beta_quantiles(alphas[-1]), _beta_quantiles(alphas[0]))
    lam = _draw_from(jax.random.fold_in(key, 1), quantiles)
    size = jnp.array([height, width])
    cut = (size * jnp.sqrt(1 - lam)).astype(jnp.int32)
    low = (jnp.array(center) * size).astype(jnp.int32) - cut // 2
    kept = ~in_box(*low, *cut, height, width)
    weights = jnp.where(cutmix, kept, lam)
    lam = jnp.where(cutmix, jnp.sum(kept) / (height * width), lam)
    mixes = mix & (mixes < augment.mix_prob)
    return jnp.where(mixes, weights, 1.0), jnp.where(mixes, lam, 1.0)


def partner(x, mask):
    """Returns the row that each valid row of x[B,...] mixes with: the next, or row 0 for the last.

    `mask`, bool[B], is true for the valid rows, which precede the padding. On several devices the
    shift moves one row between neighbors, and row 0 is sent to all.
    """
    next_is_valid = jnp.roll(mask, -1).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(next_is_valid, jnp.roll(x, -1, axis=0), x[0])


def mix_batch(key, images, labels, mask, augment, *, mix):
    """Mixes float32[B,H,W,C] and float32[B,classes] by one draw, or not if `mix` is false."""
    weights, lam = draw_mix(key, augment, *images.shape[1:3], mix=mix)
    weights = weights[..., None]
    return (
        weights * images + (1 - weights) * partner(images, mask),
        lam * labels + (1 - lam) * partner(labels, mask),
    )
