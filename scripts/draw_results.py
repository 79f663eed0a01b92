"""Plots training losses of the notebook's recipe, and test accuracy against training compute.

    python scripts/draw_results.py --out docs/results.png

Our runs are in docs/log/runs, the notebook's losses in docs/log/notebook_losses.csv, and the other
systems in docs/log/cifar10_systems.csv.
"""

import argparse
import csv
import json
import pathlib

import matplotlib
import numpy as np

from vit_jax import config
from vit_jax.model import make_model, train_flops_per_image
from vit_jax.workdir import read_lines

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOG = pathlib.Path(__file__).parents[1] / "docs" / "log"
# Runs on CIFAR-10's 50,000 images: directory in docs/log/runs, with one run or one per seed ->
# (recipe, label).
RUNS = {
    "notebook_20ep": ("cifar10_vit", "cifar10_vit"),
    "cifar10_vit_cpu": ("cifar10_vit_cpu", "cifar10_vit_cpu, 30 min, three seeds"),
    "cifar10_vit_cpu_long": ("cifar10_vit_cpu_long", "cifar10_vit_cpu_long, 1.6 h, one seed"),
    "cifar10_vit_cpu_6ep": ("cifar10_vit_cpu", "an earlier version, 14 min"),
}


def epoch_losses(path):
    """Returns the mean loss of each epoch in a metrics.jsonl."""
    return [values["epoch/loss"] for _, values in read_lines(path) if "epoch/loss" in values]


def compute(recipe, epochs):
    """Returns the training compute of a run in PFLOP; see `train_flops_per_image`."""
    model = make_model(config.from_file(recipe).model, num_classes=10)
    return train_flops_per_image(model, (32, 32, 3)) * 50_000 * epochs / 1e15


def draw_losses(axes):
    """Plots the training loss of the notebook and of vit_jax."""
    ours = epoch_losses(LOG / "runs" / "notebook_20ep" / "metrics.jsonl")
    with (LOG / "notebook_losses.csv").open() as file:
        notebook = [float(row["loss"]) for row in csv.DictReader(file)]
    axes.plot(range(1, 21), notebook, "o-", color="0.4", ms=4, label="the notebook (PyTorch)")
    axes.plot(range(1, len(ours) + 1), ours, "s-", color="C3", ms=4, label="vit_jax, seed 0")
    axes.set(xlabel="epoch", ylabel="mean training loss", title="The notebook's recipe")
    axes.set_xticks(range(0, 21, 4))
    axes.set_ylim(bottom=0)
    axes.legend()


def draw_accuracy(axes):
    """Plots test accuracy against training compute for published systems and for our runs."""
    with (LOG / "cifar10_systems.csv").open() as file:
        systems = list(csv.DictReader(file))
    for name, (recipe, label) in RUNS.items():
        paths = (LOG / "runs" / name).rglob("result.json")
        results = [json.loads(path.read_text()) for path in paths]
        accuracy = 100 * np.mean([result["test_accuracy"] for result in results])
        pflop = compute(recipe, results[0]["epochs"])
        systems.append(
            dict(system=label, kind="vit_jax", pflop=pflop, accuracy=accuracy, epoch="last")
        )
    styles = {"vit_jax": ("C3", "s"), "ViT": ("C0", "o"), "CNN": ("0.5", "^")}
    for system in systems:
        color, marker = styles[system["kind"]]
        face = color if system["epoch"] == "last" else "white"
        x, y = float(system["pflop"]), float(system["accuracy"])
        axes.plot(x, y, marker, color=color, mfc=face, ms=6)
        if system["kind"] == "vit_jax":
            axes.annotate(
                system["system"], (x, y), (6, -10), textcoords="offset points", fontsize=8
            )
    for label, kind, face in (
        ("vit_jax, last epoch", "vit_jax", "C3"),
        ("ViT, last epoch", "ViT", "C0"),
        ("ViT, best test epoch, or not stated", "ViT", "white"),
        ("CNN", "CNN", "0.5"),
    ):
        color, marker = styles[kind]
        axes.plot([], [], marker, color=color, mfc=face, label=label)
    axes.set_xscale("log")
    axes.set(xlabel="training compute, PFLOP", ylabel="test accuracy, %")
    axes.set_title("From scratch on CIFAR-10")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)


def main():
    """Writes the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_losses(left)
    draw_accuracy(right)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
