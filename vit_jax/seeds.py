"""Several seeds in one compiled program: only this file handles their axis.

With one seed there is no axis: functions are not vmapped, arrays are not stacked, and the workdir
is the run's own. With several, every array of the state and the metrics has a leading axis [S], and
each seed has its own workdir, `seed_N`.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.durations import Every
from vit_jax.errors import UserError
from vit_jax.parallel import mesh as mesh_lib
from vit_jax.step import TrainState
from vit_jax.workdir import BadStep, TrainLog, Workdir, newest_intact_step, write_errors, write_json

_SAVED_ARRAYS = ("params", "ema_params", "opt_state")


def seeds_of(config: ConfigDict) -> list[int]:
    """Returns the seeds of a config as a list of ints."""
    return [config.seed + i for i in range(config.num_seeds)]


def vmap_seeds(fn: Callable, config: ConfigDict, in_axes: Any) -> Callable:
    """Returns `jax.vmap(fn, in_axes)`, or `fn` itself for one seed."""
    return fn if config.num_seeds == 1 else jax.vmap(fn, in_axes)


def stack(trees: Sequence[Any]) -> Any:
    """Stacks one tree of host arrays per seed along [S]; the tree itself for one seed."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: np.stack(x), *trees)


def unstack(tree: Any, config: ConfigDict) -> list[Any]:
    """Splits a tree of arrays [S, ...] into one tree per seed. The seeds share its scalars."""
    if config.num_seeds == 1:
        return [tree]
    return [
        jax.tree.map(lambda x, i=i: x[i] if np.ndim(x) else x, tree)
        for i in range(config.num_seeds)
    ]


def unstack_shapes(shapes: Any, config: ConfigDict) -> Any:
    """Returns one seed's part of a tree of jax.ShapeDtypeStruct, without shardings."""
    first = int(config.num_seeds > 1)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[first:], x.dtype), shapes)


def state_sharding(mesh: Mesh, shapes: Any, config: ConfigDict) -> Any:
    """Returns `mesh.state_sharding`, with the axis of seeds replicated."""
    shardings = mesh_lib.state_sharding(mesh, unstack_shapes(shapes, config))
    if config.num_seeds == 1:
        return shardings
    return jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), shardings)


