"""Pretrained weights from third-party files and folders or from vit_jax runs.

weights = vit_jax.load_weights("B_16.npz")
logits = weights.make_model().apply({"params": weights.params}, images)
"""

import json
import math
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import config, model, workdir
from vit_jax.errors import UserError, expand_home
from vit_jax.weights import files, huggingface, layouts

OURS = "vit_jax"  # the `kind` of a run's weights, and the metadata key in our .safetensors
# The fields of config.model that define a model.
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
# Width -> heads of the published models: Ti, S, B, L, and H.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


class Weights(NamedTuple):
    """Parameters and everything that their source records about the model."""

    params: Any  # nested dict of float32 numpy arrays, with our names
    model: dict[str, Any]  # fields of config.model
    num_classes: int  # 0: a model without a head
    grid: tuple[int, int] | None  # patches: rows, columns; None: not known
    kind: str  # OURS, or a key of layouts.LAYOUTS
    path: str
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] | None = None  # {"divide_by", "mean", "std"}

    def make_model(self):
        """Builds the VisionTransformer for the parameters."""
        if not self.num_classes:
            raise UserError(f"{self.path} has no head: use it with init_from, for fine-tuning")
        fields = {**config.defaults().model, **self.model}
        return model.make_model(fields, num_classes=self.num_classes)


def load_weights(path, *, num_heads=None):
    """Loads weights from a file or folder; every key and shape must be accounted for.

    Args:
      path: Google's .npz; a .safetensors, .pt, .pth, or .bin with the names of Hugging Face, timm,
        or the notebook; a Hugging Face folder; a .safetensors of ours; a workdir, or one of its
        checkpoints. "~" is expanded.
      num_heads: the model's, for sources that do not record it (timm, the notebook, a Hugging
        Face file without its config.json). Defaults to the published models' number for the width,
        and to 8 for the notebook.
    Returns Weights.
    Raises UserError, one line, if the source is corrupted or has another architecture.
    """
    path = expand_home(path)
    if (path / "checkpoints").is_dir() or (path / "params").is_dir():
        return _load_run(path)
    path = _file_in(path) if path.is_dir() else path
    arrays, metadata = files.read(path)
    if OURS in metadata:
        return _load_our_file(path, arrays, metadata[OURS])
    return _load_layout(path, arrays, num_heads)


def _file_in(folder):
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} contains no weights: give a workdir, a checkpoint in it, or a folder with "
        f"{' or '.join(names)}"
    )


def _load_layout(path, arrays, num_heads):
    """Returns Weights from the tensors of another library's file."""
    kind = layouts.find_layout(arrays)
    if kind is None:
        raise UserError(
            f"{path} contains no ViT with the names of Google, Hugging Face, timm, the notebook, "
            f"or vit_jax: its names are {layouts.listed(list(arrays))}"
        )
    params, sizes = layouts.to_params(arrays, kind, path)
    recorded = {}
    if kind in (layouts.HUGGINGFACE, layouts.HUGGINGFACE_5):
        recorded = huggingface.read_configs(path)
    layout, width = layouts.LAYOUTS[kind], sizes["D"]
    known = sizes["h"] or recorded.get("num_heads")
    fields = {
        "width": width,
        "depth": sum(name.startswith("block_") for name in params),
        "num_heads": known or num_heads or layout.num_heads or _HEADS.get(width),
        "mlp_dim": len(params["block_0"]["mlp"]["fc1"]["bias"]),
        "patch_size": sizes["P"],
        "pool": "cls" if "cls_token" in params else "gap",
        "posemb": "learned",
        "stem": "patch",
        "norm_eps": recorded.get("norm_eps", layout.norm_eps),
        "gelu": recorded.get("gelu", layout.gelu),
        "pre_logits": sizes["R"],
        "qk_norm": False,
        "layer_scale": 1.0 if "layer_scale1" in params["block_0"] else 0.0,
    }
    _check_heads(path, width, fields["num_heads"], known)
    names = recorded.get("class_names")
    return Weights(
        params=params,
        model=fields,
        num_classes=sizes["L"],
        grid=_grid(path, sizes["N"] - (fields["pool"] == "cls"), sizes["P"], recorded),
        kind=kind,
        path=str(path),
        class_names=names if names and len(names) == sizes["L"] else None,
        preprocessing=recorded.get("preprocessing"),
    )


def _check_heads(path, width, heads, recorded):
    if heads and width % heads == 0:
        return
    if recorded:
        raise UserError(
            f"{path} has width {width}, which its config.json divides into {heads} heads: correct "
            "the file"
        )
    raise UserError(
        f"{path} of width {width} does not record its number of heads"
        + (f", which cannot be {heads}" if heads else "")
        + ": pass num_heads, or set config.model.num_heads if it is config.init_from"
    )


def _grid(path, patches, patch_size, recorded):
    """Returns (rows, columns), from the recorded image size or as the root of `patches`."""
    if "image_size" not in recorded:
        side = math.isqrt(patches)
        return (side, side) if side * side == patches else None
    grid = tuple(size // patch_size for size in recorded["image_size"])
    if math.prod(grid) != patches:
        raise UserError(
            f"{path}: pos_embed has {patches} patches, but its config.json specifies a grid of "
            f"{grid}"
        )
    return grid


def _load_run(path):
    """Returns Weights from a workdir or one of its checkpoints."""
    if (path / "checkpoints").is_dir():
        directory, step = path / "checkpoints", None
    else:
        directory, step = path.absolute().parent, path.absolute().name
        if not step.isdigit():
            raise UserError(
                f"{path} is not a checkpoint, because its name is not a step: give "
                "WORKDIR/checkpoints/STEP"
            )
        step = int(step)
    params, saved, step = workdir.restore_for_inference(directory, step)
    c = config.from_dict(saved["config"])
    config.validate(c)
    flat = flatten_dict(params, sep="/")
    return _our_weights(flat, {**saved, "model": dict(c.model)}, directory / str(step))


def _load_our_file(path, arrays, metadata):
    try:
        saved = json.loads(metadata)
        H, W, C = saved["image_shape"]
        if not all(type(size) is int and size > 0 for size in (H, W, C)):
            raise ValueError(f"image_shape {(H, W, C)}")
        fields = dict(config.from_dict({"model": saved["model"]}).model)
        return _our_weights(arrays, {**saved, "model": fields}, path)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: its metadata is not what vit_jax writes ({e})") from e


def _our_weights(flat, saved, path):
    vit = model.make_model(saved["model"], num_classes=len(saved["class_names"]))
    problems = layouts.mismatches(shapes(flat), model_shapes(vit, saved["image_shape"]))
    if problems:
        raise UserError(f"{path} is corrupted: it does not match its config: {problems}")
    return Weights(
        params=unflatten_dict(flat, sep="/"),
        model={name: getattr(vit, name) for name in FIELDS} | {"image_size": vit.image_size},
        num_classes=vit.num_classes,
        grid=model.patch_grid(vit, saved["image_shape"]),
        kind=OURS,
        path=str(path),
        class_names=list(saved["class_names"]),
        preprocessing=saved["preprocessing"],
    )


def model_shapes(vit, image_shape):
    """Returns {path: shape} of a model's parameters for images of (H, W, C); computes nothing."""
    init = lambda key: model.init_params(vit, key, tuple(image_shape))  # noqa: E731
    return shapes(flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/"))


def shapes(flat):
    """Returns {path: shape} of a flat dict of arrays."""
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}
