"""vit-jax probe: k-nearest-neighbor and linear-probe accuracy of frozen features."""

import argparse
import dataclasses
import json

import numpy as np

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.inference.classify import classify_examples, load_examples
from vit_jax.inference.trained import load
from vit_jax.parallel import backend

try:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError as e:
    raise UserError("probe needs scikit-learn: pip install 'vit-jax[probe]'") from e


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax probe",
        description="Train a k-nearest-neighbor classifier and a linear one on the features that "
        "a run's head reads, for images without augmentation, and print their test accuracy.",
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--data", help="image folder or TFDS name (default: the run's)")
    parser.add_argument("--train_split", help="TFDS split (default: the run's train_split)")
    parser.add_argument("--test_split", help="TFDS split (default: the test or validation split)")
    parser.add_argument("--step", default="last", help="a saved step, best, or last (default)")
    parser.add_argument("--neighbors", type=int, default=20, help="k (default: 20)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.neighbors < 1:
        raise UserError(f"--neighbors must be at least 1; got {args.neighbors}")
    backend.start_backend()
    trained = load(args.workdir, args.step)
    encoder = without_head(trained)
    train_split = args.train_split or trained.config.data.train_split
    (train, train_split), (test, test_split) = (
        load_examples(trained, args.data, split) for split in (train_split, args.test_split)
    )
    if data.overlap(train, test):
        raise UserError(
            f"{test_split} of {test.source} overlaps {train_split}, which the classifiers are "
            "trained on: set --train_split and --test_split to disjoint splits"
        )
    train_features = classify_examples(encoder, train)
    if len(np.unique(train_features[1])) < 2:
        raise UserError(f"{train_split} of {train.source} has only one class: use more images")
    result = probe(train_features, classify_examples(encoder, test), args.neighbors)
    if args.json:
        print(json.dumps({"step": trained.step, **result}))
        return
    print(
        f"features of step {trained.step}, fitted on {train_split} ({train.num_examples:,} images) "
        f"and tested on {test_split} ({test.num_examples:,} images) of {test.source}",
        f"{args.neighbors} nearest neighbors: accuracy {result['knn_accuracy']:.2%}",
        f"linear classifier: accuracy {result['linear_accuracy']:.2%}",
        sep="\n",
    )


def without_head(trained):
    """Replaces the head with the identity: the TrainedModel returns features instead of logits."""
    D = trained.params["head"]["kernel"].shape[0]
    head = {"kernel": np.eye(D, dtype=np.float32), "bias": np.zeros(D, np.float32)}
    return dataclasses.replace(
        trained,
        model=trained.model.clone(num_classes=D),
        params={**trained.params, "head": head},
    )


def probe(train, test, neighbors):
    """Fits two classifiers on `train` and returns their accuracy on `test`.

    Args:
      train: features float32[N, D] and labels int[N].
      test: the same.
      neighbors: k of the k-nearest-neighbor classifier, which uses cosine similarity.
    Returns {"knn_accuracy", "linear_accuracy"}. The linear classifier is multinomial logistic
    regression on standardized features.
    """
    neighbors = min(neighbors, len(train[1]))
    knn = KNeighborsClassifier(neighbors, metric="cosine", algorithm="brute")
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return {
        "knn_accuracy": knn.fit(*train).score(*test),
        "linear_accuracy": linear.fit(*train).score(*test),
    }
