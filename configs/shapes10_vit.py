"""The default recipe: a small ViT on shapes10, an embedded dataset of drawn images.

    ./launch.sh python -m vit_jax.main --config configs/shapes10_vit.py

It needs no download. Expected test accuracy: above 95% in two to four minutes on two CPU cores;
docs/results.md lists measurements.
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
