"""The tensors of other programs' ViTs, by their published names, to our parameters and back.

One row a tensor says its name and shape there, its path here, and how the one becomes the other.
Sizes in shapes: D width, h heads, K = D / h, M mlp_dim, P patch, C channels, N tokens, R pre-logits
width, L classes. Nothing is computed: both ways keep every bit.

Sources of the names:
  GOOGLE  github.com/google-research/vision_transformer, vit_jax/models_vit.py (the .npz files)
  TIMM    github.com/huggingface/pytorch-image-models, timm/models/vision_transformer.py
  HUGGINGFACE  github.com/huggingface/transformers, ViTForImageClassification as saved to files;
    HUGGINGFACE_5 as transformers 5 names the same tensors in memory
"""

import re
from collections.abc import Mapping
from statistics import mode
from typing import NamedTuple

import numpy as np

from vit_jax.errors import UserError

LISTED = 6  # how many names of a kind an error spells out


class Row(NamedTuple):
    """One tensor: `theirs.transpose(axes).reshape(ours)`, into a third of q, k, v where `part`."""

    name: str
    shape: tuple
    path: str
    axes: tuple
    part: int | None = None  # 0, 1, 2: of the fused q, k, v
    group: str = ""  # all or none of a group's tensors are there; "" is always there


GOOGLE, TIMM, HUGGINGFACE, HUGGINGFACE_5 = "google", "timm", "huggingface", "huggingface 5"
BLOCK = {
    GOOGLE: r"Transformer/encoderblock_(\d+)/",
    TIMM: r"blocks\.(\d+)\.",
    HUGGINGFACE: r"(?:vit\.)?encoder\.layer\.(\d+)\.",
    HUGGINGFACE_5: r"(?:vit\.)?layers\.(\d+)\.",
}
_KEPT, _LINEAR, _CONV = (0,), (1, 0), (2, 3, 1, 0)


