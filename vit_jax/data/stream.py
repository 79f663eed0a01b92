"""Splits larger than memory: each image is read, decoded, and cropped ahead of the step.

The order is that of a resident split, `order.epoch_order`. Each process reads only its own rows of
a batch. grain provides the threads that decode and the queue of finished batches.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from vit_jax.data.images import center_crop_resize
from vit_jax.data.source import Source
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stream:
    """A split on disk."""

    image_shape: tuple[int, int, int]  # (H, W, C) of the images that `example` returns
    class_names: tuple[str, ...]
    source: str  # one line to print
    _source: Source
    _parts: tuple[tuple[range, Callable], ...]  # indices, and the function that reads them
    _image_size: int | None
    _skip_bad: bool
    # index -> reason, for the images skipped so far
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def num_examples(self) -> int:
        """N."""
        return sum(len(indices) for indices, _ in self._parts)

    def example(self, index: int, crop: Callable | None = None) -> tuple[np.ndarray, int]:
        """Returns an image, uint8[H, W, C], and its label.

        `crop` maps the stored image to uint8[H, W, C]; the default is the resized center crop.
        Raises UserError, which names the image, if it is unusable.
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
            image = center_crop_resize(image, self._image_size, self._image_size)
        self._source.check_example(where, image, label, self.image_shape)
        return image, label

    def example_or_skip(self, index: int, crop: Callable | None = None):
        """Returns `example`, or None, recorded in `skipped`, for an image that is skipped."""
        try:
            return self.example(index, crop)
        except UserError as error:
            if not self._skip_bad:
                raise
            self.skipped[index] = str(error)
            return None

    def examples(self, indices) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8[b, H, W, C] and labels int32[b] for an array of indices."""
        images, labels = zip(*(self.example(int(i)) for i in indices), strict=True)
        return np.stack(images), np.array(labels, np.int32)

    def batches(
        self,
        order: Callable[[int], np.ndarray],
        steps: range,
        *,
        rows: np.ndarray,
        threads: int,
        crop: Callable | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's rows of each step's batch, decoded two batches ahead.

        Args:
          order: step -> int32[B], the global batch as indices into the stream, -1 for no example;
            called from several threads.
          rows: int[b], this process's rows of B.
          threads: number of threads that read and decode.
          crop: None, or (image uint8[h, w, C] as stored, step, index) -> uint8[H, W, C].
        Yields {"image": uint8[b, H, W, C], "label": int32[b], "mask": bool[b]}. The mask is False
        for no example and for a skipped image. Raises UserError for an unusable image.
        """
        import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * len(rows))
        examples = grain.MapDataset.source(_Rows(self, order, steps, rows, crop))
        return iter(examples.to_iter_dataset(options).batch(len(rows)))

    def digest(self) -> str:
        """Returns a hash of 64 evenly spaced images, the number of examples, and class names."""
        digest = hashlib.sha256(repr((self.num_examples, self.class_names)).encode())
        for index in np.linspace(0, self.num_examples - 1, 64).astype(int):
            image, label = self.example_or_skip(int(index)) or (np.zeros(0), -1)
            digest.update(image.tobytes() + str(label).encode())
        return digest.hexdigest()[:16]


def open_stream(
    source: Source, parts: list[tuple[str, range]], *, image_size: int | None, skip_bad: bool
) -> Stream | None:
    """Opens the parts of a split, given as (base split, range of indices), as a Stream.

    Other arguments and errors are as in `open_split`. Returns None if no image of the first part
    can be decoded.
    """
    readers = {name: source.reader(name) for name in dict(parts)}
    parts = tuple((indices, readers[name]) for name, indices in parts if indices)
    indices, read = parts[0]
    for _, decode, _ in read(indices[0], indices[-1] + 1):
        with contextlib.suppress(UserError) if skip_bad else contextlib.nullcontext():
            image = decode()
            break
    else:
        return None
    shape = (image_size, image_size, image.shape[-1]) if image_size else image.shape
    return Stream(shape, source.class_names, source.title, source, parts, image_size, skip_bad)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Random access for grain: the rows of all steps, one after another."""

    stream: Stream
    order: Callable[[int], np.ndarray]
    steps: range
    rows: np.ndarray
    crop: Callable | None

    def __len__(self):
        return len(self.steps) * len(self.rows)

    def __getitem__(self, position):
        step = self.steps[position // len(self.rows)]
        index = int(self.order(step)[self.rows[position % len(self.rows)]])
        crop = self.crop and functools.partial(self.crop, step=step, index=index)
        example = self.stream.example_or_skip(index, crop) if index >= 0 else None
        image, label = example or (np.zeros(self.stream.image_shape, np.uint8), 0)
        return {"image": image, "label": np.int32(label), "mask": np.bool_(example is not None)}
