"""Measure training throughput, memory, and compilation time of a recipe."""

import argparse
import importlib.util
import json
import os
import pathlib
import shlex
import sys

from vit_jax.errors import UserError

VARIANTS = ("written", "eager", "compiled")  # of the PyTorch code; torch_side.py describes them


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    argv = sys.argv[1:] if argv is None else argv
    args, overrides = _parse(argv)
    if args.against:  # a GPU's memory is shared with the PyTorch processes
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    from vit_jax import config as config_lib  # slow to import: after --help
    from vit_jax.commands.benchmark import measure as measure_lib
    from vit_jax.experiment import make_experiment
    from vit_jax.parallel import backend
    from vit_jax.workdir import environment

    config = config_lib.from_file(args.config)
    config_lib.override(config, overrides, "--config, --against, --rounds, --round_seconds, --json")
    if config.data.streaming:
        raise UserError(
            "config.data.streaming=true: the benchmark measures resident data; set it to false"
        )
    backend.check_backend()
    experiment = make_experiment(config)
    sides, failures = {}, {}
    if args.against:
        sides, failures = measure_lib.start_torch_sides(experiment, args.variants)
    result = measure_lib.measure(
        experiment, rounds=args.rounds, round_seconds=args.round_seconds, rivals=sides
    )
    for side in sides.values():
        side.close()
        result["torch"] = side.about
    result["rivals"] |= failures
    command = shlex.join(["python", "-m", "vit_jax", "benchmark", *map(str, argv)])
    result["environment"] = environment(command)
    print(*([json.dumps(result)] if args.json else measure_lib.table(result)), sep="\n")


def _parse(argv):
    """Returns (arguments, the arguments that override config fields)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax benchmark",
        description="Measure training with a recipe: throughput, MFU, memory, and compilation "
        "time, optionally compared with PyTorch.",
        epilog="--config.FIELD=VALUE changes a field of the recipe, as in vit-jax train.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=pathlib.Path, required=True, metavar="RECIPE", help="name or path"
    )
    parser.add_argument(
        "--against", choices=("torch",), help="alternate with the same training in PyTorch"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="PyTorch variants"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument(
        "--round_seconds", type=float, default=2.0, help="approximate length (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, overrides = parser.parse_known_args(argv)
    if args.rounds < 1 or args.round_seconds <= 0:
        raise UserError(
            f"--rounds {args.rounds} --round_seconds {args.round_seconds:g}: use at least 1 round "
            "and more than 0 seconds"
        )
    if args.against and importlib.util.find_spec("torch") is None:
        raise UserError(
            "--against torch needs PyTorch, which is not installed: run pip install torch, or omit "
            "--against to measure vit_jax alone"
        )
    return args, overrides
