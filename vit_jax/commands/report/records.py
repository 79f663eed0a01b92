"""Reads the files of a workdir for the report; `Record` lists them.

Values are checked here: a workdir can come from an untrusted source.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.errors import UserError
from vit_jax.seeds import seeds_of
from vit_jax.workdir import read_lines

# Fields in which the seeds and repetitions of one experiment may differ.
NOT_EXPERIMENTAL = ("seed", "num_seeds", "tensorboard", "wandb", "data.dir")
NOT_EXPERIMENTAL += ("mesh.data", "mesh.fsdp")
# The fields of result.json that are read. All are numbers, and a run may lack any.
_RESULT_FIELDS = ("steps", "test_accuracy", "test_loss", "val_accuracy", "train_loss")
_RESULT_FIELDS += ("num_params", "images_per_second", "seconds")


@dataclasses.dataclass(frozen=True)
class Record:
    """The files of one seed of a run."""

    workdir: Path
    config: ConfigDict
    run: dict  # run.json
    lines: list[dict[str, float]]  # metrics.jsonl
    result: dict[str, float] | None  # result.json; None if the run has not finished
    operations: list[dict]  # profile/operations.json; [] without a profile
    corruptions: dict | None  # corruptions.json, written by evaluate --corruptions

    def series(self, name):
        """Returns (steps, values) of a metric."""
        points = [(line["step"], line[name]) for line in self.lines if name in line]
        return tuple(zip(*points, strict=True)) if points else ((), ())


def read_records(workdir):
    """Reads a run, one Record per seed. Raises UserError for a missing or invalid file."""
    config = _read_config(workdir)
    if config.num_seeds == 1:
        return [_read_record(workdir, config, workdir)]
    folders = [workdir / f"seed_{seed}" for seed in seeds_of(config)]
    folders = [folder for folder in folders if folder.exists()]
    if not folders:
        raise UserError(
            f"{workdir} is a run with {config.num_seeds} seeds but contains no seed_N folder: "
            "rerun its training command, or pass another directory"
        )
    return [_read_record(folder, _read_config(folder), workdir) for folder in folders]


def group_by_experiment(runs):
    """Merges (name, [Record]) runs whose configs differ in NOT_EXPERIMENTAL fields only."""
    groups = {}
    for name, records in runs:
        fields = config_lib.flat(records[0].config).items()
        experiment = tuple(value for field, value in fields if field not in NOT_EXPERIMENTAL)
        names, members = groups.setdefault(experiment, ([], []))
        names.append(name)
        members.extend(records)
    return [(", ".join(names), members) for names, members in groups.values()]


def _read_config(workdir):
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(
            f"{workdir} contains no run ({path} is missing): pass the directory of a run, or train "
            "with this --workdir"
        )
    with _read_errors(path):
        return config_lib.from_dict(read_object(path))


def _read_record(workdir, config, run):
    """Reads the Record of one seed. The seeds of a run share its profile."""
    lines = []
    if (path := workdir / "metrics.jsonl").exists():
        with _read_errors(path):
            lines = [values for _, values in read_lines(path)]
        for values in lines:
            _check_numbers(values, path)
    return Record(
        workdir,
        config,
        read_run(workdir / "run.json"),
        lines,
        read_result(workdir / "result.json"),
        _read_operations(run / "profile" / "operations.json"),
        _read_corruptions(workdir / "corruptions.json"),
    )


def read_run(path):
    """Returns the content of a run.json, or {} if it does not exist."""
    return read_object(path) if path.exists() else {}


def read_result(path):
    """Returns the numbers of a result.json, or None if it does not exist."""
    if not path.exists():
        return None
    values = read_object(path)
    result = {k: values[k] for k in _RESULT_FIELDS if values.get(k) is not None}
    _check_numbers(result, path)
    return result


def read_object(path):
    """Returns the JSON object in a file. Raises UserError for any other content."""
    with _read_errors(path):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"{path} must contain a JSON object, not {type(value).__name__}")
    return value


def _read_corruptions(path):
    if not path.exists():
        return None
    values = read_object(path)
    errors = values.get("errors")
    with _read_errors(path):
        if not isinstance(errors, dict) or not all(isinstance(e, list) for e in errors.values()):
            raise ValueError("no lists of errors")
    for kind, each in errors.items():
        _check_numbers({f"{kind} {i}": error for i, error in enumerate(each)}, path)
    return values


def _read_operations(path):
    if not path.exists():
        return []
    with _read_errors(path):
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("not a list of objects")
    for row in rows:
        _check_numbers({name: row.get(name) for name in ("milliseconds", "times")}, path)
    return rows


@contextlib.contextmanager
def _read_errors(path):
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is corrupted ({e}): restore it from a copy") from e


def _check_numbers(values, path):
    """Raises UserError unless all values of {name: value} are finite numbers."""
    for name, value in values.items():
        if type(value) not in (int, float) or not abs(value) < 1e300:
            raise UserError(f"{name} in {path} must be a number; got {value!r:.100}")
