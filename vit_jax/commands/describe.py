"""vit-jax describe: the cost of a run, read from its compiled program. Nothing is trained.

`transfers` reads the text of any compiled program.
"""

import argparse
import collections
import math
import pathlib
import re

import jax

from vit_jax import config as config_lib
from vit_jax.experiment import describe, make_experiment
from vit_jax.parallel import backend

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Instructions that transfer data. An asynchronous one counts when it ends: the tuple of a `-start`
# also lists operands and contexts, the shape of a `-done` is the result alone.
_TRANSFERS = (*_COLLECTIVES, *(f"{kind}-done" for kind in _COLLECTIVES))
_TRANSFERS += ("infeed", "outfeed", "send", "recv-done")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z\-]+)\((.*)$",
)


def _num_bytes(shapes):
    """Returns the bytes of shapes, such as 'f32[16,64]{1,0}' or '(f32[], token[])'."""
    total = 0
    for kind, bits, sizes in re.findall(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", shapes):
        width = max(1, int(bits) // 8) if bits else int(kind == "pred")  # a token has no bytes
        total += width * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _transferred(kind, shapes, rest):
    """Returns the shapes that an instruction transfers; `rest` is its text after the bracket."""
    if kind == "send":  # (data, context, token)
        return shapes.rpartition(", u32[]")[0]
    if kind == "outfeed":  # its result is a token
        return re.search(r"outfeed_shape=(.*?)(?:, \w+=|$)", rest)[1]
    return shapes


def transfers(program):
    """Returns {kind: (messages, bytes)} that a device sends to others or to the host in one call.

    `program` is the text of a compiled program (`compiled.as_text()`). A collective counts with
    the bytes of its result: an all-gather with the complete array, a reduce-scatter with its part.
    Operations in a loop count once per iteration, or once if the trip count is unknown.
    """
    computations, calls = _parse(program)

    def times_called(name):
        return sum(
            n * (1 if caller is None else times_called(caller))
            for caller, called, n in calls
            if called == name
        )

    result = {}
    for name, operations in computations.items():
        times = times_called(name)
        for kind, num_bytes in operations:
            messages, total = result.get(kind, (0, 0))
            result[kind] = (messages + times, total + times * num_bytes)
    return result


def _parse(program):
    """Returns ({computation: [(kind, bytes)]}, [(caller, called, times)]) of the transfers."""
    computations, calls, name = collections.defaultdict(list), [], None
    for line in program.splitlines():
        if start := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = start[2]
            calls += [(None, name, 1)] if start[1] else []
        elif (instruction := _INSTRUCTION.match(line)) and name:
            shapes, kind, rest = instruction.groups()
            calls += [(name, called, times) for called, times in _called(kind, rest)]
            if kind == "custom-call" and "MoveTo" in rest:
                computations[name].append(("host copy", _num_bytes(shapes)))
            elif kind in _TRANSFERS:
                num_bytes = _num_bytes(_transferred(kind, shapes, rest))
                computations[name].append((kind.removesuffix("-done"), num_bytes))
    return computations, calls


def _called(kind, rest):
    """Yields (computation, times) for each computation that an instruction calls."""
    times = 1
    if kind == "while" and (known := re.search(r'known_trip_count.{1,8}"n":"(\d+)"', rest)):
        times = int(known[1])
    for called in re.findall(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)", rest):
        yield called, times
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", rest):
        for branch in branches.split(","):
            yield branch.strip().lstrip("%"), 1


def compile_step(experiment):
    """Returns the compiled training step of an Experiment, for its mesh; no array is created."""
    shapes = experiment.feed.input_shapes
    return experiment.train_step.lower(experiment.state_shapes, *shapes).compile()


def describe_program(experiment):
    """Returns the lines that describe the compiled step: compute, memory, and communication."""
    compiled = compile_step(experiment)
    images = experiment.config.batch_size * experiment.config.num_seeds
    flops, steps = experiment.flops_per_image * images, experiment.plan.total_steps
    memory = compiled.memory_analysis()
    stored = memory.argument_size_in_bytes
    temporary = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary += memory.temp_size_in_bytes
    sent = [
        f"{kind} {total / 1e6:,.3f} MB in {messages:,} messages"
        for kind, (messages, total) in sorted(transfers(compiled.as_text()).items())
    ]
    return [
        f"compute: {flops / 1e9:,.2f} GFLOP per step, {flops * steps / 1e15:,.3f} PFLOP in total; "
        f"by the compiler {compiled.cost_analysis()['flops'] / 1e9:,.2f} GFLOP per step and device",
        f"memory of a step, by the compiler: {(stored + temporary) / 1e6:,.1f} MB per device "
        f"({stored / 1e6:,.1f} MB of state and data, {temporary / 1e6:,.1f} MB temporary)",
        f"communication of a step: {'; '.join(sent) or 'none'}",
    ]


def print_lines(config, workdir):
    """Prints the description of a config's experiment and of its compiled step."""
    experiment = make_experiment(config)
    lines = [*describe(experiment, workdir), *describe_program(experiment)]
    if jax.process_index() == 0:
        print(*lines, sep="\n")


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax describe",
        description="Describe a run without training: parameters, FLOP, steps, memory, and "
        "communication, from the compiled program. Reads the data and writes nothing.",
        epilog="--config.FIELD=VALUE changes a field of the recipe, as in vit-jax train.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=pathlib.Path,
        default=config_lib.DEFAULT_RECIPE,
        metavar="RECIPE",
        help="name or path of the recipe (default: a small ViT on drawn images)",
    )
    args, rest = parser.parse_known_args(argv)
    config = config_lib.from_file(args.config)
    config_lib.override(config, rest, "--config")
    backend.enable_compilation_cache()
    backend.check_backend()
    print_lines(config, pathlib.Path("workdirs") / pathlib.Path(args.config).stem)
