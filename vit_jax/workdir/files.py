"""Atomic writes, and SHA-256 checksums of every file of a folder.

Tensorstore verifies only its index and orbax verifies nothing, so a flipped bit in a checkpoint
would go unnoticed. `sha256sum --check SHA256SUMS` accepts the checksums.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Generator
from typing import Any

from vit_jax.errors import UserError

_SUMS = "SHA256SUMS"


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file's content atomically, and returns when it is on disk."""
    temporary = path.with_name(f".{path.name}.tmp")  # a fixed name, so a killed writer's is reused
    with open(temporary, "w", opener=_no_link) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _no_link(path, flags):
    """Opens a file, but not through a symbolic link, which an untrusted workdir may contain."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_checksums(folder: pathlib.Path) -> None:
    """Writes the checksums of a folder's files, and returns when all are on disk."""
    lines = [f"{_sha256(path, sync=True)}  {name}\n" for name, path in _files(folder).items()]
    write_text(folder / _SUMS, "".join(lines))


def find_corruption(folder: pathlib.Path) -> str | None:
    """Describes the corruption of a checkpoint's files; returns None if they are intact.

    Raises UserError if a file cannot be read: it may be intact.
    """
    with read_errors(folder):
        files = _files(folder)
        if _SUMS not in files:
            return f"{_SUMS} is missing"
        lines = files[_SUMS].read_bytes().splitlines()
    for line in lines:
        digest, _, name = line.decode(errors="replace").partition("  ")
        if name not in files:
            return f"{name!r} of {_SUMS} is missing"
        with read_errors(files[name]):
            if _sha256(files[name]) != digest:
                return f"{name} is not what was saved"
    return None if lines else f"{_SUMS} is empty"


def _sha256(path, *, sync=False):
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())  # on the disk before the rename that completes the checkpoint
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder):
    """Returns {relative name: path} of the regular files in a folder; links may point anywhere."""

    def fail(error):  # Path.rglob would skip a subfolder that cannot be listed
        raise error

    walk = os.walk(folder, onerror=fail)
    paths = sorted(pathlib.Path(parent, name) for parent, _, names in walk for name in names)
    regular = (path for path in paths if stat.S_ISREG(path.lstat().st_mode))
    return {path.relative_to(folder).as_posix(): path for path in regular}


@contextlib.contextmanager
def write_errors(path: pathlib.Path) -> Generator[None]:
    """Turns an OSError into a UserError that names `path`, the file or directory being written."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


@contextlib.contextmanager
def read_errors(path: pathlib.Path) -> Generator[None]:
    """Turns an OSError into a UserError that names the unreadable file of a checkpoint."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"cannot read {e.filename or path} ({e.strerror}): a checkpoint is used only if all "
            "its files can be read; restore access to it, or move the checkpoint elsewhere"
        ) from e
