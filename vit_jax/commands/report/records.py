"""Reads the files of a workdir: config.json, run.json, result.json, metrics.jsonl.

Every value is checked here: a workdir can come from an untrusted source.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from vit_jax import config as config_lib
from vit_jax.errors import UserError
from vit_jax.workdir import read_lines

# Fields in which the seeds and repetitions of one experiment may differ.
NOT_EXPERIMENTAL = (
    *("seed", "num_seeds", "tensorboard", "wandb", "data.dir", "mesh.data", "mesh.fsdp"),
)


@dataclasses.dataclass(frozen=True)
class Record:
    """The files of one seed of a run."""

    workdir: Path
    config: Any
    run: dict  # run.json
    lines: list[dict]  # metrics.jsonl
    result: dict | None  # result.json; None if the run has not finished

    def series(self, name):
        """Returns (steps, values) of a metric."""
        points = [(line["step"], line[name]) for line in self.lines if name in line]
        return tuple(zip(*points, strict=True)) if points else ((), ())

    @property
    def last_step(self):
        """The last logged step."""
        return max((line["step"] for line in self.lines), default=0)


def read_records(workdir):
    """Reads a run, one Record per seed.

    Raises UserError if a file is missing or unreadable, or a field is missing or has a wrong type.
    """
    workdir = Path(workdir)
    config = _read_config(workdir)
    if config.num_seeds == 1:
        return [_read_record(workdir, config)]
    folders = sorted(workdir.glob("seed_*"))
    if not folders:
        raise UserError(f"{workdir} is a run with {config.num_seeds} seeds but has no seed_N")
    records = [_read_record(folder, _read_config(folder)) for folder in folders]
    return sorted(records, key=lambda record: record.config.seed)


def group_by_experiment(runs):
    """Merges runs whose configs differ in NOT_EXPERIMENTAL fields only.

    `runs` and the result are lists of (name, [Record]).
    """
    groups = []
    for name, records in runs:
        for names, members in groups:
            first = members[0].config
            if not config_lib.difference(records[0].config, first, ignore=NOT_EXPERIMENTAL):
                members.extend(records)
                names.append(name)
                break
        else:
            groups.append(([name], list(records)))
    return [(", ".join(names), records) for names, records in groups]


def _read_config(workdir):
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} contains no run ({path} is missing): train with this --workdir")
    try:
        return config_lib.from_dict(_read_object(path))
    except RecursionError as e:
        raise UserError(f"{path} is nested too deeply: restore it from a copy") from e


def _read_record(workdir, config):
    run = _read_object(workdir / "run.json")
    _check_fields(run, _RUN_FIELDS, workdir / "run.json")
    path, result, lines = workdir / "result.json", None, []
    if path.exists():
        result = _read_object(path)
        _check_fields({**dict.fromkeys(_OPTIONAL_RESULTS, 0), **result}, _RESULT_FIELDS, path)
    if (workdir / "metrics.jsonl").exists():
        lines = list(_read_metrics(workdir / "metrics.jsonl"))
    return Record(workdir, config, run, lines, result)


def _read_object(path):
    """Returns the object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is corrupted ({e}): restore it from a copy") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} must contain a JSON object, not {type(value).__name__}")
    return value


def _read_metrics(path):
    """Yields the lines of a metrics.jsonl, all of whose values are numbers."""
    try:
        for _, values in read_lines(path):
            _check_fields(values, dict.fromkeys(values, _NUMBER), path)
            yield values
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise UserError(f"{path} is corrupted ({e}): repair or delete it") from e


def _check_fields(values, fields, path):
    """Raises UserError unless `values` has all `fields`, {name: (is valid, description)}."""
    for name, (is_valid, description) in fields.items():
        if name not in values:
            raise UserError(f"{name} in {path} must be {description}; it is missing")
        if not is_valid(values[name]):
            raise UserError(f"{name} in {path} must be {description}; got {values[name]!r:.100}")


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_string(value):
    return isinstance(value, str)


_NUMBER = _is_number, "a number"
_STRING = _is_string, "a string"
_OPTIONAL_STRING = (lambda v: v is None or _is_string(v)), "a string or null"
_RUN_FIELDS = {
    "command": _OPTIONAL_STRING,
    "commit": _OPTIONAL_STRING,
    "date": _STRING,
    "host": _STRING,
    "processes": _NUMBER,
    "versions": (
        lambda v: isinstance(v, dict) and all(map(_is_string, v.values())),
        "an object of strings",
    ),
    "devices": (
        lambda v: isinstance(v, list) and v and all(map(_is_string, v)),
        "a list of strings",
    ),
}
_OPTIONAL_RESULTS = ("test_accuracy", "test_loss", "val_accuracy")  # a run may lack the split
_RESULT_FIELDS = {
    **dict.fromkeys((*_OPTIONAL_RESULTS, "train_loss", "seconds", "num_params"), _NUMBER),
    "images_per_second": (lambda v: v is None or _is_number(v), "a number or null"),
    "device": _STRING,
}
