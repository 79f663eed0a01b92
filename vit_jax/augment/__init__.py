"""Augmentation on the device: (key, uint8 batch) -> float32 images and soft labels, inside jit.

Everything is off by default and is switched on by the `augment` group of the config. The order is
fixed: crop, flip, policy, color jitter (uint8 up to here), normalize, erasing, mixup or cutmix.

Image i of the global batch draws each operation from its own key, fold_in(fold_in(key, the
operation's number), i). Images therefore share no draws, and an image's draws do not depend
on batch size, device count, or the other operations. Only mixup and cutmix
with `mix_per = "batch"` draw once per batch.
"""

from vit_jax.augment.decoded import make_crop
from vit_jax.augment.pipeline import (
    check_image_shape,
    describe,
    make_augment,
    normalize,
)

__all__ = ["check_image_shape", "describe", "make_augment", "make_crop", "normalize"]
