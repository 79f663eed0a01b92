"""Weights from other programs' files: names, shapes, logits, refusals, and another grid or head."""

import json
import pathlib
import pickle
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import vit_jax
from vit_jax import config, weights
from vit_jax.errors import UserError
from vit_jax.interop import layouts, resize_positions
from vit_jax.model import init_params, make_model
from vit_jax.train import train

SIZES = {"width": 24, "depth": 2, "num_heads": 3, "mlp_dim": 40, "patch_size": 4}
GOOGLE = {"gelu": "tanh", "norm_eps": 1e-6}
TIMM = {"gelu": "exact", "norm_eps": 1e-6}


def random_model(num_classes=5, image_shape=(12, 12, 3), **fields):
    """(model, random float32 parameters) of a small ViT."""
    fields = {**config.defaults().model, **SIZES, **fields}
    vit = make_model(fields, num_classes=num_classes)
    shapes = jax.eval_shape(lambda key: init_params(vit, key, image_shape), jax.random.key(0))
    rng = np.random.default_rng(0)
    return vit, jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


def same_bits(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), a, b)
    )


@pytest.fixture
def google_file(tmp_path):
    """A .npz with Google's names, and the parameters in it by ours."""

    def make(**fields):
        _, params = random_model(**GOOGLE, **fields)
        path = tmp_path / "google.npz"
        np.savez(path, **layouts.from_params(params, layouts.GOOGLE, num_heads=3))
        return path, params

    return make


class GoogleViT(nn.Module):
    """Google's model, put together of flax's own modules under the published names."""

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
def test_googles_npz_computes_what_flax_does(tmp_path, cls, pre_logits):
    images = np.random.default_rng(1).normal(size=(4, 12, 12, 3)).astype(np.float32)
    reference = GoogleViT()
    options = {"cls": cls, "pre_logits": pre_logits}
    shapes = jax.eval_shape(lambda: reference.init(jax.random.key(0), images, **options))
    rng = np.random.default_rng(2)
    theirs = jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes)
    np.savez(tmp_path / "B_16.npz", **layouts.flatten(theirs["params"]))
    got = vit_jax.load_weights(tmp_path / "B_16.npz")
    assert (got.num_classes, got.grid, got.kind) == (5, (3, 3), "google")
    assert got.model["num_heads"] == 3 and got.model["pre_logits"] == pre_logits
    logits = got.make_model().apply({"params": got.params}, images)
    expected = reference.apply(theirs, images, **options)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    again = layouts.from_params(got.params, layouts.GOOGLE, num_heads=3)
    assert same_bits(again, layouts.flatten(theirs["params"]))


FIELDS = {
    layouts.GOOGLE: [{}, {"pre_logits": 8}, {"pool": "gap"}],
    layouts.TIMM: [{}, {"pre_logits": 8}, {"pool": "gap"}, {"layer_scale": 0.1}],
    layouts.HUGGINGFACE: [{}],
    layouts.HUGGINGFACE_5: [{}],
}


@pytest.mark.parametrize("layout", layouts.BLOCK)
def test_round_trips_are_bit_exact(layout):
    for fields in FIELDS[layout]:
        for depth in (1, 11):
            _, params = random_model(depth=depth, **fields)
            theirs = layouts.from_params(params, layout, num_heads=3)
            back, _ = layouts.to_params(theirs, layout, "a file")
            assert same_bits(back, params)
            assert same_bits(layouts.from_params(back, layout, num_heads=3), theirs)


def test_layouts_by_hand():
    """Names and places written down from the published sources, none by our own table."""
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


# ------------------------------------------------------------------------ files that are wrong


