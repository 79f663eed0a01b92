"""Layouts: Google's against flax, names and axes against the sources, and round trips."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from small_models import random_model, same_bits, save_tensors

import vit_jax
from vit_jax.errors import UserError
from vit_jax.model import sincos2d
from vit_jax.weights import layouts


class GoogleViT(nn.Module):
    """Google's model, built from flax's own modules with the published names."""

    @nn.compact
    def __call__(self, images, *, cls, pre_logits):
        x = nn.Conv(24, (4, 4), (4, 4), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, 24)
        if cls:
            token = self.param("cls", nn.initializers.zeros, (1, 1, 24))
            x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = GoogleEncoder(name="Transformer")(x)
        x = x[:, 0] if cls else x.mean(1)
        if pre_logits:
            x = nn.tanh(nn.Dense(pre_logits, name="pre_logits")(x))
        return nn.Dense(5, name="head")(x)


class GoogleEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = GooglePositions(name="posembed_input")(x)
        for i in range(2):
            x = GoogleBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class GooglePositions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("pos_embedding", nn.initializers.zeros, (1, *x.shape[1:]))


class GoogleBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="LayerNorm_0")(x)
        attention = nn.MultiHeadDotProductAttention(3, name="MultiHeadDotProductAttention_1")
        x = x + attention(y, y)
        return x + GoogleMlp(name="MlpBlock_3")(nn.LayerNorm(name="LayerNorm_2")(x))


class GoogleMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(24, name="Dense_1")(nn.gelu(nn.Dense(40, name="Dense_0")(x)))


@pytest.mark.parametrize(
    ("cls", "pre_logits"), [(True, 0), (True, 16), (False, 0)], ids=["AugReg", "original", "gap"]
)
def test_google_logits_equal_flax_modules(tmp_path, cls, pre_logits):
    images = np.random.default_rng(1).normal(size=(4, 12, 12, 3)).astype(np.float32)
    reference = GoogleViT()
    options = {"cls": cls, "pre_logits": pre_logits}
    shapes = jax.eval_shape(lambda: reference.init(jax.random.key(0), images, **options))
    rng = np.random.default_rng(2)
    theirs = jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes)
    np.savez(tmp_path / "B_16.npz", **flatten_dict(theirs["params"], sep="/"))
    got = vit_jax.load_weights(tmp_path / "B_16.npz")
    assert (got.num_classes, got.grid, got.kind) == (5, (3, 3), "google")
    assert got.model["num_heads"] == 3 and got.model["pre_logits"] == pre_logits
    logits = got.make_model().apply({"params": got.params}, images)
    expected = reference.apply(theirs, images, **options)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    again = layouts.from_params(got.params, layouts.GOOGLE, num_heads=3)
    assert same_bits(again, flatten_dict(theirs["params"], sep="/"))


class MlpBlock(GoogleMlp):
    """flax names a module after its class."""


class LinenBlock(nn.Module):
    """The encoder block of Google and big_vision, with the names that flax assigns."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(3)(y, y)
        return x + MlpBlock()(nn.LayerNorm()(x))


class LinenEncoder(nn.Module):
    positions: bool

    @nn.compact
    def __call__(self, x):
        if self.positions:
            x = GooglePositions(name="posembed_input")(x)
        for i in range(2):
            x = LinenBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.zeros, (1, 1, 24))
        x = nn.MultiHeadDotProductAttention(3)(jnp.tile(probe, (len(x), 1, 1)), x)
        return (x + MlpBlock()(nn.LayerNorm()(x)))[:, 0]


class LinenViT(nn.Module):
    """Google's model (with a class token), or big_vision's with one of its pool types."""

    positions: str  # google, learned, or sincos2d
    pool: str  # tok, gap, or map

    @nn.compact
    def __call__(self, images):
        google = self.positions == "google"
        x = nn.Conv(24, (4, 4), (4, 4), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, 24)
        if self.positions == "learned":
            x = x + self.param("pos_embedding", nn.initializers.zeros, (1, *x.shape[1:]))
        elif not google:
            x = x + sincos2d((3, 3), 24, cls_token=False)
        if self.pool == "tok":
            token = self.param("cls", nn.initializers.zeros, (1, 1, 24))
            x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = LinenEncoder(google, name="Transformer")(x)
        pool = {"tok": lambda x: x[:, 0], "gap": lambda x: x.mean(1), "map": lambda x: MAPHead()(x)}
        return nn.Dense(5, name="head")(pool[self.pool](x))


@pytest.mark.parametrize(
    ("positions", "pool"),
    [
        ("google", "tok"),
        ("learned", "tok"),
        ("sincos2d", "tok"),
        ("learned", "gap"),
        ("sincos2d", "gap"),
        ("learned", "map"),
    ],
)
def test_linen_and_big_vision_logits_equal_flax_modules(tmp_path, positions, pool):
    images = np.random.default_rng(1).normal(size=(4, 12, 12, 3)).astype(np.float32)
    reference = LinenViT(positions, pool)
    shapes = jax.eval_shape(lambda: reference.init(jax.random.key(0), images))
    rng = np.random.default_rng(2)
    theirs = jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes)
    google = positions == "google"
    tensors = flatten_dict(theirs["params"] if google else theirs, sep="/")
    got = vit_jax.load_weights(save_tensors(tmp_path / "vit.npz", tensors))
    assert got.kind == (layouts.GOOGLE_LINEN if google else layouts.BIG_VISION)
    assert got.grid == (None if positions == "sincos2d" else (3, 3))
    logits = got.make_model().apply({"params": got.params}, images)
    np.testing.assert_allclose(logits, reference.apply(theirs, images), atol=1e-5)


