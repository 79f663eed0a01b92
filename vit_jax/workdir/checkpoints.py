"""Checkpoints as orbax composites: STEP/{params, ema_params, opt_state, config, data, progress}.

`params` and `ema_params` are saved as host arrays, so that any JAX code restores them with orbax
alone, with no target tree and on any device count. `config`, `data`, and `progress` are JSON.
"""

import asyncio
import contextlib
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from logging import CRITICAL, getLogger
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from vit_jax.durations import Every
from vit_jax.errors import DISK_REFUSES, UserError
from vit_jax.workdir import checksums

CORRUPTED = ".corrupted"
_COMMITTED, _DELETED = "commit_success.txt", ".deleted"
_REFUSALS = [os.strerror(number) for number in DISK_REFUSES]


def _quiet():
    """Silences orbax's progress logs and the duplicate errors that asyncio prints after a failed
    save."""
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)
    previous_hook = sys.unraisablehook

    def without_closed_loops(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous_hook(unraisable)

    if getattr(previous_hook, "__name__", "") != without_closed_loops.__name__:
        sys.unraisablehook = without_closed_loops


class _ChecksummedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The temporary directory of a checkpoint: the checksums are written last, then it is renamed.

    As in orbax, the checkpoint and each item contain commit_success.txt: in a bucket, which has no
    rename, orbax reads only folders with this file.
    """

    async def finalize(self):
        if self._checkpoint_metadata_store:
            await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
        folder = pathlib.Path(self.get())
        await asyncio.to_thread((folder / _COMMITTED).touch)
        if self.get_final().name.isdecimal():  # a checkpoint, not one of its items
            await asyncio.to_thread(checksums.write, folder)
        os.rename(self.get(), self.get_final())


class _Keep:
    """orbax's preservation policy: the newest two, the best, and a cadence.

    orbax's own BestN breaks ties toward the newest step; the best here is the earliest.
    """

    def __init__(self, every):
        self.every, self.best_step = every, None

    def should_preserve(self, checkpoints, *, context):
        steps = [info.step for info in checkpoints]
        return [
            step in steps[-2:] or step == self.best_step or (self.every and self.every(step))
            for step in steps
        ]


class Checkpoints:
    """The checkpoints in one directory, opened for saving. Every process must open them together.

    Keeps the newest two, the best by validation accuracy, and the cadence `keep`. A save
    is written under a temporary name and renamed when complete, so a kill leaves the previous
    checkpoint as the newest. `best_accuracy` is -1 before there is a best.
    """

    def __init__(self, directory: pathlib.Path, *, keep: Every | None = None) -> None:
        _quiet()
        self._directory, self._keep = directory.absolute(), _Keep(keep)
        self.best_accuracy = -1.0
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._keep,
            cleanup_tmp_directories=True,
            todelete_subdir=_DELETED,  # renamed first: none is partly deleted under its name
            temporary_path_class=_ChecksummedPath,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._empty_deleted()

    def _empty_deleted(self):
        if jax.process_index() == 0:
            shutil.rmtree(self._directory / _DELETED, ignore_errors=True)

    def save(
        self,
        step: int,
        arrays: dict[str, Any],
        documents: dict[str, Any],
        *,
        val_accuracy: float | None = None,
    ) -> None:
        """Starts a save and returns; `wait` and `close` wait for it.

        Args:
          arrays: {item: tree of host arrays}; an item of None is omitted.
          documents: {item: JSON value}; must include `progress`, a dict.
          val_accuracy: of this step, if it was validated.
        """
        self.wait()
        if val_accuracy is not None and val_accuracy > self.best_accuracy:
            self._keep.best_step, self.best_accuracy = step, float(val_accuracy)
        best = {"step": self._keep.best_step, "val_accuracy": self.best_accuracy}
        documents = documents | {"progress": {**documents["progress"], "best": best}}
        items = {k: ocp.args.StandardSave(v) for k, v in arrays.items() if v is not None}
        items |= {k: ocp.args.JsonSave(v) for k, v in documents.items()}
        with self._save_errors():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, shapes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns ({item: tree of host arrays}, progress) of a step.

        `shapes` is {item: tree of jax.ShapeDtypeStruct without shardings}; an item of None is
        returned as None. Raises UserError if the files do not contain them.
        """
        items = {k: ocp.args.StandardRestore(v) for k, v in shapes.items() if v is not None}
        items["progress"] = ocp.args.JsonRestore()
        with _restore_errors(self._directory / str(step)):
            restored = dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        progress = restored.pop("progress")
        best = progress["best"]
        self._keep.best_step, self.best_accuracy = best["step"], best["val_accuracy"]
        return dict.fromkeys(shapes) | restored, progress

    def wait(self) -> None:
        """Waits until the save that was started is complete on disk."""
        with self._save_errors():
            self._manager.wait_until_finished()
        self._empty_deleted()

    def close(self) -> None:
        """Waits for the save that was started, and closes orbax's manager."""
        self.wait()
        with self._save_errors():
            self._manager.close()

    @contextlib.contextmanager
    def _save_errors(self):
        """Raises UserError for a failed write, which orbax raises at the next save or at the end.

        orbax waits for the other processes with multihost_utils.sync_global_devices, which fetches
        its result from the device without jax.device_get: the transfer guard must allow it.
        """
        try:
            with jax.transfer_guard("allow"):
                yield
        except Exception as e:  # orbax and tensorstore raise many types for a failed write
            reason = next((r for r in _REFUSALS if r in str(e)), None)
            if reason is None:
                raise
            steps = list_steps(self._directory)
            kept = f"step {steps[-1]} is the last one saved" if steps else "nothing is saved yet"
            raise UserError(
                f"cannot save to {self._directory}: {reason}; {kept}; make room, then rerun the "
                "same command to resume"
            ) from e


def list_steps(directory: pathlib.Path) -> list[int]:
    """The complete steps in a directory, ascending; [] if it does not exist."""
    with checksums.reading(directory):
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return []
    return sorted(int(name) for name in names if name.isdecimal())


def newest_intact_step(directories: Sequence[pathlib.Path]) -> tuple[int, dict[pathlib.Path, str]]:
    """The newest step that is intact in every directory of checkpoints, one per seed.

    Returns (step, corrupted): 0 if there are no checkpoints; {folder: description} of the newer
    corrupted ones. Changes nothing. Raises UserError if one cannot be read, if some are corrupted
    and none is intact, or if a seed lacks more than the last step: a kill between the saves of two
    seeds loses only that one.
    """
    saved = {d: list_steps(d) for d in directories}
    corrupted: dict[pathlib.Path, str] = {}
    missing: list[pathlib.Path] = []
    for step in sorted(set().union(*saved.values()), reverse=True):
        folders = [d / str(step) for d in directories if step in saved[d]]
        found = {folder: checksums.find_corruption(folder) for folder in folders}
        problems = {folder: problem for folder, problem in found.items() if problem}
        corrupted |= problems
        if len(folders) < len(directories):
            missing += [d / str(step) for d in directories if step not in saved[d]]
        elif not problems:
            return step, corrupted
        if len({folder.name for folder in missing}) > 1:
            raise UserError(
                f"checkpoints are missing ({', '.join(map(str, missing))}) that the other seeds "
                "have: restore them from a copy, or delete every seed's checkpoints to start over"
            )
    if corrupted:
        listed = "; ".join(f"{folder}: {problem}" for folder, problem in corrupted.items())
        raise UserError(
            f"every checkpoint is corrupted ({listed}): restore them from a copy, or delete the "
            "checkpoints folder to start over"
        )
    return 0, {}


def clear_after(
    directory: pathlib.Path, step: int, corrupted: Mapping[pathlib.Path, str]
) -> dict[pathlib.Path, pathlib.Path]:
    """Prepares `directory` for resuming from `step`, before any process opens it.

    Renames the later checkpoints in `corrupted` to STEP.corrupted, and deletes the others, which
    were saved for some seeds only. Returns {folder: its new path} of the renamed ones.
    """
    deleted, moved = directory / _DELETED, {}
    shutil.rmtree(deleted, ignore_errors=True)
    for folder in (directory / str(later) for later in list_steps(directory) if later > step):
        if folder in corrupted:
            target = folder
            while target.exists():
                target = target.with_name(target.name + CORRUPTED)
            moved[folder] = folder.rename(target)
        else:
            deleted.mkdir(exist_ok=True)
            folder.rename(deleted / folder.name)
    return moved


def read_document(folder: pathlib.Path, item: str) -> Any:
    """A JSON item of a checkpoint. Raises UserError if it cannot be read."""
    _quiet()
    with _restore_errors(folder), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder / item)


