"""Splits in memory: decoded once by a pool of threads, and cached on disk.

The cache is an `.npz` next to the TFDS dataset, or else in `${XDG_CACHE_HOME:-~/.cache}/vit_jax`.
"""

import contextlib
import dataclasses
import hashlib
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tqdm

from vit_jax.data.source import Source, printable, user_errors
from vit_jax.data.stream import Stream

_BLOCK = 256  # images that a thread decodes at a time


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A split in memory. A part of a base split is a view of all its images."""

    images: np.ndarray  # uint8[N, H, W, C], RGB
    labels: np.ndarray  # int32[N], in 0..len(class_names)-1
    class_names: tuple[str, ...]
    source: str  # one line to print: name, version, format, directory, cache
    parts: list[tuple[str, range]]  # (base split, rows)

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


def load_resident(source: Source, parts: list, image_size: int | None) -> Dataset:
    """Loads a split, given as for `Stream`. Base splits are decoded unless they are cached."""
    bases = {name: _load_base(source, name, image_size) for name in dict(parts)}
    images = [bases[name][0][rows.start : rows.stop] for name, rows in parts]
    labels = [bases[name][1][rows.start : rows.stop] for name, rows in parts]
    if len(parts) > 1:
        problem = f"the splits {', '.join(bases)} of {source.title} cannot be joined"
        with user_errors(problem, "set config.data.image_size"):
            images, labels = [np.concatenate(images)], [np.concatenate(labels)]
    title = f"{source.title}, cached in {printable(source.cache_dir)}"
    return Dataset(images[0], labels[0], source.class_names, title, parts)


def _load_base(source, split, image_size):
    """Returns the images and labels of a base split."""
    size = f"_{image_size}px" if image_size else ""
    path = source.cache_dir / f"vit_jax_{split}{size}_uint8.npz"
    fingerprint, count = source.fingerprint(split), source.num_examples[split]
    arrays = _read_cache(path, fingerprint, count) if path.exists() else None
    if arrays is None:
        arrays = _decode(Stream(source, [(split, range(count))], image_size))
        _write_cache(path, *arrays, fingerprint)
    return arrays


def _decode(stream):
    count = stream.num_examples
    images, labels = np.empty((count, *stream.image_shape), np.uint8), np.empty(count, np.int32)
    blocks = np.split(np.arange(count), range(_BLOCK, count, _BLOCK))
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(stream.examples, blocks)
        bar = tqdm.tqdm(decoded, "decoding", len(blocks), leave=False, delay=1, disable=None)
        for block, examples in zip(blocks, bar, strict=True):
            images[block], labels[block] = examples
    return images, labels


def _read_cache(path, fingerprint, count):
    """Returns (images, labels), or None if the cache was made from other files."""
    with user_errors(f"the cache {path} is corrupted", "delete it to decode the images again"):
        with np.load(path, allow_pickle=False) as cache:  # zipfile checks a CRC-32 of each array
            if str(cache["fingerprint"]) != fingerprint:
                return None
            images, labels = cache["images"], cache["labels"]
        kind = (images.dtype, images.shape[:-3], labels.dtype, labels.shape)
        if kind != (np.uint8, (count,), np.int32, (count,)):
            raise ValueError(f"not {count} uint8 images with int32 labels")
    return images, labels


def _write_cache(path, images, labels, fingerprint):
    """Writes a cache atomically: two processes may write it concurrently, and be killed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    problem = f"cannot write {images.nbytes / 1e6:.0f} MB of decoded images to {path}"
    fix = "free some space, or make the dataset's directory read-only and set XDG_CACHE_HOME"
    with user_errors(problem, fix):
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f".{path.name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > 3600:  # its writer was killed
                    other.unlink()
        try:
            with open(temporary, "xb") as file:
                np.savez(file, images=images, labels=labels, fingerprint=fingerprint)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
