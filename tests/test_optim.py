"""Schedules, the decay mask, and the first updates of every optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import config
from vit_jax.config import FIELDS
from vit_jax.optim import decay_mask, global_norm, make_optimizer, make_schedule

PARAMS = {
    "cls_token": jnp.ones((1, 1, 4)),
    "pos_embed": jnp.ones((1, 3, 4)),
    "block_0": {
        "norm1": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "mlp": {"fc1": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}},
    },
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)},
}


def optim_config(**changes):
    c = config.defaults()
    for name, value in changes.items():
        config.set_field(c, f"optim.{name}", value)
    return c.optim


def learning_rates(steps=100, warmup_steps=0, steps_per_epoch=10, **changes):
    schedule = make_schedule(
        optim_config(**changes),
        total_steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps,
    )
    return np.array(jax.vmap(schedule)(jnp.arange(steps)))


def test_constant_schedule_is_constant():
    np.testing.assert_allclose(learning_rates(schedule="constant", peak_lr=3e-4), 3e-4)


def test_cosine_and_linear_schedules_fall_from_peak_lr_to_end_lr():
    t = np.arange(100) / 100
    cosine = 0.1 + (1 - 0.1) * (1 + np.cos(np.pi * t)) / 2
    np.testing.assert_allclose(
        learning_rates(schedule="cosine", peak_lr=1.0, end_lr=0.1), cosine, 1e-5
    )
    linear = 1 - 0.9 * t
    np.testing.assert_allclose(
        learning_rates(schedule="linear", peak_lr=1.0, end_lr=0.1), linear, 1e-5
    )


def test_cosine_per_epoch_equals_the_torch_scheduler_stepped_once_per_epoch():
    got = learning_rates(schedule="cosine", schedule_per="epoch", peak_lr=3e-4)
    epochs = np.repeat(np.arange(10), 10)
    np.testing.assert_allclose(got, 3e-4 * (1 + np.cos(np.pi * epochs / 10)) / 2, rtol=1e-5)


def test_schedule_per_epoch_changes_at_epoch_starts_with_any_warmup():
    got = learning_rates(schedule="linear", schedule_per="epoch", peak_lr=1.0, warmup_steps=15)
    assert list(15 + 1 + np.flatnonzero(np.diff(got[15:]))) == [20, 30, 40, 50, 60, 70, 80, 90]


def test_warmup_rises_linearly_from_the_first_step():
    got = learning_rates(schedule="cosine", peak_lr=1.0, warmup_steps=9)
    np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-5)
    assert (np.diff(got[9:]) <= 0).all() and got[-1] < 0.01


def test_decay_mask_selects_kernels_or_everything():
    mask = decay_mask("kernels", PARAMS)
    decayed = {jax.tree_util.keystr(p) for p, m in jax.tree_util.tree_leaves_with_path(mask) if m}
    assert decayed == {"['block_0']['mlp']['fc1']['kernel']", "['head']['kernel']"}
    assert all(jax.tree.leaves(decay_mask("all", PARAMS)))


@pytest.mark.parametrize("name", FIELDS["optim.name"].choices)
def test_optimizer_lowers_a_quadratic_and_decays_only_kernels(name):
    o = optim_config(name=name, schedule="constant", peak_lr=0.01, weight_decay=0.1)
    tx = make_optimizer(o, optax.constant_schedule(0.01), muon_schedule=lambda _: 0.01)
    state, params = tx.init(PARAMS), PARAMS
    # With zero gradients only decay changes a weight.
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    changed = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert changed == decay_mask("kernels", PARAMS)

    def loss(params):
        return sum(jnp.sum((p - 0.5) ** 2) for p in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
    assert loss(params) < loss(PARAMS)


def test_muon_orthogonalizes_only_hidden_matrices():
    o = optim_config(name="muon", weight_decay=0.0)
    tx = make_optimizer(o, lambda _: 1e-3, muon_schedule=lambda _: 0.02)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), PARAMS)
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    singular = np.linalg.svd(updates["block_0"]["mlp"]["fc1"]["kernel"], compute_uv=False)
    assert singular.max() / singular.min() < 2.5  # Newton-Schulz makes them nearly equal
    np.testing.assert_allclose(
        np.abs(updates["head"]["kernel"]), 1e-3, rtol=1e-3
    )  # Adam's first update


def test_muon_of_stacked_matrices_equals_muon_of_each():
    shapes = {"b": (6, 8), "a": (8, 6), "c": (6, 8), "d": (6, 6)}
    params = {"block_0": {name: jnp.ones(shape) for name, shape in shapes.items()}}
    o = optim_config(name="muon", weight_decay=0.1)
    tx = make_optimizer(o, lambda _: 1e-3, muon_schedule=lambda _: 0.02)
    each = optax.contrib.muon(0.02, weight_decay=0.1)
    state, expected_state = tx.init(params), each.init(params)
    for key in jax.random.split(jax.random.key(0), 3):
        leaves = [jax.random.normal(key, shape) for shape in shapes.values()]
        grads = {"block_0": dict(zip(shapes, leaves, strict=True))}
        updates, state = jax.jit(tx.update)(grads, state, params)
        expected, expected_state = jax.jit(each.update)(grads, expected_state, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, expected
        )


def test_global_norm_is_that_of_all_elements():
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), PARAMS)
    np.testing.assert_allclose(global_norm(grads), optax.tree.norm(grads), rtol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-3, 10.0])
def test_gradient_clipping_is_that_of_optax(size):
    o = optim_config(name="sgd", momentum=0.0, weight_decay=0.0, grad_clip_norm=1.0)
    tx, clip = make_optimizer(o, lambda _: 1.0), optax.clip_by_global_norm(1.0)
    grads = jax.tree.map(lambda p: size * jax.random.normal(jax.random.key(0), p.shape), PARAMS)
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    expected, _ = clip.update(grads, clip.init(PARAMS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-6), updates, expected)
