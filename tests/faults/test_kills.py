"""Real runs, killed at random moments and in the middle of chosen file-system calls.

`pytest -m faults --kills 100` kills a hundred; CI a few.
"""

import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_train import command, environment

from vit_jax import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def recipe(make_tiny_config):
    """Saves every 4 of 30 steps, validates every 5, keeps the best and every 12th."""
    c = make_tiny_config()
    c.data.train_split, c.data.val_split = "train[:80]", "train[80:]"
    c.batch_size, c.epochs, c.log_every = 16, 6, "1 step"  # epochs of 5 steps
    c.eval_every = "5 steps"
    c.save_every, c.keep_every = "4 steps", "12 steps"
    c.augment.flip, c.augment.crop, c.augment.crop_padding = "random", "pad", 1
    c.tensorboard = False  # each start makes an event file of its own
    c.optim.ema_decay, c.optim.peak_lr = 0.5, 1e-3
    return c


def start(recipe, place, at=None, log=os.devnull):
    """A run in place/run whose caches are in place too, to be killed at its call number `at`."""
    own = {"XDG_CACHE_HOME": str(place / "cache")}
    own |= {"FAULTS_UNDER": str(place), "FAULTS_LOG": str(log)}
    own |= {"FAULTS_AT": str(at)} if at else {}
    place.mkdir(exist_ok=True)
    return subprocess.Popen(
        command(recipe, place / "run"),
        cwd=ROOT,
        env=environment() | own,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def content(workdir):
    """All that a run promises, times aside."""
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((workdir / "result.json").read_text())
    for values in (*lines, result):
        for name in [n for n in values if n.startswith("time/") or n in ("seconds",)]:
            del values[name]
    del result["images_per_second"]
    steps = checkpoint.saved_steps(workdir / "checkpoints")
    arrays = {}
    for step in steps:
        folder = (workdir / "checkpoints" / str(step)).absolute()
        assert checkpoint.find_corruption(folder) is None
        items = ("params", "ema_params", "opt_state")
        for item in (i for i in items if (folder / i).exists()):
            with ocp.StandardCheckpointer() as reader:
                arrays[step, item] = reader.restore(folder / item)
    files = {p.name for p in (*workdir.iterdir(), *(workdir / "checkpoints").iterdir())}
    return {"lines": lines, "result": result, "files": files}, arrays


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """(what an untouched run leaves, its file-system calls, seconds it took)."""
    place = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    process = start(recipe, place, log=place / "calls")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    calls = (place / "calls").read_text().splitlines()
    return content(place / "run"), calls, time.monotonic() - began


def same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def test_killed_runs_end_as_the_untouched_one(recipe, whole, tmp_path, request):
    """Every second run dies in a file-system call, the others at a random moment; a third of them
    once more while they continue.
    """
    expected, calls, seconds = whole
    kills, where = request.config.getoption("kills"), collections.Counter()
    # Calls of each kind in turn: a save makes many of one and few of another.
    kinds = collections.defaultdict(list)
    for number, call in enumerate(calls, 1):
        kinds[kind(call)].append(number)
    kinds = list(kinds.values())
    random.Random(0).shuffle(kinds)
    for i in range(kills):
        choose = random.Random(i)
        place = tmp_path / str(i)
        for deaths in range(1 + (i % 3 == 2)):
            code = None
            while code is None or (code == 0 and not deaths):  # it came to its end first: again
                if not deaths:
                    shutil.rmtree(place, ignore_errors=True)
                at = choose.choice(kinds[i // 2 % len(kinds)]) if i % 2 == 0 else None
                process = start(recipe, place, at=at, log=place / "killed")
                if at is None:
                    time.sleep(choose.uniform(0, seconds))
                    process.send_signal(signal.SIGKILL)
                process.communicate(timeout=200)
                code = process.returncode
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                where["not a second time: it had ended"] += 1
            elif at is None:
                where["at a random moment"] += 1
            else:
                where[kind((place / "killed").read_text().splitlines()[-1])] += 1
        process = start(recipe, place)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        same(content(place / "run"), expected)
    print(f"\n{kills} of {kills} runs bit-identical; killed:")
    for name, count in where.most_common():
        print(f"  {count:4} {name}")


def kind(call):
    """'os.rename checkpoints/STEP': what a call does, whatever the step and the random names."""
    event, path = call.split(" ", 1)
    path = path.split("/run/" if "/run/" in path else "/cache/")[-1]
    parts = ["STEP" if p.split(".")[0].isdecimal() else p for p in path.split("/")][:3]
    if "/vit_jax/" in call:
        parts = ["data cache"]
    return f"{event} {'/'.join(p[:20] for p in parts)}"
