"""The layouts of other libraries: how each names, orders, and shapes the tensors of a ViT.

Each layout is one table from our parameter paths to its tensor names. `to_params` and `from_params`
convert between a flat dict of its tensors and our nested parameters. They compute nothing, so every
bit is kept in both directions.

Shapes are written with these symbols: D width, A attention width (equal to D), h heads, K = A / h,
M MLP width, P patch size, C channels, N tokens, R pre-logits width, F features that the head reads
(R or D), L classes, S tokens of a square grid and a class token.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from statistics import mode
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError

NOTEBOOK, GOOGLE, TIMM = "notebook", "google", "timm"
HUGGINGFACE, HUGGINGFACE_5 = "huggingface", "huggingface 5"

# Our parameters: path -> shape. The parameters in _BLOCK repeat in every `block_N/`.
_EMBEDDING = {
    "cls_token": (1, 1, "D"),
    "pos_embed": (1, "N", "D"),
    "patch_embed/kernel": ("P", "P", "C", "D"),
    "patch_embed/bias": ("D",),
}
_BLOCK = {
    "norm1/scale": ("D",),
    "norm1/bias": ("D",),
    "attn/qkv/kernel": ("D", "3A"),
    "attn/qkv/bias": ("3A",),
    "attn/out/kernel": ("A", "D"),
    "attn/out/bias": ("D",),
    "layer_scale1": ("D",),
    "norm2/scale": ("D",),
    "norm2/bias": ("D",),
    "mlp/fc1/kernel": ("D", "M"),
    "mlp/fc1/bias": ("M",),
    "mlp/fc2/kernel": ("M", "D"),
    "mlp/fc2/bias": ("D",),
    "layer_scale2": ("D",),
}
_HEAD = {
    "norm/scale": ("D",),
    "norm/bias": ("D",),
    "pre_logits/kernel": ("D", "R"),
    "pre_logits/bias": ("R",),
    "head/kernel": ("F", "L"),
    "head/bias": ("L",),
}


class Layout(NamedTuple):
    """One library's tensors, and its settings that the files do not record."""

    # Our path or module -> its name. "*" is the leaf; {q,k,v} are tensors that ours concatenates.
    names: Mapping[str, str]
    block: str  # prefix of the names in block {}
    norm_eps: float
    gelu: str = "exact"
    resize: str = "bicubic"  # how it resizes position embeddings; see positions.py
    flax: bool = False  # leaves and axes as in flax, A split into h and K; otherwise as in torch
    optional: tuple[str, ...] = ()  # parts of our paths; all tensors of a part or none are present
    sizes: Mapping[str, str | int] = {}  # symbols that it restricts to other symbols or numbers
    num_heads: int | None = None
    requires: str = ""  # what a model must have to be stored in it


_TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_TORCH_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}  # [out, in] and [out, in, P, P] to ours
_TORCH_NAMES = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed": "patch_embed.proj.*",
    "norm1": "norm1.*",
    "norm2": "norm2.*",
    "norm": "norm.*",
    "head": "head.*",
}
# The notebook's VisionTransformer, as in commands/benchmark/notebook_torch.py.
_NOTEBOOK = Layout(
    _TORCH_NAMES
    | {
        "attn/qkv": "attn.in_proj_*",
        "attn/out": "attn.out_proj.*",
        "mlp/fc1": "mlp.0.*",
        "mlp/fc2": "mlp.2.*",
    },
    block="blocks.{}.",
    norm_eps=1e-5,
    resize="bilinear",
    sizes={"M": "4D", "C": 3, "N": "S"},
    num_heads=8,
    requires="a class token, a learned position embedding of a square grid, a patch stem on 3 "
    "channels, mlp_dim 4 x width, and neither qk_norm nor layer_scale",
)
# github.com/google-research/vision_transformer, vit_jax/models_vit.py: the .npz files.
# It calls nn.gelu with flax's default, the tanh approximation.
_GOOGLE = Layout(
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
)
# github.com/huggingface/pytorch-image-models, timm/models/vision_transformer.py.
_TIMM = Layout(
    _TORCH_NAMES
    | {
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
)
# github.com/huggingface/transformers, ViTForImageClassification as saved to files.
_HUGGINGFACE = Layout(
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
        "head": "classifier.*",
    },
    block="vit.encoder.layer.{}.",
    norm_eps=1e-12,
)
# The same model as transformers 5 names its tensors in memory.
_HUGGINGFACE_5 = _HUGGINGFACE._replace(
    names=_HUGGINGFACE.names
    | {
        "attn/qkv": "attention.{q_proj,k_proj,v_proj}.*",
        "attn/out": "attention.o_proj.*",
        "mlp/fc1": "mlp.fc1.*",
        "mlp/fc2": "mlp.fc2.*",
    },
    block="vit.layers.{}.",
)
LAYOUTS = {
    NOTEBOOK: _NOTEBOOK,
    GOOGLE: _GOOGLE,
    TIMM: _TIMM,
    HUGGINGFACE: _HUGGINGFACE,
    HUGGINGFACE_5: _HUGGINGFACE_5,
}


