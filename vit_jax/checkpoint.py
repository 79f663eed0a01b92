"""Saving and restoring with orbax: STEP/{params, ema_params, opt_state, config, progress}.

`params` and `ema_params` are saved as host arrays, so that any JAX code restores them with orbax
alone, with no target tree and on any device count. `config` and `progress` are JSON.
"""

import contextlib
import errno
import os

import orbax.checkpoint as ocp
from absl import logging

from vit_jax.errors import UserError

_DISK_REFUSES = [
    os.strerror(e) for e in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
]


class Checkpoints:
    """The checkpoints in one directory (a pathlib.Path); the newest two are kept.

    A save is written beside its final name and renamed when complete: a run killed in the middle
    leaves the one before as the newest.
    """

    def __init__(self, directory):
        logging.set_verbosity(logging.FATAL)  # orbax tells each step of a save, and raises errors
        policy = ocp.checkpoint_managers.LatestN(n=2)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, cleanup_tmp_directories=True
        )
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self):
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step, *, params, ema_params, opt_state, config, progress):
        """Starts a save of trees of host arrays and returns; `close` waits for it.

        `config` and `progress` are saved as JSON.
        """
        items = {
            "params": ocp.args.StandardSave(params),
            "opt_state": ocp.args.StandardSave(opt_state),
            "config": ocp.args.JsonSave(config),
            "progress": ocp.args.JsonSave(progress),
        }
        if ema_params is not None:
            items["ema_params"] = ocp.args.StandardSave(ema_params)
        with self._named_errors():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step, *, params, ema_params, opt_state):
        """A dict of the items at `step`, as host arrays; later steps are deleted.

        The arguments are trees of jax.ShapeDtypeStruct, without shardings; an `ema_params` of None
        is left out. Raises UserError when the files are damaged.
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
        for later in self._manager.all_steps():
            if later > step:  # of one replica, when a kill came before the others had saved
                self._manager.delete(later)
        return {"ema_params": None, **restored}

    def close(self):
        """Waits until every save is complete on disk."""
        with self._named_errors():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _named_errors(self):
        """A save fails in orbax's threads, and is heard of at the next save or at the end."""
        try:
            yield
        except Exception as e:  # orbax and tensorstore raise many kinds for a disk that refuses
            reason = next((r for r in _DISK_REFUSES if r in str(e)), None)
            if reason is None:
                raise
            newest = self.latest_step()
            kept = f"step {newest} is the last one saved" if newest else "nothing is saved yet"
            raise UserError(
                f"cannot save to {self._directory}: {reason}; {kept}; make room, then start the "
                "same command again"
            ) from e


def saved_steps(directory):
    """The complete checkpoints in a directory, ascending. Raises UserError where it is none."""
    logging.set_verbosity(logging.FATAL)
    if not directory.is_dir():
        raise UserError(f"no checkpoints in {directory}: train with this --workdir first")
    with ocp.CheckpointManager(directory.absolute()) as manager:
        return sorted(manager.all_steps())


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
    item = "ema_params" if (folder / "ema_params").is_dir() else "params"
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            config = reader.restore(folder / "config")
        with ocp.StandardCheckpointer() as reader:
            params = reader.restore(folder / item)
    except Exception as e:  # orbax, tensorstore and json raise many kinds for damaged files
        raise UserError(f"cannot restore {folder}: {str(e).strip().splitlines()[0][:200]}") from e
    return params, config, step
