"""Resident splits: the cache, and real CIFAR-10."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_helpers import cache_file, check_tiny, record_file, user_error

from vit_jax.data import images, open_split, resident
from vit_jax.data import tfds as tfds_module

REPO = Path(__file__).resolve().parents[2]

TFDS_DATA_DIR = os.environ.get("TFDS_DATA_DIR")  # as passed to pytest; the tests unset it


def test_cache_is_used(tiny, monkeypatch):
    first = open_split("tiny", "train", data_dir=tiny)
    monkeypatch.setattr(resident, "_decode", None)
    again = open_split("tiny", "train[0:]", data_dir=tiny)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)
    left = [p.name for p in cache_file(tiny).parent.iterdir() if "vit_jax" in p.name]
    assert left == ["vit_jax_train_uint8.npz"]


def test_changed_files_are_decoded_again(tiny):
    open_split("tiny", "test", data_dir=tiny)
    path = record_file(tiny, "test")
    os.utime(path, ns=(0, 0))
    with np.load(cache_file(tiny, "test")) as cache:
        arrays = dict(cache)
    arrays["images"] = arrays["images"] * 0
    np.savez(cache_file(tiny, "test"), **arrays)
    check_tiny(open_split("tiny", "test", data_dir=tiny), 8)
    with np.load(cache_file(tiny, "test")) as cache:
        assert cache["images"].any()


def test_corrupted_cache(tiny):
    open_split("tiny", "train", data_dir=tiny)
    path = cache_file(tiny)
    good = path.read_bytes()
    flips = []
    for place in (len(good) // 2, len(good) // 3, good.index(b"fingerprint") + 200):
        flips.append(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
    for bad in (b"", b"no zip at all", good[: len(good) // 2], good[:-10], *flips):
        path.write_bytes(bad)
        user_error(
            "tiny", "train", data_dir=tiny, says=[path, "delete it to decode the images again"]
        )
    path.write_bytes(good)
    with np.load(path) as cache:
        arrays = dict(cache)
    for change in (
        {"images": arrays["images"][:-1]},
        {"images": arrays["images"].astype(np.float32)},
        {"labels": arrays["labels"][:, None]},
        {"labels": arrays["labels"].astype(np.int64)},
        {"labels": np.array([None] * 600)},
    ):
        np.savez(path, **{**arrays, **change})
        user_error(
            "tiny", "train", data_dir=tiny, says=[path, "delete it to decode the images again"]
        )
    path.unlink()
    check_tiny(open_split("tiny", "train", data_dir=tiny), 600)


def test_read_only_dataset_is_cached_in_the_user_cache(tiny, user_cache, monkeypatch):
    version = tiny / "tiny" / "1.0.0"
    version.chmod(0o555)
    test = open_split("tiny", "test", data_dir=tiny)
    check_tiny(test, 8)
    (cache,) = user_cache.glob("tiny-1.0.0-*/vit_jax_test_uint8.npz")
    assert str(cache.parent) in test.source and not cache_file(tiny, "test").exists()
    monkeypatch.setattr(resident, "_decode", None)
    check_tiny(open_split("tiny", "test", data_dir=tiny), 8)


def test_full_disk_leaves_no_files_behind(tiny, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    user_error("tiny", "test", data_dir=tiny, says=["No space left", cache_file(tiny, "test")])
    assert not list((tiny / "tiny" / "1.0.0").glob("*vit_jax*"))
    assert not list((tiny / "tiny" / "1.0.0").glob(".*"))


def test_two_processes_write_the_cache_concurrently(tiny):
    code = (
        "import sys, vit_jax.data as d; x = d.open_split('tiny', 'train', data_dir=sys.argv[1]);"
        "assert x.images.shape == (600, 8, 8, 3); print(x.images.sum())"
        ";heavy = {'tensorflow', 'jax'} & set(sys.modules); assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, str(tiny)]
    runs = [subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE) for _ in range(2)]
    sums = {run.communicate(timeout=60)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert sums == {b"%d\n" % open_split("tiny", "train", data_dir=tiny).images.sum()}
    assert not list((tiny / "tiny" / "1.0.0").glob(".*"))


def test_undecodable_image_is_an_error_and_leaves_no_cache(folder, user_cache):
    bad = folder / "cat" / "1.png"
    bad.write_bytes(b"GIF89a, but nothing else")
    for split in ("train", "train[:3]"):  # whether or not the part contains it
        user_error(f"folder:{folder}", split, says=[bad, "not a usable image", "fix or remove it"])
    assert not list(user_cache.rglob("*.npz"))


def test_files_of_killed_writers_are_removed(tiny):
    cache = cache_file(tiny)
    left = cache.with_name(f".{cache.name}.0123.tmp")
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    young = cache.with_name(f".{cache.name}.4567.tmp")
    young.write_bytes(b"another is writing")
    open_split("tiny", "train", data_dir=tiny)
    assert cache.exists() and young.exists() and not left.exists()


def test_cifar10(tmp_path, monkeypatch):
    """Each image is decoded once, and read from the cache afterwards."""
    places = [TFDS_DATA_DIR, REPO.parent / "shared" / "tfds"]
    found = [p for p in places if p and list(Path(p).glob("cifar10/*/dataset_info.json"))]
    if not found:
        pytest.skip("no prepared cifar10 in TFDS_DATA_DIR or ../shared/tfds")
    version = next(Path(found[0]).glob("cifar10/*/dataset_info.json")).parent
    copy = tmp_path / "tfds" / "cifar10" / version.name
    copy.mkdir(parents=True)  # of symlinks, so that the cache is in tmp_path
    for path in version.iterdir():
        if "vit_jax" not in path.name:
            (copy / path.name).symlink_to(path)
    decoded = []

    def decode_image(encoded, channels, where):
        decoded.append(where)
        return images.decode_image(encoded, channels, where)

    monkeypatch.setattr(tfds_module, "decode_image", decode_image)
    for _ in range(2):
        test = open_split("cifar10", "test", data_dir=tmp_path / "tfds")
    assert len(decoded) == 10_000 + 1 and len(set(decoded)) == 10_000  # twice: the first image
    means = test.images.mean((0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.494214, 0.485131, 0.450409], atol=1e-6)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert test.images.shape == (10_000, 32, 32, 3) and test.class_names[3] == "cat"
    stored = tfds.builder("cifar10", data_dir=tmp_path / "tfds").as_data_source("test")
    np.testing.assert_array_equal(test.images[777], stored[777]["image"])