class _Row(NamedTuple):
    """One tensor of a layout. `tensor.transpose(axes).reshape(our_shape)` makes it ours."""

    name: str
    path: str
    their_shape: tuple
    our_shape: tuple  # of one of q, k, v if `part`
    axes: tuple
    part: int | None  # 0, 1, 2: q, k, v
    group: str  # the optional part that the tensor belongs to, or ""

    @property
    def whole_shape(self):
        return self.our_shape if self.part is None else (*self.our_shape[:-1], "3A")


def _rows(layout, depth):
    """Returns all rows, including optional ones, of a model with `depth` blocks, in order."""
    blocks = [(f"block_{i}/", layout.block.format(i), _BLOCK) for i in range(depth)]
    rows = []
    for ours, theirs, shapes in (("", "", _EMBEDDING), *blocks, ("", "", _HEAD)):
        for path, shape in shapes.items():
            module, _, leaf = path.rpartition("/")
            name = layout.names.get(path) or layout.names.get(module)
            if name:
                leaf = leaf if layout.flax else _TORCH_LEAVES.get(leaf, "")
                name = theirs + name.replace("*", leaf)
                rows += _rows_of(layout, name, ours + path, shape)
    return rows


def _rows_of(layout, name, path, shape):
    """Returns the row of one of our tensors, or its three rows for q, k, and v."""
    shape = tuple(layout.sizes.get(size, size) for size in shape)
    group = next((part for part in layout.optional if part in path), "")
    before, *parts, after = re.split("[{,}]", name) if "{" in name else (name, "", "")
    if len(parts) == 3:
        shape = tuple("A" if size == "3A" else size for size in shape)
    stored = shape
    if layout.flax and "A" in shape:
        at = shape.index("A")
        stored = (*shape[:at], "h", "K", *shape[at + 1 :])
    axes = tuple(range(len(stored)))
    if path.endswith("kernel") and not layout.flax:
        axes = _TORCH_AXES[len(stored)]
        stored = tuple(stored[axis] for axis in np.argsort(axes))
    for i, part in enumerate(parts):
        index = i if len(parts) == 3 else None
        yield _Row(before + part + after, path, stored, shape, axes, index, group)


def find_layout(names):
    """Returns the key in LAYOUTS for these tensor names; None if they are unknown."""
    for kind in LAYOUTS:
        layout = _layout(kind, names)
        rows = _rows(layout, _depth(layout, names))
        if any(row.name in names for row in rows if row.path.endswith("attn/qkv/kernel")):
            return kind
    return None


def _layout(kind, names):
    """Returns a layout; for a Hugging Face ViTModel, without prefix and classifier."""
    layout = LAYOUTS[kind]
    if kind not in (HUGGINGFACE, HUGGINGFACE_5):
        return layout
    if any(str(name).startswith(("vit.", "classifier.")) for name in names):
        return layout
    ours = {p: name.removeprefix("vit.") for p, name in layout.names.items() if p != "head"}
    return layout._replace(
        names=ours | {"pre_logits": "pooler.dense.*"},
        block=layout.block.removeprefix("vit."),
        optional=("pre_logits",),
    )


