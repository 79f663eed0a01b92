"""Tests ONNX export against ONNX Runtime. Requires the extra onnx."""

import importlib.util

import jax
import numpy as np
import pytest
from small_models import GOOGLE, make_trained, random_images

from vit_jax.augment import normalize
from vit_jax.errors import UserError
from vit_jax.weights import save_weights

INSTALLED = all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnxruntime"))


VARIANTS = [
    {},
    {"pool": "gap", "posemb": "sincos2d", "qk_norm": True, "position_bias": "gaussian"},
    {"layer_scale": 0.1, "stem": "conv"},
    {"pre_logits": 8, **GOOGLE},
    {"dtype": "bfloat16"},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_probabilities_of_any_batch_size(require, tmp_path, fields):
    require("onnx", INSTALLED, "the extra onnx is not installed: pip install 'vit-jax[onnx]'")
    import onnxruntime

    trained = make_trained(**fields)
    save_weights(trained, tmp_path / "vit.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx")
    assert [x.type for x in session.get_inputs()] == ["tensor(uint8)"]
    bound = 0.05 if "dtype" in fields else 1e-5
    for count in (1, 7):
        images = random_images(count)
        (got,) = session.run(["probabilities"], {"images": images})
        x = normalize(images, trained.config.data.mean, trained.config.data.std)
        expected = jax.nn.softmax(trained.model.apply({"params": trained.params}, x))
        np.testing.assert_allclose(got, expected, atol=bound)


def test_resizing_inside_the_model_is_not_converted(require, tmp_path):
    require("onnx", INSTALLED, "the extra onnx is not installed: pip install 'vit-jax[onnx]'")
    with pytest.raises(UserError, match="jax2onnx cannot convert this model: Symbolic dimension"):
        save_weights(make_trained(image_size=16), tmp_path / "vit.onnx", "onnx")


@pytest.mark.skipif(INSTALLED, reason="the extra onnx is installed")
def test_missing_extra_is_named(tmp_path):
    with pytest.raises(UserError, match=r"pip install 'vit-jax\[onnx\]'"):
        save_weights(make_trained(), tmp_path / "vit.onnx", "onnx")
    assert not (tmp_path / "vit.onnx").exists()
