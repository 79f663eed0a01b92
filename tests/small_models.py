"""Small models with random weights, for the tests of weights and exports."""

import functools

import jax
import numpy as np

from vit_jax import config
from vit_jax.inference.trained import TrainedModel
from vit_jax.model import init_params, make_model

SIZES = {"width": 24, "depth": 2, "num_heads": 3, "mlp_dim": 40, "patch_size": 4}
GOOGLE = {"gelu": "tanh", "norm_eps": 1e-6}


def random_model(num_classes=5, image_shape=(12, 12, 3), **fields):
    """(model, random float32 parameters) of a small ViT."""
    fields = {**config.defaults().model, **SIZES, **fields}
    vit = make_model(fields, num_classes=num_classes)
    rng, shapes = np.random.default_rng(0), _param_shapes(vit, image_shape)
    return vit, jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


@functools.cache
def _param_shapes(vit, image_shape):
    return jax.eval_shape(lambda key: init_params(vit, key, image_shape), jax.random.key(0))


def same_bits(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), a, b)
    )


def make_trained(image_shape=(12, 12, 3), **fields):
    """A small TrainedModel, as from vit_jax.load, with random weights."""
    c = config.defaults()
    sizes = {"width": 24, "depth": 2, "num_heads": 3, "mlp_dim": 96, "patch_size": 4}
    c.model.update(sizes | fields)
    vit, params = random_model(image_shape=image_shape, **sizes | fields)
    pixels = {"divide_by": 255, "mean": list(c.data.mean), "std": list(c.data.std)}
    return TrainedModel(
        vit,
        params,
        c,
        step=3,
        class_names=list("abcde"),
        preprocessing=pixels,
        image_shape=list(image_shape),
    )


def save_tensors(path, tensors):
    """Writes a .npz or .safetensors and returns its path."""
    from safetensors.numpy import save_file

    save_file(tensors, path) if path.suffix == ".safetensors" else np.savez(path, **tensors)
    return path


def random_images(count, shape=(12, 12, 3)):
    """uint8[count, *shape]."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
