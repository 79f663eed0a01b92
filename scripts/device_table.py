"""Trains one small model on many arrangements of devices and tabulates how the losses differ.

    ./launch.sh python scripts/device_table.py
    ./launch.sh python scripts/device_table.py --dtype bfloat16

Uses virtual CPU devices, and processes over loopback. Crop, flip, mixup, and cutmix are on, and the
last batch of an epoch is not full. Each row runs the train command.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

from vit_jax.workdir import read_lines

ROOT = pathlib.Path(__file__).parents[1]
MICROBATCHES = ["--config.accumulate_steps=4", "--config.model.remat=true"]
STREAMED = ["--config.data.streaming=true", "--config.data.streaming_threads=2"]
ROWS = [  # devices, processes, mode, overrides
    (1, 1, "data parallel", []),
    (2, 1, "data parallel", []),
    (4, 1, "data parallel", []),
    (8, 1, "data parallel", []),
    (2, 1, "fsdp 2", ["--config.mesh.fsdp=2"]),
    (4, 1, "fsdp 4", ["--config.mesh.fsdp=4"]),
    (8, 1, "data 2 x fsdp 4", ["--config.mesh.fsdp=4"]),
    (1, 1, "4 microbatches, remat", MICROBATCHES),
    (8, 1, "fsdp 8, 4 microbatches, remat", ["--config.mesh.fsdp=8", *MICROBATCHES]),
    (1, 1, "streamed", STREAMED),
    (
        8,
        1,
        "data 2 x fsdp 4, streamed, 4 microbatches, remat",
        ["--config.mesh.fsdp=4", *MICROBATCHES, *STREAMED],
    ),
    (2, 2, "data parallel", []),
    (8, 2, "data 2 x fsdp 4", ["--config.mesh.fsdp=4"]),
    (4, 4, "data parallel", []),
    (4, 4, "fsdp 4", ["--config.mesh.fsdp=4"]),
    (4, 4, "data 2 x fsdp 2, streamed", ["--config.mesh.fsdp=2", *STREAMED]),
]


def write_images(folder):
    """Writes 90 training and 30 test images of 16x16 pixels in three classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for label, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 150, (16, 16, 3), dtype=np.uint8)
                image[..., label] += 80
                Image.fromarray(image).save(folder / split / name / f"{i}.png")


def train(folder, index, steps, dtype):
    """Trains the arrangement of row `index`, and returns the loss of each step."""
    devices, processes, _, overrides = ROWS[index]
    workdir = folder / f"row{index}"
    arguments = [
        "--config.data.name=folder:" + str(folder / "data"),
        "--config.batch_size=16",
        f"--config.steps={steps}",
        "--config.log_every=1 step",
        "--config.tensorboard=false",
        f"--config.model.dtype={dtype}",
        "--config.model.width=32",
        "--config.model.depth=2",
        "--config.model.mlp_dim=128",
        "--config.augment.crop=pad",
        "--config.augment.crop_padding=2",
        "--config.augment.flip=random",
        "--config.augment.mixup_alpha=0.8",
        "--config.augment.cutmix_alpha=1",
        "--config.optim.peak_lr=1e-3",
        *overrides,
    ]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    running = []
    for i in range(processes):
        process = {
            "COORDINATOR": f"127.0.0.1:{port}",
            "NUM_PROCESSES": str(processes),
            "PROCESS_ID": str(i),
        }
        main = [sys.executable, "-m", "vit_jax.main", "--config", "configs/cifar10_vit.py"]
        with open(folder / f"row{index}_{i}.txt", "w") as log:
            running.append(
                subprocess.Popen(
                    [*main, "--workdir", str(workdir), *arguments],
                    cwd=ROOT,
                    env=environment | process,
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        codes = [p.wait(timeout=600) for p in running]
    finally:
        for p in running:
            p.kill()
    if any(codes):
        # An exit code above 0 is the cause; a signal is often its consequence.
        failed = max(range(processes), key=lambda i: (codes[i] > 0, codes[i] < 0))
        sys.exit((folder / f"row{index}_{failed}.txt").read_text())
    lines = read_lines(workdir / "metrics.jsonl")
    return np.array([values["train/loss"] for _, values in lines if "train/loss" in values])


def main():
    """Prints one row per arrangement as it completes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="steps per row (default: 20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        choices=range(len(ROWS)),
        default=range(len(ROWS)),
        metavar="ROW",
        help="rows to train; differences are from the first (default: all)",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_images(folder / "data")
        print(f"| devices | processes | mode | loss after {args.steps} steps | difference |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        losses = []
        for index in args.rows:
            devices, processes, mode, _ = ROWS[index]
            losses.append(train(folder, index, args.steps, args.dtype))
            last, difference = losses[-1][-1], losses[-1][-1] - losses[0][-1]
            row = f"| {devices} | {processes} | {mode} | {last:.7f} | {difference:+.1e} |"
            print(row, flush=True)
        for steps in {min(10, args.steps), args.steps}:
            largest = np.abs(np.array(losses) - losses[0])[:, :steps].max()
            print(f"\nLargest difference at any of the first {steps} steps: {largest:.1e}")


if __name__ == "__main__":
    main()
