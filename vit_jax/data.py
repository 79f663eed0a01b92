"""A split of a data set as uint8 arrays in memory, and the order in which training visits it.

Sources: any TFDS image classification set (array_record or tfrecord, neither read with TensorFlow),
`shapes10`, and folders of class folders. Images are decoded once; the decoded arrays are kept in an
uncompressed `.npz` beside the data set, or under `${XDG_CACHE_HOME:-~/.cache}/vit_jax` where that
directory takes no writes.
"""

import bisect
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import mmap
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError, expand_home

_BLOCK = 256  # images one thread decodes at a time
_FOLDER_SPLITS = ("train", "training", "val", "valid", "validation", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Of 8 bits a sample or fewer. Left out: 16 and 32 bits, where a cast would only clip, and LAB, HSV.
_IMAGE_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
MAX_PIXELS = 100_000_000  # of an image: a few bytes of a file can ask for more memory than there is
_AGAIN = "copy or prepare the data set again"
_WAYS = (
    "set TFDS_DATA_DIR or --config.data.dir to a prepared copy; or run where the network is"
    " reachable with TensorFlow installed (pip install 'vit-jax[prepare]'); or run the same on the"
    " embedded set: python -m vit_jax.main --config shapes10_vit"
)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split in memory. Slices of one split are views of the same array."""

    images: np.ndarray  # uint8[N, H, W, C], C in RGB order
    labels: np.ndarray  # int32[N], in 0..len(class_names)-1
    class_names: tuple[str, ...]
    source: str  # one line for people: name, version, format, where, cached where

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.images.shape[1:]

    def examples(self, indices) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8[b, H, W, C] and labels int32[b] of an array of indices."""
        return self.images[indices], self.labels[indices]

    def digest(self) -> str:
        """Text that two splits share when their images, labels and classes are the same."""
        of = hashlib.sha256(repr((self.images.shape, self.class_names)).encode())
        of.update(np.ascontiguousarray(self.images))
        of.update(np.ascontiguousarray(self.labels))
        return of.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the images of a data set come from, whatever its kind."""

    title: str
    class_names: tuple[str, ...]
    shard_lengths: dict[str, list[int]]  # of each split
    cache_dirs: list[Path]  # the first that holds a cache is read, the first writable is written
    fingerprint: Callable[[str], str]  # split -> text that changes when the files change
    # split -> read(start, stop), which any thread may call: yields (where, decode, label), where
    # decode() is the image or raises UserError
    open: Callable[[str], Callable[[int, int], Iterator[tuple[str, Callable, int]]]]

    def check(self, where: str, image: np.ndarray, label: int, shape: tuple) -> None:
        """Raises UserError for an image of another shape or a label outside the classes."""
        if image.shape != shape:
            raise UserError(
                f"the images of {self.title} differ in size ({where}: {image.shape}, the first:"
                f" {shape}): set config.data.image_size to crop and resize them all"
            )
        if not 0 <= label < len(self.class_names):
            raise UserError(
                f"{where} has label {label}, outside 0 to {len(self.class_names) - 1}: mend the"
                " data or use another split"
            )


def load_split(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Loads a split, preparing the data set first if it is not on disk.

    Args:
      name: a TFDS name ("cifar10", "cifar10:3.0.2"), "shapes10", or "folder:/path" with
        /path/CLASS/*.png (all of it is split "train") or /path/train/CLASS/*.png, /path/test/...
        Images of a folder come in an order that mixes the classes.
      split: TFDS syntax: "train", "train[:45000]", "train[90%:]", "train+test".
      data_dir: the TFDS directory; else $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      image_size: pixels; every image is cropped to its central square and resized to this side.
        None keeps the images as they are, which must then be of one size.
      skip_bad: leaves out the images that cannot be decoded, and tells of them in `source`. A part
        of a split holds the images it would hold, less these.

    Raises:
      UserError: the set or split does not exist, cannot be prepared, is empty, is damaged, or
        holds labels outside its classes; the disk is full.
    """
    source, parts = open_split(name, split, data_dir)
    bases = {name: _load_base(source, name, image_size, skip_bad) for name, _ in parts}
    images, labels = [], []
    for base_split, nominal in parts:
        base = bases[base_split]
        # Less the images before each end that are not there.
        rows = slice(*(i - np.searchsorted(base.skipped, i) for i in (nominal.start, nominal.stop)))
        images.append(base.images[rows])
        labels.append(base.labels[rows])
    if not any(map(len, images)):
        raise UserError(f"split {split!r} of {source.title} holds no image that can be decoded")
    if len({part.shape[1:] for part in images}) > 1:
        raise UserError(f"the splits in {split!r} differ in image size: set config.data.image_size")
    caches = ", ".join(str(base.cache) for base in bases.values())
    skipped = [str(reason) for base in bases.values() for reason in base.reasons]
    told = f"; {len(skipped)} skipped, as {skipped[0]}" if skipped else ""
    return Dataset(
        images=images[0] if len(parts) == 1 else np.concatenate(images),
        labels=labels[0] if len(parts) == 1 else np.concatenate(labels),
        class_names=source.class_names,
        source=f"{source.title}, cached in {caches}{told}",
    )


def open_split(
    name: str, split: str, data_dir: str | None
) -> tuple[Source, list[tuple[str, range]]]:
    """Where a split's images come from, and the (base split, range of indices) it is made of.

    Arguments and errors are those of load_split; what is wrong with an image shows when it is read.
    """
    import tensorflow_datasets as tfds

    if name.startswith("folder:"):
        source = _open_folder(expand_home(name.removeprefix("folder:")).resolve())
    else:
        source = _open_tfds(name, data_dir)

    infos = {
        key: tfds.core.SplitInfo(name=key, shard_lengths=lengths, num_bytes=0)
        for key, lengths in source.shard_lengths.items()
    }
    sizes = ", ".join(f"{key} ({info.num_examples} images)" for key, info in infos.items())
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except Exception as error:  # tfds raises many kinds for a split that it cannot read
        raise UserError(
            f"split {split!r} of {source.title}: {_one_line(error)}; it has: {sizes}"
        ) from error
    ranges = [(p.splitname, range(infos[p.splitname].num_examples)[p.from_ : p.to]) for p in parts]
    if not any(r for _, r in ranges):
        raise UserError(f"split {split!r} of {source.title} holds no images; it has: {sizes}")
    return source, ranges


def epoch_indices(num_examples: int, batch_size: int, *, seed: int, epoch: int) -> np.ndarray:
    """int32[steps, batch_size]: every index once, shuffled by (seed, epoch); padded with -1.

    The only function that decides the order of training. It sorts Philox's raw 64-bit words, which
    NumPy keeps the same in every version (the output of `Generator.permutation` may change).
    """
    words = np.random.Philox(key=[seed, epoch]).random_raw(num_examples)
    return _in_batches(np.argsort(words, kind="stable"), batch_size)


def eval_indices(num_examples: int, batch_size: int) -> np.ndarray:
    """int32[steps, batch_size]: every index once, in order; the last batch is padded with -1."""
    return _in_batches(np.arange(num_examples), batch_size)


def _in_batches(order: np.ndarray, batch_size: int) -> np.ndarray:
    steps = -(-len(order) // batch_size)
    padded = np.full(steps * batch_size, -1, np.int32)
    padded[: len(order)] = order
    return padded.reshape(steps, batch_size)


# Decoding, and the cache of what was decoded.


@dataclasses.dataclass(frozen=True)
class _Base:
    """A whole split, decoded."""

    images: np.ndarray  # uint8[N, H, W, C]
    labels: np.ndarray  # int32[N]
    skipped: np.ndarray  # int64[M], ascending: indices of the images that are left out
    reasons: np.ndarray  # str[M]: why
    cache: Path


def _load_base(source: Source, split: str, image_size: int | None, skip_bad: bool) -> _Base:
    size = f"_{image_size}px" if image_size else ""
    paths = [folder / f"vit_jax_{split}{size}_uint8.npz" for folder in source.cache_dirs]
    fingerprint = source.fingerprint(split)
    count = sum(source.shard_lengths[split])
    for path in paths:
        base = _read_cache(path, fingerprint, count) if path.exists() else None
        if base and (skip_bad or not len(base.skipped)):
            return base
    path = next((path for path in paths if _writable(path.parent)), paths[-1])
    base = _decode(source, split, count, image_size, skip_bad, path)
    arrays = {"images": base.images, "labels": base.labels}
    if len(base.skipped):
        arrays |= {"skipped": base.skipped, "reasons": base.reasons}
    names = np.array(source.class_names)
    _write_cache(path, **arrays, class_names=names, fingerprint=np.array(fingerprint))
    return base


def _read_cache(path: Path, fingerprint: str, count: int) -> _Base | None:
    """What a cache holds, or None where it was made from other files."""
    try:
        with np.load(path, allow_pickle=False) as cache:  # zipfile checks a CRC-32 of each array
            if str(cache["fingerprint"]) != fingerprint:
                return None
            none = {"skipped": np.zeros(0, np.int64), "reasons": np.zeros(0, str)}
            skipped, reasons = (cache.get(k, v) for k, v in none.items())
            base = _Base(cache["images"], cache["labels"], skipped, reasons, path)
        kept = count - len(base.skipped)
        if base.images.ndim != 4 or len(base.images) != kept or base.labels.shape != (kept,):
            found = f"{base.images.shape} images and {base.labels.shape} labels"
            raise ValueError(f"{found}, not {kept}")
        if base.images.dtype != np.uint8 or base.labels.dtype != np.int32:
            raise ValueError(f"{base.images.dtype} images and {base.labels.dtype} labels")
    except Exception as error:  # damage can surface anywhere in zipfile and in numpy's parser
        raise UserError(
            f"the cache {path} is damaged ({_one_line(error)}): delete it and it is made again"
        ) from error
    return base


def _write_cache(path: Path, **arrays: np.ndarray) -> None:
    """Writes all or nothing: two processes may do so at once, and either may be killed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > 3600:  # its writer was killed
                    left.unlink()
        with open(temporary, "xb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write the decoded images to {path} ({_one_line(error)}): they need"
            f" {arrays['images'].nbytes / 1e6:.0f} MB in a writable directory; make room there, or"
            " set XDG_CACHE_HOME to another place and make the data set's directory read-only"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _decode(source, split, count, image_size, skip_bad, cache) -> _Base:
    """A split decoded in a pool of threads."""
    read = source.open(split)
    skipped = {}  # index -> why

    def decoded(start):
        block = read(start, min(start + _BLOCK, count))
        for index, (where, decode, label) in enumerate(block, start):
            try:
                image = decode()
            except UserError as error:
                if not skip_bad:
                    raise
                skipped[index] = str(error)
                continue
            if image_size is not None:
                image = fit(image, image_size, image_size)
            yield index, where, image, label

    starts = range(0, count, _BLOCK)
    first = next((found for start in starts for found in decoded(start)), None)
    if first is None:
        raise UserError(f"split {split!r} of {source.title} holds no image that can be decoded")
    shape = first[2].shape
    images = np.empty((count, *shape), np.uint8)
    labels = np.empty(count, np.int32)

    def decode_block(start):
        for index, where, image, label in decoded(start):
            source.check(where, image, label, shape)
            images[index], labels[index] = image, label

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode_block, starts):
            pass  # raises what a thread raised
    if skipped:
        kept = np.setdiff1d(np.arange(count), list(skipped))
        images, labels = images[kept], labels[kept]
    return _Base(
        images,
        labels,
        skipped=np.array(sorted(skipped), np.int64),
        reasons=np.array([skipped[index] for index in sorted(skipped)], str),
        cache=cache,
    )


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8[H, W, C] -> uint8[height, width, C]: the largest central part of that shape."""
    import cv2

    H, W, channels = image.shape
    # Of a square, exactly the shorter side.
    rows, columns = min(H, max(1, W * height // width)), min(W, max(1, H * width // height))
    top, left = (H - rows) // 2, (W - columns) // 2
    image = image[top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return image
    method = cv2.INTER_AREA if height < rows else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method).reshape(height, width, channels)


# Folders of class folders.


def _open_folder(root: Path) -> Source:
    if not root.is_dir():
        raise UserError(f"folder {root} does not exist: give a folder that holds class folders")

    def subfolders(folder):
        return [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]

    folders = {p.name: p for p in subfolders(root) if p.name in _FOLDER_SPLITS and subfolders(p)}
    folders = dict(sorted(folders.items())) or {"train": root}
    class_names = sorted({p.name for folder in folders.values() for p in subfolders(folder)})
    if not class_names:
        raise UserError(f"folder {root} holds no class folders: put each class in one of its own")
    files = {}  # split -> [(path relative to root, label)]
    for split, folder in folders.items():
        files[split] = []
        for class_folder in subfolders(folder):
            found = [
                p.relative_to(root)
                for p in class_folder.rglob("*")
                if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
            ]
            if not found:
                suffixes = " ".join(IMAGE_SUFFIXES)
                raise UserError(
                    f"{class_folder} holds no images ({suffixes}): add some or remove it"
                )
            files[split] += [(p, class_names.index(class_folder.name)) for p in found]
        # By a hash of the path: the same everywhere, and any slice holds all classes.
        files[split].sort(key=lambda item: hashlib.sha256(item[0].as_posix().encode()).digest())

    def read(split, start, stop):
        for path, label in files[split][start:stop]:
            where = str(root / path)
            yield where, functools.partial(read_image, where), label

    return Source(
        title=f"folder {root}",
        class_names=tuple(class_names),
        shard_lengths={split: [len(items)] for split, items in files.items()},
        cache_dirs=[_user_cache(f"folder-{root.name}", root)],
        fingerprint=lambda split: _fingerprint(root, [p for p, _ in files[split]], class_names),
        open=lambda split: functools.partial(read, split),
    )


def read_image(file, where=None) -> np.ndarray:
    """uint8[H, W, 3] of an image file, RGB, turned as its EXIF orientation says.

    Grey, palette, CMYK and bilevel images are converted, an alpha channel is dropped, and of
    several frames the first is taken. `file` is a path or an open binary file, which `where` names.
    Raises UserError, which names it, for a file that is damaged, of another format than those of
    `_IMAGE_FORMATS`, of samples that have no 8-bit meaning, or of more than MAX_PIXELS.
    """
    from PIL import Image, ImageOps

    where = where or file
    try:
        # Only these formats: Pillow would start Ghostscript for an EPS that is called .png.
        with Image.open(file, formats=_IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}")
            if image.mode not in _IMAGE_MODES:
                raise ValueError(f"samples of mode {image.mode}, not 8 bits each")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow raises many kinds, SyntaxError among them
        raise UserError(
            f"{where} is no image to train on ({_one_line(error)}): mend or remove it;"
            " training leaves such images out with --config.data.on_bad_image=skip"
        ) from error


# TensorFlow Datasets.


def _open_tfds(name: str, data_dir: str | None) -> Source:
    import tensorflow_datasets as tfds

    builder = _prepared_builder(name, data_dir)
    info, directory = builder.info, Path(builder.data_path)
    title = f"{info.full_name} ({info.file_format.value}) in {directory}"
    if info.file_format.value not in _RECORD_READERS:
        raise UserError(f"{title} cannot be read: prepare it as {' or '.join(_RECORD_READERS)}")
    supervised = [key for key in info.supervised_keys or () if isinstance(key, str)]
    keys = [*supervised, *info.features]

    def find(kind):
        return next((key for key in keys if isinstance(info.features[key], kind)), None)

    image_key, label_key = find(tfds.features.Image), find(tfds.features.ClassLabel)
    if image_key is None or label_key is None:
        fields = ", ".join(info.features)
        raise UserError(f"{title} needs an image and a class label, it has {fields}: name another")
    image_feature, label_feature = info.features[image_key], info.features[label_key]
    channels = image_feature.shape[-1]
    if image_feature.np_dtype != np.uint8 or channels not in (1, 3, 4):
        found = f"{channels} channels of {np.dtype(image_feature.np_dtype)}"
        raise UserError(f"{title} has {found}, not 1, 3 or 4 of uint8: name another data set")
    example = tfds.features.FeaturesDict({image_key: image_feature, label_key: label_feature})
    skip_decoding = {image_key: tfds.decode.SkipDecoding()}

    def open_files(split):
        shards, starts = [], [0]
        lengths = info.splits[split].shard_lengths
        for path, length in zip(info.splits[split].filepaths, lengths, strict=True):
            records = _guarded(path, _RECORD_READERS[info.file_format.value], str(path))
            if len(records) != length:
                raise UserError(f"{path} holds {len(records)} of {length} records: {_AGAIN}")
            shards.append((path, records))
            starts.append(starts[-1] + length)

        def read(start, stop):
            while start < stop:
                shard = bisect.bisect_right(starts, start) - 1
                end = min(stop, starts[shard + 1])
                yield from read_shard(*shards[shard], start - starts[shard], end - starts[shard])
                start = end

        return read

    def read_shard(path, records, start, stop):
        encoded = _guarded(path, records.__getitems__, range(start, stop))
        for index, record in enumerate(encoded, start):
            where = f"record {index} of {path}"
            fields = _guarded(where, example.deserialize_example_np, record, decoders=skip_decoding)
            decode = functools.partial(_decode_image, fields[image_key], channels, where)
            yield where, decode, int(fields[label_key])

    class_names = tuple(label_feature.int2str(i) for i in range(label_feature.num_classes or 0))
    about = [p.name for p in directory.iterdir() if p.suffix in (".json", ".txt")]
    return Source(
        title=title,
        class_names=class_names,
        shard_lengths={split: list(s.shard_lengths) for split, s in info.splits.items()},
        cache_dirs=[directory, _user_cache(info.full_name.replace("/", "-"), directory)],
        fingerprint=lambda split: _fingerprint(
            directory, [*sorted(about), *(p.name for p in info.splits[split].filepaths)]
        ),
        open=open_files,
    )


def _decode_image(encoded: bytes, channels: int, where: str) -> np.ndarray:
    """uint8[H, W, channels]; as TFDS does, without turning by EXIF orientation."""
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))  # cv2 reads it once
    import cv2

    flags = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}
    flag = flags[channels] | cv2.IMREAD_IGNORE_ORIENTATION if channels in flags else -1
    image = _guarded(where, cv2.imdecode, np.frombuffer(encoded, np.uint8), flag)
    if image is None:
        raise UserError(f"{where} holds no image that can be decoded: {_AGAIN}")
    if image.ndim == 2:
        return image[..., None]
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)


