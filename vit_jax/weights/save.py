"""Trained weights written in other libraries' formats."""

import contextlib
import io
import json
import logging
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from vit_jax import augment, model, workdir
from vit_jax.errors import UserError, expand_home
from vit_jax.weights import files, layouts
from vit_jax.weights.load import FIELDS, OURS

FORMATS = ("notebook", "safetensors", "google", "jax", "onnx", "huggingface", "timm")


def save_weights(trained, path, form, *, readme=""):
    """Writes a TrainedModel to a path, in one of FORMATS.

    The path's suffix selects .npz, .safetensors, or torch for tensors with another library's names.
    A Hugging Face folder gets `readme` as README.md, which the hub shows.
    Raises UserError, before anything is written, if the format cannot represent the model or the
    path exists.
    """
    path = expand_home(path)
    if path.exists():
        raise UserError(f"{path} exists: give another name, or delete it")
    if form == "jax":
        content = _serialize(trained)
    elif form == "onnx":
        content = _onnx(trained)
    elif form == "safetensors":
        described = {  # load_weights rebuilds the model from it
            "model": {name: getattr(trained.model, name) for name in FIELDS},
            "class_names": trained.class_names,
            "preprocessing": trained.preprocessing,
            "image_shape": trained.image_shape,
        }
        metadata = {OURS: json.dumps(described)}
        content = _encode(flatten_dict(trained.params, sep="/"), ".safetensors", metadata)
    elif form == "huggingface":
        content = {"model.safetensors": _encode(_tensors(trained, form), ".safetensors")}
        for name, fields in _huggingface_configs(trained).items():
            content[name] = (json.dumps(fields, indent=2) + "\n").encode()
        content |= {"README.md": readme.encode(errors="backslashreplace")} if readme else {}
    else:
        content = _encode(_tensors(trained, form), path.suffix)
    _write_atomically(path, content)


def _serialize(trained):
    """Returns the bytes of a jax.export function, uint8[b, H, W, C] -> float32[b, classes].

    It returns probabilities for any b, on CPU, CUDA, and TPU, and contains the weights and the
    preprocessing. Calling it needs only jax and flatbuffers.
    """
    predict = _make_predict(trained, trained.model)
    shape = (*jax.export.symbolic_shape("b"), *trained.image_shape)
    exported = jax.export.export(jax.jit(predict), platforms=["cpu", "cuda", "tpu"])(
        jax.ShapeDtypeStruct(shape, jnp.uint8)
    )
    return bytes(exported.serialize())


def _make_predict(trained, vit):
    """Returns predict(uint8[b, H, W, C]) -> float32[b, classes] probabilities."""
    params, pixels = jax.tree.map(jnp.asarray, trained.params), trained.config.data

    def predict(images):
        x = augment.normalize(images, pixels.mean, pixels.std)
        return jax.nn.softmax(vit.apply({"params": params}, x))

    return predict


def _onnx(trained):
    """Returns the bytes of an ONNX model, uint8[b, H, W, C] -> float32[b, classes] probabilities.

    It computes in float32. Raises UserError without jax2onnx and onnxruntime, if the conversion
    fails, or if onnxruntime's output on random images differs from the model's by 1e-5 or more.
    """
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as e:
        raise UserError("ONNX needs jax2onnx and onnxruntime: pip install 'vit-jax[onnx]'") from e
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns about constants
    precise = trained.model.clone(dtype=jnp.dtype("float32"), matmul_precision="float32")
    predict = _make_predict(trained, precise)
    inputs = [jax.ShapeDtypeStruct(("b", *trained.image_shape), jnp.uint8)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            proto = jax2onnx.to_onnx(
                predict, inputs, input_names=["images"], output_names=["probabilities"]
            )
    except Exception as e:  # of any type
        reason = str(e).partition("\n")[0]
        raise UserError(f"jax2onnx cannot convert this model: {reason}") from e
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content)
    for b in (1, 3):
        shape = (b, *trained.image_shape)
        images = np.random.default_rng(b).integers(0, 256, shape, dtype=np.uint8)
        (got,) = session.run(None, {"images": images})
        error = np.abs(got - predict(images)).max()
        if not error < 1e-5:
            raise UserError(f"the ONNX model's probabilities differ by {error:.1e} from ours")
    return content


def _tensors(trained, kind):
    """Returns a layout's tensors. Raises UserError if its library computes something else."""
    layout, vit, params = layouts.LAYOUTS[kind], trained.model, trained.params
    required = {"norm_eps": layout.norm_eps, "gelu": layout.gelu}
    if kind == layouts.HUGGINGFACE:  # config.json records norm_eps and gelu
        required = {"pool": "cls", "pre_logits": 0, "layer_scale": 0.0, "qk_norm": False}
    for name, value in (required | {"token_shift": False}).items():
        if getattr(vit, name) != value:
            raise UserError(
                f"the {kind} model has {name}={value}, but this model has {getattr(vit, name)}: "
                f"export a .safetensors or .jax, or train with --config.model.{name}={value}"
            )
    if vit.posemb != "learned":  # written as a learned table
        grid = model.patch_grid(vit, trained.image_shape)
        table = model.sincos2d(grid, vit.width, cls_token=vit.pool == "cls")
        params = {**params, "pos_embed": table}
    return layouts.from_params(params, kind, num_heads=vit.num_heads)


def _huggingface_configs(trained):
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


def _encode(tensors, suffix, metadata=None):
    """Returns the bytes of a file with this suffix."""
    if suffix == ".safetensors":
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        return safetensors.numpy.save(tensors, metadata or {"format": "pt"})
    file = io.BytesIO()
    if suffix == ".npz":
        np.savez(file, **tensors)
    else:
        torch = files.import_torch("a torch file")
        torch.save({name: torch.tensor(array) for name, array in tensors.items()}, file)
    return file.getvalue()


def _write_atomically(path, content):
    """Writes bytes, or a folder of {name: bytes}, next to the final name, then renames."""
    with workdir.write_errors(path):
        parent = path.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=parent) as folder:
            temporary = pathlib.Path(folder) / path.name
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                temporary.mkdir()
                for name, data in content.items():
                    (temporary / name).write_bytes(data)
            os.replace(temporary, path)
