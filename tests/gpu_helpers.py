"""Compiles functions and steps for GPUs without having one."""

import importlib.util

import jax

from vit_jax.commands.describe.describe import compile_step, make_target_experiment
from vit_jax.commands.describe.program import Program
from vit_jax.parallel.targets import find_target, target_devices

INSTALLED = any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))
REMEDY = "the compiler for GPUs is not installed: pip install 'vit-jax[gpu-check]'"


def compile_function(function, *arguments, target="h100", **options):
    """Returns the Program of a function of arrays for one GPU."""
    (device,) = target_devices(*find_target(target))
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    return Program(jax.jit(function, **options).lower(*shapes).compile().as_text())


def compile_recipe(config, target, *, shape="32x32x3x10", examples=50_000):
    """Returns (Experiment, compiled step) of a config for a target, without data."""
    experiment = make_target_experiment(config, target, shape, examples)
    return experiment, compile_step(experiment)
