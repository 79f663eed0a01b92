"""What a classifier's logits are worth: accuracy with its interval, calibration, confusions."""

import numpy as np

NUM_BINS = 15  # of the calibration error, as in Guo et al.


def wilson(correct, count, z=1.959964):
    """(low, high) around correct / count: the score interval of a proportion, 95% by default.

    Source: Wilson, "Probable Inference" (JASA 1927); Brown, Cai and DasGupta (2001) recommend it.
    """
    p, z2 = correct / count, z * z / count
    centre = (p + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * np.sqrt(p * (1 - p) / count + z2 / (4 * count))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def log_softmax(logits):
    """float[N, classes] -> float64[N, classes], the logarithms of the probabilities."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def top(log_probabilities, class_names, count):
    """[{"class", "probability"}] of the `count` most probable classes, the first first."""
    best = np.argsort(-log_probabilities, kind="stable")[:count]
    return [
        {"class": class_names[i], "probability": float(np.exp(log_probabilities[i]))} for i in best
    ]


def reliability(confidence, correct, num_bins=NUM_BINS):
    """float64[num_bins, 3]: of each bin of confidence the count, mean confidence and accuracy.

    Bins (0, 1/M], (1/M, 2/M], ... as in Guo et al., "On Calibration of Modern Neural Networks"
    (arXiv 1706.04599). An empty bin has zeros.
    """
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    count, confidence, correct = (
        np.bincount(bins, weights, num_bins) for weights in (None, confidence, correct)
    )
    some = np.maximum(count, 1)
    return np.stack([count, confidence / some, correct / some], axis=1)


def expected_calibration_error(bins):
    """The mean of |accuracy - confidence| over `reliability`'s bins, each weighing its count."""
    return float(np.average(np.abs(bins[:, 2] - bins[:, 1]), weights=bins[:, 0]))


def confusion_matrix(labels, predicted, num_classes):
    """int64[true class, predicted class] counts."""
    pairs = np.asarray(labels, np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def score(logits, labels, class_names):
    """All of it for float[N, classes] logits and int[N] labels, as JSON can hold it.

    Returns {"count", "accuracy", "accuracy_interval" (Wilson, 95%), "loss" (mean negative
    log-likelihood), "ece" (in 0..1), "classes": [{"class", "count", "accuracy", "interval"}],
    "confusion" (rows are true classes)}. A class without images has None for its accuracy.
    """
    log_probabilities = log_softmax(logits)
    # As argmax over the logits: two that differ can have the same probability.
    predicted, labels = np.argmax(logits, axis=1), np.asarray(labels)
    correct = predicted == labels
    confusion = confusion_matrix(labels, predicted, len(class_names))
    bins = reliability(np.exp(log_probabilities.max(axis=1)), correct)
    classes = []
    for i, name in enumerate(class_names):
        right, count = int(confusion[i, i]), int(confusion[i].sum())
        accuracy = right / count if count else None
        interval = wilson(right, count) if count else None
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