class _TFRecordFile:
    """Random access to the records of a TFRecord file, checked by its checksums as they are read.

    Format (tensorflow/core/lib/io/record_writer.h): for each record uint64 length, masked crc32c
    of the length, the bytes, masked crc32c of the bytes; all little-endian.
    """

    def __init__(self, path: str):
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.spans, offset = [], 0
        while offset < len(self.bytes):
            self._check(offset, offset + 8)
            start = offset + 12
            stop = start + int.from_bytes(self.bytes[offset : offset + 8], "little")
            self.spans.append((start, stop))
            offset = stop + 4

    def __len__(self) -> int:
        return len(self.spans)

    def __getitems__(self, indices) -> list[bytes]:
        return [self._check(*self.spans[index]) for index in indices]

    def _check(self, start: int, stop: int) -> bytes:
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


_RECORD_READERS = {"array_record": _array_record_file, "tfrecord": _TFRecordFile}


def _prepared_builder(name: str, data_dir: str | None):
    """The builder of a data set that is on disk, if need be after preparing it."""
    if name.split(":")[0] == "shapes10":
        import vit_jax.shapes10  # noqa: F401  (registers the builder)

    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    places = [expand_home(place).absolute()]
    if not _writable(places[0]):
        places.append(_user_cache("tfds"))
    for place in places:
        if _is_prepared(builder := _builder(name, place)):
            return builder

    missing = f"{builder.info.full_name} is not in {' or '.join(map(str, places))} and"
    urls = list(builder.url_infos or ())
    if not urls and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        problem = _prepare(name, place)
    else:
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError(f"{missing} preparing it needs TensorFlow, which is missing: {_WAYS}")
        if urls and not _reachable(urls[0]):
            raise UserError(f"{missing} {urls[0]} cannot be reached: {_WAYS}")
        # A child process, so that TensorFlow is never imported in this one.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                problem = pool.submit(_prepare, name, place).result()
            except Exception as error:  # the child was killed
                problem = _one_line(error)
    builder = _builder(name, place)
    if not _is_prepared(builder):  # else it is there, even if another process was first
        raise UserError(f"{missing} preparing it failed ({problem}): {_WAYS}")
    return builder


