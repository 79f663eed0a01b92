"""Compiles recipes for GPUs without having one, and tabulates memory and estimated step time.

    python scripts/gpu_table.py --out OUT.jsonl RECIPE[:FIELD=VALUE] ... [--targets h100 ...]

Appends one JSON object per program to OUT.jsonl, skips those that are there, and prints the table
of docs/gpu.md. It needs the extra gpu-check and no data.
"""

import argparse
import json
import pathlib
import time

from vit_jax import config as config_lib
from vit_jax.commands.describe import estimate
from vit_jax.commands.describe.describe import (
    compile_step,
    make_target_experiment,
    step_memory,
    usable_memory,
)
from vit_jax.commands.describe.program import Program
from vit_jax.parallel import targets

# (height x width x channels x classes, training examples) of the recipes' data.
DATA = {
    "cifar10": ("32x32x3x10", 50_000),
    "cifar100": ("32x32x3x100", 50_000),
    "shapes10": ("32x32x3x10", 20_000),
    "imagenet2012": ("224x224x3x1000", 1_281_167),
}


def measure(recipe, fields, target):
    """Returns the memory, kernel count, and estimated times of one compiled step."""
    config = config_lib.from_file(recipe)
    config_lib.override(config, [f"--config.{field}" for field in fields], "")
    gpu, _ = targets.find_target(target)
    shape, examples = DATA[config.data.name.partition(":")[0].partition("/")[0]]
    experiment = make_target_experiment(config, target, shape, examples)
    start = time.perf_counter()
    compiled = compile_step(experiment)
    seconds = time.perf_counter() - start
    program = Program(compiled.as_text())
    rates = estimate.rates_of(gpu)
    sums = estimate.total(program.kernels, rates)
    parts = estimate.by_part(program.kernels, rates)
    return {
        "batch": config.batch_size,
        "images": config.batch_size * config.num_seeds,
        "memory_mb": sum(step_memory(compiled)) / 1e6,
        "usable_mb": usable_memory(gpu) / 1e6,
        "kernels": int(sums["kernels"]),
        "gb": sums["bytes"] / 1e9,
        "milliseconds": sums["seconds"] * 1e3,
        "parts_ms": {name: part["seconds"] * 1e3 for name, part in parts.items()},
        "unknown_loops": sum(count is None for count in program.loops()),
        "collectives": program.transfers(),
        "compile_seconds": seconds,
    }


def main():
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--targets", nargs="+", default=list(targets.TARGETS))
    parser.add_argument("programs", nargs="+", metavar="RECIPE[:FIELD=VALUE,...]")
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(row["program"], row["target"]): row for row in map(json.loads, lines)}
    for program in args.programs:
        recipe, _, fields = program.partition(":")
        for target in args.targets:
            if (program, target) in done:
                continue
            row = {"program": program, "target": target}
            row |= measure(recipe, [f for f in fields.split(",") if f], target)
            done[program, target] = row
            with open(args.out, "a") as file:
                print(json.dumps(row), file=file)
    print("| program | target | batch | MB per device | kernels | GB moved | ms | images/s |")
    print("|---|---|---|---|---|---|---|---|")
    for program in args.programs:
        for target in args.targets:
            row = done[program, target]
            fits = "" if row["memory_mb"] <= row["usable_mb"] else " (does not fit)"
            print(
                f"| {program} | {target} | {row['batch']:,} | {row['memory_mb']:,.0f}{fits} | "
                f"{row['kernels']:,} | {row['gb']:.2f} | {row['milliseconds']:.2f} | "
                f"{row['images'] / row['milliseconds'] * 1e3:,.0f} |"
            )


if __name__ == "__main__":
    main()
