"""Error on corrupted images: seven corruptions at five severities.

Severities follow Hendrycks and Dietterich (arXiv 1903.12261): CIFAR-10-C for images of at most 64
pixels per side, otherwise ImageNet-C. The evaluated split is corrupted here, so errors are not
comparable with errors on the published images.
"""

import io

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.inference.classify import class_numbers, make_classify

# Kind -> values at severities 1 to 5, for CIFAR-10-C and for ImageNet-C.
SEVERITIES = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}


def corrupt(images, kind, value):
    """Returns uint8[N, H, W, C] images with a corruption of SEVERITIES, at one of its values."""
    if per_image := {"pixelate": _pixelate, "jpeg": _jpeg}.get(kind):
        return np.stack([per_image(image, value) for image in images])
    x, rng = images / np.float32(255), np.random.default_rng(0)
    if kind == "gaussian_noise":
        x = x + rng.normal(0, value, x.shape)
    elif kind == "shot_noise":
        x = rng.poisson(x * value) / value
    elif kind == "gaussian_blur":
        x = gaussian_filter(x, (0, value, value, 0), mode="nearest")
    elif kind == "contrast":
        means = x.mean(axis=(1, 2), keepdims=True)
        x = (x - means) * value + means
    else:  # the V of HSV
        largest = x.max(axis=-1, keepdims=True)
        brighter = np.minimum(largest + value, 1)
        x = np.where(largest > 0, x * brighter / np.maximum(largest, 1e-6), brighter)
    return np.uint8(np.clip(x, 0, 1) * 255)


def _pixelate(image, scale):
    picture, (H, W, _) = Image.fromarray(image.squeeze()), image.shape
    small = picture.resize((int(W * scale), int(H * scale)), Image.Resampling.BOX)
    return np.asarray(small.resize((W, H), Image.Resampling.BOX)).reshape(image.shape)


def _jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(image.shape)


def corruption_errors(trained, examples):
    """Returns a TrainedModel's errors as {kind: [error at severity 1, ..., 5]}.

    `examples` are from `classify.load_examples`. Raises UserError if they are streamed.
    """
    if isinstance(examples, data.Stream):
        raise UserError(
            "--corruptions needs all images in memory, but this run streams its data: use a run "
            "with config.data.streaming=false"
        )
    classify = make_classify(trained, batch_size=trained.config.eval_batch_size)
    labels = class_numbers(trained, examples)[examples.labels]

    def error(images):
        return float(np.mean(classify(images).argmax(axis=1) != labels))

    large = max(trained.image_shape[:2]) > 64
    return {
        kind: [error(corrupt(examples.images, kind, value)) for value in severities[large]]
        for kind, severities in SEVERITIES.items()
    }
