"""WORKDIR/profile: a trace of some steps, and the time of their operations.

TensorBoard and xprof open the folder, Perfetto its .trace.json.gz. `operations.json` is a list of
{"operation", "milliseconds", "times"} per step, longest first.
"""

import collections
import itertools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax

from vit_jax.errors import UserError
from vit_jax.workdir.files import write_json

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.M)


def trace_steps(
    experiment: Any, folder: pathlib.Path, start: int, steps: tuple[int, int]
) -> Callable[..., Any]:
    """Returns `experiment.train_step`, which also traces `steps` = (first, last) to `folder`.

    The first call is step `start` + 1. Raises UserError if the run will not train these steps.
    """
    train_step, (first, last) = experiment.train_step, steps
    if not start < first <= last <= experiment.plan.total_steps:
        raise UserError(
            f"--profile_steps {first}-{last}: this run trains the steps {start + 1} to "
            f"{experiment.plan.total_steps}"
        )
    numbers = itertools.count(start + 1)

    def traced(state: Any, *inputs: Any) -> Any:
        step = next(numbers)
        if step == first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(folder)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = train_step(state, *inputs)
        if step == last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            lowered = train_step.lower(experiment.state_shapes, *experiment.feed.input_shapes)
            if jax.process_index() == 0:
                rows = _operations(folder, lowered.compile().as_text(), last - first + 1)
                write_json(folder / "operations.json", rows)
        return result

    return traced


def _operations(folder, program, num_steps):
    """Returns the rows of operations.json. The blocks of a model count as one.

    Operations that run concurrently all count in full.
    """
    names = dict(_INSTRUCTION.findall(program))
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    times = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            if plane.name.startswith("/device:") and not line.name.startswith("Stream"):
                continue  # a device's other lines repeat the same time
            for event in line.events:
                if instruction := dict(event.stats).get("hlo_op"):
                    name = names.get(str(instruction), str(instruction))
                    name = re.sub(r"^jit\(\w+\)/|\(VisionTransformer\)", "", name)
                    times[re.sub(r"block_\d+", "block", name)].append(event.duration_ns / 1e6)
    rows = [
        {"operation": name, "milliseconds": sum(t) / num_steps, "times": len(t) / num_steps}
        for name, t in times.items()
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])
