"""The wider ViT, RandAugment, CutMix, 100 epochs.

    ./launch.sh python -m vit_jax.main --config configs/cifar10_vit_100ep.py --config.num_seeds=3

Not measured. Expected test accuracy: 92 to 94% (an estimate), on one data-center GPU.
CutMix without mixup: in PoorViTs's ablation of a ViT on CIFAR-10, mixup made no difference.
"""

import pathlib

from vit_jax.config import from_file


def get_config():
    config = from_file(pathlib.Path(__file__).with_name("cifar10_vit_20ep.py"))
    config.batch_size = 256
    config.epochs = 100
    config.save_every = "5 epochs"

    # Not the convolutional stem: docs/log/experiments.md, "The convolutional stem".
    config.model.stem = "patch"
    config.model.drop_path = 0.05

    config.augment.policy = "randaugment"
    config.augment.randaugment_num_ops = 2
    config.augment.randaugment_magnitude = 7.0
    config.augment.randaugment_magnitude_std = 0.5
    config.augment.erasing_prob = 0.1
    config.augment.cutmix_alpha = 1.0
    config.augment.mix_prob = 0.5
    config.augment.mix_off_last = "15%"

    config.optim.schedule = "cosine"
    config.optim.end_lr = 1e-5
    config.optim.warmup = "5 epochs"
    config.optim.b2 = 0.99
    config.optim.ema_decay = 0.9995
    return config
