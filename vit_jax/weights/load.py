"""Pretrained weights from third-party files and folders or from vit_jax runs."""

import json
import math
import operator
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import config, model, workdir
from vit_jax.errors import UserError, expand_home
from vit_jax.weights import files, hub, layouts

OURS = "vit_jax"  # the `kind` of a run's weights, and the metadata key in our .safetensors
# The fields of config.model that define a model: all but those for training.
_TRAINING = ("size", "weight_init", "dropout", "drop_path", "remat")
_TRAINING += ("dtype", "matmul_precision", "attention")
FIELDS = tuple(name for name in config.defaults().model if name not in _TRAINING)
# Width -> heads of the published models: Ti, S, B, L, and H.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
# Hugging Face's hidden_act -> config.model.gelu.
_GELU = {"gelu": "exact", "gelu_python": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


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

        weights = vit_jax.load_weights("B_16.npz")
        logits = weights.make_model().apply({"params": weights.params}, images)

    Args:
      path: Google's or big_vision's .npz; a .safetensors, .pt, .pth, or .bin with the names of
        Hugging Face, timm, torchvision, or the notebook; a Hugging Face folder; a .safetensors of
        ours; a workdir, or one of its checkpoints. "~" is expanded. "hf:OWNER/NAME" and
        "hf:OWNER/NAME@REVISION" are models on the Hugging Face hub; see `weights.hub`.
      num_heads: the model's, for sources that do not record it: timm, the notebook, a Hugging Face
        file without its config.json. Default: 8 for the notebook, else the number of heads of the
        published model of this width.
    Returns Weights.
    Raises UserError, one line, if the source is corrupted or has another architecture.
    """
    path = hub.download(path) if str(path).startswith("hf:") else expand_home(path)
    if any(path.glob("seed_*")) or (path / "checkpoints").is_dir() or (path / "params").is_dir():
        return _load_run(path)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        existing = [path / name for name in names if (path / name).is_file()]
        if not existing:
            raise UserError(
                f"{path} contains no weights: give a workdir, a checkpoint in it, or a folder with "
                f"{' or '.join(names)}"
            )
        path = existing[0]
    arrays, metadata = files.read(path)
    if OURS in metadata:
        return _load_our_file(path, arrays, metadata[OURS])
    return _load_layout(path, arrays, num_heads)


def _load_layout(path, arrays, num_heads):
    """Returns Weights from the tensors of another library's file."""
    kind = layouts.find_layout(arrays)
    if kind is None:
        raise UserError(
            f"{path} contains no ViT with the names of Google, big_vision, Hugging Face, timm, "
            "torchvision, the notebook, or vit_jax: its names are "
            f"{layouts.listed(list(arrays))}"
        )
    params, fields = layouts.to_params(arrays, kind, path)
    recorded = _read_configs(path) if kind.startswith(layouts.HUGGINGFACE) else {}
    layout, width = layouts.LAYOUTS[kind], fields["width"]
    heads = fields["num_heads"] or recorded.get("num_heads")
    heads = heads or num_heads or layout.num_heads or _HEADS.get(width) or 0
    if heads < 1 or width % heads:
        raise UserError(
            f"{path} has width {width}, and does not record a number of heads that divides it (got "
            f"{heads}): pass num_heads; config.init_from passes config.model.num_heads"
        )
    fields["num_heads"] = heads
    fields["norm_eps"] = recorded.get("norm_eps", layout.norm_eps)
    fields["gelu"] = recorded.get("gelu", layout.gelu)
    names = recorded.get("class_names", [])
    num_classes = len(params["head"]["bias"]) if "head" in params else 0
    patches = params["pos_embed"].shape[1] - ("cls_token" in params) if "pos_embed" in params else 0
    return Weights(
        params=params,
        model={name: fields[name] for name in FIELDS},
        num_classes=num_classes,
        grid=_grid(patches, fields["patch_size"], recorded.get("image_size")),
        kind=kind,
        path=str(path),
        class_names=names if names and len(names) == num_classes else None,
        preprocessing=recorded.get("preprocessing"),
    )


def _read_configs(path):
    """Returns what the JSON files next to a Hugging Face weight file record; {} without them."""
    fields, get = {}, _reader(path.with_name("config.json"))
    if get("model_type", None, {None: False, "vit": True}.__getitem__):
        fields = {
            "num_heads": get("num_attention_heads", 12, operator.index),
            "norm_eps": get("layer_norm_eps", 1e-12, float),
            "gelu": get("hidden_act", "gelu", _GELU.__getitem__),
            "image_size": get("image_size", 224, _sides),
            "class_names": get("id2label", {}, _names),
        }
    get = _reader(path.with_name("preprocessor_config.json"))
    pixels = {name: get(f"image_{name}", [], _numbers) for name in ("mean", "std")}
    if all(pixels.values()):
        fields["preprocessing"] = {"divide_by": 255, **pixels}
    return fields


def _reader(path):
    """Returns get(name, default, convert), which reads a value of a JSON file if it exists."""
    try:
        saved = dict(json.loads(path.read_text())) if path.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"cannot read {path}: {e}") from e

    def get(name, default, convert):
        value = saved.get(name, default)
        try:
            return convert(value)
        except (TypeError, ValueError, LookupError, OverflowError) as e:
            raise UserError(f"{path}: {name} {value!r:.60} is not supported") from e

    return get


def _sides(size):
    height, width = size if isinstance(size, list) else (size, size)
    return operator.index(height), operator.index(width)


def _names(labels):
    return [str(labels[number]) for number in sorted(labels or {}, key=int)]


def _numbers(values):
    return [float(value) for value in values or []]


def _grid(patches, patch_size, image_size):
    """Returns (rows, columns) of a recorded (height, width), else of a square; None: unknown."""
    side = math.isqrt(patches)
    grid = tuple(n // patch_size for n in image_size) if image_size else (side, side)
    return grid if math.prod(grid) == patches > 0 else None


def _load_run(path):
    """Returns Weights from a workdir or one of its checkpoints."""
    directory, step = path / "checkpoints", None
    if (path / "params").is_dir():
        directory, name = path.absolute().parent, path.absolute().name
        if not name.isdecimal():
            raise UserError(f"{path} is not a checkpoint: give WORKDIR/checkpoints/STEP")
        step = int(name)
    params, saved, step = workdir.restore_for_inference(directory, step)
    flat = flatten_dict(params, sep="/")
    return _our_weights(flat, saved["config"], saved, directory / str(step))


def _load_our_file(path, arrays, metadata):
    try:
        saved = json.loads(metadata)
        return _our_weights(arrays, {"model": saved["model"]}, saved, path)
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: its metadata is not what vit_jax writes ({e})") from e


def _our_weights(flat, values, saved, path):
    """Returns Weights from {path: parameter} and the config that `values`, a nested dict, sets."""
    c = config.from_dict(values)
    config.validate(c)
    vit = model.make_model(c.model, num_classes=len(saved["class_names"]))
    expected = layouts.model_shapes(vit, saved["image_shape"])
    problem = f"{path} is corrupted: it does not match its config"
    layouts.check(layouts.shapes(flat), expected, problem)
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
