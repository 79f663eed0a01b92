"""The benchmark's PyTorch side trains the notebook's model."""

import pytest

from vit_jax.commands.benchmark.torch_side import TorchSide
from vit_jax.experiment import make_experiment


@pytest.mark.parametrize("variant", ["written", "eager"])
def test_torch_side_trains_in_a_child_process(torch, tiny_config, variant):
    tiny_config.model.mlp_dim = 4 * tiny_config.model.width
    tiny_config.optim.peak_lr = 3e-4
    assert TorchSide(variant, make_experiment(tiny_config)).steps(2) > 0
