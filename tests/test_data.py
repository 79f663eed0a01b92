"""vit_jax.data: every source gives the right arrays once, and every kind of damage is told."""

import contextlib
import errno
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image
from tensorflow_datasets.core.download.checksums import UrlInfo

from vit_jax import data, shapes10
from vit_jax.data import epoch_indices, eval_indices, load_split
from vit_jax.errors import UserError
from vit_jax.stream import open_stream

REPO = Path(__file__).resolve().parents[1]
TFDS_DATA_DIR = os.environ.get("TFDS_DATA_DIR")  # as given to pytest; the tests unset it
URL = "http://127.0.0.1:9/nothing.zip"  # the discard port: nobody listens


def picture(i, height=8, width=8, channels=3):
    shape = (height, width, channels)
    return np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)


def png(image):
    codes = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    channels = image.shape[-1]
    image = cv2.cvtColor(image, codes[channels]) if channels in codes else image
    return io.BytesIO(cv2.imencode(".png", image)[1].tobytes())


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    shape = (8, 8, 3)
    names = ["ant", "bee", "cat", "dog"]

    def _info(self):
        label = tfds.features.ClassLabel(names=self.names)
        features = {"image": tfds.features.Image(shape=self.shape), "label": label}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"number": np.int64, **features}),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(600), "test": self._generate_examples(8)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": self.image(i), "label": i % 4, "number": i}

    def image(self, i):
        return png(picture(i, *self.shape))


class Grey(Tiny):
    shape = (8, 8, 1)


class Alpha(Tiny):
    shape = (8, 8, 4)


class Mixed(Tiny):
    shape = (None, None, 3)

    def image(self, i):
        return png(picture(i, 8 + i % 3, 10 + i % 5))


class Broken(Tiny):
    def image(self, i):
        return io.BytesIO(b"no picture") if i == 5 else super().image(i)


class Fails(Tiny):
    def image(self, i):
        raise RuntimeError("the generator\nbroke")


class Online(Tiny):
    url_infos = {URL: UrlInfo(size=2, checksum="0" * 64, filename="nothing.zip")}


