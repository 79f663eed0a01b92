"""`Source`, the common interface to TFDS, Hugging Face, and image folders, and file helpers."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, expand_home


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened dataset: its splits, its classes, and a reader of its examples."""

    title: str
    class_names: tuple[str, ...]
    num_examples: dict[str, int]  # per split
    cache_dir: Path  # for decoded images
    fingerprint: Callable[[str], str]  # split -> text that changes when its files change
    # split -> read(index) -> (name in errors, uint8[H, W, C], label), which any thread may call
    reader: Callable[[str], Callable[[int], tuple[str, Any, int]]]


@contextlib.contextmanager
def user_errors(problem: str, fix: str = "copy or prepare the dataset again") -> Generator[None]:
    """Turns any exception into a UserError: "problem (text of the exception): fix"."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:500] or type(error).__name__
        raise UserError(f"{problem} ({text}): {fix}") from error


def printable(path) -> str:
    """Returns a path as valid text: bytes that are not UTF-8 become escapes such as \\xe9."""
    return os.fsencode(path).decode(errors="backslashreplace")


def user_cache(name: str, path: Path | None = None) -> Path:
    """Returns a folder in the user's cache, distinct for each `path`."""
    root = expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vit_jax"
    digest = "-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:12] if path else ""
    return root / (name + digest)


def writable(folder: Path) -> bool:
    """Returns whether files can be created in a folder, which need not exist yet.

    Also checks the write bits, which os.access ignores for root.
    """
    folder = next(f for f in (folder, *folder.parents) if f.exists())
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def fingerprint(root: Path, files: list, *more) -> str:
    """Returns a hash of the files' names, sizes, and times, of `more`, and of the format, "v1"."""
    with user_errors(f"the files in {printable(root)} cannot be read"):
        stats = [(str(file), os.stat(root / file)) for file in files]
    text = json.dumps(["v1", [(f, s.st_size, s.st_mtime_ns) for f, s in stats], more])
    return hashlib.sha256(text.encode()).hexdigest()
