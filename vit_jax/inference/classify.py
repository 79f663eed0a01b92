"""Classification of images of any size: uint8 pixels in, logits and attention maps out."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import augment, data
from vit_jax.errors import UserError
from vit_jax.model import resolution
from vit_jax.parallel import mesh as mesh_lib


def prepare(image, image_shape):
    """Crops and resizes uint8[h, w, 3] RGB of any size to the model's uint8[H, W, C].

    Takes the largest centered crop of the model's aspect ratio, as `config.data.image_size` does in
    training. An image that already has the model's shape is returned unchanged. Raises UserError
    for a model that takes neither 1 nor 3 channels.
    """
    H, W, C = image_shape
    if C not in (1, 3):
        raise UserError(f"the model takes images with {C} channels; image files have 3")
    image = data.center_crop_resize(image, H, W)
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if C == 1 else image


def make_classify(trained, *, batch_size=64, attention=False):
    """Returns classify(uint8[N, H, W, C]) -> float32[N, classes] logits, for any N.

    Images run in batches of one size over all devices. With `attention`, classify returns (logits,
    maps): maps is float32[N, L, h, tokens, tokens], the attention of every layer and head, taken
    from the same forward pass.

    Args:
      trained: a TrainedModel.
      batch_size: images per batch, rounded up to a multiple of the device count.
      attention: whether to return attention maps.
    """
    model, params, config = trained
    mesh = mesh_lib.make_mesh(0, 1)
    batch_size += -batch_size % mesh.size
    params = jax.device_put(params, mesh_lib.replicated(mesh))

    @jax.jit
    def forward(params, images):
        x = augment.normalize(images, config.data.mean, config.data.std)
        if not attention:
            return model.apply({"params": params}, x)
        logits, state = model.apply({"params": params}, x, mutable="intermediates")
        blocks = [state["intermediates"][f"block_{i}"] for i in range(model.depth)]
        return logits, jnp.stack([block["attn"]["attention"][0] for block in blocks], axis=1)

    def classify(images):
        outputs = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            padded = np.zeros((batch_size, *batch.shape[1:]), np.uint8)
            padded[: len(batch)] = batch
            padded = jax.device_put(padded, mesh_lib.batch_sharding(mesh))
            outputs.append(jax.device_get(forward(params, padded)))
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(images)], *outputs)

    return classify


def patch_grid(trained):
    """Returns (rows, columns) of the model's patches."""
    H, W, _ = resolution(trained.model, trained.image_shape)
    return H // trained.model.patch_size, W // trained.model.patch_size
