"""The notebook's follow-up: crop and flip, 50 epochs.

    ./launch.sh python -m vit_jax.main --config configs/cifar10_vit_improved.py

Not measured. The follow-up reports a test accuracy of 76.23% (one run, PyTorch). A cosine schedule
changes the learning rate once per epoch. Matrix products are float32, as in the notebook's recipe.
"""

import pathlib

from vit_jax.config import from_file


def get_config():
    config = from_file(pathlib.Path(__file__).with_name("cifar10_vit.py"))
    config.batch_size = 128
    config.epochs = 50
    config.augment.crop = "pad"
    config.augment.crop_padding = 4
    config.augment.crop_padding_mode = "zero"
    config.augment.flip = "random"
    config.optim.schedule = "cosine"
    config.optim.schedule_per = "epoch"
    return config
