"""The workdir of one seed: lock, config.json, run.json, checkpoints, metrics, result.json."""

import contextlib
import datetime
import errno
import fcntl
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.durations import Every
from vit_jax.errors import UserError
from vit_jax.workdir import checkpoints as checkpoints_lib
from vit_jax.workdir import metrics
from vit_jax.workdir.files import write_errors, write_json

# Fields that may change on resume: they do not affect the results of a healthy run.
RESUMABLE_CHANGES = (
    *("data.dir", "data.streaming", "data.streaming_threads", "mesh.data", "mesh.fsdp"),
    *("model.remat", "tensorboard", "wandb", "on_bad_loss", "keep_every", "histograms_every"),
)


class Workdir:
    """The files of one seed.

    Several processes share a workdir: process 0 writes everything except the other processes'
    parts of a checkpoint.
    """

    def __init__(self, path: pathlib.Path, config: ConfigDict) -> None:
        self.path, self.config = path, config
        self.checkpoint_dir = path.absolute() / "checkpoints"
        self._checkpoints: Any = None
        self._sinks: list[Any] = []
        self._tensorboard: Any = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the workdir and its config.json, or checks that it has this config's.

        Holds an exclusive lock. Raises UserError if the workdir cannot be written, is locked,
        contains a run with a different config, or contains a symbolic link.
        """
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
                self._check_config()
            yield

    def _check_config(self):
        path = self.path / "config.json"
        if not path.exists():
            write_json(path, self.config.to_dict())
            return
        other = config_lib.difference(self.config, read_config(path), ignore=RESUMABLE_CHANGES)
        if other:
            raise UserError(
                f"{self.path} contains a run with a different config ({'; '.join(other[:5])}): "
                "use another --workdir, or delete this one"
            )

    def check_data(self, step: int, data_identity: dict[str, Any]) -> None:
        """Raises UserError if the checkpoint of a step was trained on other data."""
        folder = self.checkpoint_dir / str(step)
        try:
            saved = checkpoints_lib.read_document(folder, "data")
            other = _data_difference(saved, data_identity)
        except (LookupError, TypeError, ValueError) as e:
            raise UserError(f"{folder / 'data'} is not what vit_jax writes ({e!r})") from e
        if other:
            raise UserError(
                f"{self.path} contains a run on other data ({'; '.join(other)}): resume it with "
                "the data that it started with, or use another --workdir"
            )

    def begin(self, step: int, *, command: str, corrupted: Mapping[pathlib.Path, str]) -> None:
        """Writes run.json and clears the checkpoints after `step` (process 0)."""
        with write_errors(self.path):
            write_json(self.path / "run.json", environment(command))
            moved = checkpoints_lib.clear_after(self.checkpoint_dir, step, corrupted)
        for folder, target in moved.items():
            print(f"corrupted: {folder}: {corrupted[folder]}; moved to {target}", flush=True)

    def open(self, step: int, *, keep: Every) -> None:
        """Opens the checkpoints, in every process, and the metric sinks after `step`."""
        self._checkpoints = checkpoints_lib.Checkpoints(self.checkpoint_dir, keep=keep)
        if jax.process_index() == 0:
            fields = config_lib.flat(self.config)
            self._sinks = [metrics.JsonLines(self.path / "metrics.jsonl", step=step)]
            if self.config.tensorboard:
                self._tensorboard = metrics.TensorBoard(self.path, fields, step=step)
                self._sinks.append(self._tensorboard)
            if self.config.wandb:
                self._sinks.append(metrics.Wandb(self.config.wandb, self.path, fields))

    def restore(self, step: int, shapes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `Checkpoints.restore`."""
        return self._checkpoints.restore(step, shapes)

    def save(
        self,
        step: int,
        arrays: dict[str, Any],
        documents: dict[str, Any],
        *,
        val_accuracy: float | None,
    ) -> None:
        """Starts a save; see `Checkpoints.save`."""
        documents = documents | {"config": {"config": self.config.to_dict(), **documents["config"]}}
        for sink in self._sinks:
            sink.sync()  # before the checkpoint: a resumed run keeps the lines up to its step
        self._checkpoints.save(step, arrays, documents, val_accuracy=val_accuracy)

    def is_best(self, val_accuracy: float) -> bool:
        """Whether a validation accuracy exceeds every checkpoint's so far."""
        return val_accuracy > self._checkpoints.best_accuracy

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes {name: number} to every sink, without NaN and infinity, which JSON lacks."""
        scalars = {name: float(value) for name, value in scalars.items()}
        scalars = {name: v for name, v in scalars.items() if abs(v) < float("inf")}
        for sink in self._sinks:
            sink.write(step, scalars)

    def images(self, step: int, name: str, images: Any) -> None:
        """Writes uint8[N, H, W, C] to TensorBoard."""
        if self._tensorboard:
            self._tensorboard.images(step, name, images)

    def histograms(self, step: int, params: Any) -> None:
        """Writes the distribution of each parameter to TensorBoard."""
        if self._tensorboard:
            self._tensorboard.histograms(step, params)

    def wait(self) -> None:
        """Waits for a pending save."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Waits for a pending save, and closes the checkpoints and the sinks."""
        if self._checkpoints:
            self._checkpoints.close()
        for sink in self._sinks:
            sink.close()
        self._checkpoints, self._sinks, self._tensorboard = None, [], None


