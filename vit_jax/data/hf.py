"""Datasets of the Hugging Face `datasets` library, from its hub or from disk."""

import functools
import io
import urllib.parse
from pathlib import Path

import numpy as np

from vit_jax.data.images import read_image
from vit_jax.data.order import epoch_order
from vit_jax.data.source import Source, fingerprint, user_cache, user_errors
from vit_jax.errors import UserError, expand_home


def open_hf(name: str) -> Source:
    """Opens a dataset by its name, downloading it first if it is not cached.

    Args:
      name: OWNER/NAME or OWNER/NAME@REVISION on the hub; or /PATH of parquet, arrow, or image files
        or of a dataset that `save_to_disk` wrote. "?image=COLUMN&label=COLUMN&config=NAME" chooses
        the columns, and one of several configurations.

    The examples of a split are shuffled, because many datasets are stored class by class, and a
    slice would then lack classes. Raises UserError if the dataset cannot be loaded, or if its
    columns must be chosen.
    """
    try:
        import datasets
    except ImportError as e:
        raise UserError(f"hf:{name} needs datasets: pip install 'vit-jax[hf]'") from e
    place, _, query = name.partition("?")
    chosen = dict(urllib.parse.parse_qsl(query))
    if unknown := chosen.keys() - {"image", "label", "config"}:
        raise UserError(f"hf:{name}: use image, label, and config, not {', '.join(unknown)}")
    with user_errors(f"hf:{place} cannot be loaded", "use hf:OWNER/NAME or hf:/PATH"):
        loaded = _load(datasets, place, chosen.get("config"))
    features = next(iter(loaded.values())).features
    image, label = _columns(datasets, f"hf:{name}", features, chosen)
    undecoded = datasets.Image(decode=False)
    with user_errors(f"a split of hf:{name} cannot be used", "choose other columns or data"):
        splits = {
            split: data.select_columns([image, label]).cast_column(image, undecoded)
            for split, data in loaded.items()
        }
        if isinstance(features[label], datasets.ClassLabel):
            class_names = tuple(features[label].names)
        else:
            labels = [data.with_format("numpy")[label][:] for data in splits.values()]
            class_names = tuple(map(str, range(int(max(np.concatenate(labels))) + 1)))

    order = {split: epoch_order(len(d), 1, seed=0, epoch=0)[:, 0] for split, d in splits.items()}

    def read(split, index):
        index = int(order[split][index])
        where = f"example {index} of hf:{name} {split}"
        with user_errors(f"{where} cannot be read"):
            example = splits[split][index]
            if not 0 <= example[label] < len(class_names):
                raise ValueError(f"label {example[label]}, not 0 to {len(class_names) - 1}")
            encoded = example[image]["bytes"] or Path(example[image]["path"]).read_bytes()
        return where, read_image(io.BytesIO(encoded), where), int(example[label])

    def identity(split):
        files = [file["filename"] for file in splits[split].cache_files]
        return fingerprint(Path("/"), files, name, class_names, "shuffled")

    return Source(
        title=f"hf:{name}",
        class_names=class_names,
        num_examples={split: len(data) for split, data in splits.items()},
        cache_dir=user_cache(f"hf-{Path(place).name}", Path(name)),
        fingerprint=identity,
        reader=lambda split: functools.partial(read, split),
    )


def _load(datasets, place, config):
    """Returns {split: datasets.Dataset}."""
    path = expand_home(place)
    if (path / "dataset_dict.json").exists():
        return dict(datasets.load_from_disk(str(path)))
    if (path / "state.json").exists():
        return {"train": datasets.load_from_disk(str(path))}
    if path.is_absolute():
        return dict(datasets.load_dataset(str(path), config))
    repository, _, revision = place.partition("@")
    return dict(datasets.load_dataset(repository, config, revision=revision or None))


def _columns(datasets, name, features, chosen):
    """Returns the names of the image column and the label column."""
    kinds = {"image": datasets.Image, "label": datasets.ClassLabel}
    known = ", ".join(f"{column} ({_kind(f)})" for column, f in features.items())
    found = {}
    for kind, feature in kinds.items():
        columns = [column for column, f in features.items() if isinstance(f, feature)]
        if kind in chosen:  # a label may also be a number, without class names
            allowed = [c for c, f in features.items() if kind == "label" and "int" in _kind(f)]
            columns = [c for c in columns + allowed if c == chosen[kind]]
        if len(set(columns)) != 1:
            raise UserError(
                f"{name} needs one {kind} column, set by ?{kind}=COLUMN; it has {known}"
            )
        found[kind] = columns[0]
    return found["image"], found["label"]


def _kind(feature):
    """Returns a feature's type: int64, string, Image, ClassLabel, ..."""
    kind = type(feature).__name__
    return feature.dtype if kind == "Value" else kind
