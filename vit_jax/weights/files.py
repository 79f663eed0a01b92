"""Reading weight files (.npz, .safetensors, torch) as flat dicts of numpy arrays.

Pickled code is never executed. Every reader raises UserError, with the file's name, if the file is
missing, corrupted, truncated, or contains anything but arrays.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from vit_jax.errors import UserError

SUFFIXES = (".npz", ".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys under which torch files nest tensors


def read(path):
    """Reads a file by its suffix: (flat dict of float32 arrays, dict of metadata strings)."""
    path, metadata = pathlib.Path(path), {}
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is not a weight file: its name must end in {', '.join(SUFFIXES[:-1])}, or "
            f"{SUFFIXES[-1]}"
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".npz":
        arrays = _read_npz(path)
    elif path.suffix == ".safetensors":
        arrays, metadata = _read_safetensors(path)
    else:
        arrays = _read_torch(path)
    return _as_float32(arrays, path), metadata


def _read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as e:  # zipfile, zlib, and numpy raise many types for corrupted files
        raise UserError(f"{path} is corrupted, or not an .npz of arrays: {_reason(e)}") from e


def _read_safetensors(path):
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return arrays, file.metadata() or {}
    except Exception as e:  # its own exception has no common base class
        raise UserError(f"{path} is corrupted, or not a safetensors file: {_reason(e)}") from e


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
    except Exception as e:  # pickle, zipfile, and torch raise many types
        raise UserError(
            f"{path} is corrupted, or contains more than tensors, and pickled code is never run: "
            f"{_reason(e)}; give a state_dict saved by torch.save"
        ) from e
    for name in _WRAPPERS:
        if isinstance(tensors, Mapping) and isinstance(tensors.get(name), Mapping):
            tensors = tensors[name]
    if not isinstance(tensors, Mapping):
        raise UserError(f"{path} contains a {type(tensors).__name__}: give a state_dict")
    for name, value in tensors.items():
        if not torch.is_tensor(value):
            raise UserError(f"{path}: {name} is not a tensor: give a state_dict")
    # numpy has no bfloat16; float32 represents all of its values.
    return {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in tensors.items()}


def _as_float32(arrays, path):
    if not arrays:
        raise UserError(f"{path} contains no arrays")
    for name, array in arrays.items():
        if array.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise UserError(f"{path}: {name} has type {array.dtype}, which is not a float type")
        if not array.size:
            raise UserError(f"{path}: {name} has shape {array.shape}, which is empty")
        arrays[name] = array.astype(np.float32, copy=False)
    return arrays


def _reason(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__} {lines[0][:150]}".strip()