@contextlib.contextmanager
def _restore_errors(folder):
    try:
        yield
    except Exception as e:  # orbax, tensorstore, and json raise many types for corrupted files
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise UserError(
            f"cannot restore {folder}: {reason}; move it elsewhere to use an earlier checkpoint"
        ) from e


def saved_steps(directory: pathlib.Path) -> list[int]:
    """The complete steps in a directory, ascending. Raises UserError if it does not exist."""
    if not directory.is_dir():
        remedy = "train with this --workdir first"
        if seeds := sorted(p.name for p in directory.parent.glob("seed_*")):
            remedy = f"it contains a run of several seeds; pass one of {', '.join(seeds)}"
        raise UserError(f"no checkpoints in {directory}: {remedy}")
    return list_steps(directory)


def restore_for_inference(
    directory: pathlib.Path, step: int | None = None
) -> tuple[Any, dict[str, Any], int]:
    """(params, config item, step): the weights to evaluate, as numpy arrays.

    These are `ema_params` if the run keeps them, else `params`. Raises UserError if there is no
    complete checkpoint, or none of `step`.
    """
    steps = saved_steps(directory)
    if not steps or (step is not None and step not in steps):
        known = f"it has {', '.join(map(str, steps))}" if steps else "it has none yet"
        wanted = "checkpoint" if step is None else f"checkpoint {step}"
        raise UserError(f"no {wanted} in {directory}: {known}")
    step = max(steps) if step is None else step
    folder = directory.absolute() / str(step)
    if problem := checksums.find_corruption(folder):
        others = ", ".join(str(s) for s in steps if s != step) or "none"
        raise UserError(f"the checkpoint {folder} is corrupted: {problem}; other steps: {others}")
    config = read_document(folder, "config")
    item = "ema_params" if (folder / "ema_params").is_dir() else "params"
    with _restore_errors(folder), ocp.StandardCheckpointer() as reader:
        params = reader.restore(folder / item)
    if not _is_config_item(config):
        raise UserError(f"cannot restore {folder}: its config is not what vit_jax writes")
    return params, config, step


def _is_config_item(saved):
    """Whether JSON has the fields of a `config` item: classes, image shape, and preprocessing."""
    try:
        names, shape, pixels = (saved[k] for k in ("class_names", "image_shape", "preprocessing"))
        lists = (names, shape, pixels["mean"], pixels["std"])
        return (
            isinstance(saved["config"], dict)
            and all(isinstance(each, list) for each in lists)
            and bool(names)
            and all(isinstance(name, str) for name in names)
            and [type(n) for n in shape] == [int] * 3
            and all(0 < n < 2**16 for n in shape)
            and all(isinstance(x, (int, float)) for x in (*pixels["mean"], *pixels["std"]))
        )
    except (KeyError, TypeError):
        return False
