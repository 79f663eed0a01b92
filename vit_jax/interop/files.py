"""Weight files to flat dicts of numpy arrays: .npz, .safetensors, torch. No pickle is executed.

Each reader raises UserError, with the file's name, for a file that is absent, damaged, truncated,
or holds anything but arrays.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from vit_jax.errors import UserError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".npz", ".safetensors", *TORCH_SUFFIXES)
_WRAPPERS = ("model", "state_dict", "model_state_dict")  # what published torch files nest them in


def read(path):
    """(flat dict of arrays, metadata dict of texts) of a file, by its suffix."""
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no weight file by its name: it should end in {_any(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".npz":
        return _read_npz(path), {}
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path), {}


def _read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as e:  # zipfile, zlib and numpy raise many kinds for damaged files
        raise UserError(f"{path} is damaged, or no .npz of arrays: {_reason(e)}") from e
    return _checked(arrays, path)


def _read_safetensors(path):
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except Exception as e:  # its own exception is no subclass of a common one
        raise UserError(f"{path} is damaged, or no safetensors file: {_reason(e)}") from e
    return _checked(arrays, path), metadata


def _read_torch(path):
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"reading {path} needs PyTorch, which is not installed: pip install torch, or convert "
            "the file to .safetensors"
        ) from e
    try:
        tensors = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as e:  # pickle, zipfile and torch raise many kinds
        raise UserError(
            f"{path} is damaged, or holds more than tensors, and pickled code is never run: "
            f"{_reason(e)}; give a state_dict saved by torch.save"
        ) from e
    for name in _WRAPPERS:
        if isinstance(tensors, Mapping) and isinstance(tensors.get(name), Mapping):
            tensors = tensors[name]
    if not isinstance(tensors, Mapping):
        raise UserError(f"{path} holds a {type(tensors).__name__}: give a state_dict")
    other = [str(name) for name, value in tensors.items() if not torch.is_tensor(value)]
    if other:
        raise UserError(f"{path}: {other[0]} is no tensor: give a state_dict")
    # numpy has no bfloat16, and float32 holds every one of its values.
    return _checked(
        {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in tensors.items()}, path
    )


def _checked(arrays, path):
    """The arrays as float32, where they are of a float type."""
    if not arrays:
        raise UserError(f"{path} holds no arrays")
    for name, array in arrays.items():
        if array.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise UserError(f"{path}: {name} is of type {array.dtype}, not of a float type")
        arrays[name] = array.astype(np.float32, copy=False)
    return arrays


def _reason(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__} {lines[0][:150]}".strip()


def _any(names):
    return f"{', '.join(names[:-1])} or {names[-1]}"
