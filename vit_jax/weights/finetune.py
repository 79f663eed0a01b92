"""Fine-tuning: pretrained weights adapted to a model with other classes or another grid."""

import math

import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax import model
from vit_jax.errors import UserError
from vit_jax.weights import layouts
from vit_jax.weights.load import FIELDS, model_shapes, shapes
from vit_jax.weights.positions import resize_positions


def start_from(weights, vit, image_shape, class_names):
    """Adapts weights to a model, for images of (H, W, C).

    A head for other classes (another number, or other names if both are known) becomes zeros, and
    a pre-logits layer that the model lacks is dropped with it. Position embeddings of another grid
    are resized by the method of their source.

    Returns (params, notes): the parameters, and a sentence fragment about each change.
    Raises UserError, with keys and both shapes, if the model has another architecture.
    """
    params, notes = dict(weights.params), []
    same_classes = weights.num_classes == vit.num_classes and (
        not weights.class_names or list(weights.class_names) == list(class_names)
    )
    if not same_classes:
        notes.append(_replace_head(params, weights, vit))
    grid = model.patch_grid(vit, image_shape)
    if vit.posemb == weights.model["posemb"] == "learned" and weights.grid != grid:
        notes += _resize(params, weights, grid)
    given = shapes(flatten_dict(params, sep="/"))
    problems = layouts.mismatches(given, model_shapes(vit, image_shape))
    other = [name for name in FIELDS if weights.model[name] != getattr(vit, name)]
    if weights.model["layer_scale"] and vit.layer_scale:
        other = [name for name in other if name != "layer_scale"]  # only an initial value
    if not same_classes and "pre_logits" not in problems:
        other = [name for name in other if name != "pre_logits"]
    if problems or other:
        advice = " ".join(f"--config.model.{name}={weights.model[name]}" for name in other)
        text = f"config.init_from {weights.path} does not fit config.model"
        text += f": {problems}" if problems else ""
        raise UserError(f"{text}; set {advice}" if advice else text)
    return params, notes


def _replace_head(params, weights, vit):
    """Puts a head of zeros into `params`; returns a note."""
    if not vit.pre_logits:
        params.pop("pre_logits", None)
    params["head"] = {
        "kernel": np.zeros((vit.pre_logits or vit.width, vit.num_classes), np.float32),
        "bias": np.zeros(vit.num_classes, np.float32),
    }
    old = f"{weights.num_classes} classes" if weights.num_classes else "no head"
    return f"a new head, zeros, for {vit.num_classes} classes (it has {old})"


def _resize(params, weights, grid):
    """Resizes the position embeddings in `params` to (rows, columns); returns notes."""
    class_token = weights.model["pool"] == "cls"
    if weights.grid is None:
        tokens = params["pos_embed"].shape[1] - class_token
        if tokens == math.prod(grid):
            return []
        raise UserError(
            f"{weights.path}: pos_embed has shape {params['pos_embed'].shape}, the model's grid is "
            f"{grid[0]}x{grid[1]}, and the file does not record its own: {tokens} is not a square"
        )
    layout = layouts.LAYOUTS.get(weights.kind)
    method = layout.resize if layout else "bilinear"
    params["pos_embed"] = resize_positions(
        params["pos_embed"], weights.grid, grid, method=method, class_token=class_token
    )
    old, new = (f"{rows}x{columns}" for rows, columns in (weights.grid, grid))
    return [f"positions of {old} patches resized to {new} ({method})"]
