"""Trained weights written in other libraries' formats."""

import io
import json
import os
import pathlib
import shutil
import uuid

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax import augment, model, workdir
from vit_jax.errors import UserError
from vit_jax.weights import files, huggingface, layouts
from vit_jax.weights.load import FIELDS, OURS

FORMATS = ("notebook", "safetensors", "google", "jax", "huggingface", "timm")


def save_weights(trained, path, form):
    """Writes a TrainedModel to a path, in one of FORMATS.

    The path's suffix selects .npz, .safetensors, or torch for tensors with another library's names.
    Raises UserError, before anything is written, if the format cannot represent the model or the
    path exists.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise UserError(f"{path} exists: give another name, or delete it")
    if form == "jax":
        content = serialize(trained)
    elif form == "safetensors":
        content = _safetensors(flatten_dict(trained.params, sep="/"), {OURS: _describe(trained)})
    elif form == "huggingface":
        content = {"model.safetensors": _safetensors(_tensors(trained, form), {"format": "pt"})}
        for name, fields in huggingface.make_configs(trained).items():
            content[name] = (json.dumps(fields, indent=2) + "\n").encode()
    else:
        content = _encode(_tensors(trained, form), path)
    _write_atomically(path, content)


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
    return json.dumps(
        {
            "model": {name: getattr(trained.model, name) for name in FIELDS},
            "class_names": trained.class_names,
            "preprocessing": trained.preprocessing,
            "image_shape": trained.image_shape,
        }
    )


def _tensors(trained, kind):
    """Returns a layout's tensors. Raises UserError if its library computes something else."""
    layout, vit, params = layouts.LAYOUTS[kind], trained.model, trained.params
    required = {"norm_eps": layout.norm_eps, "gelu": layout.gelu}
    if kind == layouts.HUGGINGFACE:  # its config.json records these two
        required = {"pool": "cls", "pre_logits": 0, "layer_scale": 0.0, "qk_norm": False}
    for name, value in required.items():
        if getattr(vit, name) != value:
            raise UserError(
                f"the {kind} model has {name}={value}, this model {getattr(vit, name)}: export to "
                f"a .safetensors or .jax, or train with --config.model.{name}={value}"
            )
    if vit.posemb != "learned":  # written as a learned table
        grid = model.patch_grid(vit, trained.image_shape)
        table = model.sincos2d(grid, vit.width, cls_token=vit.pool == "cls")
        params = {**params, "pos_embed": table}
    return layouts.from_params(params, kind, num_heads=vit.num_heads)


def _safetensors(arrays, metadata):
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)


def _encode(tensors, path):
    """Returns the bytes of a file with the path's suffix."""
    if path.suffix == ".safetensors":
        return _safetensors(tensors, {"format": "pt"})
    file = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(file, **tensors)
    else:
        torch = files.import_torch(f"writing {path}")
        torch.save({name: torch.tensor(array) for name, array in tensors.items()}, file)
    return file.getvalue()


def _write_atomically(path, content):
    """Writes bytes, or a folder of {name: bytes}, next to the final name, then renames."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with workdir.write_errors(path):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                temporary.mkdir()
                for name, data in content.items():
                    (temporary / name).write_bytes(data)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
