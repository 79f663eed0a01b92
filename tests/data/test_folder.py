"""Image folders: splits, classes, hidden and unreadable files."""

import errno
import os
from pathlib import Path

import numpy as np
from data_helpers import picture, put_image, user_error
from PIL import Image

from vit_jax.data import open_split, resident


def test_folder(folder, user_cache, monkeypatch):
    train = open_split(f"folder:{folder}", "train")
    expected = {picture(i).tobytes(): (1, 0)[i % 2] for i in range(40)}
    assert expected == {x.tobytes(): y for x, y in zip(train.images, train.labels, strict=True)}
    assert train.class_names == ("cat", "dog")
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert str(folder) in train.source and str(user_cache) in train.source
    part = open_split(f"folder:{folder}", "train[:50%]")
    np.testing.assert_array_equal(part.images, train.images[:20])
    assert 5 <= part.labels.sum() <= 15  # mixed

    moved = folder.rename(
        folder.with_name("moved")
    )  # the order does not depend on the absolute path
    np.testing.assert_array_equal(open_split(f"folder:{moved}", "train").labels, train.labels)
    monkeypatch.setattr(resident, "_decode", None)
    np.testing.assert_array_equal(open_split(f"folder:{moved}", "train").images, train.images)


def test_changed_folder_is_reread(folder):
    open_split(f"folder:{folder}", "train")
    Image.fromarray(picture(99)).save(folder / "dog" / "0.png")
    Image.fromarray(picture(98)).save(folder / "dog" / "98.png")
    images = {image.tobytes() for image in open_split(f"folder:{folder}", "train").images}
    assert {picture(99).tobytes(), picture(98).tobytes()} <= images and len(images) == 41


def test_folder_with_splits(folder, tmp_path):
    (tmp_path / "set").mkdir()
    folder.rename(tmp_path / "set" / "train")
    (tmp_path / "set" / "test" / "dog").mkdir(parents=True)
    Image.fromarray(picture(50)).save(tmp_path / "set" / "test" / "dog" / "a.png")
    name = f"folder:{tmp_path / 'set'}"
    test = open_split(name, "test")
    assert test.labels.tolist() == [1] and test.class_names == ("cat", "dog")
    np.testing.assert_array_equal(test.images[0], picture(50))
    train = open_split(name, "train")
    assert len(train.images) == 40 and 5 <= train.labels[:20].sum() <= 15
    user_error(name, "val", says=["'val'", "train (40 images)", "test (1 images)"])


def test_split_folders_next_to_class_folders_are_an_error(tmp_path):
    put_image(tmp_path / "rides" / "plane" / "1.png")
    put_image(tmp_path / "rides" / "train" / "freight" / "1.png")
    user_error(f"folder:{tmp_path / 'rides'}", "train", says=["mixes", "train", "plane"])


def test_split_folder_names_are_case_insensitive(tmp_path):
    for split, count in (("Training", 3), ("Testing", 1)):
        for i in range(count):
            put_image(tmp_path / "scans" / split / "glioma" / f"{i}.png", i)
    name = f"folder:{tmp_path / 'scans'}"
    assert open_split(name, "Training").class_names == ("glioma",)
    assert open_split(name, "Testing").num_examples == 1
    user_error(name, "train", says=["Training (3 images)", "Testing (1 images)"])


def test_hidden_folders_in_a_class_are_ignored(folder):
    put_image(folder / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    put_image(folder / "cat" / "long" / "haired.png", 77)
    assert open_split(f"folder:{folder}", "train").num_examples == 41


def test_directory_with_an_image_suffix_is_not_an_image(folder):
    put_image(folder / "cat" / "frames.png" / "1.png", 77)
    assert open_split(f"folder:{folder}", "train").num_examples == 41


def test_unreadable_folder_is_an_error(folder, monkeypatch):
    def walk(top, onerror):
        onerror(PermissionError(errno.EACCES, "Permission denied", str(top)))

    monkeypatch.setattr(os, "walk", walk)
    user_error(f"folder:{folder}", "train", says=[folder / "cat", "Permission denied"])


def test_file_names_need_not_be_utf_8(folder, tmp_path):
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.rename(latin)
    (latin / "cat").rename(latin / os.fsdecode(b"chat\xe9"))
    bad = latin / "dog" / os.fsdecode(b"\xe9t\xe9.png")
    put_image(bad, 77)
    train = open_split(f"folder:{latin}", "train")
    assert train.num_examples == 41 and train.class_names == (r"chat\xe9", "dog")
    train.source.encode()
    bad.write_bytes(b"no image")
    user_error(f"folder:{latin}", "train", says=[r"caf\xe9/dog/\xe9t\xe9.png"]).encode()


def test_class_may_be_named_train(tmp_path):
    for name in ("plane", "train"):
        (tmp_path / "rides" / name).mkdir(parents=True)
        Image.fromarray(picture(1)).save(tmp_path / "rides" / name / "1.png")
    assert open_split(f"folder:{tmp_path / 'rides'}", "train").class_names == ("plane", "train")


def test_invalid_folders(folder, tmp_path):
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