FIELDS = {
    layouts.GOOGLE: [{}, {"pre_logits": 8}, {"pool": "gap"}],
    layouts.TIMM: [{}, {"pre_logits": 8}, {"pool": "gap"}, {"layer_scale": 0.1}],
    layouts.HUGGINGFACE: [{}],
    layouts.HUGGINGFACE_5: [{}],
    layouts.NOTEBOOK: [{"mlp_dim": 96}],
    layouts.GOOGLE_LINEN: [{}],
    layouts.BIG_VISION: [
        {"pool": "gap"},
        {"pool": "gap", "posemb": "sincos2d"},
        {"posemb": "sincos2d"},
        {"pool": "map", "pre_logits": 8},
    ],
    layouts.TORCHVISION: [{}, {"pre_logits": 8}],
}


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_round_trips_are_bit_exact(layout):
    for i, fields in enumerate(FIELDS[layout]):
        depth = 1 if i else 11  # block_10 follows block_9
        _, params = random_model(depth=depth, **fields)
        theirs = layouts.from_params(params, layout, num_heads=3)
        back, _ = layouts.to_params(theirs, layout, "a file")
        assert same_bits(back, params)
        assert same_bits(layouts.from_params(back, layout, num_heads=3), theirs)


def test_a_class_token_without_a_position_has_a_position_of_zero():
    _, params = random_model()
    with pytest.raises(UserError, match="its class token has a position embedding"):
        layouts.from_params(params, layouts.BIG_VISION, num_heads=3)
    params["pos_embed"][:, 0] = 0
    theirs = layouts.from_params(params, layouts.BIG_VISION, num_heads=3)
    assert theirs["params/pos_embedding"].shape == (1, 9, 24)
    assert same_bits(layouts.to_params(theirs, layouts.BIG_VISION, "a file")[0], params)


def test_names_and_axes_match_the_published_sources():
    """Names and indices come from the published sources, not from our tables."""
    _, params = random_model()
    attn = params["block_1"]["attn"]
    timm = layouts.from_params(params, layouts.TIMM, num_heads=3)
    assert timm["blocks.1.attn.qkv.weight"].shape == (72, 24)
    assert timm["blocks.1.attn.qkv.weight"][70, 3] == attn["qkv"]["kernel"][3, 70]
    assert (
        timm["patch_embed.proj.weight"][5, 2, 1, 3] == params["patch_embed"]["kernel"][1, 3, 2, 5]
    )
    assert timm["blocks.0.mlp.fc1.weight"].shape == (40, 24)
    assert len(timm) == 4 + 2 * 12 + 4
    hugging = layouts.from_params(params, layouts.HUGGINGFACE, num_heads=3)
    key = hugging["vit.encoder.layer.1.attention.attention.key.weight"]
    assert key[20, 3] == attn["qkv"]["kernel"][3, 24 + 20]
    assert hugging["vit.encoder.layer.1.intermediate.dense.weight"].shape == (40, 24)
    assert hugging["classifier.bias"].shape == (5,) and len(hugging) == 4 + 2 * 16 + 4
    google = layouts.from_params(params, layouts.GOOGLE, num_heads=3)
    attention = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    assert google[f"{attention}/value/kernel"][3, 2, 1] == attn["qkv"]["kernel"][3, 48 + 17]
    assert google[f"{attention}/out/kernel"][2, 1, 9] == attn["out"]["kernel"][17, 9]
    assert google["Transformer/encoderblock_0/MlpBlock_3/Dense_1/kernel"].shape == (40, 24)
    assert (
        google["cls"].shape == (1, 1, 24)
        and "Transformer/encoderblock_1/LayerNorm_2/bias" in google
    )


@pytest.mark.parametrize(
    ("layout", "suffix", "head"),
    [
        (layouts.GOOGLE, ".npz", "head/kernel"),
        (layouts.TIMM, ".safetensors", "head.weight"),
        (layouts.HUGGINGFACE, ".safetensors", "classifier.weight"),
    ],
)
def test_wrong_keys_and_shapes_are_reported(tmp_path, layout, suffix, head):
    good = layouts.from_params(random_model()[1], layout, num_heads=3)
    path = tmp_path / f"file{suffix}"
    some = next(name for name in good if "1" in name and good[name].shape == (24,))

    def rejection(arrays):
        with pytest.raises(UserError) as error:
            vit_jax.load_weights(save_tensors(path, arrays), num_heads=3)
        return str(error.value)

    text = rejection({k: v for k, v in good.items() if k != some})
    assert f"missing {some}" in text and str(path) in text
    assert "unused extra.weight" in rejection(good | {"extra.weight": np.zeros(3, np.float32)})
    text = rejection(good | {some: np.zeros((25,), np.float32)})
    assert f"{some} has shape (25,), expected (24,)" in text
    text = rejection(good | {head: good[head][:-1]})
    assert head in text and str(good[head].shape) in text and str(good[head][:-1].shape) in text
    assert "type int32" in rejection(good | {some: np.zeros(24, np.int32)})
    assert rejection({"a": np.zeros(3, np.float32)}).endswith("its names are a")
    assert vit_jax.load_weights(save_tensors(path, good), num_heads=3).num_classes == 5


def test_hugging_face_classifier_is_required_and_has_no_pooler():
    good = layouts.from_params(random_model()[1], layouts.HUGGINGFACE)
    headless = {name: array for name, array in good.items() if not name.startswith("classifier")}
    with pytest.raises(UserError, match=r"missing classifier\.weight, classifier\.bias"):
        layouts.to_params(headless, layouts.HUGGINGFACE, "a file")
    pooler = {"vit.pooler.dense.bias": np.zeros(24, np.float32)}
    with pytest.raises(UserError, match=r"unused vit\.pooler\.dense\.bias"):
        layouts.to_params(good | pooler, layouts.HUGGINGFACE, "a file")
