"""Datasets of the Hugging Face library: parquet written by pyarrow, images, and saved datasets."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import picture, user_error
from PIL import Image

from vit_jax.data import open_split

NAMES = ["cat", "dog"]


def png(i):
    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def numbers(images):
    """Returns the i of every picture(i)."""
    known = {picture(i).tobytes(): i for i in range(40)}
    return [known[image.tobytes()] for image in images]


def write_parquet(path, columns, features):
    """Writes {column: list} as the hub stores it: parquet with the features in its metadata."""
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    arrays = {
        name: pa.array(values, image if features[name] == {"_type": "Image"} else None)
        for name, values in columns.items()
    }
    table = pa.table(arrays).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


LABEL = {"names": NAMES, "_type": "ClassLabel"}
COLUMNS = {"img": {"_type": "Image"}, "label": LABEL}


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    """The library, with a cache of its own.

    Imported here because every pytest-xdist worker imports this file, but only one runs it.
    """
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture
def parquet(tmp_path):
    """A folder with 12 training and 4 test images."""
    for split, rows in (("train", range(12)), ("test", range(20, 24))):
        columns = {"img": [png(i) for i in rows], "label": [i % 2 for i in rows]}
        write_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet", columns, COLUMNS)
    return tmp_path / "set"


def test_parquet_has_shuffled_images(parquet, user_cache):
    """The order must not change: the digests of existing runs depend on it."""
    train = open_split(f"hf:{parquet}", "train")
    order = [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]
    assert numbers(train.images) == order
    assert train.class_names == ("cat", "dog") and train.labels.tolist() == [i % 2 for i in order]
    assert str(user_cache) in train.source
    part = open_split(f"hf:{parquet}", "train[75%:]+test[:1]")
    assert numbers(part.images) == [*order[9:], 20]
    user_error(f"hf:{parquet}", "val", says=["'val'", "train (12 images)", "test (4 images)"])


def test_streaming_reads_the_same_images(parquet):
    stream = open_split(f"hf:{parquet}", "train", streaming=True)
    images, labels = stream.examples(np.array([3, 8]))
    np.testing.assert_array_equal(images, open_split(f"hf:{parquet}", "train").images[[3, 8]])
    assert labels.tolist() == [i % 2 for i in numbers(images)]


def test_image_folder_and_saved_dataset(datasets, folder, parquet, tmp_path):
    images = open_split(f"hf:{folder}", "train")
    assert images.class_names == ("cat", "dog") and len(images.images) == 40
    data = datasets.load_dataset(str(parquet))
    data.save_to_disk(str(tmp_path / "saved"))
    test = open_split(f"hf:{tmp_path / 'saved'}", "test")
    assert sorted(numbers(test.images)) == [20, 21, 22, 23]
    data["train"].save_to_disk(str(tmp_path / "one"))
    assert len(open_split(f"hf:{tmp_path / 'one'}", "train").images) == 12


def test_columns_are_chosen_by_name(tmp_path):
    columns = {
        "left": [png(i) for i in range(3)],
        "right": [png(i) for i in range(10, 13)],
        "number": [0, 5, 2],
        "text": ["a", "b", "c"],
    }
    number, text = ({"dtype": t, "_type": "Value"} for t in ("int64", "string"))
    features = {c: {"_type": "Image"} for c in ("left", "right")} | {"number": number, "text": text}
    write_parquet(tmp_path / "set" / "train.parquet", columns, features)
    name = f"hf:{tmp_path / 'set'}"
    has = "it has left (Image), right (Image), number (int64), text (string)"
    user_error(name, "train", says=["needs one image column, set by ?image=COLUMN", has])
    user_error(f"{name}?image=left", "train", says=["needs one label column, set by ?label="])
    user_error(f"{name}?image=left&label=text", "train", says=["needs one label column"])
    user_error(f"{name}?image=up&label=number", "train", says=["needs one image column"])
    user_error(f"{name}?images=left", "train", says=["use image, label, and config, not images"])
    got = open_split(f"{name}?image=right&label=number", "train")
    assert got.class_names == tuple("012345") and dict(
        zip(numbers(got.images), got.labels.tolist(), strict=True)
    ) == {10: 0, 11: 5, 12: 2}


def test_unlabeled_example_and_missing_dataset_are_reported(tmp_path):
    columns = {"img": [png(0), png(1)], "label": [0, -1]}
    write_parquet(tmp_path / "set" / "train.parquet", columns, COLUMNS)
    user_error(f"hf:{tmp_path / 'set'}", "train", says=["example 1 of", "label -1, not 0 to 1"])
    user_error(f"hf:{tmp_path / 'absent'}", "train", says=["absent cannot be loaded"])
