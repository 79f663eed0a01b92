"""Trains the notebook's model in PyTorch from PyTorch's own initial weights.

    python scripts/notebook_epochs.py --seed 1 --epochs 4

The seed determines the initial weights and the order of the examples, as in the notebook. Prints
the mean training loss of each epoch. On one CPU core, an epoch takes about twenty minutes.
"""

import argparse
import itertools

import torch

from vit_jax import config as config_lib
from vit_jax.commands.benchmark import notebook_torch
from vit_jax.commands.benchmark.torch_side import notebook_arguments
from vit_jax.errors import run_command
from vit_jax.experiment import make_experiment


def main():
    """Trains and prints the losses."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=int, default=0, help="torch.manual_seed (default: 0)")
    parser.add_argument("--epochs", type=int, default=4, help="number of epochs (default: 4)")
    args = parser.parse_args()
    experiment = make_experiment(config_lib.from_file("cifar10_vit"))
    torch.manual_seed(args.seed)
    losses = notebook_torch.train(
        "written",
        experiment.train.images,
        experiment.train.labels,
        notebook_arguments(experiment),
        experiment.config.batch_size,
        device="cpu",
        bfloat16=False,
        tf32=False,
    )
    steps = experiment.plan.steps_per_epoch
    for epoch in range(1, args.epochs + 1):
        mean = sum(itertools.islice(losses, steps)) / steps
        print(f"epoch {epoch}: mean loss {mean:.4f}", flush=True)


if __name__ == "__main__":
    run_command(main)
