"""The layouts of other libraries: how each names, orders, and shapes the tensors of a ViT.

A layout is a table from our modules to its names. Its tensors are views of our parameters (split,
reshaped, or transposed), so both directions keep every bit. The tensors determine the model, and
the model determines every shape.
"""

import math
import re
from collections.abc import Mapping
from statistics import mode
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import config, model
from vit_jax.errors import UserError
from vit_jax.weights import files

NOTEBOOK, GOOGLE, TIMM = "notebook", "google", "timm"
GOOGLE_LINEN, BIG_VISION, TORCHVISION = "google linen", "big_vision", "torchvision"
HUGGINGFACE, HUGGINGFACE_5 = "huggingface", "huggingface 5"

# Our modules and single arrays, in the order of the files. Those in _BLOCK repeat in each block_N.
_EMBEDDING = ("cls_token", "pos_embed", "patch_embed")
_ATTENTION = ("norm1", "attn/qkv", "attn/out", "layer_scale1")
_BLOCK = (*_ATTENTION, "norm2", "mlp/fc1", "mlp/fc2", "layer_scale2")
_POOLING = ("query", "attn/qkv", "attn/out", "norm", "mlp/fc1", "mlp/fc2")
_HEAD = ("norm", *(f"pooling/{name}" for name in _POOLING), "pre_logits", "head")


class Layout(NamedTuple):
    """One library's tensors, and its settings that the files do not record."""

    # Our module or array -> its name. "*" is the leaf; {q,k,v} are tensors that ours concatenates.
    names: Mapping[str, str]
    block: str  # prefix of the names in block {}
    norm_eps: float
    gelu: str = "exact"
    resize: str = "bicubic"  # how it resizes position embeddings; see finetune.py
    flax: bool = False  # leaves and axes as in flax, attention split by heads; else as in torch
    optional: tuple[str, ...] = ()  # parts of our paths; all tensors of a part or none are present
    num_heads: int | None = None
    cls_position: bool = True  # pos_embed has a row for the class token; if not, ours is zero


