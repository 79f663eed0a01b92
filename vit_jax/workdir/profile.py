"""WORKDIR/profile: a trace of some steps, and the time of their operations.

TensorBoard and xprof open the folder, Perfetto its .trace.json.gz. `operations.json` is a list of
{"operation", "milliseconds", "times"} per step, longest first.
"""

import collections
import contextlib
import itertools
import pathlib
import re
from collections.abc import Callable, Generator
from typing import Any

import jax

from vit_jax.errors import UserError
from vit_jax.workdir.files import write_json

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.M)


def check_steps(steps: tuple[int, int], total_steps: int) -> None:
    """Raises UserError unless a run trains all of `steps`."""
    first, last = steps
    if not 0 < first <= last <= total_steps:
        raise UserError(f"--profile_steps {first}-{last}: this run trains steps 1 to {total_steps}")


@contextlib.contextmanager
def trace(
    experiment: Any,
    folder: pathlib.Path,
    start: int,
    steps: tuple[int, int],
    paused: Callable[[], contextlib.AbstractContextManager[None]],
) -> Generator[None]:
    """Writes a profiler trace of `steps` = (first, last) to `folder`, during the context.

    The first call of `experiment.train_step` is step `start` + 1. The trace starts and stops under
    `paused`, which waits for the last step and stops the clock. A run that ends in between leaves a
    shorter trace.
    """
    train_step, (first, last) = experiment.train_step, steps
    numbers, traced = itertools.count(start + 1), 0

    def traced_step(state: Any, *inputs: Any) -> Any:
        nonlocal traced
        step = next(numbers)
        if step == first:
            with paused():
                jax.profiler.start_trace(folder)
        if step == last + 1:
            stop()
        traced += first <= step <= last
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            return train_step(state, *inputs)

    def stop() -> None:
        nonlocal traced
        with paused():
            jax.profiler.stop_trace()
            num_steps, traced = traced, 0
            lowered = train_step.lower(experiment.state_shapes, *experiment.feed.input_shapes)
            program = lowered.compile().as_text()  # in every process: they may compile together
            if jax.process_index() == 0:
                rows = _operations(folder, program, num_steps)
                write_json(folder / "operations.json", rows)

    experiment.train_step = traced_step
    try:
        yield
    except BaseException:
        if traced:  # otherwise this process could start no other trace
            jax.profiler.stop_trace()
        raise
    if traced:
        stop()


def _operations(folder, program, num_steps):
    """Returns the rows of operations.json. The blocks of a model count as one.

    Operations that run concurrently all count in full.
    """
    names = _names(program)
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    times = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            if plane.name.startswith("/device:") and not line.name.startswith("Stream"):
                continue  # a device's other lines repeat the same time
            for event in line.events:
                if instruction := dict(event.stats).get("hlo_op"):
                    name = names.get(str(instruction), str(instruction))
                    times[name].append(event.duration_ns / 1e6)
    rows = [
        {"operation": name, "milliseconds": sum(t) / num_steps, "times": len(t) / num_steps}
        for name, t in times.items()
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])


def _names(program):
    """Returns {instruction: operation} of a compiled program, in the terms of the model.

    Collectives that XLA combined have the names of all their parts. They are named by their kind.
    """
    names = {}
    for instruction, name in _INSTRUCTION.findall(program):
        if name.startswith("("):
            name = instruction.split(".")[0]
        name = re.sub(r"^jit\(\w+\)/|\(VisionTransformer\)", "", name)
        names[instruction] = re.sub(r"block_\d+", "block", name)
    return names
