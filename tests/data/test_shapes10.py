"""shapes10: the same bits everywhere, balanced, no duplicates, hard for a linear classifier."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from vit_jax.data import shapes10

# SHA-256 of the images of each split in draw_split's order; a new value is a new dataset version.
SHA256 = {
    "train": "75bdf7b6709a280e50d9d3bea4daf7a6f6dd586b63308c7a0c29e2828ff0ba37",
    "test": "6bfa1bc7a03ad6a66598ab862c64b55ff7261a32ed3cd18b515b2020efd8bc55",
}


@pytest.fixture(scope="module")
def splits():
    """{"train": (images, labels), "test": (images, labels)} at full size."""
    return {split: shapes10.draw_split(split) for split in shapes10.SPLIT_SIZES}


@pytest.fixture
def small(monkeypatch):
    """Reduces the splits to 300 and 100 images, to prepare them quickly."""
    monkeypatch.setattr(shapes10, "SPLIT_SIZES", {"train": 300, "test": 100})


def prepared(data_dir, split):
    """Prepares shapes10 under `data_dir`; returns images and labels of `split` in file order."""
    builder = shapes10.Shapes10(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    rows = list(builder.as_data_source(split))
    return np.stack([row["image"] for row in rows]), np.array([row["label"] for row in rows])


@pytest.mark.parametrize("split", ["train", "test"])
def test_known_bits(splits, split):
    images, _ = splits[split]
    assert images.shape == (shapes10.SPLIT_SIZES[split], 32, 32, 3)
    assert images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest() == SHA256[split]


def test_every_class_is_equally_frequent(splits):
    for images, labels in splits.values():
        np.testing.assert_array_equal(np.bincount(labels), [len(images) // 10] * 10)


def test_no_image_occurs_twice_within_or_across_splits(splits):
    seen = [image.tobytes() for images, _ in splits.values() for image in images]
    assert len(set(seen)) == len(seen) == 22_000


def test_shape_is_brighter_or_darker(splits):
    """Discs cover the center, where both signs of contrast are common."""
    images, labels = splits["test"]
    discs = images[labels == shapes10.NAMES.index("disc")].astype(np.float32).mean(-1)
    brighter = discs[:, 12:20, 12:20].mean((1, 2)) > discs[:, [0, -1]].mean((1, 2))
    assert 0.5 < brighter.mean() < 0.7


def test_linear_classifier_stays_under_60_percent(splits):
    """Ridge regression on standardized pixels: above chance (10%), well under 60%.

    Trained on 5,000 images, it reaches 34%; on all 20,000, 38%. These numbers cannot change
    unless test_known_bits fails.
    """
    (x, y), (x_test, y_test) = splits["train"], splits["test"]
    x, y = x[:5000], y[:5000]
    x, x_test = x.reshape(len(x), -1), x_test.reshape(len(x_test), -1)
    mean, std = x.mean(0, dtype=np.float32), x.std(0, dtype=np.float32)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    targets = np.eye(10, dtype=np.float32)[y] - 0.1
    weights = np.linalg.solve(x.T @ x + 1e5 * np.eye(3072, dtype=np.float32), x.T @ targets)
    accuracy = np.mean((x_test @ weights).argmax(1) == y_test)
    assert 0.2 < accuracy < 0.6


def test_draw_depends_on_labels_and_generator():
    labels = np.array([3, 3, 7])
    first, again, other = (
        shapes10.draw(labels, np.random.Generator(np.random.Philox(seed))) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


@pytest.mark.usefixtures("small")
def test_prepared_data_equals_drawn_data_each_time(tmp_path):
    images, labels = prepared(tmp_path / "a", "train")
    images_b, labels_b = prepared(tmp_path / "b", "train")
    np.testing.assert_array_equal(images, images_b)
    np.testing.assert_array_equal(labels, labels_b)
    drawn = {
        image.tobytes(): label for image, label in zip(*shapes10.draw_split("train"), strict=True)
    }
    assert {image.tobytes(): label for image, label in zip(images, labels, strict=True)} == drawn


@pytest.mark.usefixtures("small")
def test_file_order_is_shuffled(tmp_path):
    _, labels = prepared(tmp_path, "test")
    assert (labels != np.arange(100) % 10).mean() > 0.5


def test_needs_neither_tensorflow_nor_network(tmp_path):
    script = f"""
import socket, sys
def offline(*args, **kwargs):
    raise AssertionError("network used")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = offline
import tensorflow_datasets as tfds
from vit_jax.data import shapes10
shapes10.SPLIT_SIZES = {{"train": 20, "test": 10}}
builder = tfds.builder("shapes10", data_dir={str(tmp_path)!r}, file_format="array_record")
builder.download_and_prepare()
info = builder.info
assert tuple(info.features["label"].names) == shapes10.NAMES
assert info.splits["train"].num_examples == 20 and str(info.version) == "1.0.0"
assert info.supervised_keys == ("image", "label")
assert builder.as_data_source("test")[0]["image"].shape == (32, 32, 3)
repr(info), info.citation
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
