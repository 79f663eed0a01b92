"""Measure training throughput, MFU, memory, and compilation time of a recipe.

With --against torch, a round times each side once, so that other load affects them equally.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import resource
import shlex
import statistics
import sys
import time

import jax

from vit_jax import config as config_lib
from vit_jax.commands.benchmark.torch_side import start_torch_sides
from vit_jax.commands.describe.describe import compile_step, step_memory
from vit_jax.errors import UserError
from vit_jax.experiment import make_experiment
from vit_jax.parallel import backend, targets
from vit_jax.workdir import environment


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="vit-jax benchmark",
        description=__doc__,
        epilog="--config.FIELD=VALUE changes a field of the recipe, as in vit-jax train.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="name or path")
    parser.add_argument("--against", choices=("torch",), help="alternate with PyTorch")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of 2 s (default: 5)")
    parser.add_argument("--json", action="store_true", help="print the result on one line")
    args, overrides = parser.parse_known_args(argv)
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: use at least 1")
    if args.against and importlib.util.find_spec("torch") is None:
        raise UserError("--against torch needs PyTorch, which is not installed: pip install torch")
    if args.against:  # a GPU's memory is shared with the PyTorch processes
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_enable_compilation_cache", False)  # to measure the compilation
    config = config_lib.from_file(args.config)
    config_lib.override(config, overrides, "--config, --against, --rounds, --json")
    if config.deterministic:
        backend.require_determinism()
    backend.start_backend()
    experiment = make_experiment(config)
    sides = start_torch_sides(experiment) if args.against else {}
    result = measure(experiment, sides, args.rounds)
    result["environment"] = environment(shlex.join(["python", "-m", "vit_jax", "benchmark", *argv]))
    if sides:
        result["environment"]["versions"]["torch"] = importlib.metadata.version("torch")
    print(json.dumps(result, indent=None if args.json else 2))


class JaxSide:
    """Training steps of an experiment, fed, dispatched, and awaited as `vit_jax.train` does."""

    def __init__(self, experiment):
        self._train_step, self._state = experiment.train_step, experiment.init()
        # After the last step, training starts again from the first batch.
        self._inputs = (x for _ in itertools.count() for x in experiment.feed.inputs(after=0))

    def time_steps(self, n):
        """Returns the seconds that n steps take."""
        start, previous = time.perf_counter(), None
        with jax.transfer_guard("disallow"):  # implicit transfers raise, as in training
            for inputs in itertools.islice(self._inputs, n):
                self._state, metrics = self._train_step(self._state, *inputs)
                jax.block_until_ready(previous)
                previous = metrics
            jax.block_until_ready(previous)
        return time.perf_counter() - start


def measure(experiment, rivals, rounds, round_seconds=2.0):
    """Measures an experiment, and alternately its `rivals`, {name: side}, as a dict of JSON values.

    Rates are medians over `rounds` of about `round_seconds` per side.
    """
    start = time.perf_counter()
    compiled = compile_step(experiment)
    compile_seconds = time.perf_counter() - start
    images = experiment.config.batch_size * experiment.config.num_seeds
    sides = {"vit_jax": JaxSide(experiment), **rivals}
    measured = _measure_sides(sides, images, rounds, round_seconds)
    ours, device = measured.pop("vit_jax"), experiment.mesh.devices.flat[0]
    for rival in measured.values():
        rival["speedup"] = ours["images_per_second"] / rival["images_per_second"]
    flops = ours["images_per_second"] * experiment.flops_per_image / experiment.mesh.size
    peak = targets.peak_flops(device.device_kind)
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **ours,
        "seconds_per_epoch": ours["seconds_per_step"]["median"] * experiment.plan.steps_per_epoch,
        "matmul_precision": experiment.model.matmul_precision,  # of every side
        "gflop_per_image": experiment.flops_per_image / 1e9,
        "tflops_per_second": flops / 1e12,  # per device, as the peak
        "mfu": peak and flops / peak,
        "compile_seconds": compile_seconds,
        "memory_estimated_bytes": sum(step_memory(compiled)),
        # The device's peak. A CPU reports none: there, the peak of the process.
        "memory_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", process_peak),
        "rivals": measured,
    }


def _measure_sides(sides, images, rounds, round_seconds):
    """Returns {name: {"seconds_per_step": {"median", "min", "max"}, "images_per_second"}}."""
    counts, times = {}, {name: [] for name in sides}
    for name, side in sides.items():
        side.time_steps(2)  # compiles and allocates
        counts[name] = max(1, round(round_seconds / (side.time_steps(2) / 2)))
    for _ in range(rounds):
        for name, side in sides.items():
            side.time_steps(1)  # refills the CPU's caches with this side's data
            times[name].append(side.time_steps(counts[name]) / counts[name])
    return {
        name: {
            "seconds_per_step": {"median": statistics.median(t), "min": min(t), "max": max(t)},
            "images_per_second": images / statistics.median(t),
        }
        for name, t in times.items()
    }