_TORCH_NAMES = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed": "patch_embed.proj.*",
    "norm1": "norm1.*",
    "norm2": "norm2.*",
    "norm": "norm.*",
    "head": "head.*",
}
LAYOUTS = {
    # The notebook's VisionTransformer, as in commands/benchmark/notebook_torch.py.
    NOTEBOOK: Layout(
        {
            **_TORCH_NAMES,
            "attn/qkv": "attn.in_proj_*",
            "attn/out": "attn.out_proj.*",
            "mlp/fc1": "mlp.0.*",
            "mlp/fc2": "mlp.2.*",
        },
        block="blocks.{}.",
        norm_eps=1e-5,
        resize="bilinear",
        num_heads=8,
    ),
    # github.com/google-research/vision_transformer, vit_jax/models_vit.py: the .npz files.
    # It calls nn.gelu with flax's default, the tanh approximation.
    GOOGLE: Layout(
        {
            "cls_token": "cls",
            "pos_embed": "Transformer/posembed_input/pos_embedding",
            "patch_embed": "embedding/*",
            "norm1": "LayerNorm_0/*",
            "attn/qkv": "MultiHeadDotProductAttention_1/{query,key,value}/*",
            "attn/out": "MultiHeadDotProductAttention_1/out/*",
            "norm2": "LayerNorm_2/*",
            "mlp/fc1": "MlpBlock_3/Dense_0/*",
            "mlp/fc2": "MlpBlock_3/Dense_1/*",
            "norm": "Transformer/encoder_norm/*",
            "pre_logits": "pre_logits/*",
            "head": "head/*",
        },
        block="Transformer/encoderblock_{}/",
        norm_eps=1e-6,
        gelu="tanh",
        resize="zoom",
        flax=True,
        optional=("cls_token", "pre_logits"),
    ),
    # github.com/huggingface/pytorch-image-models, timm/models/vision_transformer.py.
    TIMM: Layout(
        {
            **_TORCH_NAMES,
            "attn/qkv": "attn.qkv.*",
            "attn/out": "attn.proj.*",
            "layer_scale1": "ls1.gamma",
            "mlp/fc1": "mlp.fc1.*",
            "mlp/fc2": "mlp.fc2.*",
            "layer_scale2": "ls2.gamma",
            "pre_logits": "pre_logits.fc.*",
        },
        block="blocks.{}.",
        norm_eps=1e-6,
        optional=("cls_token", "layer_scale", "pre_logits", "head"),
    ),
    # github.com/huggingface/transformers, ViTForImageClassification as saved to files. A ViTModel
    # has a pooler or none, no classifier, and no prefix "vit.".
    HUGGINGFACE: Layout(
        {
            "cls_token": "vit.embeddings.cls_token",
            "pos_embed": "vit.embeddings.position_embeddings",
            "patch_embed": "vit.embeddings.patch_embeddings.projection.*",
            "norm1": "layernorm_before.*",
            "attn/qkv": "attention.attention.{query,key,value}.*",
            "attn/out": "attention.output.dense.*",
            "norm2": "layernorm_after.*",
            "mlp/fc1": "intermediate.dense.*",
            "mlp/fc2": "output.dense.*",
            "norm": "vit.layernorm.*",
            "pre_logits": "pooler.dense.*",
            "head": "classifier.*",
        },
        block="vit.encoder.layer.{}.",
        norm_eps=1e-12,
        optional=("pre_logits",),
    ),
}
# google-research/vision_transformer's parameters in memory. Unlike its .npz files, they use flax's
# automatic names.
_LINEN_BLOCK = {
    "norm1": "LayerNorm_0/*",
    "attn/qkv": "MultiHeadDotProductAttention_0/{query,key,value}/*",
    "attn/out": "MultiHeadDotProductAttention_0/out/*",
    "norm2": "LayerNorm_1/*",
    "mlp/fc1": "MlpBlock_0/Dense_0/*",
    "mlp/fc2": "MlpBlock_0/Dense_1/*",
}
_MAP_HEAD = {
    f"pooling/{ours}": f"params/MAPHead_0/{theirs}"
    for ours, theirs in {"query": "probe", "norm": "LayerNorm_0/*", **_LINEN_BLOCK}.items()
    if ours in _POOLING
}
LAYOUTS[GOOGLE_LINEN] = LAYOUTS[GOOGLE]._replace(names=LAYOUTS[GOOGLE].names | _LINEN_BLOCK)
# github.com/google-research/big_vision, models/vit.py: its .npz files.
LAYOUTS[BIG_VISION] = LAYOUTS[GOOGLE]._replace(
    names={
        **_LINEN_BLOCK,
        "cls_token": "params/cls",
        "pos_embed": "params/pos_embedding",  # none if they are sincos2d
        "patch_embed": "params/embedding/*",
        "norm": "params/Transformer/encoder_norm/*",
        **_MAP_HEAD,
        "pre_logits": "params/pre_logits/*",
        "head": "params/head/*",
    },
    block="params/Transformer/encoderblock_{}/",
    optional=("cls_token", "pos_embed", "pooling", "pre_logits"),
    cls_position=False,
)
# github.com/pytorch/vision, torchvision/models/vision_transformer.py.
LAYOUTS[TORCHVISION] = Layout(
    {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed": "conv_proj.*",
        "norm1": "ln_1.*",
        "attn/qkv": "self_attention.in_proj_*",
        "attn/out": "self_attention.out_proj.*",
        "norm2": "ln_2.*",
        "mlp/fc1": "mlp.0.*",
        "mlp/fc2": "mlp.3.*",
        "norm": "encoder.ln.*",
        "pre_logits": "heads.pre_logits.*",
        "head": "heads.head.*",
    },
    block="encoder.layers.encoder_layer_{}.",
    norm_eps=1e-6,
    optional=("pre_logits",),
)
# The same model as transformers 5 names its tensors in memory.
LAYOUTS[HUGGINGFACE_5] = LAYOUTS[HUGGINGFACE]._replace(
    names={
        **LAYOUTS[HUGGINGFACE].names,
        "attn/qkv": "attention.{q_proj,k_proj,v_proj}.*",
        "attn/out": "attention.o_proj.*",
        "mlp/fc1": "mlp.fc1.*",
        "mlp/fc2": "mlp.fc2.*",
    },
    block="vit.layers.{}.",
)


def _rows(layout, depth):
    """Returns {path of our array: names of its tensor, or of q, k, and v}, optional ones too."""
    blocks = [(f"block_{i}/", layout.block.format(i), _BLOCK) for i in range(depth)]
    rows = {}
    for ours, theirs, modules in (("", "", _EMBEDDING), *blocks, ("", "", _HEAD)):
        for module in filter(layout.names.get, modules):
            before, _, rest = (theirs + layout.names[module]).partition("{")
            parts, _, after = rest.partition("}")
            names = [before + part + after for part in parts.split(",")]
            leaves = ("scale" if "norm" in module else "kernel", "bias")
            for leaf in leaves if "*" in names[0] else [""]:
                their_leaf = leaf if layout.flax or leaf == "bias" else "weight"
                path = f"{ours}{module}/{leaf}".rstrip("/")
                rows[path] = [name.replace("*", their_leaf) for name in names]
    return rows


