"""The description of a run and its cost, from the compiled step (train --dry_run)."""

import math
import re

import jax

from vit_jax.experiment import describe, description_lines, make_experiment

# The shape of a result and its kind. An asynchronous operation counts when it ends: the tuple of a
# `-start` also lists operands and contexts.
_COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-done)?\("
)
_COMPUTATION = re.compile(r"^(ENTRY)? ?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
_CALLS = re.compile(r"(?:body|condition|to_apply|calls|computations?)=(\{[^}]*\}|[^,\s]+)")


def transfers(program):
    """Returns {kind: (messages, bytes)} that a device sends to other devices in one call.

    `program` is the text of a compiled program (`compiled.as_text()`). A collective counts with
    the bytes of its result: an all-gather with the complete array, a reduce-scatter with its part.
    Operations in a loop count once per iteration, or once if the trip count is unknown.
    """
    computations, result = {}, {}
    for entry, name, body in _COMPUTATION.findall(program):
        computations[entry or name] = body.splitlines()

    def add(name, times):
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.search(line):
                shapes, kind = found.groups()
                messages, total = result.get(kind, (0, 0))
                result[kind] = (messages + times, total + times * _num_bytes(shapes))
            trips = re.search(r'known_trip_count.{1,8}"n":"(\d+)"', line)
            for called in _CALLS.findall(line):
                for callee in re.findall(r"[\w.\-]+", called):
                    add(callee, times * int(trips[1]) if trips else times)

    add("ENTRY", 1)
    return result


def _num_bytes(shapes):
    """Returns the bytes of shapes, such as 'f32[16,64]{1,0}' or '(f32[], pred[2])'."""
    return sum(
        int(bits or 8) // 8 * math.prod(int(n) for n in sizes.split(",") if n)
        for bits, sizes in re.findall(r"[a-z]+(\d*)\w*\[([\d,]*)\]", shapes)
    )


def compile_step(experiment):
    """Returns the compiled training step of an Experiment, for its mesh; no array is created."""
    shapes = experiment.feed.input_shapes
    return experiment.train_step.lower(experiment.state_shapes, *shapes).compile()


def step_memory(compiled):
    """Returns the bytes per device of a compiled step: (state and data, temporary)."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes, results + memory.temp_size_in_bytes


def print_lines(config, workdir):
    """Prints the description of a config's experiment and of its compiled step."""
    experiment = make_experiment(config)
    compiled = compile_step(experiment)
    flops = experiment.flops_per_image * config.batch_size * config.num_seeds
    stored, temporary = step_memory(compiled)
    sent = [
        f"{kind} {total / 1e6:,.3f} MB in {messages:,} messages per step"
        for kind, (messages, total) in sorted(transfers(compiled.as_text()).items())
    ]
    description = describe(experiment, workdir) | {
        "compute": f"{flops / 1e9:,.2f} GFLOP per step, "
        f"{flops * experiment.plan.total_steps / 1e15:,.3f} PFLOP in total; by the compiler "
        f"{compiled.cost_analysis()['flops'] / 1e9:,.2f} GFLOP per step and device",
        "memory": f"{(stored + temporary) / 1e6:,.1f} MB per device in a step, by the compiler "
        f"({stored / 1e6:,.1f} MB of state and data, {temporary / 1e6:,.1f} MB temporary)",
        "communication": "; ".join(sent) or "none",
    }
    if jax.process_index() == 0:
        print(*description_lines(description), sep="\n")
