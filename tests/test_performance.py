"""Operation counts of the compiled training step, which do not depend on machine load."""

import collections
import math
import pathlib
import re

import jax
import pytest

from vit_jax import config
from vit_jax.commands.describe import compile_step, transfers
from vit_jax.experiment import make_experiment

DEPTH, WIDTH, TOKENS, BATCH = 2, 16, 5, 16  # of tiny_config: 8x8 images in patches of 4
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(")


class Program:
    """The instructions of a compiled step, from its text."""

    def __init__(self, experiment):
        self.compiled = compile_step(experiment)
        self.text = self.compiled.as_text()
        entry = self.text[self.text.index("\nENTRY") :]
        self.everywhere = [m for m in map(_INSTRUCTION.match, self.text.splitlines()) if m]
        self.entry = [m for m in map(_INSTRUCTION.match, entry.splitlines()) if m]

    def count(self, kind, instructions=None):
        """Number of instructions of a kind in a list (default: all, including fusions)."""
        return sum(m[3] == kind for m in instructions or self.everywhere)

    def large(self, kind, size):
        """Number of instructions of a kind that write arrays of at least `size` elements."""
        found = (m for m in self.everywhere if m[3] == kind)
        return sum(math.prod(int(n) for n in m[2].split(",") if n) >= size for m in found)


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
def program(experiment):
    return Program(experiment)


def test_every_matrix_product_is_computed_once(program):
    """Forward 6 per block, backward twice that; no gradient with respect to the patches.

    With one query, in the last block, the gradients of keys and values need no product.
    """
    assert program.count("dot") == 18 * DEPTH + 2 + 3 - 2


def test_remat_recomputes_only_the_forward_products(make, program):
    again = Program(make(remat=True))
    assert 18 * DEPTH + 5 < again.count("dot") <= 24 * DEPTH + 5


def test_nothing_is_transferred_to_the_host_or_another_device(program):
    assert transfers(program.text) == {}
    to_host = r" (infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*(MoveTo|callback)"
    assert not re.search(to_host, program.text)


def test_all_floats_are_float32(program):
    kinds = collections.Counter(m[1] for m in program.everywhere)
    assert not {"f64", "bf16", "f16", "c64"} & set(kinds)


def test_optimizer_updates_its_arrays_in_place(experiment, program):
    """Weights and moments are donated; otherwise each matrix would have three copies."""
    matrices = [
        p for p in jax.tree.leaves(experiment.state_shapes.params) if p.size >= WIDTH * WIDTH
    ]
    assert len(matrices) >= 4 * DEPTH
    sizes = {",".join(map(str, p.shape)) for p in matrices}
    copies = sum(m[3] == "copy" and m[2] in sizes for m in program.entry)
    assert copies <= len(matrices)
    memory = program.compiled.memory_analysis()
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(experiment.state_shapes))
    assert memory.alias_size_in_bytes >= state


def test_number_of_large_transposes_is_bounded(program):
    """Activation-size arrays are transposed for the heads and for weight gradients."""
    activation = BATCH * TOKENS * WIDTH
    moved = program.large("transpose", activation) + program.large("copy", activation)
    assert moved <= 16 * DEPTH


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
    fusions, dots = program.count("fusion", program.entry), program.count("dot")
    assert fusions / dots < 12
