"""augment.py against PIL, numpy formulas and the distributions the papers state.

The random tests have fixed keys, so they pass or fail for good; a correct sampler would fail one
with probability 1e-4 (`SIGNIFICANCE`) at another key.
"""

import math
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from vit_jax.augment import pipeline as augment
from vit_jax.config import defaults
from vit_jax.errors import UserError

SIGNIFICANCE = 1e-4
BATCH = 64
ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")
apply_ops = jax.jit(augment.apply_ops)


def options(**changes):
    group = defaults().augment
    for name, value in changes.items():
        group[name] = value
    return group


def make(num_classes=10, mean=(0.0,) * 3, std=(1.0,) * 3, label_smoothing=0.0, **changes):
    return augment.make_augment(
        options(**changes),
        mean=mean,
        std=std,
        num_classes=num_classes,
        label_smoothing=label_smoothing,
    )


def batch_of(images, labels=None, valid=None):
    count = len(images)
    labels = np.arange(count) % 10 if labels is None else labels
    mask = np.arange(count) < (count if valid is None else valid)
    return {
        "image": jnp.asarray(images),
        "label": jnp.asarray(labels, jnp.int32),
        "mask": jnp.asarray(mask),
    }


def as_bytes(images):
    """Undoes normalize with mean 0 and std 1."""
    return np.round(np.asarray(images) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images():
    """Sixty-four images: noise, smooth ramps, narrow ranges, one value, two values."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
    ramp = np.add.outer(3 * np.arange(32), 2 * np.arange(32))[..., None]
    for i in range(BATCH):
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


def by_pil(pixels, name, magnitude):
    image, affine = Image.fromarray(pixels), Image.Transform.AFFINE
    shift = int(magnitude)
    match name:
        case "ShearX":
            out = image.transform(image.size, affine, (1, magnitude, 0, 0, 1, 0))
        case "ShearY":
            out = image.transform(image.size, affine, (1, 0, 0, magnitude, 1, 0))
        case "TranslateX":
            out = image.transform(image.size, affine, (1, 0, -shift, 0, 1, 0))
        case "TranslateY":
            out = image.transform(image.size, affine, (1, 0, 0, 0, 1, -shift))
        case "Rotate":
            out = image.rotate(magnitude)
        case "Posterize":
            out = ImageOps.posterize(image, int(magnitude))
        case "Solarize":
            out = ImageOps.solarize(image, magnitude)
        case "AutoContrast" | "Equalize" | "Invert":
            out = getattr(ImageOps, name.lower())(image)
        case "Identity":
            out = image
        case _:
            out = getattr(ImageEnhance, name)(image).enhance(1 + magnitude)
    return np.asarray(out)


@pytest.mark.parametrize("name", augment.OPS)
def test_operation_equals_pil(images, name):
    reach = {"Shear": 0.99, "Trans": 33.0, "Rotat": 135.0}.get(name[:5], 0.99)
    magnitudes = np.linspace(-reach, reach, BATCH)
    if name == "Posterize":
        magnitudes = 1 + np.arange(BATCH) % 8
    elif name == "Solarize":
        magnitudes = np.linspace(0, 256, BATCH)
    elif name in ENHANCEMENTS:  # fiftieths: where a fused multiply-add rounds to another level
        magnitudes = np.round(magnitudes * 50) / 50
    magnitudes = magnitudes.astype(np.float32)
    out = apply_ops(images, np.full(BATCH, augment.OPS.index(name), np.int32), magnitudes)
    expected = [by_pil(x, name, float(m)) for x, m in zip(images, magnitudes, strict=True)]
    different = (np.asarray(out) != np.stack(expected)).any(axis=-1)
    # float32 sines and slopes may put a pixel on the other side of a boundary.
    allowed = 1e-3 if name in ("Rotate", "ShearX", "ShearY") else 0
    assert different.mean(axis=(1, 2)).max() <= allowed
    if name != "Identity":
        assert (np.asarray(out) != images).any(), "the operation did nothing"


def test_each_image_gets_its_own_operation(images):
    ops = np.arange(BATCH, dtype=np.int32) % len(augment.OPS)
    magnitudes = np.full(BATCH, 0.5, np.float32)
    magnitudes[ops == augment.OPS.index("Posterize")] = 3
    out = np.asarray(apply_ops(images, ops, magnitudes))
    for i in range(BATCH):
        expected = by_pil(images[i], augment.OPS[ops[i]], float(magnitudes[i]))
        np.testing.assert_array_equal(out[i], expected, err_msg=augment.OPS[ops[i]])


def test_autocontrast_keeps_the_float64_quirks_of_pil():
    """Every pair of extremes whose range shares a factor with 255, and a hundred others."""
    rng = np.random.default_rng(1)
    pairs = [(low, low + span) for span in (51, 85, 102, 153, 170) for low in range(256 - span)]
    pairs += [tuple(sorted(p)) for p in rng.integers(0, 256, (100, 2))]
    pairs += [pairs[0]] * (-len(pairs) % BATCH)
    pixels = np.zeros((len(pairs), 32, 32, 3), np.uint8)
    for image, (low, high) in zip(pixels, pairs, strict=True):
        image[:] = np.clip(np.arange(1024).reshape(32, 32, 1) % 256, low, high)
    op = np.full(BATCH, augment.OPS.index("AutoContrast"), np.int32)
    for some in np.split(pixels, len(pairs) // BATCH):
        out = apply_ops(some, op, np.zeros(BATCH, np.float32))
        np.testing.assert_array_equal(out, [by_pil(x, "AutoContrast", 0) for x in some])


# ---------------------------------------------------------------- colour jitter, crops


def shift_hue_by_pil(pixels, shift):
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.int32(shift).astype(np.uint8))
    return np.asarray(Image.merge("HSV", (hue, saturation, value)).convert("RGB"))


def test_hue_equals_pil(images):
    steps = np.arange(0, 256, 5)  # every chroma, and the ties of PIL's float32
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).astype(np.uint8)
    shift_hue = jax.jit(augment.shift_hue)
    shifts = np.linspace(-128, 127, len(cube)).astype(np.int32)
    for pixels in (cube, cube[..., ::-1].copy()):
        expected = [shift_hue_by_pil(x, s) for x, s in zip(pixels, shifts, strict=True)]
        np.testing.assert_array_equal(shift_hue(pixels, shifts), expected)
    expected = [shift_hue_by_pil(x, s) for x, s in zip(images, range(BATCH), strict=True)]
    np.testing.assert_array_equal(shift_hue(images, np.arange(BATCH)), expected)


def test_color_jitter_composes_as_torchvision_does(images):
    """One of the 24 orders of the four PIL operations gives each image exactly; orders vary."""
    strengths = (0.4, 0.4, 0.4, 0.1)
    keys = jax.random.split(jax.random.key(0), BATCH)
    out = np.asarray(jax.jit(augment._color_jitter, static_argnums=2)(keys, images, strengths))
    draws = np.asarray(augment._uniform(keys, 8))
    low = np.float32([0.6, 0.6, 0.6, -0.1])
    amounts = low + (np.float32([1.4, 1.4, 1.4, 0.1]) - low) * draws[:, :4]
    seen = set()
    for i in range(0, BATCH, 4):  # the noise images: others look alike in several orders
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
                seen.add(order)
                break
        else:
            raise AssertionError(f"image {i} equals no order of brightness, contrast, ... hue")
    assert len(seen) >= 6
    assert amounts[:, :3].min() < 0.65 and amounts[:, :3].max() > 1.35


def test_resized_crop_is_within_a_level_of_pil(images):
    rng = np.random.default_rng(2)
    rows, columns = rng.integers(1, 33, (2, BATCH))
    top, left = rng.integers(0, 33 - rows), rng.integers(0, 33 - columns)
    out = np.asarray(jax.jit(augment.resized_crop)(images, top, left, rows, columns)).astype(int)
    for i in range(BATCH):
        box = left[i], top[i], left[i] + columns[i], top[i] + rows[i]
        scaled = Image.fromarray(images[i]).crop(box).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.abs(out[i] - np.asarray(scaled)).max() <= 1


def test_resized_crop_boxes():
    draws = jnp.asarray(np.random.default_rng(5).random((4000, 40), np.float32))
    boxes = jax.jit(lambda u: augment._random_boxes(u, 32, 32, (0.08, 1.0), (3 / 4, 4 / 3)))(draws)
    top, left, rows, columns = map(np.asarray, boxes)
    assert top.min() == left.min() == 0 and rows.min() > 0 and columns.min() > 0
    assert (top + rows).max() == (left + columns).max() == 32
    aspect = columns / rows
    assert np.all((columns + 0.5) / (rows - 0.5) >= 3 / 4)
    assert np.all((columns - 0.5) / (rows + 0.5) <= 4 / 3)
    assert abs(np.median(np.log(aspect))) < 0.03  # log-uniform: symmetric about a square
    # Small boxes always fit, so there the area is uniform; the largest are thinned out.
    area = rows * columns / 1024
    small = area[(area > 0.1) & (area < 0.5)]
    assert stats.kstest(small, stats.uniform(0.1, 0.4).cdf).statistic < 0.05
    square = jax.jit(lambda u: augment._random_boxes(u, 8, 32, (1.0, 1.0), (0.5, 2.0)))(draws[:4])
    np.testing.assert_array_equal(np.stack(square), [[0] * 4, [8] * 4, [8] * 4, [16] * 4])


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_pad_crop_content_and_offsets(mode):
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


# ---------------------------------------------------------------- flips, keys


def small_images(count, seed=3, side=4):
    shape = (count, side, side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def flipped(before, after):
    """bool[B]: mirrored or not; fails when neither."""
    mirrored = (after == before[:, :, ::-1]).all(axis=(1, 2, 3))
    assert np.all(mirrored | (after == before).all(axis=(1, 2, 3)))
    return mirrored


def test_random_flip_rate():
    images = small_images(4000)
    out, _ = jax.jit(make(flip="random"))(jax.random.key(3), batch_of(images), epoch=0)
    mirrored = flipped(images, as_bytes(out))
    assert stats.binomtest(int(mirrored.sum()), 4000, 0.5).pvalue > SIGNIFICANCE
    runs = np.sum(mirrored[1:] != mirrored[:-1])  # neighbours are independent
    assert stats.binomtest(int(runs), 3999, 0.5).pvalue > SIGNIFICANCE


def test_alternating_flip():
    images = small_images(4000)
    fn = jax.jit(make(flip="alternating"))
    epochs = [
        flipped(images, as_bytes(fn(jax.random.key(e), batch_of(images), epoch=e)[0]))
        for e in range(4)
    ]
    assert stats.binomtest(int(epochs[0].sum()), 4000, 0.5).pvalue > SIGNIFICANCE
    for e in range(1, 4):
        np.testing.assert_array_equal(epochs[e], ~epochs[e - 1])
    # It belongs to the image, not to its place in the batch.
    moved = flipped(
        images[::-1], as_bytes(fn(jax.random.key(9), batch_of(images[::-1]), epoch=0)[0])
    )
    np.testing.assert_array_equal(moved[::-1], epochs[0])


EVERYTHING = dict(
    crop="pad",
    flip="random",
    policy="randaugment",
    randaugment_magnitude_std=0.5,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    erasing_prob=0.5,
    erasing_mode="noise",
)


def test_images_share_no_randomness(images):
    fn = jax.jit(make(**EVERYTHING))
    batch = batch_of(np.broadcast_to(images[1], (32, 32, 32, 3)))
    one, other = (np.asarray(fn(jax.random.key(k), batch, epoch=0)[0]) for k in (4, 5))
    assert len({x.tobytes() for x in [*one, *other]}) == 64


def test_an_image_keeps_its_draws_in_a_larger_batch():
    images = np.broadcast_to(small_images(1, side=8), (16, 8, 8, 3))
    changes = dict(crop_padding=2, policy="trivialaugment", color_jitter=(0.4, 0.4, 0.4, 0.0))
    fn = jax.jit(make(crop="pad", flip="random", erasing_prob=0.5, **changes))
    many, few = (fn(jax.random.key(4), batch_of(images[:n]), epoch=0)[0] for n in (16, 8))
    np.testing.assert_array_equal(many[:8], few)
    assert len({np.asarray(x).tobytes() for x in many}) == 16


def test_switching_one_operation_on_leaves_the_draws_of_others():
    images = small_images(64, side=8)
    key = jax.random.key(6)
    alone, _ = jax.jit(make(flip="random"))(key, batch_of(images), epoch=0)
    both = make(flip="random", erasing_prob=1.0, mixup_alpha=1.0)
    erased, _ = jax.jit(both, static_argnames="mix")(key, batch_of(images), epoch=0, mix=False)
    kept = np.asarray(erased) != 0
    assert 0.5 < kept.mean() < 1
    np.testing.assert_array_equal(np.asarray(erased)[kept], np.asarray(alone)[kept])


# ---------------------------------------------------------------- policies


def drawn(count, **changes):
    group = options(**changes)
    keys = jax.random.split(jax.random.key(7), count)
    op, magnitude = jax.jit(lambda k: augment._draw_policy(k, group, 32, 32))(keys)
    return np.asarray(op), np.asarray(magnitude)


def test_randaugment_draws():
    op, magnitude = drawn(7000, policy="randaugment", randaugment_magnitude=9.0)
    assert op.shape == (2, 7000)
    table = np.zeros((14, 14))
    np.add.at(table, tuple(op), 1)  # both rounds together: uniform with replacement, independent
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
    op, magnitude = drawn(7000, policy="randaugment", randaugment_magnitude_std=0.5)
    noisy = np.abs(magnitude[op == augment.OPS.index("Rotate")]) / 3
    assert noisy.max() == 10  # clipped
    below = noisy[noisy < 9]  # half of a normal, untouched by the clipping
    assert stats.kstest(9 - below, stats.halfnorm(0, 0.5).cdf).pvalue > SIGNIFICANCE


def test_trivialaugment_draws():
    op, magnitude = drawn(14000, policy="trivialaugment")
    assert op.shape == (1, 14000)
    assert stats.chisquare(np.bincount(op[0], minlength=14)).pvalue > SIGNIFICANCE
    rotation = magnitude[op == augment.OPS.index("Rotate")]
    bins = np.bincount(np.round(np.abs(rotation) / 4.5).astype(int))
    assert len(bins) == 31 and stats.chisquare(bins).pvalue > SIGNIFICANCE
    for name, (low, high) in {
        "ShearX": (-0.99, 0.99), "TranslateY": (-32, 32), "Color": (-0.99, 0.99),
        "Posterize": (2, 8), "Solarize": (0, 255), "Equalize": (0, 0),
    }.items():  # fmt: skip
        values = magnitude[op == augment.OPS.index(name)]
        np.testing.assert_allclose((values.min(), values.max()), (low, high), rtol=1e-6)


def test_autoaugment_draws():
    """The frequency of every (first, second) pair of operations is the one the table implies."""
    count = 25000
    op, magnitude = drawn(count, policy="autoaugment")
    names = np.array(augment.OPS)[op]
    expected = {}
    for (a, p, _), (b, q, _) in augment._AUTOAUGMENT:
        for first, chance in ((a, p), ("Identity", 1 - p)):
            for second, other in ((b, q), ("Identity", 1 - q)):
                cell = first, second
                expected[cell] = expected.get(cell, 0) + chance * other / 25
    assert len(augment._AUTOAUGMENT) == 25 and math.isclose(sum(expected.values()), 1)
    seen = {cell: 0 for cell in expected}
    for cell in zip(*names, strict=True):
        seen[cell] += 1  # KeyError: a pair that is not in the policy
    cells = [c for c in expected if expected[c] > 0]
    assert sum(seen[c] for c in cells) == count  # probability 0 never happens
    frequencies = [expected[c] * count for c in cells]
    assert stats.chisquare([seen[c] for c in cells], frequencies).pvalue > SIGNIFICANCE
    first_of = names[0] == "Rotate"  # only ever at index 2 of 0..9
    np.testing.assert_allclose(np.abs(magnitude[0][first_of]), 30 * 2 / 9, rtol=1e-6)
    solarize = magnitude[names == "Solarize"]
    np.testing.assert_allclose(np.unique(solarize), [28.3333, 113.3333, 170, 198.3333], rtol=1e-5)


# ---------------------------------------------------------------- erasing


@pytest.mark.parametrize("mode", ["zero", "noise"])
def test_erasing(mode):
    count = 2000
    white = np.full((count, 32, 32, 3), 255, np.uint8)
    fn = jax.jit(make(erasing_prob=0.25, erasing_mode=mode))
    out = np.asarray(fn(jax.random.key(8), batch_of(white), epoch=0)[0])
    gone = (out != 1).any(axis=-1)
    hit = gone.any(axis=(1, 2))
    assert stats.binomtest(int(hit.sum()), count, 0.25).pvalue > SIGNIFICANCE
    areas = []
    for box in gone[hit]:
        rows, columns = int(box.any(axis=1).sum()), int(box.any(axis=0).sum())
        assert box.sum() == rows * columns, "not a rectangle"
        assert (rows + 0.5) * (columns + 0.5) >= 0.02 * 1024
        assert (rows - 0.5) * (columns - 0.5) <= 1024 / 3
        assert (rows + 0.5) / (columns - 0.5) >= 0.3 and (rows - 0.5) / (columns + 0.5) <= 3.3
        areas.append(rows * columns / 1024)
    assert stats.kstest(areas, stats.uniform(0.02, 1 / 3 - 0.02).cdf).pvalue > SIGNIFICANCE
    inside = out[gone]
    if mode == "zero":
        assert (inside == 0).all()
    else:
        assert stats.kstest(inside.ravel()[::7], "norm").pvalue > SIGNIFICANCE


# ---------------------------------------------------------------- mixup, cutmix


def draw_mix(count, **changes):
    group = options(**changes)
    keys = jax.random.split(jax.random.key(10), count)
    weights, lam = jax.jit(jax.vmap(lambda k: augment._draw_mix(k, group, 16, 16)))(keys)
    return np.asarray(weights), np.asarray(lam)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_beta(alpha):
    """Per image and per batch, read off the labels; the pixels follow."""
    count = 2000
    images, labels = small_images(count, side=2), np.arange(count) % 2
    fn = jax.jit(make(num_classes=2, mixup_alpha=alpha, mix_per="image"))
    out, soft = map(np.asarray, fn(jax.random.key(11), batch_of(images, labels), epoch=0))
    lam = soft[np.arange(count), labels]
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > SIGNIFICANCE
    x = images / 255
    mixed = lam[:, None, None, None] * x + (1 - lam[:, None, None, None]) * np.roll(x, -1, axis=0)
    np.testing.assert_allclose(out, mixed, atol=1e-6)

    per_batch, four = make(num_classes=2, mixup_alpha=alpha), batch_of(images[:4], labels[:4])
    keys = jax.random.split(jax.random.key(12), count)
    soft = np.asarray(jax.jit(jax.vmap(lambda k: per_batch(k, four, epoch=0)[1]))(keys))
    lam = soft[:, [0, 1, 2, 3], [0, 1, 0, 1]]
    np.testing.assert_array_equal(lam, lam[:, :1].repeat(4, axis=1))
    assert stats.kstest(lam[:, 0], stats.beta(alpha, alpha).cdf).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("per", ["batch", "image"])
def test_cutmix_labels_match_pixels(per):
    count = 32
    images = np.broadcast_to(np.arange(count)[:, None, None, None], (count, 16, 16, 3))
    fn = jax.jit(make(num_classes=count, cutmix_alpha=1.0, mix_per=per))
    for seed in range(8):
        batch = batch_of(images.astype(np.uint8), np.arange(count))
        out, soft = fn(jax.random.key(seed), batch, epoch=0)
        source = as_bytes(out)[..., 0]
        shares = []
        for i in range(count):
            own, other = source[i] == i, source[i] == (i + 1) % count
            assert (own | other).all()
            assert other.sum() == other.any(axis=1).sum() * other.any(axis=0).sum()
            assert float(soft[i, i]) == own.mean()  # sixteenths of sixteenths: exact
            assert float(soft[i, (i + 1) % count]) == other.mean()
            shares.append(other.sum())
        assert (len(set(shares)) == 1) == (per == "batch")


def test_cutmix_area_is_the_papers():
    rng = np.random.default_rng(4)
    expected = []
    for _ in range(4000):
        side = math.sqrt(1 - rng.beta(1.0, 1.0))
        cut, (y, x) = int(16 * side), rng.integers(0, 16, 2)
        rows = min(16, y - cut // 2 + cut) - max(0, y - cut // 2)
        columns = min(16, x - cut // 2 + cut) - max(0, x - cut // 2)
        expected.append(1 - rows * columns / 256)
    weights, lam = draw_mix(4000, cutmix_alpha=1.0)
    np.testing.assert_array_equal(lam, weights.mean(axis=(1, 2)))
    assert stats.ks_2samp(lam, expected).pvalue > SIGNIFICANCE


def test_mix_probabilities():
    changes = dict(mixup_alpha=1.0, cutmix_alpha=1.0, mix_prob=0.8, mix_switch_prob=0.25)
    weights, lam = draw_mix(4000, **changes)
    mixed = (weights != 1).any(axis=(1, 2))
    # A cutmix box may be empty; these draws have none or next to none at 16 x 16.
    cut = mixed & ((weights == 0) | (weights == 1)).all(axis=(1, 2))
    assert abs(mixed.mean() - 0.8) < 0.03
    assert abs(cut.sum() / mixed.sum() - 0.25) < 0.03
    assert (lam[~mixed] == 1).all()


def test_mixing_stays_among_valid_examples_and_labels_sum_to_one():
    images = np.concatenate([np.full((5, 4, 4, 3), 10), np.full((3, 4, 4, 3), 200)])
    batch = batch_of(images.astype(np.uint8), [1, 2, 3, 4, 5, 9, 9, 9], valid=5)
    fn = jax.jit(make(mixup_alpha=1.0, cutmix_alpha=1.0, mix_per="image", label_smoothing=0.1))
    for seed in range(4):
        out, soft = fn(jax.random.key(seed), batch, epoch=0)
        np.testing.assert_allclose(np.asarray(out)[:5], 10 / 255, rtol=1e-6)
        assert np.allclose(np.asarray(soft)[:5, 9], 0.01)  # nothing but the smoothing
        np.testing.assert_allclose(np.asarray(soft).sum(axis=1), 1, rtol=1e-6)
        assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("mask", "expected"),  # rows of the partners of the valid rows
    [
        ("11111111", [1, 2, 3, 4, 5, 6, 7, 0]),
        ("11111000", [1, 2, 3, 4, 0]),
        ("11011011", [1, 0, 4, 0, 7, 0]),
        ("01100111", [2, 1, 6, 7, 1]),
        ("01000000", [1]),
    ],
)
def test_partners_are_valid_rows_whatever_the_mask(mask, expected):
    mask = np.array([c == "1" for c in mask])
    rows = np.asarray(jax.jit(augment._partner)(jnp.arange(8), jnp.asarray(mask)))
    np.testing.assert_array_equal(rows[mask], expected)


def test_rows_that_a_stream_skipped_are_never_mixed_in():
    """A skipped image leaves a black row of class 0 anywhere in the batch."""
    mask = np.array([True, True, False, True, False, True, True, False])
    images = np.where(mask[:, None, None, None], 200, 0) * np.ones((8, 4, 4, 3))
    batch = batch_of(images.astype(np.uint8), np.where(mask, 1 + np.arange(8), 0))
    batch["mask"] = jnp.asarray(mask)
    fn = jax.jit(make(mixup_alpha=1.0, cutmix_alpha=1.0, mix_per="image"))
    out, labels = map(np.asarray, fn(jax.random.key(0), batch, epoch=0))
    np.testing.assert_allclose(out[mask], 200 / 255, rtol=1e-6)
    assert (labels[mask, 0] == 0).all()


def test_mix_off_is_traced():
    images = small_images(8)
    fn = jax.jit(make(mixup_alpha=1.0, cutmix_alpha=1.0))
    plain = jax.jit(make())(jax.random.key(0), batch_of(images), epoch=0)
    off = fn(jax.random.key(0), batch_of(images), epoch=0, mix=jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, off, plain)
    on, _ = fn(jax.random.key(0), batch_of(images), epoch=0, mix=jnp.asarray(True))
    assert (np.asarray(on) != np.asarray(plain[0])).any()


# ---------------------------------------------------------------- nothing on, config


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_everything_off_is_the_float32_formula_to_the_bit(mean, std):
    values = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1).repeat(3, axis=-1)
    expected = values.astype(np.float32) / np.float32(255)
    expected = (expected - np.float32(mean)) / np.float32(std)
    fn = make(mean=mean, std=std)
    out, labels = jax.jit(fn)(jax.random.key(0), batch_of(values), epoch=0)
    assert out.dtype == labels.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(out).view(np.int32), expected.view(np.int32))
    np.testing.assert_array_equal(labels, np.eye(10)[:4])
    outside = jax.jit(lambda x: augment.normalize(x, mean, std))(values)
    np.testing.assert_array_equal(outside, expected)
    program = str(
        jax.make_jaxpr(lambda k, b: fn(k, b, epoch=0))(jax.random.key(0), batch_of(values))
    )
    assert "random" not in program and "threefry" not in program


def test_label_smoothing():
    fn = make(num_classes=4, label_smoothing=0.2)
    _, labels = fn(jax.random.key(0), batch_of(small_images(2), [3, 0]), epoch=0)
    np.testing.assert_allclose(
        labels, [[0.05, 0.05, 0.05, 0.85], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(policy="randaugmnt"), "did you mean 'randaugment'"),
        (dict(crop="center"), "none, pad, resized"),
        (dict(flip="vertical"), "none, random, alternating"),
        (dict(mix_per="pixel"), "batch, image"),
        (dict(erasing_mode="mean"), "zero, noise"),
        (dict(erasing_prob=-0.1), "between 0 and 1"),
        (dict(mix_prob=1.5), "between 0 and 1"),
        (dict(mix_switch_prob=-1.0), "between 0 and 1"),
        (dict(erasing_prob=float("nan")), "between 0 and 1"),
        (dict(mixup_alpha=-1.0), "at least 0"),
        (dict(crop_scale=(1.0, 0.08)), "smallest, largest"),
        (dict(crop_ratio=(0.0, 1.0)), "above 0"),
        (dict(erasing_scale=(0.1, 2.0)), "between 0 and 1"),
        (dict(crop_padding=-1), "at least 1"),
        (dict(randaugment_magnitude=11.0), "between 0 and 10"),
        (dict(randaugment_num_ops=0), "at least 1"),
        (dict(color_jitter=(0.1, 0.1, 0.1, 0.6)), "hue at most 0.5"),
        (dict(color_jitter=(0.1, 0.1, 0.1)), "four strengths"),
    ],
)
def test_wrong_config_is_one_line(changes, words):
    with pytest.raises(UserError, match=words) as error:
        augment.validate(options(**changes), batch_size=64)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"augment.{next(iter(changes))} ")


def test_mixing_needs_two_images():
    augment.validate(options(), batch_size=1)
    augment.validate(options(mixup_alpha=0.2), batch_size=2)
    for name in ("mixup_alpha", "cutmix_alpha"):
        with pytest.raises(UserError, match="at least 2 images"):
            augment.validate(options(**{name: 0.2}), batch_size=1)


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((4, 8, 3), dict(crop="pad"), "crop_padding=4 is too large for images of 4x8.*most 3"),
        ((8, 8, 1), dict(policy="randaugment"), "policy=randaugment needs RGB.*1 channels.*none"),
        ((8, 8, 1), dict(color_jitter=(0.1,) * 4), r"color_jitter=\(0.1, .* needs RGB.*0,0,0,0"),
    ],
)
def test_unsuitable_image_shape_is_rejected(shape, changes, message):
    group = options(**changes)
    with pytest.raises(UserError, match=f"config.augment.{message}") as error:
        augment.check_image_shape(group, shape)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):  # also where the caller did not check
        make(**changes)(jax.random.key(0), batch_of(np.zeros((2, *shape), np.uint8)), epoch=0)
    augment.check_image_shape(options(), shape)
    augment.check_image_shape(group, (8, 8, 3))


def test_normalize_rejects_float_images():
    with pytest.raises(UserError, match="uint8"):
        augment.normalize(jnp.zeros((1, 2, 2, 3)), (0.5,) * 3, (0.5,) * 3)


def test_describe_lists_what_is_on_in_order():
    assert augment.describe(options()) == []
    lines = augment.describe(options(**EVERYTHING, mixup_alpha=0.8, cutmix_alpha=1.0))
    starts = ["random crop", "random horizontal", "RandAugment", "colour jitter", "random erasing"]
    assert len(lines) == 6
    assert all(line.startswith(s) for line, s in zip(lines, [*starts, "mixup"], strict=True))
    assert "magnitude 9 +- 0.5" in lines[2] and "cutmix Beta(1, 1)" in lines[5]
