"""The pure step: masking, seed-derived randomness, averaging, sums, and evaluation's counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import augment, config
from vit_jax.model import VisionTransformer
from vit_jax.optim import make_optimizer
from vit_jax.step import gather, init_state, make_eval_step, make_train_step

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
def make(ema_decay=0.0, **augmentation):
    c = config.defaults()
    for name, value in augmentation.items():
        config.set_field(c, f"augment.{name}", value)
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
    )
    init = functools.partial(init_state, model=MODEL, optimizer=optimizer, image_shape=(8, 8, 3))
    return jax.jit(train_step), jax.jit(functools.partial(init, ema=ema_decay > 0))(0)


def test_gather_masks_what_is_not_there():
    batch = gather(jax.tree.map(jnp.asarray, DATA), jnp.array([3, 0, -1]))
    np.testing.assert_array_equal(batch["image"][:2], DATA["image"][[3, 0]])
    np.testing.assert_array_equal(batch["label"][:2], DATA["label"][[3, 0]])
    np.testing.assert_array_equal(batch["mask"], [True, True, False])


def test_step_depends_on_the_seed_and_the_step_alone():
    train_step, state = make(flip="random")
    batch = gather(DATA, np.arange(8))
    (a, first), (_, again) = train_step(state, batch), train_step(state, batch)
    assert first["loss"] == again["loss"]
    other_seed = train_step(state.replace(seed=jnp.uint32(1)), batch)[1]
    other_step = train_step(state.replace(step=jnp.int32(1)), batch)[1]
    assert len({float(m["loss"]) for m in (first, other_seed, other_step)}) == 3
    assert a.step == 1 and a.seed == 0


def test_what_lies_in_masked_rows_changes_nothing():
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


def test_sums_start_again_with_each_epoch():
    train_step, state = make()
    losses = []
    for i in range(5):  # three steps an epoch
        state, metrics = train_step(state, gather(DATA, np.arange(4 * i, 4 * i + 4)))
        losses.append(float(metrics["loss"]))
    assert float(state.sums["loss"]) == pytest.approx(sum(losses[3:]), rel=1e-6)


def test_average_of_the_weights():
    train_step, state = make(ema_decay=0.5)
    batch = gather(DATA, np.arange(8))
    expected = state.params
    for i in range(12):
        state, _ = train_step(state, batch)
        decay = min(0.5, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema_params, expected
    )


def test_training_lowers_the_loss_and_reports_what_it_did():
    train_step, state = make()
    batch = gather(DATA, np.arange(20))
    state, first = train_step(state, batch)
    for _ in range(100):
        state, metrics = train_step(state, batch)
    assert metrics["loss"] < 0.2 * first["loss"] and metrics["accuracy"] > 0.9
    assert metrics["lr"] == np.float32(1e-2) and metrics["grad_norm"] > 0


def test_evaluation_counts_over_the_mask():
    _, state = make()
    eval_step = jax.jit(make_eval_step(MODEL, **PIXELS))
    sums = eval_step(state.params, gather(DATA, np.array([5, 6, 7, -1])))
    images = augment.normalize(DATA["image"][5:8], **PIXELS)
    logits = jax.jit(MODEL.apply)({"params": state.params}, images)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, DATA["label"][5:8])
    assert sums["count"] == 3
    assert sums["correct"] == (np.argmax(logits, -1) == DATA["label"][5:8]).sum()
    assert float(sums["loss"]) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_a_batch_in_parts_gives_the_gradients_of_the_whole():
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
    whole, told = jax.jit(make_step(model))(state, batch)
    for parts, remat in ((2, False), (4, True)):
        step = jax.jit(make_step(model.clone(remat=remat), accumulate_steps=parts))
        again, metrics = step(state, batch)
        for name, value in told.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(again.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
