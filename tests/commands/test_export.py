"""export: every format is read back bit for bit, and is written completely or not at all."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_weights import random_model, same_bits

import vit_jax
from vit_jax import config
from vit_jax.augment import normalize
from vit_jax.commands.export import export, parse_format
from vit_jax.errors import UserError
from vit_jax.inference.trained import TrainedModel
from vit_jax.train import train

COMMAND = (
    "from vit_jax.commands import export\n"
    "from vit_jax.errors import run_command\n"
    "run_command(export.main)"
)
GOOGLE = {"gelu": "tanh", "norm_eps": 1e-6}
VARIANTS = [
    {},
    {"pool": "gap", "posemb": "sincos2d", "qk_norm": True},
    {"layer_scale": 0.1, "stem": "conv", "image_size": 16},
    {"pre_logits": 8, **GOOGLE},
]


def make_trained(image_shape=(12, 12, 3), **fields):
    """A small TrainedModel with random weights."""
    c = config.defaults()
    sizes = {"width": 24, "depth": 2, "num_heads": 3, "mlp_dim": 96, "patch_size": 4}
    c.model.update(sizes | fields)
    _, params = random_model(image_shape=image_shape, **sizes | fields)
    vit, _ = random_model(image_shape=image_shape, **sizes | fields)
    pixels = {"divide_by": 255, "mean": list(c.data.mean), "std": list(c.data.std)}
    return TrainedModel(vit, params, c, 3, list("abcde"), pixels, list(image_shape))


def probabilities(trained, images):
    x = normalize(images, trained.config.data.mean, trained.config.data.std)
    logits = jax.jit(trained.model.apply)({"params": trained.params}, x)
    return np.asarray(jax.nn.softmax(logits))


def images(count, shape=(12, 12, 3)):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("fields", VARIANTS)
def test_safetensors_keep_every_variant(tmp_path, fields):
    trained = make_trained(**fields)
    export(trained, tmp_path / "vit.safetensors", "safetensors")
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
def test_third_party_formats_round_trip_bit_for_bit(tmp_path, form, to, fields):
    trained = make_trained(**fields)
    export(trained, tmp_path / to, form)
    got = vit_jax.load_weights(tmp_path / to, num_heads=3)
    assert same_bits(got.params, trained.params)
    vit = got.make_model()
    for name in ("num_heads", "mlp_dim", "norm_eps", "gelu", "pool", "pre_logits"):
        assert getattr(vit, name) == getattr(trained.model, name)
    assert os.listdir(tmp_path) == [to]  # no temporary files remain


def test_sincos2d_positions_are_exported_as_a_table(tmp_path):
    trained = make_trained(posemb="sincos2d")
    export(trained, tmp_path / "folder", "huggingface")
    got = vit_jax.load_weights(tmp_path / "folder")
    x = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    expected = trained.model.apply({"params": trained.params}, x)
    logits = got.make_model().apply({"params": got.params}, x)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_exported_function_runs_without_vit_jax(tmp_path):
    np.save(tmp_path / "images.npy", images(7))
    variants = [make_trained(**fields) for fields in VARIANTS]
    for i, trained in enumerate(variants):
        export(trained, tmp_path / f"{i}.jax", "jax")
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
        expected = probabilities(trained, images(7))
        np.testing.assert_allclose(np.load(tmp_path / f"{i}.npy"), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "fields", "says"),
    [
        ("huggingface", {"pool": "gap"}, "has pool=cls, but this model has gap"),
        ("huggingface", {"qk_norm": True}, "has qk_norm=False, but this model has True"),
        ("huggingface", {"layer_scale": 0.1}, "has layer_scale=0.0"),
        ("huggingface", {"stem": "conv"}, "it has no place for conv_stem/conv_0/kernel"),
        ("google", {}, "has norm_eps=1e-06, but this model has 1e-05"),
        ("google", GOOGLE | {"qk_norm": True}, "no place for block_0/attn/k_norm/scale"),
        ("timm", {"norm_eps": 1e-6, "stem": "conv"}, "it needs patch_embed/bias"),
        ("timm", GOOGLE, "has gelu=exact, but this model has tanh"),
        ("notebook", {"norm_eps": 1e-6}, "has norm_eps=1e-05"),
        ("notebook", {"mlp_dim": 40}, "mlp_dim 4 x width"),
    ],
)
def test_models_that_a_format_cannot_express_are_rejected(tmp_path, form, fields, says):
    with pytest.raises(UserError, match=says) as refusal:
        export(make_trained(**fields), tmp_path / "to", form)
    assert "\n" not in str(refusal.value) and not os.listdir(tmp_path)


def test_format_from_suffix():
    assert parse_format("a/vit.pt", None) == "notebook"
    assert (
        parse_format("vit.pt", "timm") == "timm" and parse_format("folder", None) == "huggingface"
    )
    with pytest.raises(UserError, match=r"ends in \.pt, \.safetensors, \.npz, \.jax"):
        parse_format("vit.onnx", None)
    with pytest.raises(UserError, match=r"--format google is written to \.npz"):
        parse_format("vit.pt", "google")


def test_command_writes_a_folder_and_keeps_an_existing_one(tiny_config, tmp_path):
    tiny_config.steps = 2
    train(tiny_config, tmp_path / "run")

    folder = tmp_path / "folder"
    base = [sys.executable, "-c", COMMAND, "--workdir", str(tmp_path / "run"), "--to"]
    done = subprocess.run([*base, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}: step 2 of {tmp_path / 'run'}, format huggingface\n"
    written = json.loads((folder / "config.json").read_text())
    assert written["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert same_bits(vit_jax.load_weights(folder).params, vit_jax.load(tmp_path / "run").params)
    # A second export rejects the existing folder.
    done = subprocess.run([*base, str(folder)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {folder} already exists: choose another path, or remove it\n"
