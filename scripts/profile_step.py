"""Tabulates the time of a training step by part of the model and kind of operation.

    python scripts/profile_step.py --config RECIPE [--config.FIELD=VALUE ...]

Traces a few steps with JAX's profiler. Concurrent operations all count in full, so the sum can
exceed the time of a step.
"""

import argparse
import collections
import pathlib
import re
import tempfile

import jax

from vit_jax import config as config_lib
from vit_jax.commands.benchmark.measure import JaxSide
from vit_jax.commands.describe.describe import compile_step
from vit_jax.errors import run_command
from vit_jax.experiment import make_experiment

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")


def instructions(program):
    """Returns {name: (shape, source)} of the instructions of a compiled program's text.

    The source is the part of the model and the operation that the instruction comes from.
    """
    result = {}
    for line in program.splitlines():
        if match := _INSTRUCTION.match(line):
            name, shape, kind = match.groups()
            source = re.search(r'op_name="([^"]*)"', line)
            source = source[1] if source else kind
            source = re.sub(r"block_\d+", "block", source)
            source = re.sub(r"^jit\(\w+\)/|\(VisionTransformer\)", "", source)
            result[name] = (re.sub(r"\{[^}]*\}", "", shape), source)
    return result


def traced_events(call):
    """Yields (instruction name, milliseconds) of every event that the profiler records in `call`.

    On an accelerator, only the events of its streams; otherwise, all events of the host.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        on_device = [p for p in planes if p.name.startswith("/device:")]
        for plane in on_device or planes:
            for line in plane.lines:
                if on_device and not line.name.startswith("Stream"):
                    continue  # a device's other lines repeat the same time
                for event in line.events:
                    name = dict(event.stats).get("hlo_op", event.name)
                    yield str(name), event.duration_ns / 1e6


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=pathlib.Path, required=True, metavar="RECIPE", help="name or path"
    )
    parser.add_argument("--steps", type=int, default=3, help="steps to trace (default: 3)")
    parser.add_argument("--top", type=int, default=40, help="rows to print (default: 40)")
    args, overrides = parser.parse_known_args()
    config = config_lib.from_file(args.config)
    config_lib.override(config, overrides, "--config, --steps, --top")
    experiment = make_experiment(config)
    known = instructions(compile_step(experiment).as_text())
    side = JaxSide(experiment)
    side.steps(2)
    per_step = side.steps(args.steps) / args.steps
    accelerated = jax.default_backend() != "cpu"
    times = collections.defaultdict(list)
    for name, milliseconds in traced_events(lambda: side.steps(args.steps)):
        if name in known or accelerated:  # a host also records events of its own
            times[known.get(name, ("", name))].append(milliseconds)
    total = sum(map(sum, times.values())) / args.steps
    print(f"{1e3 * per_step:.2f} ms per step; {total:.2f} ms in {len(times)} kinds of operation")
    print("| ms per step | times per step | shape | source |\n|---|---|---|---|")
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    for (shape, source), t in ranked[: args.top]:
        print(f"| {sum(t) / args.steps:.2f} | {len(t) / args.steps:g} | {shape} | {source[-90:]} |")


if __name__ == "__main__":
    run_command(main)
