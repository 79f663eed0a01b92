"""Weight files (.npz, .safetensors, torch) read as flat dicts of float32 arrays."""

import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors

from vit_jax.errors import UserError

_SUFFIXES = (".npz", ".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys under which torch files nest tensors


def read(path):
    """Reads a file by its suffix: (flat dict of float32 arrays, dict of metadata strings).

    Raises UserError, with the file's name, if it is missing or corrupted, or contains anything but
    arrays of floats.
    """
    path, metadata = pathlib.Path(path), {}
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path} is not a weight file: it must end in {', '.join(_SUFFIXES)}")
    torch = path.suffix not in (".npz", ".safetensors") and import_torch(f"reading {path}")
    try:
        if torch:
            arrays = torch.load(path, weights_only=True, map_location="cpu")
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        else:
            with safetensors.safe_open(path, framework="np") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
    except Exception as e:  # the libraries raise many types, some without a common base class
        reason = str(e).strip().partition("\n")[0]
        raise UserError(
            f"{path} is corrupted, or contains more than arrays, and pickled code is never run: "
            f"{type(e).__name__} {reason:.150}"
        ) from e
    for name in _WRAPPERS:
        if isinstance(arrays, Mapping) and isinstance(arrays.get(name), Mapping):
            arrays = arrays[name]
    return to_float32(arrays, path), metadata


def to_float32(tensors, where):
    """Converts {name: torch tensor or numpy array of any float type} to float32 arrays."""
    if not isinstance(tensors, Mapping):
        raise UserError(f"{where} must be a state_dict, got {type(tensors).__name__}")
    arrays = {}
    for name, value in tensors.items():
        kind = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
        if "float" not in kind:
            raise UserError(f"{where}: {name} has type {kind}, which is not a float type")
        if hasattr(value, "detach"):  # numpy has no bfloat16; float32 represents all of its values
            value = value.detach().cpu().float().numpy()
        arrays[str(name)] = np.asarray(value, np.float32)
    return arrays


def import_torch(purpose):
    """Returns the module torch. Raises UserError if it is not installed."""
    try:
        import torch
    except ImportError as e:
        raise UserError(f"{purpose} needs PyTorch: pip install torch, or use a .safetensors") from e
    return torch
