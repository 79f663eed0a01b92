"""The probe command: its features and its classifiers."""

import json

import numpy as np
import pytest
from small_models import make_trained, random_images

from vit_jax.augment import normalize
from vit_jax.commands import probe
from vit_jax.errors import UserError
from vit_jax.inference.classify import make_classify


@pytest.mark.parametrize("fields", [{}, {"pre_logits": 8, "pool": "gap"}])
def test_features_are_what_the_head_reads(fields):
    trained, images = make_trained(**fields), random_images(3)
    features = make_classify(probe.without_head(trained), batch_size=4)(images)
    x = normalize(images, trained.config.data.mean, trained.config.data.std)
    _, state = trained.model.apply(
        {"params": trained.params}, x, capture_intermediates=lambda module, _: module.name == "head"
    )
    head = trained.params["head"]
    (logits,) = state["intermediates"]["head"]["__call__"]
    assert features.shape == (3, fields.get("pre_logits", 24))
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, atol=1e-5)


def test_classifiers_agree_with_their_definitions():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(3, 8))
    labels = np.arange(90) % 3
    train = (centers[labels] + rng.normal(0, 0.7, (90, 8))).astype(np.float32), labels
    test = (centers[labels] + rng.normal(0, 0.7, (90, 8))).astype(np.float32), labels
    result = probe.probe(train, test, neighbors=5)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x, _ in (train, test)]
    nearest = labels[np.argsort(-(unit[1] @ unit[0].T), axis=1)[:, :5]]
    votes = np.stack([(nearest == c).sum(axis=1) for c in range(3)], axis=1)
    assert result["knn_accuracy"] == np.mean(votes.argmax(axis=1) == labels)
    assert 0.8 < result["linear_accuracy"] < 1


def test_probe_prints_both_accuracies(tiny_run, capsys):
    probe.main(["--workdir", str(tiny_run), "--neighbors", "3", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 12
    probe.main(["--workdir", str(tiny_run), "--neighbors", "3"])
    heading, knn, linear = capsys.readouterr().out.splitlines()
    assert "fitted on train[:60] (60 images) and tested on test (30 images)" in heading
    assert knn == f"3 nearest neighbors: accuracy {result['knn_accuracy']:.2%}"
    assert linear == f"linear classifier: accuracy {result['linear_accuracy']:.2%}"


def test_overlapping_splits_are_rejected(tiny_run):
    with pytest.raises(UserError, match=r"train\[50:\] of .* overlaps train\[:60\]"):
        probe.main(["--workdir", str(tiny_run), "--test_split", "train[50:]"])


def test_single_class_is_rejected(tiny_run):
    with pytest.raises(UserError, match=r"train\[:1\] of .* has only one class: use more images"):
        probe.main(["--workdir", str(tiny_run), "--train_split", "train[:1]"])