def _builder(name: str, place: Path, **options):
    import tensorflow_datasets as tfds

    if not re.fullmatch(r"\w+(/[\w.+-]+)?(:[\d.*]+)?", name):
        # A namespace before a colon would fetch and run the code of a stranger's data set.
        raise UserError(
            f"config.data.name = {name!r} is no NAME, NAME/CONFIG, NAME:VERSION or folder:PATH"
        )
    try:
        return tfds.builder(name, data_dir=place, **options)
    except tfds.core.DatasetNotFoundError as error:
        known = [*tfds.list_builders(with_community_datasets=False), "shapes10"]
        near = difflib.get_close_matches(name.split(":")[0].split("/")[0], known, 3, 0)
        raise UserError(
            f"config.data.name = {name!r}: TFDS has no such data set, nor has {place}; the nearest"
            f" are {', '.join(map(repr, near))}; 'folder:/path' reads a folder of class folders"
        ) from error
    except Exception as error:  # a version that does not exist, a damaged dataset_info.json
        raise UserError(
            f"config.data.name = {name!r} cannot be opened in {place} ({_one_line(error)}): name"
            f" another, or {_AGAIN}"
        ) from error


def _is_prepared(builder) -> bool:
    return Path(builder.data_dir, "dataset_info.json").exists()