def _views(flat, rows, layout, num_heads):
    """Returns {name: tensor in the layout}, views of our arrays {path: array}."""
    views = {}
    for path, names in rows.items():
        for name, array in zip(names, np.split(flat[path], len(names), axis=-1), strict=True):
            if layout.flax and "attn/qkv" in path:
                array = array.reshape(*array.shape[:-1], num_heads, -1)
            elif layout.flax and "attn/out/kernel" in path:
                array = array.reshape(num_heads, -1, array.shape[-1])
            elif path == "pos_embed" and "cls_token" in rows and not layout.cls_position:
                array = array[:, 1:]
            elif not layout.flax and path.endswith("kernel"):  # [out, in] or [out, in, P, P]
                array = array.transpose((1, 0) if array.ndim == 2 else (3, 2, 0, 1))
            views[name] = array
    return views


def find_layout(tensors):
    """Returns the key in LAYOUTS with the most of these names; None if no name is known."""

    def count(kind):
        _, rows = _table(kind, tensors)
        return sum(name in tensors for names in rows.values() for name in names)

    kind = max(LAYOUTS, key=count)
    return kind if count(kind) else None


def _table(kind, tensors):
    """Returns a layout, for a Hugging Face ViTModel without prefix and classifier, and its rows."""
    layout = LAYOUTS[kind]
    if not any(name.startswith(("vit.", "classifier.")) for name in tensors):
        names = {m: n.removeprefix("vit.") for m, n in layout.names.items() if n != "classifier.*"}
        layout = layout._replace(names=names, block=layout.block.removeprefix("vit."))
    block = re.compile(re.escape(layout.block).replace(r"\{\}", r"(\d{1,3})"))
    depth = max((int(match[1]) + 1 for match in map(block.match, tensors) if match), default=1)
    return layout, _rows(layout, depth)


def to_params(tensors, kind, where):
    """Converts the tensors of a layout, {name: float array}, to our parameters.

    `where` names the tensors in errors, such as their file. Returns (params, fields): a nested dict
    of float32 arrays that share no memory with `tensors`, and the fields of config.model, with
    num_heads 0 unless the axes of the tensors contain it.
    Raises UserError if a tensor is missing, unused, or of the wrong shape.
    """
    problem, given = f"{where} does not contain a ViT with {kind} names", shapes(tensors)
    layout, rows = _table(kind, tensors)
    rows = _match(layout, rows, given, problem)
    axes = slice(None, None, 1 if layout.flax else -1)  # torch's are ours in reverse
    ours = {path: given[names[0]][axes] for path, names in rows.items()}
    fields, expected = _infer(kind, ours, layout.cls_position)
    flat = {path: np.zeros(expected[path], np.float32) for path in rows}
    views = _views(flat, rows, layout, fields["num_heads"] or 1)
    check(given, shapes(views), problem)
    for name, view in views.items():
        view[...] = tensors[name]
    return unflatten_dict(flat, sep="/"), fields


def from_params(params, kind, *, num_heads=None):
    """Converts our parameters to a flat dict of float32 arrays in a layout.

    `num_heads` is required for the layouts with `flax`. The arrays share no memory with `params`.
    Raises UserError if the layout has no tensor for a parameter, or the parameters lack one.
    """
    problem = f"the {kind} layout cannot represent this model"
    layout, flat = LAYOUTS[kind], flatten_dict(params, sep="/")
    rows = _rows(layout, sum(name.startswith("block_") for name in params) or 1)
    paths = _match(layout, {path: [path] for path in rows}, flat, problem)
    _, expected = _infer(kind, shapes(flat))
    check(shapes(flat), {path: expected[path] for path in paths}, problem)
    unwritten = not layout.cls_position and {"cls_token", "pos_embed"} <= flat.keys()
    if unwritten and np.any(flat["pos_embed"][:, 0]):
        raise UserError(f"{problem}: its class token has a position embedding")
    flat = {path: np.asarray(array, np.float32) for path, array in flat.items()}
    views = _views(flat, {path: rows[path] for path in paths}, layout, num_heads)
    return {name: np.array(view, order="C") for name, view in views.items()}