def _lock(folder):
    """Locks a workdir; returns the open lock file. Raises UserError if it is locked."""
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno == errno.EWOULDBLOCK:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{folder} is in use by {owner}: wait for it, end it, or use another --workdir"
            ) from e
        # Otherwise this file system does not support locks.
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def read_config(path: pathlib.Path) -> ConfigDict:
    """The ConfigDict of a config.json. Raises UserError if it is not one."""
    try:
        return config_lib.from_dict(json.loads(path.read_text()))
    except ValueError as e:
        raise UserError(f"{path} is not the config of a run: {e}") from e


def check_free_space(folders: Sequence[pathlib.Path], checkpoint_bytes: int) -> None:
    """Raises UserError if the disk lacks space for a run's checkpoints.

    `checkpoint_bytes` counts all seeds. There must be space for four: two and the best are kept
    while another is written. Existing ones count, except corrupted ones, which stay.
    """
    needed = 4 * checkpoint_bytes
    for step_folder in (p for folder in folders for p in folder.glob("checkpoints/*")):
        if step_folder.suffix == checkpoints_lib.CORRUPTED:
            continue
        for parent, _, names in os.walk(step_folder):
            for name in names:
                with contextlib.suppress(OSError):  # another run may delete it
                    needed -= os.lstat(os.path.join(parent, name)).st_size
    path = folders[0].absolute()
    with write_errors(path):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the checkpoints of this run need {needed / 1e6:,.1f} MB in {folders[0]}, where "
            f"{free / 1e6:,.1f} MB are free: make room, or use another --workdir"
        )


def _data_difference(saved, current):
    """Describes how two data identities differ, one string per class list or split."""
    classes = [data["class_names"] for data in (saved, current)]
    if classes[0] != classes[1]:
        pairs = enumerate(itertools.zip_longest(*classes))
        i, (before, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        return [f"class {i} is {now or 'absent'}, was {before or 'absent'}"]
    differences = []
    for name, now in current["splits"].items():
        before = saved["splits"][name]
        sizes = now["num_examples"], before["num_examples"]
        if sizes[0] != sizes[1]:
            differences.append(f"{name}: {sizes[0]:,} images, was {sizes[1]:,}")
        elif now["digest_of"] == before["digest_of"] and now["digest"] != before["digest"]:
            differences.append(f"{name}: other images or labels, as many as before")
    return differences


def commit_of(path: pathlib.Path) -> str | None:
    """The commit of the repository that tracks a file, with -dirty if it has changes; else None.

    A package in an environment that the surrounding repository ignores has none.
    """

    def git(*arguments):
        command = ["git", *arguments]
        return subprocess.run(command, cwd=path.parent, capture_output=True, text=True)

    with contextlib.suppress(OSError):  # git is not installed
        if git("ls-files", "--error-unmatch", path.name).returncode == 0:
            described = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
            return described.stdout.strip() or None
    return None


def environment(command: str) -> dict[str, Any]:
    """The content of run.json: command, date, commit, versions, host, and devices."""
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
