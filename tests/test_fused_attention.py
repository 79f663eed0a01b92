"""cuDNN's fused attention: where the model uses it, what it refuses, and its program on an H100."""

import functools

import gpu_helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import config as config_lib
from vit_jax.errors import UserError
from vit_jax.experiment import make_experiment
from vit_jax.model import VisionTransformer, check_image_shape, init_params

IMAGES = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
SMALL = dict(num_classes=5, patch_size=4, width=32, depth=2, num_heads=4, mlp_dim=64, pool="gap")
CUDNN = {"model.attention": "cudnn", "model.dtype": "bfloat16", "model.pool": "gap"}


def loss_and_grads(model, params, *, train):
    """((sum of sines of the logits, logits), gradients)."""

    def loss(params):
        logits = model.apply({"params": params}, IMAGES, train=train)
        return jnp.sin(logits).sum(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def errors(model, fused, *, train):
    """Largest error of the fused model's logits, and of its gradients relative to the largest."""
    params = init_params(model, jax.random.key(0), IMAGES.shape[1:])
    (_, logits), grads = loss_and_grads(model, params, train=train)
    (_, fused_logits), fused_grads = loss_and_grads(fused, params, train=train)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max() / scale, grads, fused_grads)
    return np.abs(logits - fused_logits).max(), max(jax.tree.leaves(differences))


@pytest.mark.parametrize("pool", ["gap", "cls"])
def test_training_passes_the_same_queries_keys_and_values(monkeypatch, pool):
    calls = []

    def attention(q, k, v, *, implementation):
        calls.append(implementation)
        return original(q, k, v, implementation="xla")

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    plain = VisionTransformer(**SMALL | {"pool": pool})
    logits, grads = errors(plain, plain.clone(attention="cudnn"), train=True)
    assert logits < 1e-5 and grads < 1e-5
    assert calls == ["cudnn"] * (2 if pool == "gap" else 1)  # not for the class token alone


def test_evaluation_and_attention_maps_use_the_plain_path():
    plain = VisionTransformer(**SMALL)
    assert errors(plain, plain.clone(attention="cudnn"), train=False) == (0, 0)


@pytest.mark.parametrize(
    "field", [{"model.dtype": "float32"}, {"model.dropout": 0.1}, {"model.num_heads": 64}]
)
def test_dtype_dropout_and_width_of_a_head_are_checked(field):
    c = config_lib.defaults()
    for name, value in (CUDNN | field).items():
        config_lib.set_field(c, name, value)
    with pytest.raises(UserError, match=r"attention=cudnn needs model.dtype=bfloat16"):
        config_lib.validate(c)


def test_odd_number_of_tokens_is_refused():
    model = VisionTransformer(**SMALL | {"pool": "cls"}, attention="cudnn")
    with pytest.raises(UserError, match="needs an even number of tokens, not 17: use"):
        check_image_shape(model, (16, 16, 3))


def cudnn_config(tiny_config):
    for name, value in CUDNN.items():
        config_lib.set_field(tiny_config, name, value)
    return tiny_config


def test_cpu_is_refused(tiny_config):
    with pytest.raises(UserError, match=r"compute capability 8.0 or higher \(Ampere\), not cpu"):
        make_experiment(cudnn_config(tiny_config), devices=jax.devices("cpu")[:1])


@pytest.fixture
def compile_step(require, tiny_config):
    require("gpu_check", gpu_helpers.INSTALLED, gpu_helpers.REMEDY)
    compiled = functools.partial(gpu_helpers.compile_recipe, shape="16x16x3x3", examples=90)
    return lambda target: compiled(cudnn_config(tiny_config), target)


@pytest.mark.gpu_check
def test_gpu_before_ampere_is_refused(compile_step):
    with pytest.raises(UserError, match="not Tesla T4"):
        compile_step("t4")


@pytest.mark.gpu_check
@pytest.mark.parametrize("target", ["h100", "h100x8"])
def test_program_has_one_kernel_a_block_and_direction(compile_step, target):
    experiment, compiled = compile_step(target)
    program = gpu_helpers.Program(compiled.as_text())
    kernels = [k for k in program.kernels if "__cudnn$fmha" in k.instruction.attributes]
    assert len(kernels) == 2 * experiment.model.depth
    N, D = 16, experiment.model.width
    work = 2 * 7 * (16 // experiment.mesh.size) * N * N * D * experiment.model.depth
    assert sum(k.flops["bf16"] for k in kernels) == work  # 2 products forward, 5 backward


def test_logits_and_gradients_on_a_gpu(require):
    require("gpu", jax.default_backend() == "gpu", "this test needs a GPU")
    plain = VisionTransformer(**SMALL, dtype=jnp.dtype("bfloat16"))
    logits, grads = errors(plain, plain.clone(attention="cudnn"), train=True)
    assert 0 < logits < 0.02 and 0 < grads < 0.02
