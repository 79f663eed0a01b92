"""Split specifications, data directories, and imported modules."""

import subprocess
import sys

import numpy as np
import pytest
from data_helpers import cache_file, check_tiny, user_error

from vit_jax.data import open_split


def test_subsplits(tiny, monkeypatch):
    whole = open_split("tiny", "train", data_dir=tiny)
    for split, part in [
        ("train[:450]", slice(0, 450)),
        ("train[450:]", slice(450, 600)),
        ("train[:80%]", slice(0, 480)),
        ("train[-3:]", slice(597, 600)),
    ]:
        dataset = open_split("tiny", split, data_dir=tiny)
        np.testing.assert_array_equal(dataset.images, whole.images[part])
        np.testing.assert_array_equal(dataset.labels, whole.labels[part])
        assert dataset.images.base.size == whole.images.size  # a view of the whole split
    both = open_split("tiny", "test+train[:2]", data_dir=tiny)
    test = open_split("tiny", "test", data_dir=tiny)
    np.testing.assert_array_equal(both.images, [*test.images, *whole.images[:2]])
    np.testing.assert_array_equal(both.labels, [*test.labels, *whole.labels[:2]])


@pytest.mark.parametrize("split", ["vall", "train[", "", "train[:601]", "train[5:5]"])
def test_invalid_split(split, tiny):
    user_error("tiny", split, data_dir=tiny, says=[repr(split), "train (600", "test (8"])


def test_data_dir_precedence_is_argument_environment_home(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny))
    check_tiny(open_split("tiny", "test"), 8)
    open_split("tiny", "test", data_dir=tmp_path / "argument")
    assert cache_file(tmp_path / "argument", "test").exists()
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_split("tiny", "test")
    assert cache_file(tmp_path / "home" / "tensorflow_datasets", "test").exists()


def test_importing_is_lightweight():
    code = (
        "import sys, vit_jax.data;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'jax', 'cv2'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
