"""The source of a dataset, one class for TFDS and image folders, and its files on disk."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError, expand_home

PREPARE_AGAIN = "copy or prepare the dataset again"


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened dataset: its splits, its classes, and a reader of encoded examples."""

    title: str
    class_names: tuple[str, ...]
    shard_lengths: dict[str, list[int]]  # per split
    cache_dirs: list[Path]  # caches are read from any of them and written to the first writable one
    fingerprint: Callable[[str], str]  # split -> text that changes when its files change
    # split -> read(start, stop), which any thread may call. It yields (where, decode, label), where
    # decode() returns the image or raises UserError.
    reader: Callable[[str], Callable[[int, int], Iterator[tuple[str, Callable, int]]]]

    def check_example(self, where: str, image: np.ndarray, label: int, shape: tuple) -> None:
        """Raises UserError for an image of another shape or a label outside the classes."""
        if image.shape != shape:
            raise UserError(
                f"the images of {self.title} differ in size ({where} is {image.shape}, the first is"
                f" {shape}): set config.data.image_size to crop and resize them"
            )
        if not 0 <= label < len(self.class_names):
            raise UserError(
                f"{where} has label {label}, outside 0 to {len(self.class_names) - 1}: fix the"
                " data or use another split"
            )


def guarded(where, function: Callable, *args, **options):
    """Calls a function that reads a file; raises UserError if it raises anything."""
    try:
        return function(*args, **options)
    except Exception as error:
        raise UserError(f"{where} cannot be read ({one_line(error)}): {PREPARE_AGAIN}") from error


def one_line(error: Exception) -> str:
    """Returns an exception's text on one line of about 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 and text else f"{type(error).__name__} {text[:300]}".strip()


def printable(path) -> str:
    """Returns a path as valid text: bytes that are not UTF-8 become escapes such as \\xe9."""
    return os.fsencode(path).decode(errors="backslashreplace")


def user_cache(name: str, path: Path | None = None) -> Path:
    """Returns a folder in the user's cache, distinct for each `path`."""
    root = expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vit_jax"
    digest = "-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:12] if path else ""
    return root / (name + digest)


def writable(folder: Path) -> bool:
    """Returns whether files can be created in a folder.

    A folder without a write bit in its mode is read-only, even for root.
    """
    folder = next(f for f in (folder, *folder.parents) if f.exists())
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def fingerprint(root: Path, files: list, *more) -> str:
    """Returns a hash that changes when a file is added, removed, renamed, or written.

    It also changes with the format of the cache, which is "v1".
    """
    stats = [(f, guarded(root / f, os.stat, root / f)) for f in files]
    text = json.dumps(["v1", [(str(f), s.st_size, s.st_mtime_ns) for f, s in stats], more])
    return hashlib.sha256(text.encode()).hexdigest()
