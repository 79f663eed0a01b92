"""Properties of the training step compiled for H100s, and steps broken on purpose.

The steps have two blocks and are compiled without a GPU. docs/gpu.md states kernels and times.
"""

import pathlib
import re

import gpu_helpers
import jax
import jax.numpy as jnp
import pytest
from gpu_helpers import compile_function, compile_recipe
from optax.contrib import MuonState

from vit_jax import config, model
from vit_jax.commands.describe import estimate
from vit_jax.commands.describe.describe import step_memory
from vit_jax.commands.describe.program import Program
from vit_jax.parallel.targets import TARGETS

ROOT = pathlib.Path(__file__).parents[1]
RATES = estimate.rates_of(TARGETS["h100"])
# (recipe, target, fsdp): bound of the memory per device, in MB, of two blocks.
CASES = {
    ("cifar10_vit", "h100", 1): 400,
    ("cifar10_vit", "h100x8", 1): 300,
    ("cifar10_vit", "h100x8", 8): 300,
    ("cifar10_vit_100ep", "h100", 1): 900,
    ("cifar10_vit_100ep", "h100x8", 1): 400,
    ("cifar10_vit_100ep", "h100x8", 8): 400,
}


def recipe(name, fsdp=1, **fields):
    c = config.from_file(ROOT / "configs" / f"{name}.py")
    for field, value in ({"mesh.fsdp": fsdp} | fields).items():
        config.set_field(c, field, value)
    return c


class Step:
    """A compiled step, and what the guards read from it."""

    def __init__(self, experiment, compiled):
        self.experiment, self.program = experiment, Program(compiled.as_text())
        self.memory = sum(step_memory(compiled)) / 1e6

    def undonated(self):
        """Number of arrays of the state that are not updated in place."""
        return len(jax.tree.leaves(self.experiment.state_shapes)) - self.program.num_donated


def dtypes(program):
    return set(re.findall(r"\b([a-z]+\d+)\[", program.text))


def sums_over_devices(program):
    """{dtype: elements} of the arrays that devices add up, without counts and scalars."""
    sizes = {}
    for k in program.kernels:
        if k.kind in ("all-reduce", "reduce-scatter"):
            for dtype, shape in re.findall(r"([a-z]+\d+)\[([\d,]+)\]", k.result_shape):
                n = 1
                for size in shape.split(","):
                    n *= int(size)
                sizes[dtype] = sizes.get(dtype, 0) + n
    return sizes


def muon_elements(experiment):
    """Number of elements of the matrices that Muon updates."""
    states = jax.tree.leaves(
        experiment.state_shapes.opt_state, is_leaf=lambda x: isinstance(x, MuonState)
    )
    muon = [state for state in states if isinstance(state, MuonState)]
    return sum(x.size for x in jax.tree.leaves([state.mu for state in muon]))


def units(program):
    """{precision} of the products and convolutions."""
    return {unit for k in program.kernels for unit in k.flops}


pytestmark = pytest.mark.gpu_check


@pytest.fixture(scope="module", autouse=True)
def _compiler(require):
    require("gpu_check", gpu_helpers.INSTALLED, gpu_helpers.REMEDY)


def memory_is_bounded(case, step):
    assert step.memory < CASES[case]


def state_is_updated_in_place(case, step):
    assert step.undonated() == 0


def nothing_is_float64(case, step):
    assert "f64" not in dtypes(step.program)


def gradients_are_summed_over_devices_in_float32(case, step):
    sums = sums_over_devices(step.program)
    assert set(sums) <= {"f32", "s32"}
    if case[1] == "h100":
        assert not sums
    elif case[2] == 1:  # two devices compute updates of Muon, and the others add zeros
        expected = step.experiment.num_params + muon_elements(step.experiment)
        assert sums["f32"] == pytest.approx(expected, rel=0.01)
    else:  # a reduce-scatter results in an eighth; not every gradient needs a sum
        assert sums["f32"] > 0.6 * step.experiment.num_params / case[2]


