"""pipeline.py: the complete augmentation of a batch, its config checks, and its description."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augment_helpers import batch_of, make, options, small_images

from vit_jax.augment import check_image_shape, normalize
from vit_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")  # the operations of a user's programs
EVERYTHING = dict(
    crop="pad",
    crop_padding=2,
    flip="random",
    policy="randaugment",
    randaugment_magnitude_std=0.5,
    erasing_prob=0.5,
)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_with_everything_off_images_equal_the_float32_formula_bit_for_bit(mean, std):
    values = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1).repeat(3, axis=-1)
    expected = values.astype(np.float32) / np.float32(255)
    expected = (expected - np.float32(mean)) / np.float32(std)
    fn = make(mean=mean, std=std)
    out, labels = jax.jit(fn)(jax.random.key(0), batch_of(values), epoch=0)
    assert out.dtype == labels.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(out).view(np.int32), expected.view(np.int32))
    np.testing.assert_array_equal(labels, np.eye(10)[:4])
    outside = jax.jit(lambda x: normalize(x, mean, std))(values)
    np.testing.assert_array_equal(outside, expected)
    program = str(
        jax.make_jaxpr(lambda k, b: fn(k, b, epoch=0))(jax.random.key(0), batch_of(values))
    )
    assert "random" not in program and "threefry" not in program


def test_label_smoothing_spreads_over_all_classes():
    fn = jax.jit(make(num_classes=4, label_smoothing=0.2))
    _, labels = fn(jax.random.key(0), batch_of(small_images(2), [3, 0]), epoch=0)
    np.testing.assert_allclose(
        labels, [[0.05, 0.05, 0.05, 0.85], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6
    )


def test_each_image_has_its_own_draws_which_batch_size_does_not_change():
    images = np.broadcast_to(small_images(1, side=8), (16, 8, 8, 3))
    fn = jax.jit(make(**EVERYTHING))
    many, few = (fn(jax.random.key(4), batch_of(images[:n]), epoch=0)[0] for n in (16, 8))
    np.testing.assert_array_equal(many[:8], few)
    other, _ = fn(jax.random.key(5), batch_of(images), epoch=0)
    assert len({np.asarray(x).tobytes() for x in [*many, *other]}) == 32


def test_switching_on_one_operation_keeps_the_draws_of_others():
    images = small_images(64, side=8)
    key = jax.random.key(6)
    alone, _ = jax.jit(make(flip="random"))(key, batch_of(images), epoch=0)
    both = make(flip="random", erasing_prob=1.0, mixup_alpha=1.0)
    erased, _ = jax.jit(both)(key, batch_of(images), epoch=0, mix=False)
    kept = np.asarray(erased) != 0
    assert 0.5 < kept.mean() < 1
    np.testing.assert_array_equal(np.asarray(erased)[kept], np.asarray(alone)[kept])


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((4, 8, 3), dict(crop="pad"), "crop_padding=4 is too large for images of 4x8.*most 3"),
        ((8, 8, 1), dict(policy="randaugment"), "policy=randaugment needs RGB.*1 channels.*none"),
    ],
)
def test_unsuitable_image_shape_is_rejected(shape, changes, message):
    group = options(**changes)
    with pytest.raises(UserError, match=f"config.augment.{message}") as error:
        check_image_shape(group, shape)
    assert "\n" not in str(error.value)
    check_image_shape(options(), shape)
    check_image_shape(group, (8, 8, 3))


def test_normalize_rejects_float_images():
    with pytest.raises(UserError, match="uint8"):
        normalize(jnp.zeros((1, 2, 2, 3)), (0.5,) * 3, (0.5,) * 3)
