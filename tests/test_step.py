"""The pure step: masking, randomness from the seed, microbatches, EMA, sums, and evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import augment, config
from vit_jax.model import VisionTransformer
from vit_jax.optim import make_optimizer
from vit_jax.step import (
    gather,
    init_state,
    loss_and_grads,
    make_eval_step,
    make_train_step,
)

MODEL = VisionTransformer(
    num_classes=4, patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32, dropout=0.1
)
RNG = np.random.default_rng(0)
DATA = {
    "image": RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
    "label": RNG.integers(0, 4, 20).astype(np.int32),
}
PIXELS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@functools.cache
def make(ema_decay=0.0, skip_bad=False):
    c = config.defaults()
    schedule = optax.constant_schedule(1e-2)
    optimizer = make_optimizer(c.optim, schedule)
    train_step = make_train_step(
        MODEL,
        optimizer,
        augment.make_augment(c.augment, num_classes=4, **PIXELS),
        schedule=schedule,
        steps_per_epoch=3,
        mix_steps=100,
        ema_decay=ema_decay,
        skip_bad=skip_bad,
    )
    init = functools.partial(init_state, model=MODEL, optimizer=optimizer, image_shape=(8, 8, 3))
    return jax.jit(train_step), jax.jit(functools.partial(init, ema=ema_decay > 0))(0)


def test_gather_masks_missing_rows():
    batch = gather(jax.tree.map(jnp.asarray, DATA), jnp.array([3, 0, -1]))
    np.testing.assert_array_equal(batch["image"][:2], DATA["image"][[3, 0]])
    np.testing.assert_array_equal(batch["label"][:2], DATA["label"][[3, 0]])
    np.testing.assert_array_equal(batch["mask"], [True, True, False])


def test_step_depends_only_on_the_seed_and_the_step():
    train_step, state = make()
    batch = gather(DATA, np.arange(8))
    (a, first), (_, again) = train_step(state, batch), train_step(state, batch)
    assert first["loss"] == again["loss"]
    other_seed = train_step(state.replace(seed=jnp.uint32(1)), batch)[1]
    other_step = train_step(state.replace(step=jnp.int32(1)), batch)[1]
    assert len({float(m["loss"]) for m in (first, other_seed, other_step)}) == 3
    assert a.step == 1 and a.seed == 0


def test_masked_rows_do_not_affect_the_step():
    train_step, state = make()
    batch = gather(DATA, np.array([0, 1, 2, 3, 4, -1, -1, -1]))
    junk = {**batch, "image": batch["image"].copy(), "label": batch["label"].copy()}
    junk["image"][5:], junk["label"][5:] = 255, 3
    for a, b in zip(
        jax.tree.leaves(train_step(state, batch)),
        jax.tree.leaves(train_step(state, junk)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_sums_restart_with_each_epoch():
    train_step, state = make()
    losses = []
    for i in range(5):  # three steps per epoch
        state, metrics = train_step(state, gather(DATA, np.arange(4 * i, 4 * i + 4)))
        losses.append(float(metrics["loss"]))
    assert float(state.sums["loss"]) == pytest.approx(sum(losses[3:]), rel=1e-6)


def test_ema_weights_with_warmup_of_the_decay():
    train_step, state = make(ema_decay=0.5, skip_bad=True)
    batch = gather(DATA, np.arange(8))
    expected = state.params
    for i in range(12):
        state, _ = train_step(state, batch)
        decay = min(0.5, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema_params, expected
    )


def test_training_lowers_the_loss_and_reports_metrics():
    train_step, state = make()
    batch = gather(DATA, np.arange(20))
    state, first = train_step(state, batch)
    for _ in range(100):
        state, metrics = train_step(state, batch)
    assert metrics["loss"] < 0.2 * first["loss"] and metrics["accuracy"] > 0.9
    assert metrics["lr"] == np.float32(1e-2) and metrics["grad_norm"] > 0


def test_evaluation_counts_only_the_mask():
    _, state = make()
    eval_step = jax.jit(make_eval_step(MODEL, **PIXELS))
    sums = eval_step(state.params, gather(DATA, np.array([5, 6, 7, -1])))
    images = augment.normalize(DATA["image"][5:8], **PIXELS)
    logits = jax.jit(MODEL.apply)({"params": state.params}, images)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, DATA["label"][5:8])
    assert sums["count"] == 3
    assert sums["correct"] == (np.argmax(logits, -1) == DATA["label"][5:8]).sum()
    assert float(sums["loss"]) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_skipped_step_changes_only_the_counts():
    train_step, state = make(ema_decay=0.5, skip_bad=True)
    batch = gather(DATA, np.arange(8))
    state, _ = train_step(state, batch)
    before = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    after, metrics = train_step(before, batch)
    assert metrics["bad"] and metrics["skipped"] == 1
    assert (after.step, after.sums["skipped"]) == (2, 1)
    assert after.sums["loss"] == before.sums["loss"] > 0
    for name in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))


@pytest.mark.usefixtures("optimized")  # until the end of the module
def test_microbatch_gradients_equal_the_gradients_of_the_batch():
    c = config.defaults()
    c.augment.flip, c.augment.mixup_alpha = "random", 0.8
    model = MODEL.clone(dropout=0.0)
    make_step = functools.partial(
        make_train_step,
        optimizer=optax.sgd(1.0),
        augment_fn=augment.make_augment(c.augment, num_classes=4, **PIXELS),
        schedule=optax.constant_schedule(1.0),
        steps_per_epoch=3,
        mix_steps=100,
        ema_decay=0.0,
    )
    _, state = make()
    state = state.replace(opt_state=optax.sgd(1.0).init(state.params))
    batch = gather(DATA, np.array([3, 1, 4, 15, 9, -1, -1, -1]))
    expected_state, expected = jax.jit(make_step(model))(state, batch)
    for count, remat in ((2, False), (4, True)):
        step = jax.jit(make_step(model.clone(remat=remat), accumulate_steps=count))
        accumulated, metrics = step(state, batch)
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
        pairs = zip(*map(jax.tree.leaves, (expected_state.params, accumulated.params)), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_microbatches_are_strided_and_have_separate_dropout():
    """Microbatch i is every second row starting at i; its dropout key is folded with i."""
    _, state = make()
    images = augment.normalize(DATA["image"][:8], **PIXELS)
    inputs = images, jax.nn.one_hot(DATA["label"][:8], 4), np.arange(8) < 7
    key = jax.random.key(1)
    loss, grads, logits = jax.jit(functools.partial(loss_and_grads, MODEL, num_microbatches=2))(
        state.params, inputs, 7, key
    )
    one = jax.jit(functools.partial(loss_and_grads, MODEL))
    parts = [
        one(state.params, [x[i::2] for x in inputs], 7, jax.random.fold_in(key, i))
        for i in range(2)
    ]
    assert float(loss) == pytest.approx(float(parts[0][0] + parts[1][0]), rel=1e-6)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-5, atol=1e-6),
        *(grads, parts[0][1], parts[1][1]),
    )
    for i in range(2):
        np.testing.assert_allclose(logits[i::2], parts[i][2], rtol=1e-5, atol=1e-6)