def _google(depth, names):
    rows = [
        Row("cls", (1, 1, "D"), "cls_token", (0, 1, 2), group="class token"),
        Row("Transformer/posembed_input/pos_embedding", (1, "N", "D"), "pos_embed", (0, 1, 2)),
        Row("embedding/kernel", ("P", "P", "C", "D"), "patch_embed/kernel", (0, 1, 2, 3)),
        Row("embedding/bias", ("D",), "patch_embed/bias", _KEPT),
    ]
    for i in range(depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"block_{i}"
        attention, mlp = f"{theirs}/MultiHeadDotProductAttention_1", f"{theirs}/MlpBlock_3"
        for norm, name in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            for leaf in ("scale", "bias"):
                rows.append(Row(f"{theirs}/{norm}/{leaf}", ("D",), f"{ours}/{name}/{leaf}", _KEPT))
        for part, name in enumerate(("query", "key", "value")):
            qkv = f"{ours}/attn/qkv"
            kernel, bias = f"{attention}/{name}/kernel", f"{attention}/{name}/bias"
            rows.append(Row(kernel, ("D", "h", "K"), f"{qkv}/kernel", (0, 1, 2), part))
            rows.append(Row(bias, ("h", "K"), f"{qkv}/bias", (0, 1), part))
        out, fc1, fc2 = f"{ours}/attn/out", f"{ours}/mlp/fc1", f"{ours}/mlp/fc2"
        rows += [
            Row(f"{attention}/out/kernel", ("h", "K", "D"), f"{out}/kernel", (0, 1, 2)),
            Row(f"{attention}/out/bias", ("D",), f"{out}/bias", _KEPT),
            Row(f"{mlp}/Dense_0/kernel", ("D", "M"), f"{fc1}/kernel", (0, 1)),
            Row(f"{mlp}/Dense_0/bias", ("M",), f"{fc1}/bias", _KEPT),
            Row(f"{mlp}/Dense_1/kernel", ("M", "D"), f"{fc2}/kernel", (0, 1)),
            Row(f"{mlp}/Dense_1/bias", ("D",), f"{fc2}/bias", _KEPT),
        ]
    features = "R" if "pre_logits/kernel" in names else "D"
    return [
        *rows,
        Row("Transformer/encoder_norm/scale", ("D",), "norm/scale", _KEPT),
        Row("Transformer/encoder_norm/bias", ("D",), "norm/bias", _KEPT),
        Row("pre_logits/kernel", ("D", "R"), "pre_logits/kernel", (0, 1), group="pre-logits"),
        Row("pre_logits/bias", ("R",), "pre_logits/bias", _KEPT, group="pre-logits"),
        Row("head/kernel", (features, "L"), "head/kernel", (0, 1)),
        Row("head/bias", ("L",), "head/bias", _KEPT),
    ]


def _torch_linear(theirs, shape, ours, part=None, group=""):
    """The two rows of a torch Linear, whose weight is [out, in] and ours [in, out]."""
    return [
        Row(f"{theirs}.weight", shape, f"{ours}/kernel", _LINEAR, part, group),
        Row(f"{theirs}.bias", shape[:1], f"{ours}/bias", _KEPT, part, group),
    ]


def _torch_norm(theirs, ours):
    return [
        Row(f"{theirs}.weight", ("D",), f"{ours}/scale", _KEPT),
        Row(f"{theirs}.bias", ("D",), f"{ours}/bias", _KEPT),
    ]


def _timm(depth, names):
    rows = [
        Row("cls_token", (1, 1, "D"), "cls_token", (0, 1, 2), group="class token"),
        Row("pos_embed", (1, "N", "D"), "pos_embed", (0, 1, 2)),
        Row("patch_embed.proj.weight", ("D", "C", "P", "P"), "patch_embed/kernel", _CONV),
        Row("patch_embed.proj.bias", ("D",), "patch_embed/bias", _KEPT),
    ]
    for i in range(depth):
        theirs, ours = f"blocks.{i}", f"block_{i}"
        scale = {"axes": _KEPT, "group": "layer scale"}
        rows += [
            *_torch_norm(f"{theirs}.norm1", f"{ours}/norm1"),
            *_torch_linear(f"{theirs}.attn.qkv", ("3D", "D"), f"{ours}/attn/qkv"),
            *_torch_linear(f"{theirs}.attn.proj", ("D", "D"), f"{ours}/attn/out"),
            Row(f"{theirs}.ls1.gamma", ("D",), f"{ours}/layer_scale1", **scale),
            *_torch_norm(f"{theirs}.norm2", f"{ours}/norm2"),
            *_torch_linear(f"{theirs}.mlp.fc1", ("M", "D"), f"{ours}/mlp/fc1"),
            *_torch_linear(f"{theirs}.mlp.fc2", ("D", "M"), f"{ours}/mlp/fc2"),
            Row(f"{theirs}.ls2.gamma", ("D",), f"{ours}/layer_scale2", **scale),
        ]
    features = "R" if "pre_logits.fc.weight" in names else "D"
    return [
        *rows,
        *_torch_norm("norm", "norm"),
        *_torch_linear("pre_logits.fc", ("R", "D"), "pre_logits", group="pre-logits"),
        *_torch_linear("head", ("L", features), "head", group="head"),
    ]


def _huggingface(depth, names, layer="encoder.layer", style=HUGGINGFACE):
    # A ViTModel alone is saved without the prefix and the classifier, and with a pooler.
    whole = any(name.startswith(("vit.", "classifier.")) for name in names)
    prefix = "vit." if whole else ""
    embeddings = f"{prefix}embeddings"
    projection = f"{embeddings}.patch_embeddings.projection"
    rows = [
        Row(f"{embeddings}.cls_token", (1, 1, "D"), "cls_token", (0, 1, 2)),
        Row(f"{embeddings}.position_embeddings", (1, "N", "D"), "pos_embed", (0, 1, 2)),
        Row(f"{projection}.weight", ("D", "C", "P", "P"), "patch_embed/kernel", _CONV),
        Row(f"{projection}.bias", ("D",), "patch_embed/bias", _KEPT),
    ]
    if style == HUGGINGFACE:
        qkv = [f"attention.attention.{name}" for name in ("query", "key", "value")]
        out, fc1, fc2 = "attention.output.dense", "intermediate.dense", "output.dense"
    else:
        qkv = [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        out, fc1, fc2 = "attention.o_proj", "mlp.fc1", "mlp.fc2"
    for i in range(depth):
        theirs, ours = f"{prefix}{layer}.{i}", f"block_{i}"
        rows += _torch_norm(f"{theirs}.layernorm_before", f"{ours}/norm1")
        for part, name in enumerate(qkv):
            rows += _torch_linear(f"{theirs}.{name}", ("D", "D"), f"{ours}/attn/qkv", part)
        rows += _torch_linear(f"{theirs}.{out}", ("D", "D"), f"{ours}/attn/out")
        rows += _torch_norm(f"{theirs}.layernorm_after", f"{ours}/norm2")
        rows += _torch_linear(f"{theirs}.{fc1}", ("M", "D"), f"{ours}/mlp/fc1")
        rows += _torch_linear(f"{theirs}.{fc2}", ("D", "M"), f"{ours}/mlp/fc2")
    rows += _torch_norm(f"{prefix}layernorm", "norm")
    if whole:
        return rows + _torch_linear("classifier", ("L", "D"), "head")
    return rows + _torch_linear("pooler.dense", ("R", "D"), "pre_logits", group="pre-logits")


def _rows(layout, depth, names):
    if layout == GOOGLE:
        return _google(depth, names)
    if layout == TIMM:
        return _timm(depth, names)
    if layout == HUGGINGFACE:
        return _huggingface(depth, names)
    return _huggingface(depth, names, "layers", HUGGINGFACE_5)


def to_params(tensors, layout, where):
    """(our parameters, {size: number}) from a flat dict of numpy arrays in a layout.

    Args: where, what an error calls the tensors: their file.
    Returns nested dict of float32 arrays that share no memory with `tensors`; the sizes are those
      of the module's docstring that the layout records.
    Raises UserError when a tensor is missing, unknown, or of the wrong shape.
    """
    blocks = (re.match(BLOCK[layout], str(name)) for name in tensors)
    depth = max((int(block[1]) + 1 for block in blocks if block), default=0)
    rows = _rows(layout, min(depth, 1000), tensors)
    present = {row.group for row in rows if row.name in tensors}
    rows = [row for row in rows if not row.group or row.group in present]
    expected = {row.name for row in rows}
    missing = [row.name for row in rows if row.name not in tensors]
    unused = [str(name) for name in tensors if name not in expected]
    if missing or unused:
        kinds = {"missing": missing, "unused": unused}
        text = "; ".join(f"{kind} {listed(names)}" for kind, names in kinds.items() if names)
        raise UserError(f"{where} does not hold a ViT by the names of {layout}: {text}")
    sizes = _sizes({row: tensors[row.name] for row in rows})
    wrong = [
        f"{row.name} is {shape} and not {expected}"
        for row in rows
        if (shape := tuple(tensors[row.name].shape)) != (expected := _shape(row.shape, sizes))
    ]
    if wrong:
        raise UserError(f"{where} does not hold a ViT by the names of {layout}: {listed(wrong)}")
    flat, thirds = {}, {}
    for row in rows:
        array = np.asarray(tensors[row.name], np.float32).transpose(row.axes)
        if array.shape != (shape := _our_shape(row, sizes)):
            array = array.reshape(shape)
        if row.part is None:
            flat[row.path] = np.array(array, order="C")
        else:
            thirds.setdefault(row.path, {})[row.part] = array
    for path, parts in thirds.items():
        flat[path] = np.concatenate([parts[0], parts[1], parts[2]], axis=-1)
    return unflatten(flat), {**sizes, "depth": depth}


def from_params(params, layout, *, num_heads):
    """A flat dict of float32 arrays in a layout, from our parameters.

    Raises UserError for parameters that the layout has no tensor for, or lacks.
    """
    flat = flatten(params)
    depth = sum(name.startswith("block_") for name in params)
    # Names that the layout's optional tensors would have: all but those of a headless model.
    names = {GOOGLE: ["pre_logits/kernel"], TIMM: ["pre_logits.fc.weight"]}.get(layout, ["vit."])
    if layout in (GOOGLE, TIMM) and "pre_logits" not in params:
        names = []
    rows = [row for row in _rows(layout, depth, names) if not row.group or row.path in flat]
    known = {row.path for row in rows}
    unused = [path for path in flat if path not in known]
    missing = sorted(path for path in known if path not in flat)
    if unused or missing:
        kinds = {"it has no place for": unused, "it needs": missing}
        text = "; ".join(f"{kind} {listed(names)}" for kind, names in kinds.items() if names)
        raise UserError(f"{layout} cannot express this model: {text}")
    width = len(flat["norm/scale"])
    sizes = {"D": width, "3D": 3 * width, "h": num_heads, "K": width // num_heads}
    tensors = {}
    for row in rows:
        array = np.asarray(flat[row.path], np.float32)
        if row.part is not None:
            array = np.split(array, 3, axis=-1)[row.part]
        if "h" in row.shape:
            shape = _shape(row.shape, sizes)
            array = array.reshape([shape[axis] for axis in row.axes])
        tensors[row.name] = np.array(array.transpose(np.argsort(row.axes)), order="C")
    return tensors


def _sizes(rows):
    """{size: number} from {row: array}, read off the tensors that can tell them.

    From counts of elements where that is enough, so that an array of the wrong rank is blamed
    itself and not all others.
    """

    def common(shape, measure):
        values = [measure(array) for row, array in rows.items() if row.shape == shape]
        return mode(values) if values else 0

    width = common(("D",), lambda a: a.size)
    sizes = {"D": width, "3D": 3 * width}
    sizes |= {name: common((name,), lambda a: a.size) for name in ("M", "R", "L")}
    sizes["N"] = common((1, "N", "D"), lambda a: a.size // max(width, 1))
    heads = common(("h", "K"), lambda a: a.shape if a.ndim == 2 else (0, 0))
    sizes |= dict(zip("hK", heads or (0, 0), strict=True))
    ((row, patch),) = ((r, a) for r, a in rows.items() if r.path == "patch_embed/kernel")
    for name, size in zip(row.shape, patch.shape, strict=False):
        sizes.setdefault(name, size)
    return {"P": 0, "C": 0, **sizes}


def _shape(symbols, sizes):
    return tuple(sizes.get(size, size) for size in symbols)


def _our_shape(row, sizes):
    shape = [row.shape[axis] for axis in row.axes]
    if "h" in shape:
        at = shape.index("h")
        shape[at : at + 2] = ["D"]
    return _shape(shape, sizes)


def listed(names):
    """'a, b, c and 7 more'."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def flatten(tree, prefix=""):
    """{'block_0/norm1/scale': array} from a nested dict."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def unflatten(flat):
    """The nested dict of a flat one."""
    tree = {}
    for path, value in flat.items():
        *groups, leaf = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree
