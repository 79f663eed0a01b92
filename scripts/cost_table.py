"""How cost grows: python scripts/cost_table.py --config F [--only AXIS...] [--config.X=Y].

Changes one size of a recipe at a time, measures each by `vit_jax.benchmark` in a process of its
own, and prints a table. The expected law: a step's time is its arithmetic over one rate, so TFLOP/s
stays as it is; a row where it falls is where the law breaks.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# axis -> values; {} in a flag is the value. The first flag is the axis, others keep it valid.
AXES = {
    "image size": ((16, 32, 64), ("model.image_size={}",)),
    "patch size": ((2, 4, 8), ("model.patch_size={}",)),
    "depth": ((2, 6, 12), ("model.depth={}",)),
    "width": ((64, 128, 256, 512), ("model.width={}", "model.mlp_dim={four}")),
    "batch": ((16, 64, 256, 1024), ("batch_size={}",)),
    "split size": ((5000, 50000), ("data.train_split=train[:{}]",)),
}


def measure(arguments):
    """The benchmark's JSON for these arguments, or None and its last line where it failed."""
    command = [sys.executable, "-m", "vit_jax.benchmark", "--json", "--no_start", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.splitlines()[-1]), ""


def main():
    """Prints one line a measurement, as they come."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--only", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--rounds", default="3")
    parser.add_argument("--round_seconds", default="1")
    args, rest = parser.parse_known_args()
    print(
        "| axis | value | GFLOP/image | ms a step | images/s | TFLOP/s | memory: compiler | seen |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for axis in args.only:
        values, flags = AXES[axis]
        for value in values:
            fields = [f"--config.{flag.format(value, four=4 * value)}" for flag in flags]
            times = ["--rounds", args.rounds, "--round_seconds", args.round_seconds]
            r, failed = measure(["--config", args.config, *times, *rest, *fields])
            if failed:
                print(f"| {axis} | {value} | failed: {failed} | | | | | |", flush=True)
                continue
            seen = r["memory_device_peak_bytes"] or r["memory_process_peak_bytes"]
            print(
                f"| {axis} | {value} | {r['gflop_per_image']:.3f} | "
                f"{1e3 * r['seconds_per_step']['median']:,.1f} | {r['images_per_second']:,.0f} | "
                f"{r['tflops_per_second']:.3g} | {r['memory_estimated_bytes'] / 1e6:,.0f} MB | "
                f"{seen / 1e6:,.0f} MB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
