"""The benchmark's PyTorch side trains the notebook's model on the notebook's pixels."""

import numpy as np
import pytest

from vit_jax.commands.benchmark.measure import TorchSide
from vit_jax.experiment import make_experiment


@pytest.mark.parametrize("variant", ["written", "eager"])
def test_torch_side_trains_in_a_child_process(torch, tiny_config, variant):
    tiny_config.model.mlp_dim = 4 * tiny_config.model.width
    side = TorchSide(variant, make_experiment(tiny_config))
    try:
        assert f"torch {torch.__version__}" in side.about
        assert side.steps(2) > 0
    finally:
        side.close()


def test_images_are_transformed_as_in_the_notebook(torch, reference):
    from vit_jax.commands.benchmark.torch_side import Images

    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    dataset = Images(images, np.arange(4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    ours = torch.stack([dataset[i][0] for i in range(4)])
    assert torch.equal(ours, reference.transform(images))
    assert [dataset[i][1] for i in range(4)] == [0, 1, 2, 3]
