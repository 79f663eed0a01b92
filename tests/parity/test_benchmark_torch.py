"""The benchmark's PyTorch side trains the notebook's model on the notebook's pixels."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.commands.benchmark.torch_side import TorchSide
from vit_jax.experiment import make_experiment


@pytest.mark.parametrize("variant", ["written", "eager"])
def test_torch_side_trains_in_a_child_process(torch, tiny_config, variant):
    tiny_config.model.mlp_dim = 4 * tiny_config.model.width
    tiny_config.optim.peak_lr = 3e-4
    assert TorchSide(variant, make_experiment(tiny_config)).steps(2) > 0


def test_images_are_transformed_as_in_the_notebook(torch, reference):
    from vit_jax.commands.benchmark.notebook_torch import transform_one

    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    ours = torch.stack([transform_one(Image.fromarray(image)) for image in images])
    assert torch.equal(ours, reference.transform(images))
