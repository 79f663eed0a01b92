"""Exported files, loaded by the programs they are for: the same logits."""

import pathlib
import sys

import numpy as np
import pytest
from test_weights import same_bits
from test_weights_torch import hugging_logits, timm_logits

import vit_jax
from vit_jax.augment import normalize
from vit_jax.commands.export import export

sys.path.append(str(pathlib.Path(__file__).parents[1] / "commands"))
from test_export import images, make_trained


def ours(loaded, pixels):
    return np.asarray(loaded.model.apply({"params": loaded.params}, pixels))


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, (12, 12, 3)),
        ({"gelu": "tanh", "norm_eps": 1e-6, "mlp_dim": 40}, (12, 12, 3)),
        ({}, (8, 20, 3)),
        ({"posemb": "sincos2d"}, (12, 12, 3)),
        ({}, (12, 12, 1)),
    ],
    ids=["plain", "tanh", "not square", "sincos2d", "gray"],
)
def test_transformers_loads_the_folder(torch, transformers, tmp_path, fields, shape):
    loaded = make_trained(shape, **fields)
    export(loaded, tmp_path / "folder", "huggingface")
    theirs, told = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not any(told.values())  # no key missing, unexpected, mismatched
    assert theirs.config.id2label == dict(enumerate("abcde"))
    pixels = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    got = hugging_logits(torch, theirs.eval(), pixels)
    np.testing.assert_allclose(got, ours(loaded, pixels), atol=1e-5)


def test_the_preprocessing_in_the_folder_is_ours(torch, transformers, tmp_path):
    loaded = make_trained()
    export(loaded, tmp_path / "folder", "huggingface")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            tmp_path / "folder", backend="pil"
        )
    except ImportError as e:
        pytest.skip(f"transformers reads no preprocessor here: {e}")
    got = processor(list(images(2)), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    expected = normalize(images(2), loaded.config.data.mean, loaded.config.data.std)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_notebook_loads_its_pt(torch, reference, tmp_path):
    loaded = make_trained((32, 32, 3), width=256, num_heads=8, mlp_dim=1024, depth=6)
    export(loaded, tmp_path / "vit.pt", "notebook")
    theirs = reference.VisionTransformer(num_classes=5).eval()
    theirs.load_state_dict(torch.load(tmp_path / "vit.pt", weights_only=True), strict=True)
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        got = theirs(torch.tensor(pixels).permute(0, 3, 1, 2)).numpy()
    expected = ours(loaded, pixels)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    back = vit_jax.load_weights(tmp_path / "vit.pt").params
    assert same_bits(back, loaded.params)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_timms_files_compute_the_same(torch, tmp_path, suffix):
    from safetensors.numpy import load_file

    loaded = make_trained(norm_eps=1e-6, layer_scale=0.1)
    path = tmp_path / f"vit{suffix}"
    export(loaded, path, "timm")
    tensors = torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)
    pixels = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    np.testing.assert_allclose(timm_logits(torch, tensors, pixels), ours(loaded, pixels), atol=1e-5)
