"""The config.json and preprocessor_config.json of a Hugging Face ViT folder."""

import json
import math
import re
import reprlib

from vit_jax import model
from vit_jax.errors import UserError

_ACTIVATIONS = {
    "gelu": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python": "exact",
}


def read_configs(path):
    """Reads the JSON files next to a weight file.

    Returns the fields that they specify among num_heads, norm_eps, gelu, image_size (height,
    width), class_names, and preprocessing; {} without the files. Raises UserError for a value of
    the wrong type and for another type of model.
    """
    fields, config_path = {}, path.with_name("config.json")
    saved = _read_json(config_path)
    if (kind := saved.get("model_type", "vit")) != "vit":
        raise UserError(f"{path} has model_type {reprlib.repr(kind)}, but only vit can be read")
    if "model_type" in saved:
        values = _validate(saved, _CONFIG, config_path)
        size, labels = values["image_size"], values["id2label"]
        fields = {
            "num_heads": values["num_attention_heads"],
            "norm_eps": values["layer_norm_eps"],
            "gelu": _ACTIVATIONS[values["hidden_act"]],
            "image_size": tuple(size) if isinstance(size, list) else (size, size),
        }
        if labels:
            fields["class_names"] = [labels[i] for i in sorted(labels, key=int)]
    pixels_path = path.with_name("preprocessor_config.json")
    pixels = _validate(_read_json(pixels_path), _PREPROCESSOR, pixels_path)
    if pixels["image_mean"] and pixels["image_std"]:
        mean, std = pixels["image_mean"], pixels["image_std"]
        fields["preprocessing"] = {"divide_by": 255, "mean": mean, "std": std}
    return fields


def make_configs(trained):
    """Returns {file name: content} of the JSON files for a TrainedModel."""
    vit, names = trained.model, dict(enumerate(trained.class_names))
    H, W, C = model.resolution(vit, trained.image_shape)
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "intermediate_size": vit.mlp_dim,
        "hidden_act": {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}[vit.gelu],
        "layer_norm_eps": vit.norm_eps,
        "hidden_dropout_prob": vit.dropout,
        "attention_probs_dropout_prob": vit.dropout,
        "image_size": H if H == W else [H, W],
        "patch_size": vit.patch_size,
        "num_channels": C,
        "qkv_bias": True,
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
        "dtype": "float32",
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": H, "width": W},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / trained.preprocessing["divide_by"],
        "do_normalize": True,
        "image_mean": trained.preprocessing["mean"],
        "image_std": trained.preprocessing["std"],
    }
    return {"config.json": config, "preprocessor_config.json": preprocessor}


def _read_json(path):
    if not path.is_file():
        return {}
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    return saved if isinstance(saved, dict) else {}


def _validate(saved, fields, path):
    """Returns {name: value, or its default if absent}, each value valid."""
    values = {name: saved.get(name, default) for name, (default, _, _) in fields.items()}
    for name, (_, is_valid, allowed) in fields.items():
        if not is_valid(values[name]):
            value = reprlib.repr(values[name])
            raise UserError(f"{path}: {name} must be {allowed}, got {value}: correct the file")
    return values


def _is_count(value):
    return type(value) is int and value > 0


def _is_number(value):
    return type(value) in (int, float) and abs(value) < math.inf


def _is_size(value):
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(map(_is_count, sides))


def _is_id2label(value):
    return value is None or (
        isinstance(value, dict)
        and all(re.fullmatch("[0-9]{1,9}", number) for number in value)
        and all(isinstance(name, str) for name in value.values())
    )


def _is_numbers(value):
    return value is None or (isinstance(value, list) and all(map(_is_number, value)))


# The fields that are read: {name: (default, is_valid, what is allowed)}.
_CONFIG = {
    "num_attention_heads": (12, _is_count, "a positive integer"),
    "layer_norm_eps": (1e-12, lambda v: _is_number(v) and v > 0, "a positive number"),
    "hidden_act": ("gelu", lambda v: v in list(_ACTIVATIONS), f"one of {', '.join(_ACTIVATIONS)}"),
    "image_size": (224, _is_size, "a positive integer or two"),
    "id2label": (None, _is_id2label, "an object from class numbers to names"),
}
_PREPROCESSOR = {
    "image_mean": (None, _is_numbers, "a list of numbers"),
    "image_std": (None, _is_numbers, "a list of numbers"),
}
