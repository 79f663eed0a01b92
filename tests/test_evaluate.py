"""The evaluate command: any split or folder, classes by name, and the table it prints."""

import shutil

import numpy as np
import pytest

import vit_jax
from vit_jax import data, evaluate, scores
from vit_jax.classify import make_classify
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return vit_jax.load(tiny_run)


def test_the_runs_own_test_split_is_the_default(loaded):
    examples, split = evaluate.load_examples(loaded)
    logits, labels, indices = evaluate.classify_examples(loaded, examples)
    assert split == "test" and logits.shape == (30, 3)
    np.testing.assert_array_equal(labels, examples.labels)
    np.testing.assert_array_equal(indices, np.arange(30))


def test_a_folder_with_some_of_the_classes_is_counted_by_their_names(loaded, tiny_folder, tmp_path):
    for name in ("red", "blue"):  # the model has blue, green, red
        shutil.copytree(tiny_folder / "test" / name, tmp_path / name)
    examples, split = evaluate.load_examples(loaded, str(tmp_path))
    logits, labels, _ = evaluate.classify_examples(loaded, examples)
    assert split == "train" and sorted(set(labels)) == [0, 2]
    result = scores.score(logits, labels, loaded.class_names)
    assert [c["count"] for c in result["classes"]] == [10, 0, 10]
    assert result["accuracy"] > 0.9  # the tint is the class: it would be near 0 by number
    lines = list(evaluate.table(result))
    assert "95% interval" in lines[0] and "20 images" in lines[0]
    assert lines[3].split() == ["green", "-", "0"]


def test_a_class_that_the_model_lacks_is_an_error(loaded, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "test" / "red", tmp_path / "purple")
    with pytest.raises(UserError, match="lacks"):
        evaluate.load_examples(loaded, str(tmp_path))


@pytest.fixture
def streamed(tiny_run, monkeypatch, tmp_path):
    """The run as if it had streamed its data, with an empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = vit_jax.load(tiny_run)
    loaded.config.data.streaming = True
    return loaded


def test_streamed_run_decodes_only_the_split_and_caches_nothing(streamed, monkeypatch, tmp_path):
    decoded = []
    read_image = data.read_image

    def counted(file, *args):
        decoded.append(str(file))
        return read_image(file, *args)

    monkeypatch.setattr(data.folder, "read_image", counted)
    examples, _ = evaluate.load_examples(streamed, split="train[90%:]")
    logits, labels, indices = evaluate.classify_examples(streamed, examples)
    assert len(logits) == len(labels) == 9 and len(set(decoded)) == 9
    assert not (tmp_path / "cache").exists()
    images, again = examples.examples(indices[:2])
    resident = data.open_split(streamed.config.data.name, "train[90%:]")
    np.testing.assert_array_equal(images, resident.images[:2])
    np.testing.assert_array_equal(labels, resident.labels)
    np.testing.assert_array_equal(labels[:2], again)
    np.testing.assert_array_equal(logits, make_classify(streamed, batch_size=16)(resident.images))


def test_streamed_evaluation_skips_bad_images_if_the_run_did(streamed, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "test", tmp_path / "test")
    for name in ("0.png", "3.png"):
        (tmp_path / "test" / "red" / name).write_bytes(b"no image")
    examples, _ = evaluate.load_examples(streamed, str(tmp_path))
    with pytest.raises(UserError, match="is not a usable image"):
        evaluate.classify_examples(streamed, examples)
    streamed.config.data.on_bad_image = "skip"
    examples, _ = evaluate.load_examples(streamed, str(tmp_path))
    logits, labels, indices = evaluate.classify_examples(streamed, examples)
    assert len(logits) == len(labels) == len(set(indices)) == 28
    np.testing.assert_array_equal(examples.examples(indices)[1], labels)
