"""TensorFlow Datasets: preparing them, and reading their records without TensorFlow."""

import bisect
import contextlib
import difflib
import functools
import importlib.util
import mmap
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from vit_jax.data.images import decode_image
from vit_jax.data.source import (
    PREPARE_AGAIN,
    Source,
    fingerprint,
    guarded,
    one_line,
    user_cache,
    writable,
)
from vit_jax.errors import UserError, expand_home

_WAYS = (
    "set TFDS_DATA_DIR or --config.data.dir to a prepared copy; or run with network access and"
    " TensorFlow installed (pip install 'vit-jax[prepare]'); or use the embedded dataset:"
    " python -m vit_jax.main --config shapes10_vit"
)


def open_tfds(name: str, data_dir: str | None) -> Source:
    """Opens a TFDS dataset by its name, preparing it first if it is not on disk.

    Images and labels are the supervised keys, or else the first features of these types.
    Raises UserError if it does not exist, cannot be prepared, or has no uint8 images with labels.
    """
    import tensorflow_datasets as tfds

    builder = _prepared_builder(name, data_dir)
    info, directory = builder.info, Path(builder.data_path)
    title = f"{info.full_name} ({info.file_format.value}) in {directory}"
    if info.file_format.value not in _RECORD_READERS:
        raise UserError(f"{title} cannot be read: prepare it as {' or '.join(_RECORD_READERS)}")
    image_key, label_key = _image_and_label_keys(info, title)
    channels, label = info.features[image_key].shape[-1], info.features[label_key]
    example = tfds.features.FeaturesDict({k: info.features[k] for k in (image_key, label_key)})
    encoded_image = {image_key: tfds.decode.SkipDecoding()}

    def parse(where, record):
        fields = guarded(where, example.deserialize_example_np, record, decoders=encoded_image)
        decode = functools.partial(decode_image, fields[image_key], channels, where)
        return where, decode, int(fields[label_key])

    def reader(split):
        return functools.partial(_read, *_open_shards(info, split), parse)

    about = sorted(p.name for p in directory.iterdir() if p.suffix in (".json", ".txt"))
    return Source(
        title=title,
        class_names=tuple(label.int2str(i) for i in range(label.num_classes or 0)),
        shard_lengths={split: list(s.shard_lengths) for split, s in info.splits.items()},
        cache_dirs=[directory, user_cache(info.full_name.replace("/", "-"), directory)],
        fingerprint=lambda split: fingerprint(
            directory, [*about, *(p.name for p in info.splits[split].filepaths)]
        ),
        reader=reader,
    )


def _image_and_label_keys(info, title: str) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    keys = [*(k for k in info.supervised_keys or () if isinstance(k, str)), *info.features]

    def find(kind):
        return next((key for key in keys if isinstance(info.features[key], kind)), None)

    image_key, label_key = find(tfds.features.Image), find(tfds.features.ClassLabel)
    if image_key is None or label_key is None:
        raise UserError(
            f"{title} needs an image and a class label, it has {', '.join(info.features)}: use"
            " another dataset"
        )
    image = info.features[image_key]
    if image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"{title} has {image.shape[-1]} channels of {np.dtype(image.np_dtype)}, not 1, 3, or 4"
            " of uint8: use another dataset"
        )
    return image_key, label_key


# Records.


def _open_shards(info, split: str) -> tuple[list, list[int]]:
    """Returns a split's [(path, records)], and the index of each shard's first record."""
    shards, starts = [], [0]
    lengths = info.splits[split].shard_lengths
    for path, length in zip(info.splits[split].filepaths, lengths, strict=True):
        records = guarded(path, _RECORD_READERS[info.file_format.value], str(path))
        if len(records) != length:
            raise UserError(f"{path} has {len(records)} of {length} records: {PREPARE_AGAIN}")
        shards.append((path, records))
        starts.append(starts[-1] + length)
    return shards, starts


