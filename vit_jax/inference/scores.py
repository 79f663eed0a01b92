"""Classification metrics: accuracy with its confidence interval, calibration, confusion matrix."""

import numpy as np
import scipy.special


def wilson(correct, count):
    """Returns Wilson's 95% score interval (low, high) of correct / count (JASA 1927)."""
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(correct, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def log_softmax(logits):
    """Returns the log-probabilities, float64[N, classes], of float[N, classes] logits."""
    return scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)


def top(log_probabilities, class_names, count):
    """Returns [{"class", "probability"}] of the most probable classes, from float[classes]."""
    best = np.argsort(-log_probabilities, kind="stable")[:count]
    return [
        {"class": class_names[i], "probability": float(np.exp(log_probabilities[i]))} for i in best
    ]


def calibration_error(confidence, correct, num_bins=15):
    """Returns the mean of |accuracy - confidence| over bins of confidence, weighted by count.

    `confidence` and `correct` have shape [N]. The bins are (0, 1/M], (1/M, 2/M], ... as in Guo et
    al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599).
    """
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, np.subtract(correct, confidence, dtype=np.float64), num_bins)
    return float(np.abs(gaps).sum() / len(bins))


def score(logits, labels, class_names):
    """Computes every metric for float[N, classes] logits and int[N] labels, as JSON values.

    Returns {"count", "accuracy", "accuracy_interval" (Wilson, 95%), "loss" (mean negative
    log-likelihood), "ece" (in 0..1), "classes": [{"class", "count", "accuracy", "interval"}],
    "confusion" (rows are true classes)}. The accuracy and interval of a class without images are
    None.
    """
    log_probabilities = log_softmax(logits)
    # From the logits: two different logits can round to the same probability.
    predicted, labels = np.argmax(logits, axis=1), np.asarray(labels)
    correct = predicted == labels
    num_classes = len(class_names)
    pairs = labels * num_classes + predicted
    confusion = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    classes = []
    for i, name in enumerate(class_names):
        hits, count = int(confusion[i, i]), int(confusion[i].sum())
        accuracy = hits / count if count else None
        interval = wilson(hits, count) if count else None
        classes.append({"class": name, "count": count, "accuracy": accuracy, "interval": interval})
    return {
        "count": len(labels),
        "accuracy": int(correct.sum()) / len(labels),
        "accuracy_interval": wilson(int(correct.sum()), len(labels)),
        "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "ece": calibration_error(np.exp(log_probabilities.max(axis=1)), correct),
        "classes": classes,
        "confusion": confusion.tolist(),
    }
