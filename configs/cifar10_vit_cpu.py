"""A small ViT on CIFAR-10 for two CPU cores, 12 epochs.

    ./launch.sh python -m vit_jax.main --config configs/cifar10_vit_cpu.py

Measured: 80.09% in 33 min on two CPU cores. The machine was busy, and the run took 52 core-minutes
(one seed); docs/results.md has the command and the hardware.
"""

from vit_jax.config import defaults


def get_config():
    config = defaults()
    config.batch_size = 128
    config.epochs = 12
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)

    config.model.patch_size = 4
    config.model.width = 96
    config.model.depth = 4
    config.model.num_heads = 3
    config.model.mlp_dim = 192
    config.model.pool = "gap"
    config.model.stem = "conv"
    config.model.weight_init = "pytorch"  # trunc_normal(0.02) is too small for this width

    config.augment.crop = "pad"
    config.augment.crop_padding_mode = "reflect"
    config.augment.flip = "alternating"

    config.optim.name = "muon"
    config.optim.peak_lr = 2e-3
    config.optim.schedule = "linear"
    config.optim.warmup = "1 epoch"
    config.optim.weight_decay = 0.05
    config.optim.grad_clip_norm = 1.0
    config.optim.ema_decay = 0.998
    return config
