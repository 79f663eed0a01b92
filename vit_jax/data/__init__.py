"""Datasets as uint8 images and int32 labels, and the order in which training visits them.

A split is resident (decoded once and kept in memory) or streamed (decoded ahead of the step). Both
offer `num_examples`, `image_shape`, `class_names`, `source`, `parts`, `examples(indices)`, and
`digest()`.
"""

from vit_jax.data.folder import held_out_split, image_files
from vit_jax.data.images import IMAGE_SUFFIXES, MAX_PIXELS, center_crop_resize, read_image
from vit_jax.data.open import open_split, overlap
from vit_jax.data.order import epoch_order, eval_order
from vit_jax.data.resident import Dataset
from vit_jax.data.source import user_errors
from vit_jax.data.stream import Stream
