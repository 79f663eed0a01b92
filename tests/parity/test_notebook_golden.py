"""The port against golden.npz, which make_golden.py writes with PyTorch. Does not need PyTorch."""

import importlib
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from ours import (
    NUM_CLASSES,
    Trainer,
    assert_all_below,
    is_constant,
    notebook_config,
    relative_differences,
    sizes,
)
from scipy import stats

from vit_jax import augment, optim
from vit_jax.model import init_params, make_model
from vit_jax.weights import from_params, notebook_to_params
from vit_jax.weights.layouts import NOTEBOOK

PATH = Path(__file__).with_name("golden.npz")
SIZES = sizes(width=32, depth=2, num_heads=4, patch_size=4)
INIT_SEEDS = 64  # as for the file's quantiles
FAMILY_SIGNIFICANCE = 1e-3


@pytest.fixture(scope="module")
def golden():
    with np.load(PATH) as file:
        return dict(file)


def _group(golden, name):
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def params(golden):
    return notebook_to_params(_group(golden, "weights"))


@pytest.fixture(scope="module")
def trainer(golden):
    config = notebook_config(**SIZES)
    return Trainer(config, golden["images"], golden["labels"], steps_per_epoch=100)


def test_file_is_small():
    assert PATH.stat().st_size < 300_000


def test_transform_is_bit_equal(golden):
    images = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1).reshape(1, 16, 16, 3)
    config = notebook_config()
    ours = augment.normalize(images, config.data.mean, config.data.std)
    assert np.asarray(ours).tobytes() == golden["transform"].tobytes()


def test_logits(golden, params, trainer):
    assert np.abs(trainer.logits(params, golden["images"]) - golden["logits"]).max() < 1e-5


def test_evaluation(golden, params, trainer):
    indices = np.r_[np.arange(48), np.full(16, -1)].reshape(2, 32)
    ours = trainer.evaluate(params, indices)
    hits = int((golden["logits"].argmax(1) == golden["labels"]).sum())
    assert (ours["correct"], ours["count"]) == (hits, 48)


def test_loss_and_every_gradient_of_a_padded_batch(golden, params, trainer):
    losses, grads, _ = trainer.train(params, [_padded(0)])
    assert abs(losses[0] - golden["loss"]) < 1e-5
    theirs = _group(golden, "gradients")
    assert_all_below(relative_differences(from_params(grads, NOTEBOOK), theirs), 1e-4)


def test_50_adamw_steps(golden, params, trainer):
    losses, _, _ = trainer.train(params, [_padded(i % 3) for i in range(50)])
    assert len(golden["losses"]) == 50
    assert golden["losses"][-1] < golden["losses"][0] - 0.1
    assert np.abs(losses - golden["losses"]).max() < 1e-4


def test_adamw_decays_every_parameter(params):
    """With a zero gradient, the update is -lr wd times the parameter, as in torch."""
    optimizer = optim.make_optimizer(notebook_config().optim, optax.constant_schedule(3.0))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    expected = jax.tree.map(lambda p: p * np.float32(-3.0 * 1e-4), params)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected)


def _padded(i):
    """Returns batch i of 16, padded by 8 rows."""
    return np.r_[np.arange(16) + 16 * i, np.full(8, -1)]


def test_initial_weights(golden):
    """Kolmogorov-Smirnov test at 99 quantiles, pooled over seeds, Bonferroni-corrected."""
    vit = make_model(notebook_config(**SIZES).model, num_classes=NUM_CLASSES)
    init = jax.jit(lambda seed: init_params(vit, jax.random.key(seed), (16, 16, 3)))
    seeds = [from_params(jax.device_get(init(i)), NOTEBOOK) for i in range(INIT_SEEDS)]
    theirs = _group(golden, "init")
    p_values = {}
    for name, quantiles in theirs.items():
        ours = np.sort(np.concatenate([weights[name].ravel() for weights in seeds]))
        if is_constant(quantiles):
            assert (ours == quantiles[0]).all(), name
            continue
        levels = np.arange(1, len(quantiles) + 1) / (len(quantiles) + 1)
        below = np.searchsorted(ours, quantiles, side="right") / ours.size
        distance = np.abs(below - levels).max()
        p_values[name] = stats.kstwobign.sf(distance * (ours.size / 2) ** 0.5)
    assert len(p_values) == 2 + 2 * 6 + 2
    wrong = {k: p for k, p in p_values.items() if p < FAMILY_SIGNIFICANCE / len(p_values)}
    assert not wrong, f"starting weights are of another distribution: {wrong}"


def test_file_matches_the_installed_torch(torch, golden):
    make_golden = importlib.import_module("make_golden")
    for name, theirs in make_golden.measure(golden).items():
        limit = 1e-5 * max(1, np.abs(theirs).max()) if name != "losses" else 1e-4
        assert np.abs(golden[name] - theirs).max() < limit, name
    for name, theirs in make_golden.initial_quantiles().items():
        # Draws may change with torch's version, so quantiles agree only approximately.
        spread = max(np.abs(theirs).max(), 1e-30)
        assert np.abs(golden[name] - theirs).max() / spread < 0.15, name
