"""SHA-256 checksums of every file of a checkpoint.

Tensorstore verifies only its index and orbax verifies nothing, so a flipped bit would go unnoticed.
`sha256sum --check SHA256SUMS` accepts the file.
"""

import contextlib
import hashlib
import os
import pathlib
import stat
from collections.abc import Iterator

from vit_jax.errors import UserError

_SUMS = "SHA256SUMS"


def write(folder: pathlib.Path) -> None:
    """Writes the checksums of a folder's files, and returns when all are on disk."""
    sums = "".join(
        f"{_sha256(path, sync=True)}  {path.relative_to(folder).as_posix()}\n"
        for path in _files(folder)
    )
    with open(folder / _SUMS, "w") as file:
        file.write(sums)
        file.flush()
        os.fsync(file.fileno())


def find_corruption(folder: pathlib.Path) -> str | None:
    """Describes the corruption of a checkpoint's files; returns None if they are intact.

    Raises UserError if a file cannot be read: it may be intact.
    """
    with reading(folder / _SUMS):
        try:
            with open(folder / _SUMS, "rb") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return f"{_SUMS} is missing"
    with reading(folder):
        files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for line in lines:
        digest, _, name = line.decode(errors="replace").partition("  ")
        if name not in files:
            return f"{name!r} of {_SUMS} is missing"
        with reading(files[name]):
            if _sha256(files[name]) != digest:
                return f"{name} is not what was saved"
    return None if lines else f"{_SUMS} is empty"


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the unreadable file."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"cannot read {e.filename or path} ({e.strerror}), and a checkpoint is used only if "
            "every file of it can be read: restore access to it, or move its checkpoint elsewhere"
        ) from e


def _sha256(path, *, sync=False):
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())  # on the disk before the rename that completes the checkpoint
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder):
    """The regular files under a folder, sorted, without symbolic links, which may point anywhere.

    Raises OSError for a subfolder that cannot be listed, which Path.rglob would skip.
    """

    def fail(error):
        raise error

    walk = os.walk(folder, onerror=fail)
    paths = (pathlib.Path(parent, name) for parent, _, names in walk for name in names)
    return sorted(path for path in paths if stat.S_ISREG(path.lstat().st_mode))
