"""Accuracy, intervals, calibration and likelihood against scipy, scikit-learn and by hand."""

import numpy as np
import pytest
import scipy.stats
import sklearn.calibration
import sklearn.metrics

from vit_jax import scores

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(500, 4)).astype(np.float32) * 3
LABELS = np.where(RNG.random(500) < 0.6, LOGITS.argmax(1), RNG.integers(0, 4, 500))
NAMES = ["a", "b", "c", "d"]
PROBABILITIES = np.exp(scores.log_softmax(LOGITS))


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (10, 10), (1, 3), (8009, 10_000)])
def test_interval_is_wilsons(correct, count):
    theirs = scipy.stats.binomtest(correct, count).proportion_ci(method="wilson")
    assert scores.wilson(correct, count) == pytest.approx((theirs.low, theirs.high), abs=1e-8)


def test_loss_confusion_and_accuracy_are_scikit_learns():
    found = scores.score(LOGITS, LABELS, NAMES)
    predicted = LOGITS.argmax(1)
    assert found["loss"] == pytest.approx(sklearn.metrics.log_loss(LABELS, PROBABILITIES))
    assert found["accuracy"] == sklearn.metrics.accuracy_score(LABELS, predicted)
    assert found["confusion"] == sklearn.metrics.confusion_matrix(LABELS, predicted).tolist()
    recall = sklearn.metrics.recall_score(LABELS, predicted, average=None)
    np.testing.assert_allclose([c["accuracy"] for c in found["classes"]], recall)
    assert [c["class"] for c in found["classes"]] == NAMES
    assert sum(c["count"] for c in found["classes"]) == found["count"] == 500


def test_reliability_is_scikit_learns_curve():
    confidence, correct = PROBABILITIES.max(1), LOGITS.argmax(1) == LABELS
    bins = scores.reliability(confidence, correct, num_bins=10)
    accuracy, mean = sklearn.calibration.calibration_curve(correct, confidence, n_bins=10)
    some = bins[:, 0] > 0
    np.testing.assert_allclose(bins[some, 1], mean)
    np.testing.assert_allclose(bins[some, 2], accuracy)
    # Guo et al., equation 3, as it is written.
    upper = np.arange(1, 11) / 10
    inside = (confidence > upper[:, None] - 0.1) & (confidence <= upper[:, None])
    terms = [
        m.sum() / 500 * abs(correct[m].mean() - confidence[m].mean()) for m in inside if m.any()
    ]
    assert scores.expected_calibration_error(bins) == pytest.approx(sum(terms))


def test_calibration_error_of_a_case_by_hand():
    # Two at .95, one of them wrong: |.5 - .95|; two at .6, both right: |1 - .6|.
    bins = scores.reliability(np.array([0.95, 0.95, 0.6, 0.6]), np.array([1, 0, 1, 1]))
    assert scores.expected_calibration_error(bins) == pytest.approx((0.45 + 0.4) / 2)


def test_a_bins_upper_end_belongs_to_it():
    bins = scores.reliability(np.array([1 / 5, 1.0, 0.0]), np.ones(3), num_bins=5)
    assert bins[:, 0].tolist() == [2, 0, 0, 0, 1]


def test_a_class_without_images_has_no_accuracy():
    found = scores.score(LOGITS, np.zeros(500, int), NAMES)
    assert found["classes"][0]["count"] == 500
    assert found["classes"][3] == {"class": "d", "count": 0, "accuracy": None, "interval": None}


def test_large_logits_do_not_overflow():
    found = scores.score(np.array([[1e4, 0.0], [0.0, 1e4]]), [0, 0], ["a", "b"])
    assert found["loss"] == pytest.approx(5e3) and found["accuracy"] == 0.5


def test_top_is_the_most_probable_first():
    best = scores.top(np.log([0.2, 0.5, 0.3]), ["a", "b", "c"], 2)
    assert [b["class"] for b in best] == ["b", "c"]
    assert [b["probability"] for b in best] == pytest.approx([0.5, 0.3])