def _match(layout, rows, given, problem):
    """Returns the rows without absent optional parts, if their names are exactly the given ones."""
    for part in layout.optional:
        if not any(part in path and names[0] in given for path, names in rows.items()):
            rows = {path: names for path, names in rows.items() if part not in path}
    expected = [name for names in rows.values() for name in names]
    check(dict.fromkeys(given), dict.fromkeys(expected), problem)
    return rows


def _infer(kind, given, cls_position=True):
    """Infers the model with these shapes of our arrays, of which some may be wrong.

    Without `cls_position`, `pos_embed` has no row for the class token.
    Returns (fields of config.model, {path: shape of the model's array}).
    """
    sizes = {path: max(1, math.prod(shape)) for path, shape in given.items()}
    D = mode([size for path, size in sizes.items() if len(given[path]) == 1] or [1])
    kernel, qkv = given["patch_embed/kernel"], given["block_0/attn/qkv/kernel"]
    C = kernel[2] if len(kernel) == 4 else 3
    patches = sizes.get("pos_embed", 0) // D - (cls_position and "cls_token" in given)
    fields = {
        **config.defaults().model,
        "width": D,
        "depth": sum(path.endswith("/norm1/bias") for path in given),
        "num_heads": math.gcd(qkv[1], D) if len(qkv) == 3 else 0,  # flax: [D, h, D / h]
        "mlp_dim": sizes["block_0/mlp/fc1/bias"],
        "pool": "cls" if "cls_token" in given else "map" if "pooling/query" in given else "gap",
        "posemb": "learned" if "pos_embed" in given else "sincos2d",
        "pre_logits": sizes.get("pre_logits/bias", 0),
        "layer_scale": float("block_0/layer_scale1" in given),
    }
    if kind == NOTEBOOK:
        C, patches = 3, math.isqrt(max(patches, 0)) ** 2
        fields["mlp_dim"] = 4 * D
    P = fields["patch_size"] = math.isqrt(sizes["patch_embed/kernel"] // max(C * D, 1)) or 1
    vit = model.make_model(fields | {"num_heads": 1}, num_classes=sizes.get("head/bias", 1))
    return fields, model_shapes(vit, (P, P * max(patches, 1), max(C, 1)))


def model_shapes(vit, image_shape):
    """Returns {path: shape} of a model's parameters for images of (H, W, C); computes nothing."""
    params = jax.eval_shape(lambda: model.init_params(vit, jax.random.key(0), tuple(image_shape)))
    return shapes(flatten_dict(params, sep="/"))


def shapes(flat):
    """Returns {path: shape} of a flat dict of arrays."""
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def mismatches(given, expected):
    """Describes how one {name: shape} differs from another; returns "" if they are equal."""
    wrong = [name for name in expected if name in given and given[name] != expected[name]]
    problems = {
        "": [f"{name} has shape {given[name]}, expected {expected[name]}" for name in wrong],
        "unused ": [name for name in given if name not in expected],
        "missing ": [name for name in expected if name not in given],
    }
    return "; ".join(problem + listed(names) for problem, names in problems.items() if names)


def check(given, expected, problem):
    """Raises UserError, with the problem and what differs, unless two {name: shape} are equal."""
    if difference := mismatches(given, expected):
        raise UserError(f"{problem}: {difference}")


def listed(names, limit=6):
    """Formats names, as in 'a, b, c and 7 more'."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def notebook_to_params(state_dict):
    """Converts the state_dict of the notebook's PyTorch model to our parameters, bit for bit.

        params = notebook_to_params(torch.load("vit.pt", weights_only=True))
        logits = model.apply({"params": params}, images)  # images NHWC; the notebook's are NCHW

    Takes {name: torch tensor or numpy array}; returns a nested dict of float32 numpy arrays that
    share no memory with it. The model must have the notebook's `num_heads`, and `norm_eps` 1e-5.
    Raises UserError if a key is missing, unused, or of the wrong shape.
    """
    tensors = files.to_float32(state_dict, "the state_dict")
    return to_params(tensors, NOTEBOOK, "the state_dict")[0]


def params_to_notebook(params):
    """Converts our parameters to the notebook's state_dict, {name: float32 torch tensor}.

        torch_model.load_state_dict(params_to_notebook(params), strict=True)

    Raises UserError if the notebook's model cannot have these parameters, or without PyTorch.
    `from_params(params, "notebook")` returns numpy arrays and needs no PyTorch.
    """
    arrays = from_params(params, NOTEBOOK)
    torch = files.import_torch("a state_dict of tensors")
    return {name: torch.tensor(array) for name, array in arrays.items()}
