"""Checkpoints as orbax composites: STEP/{params, ema_params, opt_state, config, data, progress}.

`params` and `ema_params` are saved as host arrays, so that any JAX code restores them with orbax
alone, with no target tree and on any device count. `config`, `data`, and `progress` are JSON.
SHA256SUMS lists the checksum of every file (`sha256sum --check SHA256SUMS` accepts it), because
tensorstore verifies only its index and orbax verifies nothing.
"""

import asyncio
import contextlib
import hashlib
import os
import pathlib
import shutil
import stat
import sys
from logging import CRITICAL, getLogger

import jax
import orbax.checkpoint as ocp
from absl import logging

from vit_jax.errors import DISK_REFUSES, UserError

SUMS, COMMITTED, CORRUPTED = "SHA256SUMS", "commit_success.txt", ".corrupted"
_DELETED = ".deleted"
_REFUSALS = [os.strerror(number) for number in DISK_REFUSES]


def _quiet():
    """Orbax tells each step of a save. Of an error, which it raises, asyncio tells again; and so
    does each tensorstore write that was still under way, to an event loop that is gone.
    """
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)
    before = sys.unraisablehook

    def without_the_echo(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    if getattr(before, "__name__", "") != without_the_echo.__name__:
        sys.unraisablehook = without_the_echo


class _Summed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint's directory while it is written: the checksums go in last, then it is renamed.

    As in orbax, the checkpoint and each item contain commit_success.txt: where nothing can be
    renamed, such as in a bucket, orbax reads only what contains it.
    """

    async def finalize(self):
        if self._checkpoint_metadata_store:
            await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
        folder = pathlib.Path(self.get())
        await asyncio.to_thread((folder / COMMITTED).touch)
        if self.get_final().name.isdecimal():  # not one of its items
            await asyncio.to_thread(_write_sums, folder)
        os.rename(self.get(), self.get_final())


def _write_sums(folder):
    sums = "".join(
        f"{_sha256(path, sync=True)}  {path.relative_to(folder).as_posix()}\n"
        for path in _files(folder)
    )
    with open(folder / SUMS, "w") as file:
        file.write(sums)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path, *, sync=False):
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())  # on disk before the rename that calls it complete
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_corruption(folder):
    """Describes the corruption of a checkpoint's files; returns None if they are as saved.

    Raises UserError for a file that cannot be read, which may well be intact.
    """
    with _reading(folder / SUMS):
        try:
            with open(folder / SUMS, "rb") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return f"{SUMS} is missing"
    with _reading(folder):
        files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for line in lines:
        digest, _, name = line.decode(errors="replace").partition("  ")
        if name not in files:
            return f"{name!r} of {SUMS} is missing"
        with _reading(files[name]):
            if _sha256(files[name]) != digest:
                return f"{name} is not what was saved"
    return None if lines else f"{SUMS} is empty"


@contextlib.contextmanager
def _reading(path):
    try:
        yield
    except OSError as e:
        raise UserError(
            f"cannot read {e.filename or path} ({e.strerror}), and a checkpoint is used only if "
            "every file of it can be read: restore access to it, or move its checkpoint elsewhere "
            "to do without it"
        ) from e


def _files(folder):
    """The regular files under a folder, sorted; a symbolic link may lead anywhere and is skipped.

    Raises OSError for a subfolder that cannot be listed, which Path.rglob would skip.
    """

    def fail(error):
        raise error

    walk = os.walk(folder, onerror=fail)
    paths = (pathlib.Path(parent, name) for parent, _, names in walk for name in names)
    return sorted(path for path in paths if stat.S_ISREG(path.lstat().st_mode))


def newest_intact_step(directories):
    """The newest step that is intact in each of several directories of checkpoints, one per seed.

    Returns (step, corrupted): 0 if there are no checkpoints; {folder: description} of the corrupted
    ones that are newer. Changes nothing. Raises UserError if one of them cannot be read, if there
    are corrupted ones and none is intact, or if a seed lacks more than the last step, which is all
    that a kill between the saves of two seeds leaves out.
    """
    saved, corrupted, lacking = {d: _steps(d) for d in directories}, {}, []
    for step in sorted(set().union(*saved.values()), reverse=True):
        folders = [d / str(step) for d in directories if step in saved[d]]
        found = {folder: problem for folder in folders if (problem := find_corruption(folder))}
        corrupted |= found
        if len(folders) < len(directories):
            lacking += [d / str(step) for d in directories if step not in saved[d]]
        elif not found:
            return step, corrupted
        if len({folder.name for folder in lacking}) > 1:
            raise UserError(
                f"checkpoints are missing ({', '.join(map(str, lacking))}) that the other seeds "
                "have: restore them from a copy, or delete every seed's checkpoints to begin again"
            )
    if corrupted:
        problems = "; ".join(f"{folder}: {problem}" for folder, problem in corrupted.items())
        raise UserError(
            f"every checkpoint is corrupted ({problems}): restore them from a copy, or delete the "
            "checkpoints folder to begin again"
        )
    return 0, {}


def clear_after(directory, step, corrupted):
    """Clears the way for a run that resumes from `step`, before any process opens `directory`.

    The later checkpoints in `corrupted` are renamed to STEP.corrupted; the others, which were saved
    for some seeds only, are deleted. Returns {folder: its new path} of the renamed ones.
    """
    deleted, moved = directory / _DELETED, {}
    shutil.rmtree(deleted, ignore_errors=True)
    for folder in (directory / str(later) for later in _steps(directory) if later > step):
        if folder in corrupted:
            target = folder
            while target.exists():
                target = target.with_name(target.name + CORRUPTED)
            moved[folder] = folder.rename(target)
        else:
            deleted.mkdir(exist_ok=True)
            folder.rename(deleted / folder.name)
    return moved


class _Keep:
    """What orbax's CheckpointManager keeps: the newest two, the best, and every so many steps."""

    def __init__(self, every):
        self.every, self.best_step = every, None

    def should_preserve(self, checkpoints, *, context):
        newest = [info.step for info in checkpoints][-2:]
        return [
            step in newest or step == self.best_step or bool(self.every and step % self.every == 0)
            for step in (info.step for info in checkpoints)
        ]


class Checkpoints:
    """The checkpoints in one directory (a pathlib.Path).

    Kept are the newest two, the best by validation accuracy and, with `keep_every`, those of every
    so many steps. A save is written beside its final name and renamed when complete: a run killed
    in the middle leaves the one before as the newest. `best_accuracy` is that of the best so far,
    -1 before there is one; each checkpoint remembers it in its `progress`.
    """

    def __init__(self, directory, *, keep_every=0):
        _quiet()
        self._directory, self._keep = directory.absolute(), _Keep(keep_every)
        self.best_accuracy = -1.0
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._keep,
            cleanup_tmp_directories=True,
            todelete_subdir=_DELETED,  # a rename: none is ever half deleted under its own name
            temporary_path_class=_Summed,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._empty()

    def _empty(self):
        if jax.process_index() == 0:
            shutil.rmtree(self._directory / _DELETED, ignore_errors=True)

    def steps(self):
        """The complete steps on disk, ascending."""
        return _steps(self._directory)

    def save(
        self, step, *, params, ema_params, opt_state, config, data, progress, val_accuracy=None
    ):
        """Starts a save of trees of host arrays and returns; `wait` and `close` wait for it.

        `config`, `data`, and `progress`, a dict, are saved as JSON. `val_accuracy` is this step's,
        if it is known.
        """
        if val_accuracy is not None and val_accuracy > self.best_accuracy:
            self._keep.best_step, self.best_accuracy = step, val_accuracy
        best = {"step": self._keep.best_step, "val_accuracy": self.best_accuracy}
        items = {
            "params": ocp.args.StandardSave(params),
            "opt_state": ocp.args.StandardSave(opt_state),
            "config": ocp.args.JsonSave(config),
            "data": ocp.args.JsonSave(data),
            "progress": ocp.args.JsonSave({**progress, "best": best}),
        }
        if ema_params is not None:
            items["ema_params"] = ocp.args.StandardSave(ema_params)
        with self._named_errors():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step, *, params, ema_params, opt_state):
        """A dict of the items at `step`, as host arrays.

        The arguments are trees of jax.ShapeDtypeStruct, without shardings; an `ema_params` of None
        is left out. Raises UserError when the files do not hold them.
        """
        items = {
            "params": ocp.args.StandardRestore(params),
            "opt_state": ocp.args.StandardRestore(opt_state),
            "progress": ocp.args.JsonRestore(),
        }
        if ema_params is not None:
            items["ema_params"] = ocp.args.StandardRestore(ema_params)
        with _restoring(self._directory / str(step)):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        best = restored["progress"].get("best", {"step": None, "val_accuracy": -1.0})
        self._keep.best_step, self.best_accuracy = best["step"], best["val_accuracy"]
        return {"ema_params": None, **restored}

    def wait(self):
        """Waits until the save that was started is complete on disk."""
        with self._named_errors():
            self._manager.wait_until_finished()
        self._empty()

    def close(self):
        """Waits for the save that was started, and ends."""
        self.wait()
        with self._named_errors():
            self._manager.close()

    @contextlib.contextmanager
    def _named_errors(self):
        """A save fails in orbax's threads, and is heard of at the next save or at the end."""
        try:
            # Orbax waits for the other processes with multihost_utils.sync_global_devices, which
            # fetches its result from the device without jax.device_get.
            with jax.transfer_guard("allow"):
                yield
        except Exception as e:  # orbax and tensorstore raise many kinds for a disk that refuses
            reason = next((r for r in _REFUSALS if r in str(e)), None)
            if reason is None:
                raise
            steps = self.steps()
            kept = f"step {steps[-1]} is the last one saved" if steps else "nothing is saved yet"
            raise UserError(
                f"cannot save to {self._directory}: {reason}; {kept}; make room, then start the "
                "same command again"
            ) from e


