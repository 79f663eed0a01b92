"""Trained weights from anywhere: a file or folder of another program's, or a run of ours.

    weights = vit_jax.load_weights("B_16.npz")
    logits = weights.make_model().apply({"params": weights.params}, images)

`start_from` makes them the start of another training: a new head, positions for a new grid.
"""

import json
import math
import os
import pathlib
import re
import reprlib
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax import checkpoint, config, model
from vit_jax.errors import UserError
from vit_jax.interop import files, layouts, notebook, positions

OURS, NOTEBOOK = "vit_jax", "the notebook"
# How each source resizes its position embeddings; see interop/positions.py.
RESIZE = {
    OURS: "bilinear",
    NOTEBOOK: "bilinear",
    layouts.GOOGLE: "zoom",
    layouts.TIMM: "bicubic",
    layouts.HUGGINGFACE: "bicubic",
    layouts.HUGGINGFACE_5: "bicubic",
}
# What each source computes with, where its files do not say it. Google's flax code calls nn.gelu
# with its default, the tanh approximation; the others call the exact one.
_COMPUTES = {
    NOTEBOOK: {"norm_eps": 1e-5, "gelu": "exact"},
    layouts.GOOGLE: {"norm_eps": 1e-6, "gelu": "tanh"},
    layouts.TIMM: {"norm_eps": 1e-6, "gelu": "exact"},
    layouts.HUGGINGFACE: {"norm_eps": 1e-12, "gelu": "exact"},
    layouts.HUGGINGFACE_5: {"norm_eps": 1e-12, "gelu": "exact"},
}
# Width -> heads of the published models: Ti, S, B, L and H.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_ACTIVATIONS = {
    "gelu": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python": "exact",
}
# The fields of config.model that make a model what it is.
FIELDS = (
    "width",
    "depth",
    "num_heads",
    "mlp_dim",
    "patch_size",
    "pool",
    "posemb",
    "stem",
    "norm_eps",
    "gelu",
    "pre_logits",
    "qk_norm",
    "layer_scale",
)


class Weights(NamedTuple):
    """Parameters, and all that their source tells of the model."""

    params: Any  # nested dict of float32 numpy arrays, by our names
    model: dict[str, Any]  # fields of config.model
    num_classes: int  # 0: a model without a head
    grid: tuple[int, int] | None  # patches: rows, columns; None: not known
    kind: str  # whose names and layout the source has
    path: str
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] | None = None  # {"divide_by", "mean", "std"}

    def make_model(self):
        """The VisionTransformer that takes the parameters."""
        if not self.num_classes:
            raise UserError(f"{self.path} has no head: it can only be fine-tuned, by init_from")
        return _make_model(self.model, self.num_classes)


