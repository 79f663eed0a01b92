"""Several seeds in one compiled program: only this file handles their axis.

With one seed there is no axis: functions are not vmapped, arrays are not stacked, and the workdir
is the run's own. With several, every array of the state and the metrics has a leading axis [S], and
each seed has its own workdir, `seed_N`.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """The seeds of a config as a list of ints."""
    return [config.seed + i for i in range(config.num_seeds)]


def config_of(config: ConfigDict, seed: int) -> ConfigDict:
    """The config of one seed alone."""
    config = config_lib.from_dict(config.to_dict())
    config.seed, config.num_seeds = seed, 1
    return config


def vmap_seeds(fn: Callable, config: ConfigDict, in_axes: Any) -> Callable:
    """`jax.vmap(fn, in_axes)`, or `fn` itself for one seed."""
    return fn if config.num_seeds == 1 else jax.vmap(fn, in_axes)


def stack(trees: Sequence[Any]) -> Any:
    """Stacks one tree of host arrays per seed along [S]; the tree itself for one seed."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: np.stack(x), *trees)


def unstack(tree: Any, config: ConfigDict) -> list[Any]:
    """One tree per seed from a tree of arrays with a leading axis [S]."""
    if config.num_seeds == 1:
        return [tree]
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(config.num_seeds)]


def unstack_shapes(shapes: Any, config: ConfigDict) -> Any:
    """One seed's part of a tree of jax.ShapeDtypeStruct, without shardings."""
    first = int(config.num_seeds > 1)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[first:], x.dtype), shapes)


def state_sharding(mesh: Mesh, shapes: Any, config: ConfigDict) -> Any:
    """`mesh.state_sharding`, with the axis of seeds replicated."""
    shardings = mesh_lib.state_sharding(mesh, unstack_shapes(shapes, config))
    if config.num_seeds == 1:
        return shardings
    return jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), shardings)


