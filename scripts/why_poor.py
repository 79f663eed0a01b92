"""Measures how much it helps to address each of the notebook's reasons for its low accuracy.

    taskset -c 0 python scripts/why_poor.py --workdir D

Each arm makes one change to a baseline, the notebook's recipe with a smaller model. All arms train
for the same time on one core: the number of steps is the measured throughput times --seconds. The
final weights are evaluated on `train[45000:]`, and the rest is the training data. Rerun the command
to resume. Writes D/why_poor.csv, which draw_why_poor.py plots.
"""

import argparse
import csv
import json
import os
import pathlib
import subprocess
import sys

from vit_jax.errors import UserError, run_command

ROOT = pathlib.Path(__file__).parents[1]
BATCH_SIZE = 64
# The notebook's settings, except for the size of the model and a larger learning rate.
BASE = {
    "batch_size": BATCH_SIZE,
    "data.train_split": "train[:45000]",
    "data.val_split": "train[45000:]",
    "data.test_split": "",
    "model.pool": "cls",
    "model.position_bias": "none",
    "model.token_shift": False,
    "model.stem": "patch",
    "augment.crop": "none",
    "augment.flip": "none",
    "optim.name": "adamw",
    "optim.peak_lr": 1e-3,
    "optim.schedule": "constant",
    "optim.warmup": "",
    "optim.weight_decay": 1e-4,
    "optim.grad_clip_norm": 0.0,
    "optim.ema_decay": 0.0,
    "eval_every": "",
    "save_every": "",
}
AUGMENT = {"augment.crop": "pad", "augment.flip": "alternating"}
STEM = {"model.stem": "conv"}
LOCAL = {"model.position_bias": "gaussian", "model.token_shift": True, "model.pool": "gap"}
SCHEDULE = {"optim.schedule": "linear", "optim.warmup": "10%"}
MUON = {
    "optim.name": "muon",
    "optim.peak_lr": 2e-3,
    "optim.weight_decay": 0.05,
    "optim.grad_clip_norm": 1.0,
    "optim.ema_decay": 0.99,
}
ALL = SCHEDULE | AUGMENT | STEM | LOCAL
# arm -> (changed fields, factor on the training time, arm with the same throughput)
ARMS = {
    "base": ({}, 1, "base"),
    "local": (LOCAL, 1, "local"),
    "stem": (STEM, 1, "stem"),
    "augment": (AUGMENT, 1, "augment"),
    "long": ({}, 4, "base"),
    "long_augment": (AUGMENT, 4, "augment"),
    "schedule": (SCHEDULE, 1, "base"),
    "lr3e-4": ({"optim.peak_lr": 3e-4}, 1, "base"),
    "all": (ALL, 1, "all"),
    "all_muon": (ALL | MUON, 1, "all_muon"),
}
ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def train(workdir, fields):
    """Trains the CPU recipe with these fields on one core and returns its result."""
    if not (workdir / "result.json").exists():
        overrides = [f"--config.{name}={value}" for name, value in (BASE | fields).items()]
        command = [sys.executable, "-m", "vit_jax.main", "--config", "cifar10_vit_cpu"]
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{workdir}.log", "a") as log:
            subprocess.run(
                [*command, "--workdir", str(workdir), *overrides],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": ONE_CORE},
                stdout=log,
                stderr=log,
                check=True,
            )
    result = json.loads((workdir / "result.json").read_text())
    if result["steps"] != fields["steps"]:
        raise UserError(
            f"{workdir} has {result['steps']} steps, not {fields['steps']}: use another --workdir"
        )
    return result


def main():
    """Measures throughput, trains, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="directory of the runs")
    parser.add_argument("--seconds", type=float, default=150, help="time of an arm (default: 150)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm (default: 3)")
    args = parser.parse_args()
    workdir = args.workdir.resolve()
    # The faster of two runs, with the other arms between them, is the less disturbed one.
    speeds = {}
    for repeat in range(2):
        for name in dict.fromkeys(like for _, _, like in ARMS.values()):
            fields = ARMS[name][0] | {"seed": repeat, "steps": 120}
            result = train(workdir / "speed" / f"{name}-{repeat}", fields)
            speeds[name] = max(speeds.get(name, 0), result["images_per_second"])
    rows = []
    for arm, (fields, times, like) in ARMS.items():
        steps = int(times * args.seconds * speeds[like] / BATCH_SIZE)
        for seed in range(args.seeds):
            result = train(workdir / f"{arm}-{seed}", fields | {"seed": seed, "steps": steps})
            columns = ("steps", "seconds", "train_loss", "val_accuracy")
            rows.append({"arm": arm, "seed": seed, **{c: result[c] for c in columns}})
            print(*rows[-1].values(), flush=True)
            with (workdir / "why_poor.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    run_command(main)
