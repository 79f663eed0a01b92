"""Augmentation on the device: (key, uint8 batch) -> float32 images and soft labels, inside jit."""

from vit_jax.augment.pipeline import (
    check_image_shape,
    describe,
    make_augment,
    normalize,
    validate,
)

__all__ = ["check_image_shape", "describe", "make_augment", "normalize", "validate"]
