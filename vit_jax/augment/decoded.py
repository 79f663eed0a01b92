"""The random crop of a streamed image, on the host, before it is resized for the device."""

from collections.abc import Callable

import numpy as np

from vit_jax.augment.geometric import random_boxes


def make_crop(augment, *, size: int, seed: int, steps_per_epoch: int) -> Callable | None:
    """Returns the `crop` of `data.Stream.batches` for augment.crop = "decoded", else None.

    Equals torchvision's RandomResizedCrop, for images of any size. The box is a function of (seed,
    epoch, index) only.
    """
    if augment.crop != "decoded":
        return None

    def crop(image, step, index):
        import cv2

        # The data order uses the low end of the counter; these words do not overlap it.
        words = np.random.Philox(key=[seed, step // steps_per_epoch], counter=[0, 0, index + 1, 0])
        uniform = (words.random_raw(40) >> np.uint64(11)) * 2.0**-53
        uniform = uniform.reshape(10, 4).T.reshape(1, 40)
        boxes = random_boxes(uniform, *image.shape[:2], augment.crop_scale, augment.crop_ratio)
        top, left, height, width = (int(side[0]) for side in boxes)
        image = image[top : top + height, left : left + width]
        method = cv2.INTER_AREA if height * width > size * size else cv2.INTER_LINEAR
        return cv2.resize(image, (size, size), interpolation=method).reshape(size, size, -1)

    return crop
