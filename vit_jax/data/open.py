"""The entry point of this package: opens a split of a dataset by name."""

from vit_jax.data.folder import open_folder
from vit_jax.data.hf import open_hf
from vit_jax.data.resident import Dataset, load_resident
from vit_jax.data.source import user_errors
from vit_jax.data.stream import Stream
from vit_jax.errors import expand_home


def overlap(a: Dataset | Stream, b: Dataset | Stream) -> bool:
    """Returns whether two splits of one dataset have an example in common."""
    return any(
        base == other and max(rows.start, others.start) < min(rows.stop, others.stop)
        for base, rows in a.parts
        for other, others in b.parts
    )


def open_split(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    streaming: bool = False,
) -> Dataset | Stream:
    """Opens a split, preparing the dataset first if it is not on disk.

    Args:
      name: a TFDS name ("cifar10", "cifar10:3.0.2"); "shapes10"; "folder:/path" with
        `/path/CLASS/*.png` (the split "train") or `/path/train/CLASS/*.png`, `/path/test/...`; or
        "hf:uoft-cs/cifar10" or "hf:/path", see `hf.open_hf`
      split: TFDS syntax: "train", "train[:45000]", "train[90%:]", "train+test".
      data_dir: the TFDS directory; else $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      image_size: the side, in pixels, of the square that every image is cropped and resized to.
        None keeps the stored images, which must then have the same size.
      streaming: whether to return a Stream, which decodes an image (and reports an unusable one)
        when it is read, or a Dataset, which keeps all images in memory and in a cache on disk.

    Raises UserError if the data cannot be found, prepared, read, or cached.
    """
    import tensorflow_datasets as tfds

    from vit_jax.data.tfds import open_tfds

    if name.startswith("folder:"):
        source = open_folder(expand_home(name.removeprefix("folder:")).resolve())
    elif name.startswith("hf:"):
        source = open_hf(name.removeprefix("hf:"))
    else:
        source = open_tfds(name, data_dir)
    counts = source.num_examples
    sizes = ", ".join(f"{base} ({count} images)" for base, count in counts.items())
    infos = {
        base: tfds.core.SplitInfo(name=base, shard_lengths=[count], num_bytes=0)
        for base, count in counts.items()
    }
    ways = f"use one of: {sizes}, or slices of one, such as train[:80%] and train[80%:]"
    with user_errors(f"no split {split!r} in {source.title}", ways):
        instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        parts = [(i.splitname, range(counts[i.splitname])[i.from_ : i.to]) for i in instructions]
        parts = [(base, rows) for base, rows in parts if rows]
        if not parts:
            raise ValueError("it has no images")
    return (Stream if streaming else load_resident)(source, parts, image_size)
