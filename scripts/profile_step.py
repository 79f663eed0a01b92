"""Where one training step's time goes: python scripts/profile_step.py --config F [--config.X=Y].

Traces a few steps with jax's profiler and prints, by part of the model and kind of operation, the
milliseconds a step. What runs at once counts twice, so the sum may exceed the step.
"""

import argparse
import collections
import pathlib
import re
import tempfile
import time

import jax

from vit_jax import config as config_lib
from vit_jax.benchmark import Ours
from vit_jax.errors import run_command
from vit_jax.explain import compile_step
from vit_jax.run import setup

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")


def instructions(program):
    """{name: (shape, what it computes)} of the instructions of a compiled program's text."""
    found = {}
    for line in program.splitlines():
        if match := _INSTRUCTION.match(line):
            name, shape, kind = match.groups()
            source = re.search(r'op_name="([^"]*)"', line)
            source = source[1] if source else kind
            source = re.sub(r"block_\d+", "block", source)
            source = re.sub(r"^jit\(\w+\)/|\(VisionTransformer\)", "", source)
            found[name] = (re.sub(r"\{[^}]*\}", "", shape), source)
    return found


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=40)
    args, rest = parser.parse_known_args()
    config = config_lib.from_file(args.config)
    config_lib.override(config, rest, "--config, --steps, --top")
    run = setup(config)
    known = instructions(compile_step(run).as_text())
    ours = Ours(run)
    ours.steps(2)
    start = time.perf_counter()
    ours.steps(args.steps)
    unprofiled = (time.perf_counter() - start) / args.steps
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            ours.steps(args.steps)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        planes = [(p.name, [(ln.name, list(ln.events)) for ln in p.lines]) for p in planes]
        on_device = [p for p in planes if p[0].startswith("/device:")]
        times = collections.defaultdict(lambda: [0.0, 0])
        for _, lines in on_device or planes:
            for line, events in lines:
                if on_device and not line.startswith("Stream"):
                    continue  # its other lines tell the same time again
                for event in events:
                    name = dict(event.stats).get("hlo_op", event.name)
                    if name not in known and not on_device:
                        continue
                    entry = times[known.get(name, ("", str(name)))]
                    entry[0] += event.duration_ns / 1e6 / args.steps
                    entry[1] += 1
    total = sum(t for t, _ in times.values())
    print(f"{1e3 * unprofiled:.2f} ms a step; {total:.2f} ms in {len(times)} kinds of operation")
    print("| ms a step | times a step | shape | what |\n|---|---|---|---|")
    ranked = sorted(times.items(), key=lambda item: -item[1][0])
    for (shape, what), (milliseconds, count) in ranked[: args.top]:
        print(f"| {milliseconds:.2f} | {count / args.steps:g} | {shape} | {what[-90:]} |")


if __name__ == "__main__":
    run_command(main)
