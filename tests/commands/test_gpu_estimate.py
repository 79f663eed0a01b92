"""Work, bytes, and time of kernels, on programs whose figures are known by hand."""

import dataclasses

import gpu_helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_helpers import compile_function

from vit_jax.commands.describe import estimate
from vit_jax.commands.describe.program import Program
from vit_jax.errors import UserError

RATES = estimate.Rates(bf16=1000, tf32=500, f32=50, bandwidth=1000, launch=2)


pytestmark = pytest.mark.gpu_check


@pytest.fixture(autouse=True)
def _compiler(require):
    require("gpu_check", gpu_helpers.INSTALLED, gpu_helpers.REMEDY)


def floats(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def only(program):
    """The one kernel of a program."""
    (kernel,) = program.kernels
    return kernel


@pytest.mark.parametrize(
    ("dtype", "precision", "unit"),
    [
        (np.float32, None, "tf32"),
        (np.float32, "highest", "f32"),
        (jnp.bfloat16, None, "bf16"),
        (np.float32, jax.lax.DotAlgorithmPreset.BF16_BF16_F32, "bf16"),
    ],
)
def test_product(dtype, precision, unit):
    product = compile_function(
        lambda a, b: jnp.matmul(a, b, precision=precision),
        floats(2048, 64, dtype=dtype),
        floats(64, 1024, dtype=dtype),
    )
    kernel = only(product)
    assert kernel.flops == {unit: 2 * 2048 * 64 * 1024}
    size = np.dtype(dtype).itemsize
    assert kernel.num_bytes == size * (2048 * 64 + 64 * 1024 + 2048 * 1024)
    assert kernel.op_name.endswith("dot_general")


def test_elementwise_chain_reads_and_writes_once():
    kernel = only(compile_function(lambda x: jnp.tanh(2 * x + 1), floats(1000, 1000)))
    assert kernel.num_bytes == 2 * 4e6 and kernel.flops == {}


def test_reduction_writes_its_result():
    kernel = only(compile_function(lambda x: x.sum(axis=1), floats(1024, 512)))
    assert kernel.num_bytes == 4 * (1024 * 512 + 1024)


def test_dynamic_slice_touches_only_the_slice():
    def f(x, i):
        return jax.lax.dynamic_slice(x, (i, 0), (8, 64))

    kernel = only(compile_function(f, floats(1000, 64), floats(dtype=np.int32)))
    assert kernel.num_bytes == pytest.approx(2 * 4 * 8 * 64, abs=16)  # and indices


def test_gather_touches_only_its_rows():
    kernel = only(compile_function(lambda x, i: x[i], floats(1000, 64), floats(16, dtype=np.int32)))
    assert kernel.num_bytes == pytest.approx(2 * 4 * 16 * 64 + 4 * 16, abs=16)


def test_update_in_place_touches_only_the_update():
    def f(x, y, i):
        return jax.lax.dynamic_update_slice(x, y, (i, 0))

    arrays = floats(1000, 64), floats(8, 64), floats(dtype=np.int32)
    program = compile_function(f, *arrays, donate_argnums=0)
    assert program.num_donated == 1
    assert only(program).num_bytes == pytest.approx(2 * 4 * 8 * 64, abs=16)
    copied = compile_function(f, *arrays)
    assert copied.num_donated == 0
    assert sum(k.num_bytes for k in copied.kernels) > 2 * 4 * 1000 * 64


def test_loop_counts_every_iteration():
    def f(x, w):
        return jax.lax.fori_loop(0, 10, lambda i, x: jnp.tanh(x @ w), x)

    program = compile_function(f, floats(512, 256), floats(256, 256))
    assert list(program.loops()) == [10]
    assert sum(k.times * k.flops.get("tf32", 0) for k in program.kernels) == 10 * 2 * 512 * 256**2


def test_loop_of_unknown_length_counts_once():
    def f(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1000, lambda x: 2 * x, x)

    program = compile_function(f, floats(1024))
    assert list(program.loops()) == [None]
    assert any(k.num_bytes == 2 * 4 * 1024 for k in program.kernels)


def test_convolution_and_its_gradients():
    def f(x, w, g):
        def convolve(x, w):
            dims = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)

        return jax.vjp(convolve, x, w)[1](g)

    arrays = floats(8, 16, 16, 32), floats(3, 3, 32, 64), floats(8, 16, 16, 64)
    program = compile_function(f, *arrays)
    work = sum(k.times * sum(k.flops.values()) for k in program.kernels)
    assert work == pytest.approx(2 * 2 * 8 * 16 * 16 * 9 * 32 * 64)


def test_kernel_takes_the_longest_of_work_bytes_and_launch():
    def seconds(work, num_bytes, unit="tf32"):
        kernel = only(compile_function(lambda x: x + 1, floats(8)))
        return RATES.seconds(dataclasses.replace(kernel, flops={unit: work}, num_bytes=num_bytes))

    assert seconds(500e12, 1e9) == pytest.approx(1)
    assert seconds(50e12, 1e9, "f32") == pytest.approx(1)
    assert seconds(1e6, 1000e9) == pytest.approx(1)
    assert seconds(1e6, 1e3) == 2e-6


def test_rates_are_replaced_by_name():
    rates = estimate.replace_rates(RATES, ["bandwidth=4800", "launch=0.5"])
    assert (rates.bandwidth, rates.launch, rates.bf16) == (4800, 0.5, 1000)
    for wrong in ("bandwidth", "bandwidth=0", "memory=3", "tf32=-1"):
        with pytest.raises(UserError, match=f"--rates {wrong}: use NAME=NUMBER"):
            estimate.replace_rates(RATES, [wrong])


def test_a_program_without_kernels():
    program = Program("HloModule m\n\nENTRY %main (a: f32[]) -> f32[] {\n}\n")
    assert program.kernels == [] and program.transfers() == {}
