"""TFDS: records, preparation, and every kind of corruption."""

import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from data_helpers import URL, Tiny, cache_file, check_tiny, record_file, user_error

from vit_jax.data import open_split, shapes10
from vit_jax.data import tfds as tfds_module


def test_array_record(tiny):
    train, test = (open_split("tiny", split, data_dir=tiny) for split in ("train", "test"))
    check_tiny(train, 600)
    check_tiny(test, 8)
    stored = tfds.builder("tiny", data_dir=tiny).as_data_source("train")
    for i in (0, 255, 256, 599):  # TFDS's own order, across the threads' blocks
        np.testing.assert_array_equal(train.images[i], stored[i]["image"])
        assert train.labels[i] == stored[i]["label"]
    assert "tiny/1.0.0 (array_record)" in train.source and "\n" not in train.source
    assert f"cached in {cache_file(tiny).parent}" in train.source


def test_tfrecord_equals_array_record(tiny_tfrecord, prepared):
    train = open_split("tiny:1.0.0", "train", data_dir=tiny_tfrecord)
    check_tiny(train, 600)
    assert "(tfrecord)" in train.source
    same = tfds.builder("tiny", data_dir=prepared).as_data_source("train")
    np.testing.assert_array_equal(train.images[300], same[300]["image"])


def test_channels(tmp_path):
    check_tiny(open_split("gray", "test", data_dir=tmp_path), 8, channels=1)
    user_error("alpha", "test", data_dir=tmp_path, says=["1 or 3 channels"])


def test_prepared_data_needs_no_network(tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    check_tiny(open_split("tiny", "train", data_dir=tiny), 600)
    check_tiny(open_split("tiny", "test", data_dir=tiny / "elsewhere"), 8)  # including preparation


def test_dataset_without_labels(tmp_path):
    user_error("unlabeled", "train", data_dir=tmp_path, says=["class label", "it has image"])


def test_undecodable_image(tmp_path):
    says = ["record", "broken-test.array_record", "not a file of JPEG, PNG"]
    user_error("broken", "test", data_dir=tmp_path, says=says)


def test_label_outside_the_classes(tiny, monkeypatch):
    monkeypatch.setattr(Tiny, "names", ["ant", "bee"])
    (tiny / "tiny" / "1.0.0" / "label.labels.txt").write_text("ant\nbee\n")
    labels = [e["label"] for e in tfds.builder("tiny", data_dir=tiny).as_data_source("test")]
    index = next(i for i, label in enumerate(labels) if label > 1)
    says = [f"record {index} of", f"label {labels[index]}", "0 to 1"]
    user_error("tiny", "test", data_dir=tiny, says=says)
    assert not cache_file(tiny, "test").exists()


@pytest.mark.parametrize("files", ["tiny", "tiny_tfrecord"])
def test_corrupted_records(files, request):
    directory = request.getfixturevalue(files)
    path = record_file(directory)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[150_000 if files == "tiny" else 70_000] ^= 1
    short = good[: good.rindex(b"image") - 40]
    for bad in (good[: len(good) // 2], good[:-3], short, bytes(flipped), b""):
        path.write_bytes(bad)
        message = user_error(
            "tiny", "train", data_dir=directory, says=[path, "prepare the dataset"]
        )
        if files == "tiny_tfrecord" and bad == bytes(flipped):
            assert "checksum mismatch" in message
    path.unlink()
    user_error("tiny", "train", data_dir=directory, says=[path])
    assert not cache_file(directory).exists()
    path.write_bytes(record_file(directory, "test").read_bytes())
    user_error("tiny", "train", data_dir=directory, says=[path, "8 of 600"])
    path.write_bytes(good)
    check_tiny(open_split("tiny", "train", data_dir=directory), 600)


def test_corrupted_dataset_info(tiny):
    (tiny / "tiny" / "1.0.0" / "dataset_info.json").write_text('{"name": "ti')
    user_error("tiny", "train", data_dir=tiny, says=["'tiny'", tiny])


def test_unknown_name_suggests_the_nearest(tmp_path):
    user_error("cifar11", "train", data_dir=tmp_path, says=["'cifar11'", "'cifar10'", tmp_path])
    user_error("shape10", "train", data_dir=tmp_path, says=["'shapes10'"])
    user_error("tiny:9.9.9", "train", data_dir=tmp_path, says=["9.9.9"])


WAYS = ["TFDS_DATA_DIR", "--config.data.dir", "'vit-jax[prepare]'"]
WAYS += ["python -m vit_jax.main --config shapes10_vit"]


def test_missing_dataset_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_module.importlib.util, "find_spec", lambda name: None)
    start = time.monotonic()
    says = ["cifar10/3.0.2", tmp_path, "TensorFlow", *WAYS]
    user_error("cifar10", "train", data_dir=tmp_path, says=says)
    assert time.monotonic() - start < 60


def test_missing_dataset_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_module.importlib.util, "find_spec", lambda name: True)
    refused = [URL, "cannot be reached", "Connection refused", tmp_path, *WAYS]
    user_error("online", "train", data_dir=tmp_path, says=refused)

    def no_name_server(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_name_server)
    start = time.monotonic()
    says = ["www.cs.toronto.edu", "cannot be reached", *WAYS]
    user_error("cifar10", "train", data_dir=tmp_path, says=says)
    assert time.monotonic() - start < 60  # TFDS itself retries for 3.5 minutes


def test_preparation_failure_in_child_process_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_module.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(requests, "get", lambda url, **options: SimpleNamespace(close=list))
    # The child process does not import this test's builder.
    user_error("online", "train", data_dir=tmp_path, says=["neither TFDS nor", tmp_path, *WAYS])


def test_failing_generator(tmp_path):
    user_error("fails", "train", data_dir=tmp_path, says=["the generator broke", tmp_path])


def test_dataset_prepared_first_by_another_process(tmp_path, monkeypatch):
    prepare = tfds_module._prepare

    def too_late(*args):
        prepare(*args)
        raise FileExistsError("it was there already")

    monkeypatch.setattr(tfds_module, "_prepare", too_late)
    check_tiny(open_split("tiny", "test", data_dir=tmp_path), 8)


def test_preparing_with_a_read_only_data_dir(tmp_path, user_cache):
    read_only = tmp_path / "tfds"
    read_only.mkdir(mode=0o555)
    check_tiny(open_split("tiny", "test", data_dir=read_only), 8)
    assert not list(read_only.iterdir()) and cache_file(user_cache / "tfds", "test").exists()


def test_shapes10(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes10, "SPLIT_SIZES", {"train": 20, "test": 20})
    test = open_split("shapes10", "test", data_dir=tmp_path)
    assert test.images.shape[1:] == (32, 32, 3) and len(test.class_names) == 10
    assert set(test.labels.tolist()) == set(range(10))
