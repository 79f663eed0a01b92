"""TensorFlow Datasets: preparing them, and reading their records without TensorFlow."""

import bisect
import contextlib
import difflib
import importlib.util
import itertools
import mmap
import multiprocessing
import os
import re
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import requests  # as TFDS does: the same proxies and certificates
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from vit_jax.data import shapes10  # noqa: F401  (registers the builder)
from vit_jax.data.images import decode_image
from vit_jax.data.source import Source, fingerprint, user_cache, user_errors, writable
from vit_jax.errors import UserError, expand_home

_WAYS = (
    "set TFDS_DATA_DIR or --config.data.dir to a prepared copy; or run with network access and"
    " TensorFlow installed (pip install 'vit-jax[prepare]'); or use the built-in dataset:"
    " python -m vit_jax.main --config shapes10_vit"
)


def open_tfds(name: str, data_dir: str | None) -> Source:
    """Opens a TFDS dataset by its name, preparing it first if it is not on disk.

    Raises UserError if it does not exist, cannot be prepared, or has no uint8 images with labels.
    """
    builder = _prepared_builder(name, data_dir)
    info, directory = builder.info, Path(builder.data_path)
    title = f"{info.full_name} ({info.file_format.value}) in {directory}"
    features = _image_and_label(info, title)
    _, label = features.values()
    user = user_cache(info.full_name.replace("/", "-"), directory)
    about = sorted(p.name for p in directory.iterdir() if p.suffix in (".json", ".txt"))
    return Source(
        title=title,
        class_names=tuple(label.names),
        num_examples={name: split.num_examples for name, split in info.splits.items()},
        cache_dir=directory if writable(directory) else user,
        fingerprint=lambda split: fingerprint(
            directory, [*about, *(p.name for p in info.splits[split].filepaths)]
        ),
        reader=lambda split: _reader(info, split, features),
    )


def _image_and_label(info, title):
    """Returns {key: feature} of the supervised image and label."""
    keys = map(str, info.supervised_keys or ())
    features = {key: info.features[key] for key in keys if key in info.features}
    kinds = [type(feature) for feature in features.values()]
    if kinds == [tfds.features.Image, tfds.features.ClassLabel]:
        image, label = features.values()
        if image.np_dtype == np.uint8 and image.shape[-1] in (1, 3) and label.num_classes:
            return features
    raise UserError(
        f"{title} has no supervised uint8 images of 1 or 3 channels with a class label; it has"
        f" {', '.join(info.features)}: use another dataset"
    )


def _reader(info, split, features):
    """Opens the shards of a split; returns read(index), as `Source.reader` does."""
    # Each shard keeps a file open, and imagenet2012 has 1,024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    record_file = TFRecordFile if info.file_format.value == "tfrecord" else ArrayRecordDataSource
    shards, lengths = [], info.splits[split].shard_lengths
    for path, length in zip(map(str, info.splits[split].filepaths), lengths, strict=True):
        with user_errors(f"{path} cannot be read"):
            records = record_file(path)
            if len(records) != length:
                raise ValueError(f"{len(records)} of {length} records")
        shards.append((path, records))
    starts = list(itertools.accumulate(lengths, initial=0))
    (image_key, label_key), (image, label) = features.keys(), features.values()
    example = tfds.features.FeaturesDict(features)
    encoded = {image_key: tfds.decode.SkipDecoding()}

    def read(index):
        shard = bisect.bisect_right(starts, index) - 1
        path, records = shards[shard]
        index -= starts[shard]
        where = f"record {index} of {path}"
        with user_errors(f"{where} cannot be read"):
            fields = example.deserialize_example_np(records[index], decoders=encoded)
            if not 0 <= fields[label_key] < label.num_classes:
                raise ValueError(f"label {fields[label_key]}, not 0 to {label.num_classes - 1}")
        pixels = decode_image(fields[image_key], image.shape[-1], where)
        return where, pixels, int(fields[label_key])

    return read


class TFRecordFile:
    """Random access to the records of a TFRecord file; each read verifies the checksum.

    Format (tensorflow/core/lib/io/record_writer.h): for each record uint64 length, masked crc32c
    of the length, the bytes, masked crc32c of the bytes; all little-endian.
    """

    def __init__(self, path: str):
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.spans, offset = [], 0
        while offset < len(self.bytes):
            self._checked(offset, offset + 8)
            start = offset + 12
            stop = start + int.from_bytes(self.bytes[offset : offset + 8], "little")
            self.spans.append((start, stop))
            offset = stop + 4

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> bytes:
        return self._checked(*self.spans[index])

    def _checked(self, start: int, stop: int) -> bytes:
        data = self.bytes[start:stop]
        crc = google_crc32c.value(data)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        if masked != int.from_bytes(self.bytes[stop : stop + 4], "little"):
            raise ValueError(f"checksum mismatch at byte {start}")
        return data


def _prepared_builder(name, data_dir):
    """Returns the builder of a dataset that is on disk, preparing it first if it is not."""
    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    folders = [expand_home(place).absolute()]
    if not writable(folders[0]):
        folders.append(user_cache("tfds"))
    for folder in folders:
        builder = _builder(name, folder)
        info_file = Path(builder.data_dir, "dataset_info.json")
        if info_file.exists():
            return builder
    places = " or ".join(map(str, folders))
    ways = _WAYS
    if builder.name == "cifar10":
        ways = (
            "use its copy on the Hugging Face hub, --config.data.name=hf:uoft-cs/cifar10; " + ways
        )
    with user_errors(f"{builder.info.full_name} is not in {places} and preparing it failed", ways):
        try:
            _prepare_missing(builder, name, folder)
        except Exception:
            if not info_file.exists():  # another process may have prepared it
                raise
    return _builder(name, folder)


def _builder(name, folder, **options):
    fix = "use NAME, NAME/CONFIG, NAME:VERSION, or folder:PATH, or prepare the dataset again"
    with user_errors(f"config.data.name = {name!r} cannot be opened in {folder}", fix):
        if not re.fullmatch(r"\w+(/[\w.+-]+)?(:[\d.*]+)?", name):
            # A namespace before a colon would download and run the code of an untrusted dataset.
            raise ValueError("not a dataset's name")
        try:
            return tfds.builder(name, data_dir=folder, **options)
        except tfds.core.DatasetNotFoundError as error:
            known = tfds.list_builders(with_community_datasets=False)
            near = difflib.get_close_matches(re.split("[:/]", name)[0], known, 3, 0)
            raise ValueError(f"neither TFDS nor the folder has it; the nearest: {near}") from error


def _prepare_missing(builder, name, folder):
    url = next(iter(builder.url_infos or ()), "")
    if not url and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return _prepare(name, folder)
    if importlib.util.find_spec("tensorflow") is None:
        raise ModuleNotFoundError("it needs TensorFlow, which is not installed")
    if url.startswith("http"):
        # Without a network TFDS retries for minutes and then reports another cause.
        with user_errors(f"{url} cannot be reached", "check the network"):
            requests.get(url, stream=True, timeout=10).close()
    # Use a child process, so that this one never imports TensorFlow.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(_prepare, name, folder).result()


def _prepare(name, folder):
    """Generates a dataset as array_record."""
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder = _builder(name, folder, file_format="array_record")
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=config)
    except Exception as error:  # of any type, while not all can be passed between processes
        raise RuntimeError(str(error)) from error
