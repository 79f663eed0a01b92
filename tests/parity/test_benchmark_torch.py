"""The benchmark's PyTorch side trains the notebook's model."""

import numpy as np
import pytest

from vit_jax.commands.benchmark.torch_side import TorchSide
from vit_jax.experiment import make_experiment


def test_torch_side_trains_in_a_child_process(torch, tiny_config):
    tiny_config.model.mlp_dim = 4 * tiny_config.model.width
    tiny_config.optim.peak_lr = 3e-4
    assert TorchSide("written", make_experiment(tiny_config)).time_steps(2) > 0


@pytest.mark.parametrize("variant", ["written", "eager"])
def test_torch_side_computes_at_the_precision_of_the_model(torch, monkeypatch, variant):
    from vit_jax.commands.benchmark import notebook_torch

    monkeypatch.setattr(notebook_torch.TransformerBlock, "need_weights", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32)
    sizes = {"img_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    for tf32, precision in ((True, "high"), (False, "highest")):
        next(notebook_torch.train(variant, images, labels, sizes, 4, "cpu", False, tf32))
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == tf32
