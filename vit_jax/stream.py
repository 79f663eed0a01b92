"""A split too large for memory: read, decoded and cropped an image at a time, ahead of the step.

The order is data.epoch_indices's, as for a split in memory. Each process reads only its own rows of
a batch. The threads that decode, and the batches they keep ready, are grain's.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np

from vit_jax import data
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stream:
    """One split on disk."""

    image_shape: tuple[int, int, int]  # (H, W, C) of what `example` gives
    class_names: tuple[str, ...]
    source: str  # one line for people
    _source: data.Source
    _parts: tuple[tuple[range, Callable], ...]  # indices, and how to read them
    _image_size: int | None
    _skip_bad: bool
    # index -> why, of the images that could not be decoded so far and are left out
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def num_examples(self) -> int:
        """N."""
        return sum(len(indices) for indices, _ in self._parts)

    def example(self, index: int, crop: Callable | None = None) -> tuple[np.ndarray, int]:
        """Image uint8[H, W, C] and label.

        `crop` makes uint8[H, W, C] of the image as stored; without one it is the central square,
        resized. Raises UserError that names an image which cannot be read.
        """
        starts = np.cumsum([0, *(len(indices) for indices, _ in self._parts)])
        part = np.searchsorted(starts, index, side="right") - 1
        indices, read = self._parts[part]
        first = indices[index - int(starts[part])]
        where, decode, label = next(read(first, first + 1))
        image = decode()
        if crop:
            image = crop(image)
        elif self._image_size:
            image = data.fit(image, self._image_size, self._image_size)
        self._source.check(where, image, label, self.image_shape)
        return image, label

    def examples(self, indices) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8[b, H, W, C] and labels int32[b] of an array of indices."""
        images, labels = zip(*(self.example(int(i)) for i in indices), strict=True)
        return np.stack(images), np.array(labels, np.int32)

    def kept(self, index: int, crop: Callable | None = None) -> tuple[np.ndarray, int] | None:
        """`example`, or None, noted in `skipped`, for one that is left out."""
        try:
            return self.example(index, crop)
        except UserError as error:
            if not self._skip_bad:
                raise
            self.skipped[index] = str(error)
            return None

    def digest(self) -> str:
        """Text that two streams share when 64 of their images, spread evenly, are the same."""
        of = hashlib.sha256(repr((self.num_examples, self.class_names)).encode())
        for index in np.linspace(0, self.num_examples - 1, 64).astype(int):
            image, label = self.kept(int(index)) or (np.zeros(0), -1)
            of.update(image.tobytes() + str(label).encode())
        return of.hexdigest()[:16]


def open_stream(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    skip_bad: bool = False,
) -> Stream:
    """Opens a split; the arguments and errors are those of data.load_split.

    What is wrong with an image is told when it is read. With `skip_bad` a batch is short of the
    images that cannot be decoded.
    """
    source, parts = data.open_split(name, split, data_dir)
    opened = {base: source.open(base) for base in dict(parts)}
    parts = tuple((indices, opened[base]) for base, indices in parts if indices)
    indices, read = parts[0]
    for _, decode, _ in read(indices[0], indices[-1] + 1):
        with contextlib.suppress(UserError) if skip_bad else contextlib.nullcontext():
            image = decode()
            break
    else:
        raise UserError(f"split {split!r} of {source.title} holds no image that can be decoded")
    shape = (image_size, image_size, image.shape[-1]) if image_size else image.shape
    return Stream(shape, source.class_names, source.title, source, parts, image_size, skip_bad)


def batches(
    stream: Stream,
    order: Callable[[int], np.ndarray],
    steps: range,
    *,
    rows: np.ndarray,
    threads: int,
    crop: Callable | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's rows of a batch a step, decoded two batches ahead.

    Args:
      order: step -> int32[B], the global batch as indices into the stream, -1 for no example;
        called from several threads.
      rows: int[b], this process's rows of B.
      threads: that read and decode.
      crop: None, or (image uint8[h, w, C] as stored, step, index) -> uint8[H, W, C].
    Yields {"image": uint8[b, H, W, C], "label": int32[b], "mask": bool[b]}. Raises UserError.
    """
    import grain

    class Examples:
        def __len__(self):
            return len(steps) * len(rows)

        def __getitem__(self, position):
            step, row = steps[position // len(rows)], rows[position % len(rows)]
            index = int(order(step)[row])
            cut = crop and functools.partial(crop, step=step, index=index)
            example = stream.kept(index, cut) if index >= 0 else None
            image, label = example or (np.zeros(stream.image_shape, np.uint8), 0)
            return {"image": image, "label": np.int32(label), "mask": np.bool_(example is not None)}

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * len(rows))
    return iter(grain.MapDataset.source(Examples()).to_iter_dataset(options).batch(len(rows)))


def make_crop(augment, *, size: int, seed: int, steps_per_epoch: int) -> Callable | None:
    """The `crop` of `batches` for augment.crop = "decoded", else None.

    torchvision's RandomResizedCrop on images of any size, before they reach the one size that the
    device sees. What is cut derives from (seed, epoch, index): it belongs to the example.
    """
    if augment.crop != "decoded":
        return None

    def crop(image, step, index):
        import cv2

        # Words that the order, drawn from the counter's low end, does not reach.
        words = np.random.Philox(key=[seed, step // steps_per_epoch], counter=[0, 0, index + 1, 0])
        draws = (words.random_raw(40) >> np.uint64(11)) * 2.0**-53
        box = random_box(draws, *image.shape[:2], augment.crop_scale, augment.crop_ratio)
        top, left, height, width = box
        image = image[top : top + height, left : left + width]
        method = cv2.INTER_AREA if height * width > size * size else cv2.INTER_LINEAR
        return cv2.resize(image, (size, size), interpolation=method).reshape(size, size, -1)

    return crop


def random_box(draws, height, width, scale, ratio):
    """(top, left, height, width) of a crop: torchvision's RandomResizedCrop.get_params.

    `draws` are float64[40] uniform in [0, 1): ten trials of an area within `scale`, an aspect
    within `ratio` and a place; where none fits, the central crop nearest to the image's own aspect.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area, aspect, down, right in draws.reshape(10, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = math.exp(low + (high - low) * aspect)
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = int(down * (height - rows + 1)), int(right * (width - columns + 1))
            return top, left, rows, columns
    rows = min(height, max(1, round(width / ratio[0])))
    columns = min(width, max(1, round(height * ratio[1])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns
