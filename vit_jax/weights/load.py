"""Pretrained weights from third-party files and folders or from vit_jax runs.

weights = vit_jax.load_weights("B_16.npz")
logits = weights.make_model().apply({"params": weights.params}, images)
"""

import json
import math
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import config, model, workdir
from vit_jax.errors import UserError, expand_home
from vit_jax.weights import files, huggingface, layouts

OURS = "vit_jax"  # the `kind` of a run's weights, and the metadata key in our .safetensors
# The fields of config.model that define a model: all but those for training.
_TRAINING = ("size", "weight_init", "dropout", "drop_path", "remat", "dtype")
FIELDS = tuple(name for name in config.defaults().model if name not in _TRAINING)
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
    if path.is_dir():
        path = _file_in(path)
    arrays, metadata = files.read(path)
    if OURS in metadata:
        return _load_our_file(path, arrays, metadata[OURS])
    return _load_layout(path, arrays, num_heads)


def _file_in(folder):
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} contains no weights: give a workdir, a checkpoint in it, or a folder with "
        "model.safetensors or pytorch_model.bin"
    )


def _load_layout(path, arrays, num_heads):
    """Returns Weights from the tensors of another library's file."""
    kind = layouts.find_layout(arrays)
    if kind is None:
        raise UserError(
            f"{path} contains no ViT with the names of Google, Hugging Face, timm, the notebook, "
            f"or vit_jax: its names are {layouts.listed(list(arrays))}"
        )
    params, fields = layouts.to_params(arrays, kind, path)
    recorded = {}
    if kind in (layouts.HUGGINGFACE, layouts.HUGGINGFACE_5):
        recorded = huggingface.read_configs(path)
    layout, width = layouts.LAYOUTS[kind], fields["width"]
    heads = fields["num_heads"] or recorded.get("num_heads")
    heads = heads or num_heads or layout.num_heads or _HEADS.get(width)
    if not heads or width % heads:
        problem = f"cannot have {heads} heads" if heads else "does not record its number of heads"
        raise UserError(
            f"{path} of width {width} {problem}: pass num_heads (with config.init_from: set "
            "config.model.num_heads), or correct its config.json"
        )
    fields["num_heads"] = heads
    fields["norm_eps"] = recorded.get("norm_eps", layout.norm_eps)
    fields["gelu"] = recorded.get("gelu", layout.gelu)
    names = recorded.get("class_names", [])
    num_classes = len(params["head"]["bias"]) if "head" in params else 0
    patches = params["pos_embed"].shape[1] - ("cls_token" in params)
    return Weights(
        params=params,
        model={name: fields[name] for name in FIELDS},
        num_classes=num_classes,
        grid=_grid(path, patches, fields["patch_size"], recorded.get("image_size")),
        kind=kind,
        path=str(path),
        class_names=names if names and len(names) == num_classes else None,
        preprocessing=recorded.get("preprocessing"),
    )


def _grid(path, patches, patch_size, image_size):
    """Returns (rows, columns) from a recorded (height, width), else the square's; None: unknown."""
    if image_size is None:
        side = math.isqrt(patches)
        return (side, side) if side * side == patches else None
    H, W = image_size
    grid = (H // patch_size, W // patch_size)
    if math.prod(grid) != patches:
        raise UserError(
            f"{path}: pos_embed has {patches} patches, but its config.json specifies a grid of "
            f"{grid}"
        )
    return grid


def _load_run(path):
    """Returns Weights from a workdir or one of its checkpoints."""
    directory, step = path / "checkpoints", None
    if not directory.is_dir():
        directory, name = path.absolute().parent, path.absolute().name
        if not name.isdigit():
            raise UserError(f"{path} is not a checkpoint: give WORKDIR/checkpoints/STEP")
        step = int(name)
    params, saved, step = workdir.restore_for_inference(directory, step)
    c = config.from_dict(saved["config"])
    config.validate(c)
    flat = flatten_dict(params, sep="/")
    return _our_weights(flat, c.model, saved, directory / str(step))


def _load_our_file(path, arrays, metadata):
    try:
        saved = json.loads(metadata)
        fields = config.from_dict({"model": saved["model"]}).model
        return _our_weights(arrays, fields, saved, path)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: its metadata is not what vit_jax writes ({e})") from e


def _our_weights(flat, fields, saved, path):
    vit = model.make_model(fields, num_classes=len(saved["class_names"]))
    problems = layouts.mismatches(
        layouts.shapes(flat), layouts.model_shapes(vit, saved["image_shape"])
    )
    if problems:
        raise UserError(f"{path} is corrupted: it does not match its config: {problems}")
    return Weights(
        params=unflatten_dict(flat, sep="/"),
        model={name: getattr(vit, name) for name in FIELDS},
        num_classes=vit.num_classes,
        grid=model.patch_grid(vit, saved["image_shape"]),
        kind=OURS,
        path=str(path),
        class_names=list(saved["class_names"]),
        preprocessing=saved["preprocessing"],
    )
