"""Write a run's weights for other libraries."""

import argparse
import json
import os
import pathlib
import shutil
import uuid

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import augment, model
from vit_jax.errors import UserError
from vit_jax.inference.trained import load
from vit_jax.interop import layouts
from vit_jax.interop.notebook import params_to_notebook
from vit_jax.weights import FIELDS, OURS

FORMATS = ("notebook", "safetensors", "google", "jax", "huggingface", "timm")
_EPILOG = """\
by the name given to --to:
  vit.pt           the notebook's state_dict: load_state_dict(..., strict=True)
  vit.safetensors  vit_jax's own names, for every model variant, with the model in the metadata
  vit.npz          the names of google-research/vision_transformer
  vit.jax          a self-contained inference function: uint8 images in, probabilities out
  vit_folder       a Hugging Face folder: ViTForImageClassification.from_pretrained

--format timm writes a .safetensors or .pt file with timm's names instead."""
_SUFFIXES = {  # suffix: its formats, the default first
    ".pt": ("notebook", "timm"),
    ".safetensors": ("safetensors", "timm"),
    ".npz": ("google",),
    ".jax": ("jax",),
    "": ("huggingface",),
}


def export(trained, path, form):
    """Writes a TrainedModel to a path, in one of FORMATS.

    Raises UserError, before anything is written, if the format cannot express the model or the path
    exists.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise UserError(f"{path} already exists: choose another path, or remove it")
    vit, params, _ = trained
    if form == "safetensors":
        write = _safetensors(layouts.flatten(params), {OURS: json.dumps(_describe(trained))})
    elif form == "jax":
        serialized = serialize(trained)
        write = lambda temporary: temporary.write_bytes(serialized)  # noqa: E731
    else:
        params = _with_position_table(vit, params, trained.image_shape)
        write = {"notebook": _notebook, "google": _google, "timm": _timm}.get(form, _huggingface)(
            trained, params, path
        )
    _write_atomically(path, write)


def serialize(trained):
    """Returns a serialized jax.export function: uint8[b, H, W, C] -> float32[b, classes].

    It computes probabilities for any b, on CPU, CUDA, and TPU, and contains the weights and the
    preprocessing: `jax.export.deserialize(bytearray(data)).call(images)` needs only jax and
    flatbuffers.
    """
    vit, params, config = trained
    params = jax.tree.map(jnp.asarray, params)

    def predict(images):
        x = augment.normalize(images, config.data.mean, config.data.std)
        return jax.nn.softmax(vit.apply({"params": params}, x))

    shape = (*jax.export.symbolic_shape("b"), *trained.image_shape)
    exported = jax.export.export(jax.jit(predict), platforms=["cpu", "cuda", "tpu"])(
        jax.ShapeDtypeStruct(shape, jnp.uint8)
    )
    try:
        return bytes(exported.serialize())
    except ImportError as e:
        raise UserError(f"serializing needs flatbuffers: pip install flatbuffers ({e})") from e


def _describe(trained):
    """The model, classes, and preprocessing, as load_weights reads them back."""
    fields = {name: getattr(trained.model, name) for name in FIELDS}
    return {
        "model": {**fields, "image_size": trained.model.image_size},
        "class_names": trained.class_names,
        "preprocessing": trained.preprocessing,
        "image_shape": trained.image_shape,
    }


def _with_position_table(vit, params, image_shape):
    """The parameters, with fixed sincos2d position embeddings as a learned table."""
    if vit.posemb == "learned":
        return params
    H, W, _ = model.resolution(vit, image_shape)
    grid = (H // vit.patch_size, W // vit.patch_size)
    table = model.sincos2d(grid, vit.width, cls_token=vit.pool == "cls")
    return {**params, "pos_embed": table}


def _require(vit, form, **needed):
    """Raises UserError if a field of the model differs from the format's fixed value."""
    for name, value in needed.items():
        if getattr(vit, name) != value:
            raise UserError(
                f"{form} has {name}={value}, but this model has {getattr(vit, name)}: export to "
                f".safetensors or .jax, or train with --config.model.{name}={value}"
            )


def _notebook(trained, params, path):
    _require(trained.model, "the notebook's model", norm_eps=1e-5, gelu="exact", pool="cls")
    return _torch(params_to_notebook(params))


def _google(trained, params, path):
    _require(trained.model, "Google's model", norm_eps=1e-6, gelu="tanh")
    tensors = layouts.from_params(params, layouts.GOOGLE, num_heads=trained.model.num_heads)

    def write(temporary):
        with temporary.open("wb") as file:  # given a name, np.savez would append .npz
            np.savez(file, **tensors)

    return write


def _timm(trained, params, path):
    _require(trained.model, "timm's model", norm_eps=1e-6, gelu="exact")
    tensors = layouts.from_params(params, layouts.TIMM, num_heads=trained.model.num_heads)
    if path.suffix == ".safetensors":
        return _safetensors(tensors, {"format": "pt"})
    try:
        import torch
    except ImportError as e:
        raise UserError(f"{path} needs PyTorch: pip install torch, or write .safetensors") from e
    return _torch({name: torch.tensor(array) for name, array in tensors.items()})


def _torch(tensors):
    import torch

    return lambda temporary: torch.save(tensors, temporary)


def _safetensors(arrays, metadata):
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return lambda temporary: temporary.write_bytes(save(arrays, metadata))


def _huggingface(trained, params, path):
    vit = trained.model
    _require(vit, "Hugging Face's ViT", pool="cls", pre_logits=0, layer_scale=0.0, qk_norm=False)
    tensors = layouts.from_params(params, layouts.HUGGINGFACE, num_heads=vit.num_heads)
    H, W, C = model.resolution(vit, trained.image_shape)
    names = dict(enumerate(trained.class_names))
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
    pixels = {
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
    save = _safetensors(tensors, {"format": "pt"})

    def write(temporary):
        temporary.mkdir()
        save(temporary / "model.safetensors")
        for name, content in (("config", config), ("preprocessor_config", pixels)):
            (temporary / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")

    return write


def _write_atomically(path, write):
    """Writes to a temporary name in the same directory, then renames."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def parse_format(path, form):
    """Returns the format for a path: `form`, or the default of its suffix.

    Raises UserError for an unknown suffix, or one that `form` is not written to.
    """
    suffix = pathlib.Path(path).suffix
    if suffix not in _SUFFIXES:
        known = ", ".join(s for s in _SUFFIXES if s)
        raise UserError(f"--to {path}: use a name that ends in {known}, or a folder name")
    if form and form not in _SUFFIXES[suffix]:
        own = ", ".join(s or "a folder" for s, forms in _SUFFIXES.items() if form in forms)
        raise UserError(f"--format {form} is written to {own}, not to {path}: rename one")
    return form or _SUFFIXES[suffix][0]


def main(argv=None):
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="vit-jax export",
        description="Write a run's weights for other libraries.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--to", required=True, help="file or folder to create")
    parser.add_argument("--step", default="last", help="a saved step, best, or last (default)")
    parser.add_argument("--format", choices=FORMATS, help="default: from the suffix of --to")
    args = parser.parse_args(argv)
    form = parse_format(args.to, args.format)
    trained = load(args.workdir, args.step)
    export(trained, args.to, form)
    print(f"{args.to}: step {trained.step} of {args.workdir}, format {form}")
    if form == "jax":
        H, W, C = trained.image_shape
        print(
            f"jax.export.deserialize(bytearray(open({args.to!r}, 'rb').read())).call(images) maps "
            f"uint8[b, {H}, {W}, {C}] to probabilities of {', '.join(trained.class_names)}"
        )
