"""What a run will cost, read from its compiled program: `--dry_run`, and the tests of the traffic.

The compiler says what a device computes, holds and sends; nothing is run.
"""

import collections
import math
import re

from vit_jax.run import header

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
    """Bytes of a shape or a tuple of shapes, as 'f32[16,64]{1,0}' or '(f32[], token[])'."""
    total = 0
    for kind, bits, sizes in re.findall(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", shapes):
        width = max(1, int(bits) // 8) if bits else int(kind == "pred")  # a token has no bytes
        total += width * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _transferred(kind, shapes, rest):
    """The shapes that an instruction transfers; `rest` is its text after the opening bracket."""
    if kind == "send":  # (data, context, token)
        return shapes.rpartition(", u32[]")[0]
    if kind == "outfeed":  # its result is a token
        return re.search(r"outfeed_shape=(.*?)(?:, \w+=|$)", rest)[1]
    return shapes


def traffic(program):
    """{kind: (messages, bytes)} that a device sends to others or to the host in one call.

    `program` is the text of a compiled program (`compiled.as_text()`). A collective counts with
    the bytes of its result: an all-gather with the whole array, a reduce-scatter with its part.
    Operations in a loop count once per iteration, or once if the trip count is unknown.
    """
    computations, calls, name = collections.defaultdict(list), [], None
    for line in program.splitlines():
        if start := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = start[2]
            entry = name if start[1] else None
            calls += [(None, entry, 1)] if entry else []
        elif (found := _INSTRUCTION.match(line)) and name:
            shapes, kind, rest = found.groups()
            times = 1
            if kind == "while" and (known := re.search(r'known_trip_count.{1,8}"n":"(\d+)"', rest)):
                times = int(known[1])
            for called in re.findall(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)", rest):
                calls.append((name, called, times))
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", rest):
                calls += [(name, b.strip().lstrip("%"), 1) for b in branches.split(",")]
            if kind == "custom-call" and "MoveTo" in rest:
                computations[name].append(("host copy", _num_bytes(shapes)))
            elif kind in _TRANSFERS:
                num_bytes = _num_bytes(_transferred(kind, shapes, rest))
                computations[name].append((kind.removesuffix("-done"), num_bytes))

    def times_called(name):
        return sum(
            n * (1 if caller is None else times_called(caller))
            for caller, called, n in calls
            if called == name
        )

    result = {}
    for name, found in computations.items():
        times = times_called(name)
        for kind, num_bytes in found:
            messages, total = result.get(kind, (0, 0))
            result[kind] = (messages + times, total + times * num_bytes)
    return result


def compile_step(run):
    """The compiled training step of a Run, for its mesh; no array is made."""
    return run.step.lower(run.shapes, *run.input_shapes()).compile()


def explain(run, workdir):
    """The lines that explain a run without starting it: its header, work, memory and traffic."""
    compiled = compile_step(run)
    images = run.config.batch_size * run.config.num_seeds
    lines = header(run, workdir)
    lines.append(
        f"work: {run.flops_per_image * images / 1e9:,.2f} GFLOP a step, "
        f"{run.flops_per_image * images * run.total_steps / 1e15:,.3f} PFLOP in all; "
        f"by the compiler {compiled.cost_analysis()['flops'] / 1e9:,.2f} GFLOP a step and device"
    )
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    lines.append(
        f"memory of a step, by the compiler: {(held + made) / 1e6:,.1f} MB a device "
        f"({held / 1e6:,.1f} MB of state and data, {made / 1e6:,.1f} MB while it computes)"
    )
    told = [
        f"{kind} {total / 1e6:,.3f} MB in {messages:,} messages"
        for kind, (messages, total) in sorted(traffic(compiled.as_text()).items())
    ]
    lines.append(f"communication of a step: {'; '.join(told) or 'none'}")
    return lines
