"""Resident and streamed data yield the same batches in the same order."""

import jax
import numpy as np

from vit_jax.experiment import make_experiment


def batches(experiment, after):
    """{step: batch on the host} of all steps after `after`."""
    feed, values = experiment.feed, {}
    for step, inputs in experiment.batches(after=after):
        values[step] = jax.device_get(feed.batch(step - 1, *inputs))
    return values


def test_resident_and_streamed_batches_are_the_same(tiny_config):
    c = tiny_config
    c.epochs, c.accumulate_steps, c.batch_size = 2, 4, 18  # padded to 20 rows
    resident = make_experiment(c)
    expected = batches(resident, after=3)
    c.data.streaming = True
    streamed = make_experiment(c)
    given = batches(streamed, after=3)
    assert list(given) == list(expected) == list(range(4, 11))
    for step, batch in expected.items():
        assert batch["image"].shape == (20, 8, 8, 3) and batch["mask"].sum() == 18
        np.testing.assert_array_equal(given[step]["mask"], batch["mask"])
        for name in ("image", "label"):
            rows = batch["mask"]
            np.testing.assert_array_equal(given[step][name][rows], batch[name][rows])
    for experiment in (resident, streamed):
        shapes = experiment.feed.input_shapes
        (_, inputs), *_ = experiment.batches(after=9)
        same = jax.tree.map(
            lambda s, x: s.shape == x.shape and s.dtype == x.dtype and s.sharding == x.sharding,
            *(shapes, inputs),
        )
        assert jax.tree.all(same)


def test_feed_is_not_started_when_no_step_is_left(tiny_config):
    for tiny_config.data.streaming in (False, True):
        experiment = make_experiment(tiny_config)
        assert list(experiment.batches(after=experiment.plan.total_steps)) == []