def only_the_expected_collectives(case, step):
    expected = {1: {"all-reduce"}, 8: {"all-reduce", "all-gather", "reduce-scatter"}}[case[2]]
    found = step.program.transfers()
    assert bool(found) == (case[1] != "h100")
    # Single images for mixing, and the class token of each shard.
    small = [found.pop(kind)[1] for kind in ("collective-permute", "all-to-all") if kind in found]
    assert sum(small) < 50_000 and set(found) <= expected
    to_host = r" (infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*(MoveTo|callback)"
    assert not re.search(to_host, step.program.text)


def products_have_the_precision_of_the_recipe(case, step):
    assert units(step.program) == ({"f32"} if case[0] == "cifar10_vit" else {"bf16", "tf32"})


def kernels_and_least_time_are_those_of_the_docs(case, step):
    name, target, fsdp = case
    options = ":model.depth=2" + (f",mesh.fsdp={fsdp}" if fsdp > 1 else "")
    text = (ROOT / "docs" / "gpu.md").read_text()
    row = re.search(rf"^\| {name}{options} \| {target} \|.*$", text, re.M)[0].split("|")
    sums = estimate.total(step.program.kernels, RATES)
    assert sums["kernels"] == pytest.approx(float(row[5].replace(",", "")), rel=0.03)
    assert sums["seconds"] * 1e3 == pytest.approx(float(row[7]), rel=0.03)
    assert all(step.program.loops())  # of known length


GUARDS = (
    memory_is_bounded,
    state_is_updated_in_place,
    nothing_is_float64,
    gradients_are_summed_over_devices_in_float32,
    only_the_expected_collectives,
    products_have_the_precision_of_the_recipe,
    kernels_and_least_time_are_those_of_the_docs,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_program(case):
    """One test, because compiling takes most of its time."""
    name, target, fsdp = case
    step = Step(*compile_recipe(recipe(name, fsdp, **{"model.depth": 2}), target))
    for guard in GUARDS:
        guard(case, step)


SMALL = {"model.depth": 1, "model.width": 64, "model.num_heads": 2, "model.mlp_dim": 128}


def test_remat_saves_memory():
    small = SMALL | {"model.depth": 4, "batch_size": 1024}
    memory = Step(*compile_recipe(recipe("cifar10_vit", **small), "h100")).memory
    small |= {"model.remat": True}
    again = Step(*compile_recipe(recipe("cifar10_vit", **small), "h100"))
    assert again.memory - 154 < 0.6 * (memory - 154)  # without the data


def test_guard_of_donation_fails_without_donation():
    with jax.debug_nans(True):  # keeps the state, to run the step again
        step = Step(*compile_recipe(recipe("cifar10_vit", **SMALL), "h100"))
    assert step.undonated() == len(jax.tree.leaves(step.experiment.state_shapes))


def test_guard_of_memory_fails_for_a_batch_of_32768():
    large = recipe("cifar10_vit", batch_size=32_768)
    assert Step(*compile_recipe(large, "h100")).memory > 80_000


def test_guard_of_gradients_fails_for_sums_in_bfloat16(monkeypatch):
    def matmul(x, kernel, precision):
        return jnp.matmul(x, kernel.astype(x.dtype), precision=precision)

    monkeypatch.setattr(model, "matmul", matmul)
    broken = recipe("cifar10_vit", **SMALL | {"model.dtype": "bfloat16"})
    assert "bf16" in sums_over_devices(Step(*compile_recipe(broken, "h100x8")).program)


def test_guard_of_precision_fails_for_tf32():
    broken = recipe("cifar10_vit", **SMALL | {"model.matmul_precision": "tf32"})
    assert units(Step(*compile_recipe(broken, "h100")).program) == {"tf32"}


def test_guard_of_float64_fails_for_a_float64():
    with jax.enable_x64(True):
        program = compile_function(lambda x: x.astype(jnp.float64).sum(), jnp.ones(8, jnp.float32))
    assert "f64" in dtypes(program)