def _steps(directory):
    with _reading(directory):
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return []
    return sorted(int(name) for name in names if name.isdecimal())


def read_data(folder):
    """The `data` item of a checkpoint. Raises UserError if there is none."""
    _quiet()
    with _restoring(folder):
        return _read_json(folder / "data")


def _read_json(path):
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(path)


@contextlib.contextmanager
def _restoring(folder):
    try:
        yield
    except Exception as e:  # orbax, tensorstore and json raise many kinds for damaged files
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise UserError(
            f"cannot restore {folder}: {reason}; move it elsewhere to use an earlier checkpoint"
        ) from e


def saved_steps(directory):
    """The complete checkpoints in a directory, ascending. Raises UserError where it is none."""
    if not directory.is_dir():
        remedy = "train with this --workdir first"
        if seeds := sorted(p.name for p in directory.parent.glob("seed_*")):
            remedy = f"a run of several seeds is there, give one of {', '.join(seeds)}"
        raise UserError(f"no checkpoints in {directory}: {remedy}")
    return _steps(directory)


def restore_for_inference(directory, step=None):
    """(params, config item, step): the evaluated weights as numpy arrays on the host.

    These are `ema_params` where the run keeps them, else `params`. Raises UserError when there is
    no complete checkpoint, or not that one.
    """
    steps = saved_steps(directory)
    if not steps or (step is not None and step not in steps):
        known = f"it has {', '.join(map(str, steps))}" if steps else "it has none yet"
        wanted = "checkpoint" if step is None else f"checkpoint {step}"
        raise UserError(f"no {wanted} in {directory}: {known}")
    step = max(steps) if step is None else step
    folder = directory.absolute() / str(step)
    if problem := find_corruption(folder):
        others = ", ".join(str(s) for s in steps if s != step) or "none"
        raise UserError(f"the checkpoint {folder} is corrupted: {problem}; other steps: {others}")
    _quiet()
    item = "ema_params" if (folder / "ema_params").is_dir() else "params"
    with _restoring(folder):
        config = _read_json(folder / "config")
        with ocp.StandardCheckpointer() as reader:
            params = reader.restore(folder / item)
    if not _is_ours(config):
        raise UserError(f"cannot restore {folder}: its config is not what vit_jax writes")
    return params, config, step


def _is_ours(saved):
    """Whether the JSON of a checkpoint's config tells a model's input, its classes and fields."""
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
