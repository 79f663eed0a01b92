"""The workdir of one seed: lock, config.json, run.json, checkpoints, metrics, result.json."""

import contextlib
import datetime
import fcntl
import glob
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import shlex
import socket
import subprocess
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.durations import Every
from vit_jax.errors import UserError
from vit_jax.workdir import checkpoints as checkpoints_lib
from vit_jax.workdir import metrics
from vit_jax.workdir.files import write_errors, write_json

# Fields that may change on resume: they do not affect the results of a healthy run.
_RESUMABLE_CHANGES = (
    *("data.dir", "data.streaming", "data.streaming_threads", "mesh.data", "mesh.fsdp"),
    *("model.remat", "tensorboard", "wandb", "on_bad_loss", "keep_every"),
)


class Workdir:
    """The files of one seed. Process 0 writes them, except the parts of a checkpoint."""

    def __init__(self, path: pathlib.Path, config: ConfigDict) -> None:
        self.path, self.config = path, config
        self.checkpoint_dir = path.absolute() / "checkpoints"
        self.checkpoints: Any = None  # opened by `open`, like the sinks of metrics
        self._lines: Any = None
        self._sinks: list[Any] = []  # metrics.jsonl first

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Locks the workdir during the context, after creating it or checking its config.

        Raises UserError if the workdir cannot be written, is locked, contains a symbolic link, has
        a config that differs from this run's, or has a path with *, ?, or [.
        """
        if glob.has_magic(str(self.checkpoint_dir)):
            # orbax uses the path in a pattern, and would save a checkpoint that cannot be restored.
            raise UserError(
                f"{self.path.absolute()} contains *, ?, or [, and orbax cannot save checkpoints in "
                "such a path: use another --workdir"
            )
        with write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for path in (*self.path.iterdir(), *self.checkpoint_dir.glob("*")):
                if path.is_symlink():  # an untrusted workdir could point it anywhere
                    raise UserError(
                        f"{path} is a symbolic link, and a run writes only into its workdir: "
                        "remove it, or use another --workdir"
                    )
            lock = _lock(self.path)
        with lock:
            with write_errors(self.path):
                self._check_config(self.path / "config.json")
            yield

    def _check_config(self, path):
        if not path.exists():
            write_json(path, self.config.to_dict())
            return
        try:
            saved = json.loads(path.read_text())
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is not the config of a run: {e}") from e
        self._compare_config(saved, path)

    def _compare_config(self, saved, path):
        """Raises UserError if a saved config, the content of `path`, is not this run's."""
        try:
            saved = config_lib.from_dict(saved)
        except UserError as e:
            raise UserError(f"{path} is not the config of a run: {e}") from e
        if other := config_lib.difference(self.config, saved, ignore=_RESUMABLE_CHANGES):
            raise UserError(
                f"{self.path} contains a run with a different config ({'; '.join(other[:5])}): "
                "use another --workdir, or delete this one"
            )

    def check_resume(self, step: int, data_identity: dict[str, Any]) -> None:
        """Raises UserError if the checkpoint of a step has another config or other data."""
        folder = self.checkpoint_dir / str(step)
        document = checkpoints_lib.read_document(folder, "config")
        saved = document.get("config") if isinstance(document, dict) else document
        self._compare_config(saved, folder / "config")
        saved = checkpoints_lib.read_document(folder, "data")
        try:
            other = _data_difference(saved, data_identity)
        except (LookupError, TypeError, ValueError) as e:
            raise UserError(
                f"{folder / 'data'} is not what vit_jax writes ({type(e).__name__}: {e}): move "
                f"{folder} elsewhere to use an earlier checkpoint"
            ) from e
        if other:
            raise UserError(
                f"{self.path} contains a run on other data ({'; '.join(other)}): resume it with "
                "the data that it started with, or use another --workdir"
            )

    def begin(self, step: int, command: str, corrupted: dict[pathlib.Path, str]) -> None:
        """Writes run.json, and removes the checkpoints after `step` and any result (process 0)."""
        with write_errors(self.path):
            (self.path / "result.json").unlink(missing_ok=True)
            write_json(self.path / "run.json", environment(command))
            checkpoints_lib.clear_after(self.checkpoint_dir, step, corrupted)

    def open(self, step: int, *, keep: Every) -> None:
        """Opens the checkpoints, in every process, and the metrics after `step` in process 0."""
        self.checkpoints = checkpoints_lib.Checkpoints(self.checkpoint_dir, keep)
        if jax.process_index() == 0:
            self._lines = metrics.JsonLines(self.path / "metrics.jsonl", step=step)
            self._sinks.append(self._lines)
            if self.config.tensorboard:
                self._sinks.append(metrics.TensorBoard(self.path, self.config, step=step))
            if self.config.wandb:
                self._sinks.append(metrics.WeightsAndBiases(self.path, self.config))

    def save(self, step: int, arrays: dict, documents: dict, val_accuracy: float | None) -> None:
        """Starts a save; see `Checkpoints.save`."""
        documents = documents | {"config": {"config": self.config.to_dict(), **documents["config"]}}
        if self._lines:
            self._lines.sync()  # before the checkpoint: a resumed run keeps the lines up to it
        self.checkpoints.save(step, arrays, documents, val_accuracy)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes {name: number} to every sink, without NaN and infinity, which JSON lacks."""
        scalars = {name: float(value) for name, value in scalars.items() if np.isfinite(value)}
        for sink in self._sinks:
            sink.write(step, scalars)

    def close(self) -> None:
        """Waits for a pending save, and closes the checkpoints and the metrics."""
        self.checkpoints.close()
        for sink in self._sinks:
            sink.close()


def _lock(folder):
    """Locks a workdir, and returns the open lock file."""
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        with file:
            file.seek(0)
            owner = file.read().strip() or "another process"
        raise UserError(
            f"{folder} is in use by {owner}: wait for it, end it, or use another --workdir"
        ) from e
    except OSError:
        pass  # this file system does not support locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _data_difference(saved, current):
    """Describes how two data identities differ, one string per class or split."""
    differences = []
    pairs = itertools.zip_longest(saved["class_names"], current["class_names"])
    for i, (before, now) in enumerate(pairs):
        if before != now:
            return [f"class {i} is {now or 'absent'}, was {before or 'absent'}"]
    for name, now in current["splits"].items():
        before = saved["splits"][name]
        sizes = now["num_examples"], before["num_examples"]
        if sizes[0] != sizes[1]:
            differences.append(f"{name}: {sizes[0]:,} images, was {sizes[1]:,}")
        elif now["digest_of"] == before["digest_of"] and now["digest"] != before["digest"]:
            differences.append(f"{name}: other images or labels, as many as before")
    return differences


def commit_of(path: pathlib.Path) -> str | None:
    """Returns the commit of the repository that tracks a file, -dirty with changes, or None."""
    tracked = f"git ls-files --error-unmatch {shlex.quote(path.name)} >&2"
    describe = "git describe --always --dirty --abbrev=40 --exclude='*'"
    done = subprocess.run(
        f"{tracked} && {describe}", shell=True, cwd=path.parent, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def environment(command: str) -> dict[str, Any]:
    """Returns the content of run.json: command, date, commit, versions, host, and devices."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit_of(pathlib.Path(__file__)),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
        "host": platform.node(),
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
    }
