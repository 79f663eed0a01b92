"""Atomic writes: after a kill at any time, a file is complete or absent."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from vit_jax.errors import UserError


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file's content atomically, and returns when it is on disk."""
    temporary = path.with_name(f".{path.name}.tmp")  # a fixed name, so a killed writer's is reused
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def write_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names `path`, the directory being written."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