def _depth(layout, names):
    before, after = map(re.escape, layout.block.split("{}"))
    found = (re.match(rf"{before}(\d{{1,3}}){after}", str(name)) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def to_params(tensors, kind, where):
    """Converts the tensors of a layout to our parameters.

    Args:
      tensors: flat dict of numpy arrays or torch tensors of any float type.
      kind: the layout, a key of LAYOUTS.
      where: the tensors' name in errors, such as their file.
    Returns (params, sizes): a nested dict of float32 arrays that share no memory with `tensors`,
      and {symbol: number}.
    Raises UserError if a tensor is missing, unused, or of the wrong shape.
    """
    layout = _layout(kind, tensors)
    rows = _rows(layout, _depth(layout, tensors))
    present = {row.group for row in rows if row.name in tensors} | {""}
    rows = [row for row in rows if row.group in present]
    arrays, sizes = _match(
        tensors,
        {row.name: row.their_shape for row in rows},
        f"{where} does not contain a ViT with {kind} names",
        layout.requires,
    )
    flat = {row.path: np.empty(_numbers(row.whole_shape, sizes), np.float32) for row in rows}
    for row in rows:
        array = arrays[row.name].transpose(row.axes)
        _part(flat[row.path], row)[...] = array.reshape(_numbers(row.our_shape, sizes))
    return unflatten_dict(flat, sep="/"), sizes


def from_params(params, kind, *, num_heads=None):
    """Converts our parameters to a flat dict of float32 arrays in a layout.

    `num_heads` is required for GOOGLE. The arrays share no memory with `params`. Raises UserError
    if the layout has no tensor for a parameter, or the parameters lack one.
    """
    layout, flat = LAYOUTS[kind], flatten_dict(params, sep="/")
    rows = _rows(layout, sum(name.startswith("block_") for name in params))
    present = {row.group for row in rows if row.path in flat} | {""}
    rows = [row for row in rows if row.group in present]
    arrays, sizes = _match(
        flat,
        {row.path: row.whole_shape for row in rows},
        f"the {kind} layout cannot represent this model",
        layout.requires,
    )
    if layout.flax:
        sizes |= {"h": num_heads, "K": sizes["A"] // num_heads}
    tensors = {}
    for row in rows:
        stored = _numbers(row.their_shape, sizes)
        array = _part(arrays[row.path], row).reshape([stored[axis] for axis in row.axes])
        tensors[row.name] = np.array(array.transpose(np.argsort(row.axes)), order="C")
    return tensors


def _part(array, row):
    """Returns a view of a row's part of one of our arrays."""
    return array if row.part is None else np.split(array, 3, axis=-1)[row.part]


def _match(tensors, shapes, problem, requires):
    """Returns (float32 arrays, sizes) of tensors with exactly these names and symbolic shapes."""
    difference = mismatches(dict.fromkeys(tensors), dict.fromkeys(shapes))
    if not difference:
        arrays = {name: _to_numpy(tensors[name]) for name in shapes}
        sizes = _sizes(shapes, arrays)
        given = {name: array.shape for name, array in arrays.items()}
        expected = {name: _numbers(shape, sizes) for name, shape in shapes.items()}
        difference = mismatches(given, expected)
    if difference:
        note = f" (required: {requires})" if requires else ""
        raise UserError(f"{problem}: {difference}{note}")
    return arrays, sizes


def _sizes(shapes, arrays):
    """Returns {symbol: number} from the arrays with these symbolic shapes.

    Element counts are used if they suffice, so that only an array with the wrong number of axes is
    reported, and not all others.
    """
    found = defaultdict(list)
    for name, shape in shapes.items():
        found[shape].append(arrays[name])

    def count(*shape):
        return mode(array.size for array in found[shape]) if shape in found else 0

    D, R = count("D"), count("R")
    tokens = (count(1, "N", "D") or count(1, "S", "D")) // max(D, 1)
    sizes = {"D": D, "A": D, "3A": 3 * D, "4D": 4 * D, "M": count("M"), "L": count("L")}
    sizes |= {"N": tokens, "S": math.isqrt(max(tokens - 1, 0)) ** 2 + 1, "R": R, "F": R or D}
    heads = [array.shape for array in found.get(("h", "K"), ()) if array.ndim == 2]
    sizes |= dict(zip("hK", mode(heads) if heads else (0, 0), strict=True))
    for shape, (array, *_) in found.items():
        if "P" in shape and array.ndim == len(shape):
            sizes |= {s: n for s, n in zip(shape, array.shape, strict=True) if s in ("P", "C")}
    return sizes


def _numbers(shape, sizes):
    return tuple(sizes.get(size, size) for size in shape)


def _to_numpy(value):
    if hasattr(value, "detach"):  # a torch tensor, on any device
        value = value.detach().cpu().float().numpy()
    return np.asarray(value, np.float32)


def mismatches(given, expected):
    """Describes how one {name: shape} differs from another; returns "" if they are equal."""
    wrong = [
        f"{name} has shape {given[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    unused = [str(name) for name in given if name not in expected]
    missing = [name for name in expected if name not in given]
    problems = [listed(wrong)] if wrong else []
    problems += [f"unused {listed(unused)}"] if unused else []
    problems += [f"missing {listed(missing)}"] if missing else []
    return "; ".join(problems)


def listed(names, limit=6):
    """Formats names, as in 'a, b, c and 7 more'."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def notebook_to_params(state_dict):
    """Converts the state_dict of the notebook's PyTorch model to our parameters, bit for bit.

        params = notebook_to_params(torch.load("vit.pt", weights_only=True))
        logits = model.apply({"params": params}, images)  # images NHWC; the notebook's are NCHW

    Args: state_dict {name: torch tensor or numpy array}. Depth, width, patch size, image size, and
      number of classes are read from it. It records neither the number of heads nor the epsilon of
      the norms: the model must have the notebook's `num_heads`, and `norm_eps` 1e-5.
    Returns a nested dict of float32 numpy arrays that share no memory with the state_dict.
    Raises UserError if a key is missing, unused, or of the wrong shape.
    """
    if not isinstance(state_dict, Mapping):
        raise UserError(
            f"notebook_to_params takes a state_dict, got {type(state_dict).__name__}: "
            "pass model.state_dict()"
        )
    return to_params(state_dict, NOTEBOOK, "the state_dict")[0]


def params_to_notebook(params):
    """Converts our parameters to the notebook's state_dict, {name: float32 torch tensor}.

        torch_model.load_state_dict(params_to_notebook(params), strict=True)

    Raises UserError if the notebook's model cannot have these parameters, or without PyTorch.
    """
    if not isinstance(params, Mapping):
        raise UserError(
            f"params_to_notebook takes a nested dict of arrays, got {type(params).__name__}"
        )
    arrays = from_params(params, NOTEBOOK)
    try:
        import torch
    except ImportError as e:
        raise UserError(
            "a state_dict of tensors needs PyTorch, which is not installed: pip install torch, or "
            "call vit_jax.weights.from_params(params, 'notebook') for numpy arrays"
        ) from e
    return {name: torch.tensor(array) for name, array in arrays.items()}
