"""Splits in memory: decoded once by a pool of threads, and cached on disk.

The cache is an uncompressed `.npz` next to the dataset, or under
`${XDG_CACHE_HOME:-~/.cache}/vit_jax` if that directory is read-only.
"""

import contextlib
import dataclasses
import hashlib
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vit_jax.data.images import center_crop_resize
from vit_jax.data.source import Source, one_line, printable, writable
from vit_jax.errors import UserError

_BLOCK = 256  # images that a thread decodes at a time


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A split in memory. Parts of one split are views of the same array."""

    images: np.ndarray  # uint8[N, H, W, C], RGB
    labels: np.ndarray  # int32[N], in 0..len(class_names)-1
    class_names: tuple[str, ...]
    source: str  # one line to print: name, version, format, directory, cache

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.images.shape[1:]

    def examples(self, indices) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8[b, H, W, C] and labels int32[b] for an array of indices."""
        return self.images[indices], self.labels[indices]

    def digest(self) -> str:
        """Returns a hash of all images, labels, and class names."""
        digest = hashlib.sha256(repr((self.images.shape, self.class_names)).encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()[:16]


def load_resident(
    source: Source, parts: list[tuple[str, range]], *, image_size: int | None, skip_bad: bool
) -> Dataset | None:
    """Loads the parts of a split, given as (base split, range of indices).

    Each base split is decoded completely unless it is cached. Other arguments and errors are as in
    `open_split`. Returns None if no image can be decoded.
    """
    bases = {name: _load_base(source, name, image_size, skip_bad) for name, _ in parts}
    images, labels = [], []
    for name, indices in parts:
        base = bases[name]
        # Each end moves by the number of skipped images before it.
        ends = (i - np.searchsorted(base.skipped, i) for i in (indices.start, indices.stop))
        rows = slice(*ends)
        images.append(base.images[rows])
        labels.append(base.labels[rows])
    if not any(map(len, images)):
        return None
    if len({part.shape[1:] for part in images}) > 1:
        names = ", ".join(bases)
        raise UserError(
            f"the splits {names} of {source.title} differ in image size: set config.data.image_size"
        )
    caches = ", ".join(printable(base.cache) for base in bases.values())
    reasons = [str(reason) for base in bases.values() for reason in base.reasons]
    skipped = f"; {len(reasons)} skipped, for example {reasons[0]}" if reasons else ""
    return Dataset(
        images=images[0] if len(parts) == 1 else np.concatenate(images),
        labels=labels[0] if len(parts) == 1 else np.concatenate(labels),
        class_names=source.class_names,
        source=f"{source.title}, cached in {caches}{skipped}",
    )


@dataclasses.dataclass(frozen=True)
class _Base:
    """A base split, decoded."""

    images: np.ndarray  # uint8[N, H, W, C]
    labels: np.ndarray  # int32[N]
    skipped: np.ndarray  # int64[M], ascending: the indices of skipped images
    reasons: np.ndarray  # str[M]: why each was skipped
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
    path = next((path for path in paths if writable(path.parent)), paths[-1])
    base = _decode(source, split, image_size, skip_bad, path)
    arrays = {"images": base.images, "labels": base.labels}
    if len(base.skipped):
        arrays |= {"skipped": base.skipped, "reasons": base.reasons}
    names = np.array(source.class_names)
    _write_cache(path, **arrays, class_names=names, fingerprint=np.array(fingerprint))
    return base


# Decoding.


def _decode(source: Source, split: str, image_size: int | None, skip_bad: bool, cache: Path):
    """Decodes a base split in a pool of threads and returns it as a _Base."""
    read, count = source.reader(split), sum(source.shard_lengths[split])
    skipped = {}  # index -> reason

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
                image = center_crop_resize(image, image_size, image_size)
            yield index, where, image, label

    starts = range(0, count, _BLOCK)
    first = next((example for start in starts for example in decoded(start)), None)
    if first is None:
        raise UserError(f"split {split!r} of {source.title} has no image that can be decoded")
    shape = first[2].shape
    images = np.empty((count, *shape), np.uint8)
    labels = np.empty(count, np.int32)

    def decode_block(start):
        for index, where, image, label in decoded(start):
            source.check_example(where, image, label, shape)
            images[index], labels[index] = image, label

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode_block, starts):
            pass  # re-raises an exception from a thread
    indices = np.array(sorted(skipped), np.int64)
    if len(indices):
        images, labels = np.delete(images, indices, axis=0), np.delete(labels, indices)
    reasons = np.array([skipped[index] for index in indices], str)
    return _Base(images, labels, indices, reasons, cache)


# The cache.


def _read_cache(path: Path, fingerprint: str, count: int) -> _Base | None:
    """Reads a cache; returns None if it was made from other files."""
    try:
        with np.load(path, allow_pickle=False) as cache:  # zipfile checks a CRC-32 of each array
            if str(cache["fingerprint"]) != fingerprint:
                return None
            none = {"skipped": np.zeros(0, np.int64), "reasons": np.zeros(0, str)}
            skipped, reasons = (cache.get(k, v) for k, v in none.items())
            base = _Base(cache["images"], cache["labels"], skipped, reasons, path)
        kept = count - len(base.skipped)
        if base.images.ndim != 4 or len(base.images) != kept or base.labels.shape != (kept,):
            shapes = f"{base.images.shape} images and {base.labels.shape} labels"
            raise ValueError(f"{shapes}, not {kept}")
        if base.images.dtype != np.uint8 or base.labels.dtype != np.int32:
            raise ValueError(f"{base.images.dtype} images and {base.labels.dtype} labels")
    except Exception as error:  # corruption can raise anywhere in zipfile or NumPy
        raise UserError(
            f"the cache {path} is corrupted ({one_line(error)}): delete it, and it is made again"
        ) from error
    return base


def _write_cache(path: Path, **arrays: np.ndarray) -> None:
    """Writes a cache atomically: two processes may write it concurrently, and be killed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f".{path.name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > 3600:  # its writer was killed
                    other.unlink()
        with open(temporary, "xb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write the decoded images to {path} ({one_line(error)}): they need"
            f" {arrays['images'].nbytes / 1e6:.0f} MB in a writable directory; free some space, or"
            " set XDG_CACHE_HOME to another directory and make the dataset's directory read-only"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
