"""Atomic writing of trained weights in other libraries' formats."""

import json
import os
import pathlib
import shutil
import uuid

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax import augment, model
from vit_jax.errors import UserError
from vit_jax.weights import huggingface, layouts
from vit_jax.weights.load import FIELDS, OURS

FORMATS = ("notebook", "safetensors", "google", "jax", "huggingface", "timm")


def save_weights(trained, path, form):
    """Writes a TrainedModel to a path, in one of FORMATS.

    The suffix of the path selects timm's .safetensors or .pt; nothing else depends on it.
    Raises UserError, before anything is written, if the format cannot represent the model or the
    path exists.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise UserError(f"{path} exists: give another name, or delete it")
    if form == "safetensors":
        metadata = {OURS: json.dumps(_describe(trained))}
        write = _safetensors(flatten_dict(trained.params, sep="/"), metadata)
    elif form == "jax":
        serialized = serialize(trained)
        write = lambda temporary: temporary.write_bytes(serialized)  # noqa: E731
    elif form == "huggingface":
        write = _huggingface(trained)
    elif form == "google":
        write = _npz(_tensors(trained, layouts.GOOGLE))
    else:
        tensors = _tensors(trained, form)
        if path.suffix == ".safetensors":
            write = _safetensors(tensors, {"format": "pt"})
        else:
            write = _torch(tensors, path)
    _write_atomically(path, write)


def serialize(trained):
    """Serializes a jax.export function, uint8[b, H, W, C] -> float32[b, classes] probabilities.

    It takes any b, on CPU, CUDA, and TPU, and contains the weights and the preprocessing:
    `jax.export.deserialize(bytearray(data)).call(images)` needs only jax and flatbuffers.
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
    """Returns the metadata from which `load_weights` rebuilds the model."""
    fields = {name: getattr(trained.model, name) for name in FIELDS}
    return {
        "model": {**fields, "image_size": trained.model.image_size},
        "class_names": trained.class_names,
        "preprocessing": trained.preprocessing,
        "image_shape": trained.image_shape,
    }


def _tensors(trained, kind):
    """Returns a layout's tensors. Raises UserError if its library computes something else."""
    layout, vit, params = layouts.LAYOUTS[kind], trained.model, trained.params
    if kind != layouts.HUGGINGFACE:  # its config.json records them
        _require(vit, kind, norm_eps=layout.norm_eps, gelu=layout.gelu)
    if vit.posemb != "learned":  # written as a learned table
        grid = model.patch_grid(vit, trained.image_shape)
        table = model.sincos2d(grid, vit.width, cls_token=vit.pool == "cls")
        params = {**params, "pos_embed": table}
    return layouts.from_params(params, kind, num_heads=vit.num_heads)


def _require(vit, kind, **fields):
    for name, value in fields.items():
        if getattr(vit, name) != value:
            raise UserError(
                f"the {kind} model has {name}={value}, this model {getattr(vit, name)}: export to "
                f"a .safetensors or .jax, or train with --config.model.{name}={value}"
            )


def _huggingface(trained):
    _require(trained.model, "huggingface", pool="cls", pre_logits=0, layer_scale=0.0, qk_norm=False)
    save = _safetensors(_tensors(trained, layouts.HUGGINGFACE), {"format": "pt"})
    configs = huggingface.make_configs(trained)

    def write(temporary):
        temporary.mkdir()
        save(temporary / "model.safetensors")
        for name, content in configs.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")

    return write


def _safetensors(arrays, metadata):
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return lambda temporary: temporary.write_bytes(save(arrays, metadata))


def _npz(arrays):
    def write(temporary):
        with temporary.open("wb") as file:  # given a path, savez would add .npz to it
            np.savez(file, **arrays)

    return write


def _torch(arrays, path):
    try:
        import torch
    except ImportError as e:
        raise UserError(f"{path} needs PyTorch: pip install torch, or write .safetensors") from e
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    return lambda temporary: torch.save(tensors, temporary)


def _write_atomically(path, write):
    """Writes next to the final name, then renames."""
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
