"""Tabulates how cost grows with each size of a recipe.

    python scripts/cost_table.py --config RECIPE [--only AXIS ...] [--config.FIELD=VALUE ...]

Changes one size at a time and measures it with `vit-jax benchmark` in a child process. If a step's
time is proportional to its FLOPs, TFLOP/s stays constant along an axis; a row with a lower value
shows where other costs dominate.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# axis -> (values, overrides): {} is the value, {four} is 4 times the value. The first override is
# the axis; the others keep the config valid.
AXES = {
    "image size": ((16, 32, 64), ("model.image_size={}",)),
    "patch size": ((2, 4, 8), ("model.patch_size={}",)),
    "depth": ((2, 6, 12), ("model.depth={}",)),
    "width": ((64, 128, 256, 512), ("model.width={}", "model.mlp_dim={four}")),
    "batch": ((16, 64, 256, 1024), ("batch_size={}",)),
    "split size": ((5000, 50000), ("data.train_split=train[:{}]",)),
}


def measure(arguments):
    """Returns (the benchmark's JSON, "") for these arguments, or (None, error) if it failed."""
    command = [sys.executable, "-m", "vit_jax", "benchmark", "--json", *arguments]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        return None, (child.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(child.stdout.splitlines()[-1]), ""


def main():
    """Prints one row per measurement as it completes."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="name or path")
    parser.add_argument("--only", nargs="+", choices=AXES, default=AXES, help="axes to measure")
    parser.add_argument("--rounds", default="3", help="timed rounds per row (default: 3)")
    args, rest = parser.parse_known_args()
    columns = ("axis", "value", "GFLOP/image", "ms per step", "images/s", "TFLOP/s")
    print(f"| {' | '.join(columns)} | memory, compiler | memory, measured |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for axis in args.only:
        values, flags = AXES[axis]
        for value in values:
            fields = [f"--config.{flag.format(value, four=4 * value)}" for flag in flags]
            recipe = ["--config", args.config, "--rounds", args.rounds]
            r, error = measure([*recipe, *rest, *fields])
            if error:
                print(f"| {axis} | {value} | failed: {error} | | | | | |", flush=True)
                continue
            print(
                f"| {axis} | {value} | {r['gflop_per_image']:.3f} | "
                f"{1e3 * r['seconds_per_step']['median']:,.1f} | {r['images_per_second']:,.0f} | "
                f"{r['tflops_per_second']:.3g} | {r['memory_estimated_bytes'] / 1e6:,.0f} MB | "
                f"{r['memory_peak_bytes'] / 1e6:,.0f} MB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
