"""Small TFDS datasets and helpers for the tests of vit_jax.data."""

import io

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download.checksums import UrlInfo

from vit_jax.data import open_split
from vit_jax.errors import UserError

URL = "http://127.0.0.1:9/nothing.zip"  # the discard port: nothing listens


def picture(i, height=8, width=8, channels=3):
    shape = (height, width, channels)
    return np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)


def png(image):
    codes = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    channels = image.shape[-1]
    image = cv2.cvtColor(image, codes[channels]) if channels in codes else image
    return io.BytesIO(cv2.imencode(".png", image)[1].tobytes())


def put_image(path, i=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(i)).save(path)


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


class Gray(Tiny):
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


class Unlabeled(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 3))})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"image": png(picture(0))}


def record_file(directory, split="train"):
    return next((directory / "tiny" / "1.0.0").glob(f"tiny-{split}.*"))


def cache_file(directory, split="train"):
    return directory / "tiny" / "1.0.0" / f"vit_jax_{split}_uint8.npz"


def user_error(*args, says, **options):
    """Calls open_split, which must fail with one line that contains all of `says`."""
    with pytest.raises(UserError) as caught:
        open_split(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    for text in says:
        assert str(text) in message, message
    return message


def check_tiny(dataset, count, channels=3):
    """Checks that each image has its label, in whatever order TFDS shuffled the examples."""
    expected = {picture(i, 8, 8, channels).tobytes(): i % 4 for i in range(count)}
    found = {
        image.tobytes(): label
        for image, label in zip(dataset.images, dataset.labels.tolist(), strict=True)
    }
    assert found == expected
    assert dataset.images.shape == (count, 8, 8, channels)
    assert dataset.images.dtype == np.uint8 and dataset.labels.dtype == np.int32
    assert dataset.class_names == ("ant", "bee", "cat", "dog")
