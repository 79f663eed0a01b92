"""The examples that a model is evaluated on: any split or folder, with classes matched by name."""

import dataclasses
import shutil
import types

import numpy as np
import pytest

import vit_jax
from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.inference.classify import (
    class_numbers,
    classify_examples,
    load_examples,
    make_classify,
)


@pytest.fixture(scope="module")
def trained(tiny_run):
    return vit_jax.load(tiny_run)


def test_runs_own_test_split_is_the_default(trained):
    examples, split = load_examples(trained)
    logits, labels = classify_examples(trained, examples)
    assert split == "test" and logits.shape == (30, 3)
    np.testing.assert_array_equal(labels, examples.labels)
    np.testing.assert_allclose(logits, make_classify(trained)(examples.images), atol=1e-6)


def test_classes_of_a_folder_are_matched_by_name(trained, tiny_folder, tmp_path):
    for name in ("red", "blue"):  # the model has blue, green, red
        shutil.copytree(tiny_folder / "test" / name, tmp_path / name)
    examples, split = load_examples(trained, str(tmp_path))
    logits, labels = classify_examples(trained, examples)
    assert split == "train" and sorted(set(labels)) == [0, 2]
    # The tint is the class: matched by number, the accuracy would be near 0.
    assert (logits.argmax(axis=1) == labels).mean() > 0.9


def test_streamed_run_is_evaluated_without_decoding_the_whole_split(trained, tiny_folder):
    config = trained.config.copy_and_resolve_references()
    config.data.streaming = True
    streamed = dataclasses.replace(trained, config=config)
    examples, _ = load_examples(streamed)
    assert isinstance(examples, data.Stream)
    resident, _ = load_examples(trained)
    for got, expected in zip(
        classify_examples(streamed, examples), classify_examples(trained, resident), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_class_that_the_model_lacks_is_rejected(trained, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "test" / "red", tmp_path / "purple")
    with pytest.raises(
        UserError, match=r"lacks \(purple\); the model's classes are blue, green, red"
    ):
        load_examples(trained, str(tmp_path))


def test_named_classes_are_matched_by_name_even_if_the_names_are_numbers():
    """A folder sorts its classes as text: 0, 1, 10, 2, ..."""
    numbers = [str(i) for i in range(11)]
    trained = types.SimpleNamespace(class_names=sorted(numbers))
    examples = types.SimpleNamespace(class_names=numbers)
    assert [sorted(numbers)[i] for i in class_numbers(trained, examples)] == numbers


def test_validation_images_of_a_folder_are_chosen_before_training_images(
    trained, tiny_folder, tmp_path
):
    shutil.copytree(tiny_folder / "train", tmp_path / "train")
    shutil.copytree(tiny_folder / "test", tmp_path / "Val")
    assert load_examples(trained, str(tmp_path))[1] == "Val"
