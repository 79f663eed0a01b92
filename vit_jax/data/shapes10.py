"""shapes10: a generated dataset of ten shapes, 32x32 RGB. It needs no download and no TensorFlow.

Importing this module registers the TFDS builder `shapes10`. Each image contains one shape with a
random position, size, tilt (up to 31 degrees), and color over a shaded background with thin lines,
small dots, and noise. The shape may be brighter or darker than the background, and its color is
independent of the class: the best linear classifier reaches about 38% on the test split, a small
ViT over 97%.

    images, labels = draw_split("test")                                  # NumPy only
    Shapes10(data_dir=..., file_format="array_record").download_and_prepare()

Every number comes from Philox, + - * /, and sqrt in float64, whose rounding IEEE 754 defines, so
every machine draws the same bits. Drawing uses no sin, no exp, and no matrix product.
"""

import io

import cv2
import numpy as np
import tensorflow_datasets as tfds

SIDE = 32
NAMES = ("bar", "crescent", "cross", "disc", "ell", "heart", "ring", "square", "star", "triangle")
SPLIT_SIZES = {"train": 20_000, "test": 2_000}
CHUNK = 500  # images per call of the generator; another value draws other images

# (cos, sin) of the outward normals of regular polygons; the first points along +y.
TRIANGLE = ((0.0, 1.0), (-0.866025, -0.5), (0.866025, -0.5))
PENTAGON = (
    (0.0, 1.0),
    (-0.951057, 0.309017),
    (-0.587785, -0.809017),
    (0.587785, -0.809017),
    (0.951057, 0.309017),
)


def draw_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws "train" or "test": images uint8[N, 32, 32, 3] and labels int64[N], 0 to 9 repeated."""
    rng = np.random.Generator(np.random.Philox(key=list(SPLIT_SIZES).index(split)))
    labels = np.arange(SPLIT_SIZES[split]) % len(NAMES)
    return draw(labels, rng), labels


def draw(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws one image per label: int[N] in 0..9 -> uint8[N, 32, 32, 3], RGB."""
    labels = np.asarray(labels)
    images = np.empty((len(labels), SIDE, SIDE, 3), np.uint8)
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        images[part] = _draw_chunk(labels[part], rng)
    return images


def _draw_chunk(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws one image per label: int[n] -> uint8[n, 32, 32, 3]."""
    n = len(labels)

    def uniform(low, high, *shape):
        """Returns float64[n, *shape] in [low, high)."""
        return low + (high - low) * rng.random((n, *shape))

    x, y = np.meshgrid(np.arange(SIDE) - 15.5, np.arange(SIDE) - 15.5)  # pixel centers, [32, 32]

    dark = uniform(0.05, 0.45, 1, 1, 3)
    light = dark + uniform(0.3, 0.5, 1, 1, 3)
    swap = uniform(0, 1, 1, 1, 1) < 0.4
    front, back = np.where(swap, dark, light), np.where(swap, light, dark)

    # Background: a gradient per channel, then two thin lines and two dots in pale colors.
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
    distance = np.empty((n, SIDE, SIDE))
    for label in np.unique(labels):
        of_class = labels == label
        distance[of_class] = _distance(NAMES[label], u[of_class], v[of_class])
    image = _paint(image, distance * radius, front)

    image += uniform(-0.06, 0.06, SIDE, SIDE, 3)
    return np.floor(np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _unit(c: np.ndarray | float, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the unit vector along (c, s): the cosine and sine of its angle, each [n, 1, 1]."""
    length = np.sqrt(c * c + s * s)
    return c / length, s / length


def _paint(image: np.ndarray, distance: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Paints `color` [n, 1, 1, 3] where `distance` [n, 32, 32] (in pixels) is below zero.

    The edge is a smoothstep 1.5 pixels wide.
    """
    t = np.clip(0.5 - distance / 1.5, 0.0, 1.0)
    cover = (t * t * (3.0 - 2.0 * t))[..., None]
    return image + cover * (color - image)


def _distance(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the signed distance to a shape that roughly fills the unit disc; negative inside.

    It is exact on the outline and has slope 1 near the edges, which is all that `_paint` needs.
    """
    if name == "bar":
        return _box(x, y, 0.95, 0.28)
    if name == "crescent":
        return np.maximum(_disc(x, y, 0.95), -_disc(x - 0.5, y, 0.8))
    if name == "cross":
        return np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))
    if name == "disc":
        return _disc(x, y, 0.85)
    if name == "ell":
        return np.minimum(_box(x + 0.45, y, 0.3, 0.85), _box(x, y - 0.55, 0.75, 0.3))
    if name == "heart":
        x, y = 0.707107 * (x - y) + 0.15, 0.15 - 0.707107 * (x + y)  # the tip points down
        lobes = np.minimum(_disc(x - 0.5, y, 0.5), _disc(x, y - 0.5, 0.5))
        return np.minimum(lobes, _box(x, y, 0.5, 0.5))
    if name == "ring":
        return np.abs(_disc(x, y, 0.72)) - 0.2
    if name == "square":
        return _box(x, y, 0.72, 0.72)
    if name == "star":  # inside all but one of the pentagon's extended sides
        return np.sort([c * x + s * y for c, s in PENTAGON], axis=0)[-2] - 0.36
    if name == "triangle":
        return np.max([c * x + s * y for c, s in TRIANGLE], axis=0) - 0.52
    raise ValueError(f"no such shape: {name}")


def _disc(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Returns the signed distance to the disc around 0."""
    return np.sqrt(x * x + y * y) - radius


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Returns the signed distance to the upright box around 0, by its four sides."""
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


class Shapes10(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of `draw_split`: {"image": uint8[32, 32, 3], "label": 0..9}."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Generated 32x32 images of ten shapes; color is independent of the class.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3)),
                    "label": tfds.features.ClassLabel(names=list(NAMES)),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLIT_SIZES}

    def _generate_examples(self, split: str):
        """Yields (index, example). Images are PNG: TFDS would encode arrays with TensorFlow."""
        for index, (image, label) in enumerate(zip(*draw_split(split), strict=True)):
            png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
            yield index, {"image": io.BytesIO(png), "label": int(label)}
