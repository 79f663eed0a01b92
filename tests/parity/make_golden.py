"""Writes golden.npz: PyTorch's results for a small model, for tests without PyTorch.

    python tests/parity/make_golden.py

The model is the notebook's with 16x16 images, width 32, depth 2, and 4 heads. The file contains
its weights, 3 batches of 16 images and labels, all logits, the loss and gradients of the first
batch, the losses of 50 AdamW steps that cycle through the batches, the transform of every byte, and
quantiles of the initial weights.
"""

from pathlib import Path

import notebook_torch
import numpy as np
import torch

PATH = Path(__file__).with_name("golden.npz")
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
NUM_STEPS = 50
INIT_SEEDS = 64
QUANTILES = 100


def make_inputs():
    """Returns weights without constant tensors and 3 batches, by their names in the file."""
    torch.manual_seed(0)
    model = notebook_torch.lively(notebook_torch.VisionTransformer(**SIZES))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 48).astype(np.int32)
    tint = rng.integers(0, 128, (10, 1, 1, 3))
    images = (rng.integers(0, 128, (48, 16, 16, 3)) + tint[labels]).astype(np.uint8)
    weights = {f"weights/{name}": p.numpy() for name, p in model.state_dict().items()}
    return weights | {"images": images, "labels": labels}


def every_byte():
    """Returns uint8[1, 16, 16, 3]; each channel contains all 256 values."""
    return np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1).reshape(1, 16, 16, 3)


def measure(inputs):
    """Returns PyTorch's results for the inputs, by their names in the file."""
    images, labels = inputs["images"], inputs["labels"]
    model = notebook_torch.VisionTransformer(**SIZES)
    prefix = "weights/"
    model.load_state_dict(
        {k.removeprefix(prefix): torch.tensor(v) for k, v in inputs.items() if k.startswith(prefix)}
    )
    with torch.no_grad():
        logits = model(notebook_torch.transform(images)).numpy()
    loss, gradients = notebook_torch.gradients(model, images[:16], labels[:16])
    optimizer = notebook_torch.make_optimizer(model)
    losses = []
    for i in range(NUM_STEPS):
        rows = slice(i % 3 * 16, i % 3 * 16 + 16)
        losses.append(notebook_torch.train_step(model, optimizer, images[rows], labels[rows]))
    return {
        "transform": notebook_torch.transform(every_byte()).permute(0, 2, 3, 1).numpy().copy(),
        "logits": logits,
        "loss": np.float32(loss),
        **{f"gradients/{name}": g for name, g in gradients.items()},
        "losses": np.array(losses, np.float32),
    }


def initial_quantiles():
    """Returns {"init/NAME": float32[QUANTILES - 1]} of the initial weights of INIT_SEEDS models."""
    pooled = {}
    for seed in range(INIT_SEEDS):
        torch.manual_seed(seed)
        for name, p in notebook_torch.VisionTransformer(**SIZES).state_dict().items():
            pooled.setdefault(name, []).append(p.numpy().ravel())
    levels = np.arange(1, QUANTILES) / QUANTILES
    return {
        f"init/{name}": np.quantile(np.concatenate(values), levels).astype(np.float32)
        for name, values in pooled.items()
    }


def main():
    torch.set_num_threads(2)
    inputs = make_inputs()
    golden = inputs | measure(inputs) | initial_quantiles()
    np.savez_compressed(PATH, torch_version=torch.__version__, **golden)
    print(f"wrote {PATH}, {PATH.stat().st_size:,} bytes, from PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
