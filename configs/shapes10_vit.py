"""The embedded default: a small ViT on shapes10, our own drawn images. Needs no download.

    ./launch.sh python -m vit_jax.main --config configs/shapes10_vit.py

Expected: test accuracy above 95% in two to four minutes on two CPU cores (docs/results.md).
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
