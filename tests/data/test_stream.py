"""Streamed splits: the batches of resident data, images of mixed sizes, and bad images."""

import numpy as np
import pytest
from PIL import Image
from runs import losses

from vit_jax import config as config_lib
from vit_jax.augment import make_crop
from vit_jax.data import epoch_order, open_split
from vit_jax.errors import UserError
from vit_jax.experiment import make_experiment
from vit_jax.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 train and 6 test JPEGs of mixed, larger sizes in two classes: dark and bright."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 3)):
        for name, low in (("bright", 150), ("dark", 0)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(40, 400, 2)
                noise = rng.integers(low, low + 100, (height, width, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / split / name / f"{i}.jpg")
    return folder


@pytest.mark.parametrize("split", ["train", "train[10:40]", "test[5:]+train[:20]"])
def test_examples_equal_the_resident_split(tiny_folder, split):
    resident = open_split(f"folder:{tiny_folder}", split)
    streamed = open_split(f"folder:{tiny_folder}", split, streaming=True)
    assert streamed.num_examples == resident.num_examples
    assert streamed.image_shape == resident.image_shape == (8, 8, 3)
    for i in range(streamed.num_examples):
        image, label = streamed.example(i)
        np.testing.assert_array_equal(image, resident.images[i])
        assert label == resident.labels[i]


@pytest.mark.parametrize("files", ["tiny", "tiny_tfrecord"])
def test_stream_reads_the_same_in_any_order(files, request):
    directory = request.getfixturevalue(files)
    whole = open_split("tiny", "train", data_dir=directory)
    streamed = open_split("tiny", "train[100:]", data_dir=directory, streaming=True)
    assert streamed.num_examples == 500 and streamed.class_names == whole.class_names
    for i in (499, 0, 155, 156, 157, 499):  # across blocks of 256 and shards
        image, label = streamed.example(i)
        np.testing.assert_array_equal(image, whole.images[100 + i])
        assert label == whole.labels[100 + i]


def test_streamed_training_equals_resident_training(tiny_config, tmp_path, capsys):
    c = tiny_config
    c.steps, c.log_every = 20, "1 step"  # epochs of six batches, the last of 10
    c.save_every = "8 steps"
    c.augment.flip, c.augment.crop, c.augment.crop_padding = "random", "pad", 2
    c.augment.mixup_alpha = 0.8
    train(c, tmp_path / "resident")
    c.data.streaming = True
    result = train(c, tmp_path / "streamed")
    assert "data decoded by 16 threads per process" in capsys.readouterr().out
    assert losses(tmp_path / "streamed") == pytest.approx(losses(tmp_path / "resident"), abs=1e-5)
    assert result["test_accuracy"] > 0.5


@pytest.fixture
def cropped(photos):
    """batches(rows, start): 24 photos in batches of 16, cropped at random, up to the sixth step."""
    c = config_lib.defaults()
    c.augment.crop = "resized"
    crop = make_crop(c.augment, size=32, seed=3, steps_per_epoch=2)
    split = open_split(f"folder:{photos}", "train", image_size=32, streaming=True)
    order = [epoch_order(24, 16, seed=3, epoch=step // 2)[step % 2] for step in range(6)]

    def batches(rows, start):
        steps = range(start, 6)
        return list(split.batches(order.__getitem__, steps, rows=rows, threads=2, crop=crop))

    return batches


def test_crops_belong_to_the_example_and_the_epoch(cropped):
    whole, part = cropped(np.arange(16), 0), cropped(np.arange(16), 3)
    assert len(whole) == 6 and len(part) == 3
    for a, b in zip(whole[3:], part, strict=True):  # as in a resumed run
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert whole[0]["image"].shape == (16, 32, 32, 3) and whole[0]["image"].dtype == np.uint8
    assert whole[1]["mask"].tolist() == [True] * 8 + [False] * 8  # 24 examples: 16 and 8
    assert (whole[0]["image"] != whole[2]["image"]).any()
    # A second host reads its rows of the same batch.
    for a, b in zip(whole, cropped(np.arange(8, 16), 0), strict=True):
        np.testing.assert_array_equal(a["image"][8:], b["image"])


def test_alternating_flip_is_rejected_with_resized_crops():
    """It identifies an image by its pixels, which change with every crop."""
    c = config_lib.defaults()
    c.data.streaming, c.data.image_size = True, 32
    c.augment.crop, c.augment.flip = "resized", "random"
    config_lib.validate(c)
    c.augment.flip = "alternating"
    with pytest.raises(UserError, match=r"flip=alternating .* use flip=random"):
        config_lib.validate(c)


def test_training_on_mixed_sizes(photos, tiny_config, tmp_path):
    c = tiny_config
    c.data.name, c.data.image_size, c.data.streaming = f"folder:{photos}", 16, True
    c.augment.crop, c.augment.flip = "resized", "random"
    c.batch_size, c.epochs = 8, 10
    assert train(c, tmp_path)["test_accuracy"] == 1


def test_bad_image_is_reported(tiny_config, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8)).save(tmp_path / split / "a" / f"{i}.png")
    (tmp_path / "train" / "a" / "3.png").write_bytes(b"not an image")
    c = tiny_config
    c.data.name, c.data.streaming = f"folder:{tmp_path}", True
    c.batch_size, c.epochs = 4, 2
    with pytest.raises(UserError, match=r"3.png is not a usable image .*: fix or remove it"):
        list(make_experiment(c).batches())
