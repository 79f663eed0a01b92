"""Exported files have the same logits in the libraries they are for."""

import numpy as np
import pytest
from small_models import make_trained, random_images, same_bits
from test_weights_torch import hugging_logits, timm_logits

import vit_jax
from vit_jax.augment import normalize
from vit_jax.weights import save_weights


def our_logits(trained, pixels):
    return np.asarray(trained.model.apply({"params": trained.params}, pixels))


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
def test_transformers_logits_of_an_exported_folder(torch, transformers, tmp_path, fields, shape):
    trained = make_trained(shape, **fields)
    save_weights(trained, tmp_path / "folder", "huggingface")
    theirs, loading_info = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not any(loading_info.values())  # no key missing, unexpected, mismatched
    assert theirs.config.id2label == dict(enumerate("abcde"))
    pixels = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    got = hugging_logits(torch, theirs.eval(), pixels)
    np.testing.assert_allclose(got, our_logits(trained, pixels), atol=1e-5)


def test_exported_preprocessing_equals_normalize(torch, transformers, tmp_path):
    trained = make_trained()
    save_weights(trained, tmp_path / "folder", "huggingface")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            tmp_path / "folder", backend="pil"
        )
    except ImportError as e:
        pytest.skip(f"transformers reads no preprocessor here: {e}")
    got = processor(list(random_images(2)), return_tensors="np")["pixel_values"].transpose(
        0, 2, 3, 1
    )
    expected = normalize(random_images(2), trained.config.data.mean, trained.config.data.std)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_notebook_logits_of_an_exported_pt(torch, reference, tmp_path):
    trained = make_trained((32, 32, 3), width=256, num_heads=8, mlp_dim=1024, depth=6)
    save_weights(trained, tmp_path / "vit.pt", "notebook")
    theirs = reference.VisionTransformer(num_classes=5).eval()
    theirs.load_state_dict(torch.load(tmp_path / "vit.pt", weights_only=True), strict=True)
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        got = theirs(torch.tensor(pixels).permute(0, 3, 1, 2)).numpy()
    expected = our_logits(trained, pixels)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    back = vit_jax.load_weights(tmp_path / "vit.pt").params
    assert same_bits(back, trained.params)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_timm_logits_of_an_exported_file(torch, tmp_path, suffix):
    from safetensors.numpy import load_file

    trained = make_trained(norm_eps=1e-6, layer_scale=0.1)
    path = tmp_path / f"vit{suffix}"
    save_weights(trained, path, "timm")
    tensors = torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)
    pixels = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    np.testing.assert_allclose(
        timm_logits(torch, tensors, pixels), our_logits(trained, pixels), atol=1e-5
    )
