"""The PyTorch notebook's `state_dict` to our parameters and back, bit for bit.

    params = notebook_to_params(torch.load("vit.pt", weights_only=True))
    logits = model.apply({"params": params}, images)  # images NHWC; the notebook's are NCHW
    torch_model.load_state_dict(params_to_notebook(params), strict=True)

The weights do not record the number of heads, nor the eps of the norms: `model.num_heads` has to
be that of the notebook's model, and `model.norm_eps` 1e-5.
"""

import math
import re
from collections.abc import Mapping
from statistics import mode

import numpy as np

from vit_jax.errors import UserError

NOTEBOOK, OURS = 0, 1  # the column of a row of _rows that names a tensor
EXPRESSIBLE = (
    "the notebook's model has a class token, a learned position embedding of a square grid, a "
    "patch stem on 3 channels, mlp_dim 4 x width, and neither qk_norm nor layer_scale"
)
LISTED = 6  # how many names of a kind an error spells out


def notebook_to_params(state_dict):
    """Our parameters, a nested dict of float32 numpy arrays, from the notebook's state_dict.

    Args: state_dict {name: torch tensor or numpy array}; depth, width, patch size, image size and
    number of classes are read off it. The result shares no memory with it.
    Raises UserError when a key is missing, unknown, or of the wrong shape.
    """
    if not isinstance(state_dict, Mapping):
        raise UserError(
            f"notebook_to_params takes a state_dict, got {type(state_dict).__name__}: "
            "give it model.state_dict()"
        )
    params = {}
    for _, path, axes, array in _match(state_dict, NOTEBOOK):
        *groups, leaf = path.split("/")
        node = params
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = np.array(array.transpose(axes), order="C")
    return params


def params_to_notebook(params):
    """The notebook's state_dict, {name: float32 torch tensor}, from our parameters.

    Raises UserError for parameters of a model that the notebook cannot express, and without torch.
    """
    arrays = params_to_notebook_arrays(params)
    try:
        import torch
    except ImportError as e:
        raise UserError(
            "a state_dict of tensors needs PyTorch, which is not installed: pip install torch, or "
            "call vit_jax.interop.notebook.params_to_notebook_arrays for numpy arrays"
        ) from e
    return {name: torch.tensor(array) for name, array in arrays.items()}


def params_to_notebook_arrays(params):
    """The notebook's state_dict with float32 numpy arrays for tensors; needs no torch."""
    if not isinstance(params, Mapping):
        raise UserError(
            f"params_to_notebook takes a nested dict of arrays, got {type(params).__name__}"
        )
    flat = dict(_flatten(params))
    return {
        name: np.array(array.transpose(np.argsort(axes)), order="C")
        for name, _, axes, array in _match(flat, OURS)
    }


def _rows(depth):
    """(notebook name, our path, axes, notebook shape) of each tensor, in the notebook's order.

    `array.transpose(axes)` takes the notebook's layout to ours: Linear [out, in] to [in, out],
    Conv2d [out, in, P, P] to [P, P, in, out]. D is the width, P the patch, N tokens, L classes.
    """
    linear = (1, 0)
    rows = [
        ("cls_token", "cls_token", (0, 1, 2), (1, 1, "D")),
        ("pos_embed", "pos_embed", (0, 1, 2), (1, "N", "D")),
        ("patch_embed.proj.weight", "patch_embed/kernel", (2, 3, 1, 0), ("D", 3, "P", "P")),
        ("patch_embed.proj.bias", "patch_embed/bias", (0,), ("D",)),
    ]
    for i in range(depth):
        theirs, ours = f"blocks.{i}", f"block_{i}"
        rows += [
            (f"{theirs}.norm1.weight", f"{ours}/norm1/scale", (0,), ("D",)),
            (f"{theirs}.norm1.bias", f"{ours}/norm1/bias", (0,), ("D",)),
            (f"{theirs}.attn.in_proj_weight", f"{ours}/attn/qkv/kernel", linear, ("3D", "D")),
            (f"{theirs}.attn.in_proj_bias", f"{ours}/attn/qkv/bias", (0,), ("3D",)),
            (f"{theirs}.attn.out_proj.weight", f"{ours}/attn/out/kernel", linear, ("D", "D")),
            (f"{theirs}.attn.out_proj.bias", f"{ours}/attn/out/bias", (0,), ("D",)),
            (f"{theirs}.norm2.weight", f"{ours}/norm2/scale", (0,), ("D",)),
            (f"{theirs}.norm2.bias", f"{ours}/norm2/bias", (0,), ("D",)),
            (f"{theirs}.mlp.0.weight", f"{ours}/mlp/fc1/kernel", linear, ("4D", "D")),
            (f"{theirs}.mlp.0.bias", f"{ours}/mlp/fc1/bias", (0,), ("4D",)),
            (f"{theirs}.mlp.2.weight", f"{ours}/mlp/fc2/kernel", linear, ("D", "4D")),
            (f"{theirs}.mlp.2.bias", f"{ours}/mlp/fc2/bias", (0,), ("D",)),
        ]
    rows += [
        ("norm.weight", "norm/scale", (0,), ("D",)),
        ("norm.bias", "norm/bias", (0,), ("D",)),
        ("head.weight", "head/kernel", linear, ("L", "D")),
        ("head.bias", "head/bias", (0,), ("L",)),
    ]
    return rows


def _match(tensors, column):
    """[(notebook name, our path, axes, float32 array)], every name and shape accounted for.

    Args: tensors, a flat dict; column, NOTEBOOK or OURS: whose names and layout it has.
    """
    blocks = (re.match(r"blocks\.(\d+)\.|block_(\d+)/", str(name)) for name in tensors)
    depth = max((int(block[1] or block[2]) + 1 for block in blocks if block), default=0)
    rows = {row[column]: row for row in _rows(depth)}
    missing = [name for name in rows if name not in tensors]
    unused = [str(name) for name in tensors if name not in rows]
    if missing or unused:
        kinds = {"missing": missing, "unused": unused}
        raise _mismatch([f"{kind} {_listed(names)}" for kind, names in kinds.items() if names])

    arrays = {name: _to_numpy(tensors[name]) for name in rows}
    # Read off sizes, not shapes, so that an array of the wrong rank is blamed itself.
    width = mode(arrays[name].size for name, (*_, shape) in rows.items() if shape == ("D",))
    named = {shape: name for name, (*_, shape) in rows.items()}
    patch_size = math.isqrt(arrays[named["D", 3, "P", "P"]].size // max(3 * width, 1))
    grid = math.isqrt(max(arrays[named[1, "N", "D"]].size // max(width, 1) - 1, 0))
    sizes = {
        "D": width,
        "3D": 3 * width,
        "4D": 4 * width,
        "P": patch_size,
        "N": grid * grid + 1,
        "L": arrays[named["L",]].size,
    }
    wrong = []
    for name, (_, _, axes, shape) in rows.items():
        shape = tuple(sizes.get(size, size) for size in shape)
        if column == OURS:
            shape = tuple(shape[axis] for axis in axes)
        if arrays[name].shape != shape:
            wrong.append(f"{name} is {arrays[name].shape} and not {shape}")
    if wrong:
        raise _mismatch([_listed(wrong)])
    return [(row[0], row[1], row[2], arrays[name]) for name, row in rows.items()]


def _mismatch(problems):
    problems = "; ".join(problems)
    return UserError(f"these are not weights of the notebook's model: {problems} ({EXPRESSIBLE})")


def _listed(names):
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _to_numpy(value):
    """float32 numpy array of a torch tensor (any device, any float type) or of an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.asarray(value, np.float32)


def _flatten(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
