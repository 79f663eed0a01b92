"""The notebook's layout: every key and shape accounted for, with torch and without."""

import functools
import sys

import jax
import numpy as np
import pytest
from ours import notebook_config, sizes
from small_models import same_bits

from vit_jax.errors import UserError
from vit_jax.model import init_params, make_model
from vit_jax.weights import from_params, notebook_to_params, params_to_notebook
from vit_jax.weights.layouts import NOTEBOOK

SIZES = sizes(width=16, depth=2, num_heads=2, patch_size=4)


@functools.cache
def make_params(num_classes=10, image_shape=(16, 16, 3), **fields):
    """Returns random numbers in the shapes of our parameters."""
    vit = make_model(notebook_config(**SIZES | fields).model, num_classes=num_classes)
    shapes = jax.eval_shape(lambda key: init_params(vit, key, image_shape), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"width": 24, "mlp_dim": 96, "depth": 1},
        {"patch_size": 2, "depth": 11},
        {"patch_size": 16, "num_classes": 100},
        {"image_shape": (32, 32, 3), "num_classes": 1},
    ],
)
def test_arrays_round_trip_bit_exact(fields):
    params = make_params(**fields)
    arrays = from_params(params, NOTEBOOK)
    assert same_bits(notebook_to_params(arrays), params)
    assert same_bits(from_params(notebook_to_params(arrays), NOTEBOOK), arrays)


def test_axes_match_the_notebook():
    params = make_params()
    arrays = from_params(params, NOTEBOOK)
    kernel = params["patch_embed"]["kernel"]
    assert arrays["patch_embed.proj.weight"][5, 2, 1, 3] == kernel[1, 3, 2, 5]
    assert arrays["blocks.1.attn.in_proj_weight"].shape == (48, 16)
    fc1 = params["block_1"]["mlp"]["fc1"]["kernel"]
    assert arrays["blocks.1.mlp.0.weight"][60, 3] == fc1[3, 60]
    assert all(array.flags["C_CONTIGUOUS"] for array in arrays.values())


@pytest.mark.parametrize("fields", [{}, {"num_classes": 7, "depth": 3}])
def test_state_dict_round_trips_and_loads_strictly(torch, reference, fields):
    depth, num_classes = fields.get("depth", 2), fields.get("num_classes", 10)
    vit = reference.VisionTransformer(16, 4, num_classes, 16, depth, 2)
    params = make_params(**fields)
    vit.load_state_dict(params_to_notebook(params), strict=True)
    assert list(params_to_notebook(params)) == list(vit.state_dict())
    assert same_bits(notebook_to_params(vit.state_dict()), params)


def test_no_memory_is_shared_with_the_state_dict(torch, reference):
    """Training in PyTorch must not change the converted arrays, nor vice versa."""
    vit = reference.VisionTransformer(16, 4, 10, 16, 2, 2)
    params = notebook_to_params(vit.state_dict())
    back = params_to_notebook(params)
    kept = jax.tree.map(np.copy, params)
    with torch.no_grad():
        for tensor in [*vit.parameters(), *back.values()]:
            tensor.add_(1.0)
    assert same_bits(params, kept)
    arrays = from_params(params, NOTEBOOK)
    assert not any(np.shares_memory(a, b) for a in arrays.values() for b in jax.tree.leaves(params))


def test_other_float_types_become_float32(torch, reference):
    vit = reference.VisionTransformer(16, 4, 10, 16, 2, 2)
    half = {name: p.bfloat16() for name, p in vit.state_dict().items()}
    exact = {name: p.float() for name, p in half.items()}
    assert same_bits(notebook_to_params(half), notebook_to_params(exact))
    double = {name: p.double() for name, p in exact.items()}
    assert same_bits(notebook_to_params(double), notebook_to_params(exact))


def state_dict_with(**changes):
    """A valid state_dict of arrays, with keys replaced, or removed if the value is None."""
    arrays = from_params(make_params(), NOTEBOOK)
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {k: v for k, v in {**arrays, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    "state_dict, message",
    [
        (lambda: state_dict_with(head__bias=None), "missing head.bias"),
        (lambda: state_dict_with(cls_token=None, norm__bias=None), "missing cls_token, norm.bias"),
        (lambda: state_dict_with(head2__bias=np.zeros(3)), "unused head2.bias"),
        (lambda: state_dict_with(blocks__3__norm1__bias=np.zeros(16)), "missing blocks.2.norm1"),
        (
            lambda: state_dict_with(head__weight=np.zeros((16, 10))),
            "head.weight has shape (16, 10), expected (10, 16)",
        ),
        (
            lambda: state_dict_with(norm__weight=np.zeros(8)),
            "norm.weight has shape (8,), expected (16,)",
        ),
        (
            lambda: state_dict_with(patch_embed__proj__weight=np.zeros((16, 48))),
            "patch_embed.proj.weight has shape (16, 48), expected (16, 3, 4, 4)",
        ),
        (
            lambda: state_dict_with(pos_embed=np.zeros((1, 15, 16))),
            "pos_embed has shape (1, 15, 16)",
        ),
        (dict, "missing cls_token"),
        (lambda: {"epoch": 3, "model": state_dict_with()}, "epoch has type int"),
        (lambda: "vit.pt", "must be a state_dict, got str"),
    ],
)
def test_wrong_state_dicts_are_reported_in_one_line(state_dict, message):
    with pytest.raises(UserError) as error:
        notebook_to_params(state_dict())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_only_the_wrong_tensor_is_reported():
    for name, array in from_params(make_params(), NOTEBOOK).items():
        changed = state_dict_with() | {name: np.zeros((*array.shape, 2))}
        with pytest.raises(UserError) as error:
            notebook_to_params(changed)
        if name not in ("head.bias", "norm.weight"):
            assert str(error.value).count(" has shape ") == 1, str(error.value)
        assert f"{name} has shape {(*array.shape, 2)}" in str(error.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pool": "gap"}, "missing cls_token"),
        ({"posemb": "sincos2d"}, "missing pos_embed"),
        ({"stem": "conv"}, "unused conv_stem/conv_0/kernel"),
        ({"qk_norm": True}, "unused block_0/attn/k_norm/scale"),
        ({"layer_scale": 0.1}, "unused block_0/layer_scale1"),
        ({"mlp_dim": 32}, "block_0/mlp/fc1/kernel has shape (16, 32), expected (16, 64)"),
        ({"image_shape": (16, 16, 1)}, "patch_embed/kernel has shape (4, 4, 1, 16)"),
        ({"image_shape": (16, 32, 3)}, "pos_embed has shape (1, 33, 16)"),
    ],
)
def test_models_that_the_notebook_lacks_are_rejected(fields, message):
    with pytest.raises(UserError) as error:
        params_to_notebook(make_params(**fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_torch_only_arrays_are_available(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    params = make_params()
    with pytest.raises(UserError, match="pip install torch"):
        params_to_notebook(params)
    assert same_bits(notebook_to_params(from_params(params, NOTEBOOK)), params)