class RunWorkdir:
    """The workdir of a run, which contains one `Workdir` per seed if there are several.

    The interface is the same for any number of seeds; arrays are split by seed here. Methods
    without a description call the `Workdir` method of the same name for every seed.
    """

    def __init__(self, path: pathlib.Path, config: ConfigDict) -> None:
        self.path, self.seeds, self._config = path, seeds_of(config), config
        self._all = self._each = [Workdir(path, config)]
        if config.num_seeds > 1:
            self._each = []
            for seed in self.seeds:
                own = config_lib.from_dict(config.to_dict() | {"seed": seed, "num_seeds": 1})
                self._each.append(Workdir(path / f"seed_{seed}", own))
            self._all = self._all + self._each  # the run's own has no checkpoints and no metrics
        self.folders = [workdir.path for workdir in self._each]
        self._corrupted: dict[pathlib.Path, str] = {}  # checkpoints after the resume step

    @property
    def has_checkpoints(self) -> bool:
        """Whether any seed has a checkpoint, intact or not."""
        steps = (step for folder in self.folders for step in folder.glob("checkpoints/*"))
        return any(step.name.isdecimal() for step in steps)

    def lock(self, stack: contextlib.ExitStack) -> None:
        """Enters `Workdir.locked` of the run and every seed, in process 0."""
        if jax.process_index() == 0:
            for workdir in self._all:
                stack.enter_context(workdir.locked())

    def find_resume_step(self) -> int:
        """Returns the newest step that is intact for every seed; 0 if there is none."""
        directories = [workdir.checkpoint_dir for workdir in self._each]
        step, self._corrupted = newest_intact_step(directories)
        return step

    def check_resume(self, step: int, data_identity: dict[str, Any]) -> None:
        for workdir in self._each:
            workdir.check_resume(step, data_identity)

    def begin(self, step: int, command: str) -> None:
        """Calls `Workdir.begin` of the run and every seed, in process 0."""
        if jax.process_index() == 0:
            for workdir in self._all:
                workdir.begin(step, command, self._corrupted)

    def open(self, step: int, *, keep: Every) -> None:
        for workdir in self._each:
            workdir.open(step, keep=keep)

    def restore(self, step: int, state_shapes: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns (TrainState on the devices, progress) of a saved step."""
        shapes = unstack_shapes(state_shapes, self._config)
        items = {name: getattr(shapes, name) for name in _SAVED_ARRAYS}
        states = []
        for workdir, seed in zip(self._each, self.seeds, strict=True):
            arrays, progress = workdir.checkpoints.restore(step, items)
            sums = {k: np.float32(progress["sums"].get(k, 0)) for k in shapes.sums}
            arrays |= {"step": np.int32(step), "seed": np.uint32(seed), "sums": sums}
            states.append(TrainState(**arrays))
        shardings = jax.tree.map(lambda x: x.sharding, state_shapes)
        return mesh_lib.to_devices(stack(states), shardings), progress

    def save(self, step: int, state: TrainState, documents: dict[str, Any], log: TrainLog) -> None:
        """Starts saving a state and a TrainLog. Raises BadStep if the weights are not finite.

        Waits for every seed's previous save first, so that after a kill the seeds differ by at most
        one checkpoint.
        """
        parts = self._split((mesh_lib.to_host(state), log.val_accuracy))
        bad = np.array([not _all_finite(state.params) for _, (state, _) in parts])
        if bad.any():
            raise BadStep(step, bad, None, None)
        self.wait()
        for workdir, (state, val_accuracy) in parts:
            arrays = {name: getattr(state, name) for name in _SAVED_ARRAYS}
            sums = {name: float(value) for name, value in state.sums.items()}
            progress = {"progress": {"sums": sums, **log.progress}}
            workdir.save(step, arrays, documents | progress, val_accuracy=val_accuracy)

    def is_best(self, val_accuracy: Any) -> bool:
        """Returns whether a validation accuracy is any seed's best so far."""
        each = self._split(val_accuracy)
        return any(workdir.checkpoints.is_best(accuracy) for workdir, accuracy in each)

    def steps_since_best(self, step: int) -> int:
        """Returns the steps since the latest of the seeds' best steps; 0 before any is saved."""
        return step - max(workdir.checkpoints.best_step or step for workdir in self._each)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        for workdir, own in self._split(scalars):
            workdir.write(step, own)

    def _split(self, tree):
        return list(zip(self._each, unstack(tree, self._config), strict=True))

    def write_results(self, values: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
        """Writes each seed's result.json and the run's, which is returned.

        `values` is {name: number, or one per seed}. With several seeds, the run's result.json has
        their mean under the name, their standard deviation under NAME_std, and all of them under
        NAME_of_each_seed.
        """
        results = {
            workdir.path: {**{k: float(v) for k, v in own.items()}, "seed": seed, **shared}
            for seed, (workdir, own) in zip(self.seeds, self._split(values), strict=True)
        }
        if len(results) > 1:
            run = {"seed": self.seeds, **shared}
            for name in values:
                each = [result[name] for result in results.values()]
                run[name] = float(np.mean(each))
                run[f"{name}_std"] = float(np.std(each, ddof=1))
                run[f"{name}_of_each_seed"] = each
            results[self.path] = run
        if jax.process_index() == 0:
            for folder, result in results.items():
                with write_errors(folder):
                    write_json(folder / "result.json", result)
        return results[self.path]

    def read_result(self) -> dict[str, Any] | None:
        """Returns the content of the run's result.json, or None."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        try:
            result = json.loads(path.read_text())
            if "steps" not in result:
                raise ValueError("it has no steps")
            return result
        except (OSError, ValueError, TypeError, RecursionError) as e:
            raise UserError(f"{path} is not a result ({e}): delete it, then rerun") from e

    def wait(self) -> None:
        """Waits until the pending save of every seed is complete."""
        for workdir in self._each:
            workdir.checkpoints.wait()

    def close(self) -> None:
        for workdir in self._each:
            workdir.close()


def _all_finite(arrays):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(arrays))
