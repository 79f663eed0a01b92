"""Fine-tuning: pretrained weights adapted to a model with other classes or another grid."""

import math

import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax import model
from vit_jax.errors import UserError
from vit_jax.weights import layouts
from vit_jax.weights.load import FIELDS


def start_from(weights, vit, image_shape, class_names, *, mean, std):
    """Adapts weights to a model, for images of (H, W, C) normalized with `mean` and `std`.

    A head for other classes (another number, or other names if both are known) becomes zeros, and
    a pre-logits layer that the model lacks is dropped with it. Position embeddings of another grid
    are resized by the method of their source.

    Returns (params, notes): the parameters, and a sentence fragment about each change.
    Raises UserError, with keys and both shapes, if the model has another architecture.
    """
    params, notes = dict(weights.params), []
    may_differ = {"image_size"}
    if weights.model["layer_scale"] and vit.layer_scale:  # only an initial value
        may_differ.add("layer_scale")
    other_names = weights.class_names and weights.class_names != list(class_names)
    if weights.num_classes != vit.num_classes or other_names:
        if not vit.pre_logits:
            params.pop("pre_logits", None)
            may_differ.add("pre_logits")
        kernel = np.zeros((vit.pre_logits or vit.width, vit.num_classes), np.float32)
        params["head"] = {"kernel": kernel, "bias": np.zeros(vit.num_classes, np.float32)}
        other = " other" if weights.num_classes == vit.num_classes else ""
        old = f"{weights.num_classes}{other} classes" if weights.num_classes else "no head"
        notes.append(f"a new head of zeros for {vit.num_classes} classes (the weights have {old})")
    grid = model.patch_grid(vit, image_shape)
    learned = vit.posemb == weights.model["posemb"] == "learned"
    if learned and weights.grid not in (grid, None):
        method = getattr(layouts.LAYOUTS.get(weights.kind), "resize", "bilinear")
        params["pos_embed"] = resize_positions(params["pos_embed"], weights.grid, grid, method)
        old, new = (f"{rows}x{columns}" for rows, columns in (weights.grid, grid))
        notes.append(f"position embeddings resized from {old} to {new} patches ({method})")
    pixels = weights.preprocessing or {"mean": mean, "std": std}  # not every file records them
    if not np.allclose([pixels["mean"], pixels["std"]], [mean, std], atol=1e-3):
        old = f"config.data.mean={tuple(pixels['mean'])} and std={tuple(pixels['std'])}"
        notes.append(f"trained with {old}, unlike this config")
    given = layouts.shapes(flatten_dict(params, sep="/"))
    problems = layouts.mismatches(given, layouts.model_shapes(vit, image_shape))
    other = [name for name in FIELDS if weights.model[name] != getattr(vit, name)]
    advice = [f"--config.model.{n}={weights.model[n]}" for n in other if n not in may_differ]
    if problems or advice:
        text = f"config.init_from {weights.path} does not fit config.model"
        text += f": {problems}" if problems else ""
        raise UserError(f"{text}; set {' '.join(advice)}" if advice else text)
    return params, notes


def resize_positions(pos_embed, grid, new_grid, method):
    """Resizes float32[1, N, D] from a grid (rows, columns) to float32[1, N', D] for `new_grid`.

    A first token that is not in the grid, the class token, is kept. Computes in float64. Methods:
      zoom: linear, corners map to corners: scipy.ndimage.zoom(order=1), as in google-research's
        vision_transformer and big_vision. For their .npz files.
      bicubic: torch.nn.functional.interpolate(align_corners=False), without antialiasing, as in
        transformers. For Hugging Face, torchvision, and timm weights (timm itself antialiases).
      bilinear: the same with mode="bilinear". For vit_jax's own weights and the notebook's.
    """
    first = pos_embed.shape[1] - math.prod(grid)
    table = np.asarray(pos_embed[0, first:], np.float64).reshape(*grid, -1)
    table = np.einsum("ij,jkd->ikd", _matrix(grid[0], new_grid[0], method), table)
    table = np.einsum("ij,kjd->kid", _matrix(grid[1], new_grid[1], method), table)
    table = table.reshape(1, math.prod(new_grid), -1).astype(np.float32)
    return np.concatenate([pos_embed[:, :first], table], axis=1)


def _matrix(old, new, method):
    """Returns float64[new, old]: the weight of each old sample in each new one, along one axis."""
    i = np.arange(new)
    at = (i + 0.5) * (old / new) - 0.5  # edges map to edges
    if method == "zoom":  # corners map to corners
        at = i * ((old - 1) / max(new - 1, 1))
    base = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for sample in (base - 1, base, base + 1, base + 2):
        distance = np.abs(at - sample)
        weight = _keys(distance) if method == "bicubic" else np.maximum(1 - distance, 0)
        matrix[i, np.clip(sample, 0, old - 1)] += weight
    return matrix


def _keys(x, a=-0.75):
    """Keys' cubic kernel at distances from 0 to 2, with torch's a."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, far)
