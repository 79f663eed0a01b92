"""Runs in this process and in their own, and what runs leave on disk."""

import copy
import functools
import json
import os
import pathlib
import subprocess
import sys
import unittest.mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from vit_jax import config as config_lib
from vit_jax import train as train_lib
from vit_jax.experiment import make_experiment
from vit_jax.workdir import saved_steps
from vit_jax.workdir.files import find_corruption

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def _make_experiment(fields, fresh):
    return make_experiment(config_lib.from_dict(json.loads(fields)), fresh=fresh)


def _shared_experiment(config, *, splits=None, fresh=True):
    fields = json.dumps(config.to_dict(), sort_keys=True)
    return copy.copy(_make_experiment(fields, fresh and bool(config.init_from)))


def train_shared(config, workdir, **options):
    """Like vit_jax.train.train, but runs with equal configs share compiled functions.

    Not for a test that changes the data, or what a program contains, between two runs.
    """
    with unittest.mock.patch.object(train_lib, "make_experiment", _shared_experiment):
        return train_lib.train(config, workdir, **options)


def command(c, workdir):
    """The train command with the config `c`, a variant of cifar10_vit."""
    recipe = config_lib.from_file(ROOT / "configs" / "cifar10_vit.py")
    names = [d.split(":")[0] for d in config_lib.difference(c, recipe)]
    overrides = [f"--config.{n}={c[n]}" for n in names]
    base = [sys.executable, "-m", "vit_jax.main", "--config", "configs/cifar10_vit.py"]
    return [*base, "--workdir", str(workdir), *overrides]


def command_after(code, c, workdir):
    """The train command in a process that first runs Python code."""
    code += "\nimport runpy; runpy.run_module('vit_jax.main', run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", code, *command(c, workdir)[3:]]


def start(arguments, **environment):
    """Starts a process; stdout and stderr are one pipe."""
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process, timeout=200):
    """(exit code, output) of a process."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def lines(workdir, prefix=""):
    """The values of metrics.jsonl, without what depends on the clock."""
    parsed = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    parsed = [{k: v for k, v in p.items() if not k.startswith("time/")} for p in parsed]
    return [p for p in parsed if any(k.startswith(prefix) for k in p)]


def losses(workdir):
    """{step: training loss} of metrics.jsonl."""
    return {p["step"]: p["train/loss"] for p in lines(workdir, "train/loss")}


def files(folder):
    """{relative path: bytes} of the files under a folder, without locks."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def content(workdir):
    """All that a run promises to leave, without times: (values, arrays of each checkpoint)."""
    result = json.loads((workdir / "result.json").read_text())
    del result["seconds"], result["images_per_second"]
    checkpoints, arrays = workdir / "checkpoints", {}
    for step in saved_steps(checkpoints):
        folder = checkpoints.absolute() / str(step)
        assert find_corruption(folder) is None
        for item in ("params", "ema_params", "opt_state"):
            if (folder / item).exists():
                with ocp.StandardCheckpointer() as reader:
                    arrays[step, item] = reader.restore(folder / item)
    names = {p.name for p in (*workdir.iterdir(), *checkpoints.iterdir())}
    return {"lines": lines(workdir), "result": result, "files": names}, arrays


def assert_same(a, b):
    """Compares two `content`s bit for bit."""
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
