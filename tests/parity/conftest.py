"""Fixtures of the parity tests.

Tests that need PyTorch use the fixture `torch` or `reference`. Without PyTorch they are skipped,
and only the golden file is checked; with VIT_JAX_REQUIRE_TORCH=1, as in CI, they fail instead.
"""

import importlib.util
import os
import sys

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def torch(require):
    """The torch module, on two threads."""
    there = importlib.util.find_spec("torch") is not None
    require("torch", there, "PyTorch is not installed: only the golden file is checked")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve a shared machine
    module = importlib.import_module("torch")
    module.set_num_threads(2)
    return module


@pytest.fixture(scope="session")
def torchvision(torch, require):
    """The torchvision module, which transformers imports if it is installed."""
    there = importlib.util.find_spec("torchvision") is not None
    require("torch", there, "torchvision is not installed: pip install 'vit-jax[parity]'")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # its compiled operators are for another PyTorch; a ViT uses none
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}() -> ()")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        return importlib.import_module("torchvision")


@pytest.fixture(scope="session")
def transformers(torch, torchvision, require):
    """The transformers module; tests/weights checks its layout without it."""
    there = importlib.util.find_spec("transformers") is not None
    require("torch", there, "transformers is not installed: pip install 'vit-jax[parity]'")
    os.environ["HF_HUB_OFFLINE"] = "1"
    return importlib.import_module("transformers")


@pytest.fixture(scope="session")
def reference(torch):
    """The notebook's model in PyTorch."""
    return importlib.import_module("notebook_torch")


@pytest.fixture(scope="module", autouse=True)
def full_float32(optimized):
    """Full float32 in matrix products; accelerators use TF32 or bf16 by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def split():
    """(uint8[208, 32, 32, 3], int32[208]): noise tinted by class; 3 batches of 64, and 16."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 208).astype(np.int32)
    tint = rng.integers(0, 128, (10, 1, 1, 3))
    images = rng.integers(0, 128, (208, 32, 32, 3)) + tint[labels]
    return images.astype(np.uint8), labels
