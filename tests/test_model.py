"""The model's variants: shapes, parameter counts, initial weights, stochastic parts, FLOPs."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import config
from vit_jax import model as model_lib
from vit_jax.errors import UserError
from vit_jax.model import (
    LayerNorm,
    VisionTransformer,
    attention_weights,
    check_image_shape,
    make_model,
    num_tokens,
    shift_tokens,
    sincos2d,
    train_flops_per_image,
)

ROOT = pathlib.Path(__file__).parents[1]

SMALL = dict(num_classes=5, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32)
CONV = {"stem": "conv", "pool": "gap"}
IMAGES = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)


def init_params(model, key, image_shape):
    return jax.jit(model_lib.init_params, static_argnums=(0, 2))(model, key, image_shape)


def count(params):
    return sum(p.size for p in jax.tree.leaves(params))


def test_notebook_model_has_the_expected_parameter_count_and_flops():
    model = make_model(config.from_file(ROOT / "configs" / "cifar10_vit.py").model, num_classes=10)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), (32, 32, 3)))
    assert count(params) == 4_771_082
    assert num_tokens(model, (32, 32, 3)) == 65
    flops = train_flops_per_image(model, (32, 32, 3))
    assert flops / 1e9 == pytest.approx(1.684, abs=0.001)
    wider = model.clone(pre_logits=7)  # 256 x 7 and 7 x 10 multiply-adds replace 256 x 10
    assert train_flops_per_image(wider, (32, 32, 3)) - flops == 6 * (256 * 7 + 7 * 10 - 256 * 10)


@pytest.mark.parametrize(
    ("size", "millions"), [("Ti", 5.7), ("S", 22.1), ("B", 86.6), ("L", 304.3)]
)
def test_sizes_have_the_published_parameter_counts(size, millions):
    c = config.defaults().model
    c.size, c.patch_size = size, 16
    model = make_model(c, num_classes=1000)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), (224, 224, 3)))
    assert count(params) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    "variant",
    [
        dict(),
        dict(posemb="sincos2d", pool="gap", stem="conv"),
        dict(pool="map"),
        dict(position_bias="gaussian", token_shift=True, pool="gap"),
        dict(posemb="sincos2d", qk_norm=True, layer_scale=0.1, weight_init="trunc_normal"),
        dict(dropout=0.1, drop_path=0.2),
        dict(dtype=jnp.dtype("bfloat16")),
    ],
    ids=lambda v: "-".join(map(str, v.values())) or "notebook",
)
def test_variants_return_float32_logits_and_nonzero_gradients_for_all_parameters(variant):
    model = VisionTransformer(**SMALL | variant)
    params = init_params(model, jax.random.key(0), IMAGES.shape[1:])
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))

    def loss(params, key):
        logits = model.apply({"params": params}, IMAGES, train=True, rngs={"dropout": key})
        return jnp.mean(jax.nn.logsumexp(logits) - logits[:, 0]), logits

    grad_fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, logits), grads = grad_fn(params, jax.random.key(1))
    assert logits.shape == (3, 5) and logits.dtype == jnp.float32
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize(
    ("matmul_precision", "expected"), [("float32", "HIGHEST"), ("tf32", "DEFAULT")]
)
def test_every_product_has_the_precision_of_the_model(stem, matmul_precision, expected):
    model = VisionTransformer(**SMALL, stem=stem, pre_logits=8, matmul_precision=matmul_precision)
    params = jax.eval_shape(lambda: model_lib.init_params(model, jax.random.key(0), (16, 16, 3)))
    loss = jax.grad(lambda params: model.apply({"params": params}, IMAGES).sum())
    text = jax.jit(loss).lower(params).as_text()
    products = [x for x in text.splitlines() if re.search(r"\.(dot_general|convolution)", x)]
    assert len(products) > 3 * 6 * 2
    for product in products:
        assert set(re.findall("HIGHEST|HIGH|DEFAULT", product)) == {expected}, product


def test_position_bias_is_a_gaussian_window_per_head():
    model = VisionTransformer(**SMALL, pool="gap", position_bias="gaussian")
    params = init_params(model, jax.random.key(0), (12, 16, 3))
    bias = params["block_0"]["attn"]["position_bias"]
    bias["falloff"], bias["offset"] = (
        np.float32([[[0.03]], [[0.2]]]),
        np.float32([[[0, 0.1]], [[-0.1, 0.2]]]),
    )
    params["block_0"]["attn"]["qkv"]["kernel"] *= 0
    images = np.resize(IMAGES, (1, 12, 16, 3))
    _, state = model.apply({"params": params}, images, mutable="intermediates")
    (attention,) = state["intermediates"]["block_0"]["attn"]["attention"]
    grid = np.stack(np.mgrid[:3, :4], axis=-1).reshape(-1, 2)  # rows and columns of patches
    for head, (a, c) in enumerate([(0.3, (0, 1)), (2, (-1, 2))]):
        window = np.exp(-a * np.square(grid - grid[:, None] - c).sum(axis=-1))
        expected = window / window.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(attention[0, head], expected, atol=1e-6)


def test_patch_order_matters_only_with_a_position_embedding():
    model = VisionTransformer(**SMALL)
    params = init_params(model, jax.random.key(0), IMAGES.shape[1:])
    rolled = np.roll(IMAGES, 4, axis=1)
    apply = jax.jit(model.apply)
    a, b = (apply({"params": params}, x) for x in (IMAGES, rolled))
    np.testing.assert_allclose(a, b, atol=1e-5)
    params["pos_embed"] = jax.random.normal(jax.random.key(1), params["pos_embed"].shape)
    a, b = (apply({"params": params}, x) for x in (IMAGES, rolled))
    assert np.abs(a - b).max() > 1e-3


def test_attention_maps_are_sown_and_their_rows_sum_to_one():
    model = VisionTransformer(**SMALL)
    params = init_params(model, jax.random.key(0), IMAGES.shape[1:])
    apply = jax.jit(model.apply, static_argnames="mutable")
    logits, captured = apply({"params": params}, IMAGES, mutable="intermediates")
    np.testing.assert_allclose(logits, apply({"params": params}, IMAGES), atol=1e-6)
    for i in range(2):
        (maps,) = captured["intermediates"][f"block_{i}"]["attn"]["attention"]
        assert maps.shape == (3, 2, 17, 17) and maps.dtype == jnp.float32
        np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


def test_skipping_unread_tokens_of_the_last_block_keeps_logits_and_gradients():
    """Requesting attention maps computes the complete last block."""
    model = VisionTransformer(**SMALL | {"qk_norm": True, "layer_scale": 0.5, "remat": True})
    params = init_params(model, jax.random.key(0), IMAGES.shape[1:])
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)

    def loss(params, mutable):
        out = model.apply({"params": params}, IMAGES, train=True, mutable=mutable)
        return jnp.sum(jnp.sin(out[0] if mutable else out))

    grad_fn = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    complete, skipped = grad_fn(params, "intermediates"), grad_fn(params, False)
    for a, b in zip(jax.tree.leaves(skipped), jax.tree.leaves(complete), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_drop_path_drops_branches_for_entire_images():
    # The rate is linear in depth: 0 in the first of the two blocks, 0.5 in the last.
    model = VisionTransformer(**SMALL | dict(drop_path=0.5))
    params = init_params(model, jax.random.key(0), IMAGES.shape[1:])
    images = np.repeat(IMAGES[:1], 256, axis=0)
    apply = jax.jit(model.apply, static_argnames="train")
    logits = apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(3)})
    # Each image keeps or drops each of the last block's two branches: four outcomes.
    outcomes, counts = np.unique(np.round(logits, 4), axis=0, return_counts=True)
    assert len(outcomes) == 4 and counts.min() > 256 / 4 - 4 * 7  # 4 sigma of binomial(256, 1/4)
    same = apply({"params": params}, images)
    np.testing.assert_allclose(same, np.broadcast_to(same[:1], same.shape), atol=1e-6)


def test_sincos2d_distinguishes_positions_and_equals_its_formula():
    table = sincos2d((4, 4), 16, cls_token=True)
    assert table.shape == (1, 17, 16) and not table[0, 0].any()
    distances = np.linalg.norm(table[0, 1:, None] - table[0, None, 1:], axis=-1)
    assert (distances + np.eye(16) > 0.1).all()
    # Position (y=1, x=2): sin and cos of x and y times 1/10000^(i/3).
    omega = 10_000.0 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.sin(2 * omega), np.cos(2 * omega), np.sin(omega), np.cos(omega)])
    np.testing.assert_allclose(table[0, 1 + 1 * 4 + 2], expected, atol=1e-6)


def test_image_that_patches_do_not_divide_is_rejected():
    with pytest.raises(UserError, match="16x18 pixels cannot be divided into patches of 4"):
        check_image_shape(VisionTransformer(**SMALL), (16, 18, 3))


def test_shift_tokens_is_a_depthwise_convolution():
    x = np.random.default_rng(1).normal(size=(2, 3 * 4, 25)).astype(np.float32)
    kernel = np.zeros((3, 3, 1, 25), np.float32)
    for i, (row, column) in enumerate([(0, 1), (2, 1), (1, 0), (1, 2)]):
        kernel[row, column, 0, 2 * i : 2 * i + 2] = 1
    kernel[1, 1, 0, 8:] = 1
    expected = jax.lax.conv_general_dilated(
        *(x.reshape(2, 3, 4, 25), kernel, (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=25,
    )
    np.testing.assert_array_equal(shift_tokens(x, (3, 4)), expected.reshape(x.shape))


@pytest.mark.usefixtures("optimized")  # until the end of the module
def test_bfloat16_logits_are_close_to_float32():
    model = VisionTransformer(**SMALL)
    params = init_params(model, jax.random.key(0), IMAGES.shape[1:])
    half = VisionTransformer(**SMALL, dtype=jnp.dtype("bfloat16"))
    a, b = (jax.jit(m.apply)({"params": params}, IMAGES) for m in (model, half))
    assert 1e-6 < np.abs(a - b).max() < 0.05  # they differ, but only by rounding


@pytest.mark.parametrize(
    "variant",
    [
        dict(layer_scale=0.1, qk_norm=True, pre_logits=8),
        CONV | {"pool": "map", "position_bias": "gaussian"},
    ],
)
def test_bfloat16_gradients_of_all_parameters_are_float32(variant):
    """A gradient that was rounded to bfloat16 on its way is equal to itself in bfloat16."""
    model = VisionTransformer(**SMALL, dtype=jnp.dtype("bfloat16"), **variant)
    params = init_params(model, jax.random.key(0), IMAGES.shape[1:])
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    loss = jax.grad(lambda params: jnp.sin(model.apply({"params": params}, IMAGES)).sum())
    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(loss)(params)):
        rounded = g.astype(jnp.bfloat16).astype(jnp.float32)
        assert (rounded != g).any(), jax.tree_util.keystr(path)


def _gradients(fn, *args):
    """Returns the results of fn, and the derivatives of a random combination of them."""
    y, vjp = jax.vjp(jax.jit(fn), *args)
    return y, *vjp(jax.random.normal(jax.random.key(9), y.shape, y.dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 8e-3)])
def test_layer_norm_and_its_derivative_equal_the_plain_formula(dtype, tolerance):
    keys = jax.random.split(jax.random.key(0), 3)
    x = (3 + 2 * jax.random.normal(keys[0], (4, 7, 64))).astype(dtype)
    scale, bias = (jax.random.normal(key, (64,)) for key in keys[1:])

    def plain(x, scale, bias):
        norm = nn.LayerNorm(1e-5, use_fast_variance=False, dtype=jnp.float32)
        return norm.apply({"params": {"scale": scale, "bias": bias}}, x)

    def ours(x, scale, bias):
        norm = LayerNorm(1e-5, jnp.float32)
        return norm.apply({"params": {"scale": scale, "bias": bias}}, x)

    results = _gradients(plain, x, scale, bias), _gradients(ours, x, scale, bias)
    for expected, result in zip(*results, strict=True):
        assert expected.dtype == result.dtype
        error = jnp.abs(jnp.float32(result) - jnp.float32(expected)).max()
        assert error < tolerance * jnp.abs(expected).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_attention_weights_and_their_derivative_equal_the_plain_formula(dtype, tolerance):
    q, k = (
        2 * jax.random.normal(jax.random.key(i), (2, 3, n, 16), dtype) for i, n in ((0, 5), (1, 9))
    )

    def plain(q, k):
        scores = jnp.einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=jnp.float32)
        return jax.nn.softmax(scores).astype(dtype)

    def ours(q, k):
        return attention_weights(q, k, None)

    for expected, result in zip(_gradients(plain, q, k), _gradients(ours, q, k), strict=True):
        assert expected.dtype == result.dtype
        error = jnp.abs(jnp.float32(result) - jnp.float32(expected)).max()
        assert error < tolerance * jnp.abs(expected).max()
