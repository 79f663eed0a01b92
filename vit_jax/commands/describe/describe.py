"""Describes a run and its compiled step, on this machine's devices or on GPUs it does not have.

vit-jax describe --config cifar10_vit --target h100x8 --shape 32x32x3x10 --examples 50000
"""

import math
import os
import re
import shutil
import sys
import time

import jax
import numpy as np

from vit_jax import config as config_lib
from vit_jax import data
from vit_jax.commands.describe import estimate
from vit_jax.commands.describe.program import Program
from vit_jax.errors import UserError
from vit_jax.experiment import describe, description_lines, make_experiment
from vit_jax.parallel import targets


def compile_step(experiment):
    """Returns the compiled training step of an Experiment, for its mesh; no array is created."""
    shapes = experiment.feed.input_shapes
    return experiment.train_step.lower(experiment.state_shapes, *shapes).compile()


def step_memory(compiled):
    """Returns the bytes per device of a compiled step: (state and data, temporary)."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes, results + memory.temp_size_in_bytes


def print_description(config, args):
    """Prints the description that the arguments of `train --dry_run` request."""
    gpu, rates = None, None
    if args.target:
        gpu, _ = targets.find_target(args.target)
        rates = estimate.replace_rates(estimate.rates_of(gpu), args.rates)
    elif args.kernels or args.fit or args.rates:
        raise UserError("--kernels, --fit, and --rates need a --target, such as --target h100")

    def make(config):
        return make_target_experiment(config, args.target, args.shape, args.examples)

    experiment = make(config)
    start = time.perf_counter()
    compiled = compile_step(experiment)
    seconds = time.perf_counter() - start
    program = Program(compiled.as_text())
    description = describe(experiment, args.workdir) | {
        "compute": _compute(experiment, program),
        "memory": _memory(experiment, compiled, gpu),
        "communication": _communication(program),
    }
    if gpu:
        description["estimate"] = _estimate(experiment, program, rates)
        description["compilation"] = f"{seconds:.0f} s, without the GPU"
    if gpu and gpu.capability < 8:
        description["lacking"] = (
            "it has no bfloat16 units, so bfloat16 products run at the float32 rate; fused "
            "attention needs compute capability 8.0"
        )
    if args.fit:
        description |= _fit(experiment, make, sum(step_memory(compiled)), gpu)
    if jax.process_index() == 0:
        print(*description_lines({k: v for k, v in description.items() if v}), sep="\n")
        if args.layers:
            print(layers(experiment))
        if args.kernels:
            print("", *estimate.kernel_lines(program.kernels, rates), sep="\n")


def layers(experiment):
    """Returns a table of the model's modules, with their shapes, parameters, and forward FLOP."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    return experiment.model.tabulate(
        jax.random.key(0),
        np.zeros((1, *experiment.train.image_shape), np.float32),
        depth=3,
        compute_flops=True,
        console_kwargs={"width": columns, "force_terminal": False, "force_jupyter": False},
    )


def make_target_experiment(config, target, shape, examples):
    """Builds the Experiment of a config for the GPUs of `target` and for images of `shape`.

    Without a target, it is for the devices of this machine; without a shape, it reads the data.
    """
    devices = targets.target_devices(*targets.find_target(target)) if target else None
    splits = stand_in(config, shape, examples) if shape else None
    return make_experiment(config, devices=devices, splits=splits, fresh=not target)


def stand_in(config, shape, examples):
    """Returns splits of images that are never read, for `make_experiment`."""
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", shape)):
        raise UserError(f"--shape {shape}: use HEIGHTxWIDTHxCHANNELSxCLASSES, such as 32x32x3x10")
    if examples < 1:
        raise UserError(f"--examples {examples}: use at least 1")
    H, W, C, classes = map(int, found.groups())
    H, W = (config.data.image_size or side for side in (H, W))
    names = tuple(map(str, range(classes)))
    source = f"{H}x{W}x{C} images of {classes} classes, not read"
    images = np.broadcast_to(np.uint8(0), (examples, H, W, C))
    labels = np.broadcast_to(np.int32(0), examples)
    return {"train": data.Dataset(images, labels, names, source, [("train", range(examples))])}


def _compute(experiment, program):
    config, plan = experiment.config, experiment.plan
    flops = experiment.flops_per_image * config.batch_size * config.num_seeds
    compiled = sum(k.times * sum(k.flops.values()) for k in program.kernels)
    return (
        f"{flops / 1e9:,.2f} GFLOP per step, {flops * plan.total_steps / 1e15:,.3f} PFLOP in "
        f"total; compiled matrix products: {compiled / 1e9:,.2f} GFLOP per step per device"
    )