class Unlabelled(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 3))})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"image": png(picture(0))}


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "xdg" / "vit_jax"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A directory that holds tiny/1.0.0, prepared by load_split itself, without caches."""
    directory = tmp_path_factory.mktemp("prepared")
    assert data._prepare("tiny", directory) is None
    return directory


@pytest.fixture
def tiny(prepared, tmp_path):
    """A copy of the prepared directory, for one test to harm."""
    shutil.copytree(prepared, tmp_path / "tfds")
    return tmp_path / "tfds"


@pytest.fixture
def tiny_tfrecord(tiny):
    """The same records in TFRecord files, as TFDS names them and TensorFlow frames them."""

    def masked(chunk):
        crc = google_crc32c.value(chunk)
        return (((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32).to_bytes(4, "little")

    version = tiny / "tiny" / "1.0.0"
    for path in version.glob("*array_record*"):
        with open(str(path).replace("array_record", "tfrecord"), "wb") as file:
            records = ArrayRecordDataSource([str(path)])
            for record in records.__getitems__(range(len(records))):
                length = len(record).to_bytes(8, "little")
                file.write(length + masked(length) + record + masked(record))
        path.unlink()
    info = version / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    return tiny


def record_file(directory, split="train"):
    return next((directory / "tiny" / "1.0.0").glob(f"tiny-{split}.*"))


def cache_file(directory, split="train"):
    return directory / "tiny" / "1.0.0" / f"vit_jax_{split}_uint8.npz"


def user_error(*args, says, **options):
    """Calls load_split, which must fail with one line that holds all of `says`."""
    with pytest.raises(UserError) as caught:
        load_split(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    for text in says:
        assert str(text) in message, message
    return message


def check_tiny(dataset, count, channels=3):
    """Whatever order TFDS shuffled the examples into, each must be whole and with its label."""
    expected = {picture(i, 8, 8, channels).tobytes(): i % 4 for i in range(count)}
    found = {
        image.tobytes(): label
        for image, label in zip(dataset.images, dataset.labels.tolist(), strict=True)
    }
    assert found == expected
    assert dataset.images.shape == (count, 8, 8, channels)
    assert dataset.images.dtype == np.uint8 and dataset.labels.dtype == np.int32
    assert dataset.class_names == ("ant", "bee", "cat", "dog")


# Order.


def test_epoch_indices_are_one_fixed_shuffle_of_seed_and_epoch():
    order = epoch_indices(10, 4, seed=0, epoch=0)
    assert order.dtype == np.int32 and order.shape == (3, 4)
    assert order.tolist() == [[0, 2, 9, 1], [8, 5, 4, 3], [6, 7, -1, -1]]
    assert sorted(order.ravel().tolist()) == [-1, -1, *range(10)]
    large = [epoch_indices(999, 9, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, one in enumerate(large):
        assert one.min() == 0 and one.shape == (111, 9)
        assert all((one == other).mean() < 0.02 for other in large[:i])
    np.testing.assert_array_equal(large[1], epoch_indices(999, 9, seed=0, epoch=1))


def test_batch_size_does_not_change_the_order():
    small, big = (epoch_indices(50, b, seed=3, epoch=7).ravel() for b in (8, 32))
    np.testing.assert_array_equal(small[:50], big[:50])


def test_eval_indices_are_in_order_and_padded_at_the_end():
    order = eval_indices(5, 3)
    assert order.dtype == np.int32 and order.tolist() == [[0, 1, 2], [3, 4, -1]]
    assert eval_indices(6, 3).tolist() == [[0, 1, 2], [3, 4, 5]]


# TFDS.


def test_array_record(tiny):
    train, test = (load_split("tiny", split, data_dir=tiny) for split in ("train", "test"))
    check_tiny(train, 600)
    check_tiny(test, 8)
    stored = tfds.builder("tiny", data_dir=tiny).as_data_source("train")
    for i in (0, 255, 256, 599):  # TFDS's own order, across the blocks of the threads
        np.testing.assert_array_equal(train.images[i], stored[i]["image"])
        assert train.labels[i] == stored[i]["label"]
    assert "tiny/1.0.0 (array_record)" in train.source and "\n" not in train.source
    assert str(tiny) in train.source and str(cache_file(tiny)) in train.source


def test_tfrecord_gives_the_same(tiny_tfrecord, prepared):
    train = load_split("tiny:1.0.0", "train", data_dir=tiny_tfrecord)
    check_tiny(train, 600)
    assert "(tfrecord)" in train.source
    same = tfds.builder("tiny", data_dir=prepared).as_data_source("train")
    np.testing.assert_array_equal(train.images[300], same[300]["image"])


@pytest.mark.parametrize("files", ["tiny", "tiny_tfrecord"])
def test_stream_reads_the_same_in_any_order(files, request):
    directory = request.getfixturevalue(files)
    whole = load_split("tiny", "train", data_dir=directory)
    streamed = open_stream("tiny", "train[100:]", data_dir=directory)
    assert streamed.num_examples == 500 and streamed.class_names == whole.class_names
    for i in (499, 0, 155, 156, 157, 499):  # across blocks of 256 and shards
        image, label = streamed.example(i)
        np.testing.assert_array_equal(image, whole.images[100 + i])
        assert label == whole.labels[100 + i]


@pytest.mark.parametrize("name, channels", [("grey", 1), ("alpha", 4)])
def test_channels(name, channels, tmp_path):
    check_tiny(load_split(name, "test", data_dir=tmp_path), 8, channels)


def test_subsplits(tiny, monkeypatch):
    whole = load_split("tiny", "train", data_dir=tiny)
    for split, part in [
        ("train[:450]", slice(0, 450)),
        ("train[450:]", slice(450, 600)),
        ("train[:80%]", slice(0, 480)),
        ("train[-3:]", slice(597, 600)),
    ]:
        dataset = load_split("tiny", split, data_dir=tiny)
        np.testing.assert_array_equal(dataset.images, whole.images[part])
        np.testing.assert_array_equal(dataset.labels, whole.labels[part])
        assert dataset.images.base.size == whole.images.size  # a view of the whole split
    both = load_split("tiny", "test+train[:2]", data_dir=tiny)
    test = load_split("tiny", "test", data_dir=tiny)
    np.testing.assert_array_equal(both.images, [*test.images, *whole.images[:2]])
    np.testing.assert_array_equal(both.labels, [*test.labels, *whole.labels[:2]])


@pytest.mark.parametrize("split", ["vall", "train[", "", "train[:601]", "train[5:5]"])
def test_bad_split(split, tiny):
    user_error("tiny", split, data_dir=tiny, says=[repr(split), "train (600", "test (8"])


def test_data_dir_comes_from_argument_then_environment_then_home(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny))
    check_tiny(load_split("tiny", "test"), 8)
    load_split("tiny", "test", data_dir=tmp_path / "argument")
    assert cache_file(tmp_path / "argument", "test").exists()
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_split("tiny", "test")
    assert cache_file(tmp_path / "home" / "tensorflow_datasets", "test").exists()


def test_prepared_data_needs_no_network(tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    check_tiny(load_split("tiny", "train", data_dir=tiny), 600)
    check_tiny(load_split("tiny", "test", data_dir=tiny / "elsewhere"), 8)  # and preparing


def test_images_of_varying_sizes(tmp_path):
    user_error("mixed", "test", data_dir=tmp_path, says=["differ", "config.data.image_size"])
    down = load_split("mixed", "test", data_dir=tmp_path, image_size=2)
    up = load_split("mixed", "test", data_dir=tmp_path, image_size=20)
    assert down.images.shape == (8, 2, 2, 3) and up.images.shape == (8, 20, 20, 3)
    originals = list(tfds.builder("mixed", data_dir=tmp_path).as_data_source("test"))
    (i,) = (i for i, example in enumerate(originals) if example["number"] == 3)
    square = originals[i]["image"][:, 2:10]  # 8 x 13 pixels: the central 8 of its columns
    by_hand = square.reshape(2, 4, 2, 4, 3).mean((1, 3))
    assert np.abs(down.images[i] - by_hand).max() <= 0.5
    assert np.abs(up.images[i] - cv2.resize(square, (20, 20), interpolation=2)).max() == 0


def test_image_size_that_is_already_there_changes_nothing(tiny):
    plain, sized = (load_split("tiny", "test", data_dir=tiny, image_size=s) for s in (None, 8))
    np.testing.assert_array_equal(plain.images, sized.images)


def test_set_without_labels(tmp_path):
    user_error("unlabelled", "train", data_dir=tmp_path, says=["class label", "it has image"])


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
def test_damaged_records(files, request):
    directory = request.getfixturevalue(files)
    path = record_file(directory)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[150_000 if files == "tiny" else 70_000] ^= 1
    short = good[: good.rindex(b"image") - 40]
    for bad in (good[: len(good) // 2], good[:-3], short, bytes(flipped), b""):
        path.write_bytes(bad)
        message = user_error("tiny", "train", data_dir=directory, says=[path, "prepare the data"])
        if files == "tiny_tfrecord" and bad == bytes(flipped):
            assert "checksum mismatch" in message
    path.unlink()
    user_error("tiny", "train", data_dir=directory, says=[path])
    assert not cache_file(directory).exists()
    path.write_bytes(record_file(directory, "test").read_bytes())
    user_error("tiny", "train", data_dir=directory, says=[path, "8 of 600"])
    path.write_bytes(good)
    check_tiny(load_split("tiny", "train", data_dir=directory), 600)


def test_damaged_dataset_info(tiny):
    (tiny / "tiny" / "1.0.0" / "dataset_info.json").write_text('{"name": "ti')
    user_error("tiny", "train", data_dir=tiny, says=["'tiny'", tiny])


# What is not on disk.


def test_unknown_name_tells_the_nearest(tmp_path):
    user_error("cifar11", "train", data_dir=tmp_path, says=["'cifar11'", "'cifar10'", tmp_path])
    user_error("shape10", "train", data_dir=tmp_path, says=["'shapes10'"])
    user_error("tiny:9.9.9", "train", data_dir=tmp_path, says=["9.9.9"])


WAYS = ["TFDS_DATA_DIR", "--config.data.dir", "'vit-jax[prepare]'"]
WAYS += ["python -m vit_jax.main --config shapes10_vit"]


def test_absent_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    start = time.monotonic()
    says = ["cifar10/3.0.2", tmp_path, "TensorFlow", *WAYS]
    user_error("cifar10", "train", data_dir=tmp_path, says=says)
    assert time.monotonic() - start < 8


def test_absent_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: True)
    user_error("online", "train", data_dir=tmp_path, says=[URL, tmp_path, *WAYS])

    over = threading.Event()

    def hang(*args, **kwargs):
        over.wait(30)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", hang)  # a name server that does not answer
    start = time.monotonic()
    says = ["www.cs.toronto.edu", "cannot be reached", *WAYS]
    user_error("cifar10", "train", data_dir=tmp_path, says=says)
    assert time.monotonic() - start < 12
    over.set()


def test_failure_in_the_preparing_child_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(data, "_reachable", lambda url: True)
    # The child process does not know this file's builder.
    user_error("online", "train", data_dir=tmp_path, says=["no such data set", tmp_path, *WAYS])


def test_proxy_counts_as_the_way_out(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert data._reachable(proxy + "/file") and not data._reachable(URL)
        monkeypatch.setenv("http_proxy", proxy)
        assert data._reachable(URL)


def test_failing_generator(tmp_path):
    user_error("fails", "train", data_dir=tmp_path, says=["the generator broke", tmp_path])


def test_preparing_where_another_process_was_first(tmp_path, monkeypatch):
    prepare = data._prepare
    monkeypatch.setattr(data, "_prepare", lambda *args: prepare(*args) or "it was there already")
    check_tiny(load_split("tiny", "test", data_dir=tmp_path), 8)


def test_preparing_with_a_read_only_data_dir(tmp_path, user_cache):
    read_only = tmp_path / "tfds"
    read_only.mkdir(mode=0o555)
    check_tiny(load_split("tiny", "test", data_dir=read_only), 8)
    assert not list(read_only.iterdir()) and cache_file(user_cache / "tfds", "test").exists()


def test_shapes10(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes10, "SPLIT_SIZES", {"train": 20, "test": 20})
    test = load_split("shapes10", "test", data_dir=tmp_path)
    assert test.images.shape[1:] == (32, 32, 3) and len(test.class_names) == 10
    assert set(test.labels.tolist()) == set(range(10))


# Cache.


def test_cache_is_used(tiny, monkeypatch):
    first = load_split("tiny", "train", data_dir=tiny)
    monkeypatch.setattr(data, "_decode", None)
    again = load_split("tiny", "train[0:]", data_dir=tiny)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)
    with np.load(cache_file(tiny), allow_pickle=False) as cache:
        assert cache["class_names"].tolist() == ["ant", "bee", "cat", "dog"]
    left = [p.name for p in cache_file(tiny).parent.iterdir() if "vit_jax" in p.name]
    assert left == ["vit_jax_train_uint8.npz"]


def test_changed_source_is_decoded_again(tiny):
    load_split("tiny", "test", data_dir=tiny)
    path = record_file(tiny, "test")
    os.utime(path, ns=(0, 0))
    with np.load(cache_file(tiny, "test")) as cache:
        arrays = dict(cache)
    arrays["images"] = arrays["images"] * 0
    np.savez(cache_file(tiny, "test"), **arrays)
    check_tiny(load_split("tiny", "test", data_dir=tiny), 8)
    with np.load(cache_file(tiny, "test")) as cache:
        assert cache["images"].any()


def test_damaged_cache(tiny):
    load_split("tiny", "train", data_dir=tiny)
    path = cache_file(tiny)
    good = path.read_bytes()
    flips = []
    for place in (len(good) // 2, len(good) // 3, good.index(b"fingerprint") + 200):
        flips.append(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
    for bad in (b"", b"no zip at all", good[: len(good) // 2], good[:-10], *flips):
        path.write_bytes(bad)
        user_error("tiny", "train", data_dir=tiny, says=[path, "delete it and it is made again"])
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
        user_error("tiny", "train", data_dir=tiny, says=[path, "delete it and it is made again"])
    path.unlink()
    check_tiny(load_split("tiny", "train", data_dir=tiny), 600)


def test_read_only_data_set_is_cached_for_the_user(tiny, user_cache, monkeypatch):
    version = tiny / "tiny" / "1.0.0"
    version.chmod(0o555)
    test = load_split("tiny", "test", data_dir=tiny)
    check_tiny(test, 8)
    (cache,) = user_cache.glob("tiny-1.0.0-*/vit_jax_test_uint8.npz")
    assert str(cache) in test.source and not cache_file(tiny, "test").exists()
    monkeypatch.setattr(data, "_decode", None)
    check_tiny(load_split("tiny", "test", data_dir=tiny), 8)
    shutil.copy(cache, version)  # one that somebody put beside the data serves too
    cache.unlink()
    check_tiny(load_split("tiny", "test", data_dir=tiny), 8)


def test_full_disk_leaves_nothing_behind(tiny, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    user_error("tiny", "test", data_dir=tiny, says=["No space left", cache_file(tiny, "test")])
    assert not list((tiny / "tiny" / "1.0.0").glob("*vit_jax*"))
    assert not list((tiny / "tiny" / "1.0.0").glob(".*"))


def test_two_processes_at_once(tiny):
    code = (
        "import sys, vit_jax.data as d; x = d.load_split('tiny', 'train', data_dir=sys.argv[1]);"
        "assert x.images.shape == (600, 8, 8, 3); print(x.images.sum())"
        ";heavy = {'tensorflow', 'jax'} & set(sys.modules); assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, str(tiny)]
    runs = [subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE) for _ in range(2)]
    sums = {run.communicate(timeout=60)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert sums == {b"%d\n" % load_split("tiny", "train", data_dir=tiny).images.sum()}
    assert not list((tiny / "tiny" / "1.0.0").glob(".*"))


def test_importing_is_light():
    code = (
        "import sys, vit_jax.data;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'jax', 'cv2'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, timeout=60)


# Folders.


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pets"
    for i in range(40):
        path = root / ("dog", "cat")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(path)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "._0.png").write_text("hidden")
    (root / ".thumbnails").mkdir()
    return root


def test_folder(folder, user_cache, monkeypatch):
    train = load_split(f"folder:{folder}", "train")
    expected = {picture(i).tobytes(): (1, 0)[i % 2] for i in range(40)}
    assert expected == {x.tobytes(): y for x, y in zip(train.images, train.labels, strict=True)}
    assert train.class_names == ("cat", "dog")
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert str(folder) in train.source and str(user_cache) in train.source
    part = load_split(f"folder:{folder}", "train[:50%]")
    np.testing.assert_array_equal(part.images, train.images[:20])
    assert 5 <= part.labels.sum() <= 15  # mixed

    moved = folder.rename(folder.with_name("moved"))  # the order depends on no absolute path
    np.testing.assert_array_equal(load_split(f"folder:{moved}", "train").labels, train.labels)
    monkeypatch.setattr(data, "_decode", None)
    np.testing.assert_array_equal(load_split(f"folder:{moved}", "train").images, train.images)


def test_changed_folder_is_read_again(folder):
    load_split(f"folder:{folder}", "train")
    Image.fromarray(picture(99)).save(folder / "dog" / "0.png")
    Image.fromarray(picture(98)).save(folder / "dog" / "98.png")
    images = {image.tobytes() for image in load_split(f"folder:{folder}", "train").images}
    assert {picture(99).tobytes(), picture(98).tobytes()} <= images and len(images) == 41


def test_folder_with_splits(folder, tmp_path):
    (tmp_path / "set").mkdir()
    folder.rename(tmp_path / "set" / "train")
    (tmp_path / "set" / "test" / "dog").mkdir(parents=True)
    Image.fromarray(picture(50)).save(tmp_path / "set" / "test" / "dog" / "a.png")
    name = f"folder:{tmp_path / 'set'}"
    test = load_split(name, "test")
    assert test.labels.tolist() == [1] and test.class_names == ("cat", "dog")
    np.testing.assert_array_equal(test.images[0], picture(50))
    train = load_split(name, "train")
    assert len(train.images) == 40 and 5 <= train.labels[:20].sum() <= 15
    user_error(name, "val", says=["'val'", "train (40 images)", "test (1 images)"])


def put_image(path, i=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(i)).save(path)


def test_split_folders_beside_class_folders_are_an_error(tmp_path):
    put_image(tmp_path / "rides" / "plane" / "1.png")
    put_image(tmp_path / "rides" / "train" / "freight" / "1.png")
    user_error(f"folder:{tmp_path / 'rides'}", "train", says=["mixes", "train", "plane"])


def test_split_folders_are_known_in_any_case(tmp_path):
    for split, count in (("Training", 3), ("Testing", 1)):
        for i in range(count):
            put_image(tmp_path / "scans" / split / "glioma" / f"{i}.png", i)
    name = f"folder:{tmp_path / 'scans'}"
    assert load_split(name, "Training").class_names == ("glioma",)
    assert load_split(name, "Testing").num_examples == 1
    user_error(name, "train", says=["Training (3 images)", "Testing (1 images)"])


def test_hidden_folders_in_a_class_are_ignored(folder):
    put_image(folder / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    put_image(folder / "cat" / "long" / "haired.png", 77)
    assert load_split(f"folder:{folder}", "train").num_examples == 41


def test_directory_with_an_image_suffix_is_not_an_image(folder):
    put_image(folder / "cat" / "frames.png" / "1.png", 77)
    assert load_split(f"folder:{folder}", "train").num_examples == 41


def test_unreadable_folder_is_an_error(folder, monkeypatch):
    def walk(top, onerror):
        onerror(PermissionError("Permission denied"))

    monkeypatch.setattr(os, "walk", walk)
    user_error(f"folder:{folder}", "train", says=[folder / "cat", "Permission denied"])


def test_file_names_need_not_be_utf_8(folder, tmp_path):
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.rename(latin)
    (latin / "cat").rename(latin / os.fsdecode(b"chat\xe9"))
    bad = latin / "dog" / os.fsdecode(b"\xe9t\xe9.png")
    put_image(bad, 77)
    train = load_split(f"folder:{latin}", "train")
    assert train.num_examples == 41 and train.class_names == (r"chat\xe9", "dog")
    train.source.encode()
    bad.write_bytes(b"no image")
    user_error(f"folder:{latin}", "train", says=[r"caf\xe9/dog/\xe9t\xe9.png"]).encode()


def test_a_class_may_be_called_train(tmp_path):
    for name in ("plane", "train"):
        (tmp_path / "rides" / name).mkdir(parents=True)
        Image.fromarray(picture(1)).save(tmp_path / "rides" / name / "1.png")
    assert load_split(f"folder:{tmp_path / 'rides'}", "train").class_names == ("plane", "train")


def test_folder_image_kinds(tmp_path):
    (tmp_path / "kinds" / "one").mkdir(parents=True)
    flat = np.full((8, 8, 3), (200, 40, 90), np.uint8)
    image = Image.fromarray(flat)
    image.convert("RGBA").save(tmp_path / "kinds" / "one" / "alpha.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "kinds" / "one" / "p.gif")
    image.convert("CMYK").save(tmp_path / "kinds" / "one" / "cmyk.JPG", quality=100)
    images = load_split(f"folder:{tmp_path / 'kinds'}", "train").images
    assert images.shape == (3, 8, 8, 3) and np.abs(images.astype(int) - flat).max() < 6
    Image.fromarray(picture(0)[..., 0]).save(tmp_path / "kinds" / "one" / "grey.png")
    images = load_split(f"folder:{tmp_path / 'kinds'}", "train").images
    grey = np.repeat(picture(0)[..., :1], 3, -1)
    assert any((image == grey).all() for image in images)


def test_folder_turns_by_exif_and_resizes(tmp_path):
    (tmp_path / "turned" / "one").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(picture(0, 8, 12)).save(tmp_path / "turned" / "one" / "a.png", exif=exif)
    name = f"folder:{tmp_path / 'turned'}"
    np.testing.assert_array_equal(
        load_split(name, "train").images[0], np.rot90(picture(0, 8, 12), -1)
    )
    square = np.rot90(picture(0, 8, 12), -1)[2:10]
    np.testing.assert_array_equal(load_split(name, "train", image_size=8).images[0], square)


def test_bad_folders(folder, tmp_path):
    user_error(f"folder:{tmp_path / 'none'}", "train", says=[tmp_path / "none"])
    (folder / "eel").mkdir()
    user_error(f"folder:{folder}", "train", says=[folder / "eel", "no images"])
    (folder / "eel").rmdir()
    bad = folder / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    user_error(f"folder:{folder}", "train", says=[bad])
    Image.fromarray(picture(1, 9, 8)).save(bad)
    user_error(f"folder:{folder}", "train", says=["differ", "config.data.image_size"])
    (tmp_path / "empty").mkdir()
    user_error(f"folder:{tmp_path / 'empty'}", "train", says=["no class folders"])


def test_sixteen_bits_floats_and_other_formats_are_refused_by_name(tmp_path):
    wide = tmp_path / "wide.png"
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(wide)
    floats = tmp_path / "floats.tiff"
    Image.fromarray(np.ones((8, 8), np.float32)).save(floats)
    script = tmp_path / "script.png"  # Pillow would hand it to Ghostscript
    script.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    for path, says in ((wide, "mode I;16"), (floats, "mode F"), (script, "not a file of")):
        with pytest.raises(UserError, match=f"{path} is no image to train on .*{says}"):
            data.read_image(path)


def bomb(side):
    """A PNG of a few kilobytes whose header declares side x side pixels."""
    chunk = lambda kind, of: (  # noqa: E731
        struct.pack(">I", len(of)) + kind + of + struct.pack(">I", zlib.crc32(kind + of))
    )
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return png + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 20_000])  # Pillow warns of one, rejects the other
def test_size_limit_is_checked_in_the_header_before_decoding(side, tmp_path, monkeypatch):
    def decode(*args):
        raise AssertionError("decoded")

    (tmp_path / "bomb.png").write_bytes(bomb(side))
    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr(cv2, "imdecode", decode)
    with pytest.warns() if side == 10_001 else contextlib.nullcontext():
        with pytest.raises(UserError, match=r"bomb.png is no image .*pixels"):
            data.read_image(tmp_path / "bomb.png")
        with pytest.raises(UserError, match=r"a record .*pixels"):
            data._decode_image(bomb(side), 3, "a record")


def test_images_that_cannot_be_read_are_skipped_and_counted_where_asked(folder, tmp_path):
    """Parts of a split are the same images with and without them, so held-out parts stay apart."""
    whole = load_split(f"folder:{folder}", "train")
    bad = [folder / "cat" / "1.png", folder / "dog" / "0.png"]
    for path in bad:
        path.write_bytes(b"GIF89a, it says")
    with pytest.raises(UserError, match="on_bad_image=skip"):
        load_split(f"folder:{folder}", "train")
    parts = [
        load_split(f"folder:{folder}", part, skip_bad=True) for part in ("train[:3]", "train[3:]")
    ]
    images = np.concatenate([part.images for part in parts])
    assert len(images) == len(whole.images) - 2
    rows = [any((image == one).all() for one in images) for image in whole.images]
    np.testing.assert_array_equal(whole.images[rows], images)
    np.testing.assert_array_equal(whole.labels[rows], np.concatenate([p.labels for p in parts]))
    assert "2 skipped, as " in parts[0].source and str(folder) in parts[0].source
    # Their cache is not that of a run that wants all of them.
    with pytest.raises(UserError, match="is no image to train on"):
        load_split(f"folder:{folder}", "train")


def test_what_a_killed_writer_left_is_removed(tiny):
    cache = cache_file(tiny)
    left = cache.with_name(f".{cache.name}.0123.tmp")
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    young = cache.with_name(f".{cache.name}.4567.tmp")
    young.write_bytes(b"another is writing")
    load_split("tiny", "train", data_dir=tiny)
    assert cache.exists() and young.exists() and not left.exists()


# The real thing.


def test_cifar10(tmp_path):
    places = [TFDS_DATA_DIR, REPO.parent / "shared" / "tfds"]
    found = [p for p in places if p and list(Path(p).glob("cifar10/*/dataset_info.json"))]
    if not found:
        pytest.skip("no prepared cifar10 in TFDS_DATA_DIR or ../shared/tfds")
    version = next(Path(found[0]).glob("cifar10/*/dataset_info.json")).parent
    copy = tmp_path / "tfds" / "cifar10" / version.name  # links, so that the cache goes to tmp_path
    copy.mkdir(parents=True)
    for path in version.iterdir():
        if "vit_jax" not in path.name:
            (copy / path.name).symlink_to(path)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        train, test = (
            load_split("cifar10", s, data_dir=tmp_path / "tfds") for s in ("train", "test")
        )
        seconds.append(time.process_time() - start)
    means = train.images.mean((0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.49140, 0.48216, 0.44653], atol=1e-5)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.images.shape == (50_000, 32, 32, 3) and train.class_names[3] == "cat"
    stored = tfds.builder("cifar10", data_dir=tmp_path / "tfds").as_data_source("test")
    np.testing.assert_array_equal(test.images[777], stored[777]["image"])
    print(f"first {seconds[0]:.1f} s, cached {seconds[1]:.2f} s of CPU")
    # CPU seconds of all threads, which other work on the machine stretches little: two cores have
    # 30 of them in the 15 s that reading may take.
    assert seconds[0] < 30 and seconds[1] < 1
