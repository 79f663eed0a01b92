"""`model.weight_init = "pytorch"` has the initial distributions of torch's layers."""

import jax
import numpy as np
import pytest
from ours import NUM_CLASSES, is_constant, notebook_config
from scipy import stats

from vit_jax.model import init_params, make_model
from vit_jax.weights import from_params
from vit_jax.weights.layouts import NOTEBOOK

SEEDS = 4
FAMILY_SIGNIFICANCE = 1e-3  # probability of any false alarm, by Bonferroni
DEPTH = 2  # blocks; the notebook has six of the same kind
LARGEST_SAMPLE = 100_000  # values per tensor, evenly spaced; the largest have 262,144 per seed


@pytest.fixture(scope="module")
def ours():
    """[{notebook name: array}], one per seed, at the notebook's sizes except the depth."""
    vit = make_model(notebook_config(depth=DEPTH).model, num_classes=NUM_CLASSES)
    init = jax.jit(lambda seed: init_params(vit, jax.random.key(seed), (32, 32, 3)))
    return [from_params(jax.device_get(init(seed)), NOTEBOOK) for seed in range(SEEDS)]


def test_initial_weights_have_the_distributions_of_torch(torch, reference, ours):
    theirs = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        state_dict = reference.VisionTransformer(depth=DEPTH).state_dict()
        theirs.append({name: p.numpy() for name, p in state_dict.items()})
    drawn = [name for name, array in theirs[0].items() if not is_constant(array)]
    assert len(drawn) == 2 + 6 * DEPTH + 2  # patches; attention's two matrices and the MLP; head
    for name, array in theirs[0].items():
        assert all(mine[name].shape == array.shape for mine in ours)
        if name not in drawn:  # norms: one; embeddings, attention biases, and the rest: zero
            assert all(np.array_equal(mine[name], array) for mine in ours), name
    p_values = {}
    for name in drawn:
        samples = (np.concatenate([a[name].ravel() for a in side]) for side in (ours, theirs))
        samples = (s[:: -(-s.size // LARGEST_SAMPLE)] for s in samples)
        p_values[name] = stats.ks_2samp(*samples, method="asymp").pvalue
    wrong = {k: p for k, p in p_values.items() if p < FAMILY_SIGNIFICANCE / len(drawn)}
    assert not wrong, f"starting weights are of another distribution: {wrong}"


def test_no_two_draws_are_equal(ours):
    """Layers and seeds do not share random numbers."""
    first = {}
    for seed, weights in enumerate(ours):
        for name, array in weights.items():
            if not is_constant(array):
                scaled = tuple(np.round(array.ravel()[:4] / np.abs(array).max(), 2))
                assert scaled not in first, f"{name}, seed {seed}, starts as {first[scaled]}"
                first[scaled] = f"{name}, seed {seed}"
