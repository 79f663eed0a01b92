"""A small ViT on CIFAR-10 for two CPU cores, 12 epochs.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        ./launch.sh python -m vit_jax.main --config configs/cifar10_vit_cpu.py

Measured: 86.47% in 30 min on two CPU cores. This is the mean of three seeds; docs/results.md has
the hardware. The flag splits the CPU into two virtual devices, which were 10 to 20% faster than one
on two cores.
"""

from vit_jax.config import defaults


def get_config():
    config = defaults()
    config.batch_size = 64
    config.epochs = 12
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)

    config.model.patch_size = 4
    config.model.width = 96
    config.model.depth = 4
    config.model.num_heads = 3
    config.model.mlp_dim = 192
    config.model.pool = "gap"
    config.model.position_bias = "gaussian"
    config.model.token_shift = True
    config.model.stem = "conv"
    config.model.weight_init = "pytorch"  # trunc_normal(0.02) is too small for this width

    config.augment.crop = "pad"
    config.augment.crop_padding = 2
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
