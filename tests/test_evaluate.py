"""The evaluate command: any split or folder, classes by name, and the table it prints."""

import shutil

import numpy as np
import pytest

import vit_jax
from vit_jax import evaluate
from vit_jax.errors import UserError
from vit_jax.inference import scores
from vit_jax.inference.classify import make_classify


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return vit_jax.load(tiny_run)


def test_the_runs_own_test_split_is_the_default(loaded):
    examples, labels, split = evaluate.load_examples(loaded)
    assert (split, len(labels)) == ("test", 30)
    np.testing.assert_array_equal(labels, examples.labels)


def test_a_folder_with_some_of_the_classes_is_counted_by_their_names(loaded, tiny_folder, tmp_path):
    for name in ("red", "blue"):  # the model has blue, green, red
        shutil.copytree(tiny_folder / "test" / name, tmp_path / name)
    examples, labels, split = evaluate.load_examples(loaded, str(tmp_path))
    assert split == "train" and sorted(set(labels)) == [0, 2]
    result = scores.score(make_classify(loaded)(examples.images), labels, loaded.class_names)
    assert [c["count"] for c in result["classes"]] == [10, 0, 10]
    assert result["accuracy"] > 0.9  # the tint is the class: it would be near 0 by number
    lines = list(evaluate.table(result))
    assert "95% interval" in lines[0] and "20 images" in lines[0]
    assert lines[3].split() == ["green", "-", "0"]


def test_a_class_that_the_model_lacks_is_an_error(loaded, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "test" / "red", tmp_path / "purple")
    with pytest.raises(UserError, match="lacks"):
        evaluate.load_examples(loaded, str(tmp_path))