def _prepare(name: str, place: Path) -> str | None:
    """Generates the data set as array_record; None, or one line that says what went wrong."""
    import tensorflow_datasets as tfds

    try:
        builder = _builder(name, place, file_format="array_record")
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=config)
    except Exception as error:  # whatever a data set's own code raises
        return _one_line(error)


def _reachable(url: str) -> bool:
    """Whether the host of a URL, or the proxy to it, answers within a few seconds."""
    parts = urllib.parse.urlparse(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    parts = urllib.parse.urlparse(proxy) if proxy else parts
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answered = threading.Event()

    def connect():
        try:
            socket.create_connection((parts.hostname, port), timeout=3).close()
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=connect, daemon=True)  # a name look-up knows no timeout
    thread.start()
    thread.join(5)
    return answered.is_set()


# Files.


def _user_cache(name: str, path: Path | None = None) -> Path:
    root = expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vit_jax"
    digest = "-" + hashlib.sha256(str(path).encode()).hexdigest()[:12] if path else ""
    return root / (name + digest)


def _writable(folder: Path) -> bool:
    """Whether files can be made there. A mode without a write bit counts for root too."""
    folder = next(f for f in (folder, *folder.parents) if f.exists())
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def _fingerprint(root: Path, files: list, *more) -> str:
    """Changes when a file is added, removed, renamed or written, and when the cache's form does."""
    stats = [(f, _guarded(root / f, os.stat, root / f)) for f in files]
    text = json.dumps(["v1", [(str(f), s.st_size, s.st_mtime_ns) for f, s in stats], more])
    return hashlib.sha256(text.encode()).hexdigest()


def _guarded(where, function: Callable, *args, **options):
    """Calls a reader; whatever it raises means that the file is damaged."""
    try:
        return function(*args, **options)
    except Exception as error:
        raise UserError(f"{where} cannot be read ({_one_line(error)}): {_AGAIN}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 and text else f"{type(error).__name__} {text[:300]}".strip()
