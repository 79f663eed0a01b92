"""shapes10: a generated dataset of ten shapes, 32x32 RGB. It needs no download and no TensorFlow.

Importing this module registers the TFDS builder. The color of a shape is independent of its class:
the best linear classifier reaches about 38% on the test split, a small ViT over 97%.
Every number comes from Philox, + - * /, and sqrt in float64, whose rounding IEEE 754 defines, so
every machine draws the same bits.
"""

import io

import cv2
import numpy as np
import tensorflow_datasets as tfds

SIDE = 32
SPLIT_SIZES = {"train": 20_000, "test": 2_000}
CHUNK = 500  # images per call of `draw`; another value draws other images

# The outward normals of regular polygons, cosines and sines; the first points along +y.
_TRIANGLE = ((0.0, -0.866025, 0.866025), (1.0, -0.5, -0.5))
_PENTAGON = (
    (0.0, -0.951057, -0.587785, 0.587785, 0.951057),
    (1.0, 0.309017, -0.809017, -0.809017, 0.309017),
)


def _disc(x, y, radius):
    return np.sqrt(x * x + y * y) - radius


def _box(x, y, half_width, half_height):
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _heart(x, y):
    x, y = 0.707107 * (x - y) + 0.15, 0.15 - 0.707107 * (x + y)  # the tip points down
    lobes = np.minimum(_disc(x - 0.5, y, 0.5), _disc(x, y - 0.5, 0.5))
    return np.minimum(lobes, _box(x, y, 0.5, 0.5))


def _along(x, y, normals):
    """Returns the coordinates of (x, y) along each of the normals."""
    return [c * x + s * y for c, s in zip(*normals, strict=True)]


# The signed distance to each shape, which roughly fills the unit disc; negative inside. It is exact
# on the outline and has slope 1 near the edges, which is all that `_paint` needs.
_DISTANCES = {
    "bar": lambda x, y: _box(x, y, 0.95, 0.28),
    "crescent": lambda x, y: np.maximum(_disc(x, y, 0.95), -_disc(x - 0.5, y, 0.8)),
    "cross": lambda x, y: np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95)),
    "disc": lambda x, y: _disc(x, y, 0.85),
    "ell": lambda x, y: np.minimum(_box(x + 0.45, y, 0.3, 0.85), _box(x, y - 0.55, 0.75, 0.3)),
    "heart": _heart,
    "ring": lambda x, y: np.abs(_disc(x, y, 0.72)) - 0.2,
    "square": lambda x, y: _box(x, y, 0.72, 0.72),
    # Inside all but one of the pentagon's extended sides.
    "star": lambda x, y: np.sort(_along(x, y, _PENTAGON), axis=0)[-2] - 0.36,
    "triangle": lambda x, y: np.max(_along(x, y, _TRIANGLE), axis=0) - 0.52,
}
NAMES = tuple(_DISTANCES)


def draw_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws "train" or "test": images uint8[N, 32, 32, 3] and labels int64[N], 0 to 9 repeated."""
    rng = np.random.Generator(np.random.Philox(key=list(SPLIT_SIZES).index(split)))
    labels = np.arange(SPLIT_SIZES[split]) % len(NAMES)
    chunks = [labels[start : start + CHUNK] for start in range(0, len(labels), CHUNK)]
    return np.concatenate([draw(chunk, rng) for chunk in chunks]), labels


def draw(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws one image per label: int[N] in 0..9 -> uint8[N, 32, 32, 3], RGB."""

    def uniform(low, high, *shape):  # [N, *shape]
        return low + (high - low) * rng.random((len(labels), *shape))

    x, y = np.meshgrid(np.arange(SIDE) - 15.5, np.arange(SIDE) - 15.5)  # pixel centers, [32, 32]

    dark = uniform(0.05, 0.45, 1, 1, 3)
    light = dark + uniform(0.3, 0.5, 1, 1, 3)
    swap = uniform(0, 1, 1, 1, 1) < 0.4
    front, back = np.where(swap, dark, light), np.where(swap, light, dark)

    # The background: a gradient per channel, then two thin lines and two dots in pale colors.
    slope_x, slope_y = uniform(-0.005, 0.005, 2, 1, 1, 3).transpose(1, 0, 2, 3, 4)
    image = back + slope_x * x[..., None] + slope_y * y[..., None]
    for _ in range(2):
        c, s = _unit(uniform(-1, 1, 1, 1), uniform(-1, 1, 1, 1))
        line = np.abs(c * x + s * y - uniform(-14, 14, 1, 1)) - uniform(0.3, 0.7, 1, 1)
        image = _paint(image, line, back + uniform(-0.25, 0.25, 1, 1, 3))
    for _ in range(2):
        dx, dy = x - uniform(-15, 15, 1, 1), y - uniform(-15, 15, 1, 1)
        dot = np.sqrt(dx * dx + dy * dy) - uniform(1, 2, 1, 1)
        image = _paint(image, dot, back + uniform(-0.25, 0.25, 1, 1, 3))

    # The shape, in its own coordinates: translated, rotated, and scaled.
    radius = uniform(9, 12.5, 1, 1)
    c, s = _unit(1.0, uniform(-0.6, 0.6, 1, 1))
    dx, dy = x - uniform(-3, 3, 1, 1), y - uniform(-3, 3, 1, 1)
    u, v = (c * dx + s * dy) / radius, (c * dy - s * dx) / radius
    distance = np.empty((len(labels), SIDE, SIDE))
    for label in np.unique(labels):
        of_class = labels == label
        distance[of_class] = _DISTANCES[NAMES[label]](u[of_class], v[of_class])
    image = _paint(image, distance * radius, front)

    image += uniform(-0.06, 0.06, SIDE, SIDE, 3)
    return np.floor(np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _unit(c, s):
    """Returns the unit vector along (c, s): the cosine and sine of its angle."""
    length = np.sqrt(c * c + s * s)
    return c / length, s / length


def _paint(image, distance, color):
    """Paints `color` where `distance`, in pixels, is below zero; the edge is 1.5 pixels wide."""
    t = np.clip(0.5 - distance / 1.5, 0.0, 1.0)
    cover = (t * t * (3.0 - 2.0 * t))[..., None]  # a smoothstep
    return image + cover * (color - image)


class Shapes10(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of `draw_split`: {"image": uint8[32, 32, 3], "label": 0..9}."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIDE, SIDE, 3)),
            "label": tfds.features.ClassLabel(names=list(NAMES)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Generated 32x32 images of ten shapes; color is independent of the class.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLIT_SIZES}

    def _generate_examples(self, split: str):
        """Yields (index, example). Images are PNG: TFDS would encode arrays with TensorFlow."""
        for index, (image, label) in enumerate(zip(*draw_split(split), strict=True)):
            png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
            yield index, {"image": io.BytesIO(png), "label": int(label)}
