"""Trains a plain ViT with patch size 4 on CIFAR-10 for 300 epochs.

    ./launch.sh python -m vit_jax.main --config configs/cifar10_vit_300ep.py --config.num_seeds=3

Target: at least 95% test accuracy, on one data-center GPU (best verified result of others: 93.58%).
docs/results.md lists measurements.
"""

import pathlib

from vit_jax.config import from_file


def get_config():
    config = from_file(pathlib.Path(__file__).with_name("cifar10_vit_100ep.py"))
    config.epochs = 300
    config.save_every = "10 epochs"

    config.model.drop_path = 0.1

    config.augment.randaugment_magnitude = 9.0
    config.augment.erasing_prob = 0.25
    config.augment.mix_prob = 1.0
    config.augment.mix_off_last = "40%"

    config.optim.warmup = "10 epochs"
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.06
    config.optim.ema_decay = 0.9998
    return config
