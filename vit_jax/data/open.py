"""The entry point of this package: opens a split of a dataset by name."""

from vit_jax.data.folder import open_folder
from vit_jax.data.resident import Dataset, load_resident
from vit_jax.data.source import Source, one_line
from vit_jax.data.stream import Stream, open_stream
from vit_jax.data.tfds import open_tfds
from vit_jax.errors import UserError, expand_home


def open_split(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    skip_bad: bool = False,
    streaming: bool = False,
) -> Dataset | Stream:
    """Opens a split, preparing the dataset first if it is not on disk.

    Args:
      name: a TFDS name ("cifar10", "cifar10:3.0.2"), "shapes10", or "folder:/path" with
        /path/CLASS/*.png (the split "train") or /path/train/CLASS/*.png, /path/test/... The order
        of a folder's images mixes the classes.
      split: TFDS syntax: "train", "train[:45000]", "train[90%:]", "train+test".
      data_dir: the TFDS directory; else $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      image_size: pixels; every image is center-cropped to a square and resized to this side.
        None keeps the stored images, which must then have the same size.
      skip_bad: skips images that cannot be decoded. Without it they raise UserError. Skipping does
        not shift the other images from one part of a split to another.
      streaming: returns a Stream, which decodes an image each time it is read, and reports an
        unusable one only then. Otherwise returns a Dataset, which keeps all images in memory and
        caches them on disk.

    Raises:
      UserError: the dataset or split does not exist, cannot be prepared, is empty or corrupted, or
        contains labels outside its classes; the disk is full.
    """
    if name.startswith("folder:"):
        source = open_folder(expand_home(name.removeprefix("folder:")).resolve())
    else:
        source = open_tfds(name, data_dir)
    parts = _parts(source, split)
    read = open_stream if streaming else load_resident
    examples = read(source, parts, image_size=image_size, skip_bad=skip_bad)
    if examples is None:
        raise UserError(f"split {split!r} of {source.title} has no image that can be decoded")
    return examples


def _parts(source: Source, split: str) -> list[tuple[str, range]]:
    """Returns the (base split, range of indices) pairs that make up a split."""
    import tensorflow_datasets as tfds

    infos = {
        key: tfds.core.SplitInfo(name=key, shard_lengths=lengths, num_bytes=0)
        for key, lengths in source.shard_lengths.items()
    }
    sizes = ", ".join(f"{key} ({info.num_examples} images)" for key, info in infos.items())
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except Exception as error:  # TFDS raises many types for a split that it cannot parse
        raise UserError(
            f"split {split!r} of {source.title}: {one_line(error)}; use one of: {sizes}"
        ) from error
    ranges = [(p.splitname, range(infos[p.splitname].num_examples)[p.from_ : p.to]) for p in parts]
    if not any(r for _, r in ranges):
        raise UserError(f"split {split!r} of {source.title} has no images; use one of: {sizes}")
    return ranges
