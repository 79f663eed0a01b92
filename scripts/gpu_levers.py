"""Levers of a GPU that are no field of a recipe: python scripts/gpu_levers.py --config F.

Several steps in one dispatch (a scan over the very step, also unrolled), and attention alone,
forward and backward, by each implementation that jax has, at 64 and 65 tokens. What this device
cannot run is told, not hidden.
"""

import argparse
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from vit_jax import config as config_lib
from vit_jax.errors import run_command
from vit_jax.run import setup


def seconds(call, *, repeats=5):
    """Median seconds of a call that returns arrays, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def steps_per_dispatch(run, counts):
    """Prints milliseconds a step for so many steps in one dispatched program."""
    print("| steps a dispatch | unrolled | ms a step |\n|---|---|---|")
    split, order = next(run.inputs(0))
    for count in counts:
        for unroll in (False, True) if 1 < count <= 16 else (False,):
            state = [run.init(run.put(run.seeds))]

            @functools.partial(jax.jit, donate_argnums=0)
            def several(state, split, order, count=count, unroll=unroll):
                def body(state, _):
                    return run.step(state, split, order)

                return jax.lax.scan(body, state, length=count, unroll=unroll)

            def call(state=state, several=several, count=count):
                for _ in range(max(1, 64 // count)):
                    state[0], metrics = several(state[0], split, order)
                return metrics

            each = seconds(call) / count / max(1, 64 // count)
            print(f"| {count} | {unroll} | {1e3 * each:.3f} |", flush=True)


def plain(q, k, v):
    """The model's own attention, on [B, N, h, K]."""
    scores = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhk->bnhk", weights, v)


def pallas(q, k, v):
    """jax's own Pallas kernel for GPUs."""
    from jax.experimental.pallas.ops.gpu import attention

    return attention.mha(q, k, v, segment_ids=None, sm_scale=q.shape[-1] ** -0.5)


def attention_table(batch, num_heads, head_dim, dtype):
    """Prints microseconds of attention, forward and backward, by each implementation."""
    implementations = {"ours": plain, "pallas": pallas}
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
                told = f"{1e6 * seconds(call) / 20:.1f}"
            except Exception as e:  # an implementation may refuse a device or a shape in any way
                told = f"not here: {str(e).strip().splitlines()[0][:80] if str(e) else repr(e)}"
            print(f"| {name} | {tokens} | {told} |", flush=True)


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=pathlib.Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=(1, 4, 16, 64))
    args, rest = parser.parse_known_args()
    config = config_lib.from_file(args.config)
    config_lib.override(config, rest, "--config, --counts")
    run = setup(config)
    steps_per_dispatch(run, args.counts)
    heads = run.model.num_heads
    attention_table(config.batch_size, heads, run.model.width // heads, run.model.dtype)


if __name__ == "__main__":
    run_command(main)
