"""Corruptions against implementations of other libraries, and the errors of a trained model."""

import cv2
import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from tensorflow_datasets.image_classification import corruptions as tfds_corruptions

import vit_jax
from vit_jax.data import open_split
from vit_jax.data.shapes10 import draw
from vit_jax.errors import UserError
from vit_jax.inference.corruptions import SEVERITIES, corrupt, corruption_errors

IMAGES = draw(np.arange(12) % 10, np.random.default_rng(0))


def difference(a, b):
    return np.abs(a.astype(float) - np.asarray(b).astype(float)).max()


def test_severities_of_imagenet_are_those_of_tfds():
    """TFDS rounds to the nearest pixel, Hendrycks and Dietterich's code for CIFAR-10-C down."""
    for severity in range(1, 6):
        value = SEVERITIES["contrast"][1][severity - 1]
        expected = [tfds_corruptions.contrast(image, severity) for image in IMAGES]
        assert difference(corrupt(IMAGES, "contrast", value), expected) <= 1
        for kind in ("gaussian_noise", "shot_noise"):
            np.random.seed(0)
            gray = np.full((1, 256, 256, 3), 128, np.uint8)
            expected = getattr(tfds_corruptions, kind)(gray[0], severity)
            got = corrupt(gray, kind, SEVERITIES[kind][1][severity - 1])
            assert got.std() == pytest.approx(expected.std(), rel=0.02)
            assert got.mean() == pytest.approx(expected.mean(), abs=1)


@pytest.mark.parametrize("sigma", SEVERITIES["gaussian_blur"][0] + SEVERITIES["gaussian_blur"][1])
def test_blur_is_that_of_opencv(sigma):
    size = 2 * int(4 * sigma + 0.5) + 1
    border = cv2.BORDER_REPLICATE
    floats = IMAGES.astype(np.float32)
    expected = [cv2.GaussianBlur(x, (size, size), sigma, borderType=border) for x in floats]
    assert difference(corrupt(IMAGES, "gaussian_blur", sigma), expected) <= 1


@pytest.mark.parametrize("value", SEVERITIES["brightness"][0])
def test_brightness_is_added_in_hsv(value):
    hsv = rgb_to_hsv(IMAGES / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + value, 0, 1)
    expected = np.uint8(hsv_to_rgb(hsv) * 255)
    assert difference(corrupt(IMAGES, "brightness", value), expected) <= 1


def test_pixelate_averages_and_repeats():
    blocks = IMAGES.reshape(-1, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    expected = blocks.repeat(2, axis=1).repeat(2, axis=2)
    assert difference(corrupt(IMAGES, "pixelate", 0.5), expected) <= 1


@pytest.mark.parametrize("quality", SEVERITIES["jpeg"][0])
def test_jpeg_is_that_of_opencv(quality):
    gray = IMAGES.mean(axis=-1, keepdims=True).astype(np.uint8)
    encoded = [cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for x in gray]
    expected = [cv2.imdecode(x, cv2.IMREAD_GRAYSCALE)[..., None] for x in encoded]
    assert difference(corrupt(gray, "jpeg", quality), expected) <= 2


@pytest.mark.parametrize("kind", SEVERITIES)
def test_higher_severity_changes_images_more(kind):
    for values in SEVERITIES[kind]:
        changes = [np.abs(corrupt(IMAGES, kind, v) - IMAGES.astype(float)).mean() for v in values]
        assert 0 < changes[0] < changes[-1] and changes == sorted(changes)


def test_streamed_split_is_refused(tiny_run, tiny_folder):
    stream = open_split(f"folder:{tiny_folder}", "test", streaming=True)
    with pytest.raises(UserError, match=r"with config\.data\.streaming=false"):
        corruption_errors(vit_jax.load(tiny_run), stream)
