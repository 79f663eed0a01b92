"""Trains the notebook's model in PyTorch and in JAX from the same weights, on the same batches.

    python scripts/paired_epochs.py --epochs 3 --out OUT

Both sides start from the JAX initialization of `cifar10_vit` (see `--config.seed`) and visit the
examples in the same order. Writes OUT/paired_epochs.json, a table, and a picture of both loss
curves, after each epoch, and prints the table. PyTorch runs the notebook's own classes and AdamW.
On two CPU cores, both sides together take about half an hour per epoch of CIFAR-10.
"""

import argparse
import json
import pathlib
import sys

import jax
import numpy as np
import torch

from vit_jax import config as config_lib
from vit_jax.commands.benchmark import notebook_torch
from vit_jax.commands.benchmark.torch_side import notebook_arguments
from vit_jax.errors import UserError, run_command
from vit_jax.experiment import make_experiment
from vit_jax.weights import params_to_notebook


def train_both(experiment):
    """Yields {"jax": [loss per step], "torch": [loss per step]} for each epoch."""
    state = experiment.init()
    torch_model = notebook_torch.VisionTransformer(**notebook_arguments(experiment))
    torch_model.load_state_dict(params_to_notebook(jax.device_get(state.params)), strict=True)
    optimizer = notebook_torch.make_optimizer(torch_model)
    losses = {"jax": [], "torch": []}
    for step, inputs in experiment.batches():
        state, metrics = experiment.train_step(state, *inputs)
        losses["jax"].append(float(metrics["loss"]))
        batch = experiment.stored_batch(step, experiment.config.seed)
        loss = notebook_torch.train_step(torch_model, optimizer, batch["image"], batch["label"])
        losses["torch"].append(loss)
        if step % 100 == 0:
            print(f"step {step}: {losses['jax'][-1]:.6f}, {loss:.6f}", file=sys.stderr, flush=True)
        if experiment.plan.ends_epoch(step):
            yield losses
            losses = {"jax": [], "torch": []}


def table(epochs):
    """Yields a markdown table: mean loss of each epoch on both sides, and largest differences."""
    yield "| epoch | JAX | PyTorch | difference of the means | largest difference of a step |"
    yield "|---|---|---|---|---|"
    for i, losses in enumerate(epochs, 1):
        ours, theirs = np.array(losses["jax"]), np.array(losses["torch"])
        means = ours.mean(), theirs.mean()
        yield (
            f"| {i} | {means[0]:.4f} | {means[1]:.4f} | {abs(means[0] - means[1]):.1e} | "
            f"{np.abs(ours - theirs).max():.1e} |"
        )


def draw(epochs, path):
    """Draws both loss curves, averaged over 20 steps, and their difference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours, theirs = (np.concatenate([e[side] for e in epochs]) for side in ("jax", "torch"))
    figure, (top, bottom) = plt.subplots(
        2, sharex=True, figsize=(7, 5), height_ratios=(2, 1), layout="constrained"
    )
    window = np.ones(20) / 20
    for name, losses, line in (("PyTorch", theirs, "-"), ("JAX", ours, "--")):
        smooth = np.convolve(losses, window, mode="valid")
        top.plot(np.arange(len(smooth)) + len(window), smooth, line, label=name)
    top.set_ylabel("loss, mean of 20 steps")
    top.legend()
    bottom.semilogy(np.arange(1, len(ours) + 1), np.maximum(np.abs(ours - theirs), 1e-9), lw=0.5)
    bottom.set_ylabel("difference of a step")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=130)


def main():
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--epochs", type=int, default=3, help="number of epochs (default: 3)")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to write")
    args, rest = parser.parse_known_args()
    if args.epochs < 1:
        raise UserError(f"--epochs must be at least 1; got {args.epochs}")
    config = config_lib.from_file("cifar10_vit")
    config.epochs = float(args.epochs)
    config_lib.override(config, rest, "--epochs, --out")
    torch.manual_seed(config.seed)
    experiment = make_experiment(config)
    args.out.mkdir(parents=True, exist_ok=True)
    path, epochs = args.out / "paired_epochs.json", []
    for losses in train_both(experiment):
        epochs.append(losses)
        lines = list(table(epochs))
        path.write_text(json.dumps({"epochs": epochs}) + "\n")
        (args.out / "paired_epochs.md").write_text("\n".join(lines) + "\n")
        draw(epochs, args.out / "paired_epochs.png")
        print(lines[-1], flush=True)
    print(*table(epochs), sep="\n")


if __name__ == "__main__":
    run_command(main)
