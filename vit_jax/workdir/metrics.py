"""Metric writers: metrics.jsonl, TensorBoard, Weights & Biases, each with `write` and `close`."""

import contextlib
import errno
import json
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.errors import UserError
from vit_jax.workdir.files import write_text


def read_lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (text, values) for each JSON object with an integer step, and skips other lines.

    Raises ValueError if the file is not text.
    """
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield line, values


class JsonLines:
    """metrics.jsonl, opened to append: one JSON object per line, with "step" and numbers."""

    def __init__(self, path: pathlib.Path, *, step: int) -> None:
        """Drops the lines that a run resumed from `step` rewrites: later steps and test metrics."""
        try:
            lines = list(read_lines(path)) if path.exists() else []
        except ValueError as e:
            raise UserError(f"{path} is corrupted ({e}): repair or delete it") from e
        kept = [text for text, v in lines if v["step"] <= step and "test/accuracy" not in v]
        write_text(path, "".join(f"{text}\n" for text in kept))
        self._path, self._file = path, open(path, "ab", buffering=0)
        self._pending = b""  # bytes not yet written

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line. Bytes that cannot be written wait for the next call."""
        self._pending += (json.dumps({"step": step, **scalars}) + "\n").encode()
        with contextlib.suppress(OSError):
            self._flush()

    def _flush(self):
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def sync(self) -> None:
        """Syncs the lines to disk. Raises UserError if that fails or the file is gone."""
        try:
            self._flush()
            os.fsync(self._file.fileno())
            if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                raise FileNotFoundError(errno.ENOENT, "another file has taken its place")
        except OSError as e:
            raise UserError(f"cannot write {self._path}: {e.strerror}") from e

    def close(self) -> None:
        self.sync()
        self._file.close()


class TensorBoard:
    """A TensorBoard event file that hides the steps after `step` in older files.

    Events are written immediately: SummaryWriter's thread would end at the first failed write, and
    its full queue would then block the run. Events that cannot be written are lost.
    """

    def __init__(self, folder: pathlib.Path, config: ConfigDict, *, step: int) -> None:
        self._tensorboardx = tensorboardx = _import_tensorboardx()
        self._file = tensorboardx.event_file_writer.EventsWriter(str(folder / "events"))
        start = tensorboardx.writer.SessionLog(status=tensorboardx.writer.SessionLog.START)
        self._add(step=step + 1, session_log=start)
        rows = [f"| {name} | {value!r} |" for name, value in config_lib.flat(config).items()]
        table = "\n".join(["| field | value |", "| --- | --- |", *rows])
        self._add(step=0, summary=tensorboardx.summary.text("config", table))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._add(step=step, summary=self._tensorboardx.summary.scalar(name, value))
        with contextlib.suppress(OSError):
            self._file.flush()

    def _add(self, **fields):
        event = self._tensorboardx.writer.Event(wall_time=time.time(), **fields)
        with contextlib.suppress(OSError):
            self._file.write_event(event)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def _import_tensorboardx() -> Any:
    """Returns tensorboardX, imported without PyTorch, which it would import first."""
    # None: as if it were not installed.
    torch = sys.modules.setdefault("torch", None)  # pyrefly: ignore[no-matching-overload]
    try:
        import tensorboardX
    finally:
        if torch is None:
            del sys.modules["torch"]
    return tensorboardX


class WeightsAndBiases:
    """The Weights & Biases run of a workdir, started or resumed. WANDB_MODE=offline works."""

    def __init__(self, folder: pathlib.Path, config: ConfigDict) -> None:
        wandb = import_wandb()
        identity = folder / "wandb_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=config.wandb,
                dir=folder,
                id=identity.read_text(),
                name=folder.name,
                config=config_lib.flat(config),
                resume="allow",
                reinit="create_new",
            )
        except wandb.errors.Error as e:
            raise UserError(
                f"Weights & Biases cannot start: {e}; log in, or set WANDB_MODE=offline"
            ) from e

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


def import_wandb() -> Any:
    """Returns the wandb module. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError as e:
        raise UserError("config.wandb needs Weights & Biases: pip install 'vit-jax[wandb]'") from e
    return wandb
