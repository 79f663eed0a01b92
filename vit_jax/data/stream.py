"""Splits on disk: each image is read, decoded, and cropped when it is needed.

Each process reads only its own rows of a batch. grain provides the threads that decode and the
queue of finished batches.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vit_jax.data.images import center_crop_resize
from vit_jax.data.source import Source
from vit_jax.errors import UserError


class Stream:
    """A split on disk. Its parts are (base split, range of indices)."""

    def __init__(self, source: Source, parts: list[tuple[str, range]], image_size: int | None):
        self.num_examples = sum(len(indices) for _, indices in parts)
        self.class_names, self.source, self.parts = source.class_names, source.title, parts
        self._image_size = image_size
        self._parts = [(source.reader(name), indices) for name, indices in parts]
        self.image_shape: Any = None  # until the first image is read
        self.image_shape = self.example(0)[0].shape

    def example(self, index: int, crop: Callable | None = None) -> tuple[np.ndarray, int]:
        """Returns an image, uint8[H, W, C], and its label.

        `crop` replaces the resized center crop. Raises UserError for an unusable image.
        """
        for read, indices in self._parts:
            if index < len(indices):
                where, image, label = read(indices[index])
                break
            index -= len(indices)
        if crop:
            image = crop(image)
        elif self._image_size:
            image = center_crop_resize(image, self._image_size, self._image_size)
        if self.image_shape not in (None, image.shape):
            raise UserError(
                f"the images of {self.source} differ in size ({where} is {image.shape}, the first"
                f" is {self.image_shape}): set config.data.image_size to crop and resize them"
            )
        return image, label

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

        A batch is {"image": uint8[b, H, W, C], "label": int32[b], "mask": bool[b]}; the mask is
        False for padding. Raises UserError for an unusable image.

        Args:
          order: step -> int32[B], the global batch as indices into the stream, -1 for no example;
            called from several threads.
          rows: int[b], this process's rows of B.
          threads: number of threads that read and decode.
          crop: None, or (image uint8[h, w, C] as stored, step, index) -> uint8[H, W, C].
        """
        import grain

        def row(position):
            step = steps[position // len(rows)]
            index = int(order(step)[rows[position % len(rows)]])
            image, label = np.zeros(self.image_shape, np.uint8), 0
            if index >= 0:
                of_step = crop and functools.partial(crop, step=step, index=index)
                image, label = self.example(index, of_step)
            return {"image": image, "label": np.int32(label), "mask": np.bool_(index >= 0)}

        examples = grain.MapDataset.range(len(steps) * len(rows)).map(row)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * len(rows))
        return iter(examples.to_iter_dataset(options).batch(len(rows)))

    def digest(self) -> str:
        """Returns a hash of 64 evenly spaced images, the number of examples, and class names."""
        digest = hashlib.sha256(repr((self.num_examples, self.class_names)).encode())
        for index in np.linspace(0, self.num_examples - 1, 64).astype(int):
            image, label = self.example(int(index))
            digest.update(image.tobytes() + str(label).encode())
        return digest.hexdigest()[:16]