def load_weights(path, *, num_heads=None):
    """Weights from a file or a folder, every key and every shape accounted for.

    Args:
      path: Google's .npz; a .safetensors, .pt, .pth or .bin with the names of Hugging Face, timm
        or the notebook; a Hugging Face folder; a .safetensors of ours; a workdir of ours, or one of
        its checkpoints.
      num_heads: of the model, for sources that do not record it (timm's, the notebook's, a
        Hugging Face file without its config.json); by default the published models' of that width,
        and the notebook's 8.
    Raises UserError, one line, for a source that is damaged or of another architecture.
    """
    path = pathlib.Path(os.path.expanduser(path))
    if path.is_dir():
        if (path / "checkpoints").is_dir() or (path / "params").is_dir():
            return _own_run(path)
        candidates = ("model.safetensors", "pytorch_model.bin")
        found = next((path / name for name in candidates if (path / name).is_file()), None)
        if found is None:
            raise UserError(
                f"{path} holds no weights: give a workdir, a checkpoint in it, or a folder with "
                f"{' or '.join(candidates)}"
            )
        path = found
    arrays, metadata = files.read(path)
    if OURS in metadata:
        return _own_file(path, arrays, metadata[OURS])
    kind = _kind(arrays, path)
    if kind == NOTEBOOK:
        try:
            params = notebook.notebook_to_params(arrays)
        except UserError as e:
            raise UserError(f"{path}: {e}") from e
        sizes = {"h": 0, "R": 0, "L": len(params["head"]["bias"])}
    else:
        params, sizes = layouts.to_params(arrays, kind, path)
    told = _beside(path) if kind in (layouts.HUGGINGFACE, layouts.HUGGINGFACE_5) else {}
    width = len(params["norm"]["scale"])
    default = 8 if kind == NOTEBOOK else _HEADS.get(width)
    heads = sizes["h"] or told.get("num_heads") or num_heads or default
    if not heads or width % heads:
        raise UserError(
            f"{path} of width {width} does not record its number of heads"
            + (f", which cannot be {heads}" if heads else "")
            + ": give num_heads, or config.model.num_heads where it is config.init_from"
        )
    fields = _COMPUTES[kind] | {
        "width": width,
        "depth": sum(name.startswith("block_") for name in params),
        "num_heads": heads,
        "mlp_dim": len(params["block_0"]["mlp"]["fc1"]["bias"]),
        "patch_size": params["patch_embed"]["kernel"].shape[0],
        "pool": "cls" if "cls_token" in params else "gap",
        "posemb": "learned",
        "stem": "patch",
        "pre_logits": sizes["R"],
        "qk_norm": False,
        "layer_scale": 1.0 if "layer_scale1" in params["block_0"] else 0.0,
    }
    fields |= {name: told[name] for name in ("norm_eps", "gelu") if name in told}
    tokens = params["pos_embed"].shape[1] - (fields["pool"] == "cls")
    grid = told.get("image_size") and tuple(s // fields["patch_size"] for s in told["image_size"])
    side = math.isqrt(tokens)
    if not grid and side * side == tokens:
        grid = (side, side)
    if grid and math.prod(grid) != tokens:
        raise UserError(
            f"{path}: pos_embed has {tokens} patches, and its config.json tells of {grid}"
        )
    names = told.get("class_names")
    return Weights(
        params=params,
        model=fields,
        num_classes=sizes["L"],
        grid=grid or None,
        kind=kind,
        path=str(path),
        class_names=names if names and len(names) == sizes["L"] else None,
        preprocessing=told.get("preprocessing"),
    )


def _kind(arrays, path):
    for name in arrays:
        if re.match(r"blocks\.\d+\.attn\.in_proj_weight", name):
            return NOTEBOOK
    for layout, pattern in layouts.BLOCK.items():
        if any(re.match(pattern, name) for name in arrays):
            return layout
    raise UserError(
        f"{path} holds no ViT by the names of Google, Hugging Face, timm, the notebook or vit_jax: "
        f"its names are {layouts.listed(list(arrays))}"
    )


def _beside(path):
    """Reads the config.json and preprocessor_config.json next to a Hugging Face file.

    Returns the model fields and preprocessing that they specify. Raises UserError for a value of
    the wrong type.
    """
    told = {}
    saved, read = _read_json(path.with_name("config.json"))
    if (kind := saved.get("model_type", "vit")) != "vit":
        raise UserError(f"{path} has model_type {reprlib.repr(kind)}, but only vit can be read")
    if "model_type" in saved:
        known = ", ".join(_ACTIVATIONS)
        is_known = lambda v: isinstance(v, str) and v in _ACTIVATIONS  # noqa: E731
        size = read("image_size", 224, _is_size, "a positive integer or two")
        told = {
            "num_heads": read("num_attention_heads", 12, _is_count, "a positive integer"),
            "norm_eps": read("layer_norm_eps", 1e-12, _is_positive, "a positive number"),
            "gelu": _ACTIVATIONS[read("hidden_act", "gelu", is_known, f"one of {known}")],
            "image_size": tuple(size) if isinstance(size, list) else (size, size),
        }
        labels = read("id2label", None, _is_id2label, "an object from class numbers to names")
        if labels:
            told["class_names"] = [labels[i] for i in sorted(labels, key=int)]
    saved, read = _read_json(path.with_name("preprocessor_config.json"))
    if "image_mean" in saved and "image_std" in saved:
        told["preprocessing"] = {
            "divide_by": 255,
            "mean": read("image_mean", None, _is_numbers, "a list of numbers"),
            "std": read("image_std", None, _is_numbers, "a list of numbers"),
        }
    return told


def _read_json(path):
    """(dict, read) of a JSON file that may be absent; see `read`."""
    saved = {}
    if path.is_file():
        try:
            saved = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"cannot read {path}: {e}") from e
    saved = saved if isinstance(saved, dict) else {}

    def read(name, default, is_valid, allowed):
        """The value of a name, or the default if it is absent; UserError if it is not valid."""
        value = saved.get(name, default)
        if not is_valid(value):
            raise UserError(
                f"{path}: {name} must be {allowed}, got {reprlib.repr(value)}: correct the file"
            )
        return value

    return saved, read


def _is_count(value):
    return type(value) is int and value > 0


def _is_positive(value):
    return type(value) in (int, float) and 0 < value < math.inf


def _is_size(value):
    both = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(_is_count(side) for side in both)


def _is_id2label(value):
    return value is None or (
        isinstance(value, dict)
        and all(re.fullmatch("[0-9]{1,9}", number) for number in value)
        and all(isinstance(name, str) for name in value.values())
    )


def _is_numbers(value):
    return isinstance(value, list) and all(
        type(v) in (int, float) and abs(v) < math.inf for v in value
    )


def _own_run(path):
    if (path / "checkpoints").is_dir():
        directory, step = path / "checkpoints", None
    else:
        directory, step = path.absolute().parent, path.absolute().name
        if not step.isdigit():
            raise UserError(f"{path} is no checkpoint by its name: give WORKDIR/checkpoints/STEP")
        step = int(step)
    params, saved, step = checkpoint.restore_for_inference(directory, step)
    c = config.from_dict(saved["config"])
    config.validate(c)
    return _own(params, {**saved, "model": dict(c.model)}, directory / str(step))


