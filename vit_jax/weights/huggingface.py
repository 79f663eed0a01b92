"""The config.json and preprocessor_config.json of a Hugging Face ViT folder."""

import json
import operator

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
    fields, get = {}, _reader(path.with_name("config.json"))
    if get("model_type", None, {None: None, "vit": "vit"}.__getitem__):
        fields = {
            "num_heads": get("num_attention_heads", 12, operator.index),
            "norm_eps": get("layer_norm_eps", 1e-12, float),
            "gelu": get("hidden_act", "gelu", _ACTIVATIONS.__getitem__),
            "image_size": get("image_size", 224, _sides),
            "class_names": get("id2label", {}, _names),
        }
    get = _reader(path.with_name("preprocessor_config.json"))
    mean, std = get("image_mean", [], _numbers), get("image_std", [], _numbers)
    if mean and std:
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


def _reader(path):
    """Returns get(name, default, convert), which reads a value of a JSON file if it exists."""
    try:
        saved = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"cannot read {path}: {e}") from e

    def get(name, default, convert):
        value = saved.get(name, default)
        try:
            return convert(value)
        except (TypeError, ValueError, LookupError, OverflowError) as e:
            raise UserError(
                f"{path}: {name} cannot be {value!r:.60} in a ViT: correct the file"
            ) from e

    return get


def _sides(size):
    height, width = size if isinstance(size, list) else (size, size)
    return operator.index(height), operator.index(width)


def _names(labels):
    return [str(labels[number]) for number in sorted(labels or {}, key=int)]


def _numbers(values):
    return [float(value) for value in values or []]
