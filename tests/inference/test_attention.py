"""Attention maps from the forward pass, rollout, distances, and images of them."""

import jax
import numpy as np
import pytest

import vit_jax
from vit_jax import config
from vit_jax.inference import attention
from vit_jax.inference.classify import make_classify
from vit_jax.inference.trained import TrainedModel
from vit_jax.model import init_params, make_model

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


def untrained(**fields):
    """A small TrainedModel with random weights."""
    c = config.defaults()
    c.model.update(patch_size=2, width=16, depth=2, num_heads=2, mlp_dim=32, **fields)
    model = make_model(c.model, num_classes=3)
    shapes = jax.eval_shape(lambda key: init_params(model, key, (8, 8, 3)), jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return TrainedModel(model, params, c, 0, list("abc"), {}, [8, 8, 3])


@pytest.mark.parametrize(
    "fields",
    [
        {"pool": "gap", "qk_norm": True, "stem": "conv"},
        {"pool": "gap", "position_bias": "gaussian", "token_shift": True, "remat": True},
    ],
)
def test_returning_attention_maps_does_not_change_logits(fields):
    """The next test compares the logits of a model with a class token."""
    trained = untrained(**fields)
    fast = make_classify(trained, batch_size=3)(IMAGES)
    logits, maps = make_classify(trained, batch_size=3, attention=True)(IMAGES)
    np.testing.assert_allclose(logits, fast, atol=1e-6)
    assert maps.shape == (3, 2, 2, 16, 16) and maps.dtype == np.float32
    assert maps.min() >= 0
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


def test_attention_maps_reproduce_the_last_block(tiny_run):
    """Recomputes the last attention block from the maps and the weights."""
    trained = vit_jax.load(tiny_run)
    model, params = trained.model, trained.params
    logits, maps = make_classify(trained, attention=True)(IMAGES)
    x = (IMAGES / 255 - 0.5) / 0.5
    whole = jax.jit(
        lambda x: model.apply(
            {"params": params}, x, capture_intermediates=True, mutable="intermediates"
        )
    )
    _, caught = whole(x.astype(np.float32))
    blocks = caught["intermediates"]
    block = params["block_1"]
    (normed,) = blocks["block_1"]["norm1"]["__call__"]
    value = np.split(normed @ block["attn"]["qkv"]["kernel"] + block["attn"]["qkv"]["bias"], 3, -1)[
        2
    ]
    value = np.asarray(value).reshape(3, 5, 2, 8).transpose(0, 2, 1, 3)
    mixed = (maps[:, 1] @ value).transpose(0, 2, 1, 3).reshape(3, 5, 16)
    out = mixed @ block["attn"]["out"]["kernel"] + block["attn"]["out"]["bias"]
    np.testing.assert_allclose(out, blocks["block_1"]["attn"]["__call__"][0], atol=1e-5)
    np.testing.assert_allclose(logits, blocks["__call__"][0], atol=1e-5)


def test_logits_do_not_depend_on_the_number_of_images():
    classify = make_classify(untrained(), batch_size=2)
    logits = classify(IMAGES)
    for count in (1, 2):
        np.testing.assert_array_equal(classify(IMAGES[:count]), logits[:count])


def test_rollout_of_a_hand_computed_case():
    # Layer 1: token 0 attends to 1, and 1 to itself. Layer 2, head mean: 0 to both, 1 to 0.
    first = np.array([[[0, 1], [0, 1]], [[0, 1], [0, 1]]], float)
    second = np.array([[[1, 0], [1, 0]], [[0, 1], [1, 0]]], float)
    # (A + I) / 2: [[0.5, 0.5], [0, 1]] and [[0.75, 0.25], [0.5, 0.5]]; second times first.
    reach = attention.rollout(np.stack([first, second]))
    np.testing.assert_allclose(reach, [[0.375, 0.625], [0.25, 0.75]])


def test_rollout_of_identity_attention_is_the_identity():
    np.testing.assert_allclose(attention.rollout(np.tile(np.eye(4), (3, 2, 1, 1))), np.eye(4))


def test_attention_received_is_from_the_class_token_or_the_mean_of_all_patches():
    maps = np.arange(25.0).reshape(5, 5)
    np.testing.assert_array_equal(attention.attention_received(maps, (2, 2)), [[1, 2], [3, 4]])
    maps = np.eye(4)[[2, 2, 2, 0]]
    np.testing.assert_array_equal(
        attention.attention_received(maps, (2, 2)), [[0.25, 0], [0.75, 0]]
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_mosaic_has_one_row_per_layer_and_is_bright_where_attention_is(channels):
    maps = np.zeros((2, 3, 4, 4))
    maps[..., 3] = 1  # every patch attends to the last
    image = np.full((8, 8, channels), 100, np.uint8)
    page = attention.mosaic(image, maps, (2, 2))
    step = attention.TILE + attention.GAP
    assert page.shape == (3 * step - attention.GAP, 3 * step - attention.GAP, 4)
    assert (page[: attention.TILE, : attention.TILE, :3] == 100).all()
    assert (page[: attention.TILE, 2 * step :] == 0).all()  # no tile here
    head = page[step:, :].astype(int)[: attention.TILE, : attention.TILE, :3].sum(-1)
    assert head[-10:, -10:].mean() > 3 * head[:10, :10].mean()
