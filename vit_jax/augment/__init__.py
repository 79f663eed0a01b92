"""Augmentation: (key, uint8 batch) -> float32 images and soft labels, on the device, inside jit.

Everything is off by default. The order is fixed: crop, flip, policy (uint8 up to here), normalize,
erasing, mixup or cutmix. The crop of `crop = "resized"` is the exception: it runs on the host.
"""

from vit_jax.augment.geometric import make_crop
from vit_jax.augment.pipeline import check_image_shape, make_augment, normalize
