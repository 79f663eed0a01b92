"""The 300-epoch CIFAR-10 recipe, on CIFAR-100.

    ./launch.sh python -m vit_jax.main --config configs/cifar100_vit.py --config.num_seeds=3

Not measured.
"""

import pathlib

from vit_jax.config import from_file


def get_config():
    config = from_file(pathlib.Path(__file__).with_name("cifar10_vit_300ep.py"))
    config.data.name = "cifar100"
    config.data.mean = (0.5071, 0.4865, 0.4409)
    config.data.std = (0.2673, 0.2564, 0.2762)
    return config