def save(path, arrays):
    from safetensors.numpy import save_file

    save_file(arrays, path) if path.suffix == ".safetensors" else np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("layout", "suffix", "head"),
    [
        (layouts.GOOGLE, ".npz", "head/kernel"),
        (layouts.TIMM, ".safetensors", "head.weight"),
        (layouts.HUGGINGFACE, ".safetensors", "classifier.weight"),
    ],
)
def test_every_key_and_shape_is_accounted_for(tmp_path, layout, suffix, head):
    good = layouts.from_params(random_model()[1], layout, num_heads=3)
    path = tmp_path / f"file{suffix}"
    some = next(name for name in good if "1" in name and good[name].shape == (24,))

    def refused(arrays):
        with pytest.raises(UserError) as refusal:
            vit_jax.load_weights(save(path, arrays), num_heads=3)
        return str(refusal.value)

    text = refused({k: v for k, v in good.items() if k != some})
    assert f"missing {some}" in text and str(path) in text
    assert "unused extra.weight" in refused(good | {"extra.weight": np.zeros(3, np.float32)})
    text = refused(good | {some: np.zeros((25,), np.float32)})
    assert f"{some} is (25,) and not (24,)" in text
    text = refused(good | {head: good[head][:-1]})
    assert head in text and str(good[head].shape) in text and str(good[head][:-1].shape) in text
    assert "type int32" in refused(good | {some: np.zeros(24, np.int32)})
    assert refused({"a": np.zeros(3, np.float32)}).endswith("its names are a")
    assert vit_jax.load_weights(save(path, good), num_heads=3).num_classes == 5


class Payload:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("executed"),))


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_damaged_files_say_so_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    layout = layouts.GOOGLE if name.endswith("npz") else layouts.TIMM
    path = save(tmp_path / name, layouts.from_params(random_model()[1], layout, num_heads=3))
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2], pickle.dumps(Payload())):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is damaged") as refusal:
            vit_jax.load_weights(path)
        assert "\n" not in str(refusal.value)
    assert not pathlib.Path("executed").exists()


def test_arrays_of_pickled_objects_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "f.npz", a=np.array([Payload()], object))
    with pytest.raises(UserError, match=r"damaged, or no \.npz of arrays"):
        vit_jax.load_weights(tmp_path / "f.npz")
    assert not pathlib.Path("executed").exists()


def test_paths_that_are_no_weights(tmp_path):
    for name, says in (
        ("no.npz", "does not exist"),
        ("w.txt", "should end in"),
        ("", "no weights"),
    ):
        with pytest.raises(UserError, match=says):
            vit_jax.load_weights(tmp_path / name)


def test_heads_are_told_where_a_file_does_not_record_them(tmp_path):
    path = tmp_path / "timm.safetensors"
    save(path, layouts.from_params(random_model()[1], layouts.TIMM, num_heads=3))
    with pytest.raises(UserError, match="does not record its number of heads: give num_heads"):
        vit_jax.load_weights(path)
    with pytest.raises(UserError, match="cannot be 5"):
        vit_jax.load_weights(path, num_heads=5)
    save(path, layouts.from_params(random_model(width=192)[1], layouts.TIMM, num_heads=3))
    assert vit_jax.load_weights(path).model["num_heads"] == 3  # ViT-Ti


