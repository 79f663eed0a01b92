"""A run's weights for other programs: python -m vit_jax.export --workdir D --to FILE_OR_FOLDER.

    vit.pt           the notebook's state_dict: load_state_dict(..., strict=True)
    vit.safetensors  by our own names, any variant, with all that makes the model in its metadata
    vit.npz          by the names of Google's vision_transformer
    vit.jax          a self-contained inference function: uint8 images in, probabilities out
    vit_folder       a Hugging Face folder: ViTForImageClassification.from_pretrained

--format timm writes a .safetensors or .pt by timm's names instead.
"""

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
from vit_jax.errors import UserError, run_command
from vit_jax.interop import layouts
from vit_jax.interop.notebook import params_to_notebook
from vit_jax.loading import load
from vit_jax.weights import FIELDS, OURS

FORMATS = ("notebook", "safetensors", "google", "jax", "huggingface", "timm")
SUFFIXES = {  # the first is the format's own; a file without --format is written in it
    ".pt": ("notebook", "timm"),
    ".safetensors": ("safetensors", "timm"),
    ".npz": ("google",),
    ".jax": ("jax",),
    "": ("huggingface",),
}


def export(loaded, path, form):
    """Writes what `vit_jax.load` gave to a path, in one of FORMATS.

    Raises UserError, before anything is written, for a model that the format cannot express, and
    for a path that exists.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise UserError(f"{path} exists: name another, or remove it")
    vit, params, _ = loaded
    if form == "safetensors":
        write = _safetensors(layouts.flatten(params), {OURS: json.dumps(_describe(loaded))})
    elif form == "jax":
        serialized = serialize(loaded)
        write = lambda temporary: temporary.write_bytes(serialized)  # noqa: E731
    else:
        params = _with_positions(vit, params, loaded.image_shape)
        write = {"notebook": _notebook, "google": _google, "timm": _timm}.get(form, _huggingface)(
            loaded, params, path
        )
    _write_whole(path, write)


def serialize(loaded):
    """The bytes of a jax.export function: uint8[b, H, W, C] -> float32[b, classes] probabilities.

    For any b, on CPU, CUDA and TPU. The weights and the preprocessing are inside:
    `jax.export.deserialize(bytearray(data)).call(images)` needs jax and flatbuffers alone.
    """
    vit, params, config = loaded
    params = jax.tree.map(jnp.asarray, params)

    def predict(images):
        x = augment.normalize(images, config.data.mean, config.data.std)
        return jax.nn.softmax(vit.apply({"params": params}, x))

    shape = (*jax.export.symbolic_shape("b"), *loaded.image_shape)
    exported = jax.export.export(jax.jit(predict), platforms=["cpu", "cuda", "tpu"])(
        jax.ShapeDtypeStruct(shape, jnp.uint8)
    )
    try:
        return bytes(exported.serialize())
    except ImportError as e:
        raise UserError(f"serializing needs flatbuffers: pip install flatbuffers ({e})") from e


def _describe(loaded):
    """What makes the model, as interop reads it back."""
    fields = {name: getattr(loaded.model, name) for name in FIELDS}
    return {
        "model": {**fields, "image_size": loaded.model.image_size},
        "class_names": loaded.class_names,
        "preprocessing": loaded.preprocessing,
        "image_shape": loaded.image_shape,
    }


def _with_positions(vit, params, image_shape):
    """The parameters, fixed sine positions written out as a learned table."""
    if vit.posemb == "learned":
        return params
    H, W, _ = model.resolution(vit, image_shape)
    grid = (H // vit.patch_size, W // vit.patch_size)
    table = model.sincos2d(grid, vit.width, cls_token=vit.pool == "cls")
    return {**params, "pos_embed": table}


def _refuse(vit, form, **needed):
    """Raises UserError where a field of the model is not what the format computes with."""
    for name, value in needed.items():
        if getattr(vit, name) != value:
            raise UserError(
                f"{form} has {name}={value}, this model {getattr(vit, name)}: export to a "
                f".safetensors or .jax, or train with --config.model.{name}={value}"
            )


def _notebook(loaded, params, path):
    _refuse(loaded.model, "the notebook's model", norm_eps=1e-5, gelu="exact", pool="cls")
    return _torch(params_to_notebook(params))


def _google(loaded, params, path):
    _refuse(loaded.model, "Google's model", norm_eps=1e-6, gelu="tanh")
    tensors = layouts.from_params(params, layouts.GOOGLE, num_heads=loaded.model.num_heads)

    def write(temporary):
        with temporary.open("wb") as file:  # a name without .npz gets one
            np.savez(file, **tensors)

    return write


def _timm(loaded, params, path):
    _refuse(loaded.model, "timm's model", norm_eps=1e-6, gelu="exact")
    tensors = layouts.from_params(params, layouts.TIMM, num_heads=loaded.model.num_heads)
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


def _huggingface(loaded, params, path):
    vit = loaded.model
    _refuse(vit, "Hugging Face's ViT", pool="cls", pre_logits=0, layer_scale=0.0, qk_norm=False)
    tensors = layouts.from_params(params, layouts.HUGGINGFACE, num_heads=vit.num_heads)
    H, W, C = model.resolution(vit, loaded.image_shape)
    names = dict(enumerate(loaded.class_names))
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
        "rescale_factor": 1 / loaded.preprocessing["divide_by"],
        "do_normalize": True,
        "image_mean": loaded.preprocessing["mean"],
        "image_std": loaded.preprocessing["std"],
    }
    save = _safetensors(tensors, {"format": "pt"})

    def write(temporary):
        temporary.mkdir()
        save(temporary / "model.safetensors")
        for name, content in (("config", config), ("preprocessor_config", pixels)):
            (temporary / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")

    return write


def _write_whole(path, write):
    """Writes beside the final name and renames: what is there is whole."""
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
    """The format of a path, as asked for or by its suffix. Raises UserError where they disagree."""
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        known = ", ".join(s for s in SUFFIXES if s)
        raise UserError(f"--to {path}: give a name that ends in {known}, or a folder's")
    if form and form not in SUFFIXES[suffix]:
        own = ", ".join(s or "a folder" for s, forms in SUFFIXES.items() if form in forms)
        raise UserError(f"--format {form} is written to {own}, not to {path}")
    return form or SUFFIXES[suffix][0]


def main():
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--to", required=True, help="a file or folder that does not exist")
    parser.add_argument("--step", default="last", help="a saved step, best or last (default)")
    parser.add_argument("--format", choices=FORMATS, help="default: by the suffix of --to")
    args = parser.parse_args()
    form = parse_format(args.to, args.format)
    loaded = load(args.workdir, args.step)
    export(loaded, args.to, form)
    print(f"{args.to}: step {loaded.step} of {args.workdir}, as {form}")
    if form == "jax":
        H, W, C = loaded.image_shape
        print(
            f"jax.export.deserialize(bytearray(open({args.to!r}, 'rb').read())).call(images) takes "
            f"uint8[b, {H}, {W}, {C}], gives the probabilities of {', '.join(loaded.class_names)}"
        )


if __name__ == "__main__":
    run_command(main)
