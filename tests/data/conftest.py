"""Shared fixtures for the tests of vit_jax.data."""

import shutil

import google_crc32c
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from data_helpers import picture
from PIL import Image

from vit_jax.data import tfds as tfds_module


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "xdg" / "vit_jax"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A directory with tiny/1.0.0, prepared by vit_jax, without caches."""
    directory = tmp_path_factory.mktemp("prepared")
    tfds_module._prepare("tiny", directory)
    return directory


@pytest.fixture
def tiny(prepared, tmp_path):
    """A copy of the prepared directory, which a test may modify."""
    shutil.copytree(prepared, tmp_path / "tfds")
    return tmp_path / "tfds"


@pytest.fixture
def tiny_tfrecord(tiny):
    """The same records in TFRecord files, with the names of TFDS and the framing of TensorFlow."""

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
