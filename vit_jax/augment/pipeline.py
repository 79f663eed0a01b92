"""The complete augmentation of a batch, and the checks of its config."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.augment.geometric import alternating_flip, pad_crop, random_erasing
from vit_jax.augment.mix import mix_batch
from vit_jax.augment.randaugment import randaugment
from vit_jax.errors import UserError

# The number that each operation folds into the key. Never renumber: it would change every run.
_CROP, _FLIP, _POLICY, _ERASE, _MIX = 0, 1, 2, 4, 6


def normalize(images, mean, std):
    """Returns (x / 255 - mean) / std of uint8[B,H,W,C] as float32.

    It equals torchvision's ToTensor and Normalize in every bit: it looks up a table of 256 values
    per channel, computed by numpy, because XLA would turn the divisions by constants into
    multiplications by their reciprocals, which round differently. Raises UserError unless the
    images are uint8.
    """
    if images.dtype != jnp.uint8:
        raise UserError(f"normalize takes uint8 images, got {images.dtype}")
    values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    table = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    channels = images.shape[-1]
    return jnp.asarray(np.broadcast_to(table, (256, channels)))[images, jnp.arange(channels)]


def make_augment(augment, *, mean, std, num_classes, label_smoothing=0.0):
    """Builds fn(key, batch, *, epoch, mix=True) -> (float32[B,H,W,C], float32[B,num_classes]).

    `batch` is {"image": uint8[B,H,W,C], "label": int32[B], "mask": bool[B]}; rows outside the mask
    are never mixed into others. `epoch` is an int32 scalar, which only the alternating flip reads.
    `mix` is a bool scalar; false omits mixup and cutmix. Labels are one-hot, smoothed as in torch
    (over all classes), then mixed. With everything off this is normalize and one-hot.

    Image i draws each operation from a key of its own, so its draws do not depend on batch size,
    device count, or the other operations. Mixup and cutmix draw once per batch.
    """

    def augment_batch(key, batch, *, epoch, mix=True):
        images = batch["image"]

        def keys(operation):  # [B]
            operation_key = jax.random.fold_in(key, operation)
            return jax.vmap(jax.random.fold_in, (None, 0))(operation_key, jnp.arange(len(images)))

        # Decide on the stored image, before the crop changes its bytes.
        if augment.flip == "random":
            flip = jax.vmap(jax.random.bernoulli)(keys(_FLIP))
        elif augment.flip == "alternating":
            flip = alternating_flip(images, epoch)

        if augment.crop == "pad":
            images = jax.vmap(lambda k, x: pad_crop(k, x, augment))(keys(_CROP), images)
        if augment.flip != "none":
            images = jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
        if augment.policy == "randaugment":
            images = randaugment(keys(_POLICY), images, augment)
        images = normalize(images, mean, std)
        if augment.erasing_prob > 0:
            images = jax.vmap(lambda k, x: random_erasing(k, x, augment))(keys(_ERASE), images)

        labels = jax.nn.one_hot(batch["label"], num_classes, dtype=jnp.float32)
        if label_smoothing:
            labels = labels * (1 - label_smoothing) + label_smoothing / num_classes
        if augment.mix_prob > 0 and (augment.mixup_alpha > 0 or augment.cutmix_alpha > 0):
            mix_key = jax.random.fold_in(key, _MIX)
            images, labels = mix_batch(mix_key, images, labels, batch["mask"], augment, mix=mix)
        return images, labels

    return augment_batch


def check_image_shape(augment, image_shape):
    """Raises UserError if the `augment` config does not suit images of (H, W, C)."""
    height, width, channels = image_shape
    largest = min(height, width) - 1
    if augment.crop == "pad" and augment.crop_padding > largest:
        raise UserError(
            f"config.augment.crop_padding={augment.crop_padding} is too large for images of "
            f"{height}x{width} pixels: use at most {largest}"
        )
    if augment.policy != "none" and channels != 3:
        raise UserError(
            f"config.augment.policy={augment.policy} needs RGB images, but the images have "
            f"{channels} channels: set it to none"
        )
