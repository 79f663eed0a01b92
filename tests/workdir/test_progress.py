"""The log that reads metrics one step late, its clock, and the terminal."""

import types

import numpy as np
import pytest

from vit_jax import config, durations
from vit_jax.workdir import progress
from vit_jax.workdir.progress import BadStep, TrainLog, epoch_means, progress_line


@pytest.fixture
def plan():
    """Ten steps of four images, four steps per epoch."""
    c = config.defaults()
    c.batch_size, c.steps, c.log_every = 4, 10, "2 steps"
    return durations.Plan(c, 16)


@pytest.fixture
def clock(monkeypatch):
    """A manual clock: add seconds to its one element."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_progress_line(plan):
    values = {"train/loss": np.array([2.0, 3.0]), "train/accuracy": 0.25, "train/lr": 1e-3}
    values |= {"time/images_per_second": 8.0, "time/mfu": 0.31}
    # Of each of two seeds, 16 images are left.
    assert progress_line(plan, 6, values) == (
        "epoch 2/3, step 6/10, loss 2.5000, accuracy 25.0%, lr 0.001, 8 images/s, MFU 31%, 4 s left"
    )
    del values["time/mfu"]
    assert "8 images/s, 4 s left" in progress_line(plan, 6, values)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42, "42 s"), (170, "3 min"), (4830, "1 h 20 min"), (90_000, "25 h 0 min")],
)
def test_durations_are_formatted(seconds, text):
    assert progress.format_duration(seconds) == text


class Workdir:
    """Records what a log writes."""

    def __init__(self):
        self.written = []

    def write(self, step, scalars):
        self.written.append((step, scalars))

    def is_best(self, accuracy):
        return accuracy > 0.5


def make_log(workdir, plan, **options):
    options = {"patience": 1, "peak_rate": 10.0} | options
    start = {"timed_images": 100, "timed_seconds": 10.0}
    return TrainLog(workdir, plan, step=0, progress=start, **options)


def metrics(loss=1.0, bad=False):
    return {"loss": np.float32(loss), "grad_norm": np.float32(1), "accuracy": 0.5, "lr": 0.1} | {
        "bad": np.array(bad)
    }


def test_metrics_are_written_one_step_late_or_before_a_pause(plan, clock):
    workdir = Workdir()
    log = make_log(workdir, plan)
    for step, seconds in ((1, 60.0), (2, 1.0)):  # the first step compiles
        clock[0] += seconds
        log.push(step, metrics(step))
    assert workdir.written == [] and log.step == 2
    clock[0] += 1.0
    with log.paused():
        ((step, line),) = workdir.written
        assert step == 2 and line["train/loss"] == 2
        assert line["time/images_per_second"] == 4.0  # the second step of four images
        assert line["time/mfu"] == pytest.approx(0.4)
        clock[0] += 100.0
    assert log.progress == {"timed_images": 104, "timed_seconds": pytest.approx(11.0)}
    for step in (3, 4, 5):
        clock[0] += 2.0
        log.push(step, metrics(step))
    assert [step for step, _ in workdir.written] == [2, 4]
    # Read at the fifth: two steps in six seconds after the pause.
    assert workdir.written[-1][1]["time/images_per_second"] == pytest.approx(8 / 6)
    assert (log.images, log.seconds) == (112, pytest.approx(17.0))


def test_no_throughput_is_written_before_a_step_is_timed(plan, clock):
    workdir, plan.log = Workdir(), durations.Every(1)
    log = make_log(workdir, plan)
    for step in (1, 2, 3):
        clock[0] += 1.0
        log.push(step, metrics())
    (_, first), (_, second) = workdir.written
    assert "train/loss" in first and not {"time/images_per_second", "time/mfu"} & first.keys()
    assert second["time/images_per_second"] == 4


def test_log_file_gets_a_line_every_30_seconds(plan, clock, monkeypatch, capsys):
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    log = make_log(Workdir(), plan)
    for step in range(1, 10):  # every second step is logged
        clock[0] += 10.0
        log.push(step, metrics())
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[1] for line in printed] == ["step 2/10", "step 6/10"]


def test_bad_steps_end_the_run_when_patience_is_exhausted(plan):
    log = make_log(Workdir(), plan, patience=2)
    bad = [[True, False], [True, True], [False, True]]  # the first seed is bad twice in a row
    values = [metrics(np.array([i, 10 + i]), bad[i]) for i in range(3)]
    log.push(1, values[0])
    log.push(2, values[1])
    with pytest.raises(BadStep) as error:
        log.push(3, values[2])
    assert error.value.step == 2
    np.testing.assert_array_equal(error.value.bad, [True, False])
    np.testing.assert_array_equal(error.value.loss, [1, 11])


def test_validation_of_a_step_is_kept_until_the_next(plan):
    workdir = Workdir()
    log = make_log(workdir, plan)
    log.push(1, metrics())
    log.validation(1, {"loss": 0.1, "accuracy": 0.75, "count": 3})
    assert log.has_new_best and log.val_accuracy == 0.75
    assert workdir.written[-1] == (1, {"val/loss": 0.1, "val/accuracy": 0.75})
    log.push(2, metrics())
    assert not log.has_new_best and log.val_accuracy is None


def test_epoch_without_a_good_step_has_no_mean():
    """Of two seeds with three steps each, one skipped one step and the other all."""
    sums = {"loss": np.float32([3, 0]), "skipped": np.int32([1, 3])}
    means = epoch_means(types.SimpleNamespace(sums=sums), 3)
    np.testing.assert_array_equal(means["loss"], [1.5, np.nan])
