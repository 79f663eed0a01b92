"""Saving and restoring with orbax: STEP/{params, ema_params, opt_state, config, progress}.

`params` and `ema_params` are saved as host arrays, so that any JAX code restores them with orbax
alone, with no target tree and on any device count. `config` and `progress` are JSON. SHA256SUMS
holds the checksum of every file (`sha256sum --check SHA256SUMS` agrees): tensorstore checks its
index and not the numbers, and orbax checks none of its own files.
"""

import asyncio
import contextlib
import hashlib
import os
import pathlib
import shutil
import sys
from logging import CRITICAL, getLogger

import jax
import orbax.checkpoint as ocp
from absl import logging

from vit_jax.errors import DISK_REFUSES, UserError

SUMS, _DELETED = "SHA256SUMS", ".deleted"
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

    Orbax would mark it with a time and commit_success.txt, which nothing reads after a rename.
    """

    async def finalize(self):
        if self._checkpoint_metadata_store:
            await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
        if self.get_final().name.isdecimal():  # not one of its items
            await asyncio.to_thread(_write_sums, pathlib.Path(self.get()))
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


def damage(folder):
    """What is wrong with the files of a checkpoint, in words; None where they are as saved."""
    try:
        lines = (folder / SUMS).read_bytes().splitlines()
    except FileNotFoundError:
        # Orbax's own mark: a checkpoint from before there were checksums.
        return None if (folder / "commit_success.txt").exists() else f"{SUMS} is missing"
    except OSError as e:
        return f"{SUMS} cannot be read ({e.strerror})"
    try:
        files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        for line in lines:
            digest, _, name = line.decode(errors="replace").partition("  ")
            if name not in files:
                return f"{name!r} of {SUMS} is missing"
            if _sha256(files[name]) != digest:
                return f"{name} is not what was saved"
    except OSError as e:
        return f"{e.filename} cannot be read ({e.strerror})"
    return None if lines else f"{SUMS} is empty"


def _files(folder):
    """The files in a folder; no link, which may lead anywhere, and no device."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


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
        self.best_accuracy, self._best_before = -1.0, (None, -1.0)
        self._open()

    def _open(self):
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

    def damage(self, step):
        """What is wrong with a step's files, in words, or None."""
        return damage(self._directory / str(step))

    def save(self, step, *, params, ema_params, opt_state, config, progress, val_accuracy=None):
        """Starts a save of trees of host arrays and returns; `wait` and `close` wait for it.

        `config` and `progress`, a dict, are saved as JSON. `val_accuracy` is that of this step,
        where it is known.
        """
        self._best_before = self._keep.best_step, self.best_accuracy
        if val_accuracy is not None and val_accuracy > self.best_accuracy:
            self._keep.best_step, self.best_accuracy = step, val_accuracy
        best = {"step": self._keep.best_step, "val_accuracy": self.best_accuracy}
        items = {
            "params": ocp.args.StandardSave(params),
            "opt_state": ocp.args.StandardSave(opt_state),
            "config": ocp.args.JsonSave(config),
            "progress": ocp.args.JsonSave({**progress, "best": best}),
        }
        if ema_params is not None:
            items["ema_params"] = ocp.args.StandardSave(ema_params)
        with self._named_errors():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def forget_after(self, step):
        """Deletes the later steps: of one replica before the others had saved, or damaged."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

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
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # orbax, tensorstore and json raise many kinds for damaged files
            reason = str(e).strip().split("\n")[0][:200]
            raise UserError(
                f"cannot restore {self._directory / str(step)}: {reason}; "
                "delete that folder to go on from an earlier checkpoint"
            ) from e
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
            self._keep.best_step, self.best_accuracy = self._best_before
            if jax.process_count() == 1:  # of several, to open is for all at once, and the run ends
                with contextlib.suppress(Exception):  # the manager believes in the step that failed
                    self._open()
            steps = self.steps()
            kept = f"step {steps[-1]} is the last one saved" if steps else "nothing is saved yet"
            raise UserError(
                f"cannot save to {self._directory}: {reason}; {kept}; make room, then start the "
                "same command again"
            ) from e


def _steps(directory):
    names = (p.name for p in directory.iterdir()) if directory.is_dir() else ()
    return sorted(int(name) for name in names if name.isdecimal())


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
    if problem := damage(folder):
        others = ", ".join(str(s) for s in steps if s != step) or "none"
        raise UserError(f"the checkpoint {folder} is damaged: {problem}; other steps: {others}")
    _quiet()
    item = "ema_params" if (folder / "ema_params").is_dir() else "params"
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            config = reader.restore(folder / "config")
        with ocp.StandardCheckpointer() as reader:
            params = reader.restore(folder / item)
    except Exception as e:  # orbax, tensorstore and json raise many kinds for damaged files
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise UserError(f"cannot restore {folder}: {reason}") from e
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
