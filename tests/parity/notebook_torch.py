"""The notebook in PyTorch, and two helpers of the parity tests."""

import torch
from torch import nn

from vit_jax.commands.benchmark.notebook_torch import (
    VisionTransformer,
    make_optimizer,
    train_step,
    transform,
)

__all__ = ["VisionTransformer", "gradients", "lively", "make_optimizer", "train_step", "transform"]


def gradients(model, images, labels):
    """Returns (loss, {parameter name: float32 numpy gradient}) of one batch."""
    model.zero_grad()
    loss = nn.CrossEntropyLoss()(model(transform(images)), torch.from_numpy(labels).long())
    loss.backward()
    return loss.item(), {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def lively(model, seed=0):
    """Adds noise to every constant initial weight (zeros, ones), in place.

    With zero embeddings and biases, a port that omits them would pass.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.unique().numel() == 1:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model
