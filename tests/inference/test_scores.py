"""Accuracy, intervals, calibration, and loss against scipy, scikit-learn, and known values."""

import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics

from vit_jax.inference import scores

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(500, 4)).astype(np.float32) * 3
LABELS = np.where(RNG.random(500) < 0.6, LOGITS.argmax(1), RNG.integers(0, 4, 500))
NAMES = ["a", "b", "c", "d"]
PROBABILITIES = np.exp(scores.log_softmax(LOGITS))


@pytest.mark.parametrize(
    ("correct", "count", "interval"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_is_that_of_the_literature(correct, count, interval):
    """Table I of Newcombe, Statistics in Medicine 17 (1998), method 3."""
    assert scores.wilson(correct, count) == pytest.approx(interval, abs=6e-5)


def test_loss_confusion_and_accuracy_match_scikit_learn():
    result = scores.score(LOGITS, LABELS, NAMES)
    predicted = LOGITS.argmax(1)
    assert result["loss"] == pytest.approx(sklearn.metrics.log_loss(LABELS, PROBABILITIES))
    assert result["accuracy"] == sklearn.metrics.accuracy_score(LABELS, predicted)
    assert result["confusion"] == sklearn.metrics.confusion_matrix(LABELS, predicted).tolist()
    recall = sklearn.metrics.recall_score(LABELS, predicted, average=None)
    np.testing.assert_allclose([c["accuracy"] for c in result["classes"]], recall)
    assert [c["class"] for c in result["classes"]] == NAMES
    assert sum(c["count"] for c in result["classes"]) == result["count"] == 500


def test_calibration_error_matches_guo_et_al_and_scikit_learn():
    confidence, correct = PROBABILITIES.max(1), LOGITS.argmax(1) == LABELS
    # Guo et al., equation 3.
    upper = np.arange(1, 11) / 10
    inside = (confidence > upper[:, None] - 0.1) & (confidence <= upper[:, None])
    inside = inside[inside.any(axis=1)]
    terms = [m.sum() / 500 * abs(correct[m].mean() - confidence[m].mean()) for m in inside]
    error = scores.calibration_error(confidence, correct, num_bins=10)
    assert error == pytest.approx(sum(terms))
    accuracy, mean = sklearn.calibration.calibration_curve(correct, confidence, n_bins=10)
    assert error == pytest.approx(np.average(abs(accuracy - mean), weights=inside.sum(axis=1)))


def test_calibration_error_of_a_hand_computed_case():
    # Two at 0.95, one wrong: |0.5 - 0.95|; two at 0.6, both correct: |1 - 0.6|.
    error = scores.calibration_error(np.array([0.95, 0.95, 0.6, 0.6]), np.array([1, 0, 1, 1]))
    assert error == pytest.approx((0.45 + 0.4) / 2)


def test_upper_bin_edge_is_inclusive():
    # 0.2 is in the bin of 0.1, not in that of 0.3: |(0 - 0.1) + (1 - 0.2)| + |0 - 0.3|.
    error = scores.calibration_error(np.array([0.1, 1 / 5, 0.3]), np.array([0, 1, 0]), num_bins=5)
    assert error == pytest.approx((0.7 + 0.3) / 3)
    assert scores.calibration_error(np.array([0.0, 1.0]), np.array([0, 1]), num_bins=5) == 0


def test_class_without_images_has_no_accuracy():
    result = scores.score(LOGITS, np.zeros(500, int), NAMES)
    assert result["classes"][0]["count"] == 500
    assert result["classes"][3] == {"class": "d", "count": 0, "accuracy": None, "interval": None}


def test_large_logits_do_not_overflow():
    result = scores.score(np.array([[1e4, 0.0], [0.0, 1e4]]), [0, 0], ["a", "b"])
    assert result["loss"] == pytest.approx(5e3) and result["accuracy"] == 0.5


def test_top_returns_most_probable_classes_first():
    best = scores.top(np.log([0.2, 0.5, 0.3]), ["a", "b", "c"], 2)
    assert [b["class"] for b in best] == ["b", "c"]
    assert [b["probability"] for b in best] == pytest.approx([0.5, 0.3])