@pytest.mark.parametrize(
    ("name", "field", "value", "allowed"),
    [
        ("config", "image_size", "16", "a positive integer or two"),
        ("config", "image_size", [12, 12, 3], "a positive integer or two"),
        ("config", "hidden_act", ["gelu"], "one of gelu, "),
        ("config", "num_attention_heads", "2", "a positive integer"),
        ("config", "layer_norm_eps", None, "a positive number"),
        ("config", "id2label", {"a": "cat"}, "an object from class numbers to names"),
        ("config", "id2label", ["cat"], "an object from class numbers to names"),
        ("preprocessor_config", "image_mean", 0.5, "a list of numbers"),
    ],
)
def test_hugging_face_config_value_of_the_wrong_type_is_one_line(
    tmp_path, name, field, value, allowed
):
    tensors = layouts.from_params(random_model()[1], layouts.HUGGINGFACE, num_heads=3)
    save(tmp_path / "model.safetensors", tensors)
    fields = {"model_type": "vit", "num_attention_heads": 3, "image_size": 12}
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    assert vit_jax.load_weights(tmp_path).preprocessing["mean"] == [0.5] * 3
    changed = (fields if name == "config" else pixels) | {field: value}
    (tmp_path / f"{name}.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"/{name}\.json: {field} must be {allowed}") as refusal:
        vit_jax.load_weights(tmp_path)
    assert "\n" not in str(refusal.value)


def test_home_directory_is_expanded(google_file, monkeypatch):
    path, params = google_file()
    monkeypatch.setenv("HOME", str(path.parent))
    assert same_bits(vit_jax.load_weights(f"~/{path.name}").params, params)


# --------------------------------------------------------------------- another grid, another head


@pytest.mark.parametrize(
    ("grid", "new"), [((14, 14), (24, 24)), ((4, 7), (9, 3)), ((8, 8), (3, 5)), ((1, 4), (3, 1))]
)
def test_zoom_is_scipys(grid, new):
    table = np.random.default_rng(0).normal(size=(1, 1 + grid[0] * grid[1], 6)).astype(np.float32)
    got = resize_positions(table, grid, new, method="zoom", class_token=True)
    factors = (new[0] / grid[0], new[1] / grid[1], 1)
    expected = ndimage.zoom(table[0, 1:].reshape(*grid, 6), factors, order=1)
    np.testing.assert_allclose(got[0, 1:].reshape(*new, 6), expected, atol=1e-5)
    assert (got[:, :1] == table[:, :1]).all()


def test_resizing_to_the_same_grid_changes_nothing():
    table = np.random.default_rng(0).normal(size=(1, 12, 4)).astype(np.float32)
    for method in ("zoom", "bicubic", "bilinear"):
        got = resize_positions(table, (3, 4), (3, 4), method=method, class_token=False)
        np.testing.assert_array_equal(got, table)


def test_start_from_keeps_what_fits_and_replaces_the_rest(google_file):
    path, params = google_file(pre_logits=16)
    vit, _ = random_model(num_classes=3, **GOOGLE)
    loaded = vit_jax.load_weights(path)
    got, notes = weights.start_from(loaded, vit, (16, 24, 3), ["a", "b", "c"])
    assert not got["head"]["kernel"].any() and got["head"]["kernel"].shape == (24, 3)
    assert "pre_logits" not in got and got["pos_embed"].shape == (1, 25, 24)
    assert same_bits(got["block_1"], params["block_1"])
    assert notes == [
        "a new head, zeros, for 3 classes (it has 5 classes)",
        "positions of 3x3 patches resized to 4x6 (zoom)",
    ]
    vit, _ = random_model(num_classes=3, pre_logits=16, **GOOGLE)  # keeps that layer
    got, _ = weights.start_from(loaded, vit, (12, 12, 3), ["a", "b", "c"])
    assert same_bits(got["pre_logits"], params["pre_logits"])
    vit, _ = random_model(pre_logits=16, **GOOGLE)
    assert weights.start_from(loaded, vit, (12, 12, 3), list("abcde"))[1] == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"width": 48}, r"block_0/attn/qkv/kernel is \(24, 72\) and \(48, 144\) in config.model"),
        ({"width": 48}, "set --config.model.width=24"),
        ({"depth": 1}, "unused block_1/.*--config.model.depth=2"),
        ({"depth": 3}, "missing block_2/.*--config.model.depth=2"),
        ({"gelu": "exact"}, "set --config.model.gelu=tanh"),
        ({"norm_eps": 1e-5, "num_heads": 4}, "num_heads=3 --config.model.norm_eps=1e-06"),
        ({"pool": "gap"}, "unused cls_token.*--config.model.pool=cls"),
        ({"layer_scale": 0.1}, "missing block_0/layer_scale1"),
    ],
)
def test_another_architecture_is_refused_with_keys_shapes_and_advice(google_file, fields, says):
    path, _ = google_file()
    vit, _ = random_model(**GOOGLE | fields)
    with pytest.raises(UserError, match=says) as refusal:
        weights.start_from(vit_jax.load_weights(path), vit, (12, 12, 3), list("abcde"))
    assert str(path) in str(refusal.value)


def test_our_own_runs_and_checkpoints(tiny_config, tmp_path):
    tiny_config.steps, tiny_config.model.pool, tiny_config.model.stem = 2, "gap", "conv"
    train(tiny_config, tmp_path / "run")
    model, params, _ = vit_jax.load(tmp_path / "run")
    for path in ("run", "run/checkpoints/2"):
        got = vit_jax.load_weights(tmp_path / path)
        assert same_bits(got.params, params)
        assert got.make_model() == model.clone(weight_init="trunc_normal")
        assert (got.class_names, got.grid) == (["blue", "green", "red"], (2, 2))
    kept = tmp_path / "run" / "checkpoints" / "2"
    shutil.rmtree(kept / "params" / "d")
    with pytest.raises(UserError, match=r"checkpoints/2 is corrupted: .* is missing"):
        vit_jax.load_weights(tmp_path / "run")
