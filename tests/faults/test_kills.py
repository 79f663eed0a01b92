"""Real runs, killed at random times and during chosen file-system calls.

`pytest -m faults --kills 100` kills 100 runs; CI kills a few.
"""

import collections
import os
import random
import shutil
import signal
import time

import pytest
from runs import assert_same, command, content, finish, start

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
    c.tensorboard = False  # each start writes a new event file
    c.optim.ema_decay, c.optim.peak_lr = 0.5, 1e-3
    return c


def start_in(place, recipe, at=0, log=os.devnull):
    """Starts a run in place/run, with its caches also in `place`, to be killed at call `at`."""
    place.mkdir(exist_ok=True)
    return start(
        command(recipe, place / "run"),
        XDG_CACHE_HOME=str(place / "cache"),
        FAULTS_UNDER=str(place),
        FAULTS_LOG=str(log),
        FAULTS_AT=str(at),
    )


@pytest.fixture(scope="module")
def untouched(recipe, tmp_path_factory):
    """(content, file-system calls, duration in seconds) of an uninterrupted run."""
    place = tmp_path_factory.mktemp("untouched")
    began = time.monotonic()
    code, output = finish(start_in(place, recipe, log=place / "calls"))
    assert code == 0, output
    calls = (place / "calls").read_text().splitlines()
    return content(place / "run"), calls, time.monotonic() - began


def test_killed_runs_end_like_the_uninterrupted_run(recipe, untouched, tmp_path, request):
    """Half of the runs are killed in a file-system call, the others at a random time; a third are
    killed again after resuming.
    """
    expected, calls, seconds = untouched
    kills, places = request.config.getoption("kills"), collections.Counter()
    # Cycle through the kinds of calls: a save makes many of one and few of another.
    kinds = collections.defaultdict(list)
    for number, call in enumerate(calls, 1):
        kinds[kind(call)].append(number)
    kinds = list(kinds.values())
    random.Random(0).shuffle(kinds)
    for i in range(kills):
        choose = random.Random(i)
        place = tmp_path / str(i)
        for deaths in range(1 + (i % 3 == 1)):
            code = None
            while code is None or (code == 0 and not deaths):  # the run ended first: retry
                if not deaths:
                    shutil.rmtree(place, ignore_errors=True)
                at = choose.choice(kinds[i // 2 % len(kinds)]) if i % 2 == 0 else 0
                process = start_in(place, recipe, at=at, log=place / "killed")
                if not at:
                    time.sleep(choose.uniform(0, seconds))
                    process.send_signal(signal.SIGKILL)
                code, _ = finish(process)
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                places["not a second time: it had ended"] += 1
            elif not at:
                places["at a random moment"] += 1
            else:
                places[kind((place / "killed").read_text().splitlines()[-1])] += 1
        code, output = finish(start_in(place, recipe))
        assert code == 0, output
        assert_same(content(place / "run"), expected)
    print(f"\n{kills} of {kills} runs bit-identical; killed:")
    for name, count in places.most_common():
        print(f"  {count:4} {name}")


def kind(call):
    """'os.rename checkpoints/STEP': a call without the step and the random names."""
    event, path = call.split(" ", 1)
    path = path.split("/run/" if "/run/" in path else "/cache/")[-1]
    parts = ["STEP" if p.split(".")[0].isdecimal() else p for p in path.split("/")][:3]
    if "/vit_jax/" in call:
        parts = ["data cache"]
    return f"{event} {'/'.join(p[:20] for p in parts)}"