def _read(shards: list, starts: list[int], parse: Callable, start: int, stop: int):
    """Yields parse(where, record) for the records from `start` to `stop` of a split."""
    while start < stop:
        shard = bisect.bisect_right(starts, start) - 1
        path, records = shards[shard]
        end = min(stop, starts[shard + 1])
        indices = range(start - starts[shard], end - starts[shard])
        encoded = guarded(path, records.__getitems__, indices)
        for index, record in zip(indices, encoded, strict=True):
            yield parse(f"record {index} of {path}", record)
        start = end


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

    def __getitems__(self, indices) -> list[bytes]:
        return [self._checked(*self.spans[index]) for index in indices]

    def _checked(self, start: int, stop: int) -> bytes:
        import google_crc32c

        data = self.bytes[start:stop]
        crc = google_crc32c.value(data)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        if masked != int.from_bytes(self.bytes[stop : stop + 4], "little"):
            raise ValueError(f"checksum mismatch at byte {start}")
        return data


def _array_record_file(path: str):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource([path])


_RECORD_READERS = {"array_record": _array_record_file, "tfrecord": TFRecordFile}


# Preparing.


def _prepared_builder(name: str, data_dir: str | None):
    """Returns the builder of a dataset that is on disk, preparing it first if it is not."""
    if name.split(":")[0] == "shapes10":
        import vit_jax.data.shapes10  # noqa: F401  (registers the builder)

    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    folders = [expand_home(place).absolute()]
    if not writable(folders[0]):
        folders.append(user_cache("tfds"))
    for folder in folders:
        if _is_prepared(builder := _builder(name, folder)):
            return builder
    problem = _prepare_missing(builder, name, folder)
    builder = _builder(name, folder)
    if not _is_prepared(builder):  # it may be, even if this process's attempt failed
        raise UserError(
            f"{builder.info.full_name} is not in {' or '.join(map(str, folders))} and"
            f" {problem}: {_WAYS}"
        )
    return builder


def _prepare_missing(builder, name: str, folder: Path) -> str | None:
    """Prepares a dataset; returns the reason if it is still missing."""
    urls = list(builder.url_infos or ())
    if not urls and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        problem = _prepare(name, folder)
    else:
        if importlib.util.find_spec("tensorflow") is None:
            return "preparing it needs TensorFlow, which is not installed"
        # Without a network TFDS retries for minutes and then reports another cause.
        if urls and (problem := _connection_error(urls[0])):
            return f"{urls[0]} cannot be reached ({problem})"
        # Use a child process, so that this one never imports TensorFlow.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                problem = pool.submit(_prepare, name, folder).result()
            except Exception as error:  # the child was killed
                problem = one_line(error)
    return f"preparing it failed ({problem})"


def _connection_error(url: str) -> str | None:
    """Returns the reason that a URL's server does not respond, or None if it does."""
    import requests  # as TFDS does: the same proxies and certificates

    try:
        requests.get(url, stream=True, timeout=10).close()
    except (requests.ConnectionError, requests.Timeout) as error:
        return one_line(error)
    except requests.RequestException:
        return None  # not HTTP, for example


def _builder(name: str, folder: Path, **options):
    import tensorflow_datasets as tfds

    if not re.fullmatch(r"\w+(/[\w.+-]+)?(:[\d.*]+)?", name):
        # A namespace before a colon would fetch and run the code of an untrusted dataset.
        raise UserError(
            f"config.data.name must be NAME, NAME/CONFIG, NAME:VERSION, or folder:PATH; got"
            f" {name!r}"
        )
    try:
        return tfds.builder(name, data_dir=folder, **options)
    except tfds.core.DatasetNotFoundError as error:
        known = [*tfds.list_builders(with_community_datasets=False), "shapes10"]
        near = difflib.get_close_matches(name.split(":")[0].split("/")[0], known, 3, 0)
        raise UserError(
            f"config.data.name = {name!r}: neither TFDS nor {folder} has such a dataset; use one"
            f" of the nearest, {', '.join(map(repr, near))}, or 'folder:/path' for an image folder"
        ) from error
    except Exception as error:  # a version that does not exist, a corrupted dataset_info.json
        raise UserError(
            f"config.data.name = {name!r} cannot be opened in {folder} ({one_line(error)}): use"
            f" another name, or {PREPARE_AGAIN}"
        ) from error


def _is_prepared(builder) -> bool:
    return Path(builder.data_dir, "dataset_info.json").exists()


def _prepare(name: str, folder: Path) -> str | None:
    """Generates a dataset as array_record; returns None, or one line on the failure."""
    import tensorflow_datasets as tfds

    try:
        builder = _builder(name, folder, file_format="array_record")
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=config)
    except Exception as error:  # a dataset's code can raise anything
        return one_line(error)
