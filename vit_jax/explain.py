"""What a run will cost, read from its compiled program: `--dry_run`, and the tests of the traffic.

The compiler says what a device computes, holds and sends; nothing is run.
"""

import collections
import re

import numpy as np

from vit_jax.run import header

_BYTES = {"pred": 1, "bf16": 2, "f16": 2}  # of an element; of other types, the digits in the name
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OTHER = ("infeed", "outfeed", "send", "recv")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z\-]+)\((.*)$",
)


def _num_bytes(shapes):
    """Of the text of a shape or a tuple of shapes, as 'f32[16,64]{1,0}' or '(f32[], s32[4]{0})'."""
    total = 0
    for kind, sizes in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shapes):
        digits = re.sub(r"\D", "", kind)
        width = _BYTES.get(kind) or max(1, int(digits) // 8)
        total += width * int(np.prod([int(s) for s in sizes.split(",") if s], dtype=np.int64))
    return total


def traffic(program):
    """{kind: (messages, bytes)} that a device sends to others or to the host in one call.

    `program` is the text of a compiled program (`compiled.as_text()`). Bytes are those of the
    results: of an all-gather the whole array, of a reduce-scatter the part. What stands in a loop
    is counted as often as the loop runs, once where the compiler does not say how often.
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
            kind = kind.removesuffix("-start")
            if kind == "custom-call" and "MoveTo" in rest:
                kind = "host copy"
            if kind in (*_KINDS, *_OTHER, "host copy"):
                computations[name].append((kind, _num_bytes(shapes)))

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
