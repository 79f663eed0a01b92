"""Exact evaluation of a split: every example counts once, at any batch size."""

import numpy as np
import pytest

from vit_jax.evaluate import make_evaluate
from vit_jax.experiment import make_experiment
from vit_jax.feed import make_eval_batches


def test_evaluation_counts_each_example_once(tiny_config):
    c = tiny_config
    experiment = make_experiment(c)
    params, split = experiment.init().params, experiment.splits["test"]
    evaluate, results = make_evaluate(experiment.eval_step, experiment.mesh), []
    for c.eval_batch_size in (30, 1, 7, 64):
        results.append(evaluate(params, make_eval_batches(split, c, experiment.mesh)()))
    c.eval_batch_size, c.data.streaming = 7, True
    streamed = make_experiment(c).splits["test"]
    results.append(evaluate(params, make_eval_batches(streamed, c, experiment.mesh)()))
    first = results[0]
    assert first["count"] == 30 and first["loss"] > 0
    for result in results[1:]:
        assert result == {**first, "loss": pytest.approx(first["loss"], rel=1e-6)}


def test_sums_of_several_seeds_are_separate(tiny_config):
    tiny_config.num_seeds = 2
    experiment = make_experiment(tiny_config)
    result = experiment.evaluate(experiment.init().params, "test")
    np.testing.assert_array_equal(result["count"], [30, 30])
    assert result["loss"].shape == (2,) and result["loss"][0] != result["loss"][1]