def _memory(experiment, compiled, gpu):
    stored, temporary = step_memory(compiled)
    state = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(experiment.state_shapes)
    )
    text = (
        f"{(stored + temporary) / 1e6:,.1f} MB per device in a step, by the compiler "
        f"({state / 1e6:,.1f} MB of state, {(stored - state) / 1e6:,.1f} MB of data, "
        f"{temporary / 1e6:,.1f} MB temporary)"
    )
    if not gpu:
        return text
    usable = usable_memory(gpu)
    verdict = "fits" if stored + temporary <= usable else "does NOT fit"
    return (
        f"{text}; {verdict} in {usable / 1e9:,.1f} GB, the share of {gpu.memory:g} GB that JAX "
        "allocates (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 by default)"
    )


def usable_memory(gpu):
    """Returns the bytes of a GPU's memory that JAX allocates."""
    return gpu.memory * 1e9 * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))


def _communication(program):
    sent = [
        f"{kind} {total / 1e6:,.3f} MB ({', '.join(dtypes)}) in {messages:,} messages per step"
        for kind, (messages, total, dtypes) in sorted(program.transfers().items())
    ]
    return "; ".join(sent) or "none"


def _estimate(experiment, program, rates):
    sums, config = estimate.total(program.kernels, rates), experiment.config
    unknown = sum(count is None for count in program.loops())
    loops = f"; {unknown} loops of unknown length counted once" if unknown else ""
    return (
        f"at least {sums['seconds'] * 1e3:.2f} ms per step "
        f"({config.batch_size * config.num_seeds / sums['seconds']:,.0f} images/s) in "
        f"{sums['kernels']:,.0f} kernels, {sums['launch_bound']:,.0f} of them launch-bound; "
        f"arithmetic alone {sums['arithmetic'] * 1e3:.2f} ms, memory traffic alone "
        f"{sums['traffic'] * 1e3:.2f} ms ({sums['bytes'] / 1e9:,.2f} GB){loops}; an estimate at "
        f"{rates}, not a forecast"
    )


def _fit(experiment, make, num_bytes, gpu):
    """Returns {name: text} for the largest batch that fits and for each way to save memory."""
    config, plan, num_devices = experiment.config, experiment.plan, experiment.mesh.size

    def memory_of(**fields):
        """Returns the bytes per device with other fields, or infinity if they are not allowed."""
        changed = config.copy_and_resolve_references()
        for name, value in fields.items():
            config_lib.set_field(changed, name, value)
            print(f"compiling with {name}={value} ...", file=sys.stderr, flush=True)
        try:
            return sum(step_memory(compile_step(make(changed))))
        except UserError:
            return math.inf

    multiple, usable = math.lcm(num_devices, config.accumulate_steps), usable_memory(gpu)
    most, sizes = plan.num_examples // multiple * multiple, {config.batch_size: num_bytes}
    largest = largest_batch(memory_of, sizes, multiple, most, usable)
    text = f"{largest:,}, with {sizes[largest] / 1e9:,.2f} GB per device" if largest else "none"
    if largest == most:
        text += ", the entire training split"
    lines = {"largest batch": f"{text}; compiled batches: {', '.join(f'{b:,}' for b in sizes)}"}
    ways = [{"accumulate_steps": 2 * config.accumulate_steps}, {"model.remat": True}]
    ways += [{"mesh.data": 0, "mesh.fsdp": num_devices}] * (num_devices > config.mesh.fsdp)
    for fields in ways:
        (*_, (name, value)), needed = fields.items(), memory_of(**fields)
        text = f"{needed / 1e6:,.1f} MB per device instead of {num_bytes / 1e6:,.1f} MB"
        lines[f"with {name}={value}"] = text if needed < math.inf else "not possible"
    return lines


def largest_batch(memory_of, sizes, multiple, most, usable, tolerance=0.03):
    """Returns the largest batch that needs at most `usable` bytes, to a relative tolerance, or 0.

    Compiles at most six more batch sizes and adds them to `sizes`, {batch: bytes}. From the second
    on, each is predicted by a line through the two measurements closest to `usable`.
    """
    (batch, num_bytes) = max(sizes.items())
    guess = 4 * batch if num_bytes <= usable else batch // 4
    guess = max(min(guess, most) // multiple * multiple, multiple)
    for _ in range(6):
        sizes[guess] = sizes.get(guess) or memory_of(batch_size=guess)
        fits = max((b for b, n in sizes.items() if n <= usable), default=0)
        above = min((b for b, n in sizes.items() if n > usable), default=most + multiple)
        if above - max(fits, 1) <= max(multiple, tolerance * fits):
            break
        (b0, n0), (b1, n1) = sorted(sizes.items(), key=lambda s: abs(s[1] - usable))[:2]
        line = b0 + (usable - n0) * (b1 - b0) / (n1 - n0 or 1)
        guess = int(min(max(line, fits + multiple), above - multiple)) // multiple * multiple
    return fits