def _own_file(path, arrays, metadata):
    try:
        saved = json.loads(metadata)
        fields = dict(config.from_dict({"model": saved["model"]}).model)
        return _own(layouts.unflatten(arrays), {**saved, "model": fields}, path)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: its metadata is not what vit_jax writes ({e})") from e


def _own(params, saved, path):
    vit = model.make_model(saved["model"], num_classes=len(saved["class_names"]))
    problems = _mismatches(params, _shapes(vit, saved["image_shape"]), "its config")
    if problems:
        raise UserError(f"{path} is damaged: {problems}")
    H, W, _ = model.resolution(vit, saved["image_shape"])
    return Weights(
        params=params,
        model={name: getattr(vit, name) for name in FIELDS} | {"image_size": vit.image_size},
        num_classes=vit.num_classes,
        grid=(H // vit.patch_size, W // vit.patch_size),
        kind=OURS,
        path=str(path),
        class_names=list(saved["class_names"]),
        preprocessing=saved["preprocessing"],
    )


def _make_model(fields, num_classes):
    fields = {**config.defaults().model, **fields, "size": ""}
    return model.make_model(fields, num_classes=num_classes)


def _shapes(vit, image_shape):
    """{path: shape} of a model's parameters, for images of (H, W, C). Nothing is computed."""
    shapes = jax.eval_shape(
        lambda key: model.init_params(vit, key, tuple(image_shape)), jax.random.key(0)
    )
    return {path: tuple(leaf.shape) for path, leaf in layouts.flatten(shapes).items()}


def _mismatches(params, shapes, whose):
    """'unused a; missing b; c is (1, 2) and not (3, 4) of ...', or '' where all fits."""
    given = {path: tuple(array.shape) for path, array in layouts.flatten(params).items()}
    unused = [path for path in given if path not in shapes]
    missing = [path for path in shapes if path not in given]
    wrong = [
        f"{path} is {given[path]} and {shape} in {whose}"
        for path, shape in shapes.items()
        if path in given and given[path] != shape
    ]
    problems = [layouts.listed(wrong)] if wrong else []
    problems += [f"unused {layouts.listed(unused)}"] if unused else []
    problems += [f"missing {layouts.listed(missing)}"] if missing else []
    return "; ".join(problems)


def start_from(weights, vit, image_shape, class_names):
    """(params, notes): weights made to fit a model, for images of (H, W, C).

    A head for other classes (another number, or other names where both are known) becomes zeros,
    and a pre-logits layer that the model has not is dropped with it. Position embeddings of
    another grid are resized as their source does it. `notes` says in words what was changed.
    Raises UserError, naming keys and both shapes, where the model is another.
    """
    params, notes = dict(weights.params), []
    same = weights.num_classes == vit.num_classes
    if same and weights.class_names and list(weights.class_names) != list(class_names):
        same = False
    if not same:
        if not vit.pre_logits:
            params.pop("pre_logits", None)
        features = vit.pre_logits or vit.width
        params["head"] = {
            "kernel": np.zeros((features, vit.num_classes), np.float32),
            "bias": np.zeros(vit.num_classes, np.float32),
        }
        old = f"{weights.num_classes} classes" if weights.num_classes else "no head"
        notes.append(f"a new head, zeros, for {vit.num_classes} classes (it has {old})")
    H, W, _ = model.resolution(vit, image_shape)
    grid = (H // vit.patch_size, W // vit.patch_size)
    old = weights.model
    if vit.posemb == old["posemb"] == "learned" and weights.grid != grid:
        tokens = params["pos_embed"].shape[1] - (old["pool"] == "cls")
        if weights.grid is None and tokens != math.prod(grid):
            raise UserError(
                f"{weights.path}: pos_embed is {params['pos_embed'].shape}, the model's grid is "
                f"{grid[0]}x{grid[1]}, and the file does not tell its own: {tokens} is no square"
            )
        if weights.grid:
            method = RESIZE[weights.kind]
            params["pos_embed"] = positions.resize_positions(
                params["pos_embed"],
                weights.grid,
                grid,
                method=method,
                class_token=old["pool"] == "cls",
            )
            a, b = (f"{rows}x{columns}" for rows, columns in (weights.grid, grid))
            notes.append(f"positions of {a} patches resized to {b} ({method})")
    problems = _mismatches(params, _shapes(vit, image_shape), "config.model")
    other = [name for name in FIELDS if old[name] != getattr(vit, name)]
    if old["layer_scale"] and vit.layer_scale:  # its starting value: nothing starts here
        other = [name for name in other if name != "layer_scale"]
    if not same and "pre_logits" in other and "pre_logits" not in problems:
        other.remove("pre_logits")
    if problems or other:
        advice = " ".join(f"--config.model.{name}={old[name]}" for name in other)
        text = f"config.init_from {weights.path} is of another model than config.model"
        text += f": {problems}" if problems else ""
        raise UserError(f"{text}; set {advice}" if advice else text)
    return params, notes
