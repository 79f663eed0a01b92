"""Operation counts of the compiled training step, which do not depend on machine load."""

import math
import pathlib
import re

import jax
import pytest

from vit_jax import config
from vit_jax.commands.describe.describe import compile_step
from vit_jax.commands.describe.program import Program
from vit_jax.experiment import make_experiment

pytestmark = pytest.mark.usefixtures("optimized")
SHAPE = re.compile(r"\(?(\w+)\[([\d,]*)\]")  # dtype and sizes
DEPTH, WIDTH, TOKENS, BATCH = 2, 16, 5, 16  # of tiny_config: 8x8 images in patches of 4


class Counts(Program):
    """Counts in a compiled step."""

    def __init__(self, experiment):
        self.compiled = compile_step(experiment)
        super().__init__(self.compiled.as_text())

    def count(self, opcode):
        """Number of instructions of a kind, including those in fusions."""
        return sum(op.opcode == opcode for op in self.instructions())

    def count_in_entry(self, opcode):
        """Number of instructions of a kind that are not part of another."""
        entry = self.computations[self.entry].instructions.values()
        return sum(op.opcode == opcode for op in entry)

    def large(self, opcode, size):
        """Number of instructions of a kind that write arrays of at least `size` elements."""
        found = (op for op in self.instructions() if op.opcode == opcode)
        sizes = (SHAPE.match(op.shape)[2].split(",") for op in found)
        return sum(math.prod(int(n) for n in s if n) >= size for s in sizes)


@pytest.fixture(scope="module")
def make(tiny_folder):
    """Builds the Experiment of the notebook's recipe, shrunk."""

    def make(**fields):
        c = config.from_file(pathlib.Path(__file__).parents[1] / "configs" / "cifar10_vit.py")
        c.data.name = f"folder:{tiny_folder}"
        c.batch_size = BATCH
        sizes = {"width": WIDTH, "depth": DEPTH, "num_heads": 2, "mlp_dim": 4 * WIDTH}
        c.model.update({"patch_size": 4, **sizes, **fields})
        return make_experiment(c)

    return make


@pytest.fixture(scope="module")
def experiment(make):
    return make()


@pytest.fixture(scope="module")
def program(experiment, optimized):
    return Counts(experiment)


def test_every_matrix_product_is_computed_once(program):
    """Forward 6 per block, backward twice that; no gradient with respect to the patches.

    With one query, in the last block, the gradients of keys and values need no product.
    """
    assert program.count("dot") == 18 * DEPTH + 2 + 3 - 2


def test_remat_recomputes_only_the_forward_products(make, program):
    again = Counts(make(remat=True))
    # On a CPU, XLA merges some with those of the forward pass.
    assert program.count("dot") < again.count("dot") <= 24 * DEPTH + 5


def test_nothing_is_transferred_to_the_host_or_another_device(program):
    assert program.transfers() == {}
    to_host = r" (infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*(MoveTo|callback)"
    assert not re.search(to_host, program.text)


def test_all_floats_are_float32(program):
    dtypes = {dtype for op in program.instructions() for dtype, _ in SHAPE.findall(op.shape)}
    assert "f32" in dtypes and not {"f64", "bf16", "f16", "c64"} & dtypes


def test_optimizer_updates_its_arrays_in_place(experiment, program):
    """Weights and moments are donated; otherwise each matrix would have three copies."""
    matrices = [
        p for p in jax.tree.leaves(experiment.state_shapes.params) if p.size >= WIDTH * WIDTH
    ]
    assert len(matrices) >= 4 * DEPTH
    sizes = {",".join(map(str, p.shape)) for p in matrices}
    entry = program.computations[program.entry].instructions.values()
    copies = sum(op.opcode == "copy" and SHAPE.match(op.shape)[2] in sizes for op in entry)
    assert copies <= len(matrices)
    memory = program.compiled.memory_analysis()
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(experiment.state_shapes))
    assert memory.alias_size_in_bytes >= state


def test_number_of_large_transposes_is_bounded(program):
    """Activation-size arrays are transposed for the heads and for weight gradients."""
    activation = BATCH * TOKENS * WIDTH
    moved = program.large("transpose", activation) + program.large("copy", activation)
    assert moved <= 17 * DEPTH


def test_gelu_is_a_polynomial_and_one_exponential(program):
    """erf vectorizes; jax.nn.gelu's erfc has branches and exponentials in both directions."""
    assert program.large("exponential", BATCH * 4 * WIDTH) == DEPTH
    assert program.large("select", BATCH * TOKENS * 4 * WIDTH) <= DEPTH


def test_last_block_computes_only_the_class_token(program):
    assert program.large("exponential", BATCH * TOKENS * 4 * WIDTH) == DEPTH - 1


def test_memory_of_a_step_is_proportional_to_its_activations(experiment, program):
    """Counts floats kept for the backward pass per token and block, in units of the width."""
    memory = program.compiled.memory_analysis().temp_size_in_bytes
    gradients = 4 * experiment.num_params
    kept = (memory - gradients) / (4 * BATCH * TOKENS * WIDTH * DEPTH)
    assert 8 < kept < 40


def test_number_of_fusions_is_bounded(program):
    fusions, dots = program.count_in_entry("fusion"), program.count("dot")
    assert fusions / dots < 12
