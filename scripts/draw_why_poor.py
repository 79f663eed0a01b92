"""Plots the accuracy of each arm of why_poor.py.

    python scripts/draw_why_poor.py --table docs/log/why_poor.csv --out docs/why_poor.png

Each row is an arm: a dot per seed, and a line at their mean. The arms mae and teach were prototypes
that are not in the code.
"""

import argparse
import collections
import csv
import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# arm -> (label, color); a color for each of the notebook's five reasons.
LABELS = {
    "base": ("baseline: the notebook's recipe, smaller model", "0.4"),
    "mae": ("1  masked-autoencoder loss", "C0"),
    "teach": ("1  CNN teacher, its training included", "C0"),
    "local": ("2  position bias, token shift, mean pooling", "C1"),
    "stem": ("2  convolutional stem", "C1"),
    "augment": ("3  crop and flip", "C2"),
    "long": ("4  four times as long", "C4"),
    "long_augment": ("3 + 4  crop and flip, four times as long", "C4"),
    "schedule": ("5  linear schedule with warmup", "C3"),
    "lr3e-4": ("5  the notebook's learning rate, 3e-4", "C3"),
    "all": ("2 + 3 + 5", "k"),
    "all_muon": ("2 + 3 + 5 with Muon and EMA", "k"),
    "all_muon_mae": ("the same with the masked-autoencoder loss", "C0"),
    "all_muon_teach": ("the same with the CNN teacher", "C0"),
}


def main():
    """Writes the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=pathlib.Path, required=True, help="CSV of why_poor.py")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    accuracy = collections.defaultdict(list)
    with args.table.open() as file:
        for row in csv.DictReader(file):
            accuracy[row["arm"]].append(100 * float(row["val_accuracy"]))
    arms = [arm for arm in LABELS if arm in accuracy]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(arms) + 1), layout="constrained")
    for y, arm in enumerate(arms):
        values, color = accuracy[arm], LABELS[arm][1]
        axes.plot(values, [y] * len(values), "o", color=color, ms=5, alpha=0.6)
        axes.vlines(np.mean(values), y - 0.35, y + 0.35, color=color, lw=2)
    axes.axvline(np.mean(accuracy["base"]), color="0.4", ls=":", lw=1)
    axes.set_yticks(range(len(arms)), [LABELS[arm][0] for arm in arms])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("accuracy on train[45000:], %")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
