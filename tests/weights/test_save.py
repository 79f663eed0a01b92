"""Weights written in other formats and read back: bit-exact, and written atomically."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_models import GOOGLE, make_trained, random_images, same_bits

import vit_jax
from vit_jax.augment import normalize
from vit_jax.errors import UserError
from vit_jax.weights import save_weights

VARIANTS = [
    {},
    {"pool": "gap", "posemb": "sincos2d", "qk_norm": True, "position_bias": "gaussian"},
    {"layer_scale": 0.1, "stem": "conv", "image_size": 16, "pool": "gap", "token_shift": True},
    {"pre_logits": 8, **GOOGLE},
]


def probabilities(trained, images):
    x = normalize(images, trained.config.data.mean, trained.config.data.std)
    logits = jax.jit(trained.model.apply)({"params": trained.params}, x)
    return np.asarray(jax.nn.softmax(logits))


@pytest.mark.parametrize("fields", VARIANTS)
def test_our_safetensors_round_trip_every_variant(tmp_path, fields):
    trained = make_trained(**fields)
    save_weights(trained, tmp_path / "vit.safetensors", "safetensors")
    got = vit_jax.load_weights(tmp_path / "vit.safetensors")
    assert same_bits(got.params, trained.params) and got.kind == "vit_jax"
    assert got.class_names == list("abcde") and got.preprocessing == trained.preprocessing
    assert got.make_model() == trained.model


@pytest.mark.parametrize(
    ("form", "to", "fields"),
    [
        ("google", "vit.npz", GOOGLE),
        ("google", "vit.npz", {"pre_logits": 8, "pool": "gap", **GOOGLE}),
        ("timm", "vit.safetensors", {"norm_eps": 1e-6, "layer_scale": 0.1}),
        ("huggingface", "folder", {}),
        ("huggingface", "folder", {"gelu": "tanh", "norm_eps": 1e-7}),
    ],
)
def test_other_formats_round_trip_bit_exact(tmp_path, form, to, fields):
    trained = make_trained(**fields)
    save_weights(trained, tmp_path / to, form)
    got = vit_jax.load_weights(tmp_path / to, num_heads=3)
    assert same_bits(got.params, trained.params)
    vit = got.make_model()
    for name in ("num_heads", "mlp_dim", "norm_eps", "gelu", "pool", "pre_logits"):
        assert getattr(vit, name) == getattr(trained.model, name)
    assert os.listdir(tmp_path) == [to]  # no temporary file is left


def test_sincos2d_positions_are_written_as_a_table(tmp_path):
    trained = make_trained(posemb="sincos2d")
    save_weights(trained, tmp_path / "folder", "huggingface")
    got = vit_jax.load_weights(tmp_path / "folder")
    x = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    expected = trained.model.apply({"params": trained.params}, x)
    logits = got.make_model().apply({"params": got.params}, x)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_jax_function_runs_without_vit_jax(tmp_path):
    np.save(tmp_path / "images.npy", random_images(7))
    variants = [make_trained(**fields) for fields in VARIANTS]
    for i, trained in enumerate(variants):
        save_weights(trained, tmp_path / f"{i}.jax", "jax")
    code = (
        "import sys, jax.export, numpy as np\n"
        "sys.modules.update(dict.fromkeys(['vit_jax', 'flax', 'orbax']))\n"
        "images = np.load('images.npy')\n"
        "for i in range(4):\n"
        "    data = bytearray(open(f'{i}.jax', 'rb').read())\n"
        "    predict = jax.export.deserialize(data).call\n"
        "    np.save(f'{i}.npy', predict(images))\n"
        "print(predict(images[:1]).shape, predict(images[:3]).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "(1, 5) (3, 5)\n", done.stderr
    for i, trained in enumerate(variants):
        expected = probabilities(trained, random_images(7))
        np.testing.assert_allclose(np.load(tmp_path / f"{i}.npy"), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        ("huggingface", {"pool": "gap"}, "has pool=cls, but this model has gap"),
        ("huggingface", {"qk_norm": True}, "has qk_norm=False, but this model has True"),
        ("huggingface", {"layer_scale": 0.1}, "has layer_scale=0.0"),
        ("huggingface", {"stem": "conv"}, "unused conv_stem/conv_0/kernel"),
        ("google", {}, "has norm_eps=1e-06, but this model has 1e-05"),
        ("google", {"token_shift": True, "pool": "gap", **GOOGLE}, "has token_shift=False"),
        ("google", GOOGLE | {"qk_norm": True}, "unused block_0/attn/k_norm/scale"),
        (
            "timm",
            {"norm_eps": 1e-6, "stem": "conv"},
            "missing patch_embed/kernel",
        ),
        ("timm", GOOGLE, "has gelu=exact, but this model has tanh"),
        ("notebook", {"norm_eps": 1e-6}, "has norm_eps=1e-05"),
        ("notebook", {"mlp_dim": 40}, r"fc1/kernel has shape \(24, 40\), expected \(24, 96\)"),
    ],
)
def test_model_that_a_format_cannot_represent_is_rejected(tmp_path, form, fields, message):
    with pytest.raises(UserError, match=message) as error:
        save_weights(make_trained(**fields), tmp_path / "to", form)
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)
