"""The default recipe: a small ViT on synthetic images.

    ./launch.sh python -m vit_jax.main --config configs/shapes10_vit.py

Measured: 99.05% in 2 min on two CPU cores. This package generates the dataset, shapes10, so
nothing is downloaded. docs/results.md has the command and the hardware.
"""

from vit_jax.config import defaults


def get_config():
    config = defaults()
    config.batch_size = 100
    config.epochs = 8
    config.data.name = "shapes10"
    config.data.val_split = ""

    config.model.patch_size = 8
    config.model.width = 96
    config.model.depth = 4
    config.model.num_heads = 4
    config.model.mlp_dim = 192
    config.model.pool = "gap"
    config.model.weight_init = "pytorch"

    config.optim.peak_lr = 2e-3
    config.optim.warmup = "100 steps"
    config.optim.weight_decay = 1e-4
    return config
