"""Classification metrics: accuracy with its confidence interval, calibration, confusion matrix."""

import numpy as np

NUM_BINS = 15  # of the calibration error, as used by Guo et al.


def wilson(correct, count, z=1.959964):
    """Returns Wilson's score interval (low, high) of correct / count, 95% by default.

    Source: Wilson, "Probable Inference" (JASA 1927); Brown, Cai, and DasGupta (2001) recommend it.
    """
    p, z2 = correct / count, z * z / count
    center = (p + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * np.sqrt(p * (1 - p) / count + z2 / (4 * count))
    return float(max(0.0, center - half)), float(min(1.0, center + half))


def log_softmax(logits):
    """Returns the log-probabilities, float64[N, classes], of float[N, classes] logits."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def top(log_probabilities, class_names, count):
    """Returns [{"class", "probability"}] of the `count` most probable classes, best first.

    `log_probabilities` is float[classes].
    """
    best = np.argsort(-log_probabilities, kind="stable")[:count]
    return [
        {"class": class_names[i], "probability": float(np.exp(log_probabilities[i]))} for i in best
    ]


def reliability(confidence, correct, num_bins=NUM_BINS):
    """Returns the count, mean confidence, and accuracy per confidence bin: float64[num_bins, 3].

    `confidence` and `correct` have shape [N]. The bins are (0, 1/M], (1/M, 2/M], ... as in Guo et
    al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599). An empty bin has zeros.
    """
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    count, confidence, correct = (
        np.bincount(bins, weights, num_bins) for weights in (None, confidence, correct)
    )
    divisor = np.maximum(count, 1)
    return np.stack([count, confidence / divisor, correct / divisor], axis=1)


def expected_calibration_error(bins):
    """Returns the mean of |accuracy - confidence| over `reliability`'s bins, weighted by count."""
    return float(np.average(np.abs(bins[:, 2] - bins[:, 1]), weights=bins[:, 0]))


def confusion_matrix(labels, predicted, num_classes):
    """Returns the int64[true class, predicted class] counts of two int[N] arrays."""
    pairs = np.asarray(labels, np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


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
    confusion = confusion_matrix(labels, predicted, len(class_names))
    bins = reliability(np.exp(log_probabilities.max(axis=1)), correct)
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
        "ece": expected_calibration_error(bins),
        "classes": classes,
        "confusion": confusion.tolist(),
    }
