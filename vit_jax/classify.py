"""A loaded model on images of any size: uint8 pixels in, logits and attention maps out."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import augment, data, mesh
from vit_jax import model as model_lib
from vit_jax.errors import UserError


def prepare(image, image_shape):
    """uint8[h, w, 3] RGB of any size -> uint8[H, W, C] as the model takes it.

    The largest central part of the model's shape, resized: what `config.data.image_size` does to
    the images of training. One of that shape already stays bit for bit what it is.
    """
    H, W, C = image_shape
    if C not in (1, 3):
        raise UserError(f"the model takes images of {C} channels, an image file has 3")
    image = data.center_crop_resize(image, H, W)
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if C == 1 else image


def make_classify(loaded, *, batch_size=64, attention=False):
    """classify(uint8[N, H, W, C]) -> float32[N, classes] logits, for what `vit_jax.load` gave.

    N is any number: batches of one size go through all devices. With `attention` it returns
    (logits, maps), maps float32[N, L, h, tokens, tokens] caught on their way through the same
    forward pass, layer by layer.
    """
    model, params, config = loaded
    the_mesh = mesh.make_mesh(0, 1)
    batch_size += -batch_size % the_mesh.size
    everywhere, rows = mesh.replicated(the_mesh), mesh.batch_sharding(the_mesh)

    @jax.jit
    def forward(params, images):
        x = augment.normalize(images, config.data.mean, config.data.std)
        if not attention:
            return model.apply({"params": params}, x)
        logits, caught = model.apply({"params": params}, x, mutable="intermediates")
        blocks = [caught["intermediates"][f"block_{i}"] for i in range(model.depth)]
        return logits, jnp.stack([block["attn"]["attention"][0] for block in blocks], axis=1)

    params = jax.device_put(params, everywhere)

    def classify(images):
        parts = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            padded = np.zeros((batch_size, *batch.shape[1:]), np.uint8)
            padded[: len(batch)] = batch
            out = forward(params, jax.device_put(padded, rows))
            parts.append(jax.device_get(out))
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(images)], *parts)

    return classify


def patch_grid(loaded):
    """(rows, columns) of the model's patches."""
    return model_lib.patch_grid(loaded.model, loaded.image_shape)
