"""Measures two GPU optimizations: several steps per dispatch, and other attention kernels.

    python scripts/gpu_levers.py --config RECIPE [--config.FIELD=VALUE ...]

Several steps per dispatch are a scan over the training step, also unrolled. Attention is timed
forward and backward, at 64 and 65 tokens; an implementation that this device cannot run is listed
with its error. A recipe can select only cuDNN's (`model.attention`).
"""

import argparse
import functools
import pathlib
import statistics
import timeit

import jax
import jax.numpy as jnp

from vit_jax import config as config_lib
from vit_jax.errors import run_command
from vit_jax.experiment import make_experiment
from vit_jax.model import attention_weights


def seconds(call, *, repeats=5):
    """Returns the median seconds of a call that returns arrays, after one call that compiles."""
    _, *times = timeit.repeat(lambda: jax.block_until_ready(call()), number=1, repeat=repeats + 1)
    return statistics.median(times)


def steps_per_dispatch(experiment, counts):
    """Prints milliseconds per step for each number of steps in one dispatched program."""
    print("| steps per dispatch | unrolled | ms per step |\n|---|---|---|")
    inputs = next(experiment.feed.inputs(after=0))
    for count in counts:
        for unroll in (False, True) if 1 < count <= 16 else (False,):
            state = [experiment.init()]

            @functools.partial(jax.jit, donate_argnums=0)
            def several(state, inputs, count=count, unroll=unroll):
                def body(state, _):
                    return experiment.train_step(state, *inputs)

                return jax.lax.scan(body, state, length=count, unroll=unroll)

            def call(state=state, several=several, count=count):
                for _ in range(max(1, 64 // count)):
                    state[0], metrics = several(state[0], inputs)
                return metrics

            per_step = seconds(call) / count / max(1, 64 // count)
            print(f"| {count} | {unroll} | {1e3 * per_step:.3f} |", flush=True)


def plain(q, k, v):
    """Computes attention as the model does, on [B, N, h, K]."""
    q, k = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k))
    return jnp.einsum("bhnm,bmhk->bnhk", attention_weights(q, k, "default"), v)


def pallas(q, k, v):
    """Computes attention with JAX's Pallas kernel for GPUs."""
    from jax.experimental.pallas.ops.gpu import attention

    return attention.mha(q, k, v, segment_ids=None, sm_scale=q.shape[-1] ** -0.5)


def attention_table(batch, num_heads, head_dim, dtype):
    """Prints the microseconds of attention, forward and backward, for each implementation."""
    implementations = {"vit_jax": plain, "pallas": pallas}
    for name in ("xla", "cudnn"):
        implementations[name] = functools.partial(jax.nn.dot_product_attention, implementation=name)
    print(f"| attention, batch {batch}, {num_heads} heads of {head_dim}, {dtype} | tokens | us |")
    print("|---|---|---|")
    for tokens in (64, 65):
        shape = (batch, tokens, num_heads, head_dim)
        q, k, v, g = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(4))
        for name, attend in implementations.items():

            @jax.jit
            def both(q, k, v, g, attend=attend):
                y, back = jax.vjp(attend, q, k, v)
                return y, back(g)

            def call(both=both, arguments=(q, k, v, g)):
                return [both(*arguments) for _ in range(20)]

            try:
                time_or_error = f"{1e6 * seconds(call) / 20:.1f}"
            except Exception as e:  # an implementation may reject a device or a shape in any way
                time_or_error = f"failed: {(str(e).strip() or repr(e)).splitlines()[0][:80]}"
            print(f"| {name} | {tokens} | {time_or_error} |", flush=True)


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=pathlib.Path, required=True, metavar="RECIPE", help="name or path"
    )
    parser.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=(1, 4, 16, 64),
        help="steps per dispatch to measure (default: 1 4 16 64)",
    )
    args, overrides = parser.parse_known_args()
    config = config_lib.from_file(args.config)
    config_lib.override(config, overrides, "--config, --counts")
    experiment = make_experiment(config)
    steps_per_dispatch(experiment, args.counts)
    model = experiment.model
    head_dim = model.width // model.num_heads
    attention_table(config.batch_size, model.num_heads, head_dim, model.dtype)


if __name__ == "__main__":
    run_command(main)
