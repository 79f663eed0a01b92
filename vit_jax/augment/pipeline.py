"""The complete augmentation of a batch, and the checks and description of its config."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.augment import draws, geometric
from vit_jax.augment.mix import mix_batch
from vit_jax.augment.policy import color_jitter, random_policy
from vit_jax.errors import UserError


def normalize(images, mean, std):
    """Normalizes uint8[B,H,W,C]: float32 (x / 255 - mean) / std, bit-equal to ToTensor, Normalize.

    Looks up a table of 256 values per channel, computed by numpy: XLA would turn the divisions by
    constants into multiplications by their reciprocals, which round differently.
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
    `mix` is a bool scalar; False omits mixup and cutmix. Labels are one-hot, smoothed as in torch
    (over all classes), then mixed. With everything off this is normalize and one-hot.

    The function raises UserError when traced with images that `check_image_shape` rejects.
    """

    def augment_batch(key, batch, *, epoch, mix=True):
        images = batch["image"]
        check_image_shape(augment, images.shape[1:])
        keys = functools.partial(draws.image_keys, key, num_images=len(images))
        # Decide on the stored image, before the crop changes its bytes.
        if augment.flip == "random":
            flip = draws.uniform(keys(draws.FLIP), 1)[:, 0] < 0.5
        elif augment.flip == "alternating":
            flip = geometric.alternating_flip(images, epoch)

        if augment.crop == "pad":
            padding, mode = augment.crop_padding, augment.crop_padding_mode
            images = geometric.pad_crop(keys(draws.CROP), images, padding, mode)
        elif augment.crop == "resized":
            scale, ratio = augment.crop_scale, augment.crop_ratio
            images = geometric.random_resized_crop(keys(draws.CROP), images, scale, ratio)
        if augment.flip != "none":
            images = jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
        if augment.policy != "none":
            images = random_policy(keys(draws.POLICY), images, augment)
        if any(augment.color_jitter):
            images = color_jitter(keys(draws.JITTER), images, augment.color_jitter)
        images = normalize(images, mean, std)
        if augment.erasing_prob > 0:
            images = geometric.random_erasing(keys(draws.ERASE), images, augment)

        labels = jax.nn.one_hot(batch["label"], num_classes, dtype=jnp.float32)
        if label_smoothing:
            labels = labels * (1 - label_smoothing) + label_smoothing / num_classes
        if not _mixes(augment) or mix is False:
            return images, labels
        return mix_batch(key, images, labels, batch["mask"], augment, mix=mix)

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
    color = {"policy": augment.policy != "none", "color_jitter": any(augment.color_jitter)}
    for name, is_on in color.items():
        if is_on and channels != 3:
            raise UserError(
                f"config.augment.{name}={augment[name]} needs RGB images, but the images have "
                f"{channels} channels: set it to {'none' if name == 'policy' else '0,0,0,0'}"
            )


def describe(augment):
    """Returns one readable line per operation that is on, in the order they are applied."""
    a, lines = augment, []

    def between(pair):
        return f"{pair[0]:.3g} to {pair[1]:.3g}"

    if a.crop == "pad":
        lines.append(f"random crop, {a.crop_padding} pixels of {a.crop_padding_mode} padding")
    elif a.crop != "none":
        source = " of the stored image" if a.crop == "decoded" else ""
        ranges = f"area {between(a.crop_scale)}, aspect {between(a.crop_ratio)}"
        lines.append(f"random resized crop{source}, {ranges}")
    if a.flip != "none":
        lines.append(f"{a.flip} horizontal flip")
    if a.policy == "randaugment":
        noise = f" +- {a.randaugment_magnitude_std:g}" if a.randaugment_magnitude_std else ""
        strength = f"magnitude {a.randaugment_magnitude:g}{noise} of 10"
        lines.append(f"RandAugment, {a.randaugment_num_ops} operations of {strength}")
    elif a.policy == "trivialaugment":
        lines.append("TrivialAugment (wide)")
    elif a.policy == "autoaugment":
        lines.append("AutoAugment (CIFAR-10 policy)")
    if any(a.color_jitter):
        names = ("brightness", "contrast", "saturation", "hue")
        on = [f"{name} {v:g}" for name, v in zip(names, a.color_jitter, strict=True) if v]
        lines.append(f"color jitter, {', '.join(on)}")
    if a.erasing_prob > 0:
        how = f"probability {a.erasing_prob:g}, area {between(a.erasing_scale)}"
        lines.append(f"random erasing with {a.erasing_mode}, {how}")
    if _mixes(a):
        alphas = {"mixup": a.mixup_alpha, "cutmix": a.cutmix_alpha}
        on = [f"{name} Beta({v:g}, {v:g})" for name, v in alphas.items() if v]
        share = f", cutmix share {a.mix_switch_prob:g}" if len(on) == 2 else ""
        how = f"probability {a.mix_prob:g}{share}"
        lines.append(f"{' or '.join(on)}, {how}, drawn per {a.mix_per}")
    return lines


def _mixes(augment):
    """Returns whether mixup or cutmix is on."""
    return augment.mix_prob > 0 and (augment.mixup_alpha > 0 or augment.cutmix_alpha > 0)
