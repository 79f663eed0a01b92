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
from logging import CRITICAL, getLogger
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from vit_jax.durations import Every
from vit_jax.errors import WRITE_FAILURES, UserError
from vit_jax.workdir.files import find_corruption, read_errors, write_checksums

_DELETED = ".deleted"
_previous_hook = sys.unraisablehook


def _quiet():
    """Silences orbax's progress, and what asyncio adds to the error of a failed save."""
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)
    sys.unraisablehook = _without_closed_loops


def _without_closed_loops(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
        _previous_hook(unraisable)


class _ChecksummedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The temporary directory of a checkpoint, renamed after the checksums are written."""

    async def finalize(self):
        if self._checkpoint_metadata_store:
            await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
        folder = pathlib.Path(self.get())
        # In a bucket, which has no rename, orbax reads only folders with this file.
        await asyncio.to_thread((folder / "commit_success.txt").touch)
        if self.get_final().name.isdecimal():  # a checkpoint, not one of its items
            await asyncio.to_thread(write_checksums, folder)
        os.rename(folder, self.get_final())


class Checkpoints:
    """The checkpoints in one directory, opened for saving by every process together."""

    def __init__(self, directory: pathlib.Path, keep: Every) -> None:
        _quiet()
        self._directory, self._keep = directory.absolute(), keep
        self._best: dict[str, Any] = {"step": None, "val_accuracy": -1.0}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            cleanup_tmp_directories=True,
            todelete_subdir=_DELETED,  # rename first: a kill then leaves no half-deleted step
            temporary_path_class=_ChecksummedPath,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """orbax's preservation policy: the newest two, the best, and the cadence `keep`."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [s in steps[-2:] or s == self._best["step"] or self._keep(s) for s in steps]

    @property
    def best_step(self) -> int | None:
        """The saved step with the best validation accuracy, or None."""
        return self._best["step"]

    def is_best(self, val_accuracy: float) -> bool:
        """Returns whether an accuracy exceeds every saved step's; the first of a tie is best."""
        return val_accuracy > self._best["val_accuracy"]

    def save(self, step: int, arrays: dict, documents: dict, val_accuracy: float | None) -> None:
        """Starts saving {item: tree of host arrays, or None} and {item: JSON value}."""
        if val_accuracy is not None and self.is_best(val_accuracy):
            self._best = {"step": step, "val_accuracy": float(val_accuracy)}
        documents = documents | {"progress": {**documents["progress"], "best": self._best}}
        items = {k: ocp.args.StandardSave(v) for k, v in arrays.items() if v is not None}
        items |= {k: ocp.args.JsonSave(v) for k, v in documents.items()}
        with self._save_errors():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, shapes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns ({item: tree of host arrays}, progress) of a step; `shapes` has no shardings."""
        items = {k: ocp.args.StandardRestore(v) for k, v in shapes.items() if v is not None}
        items["progress"] = ocp.args.JsonRestore()
        with _restore_errors(self._directory / str(step)):
            restored = dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        progress = restored.pop("progress")
        self._best = progress["best"]
        return dict.fromkeys(shapes) | restored, progress

    def wait(self) -> None:
        """Waits until the save that was started is complete on disk."""
        with self._save_errors():
            self._manager.wait_until_finished()
        if jax.process_index() == 0:
            shutil.rmtree(self._directory / _DELETED, ignore_errors=True)

    def close(self) -> None:
        """Waits for the save that was started, and closes orbax's manager."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _save_errors(self):
        """Raises UserError for a failed write, which orbax reports at the next call."""
        try:
            with jax.transfer_guard("allow"):  # orbax's sync_global_devices fetches implicitly
                yield
        except Exception as e:  # orbax and tensorstore raise many types for a failed write
            reasons = [text for text in map(os.strerror, WRITE_FAILURES) if text in str(e)]
            if not reasons:
                raise
            steps = saved_steps(self._directory)
            kept = f"step {steps[-1]} is the last one saved" if steps else "nothing is saved yet"
            raise UserError(
                f"cannot save to {self._directory}: {reasons[0]}; {kept}; fix this, then rerun "
                "the same command to resume"
            ) from e


def saved_steps(directory: pathlib.Path) -> list[int]:
    """Returns the complete steps in a directory, ascending; [] if it does not exist."""
    names: list[str] = []
    with read_errors(directory), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(directory)
    return sorted(int(name) for name in names if name.isdecimal())


def newest_intact_step(directories: list[pathlib.Path]) -> tuple[int, dict[pathlib.Path, str]]:
    """Returns the newest step that is intact in every directory. Each seed has one directory.

    Returns 0 if no step is saved, or if the only saved step is missing for some seeds. Also returns
    {folder: problem} for the later checkpoints that are corrupted. Raises UserError if a checkpoint
    cannot be read, if all are corrupted, or if a seed is missing more than one step: a kill between
    the saves of two seeds loses only one.
    """
    saved = {d: saved_steps(d) for d in directories}
    corrupted: dict[pathlib.Path, str] = {}
    missing: list[pathlib.Path] = []
    for step in sorted(set().union(*saved.values()), reverse=True):
        folders = [d / str(step) for d in directories if step in saved[d]]
        problems = {f: problem for f in folders if (problem := find_corruption(f))}
        lacking = [d / str(step) for d in directories if step not in saved[d]]
        if not problems and not lacking:
            return step, corrupted
        if missing and lacking:
            names = ", ".join(map(str, [*missing, *lacking, *corrupted]))
            raise UserError(
                f"checkpoints are missing or corrupted ({names}) that other seeds have: restore "
                "them from a copy, or delete every seed's checkpoints to start over"
            )
        corrupted |= problems
        missing += lacking
    if corrupted:
        reasons = "; ".join(f"{folder}: {problem}" for folder, problem in corrupted.items())
        raise UserError(
            f"every checkpoint is corrupted ({reasons}): restore them from a copy, "
            "or delete the checkpoints folder to start over"
        )
    return 0, {}


def clear_after(directory: pathlib.Path, step: int, corrupted: dict[pathlib.Path, str]) -> None:
    """Prepares `directory` for resuming from `step`, before any process opens it.

    Later checkpoints in `corrupted`, from `newest_intact_step`, are renamed to STEP.corrupted. They
    are not verified again, because a second check could find one intact. The others, which are
    missing or corrupted for another seed, are deleted.
    """
    deleted = directory / _DELETED
    shutil.rmtree(deleted, ignore_errors=True)
    for folder in (directory / str(later) for later in saved_steps(directory) if later > step):
        if problem := corrupted.get(folder):
            target = folder
            while target.exists():
                target = target.with_name(f"{target.name}.corrupted")
            folder.rename(target)
            print(f"corrupted: {folder}: {problem}; moved to {target}", flush=True)
        else:
            deleted.mkdir(exist_ok=True)
            folder.rename(deleted / folder.name)


def read_document(folder: pathlib.Path, item: str) -> Any:
    """Returns a JSON item of a checkpoint. Raises UserError if it cannot be read."""
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


def restore_for_inference(directory: pathlib.Path, step: int | None = None) -> tuple[Any, Any, int]:
    """Returns (params as numpy arrays, config item, step) of `step` (default: the newest).

    The params are `ema_params` if the run keeps them. Raises UserError if the step is not intact.
    """
    steps = saved_steps(directory)
    if not steps:
        remedy = "pass the directory of a run, or train with this --workdir first"
        if seeds := sorted(path.name for path in directory.parent.glob("seed_*")):
            remedy = f"it is a run of several seeds; pass one of {', '.join(seeds)}"
        raise UserError(f"no checkpoints in {directory}: {remedy}")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"no checkpoint {step} in {directory}: it has {', '.join(map(str, steps))}")
    folder = directory.absolute() / str(step)
    if problem := find_corruption(folder):
        others = ", ".join(str(other) for other in steps if other != step) or "none"
        raise UserError(f"the checkpoint {folder} is corrupted: {problem}; other steps: {others}")
    config = read_document(folder, "config")
    item = "ema_params" if (folder / "ema_params").is_dir() else "params"
    with _restore_errors(folder), ocp.StandardCheckpointer() as reader:
        params = reader.restore(folder / item)
        if not _is_config_item(config):
            raise ValueError("its config is not what vit_jax writes")
    return params, config, step


def _is_config_item(saved):
    """Returns whether JSON is a `config` item: classes, image shape, and preprocessing."""
    names, shape, pixels = (saved[k] for k in ("class_names", "image_shape", "preprocessing"))
    return (
        isinstance(saved["config"], dict)
        and isinstance(names, list)
        and {type(name) for name in names} == {str}
        and [type(n) for n in shape] == [int] * 3
        and all(0 < n < 2**16 for n in shape)
        and {type(x) for x in pixels["mean"] + pixels["std"]} <= {int, float}
    )