class RunWorkdir:
    """The workdir of a run, which contains one `Workdir` per seed if there are several.

    The interface is the same for any number of seeds; arrays are split by seed here.
    """

    def __init__(self, path: pathlib.Path, config: ConfigDict) -> None:
        self.path, self._config = path, config
        self._run = Workdir(path, config)
        self._each = [self._run]
        if config.num_seeds > 1:
            self._each = [
                Workdir(path / f"seed_{seed}", config_of(config, seed)) for seed in seeds_of(config)
            ]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the run."""
        return seeds_of(self._config)

    @property
    def folders(self) -> list[pathlib.Path]:
        """The path of each seed's workdir."""
        return [workdir.path for workdir in self._each]

    @property
    def has_checkpoints(self) -> bool:
        """Whether any seed has a checkpoint, intact or not."""
        return any(
            step.name.isdigit() for folder in self.folders for step in folder.glob("checkpoints/*")
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """`Workdir.locked` for the run and every seed, in process 0."""
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                for workdir in dict.fromkeys([self._run, *self._each]):
                    stack.enter_context(workdir.locked())
            yield

    def find_resume_step(self) -> int:
        """The newest step that is intact for every seed; 0 if there is none."""
        return newest_intact_step([workdir.checkpoint_dir for workdir in self._each])

    def check_data(self, step: int, data_identity: dict[str, Any]) -> None:
        """See `Workdir.check_data`."""
        for workdir in self._each:
            workdir.check_data(step, data_identity)

    def begin(self, step: int, command: str) -> None:
        """Makes the first writes of a run, in process 0."""
        if jax.process_index() == 0:
            for workdir in dict.fromkeys([self._run, *self._each]):
                workdir.begin(step, command)

    def open(self, step: int, *, keep: Every) -> None:
        """See `Workdir.open`."""
        for workdir in self._each:
            workdir.open(step, keep=keep)

    def restore(self, step: int, state_shapes: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(TrainState on the devices, progress) of a saved step."""
        shapes = unstack_shapes(state_shapes, self._config)
        items = {name: getattr(shapes, name) for name in _SAVED_ARRAYS}
        states = []
        for workdir, seed in zip(self._each, seeds_of(self._config), strict=True):
            arrays, progress = workdir.checkpoints.restore(step, items)
            sums = {k: np.float32(progress["sums"].get(k, 0)) for k in shapes.sums}
            arrays |= {"step": np.int32(step), "seed": np.uint32(seed), "sums": sums}
            states.append(TrainState(**arrays))
        shardings = jax.tree.map(lambda x: x.sharding, state_shapes)
        return mesh_lib.to_devices(stack(states), shardings), progress

    def save(self, step: int, state: TrainState, documents: dict[str, Any], log: TrainLog) -> None:
        """Starts saving a state, with the progress and validation accuracy of a `TrainLog`.

        Raises BadStep if the weights are not finite.
        """
        states = unstack(mesh_lib.to_host(state), self._config)
        finite = [all(np.isfinite(x).all() for x in jax.tree.leaves(s.params)) for s in states]
        if not all(finite):
            raise BadStep(step, ~np.array(finite), None, None)
        accuracies: Sequence[Any] = [None] * len(states)
        if log.val_accuracy is not None:
            accuracies = np.atleast_1d(log.val_accuracy)
        for workdir, part, accuracy in zip(self._each, states, accuracies, strict=True):
            sums = {name: float(value) for name, value in part.sums.items()}
            progress = {"sums": sums, **log.progress}
            workdir.save(
                step,
                {name: getattr(part, name) for name in _SAVED_ARRAYS},
                documents | {"progress": progress},
                val_accuracy=accuracy,
            )

    def is_best(self, val_accuracy: Any) -> bool:
        """Whether a validation accuracy is any seed's best so far."""
        pairs = zip(self._each, np.atleast_1d(val_accuracy), strict=True)
        return any(workdir.checkpoints.is_best(accuracy) for workdir, accuracy in pairs)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes {name: number, or one per seed}."""
        for i, workdir in enumerate(self._each):
            parts = {k: np.broadcast_to(v, len(self._each))[i] for k, v in scalars.items()}
            workdir.write(step, parts)

    def images(self, step: int, name: str, images: Any) -> None:
        """Writes a tree of images per seed; see `Workdir.images`."""
        for workdir, part in zip(self._each, unstack(images, self._config), strict=True):
            workdir.images(step, name, part)

    def write_results(self, values: Mapping[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
        """Writes each seed's result.json and the run's, which is returned.

        `values` is {name: number, or one per seed}. With several seeds, the run's result.json has
        their mean under the name, their standard deviation under NAME_std, and all of them under
        NAME_of_each_seed.
        """
        all_seeds, results = seeds_of(self._config), []
        for i, (workdir, seed) in enumerate(zip(self._each, all_seeds, strict=True)):
            own = {k: float(np.broadcast_to(v, len(all_seeds))[i]) for k, v in values.items()}
            results.append(own | {"seed": seed, **shared})
            self._write_result(workdir.path, results[-1])
        if len(results) == 1:
            return results[0]
        result = {"seed": all_seeds, **shared}
        for name in values:
            each = [own[name] for own in results]
            result[name] = float(np.mean(each))
            result[f"{name}_std"] = float(np.std(each, ddof=1))
            result[f"{name}_of_each_seed"] = each
        self._write_result(self.path, result)
        return result

    def _write_result(self, folder, result):
        if jax.process_index() == 0:
            with write_errors(folder):
                write_json(folder / "result.json", result)

    def read_result(self) -> dict[str, Any] | None:
        """The content of the run's result.json, or None."""
        path = self.path / "result.json"
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as e:
            raise UserError(f"{path} is not a result ({e}): delete it, then rerun") from e

    def wait(self) -> None:
        """Waits for the saves that were started."""
        for workdir in self._each:
            workdir.checkpoints.wait()

    def close(self) -> None:
        """See `Workdir.close`."""
        for workdir in self._each:
            workdir.close()
