"""TrainState, and the pure functions that make one, advance it and count its mistakes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vit_jax import augment
from vit_jax.model import init_params


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step, and the seed.

    `sums` holds the sums of the batch losses and batch accuracies since the epoch began, so that
    an epoch's mean survives an interruption, and "skipped" counts the batches left out of them
    where that is asked for. `ema_params` is None when there is no averaging.
    """

    step: jax.Array  # int32[]: optimizer updates made so far
    seed: jax.Array  # uint32[]
    params: Any
    opt_state: Any
    ema_params: Any
    sums: dict[str, jax.Array]  # float32[] each


def init_state(seed, model, optimizer, *, image_shape, ema, params=None, skip_bad=False):
    """The state before the first step, for images of (H, W, C). Jittable.

    It starts from `params` where they are given, else from the model's random weights.
    """
    if params is None:
        params = init_params(model, jax.random.key(seed), image_shape)
    return TrainState(
        step=jnp.int32(0),
        seed=jnp.uint32(seed),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        sums={k: jnp.float32(0) for k in ("loss", "accuracy", *["skipped"] * skip_bad)},
    )


def gather(data, indices):
    """A batch out of the resident split.

    Args: data {"image": uint8[N, H, W, C], "label": int32[N]}; indices int32[B], -1 for no example.
    Returns {"image": uint8[B, H, W, C], "label": int32[B], "mask": bool[B]}.
    """
    rows = jnp.maximum(indices, 0)
    return {"image": data["image"][rows], "label": data["label"][rows], "mask": indices >= 0}


def over_seeds(fn, num_seeds, in_axes):
    """`fn` over replicas: arguments whose axis is 0 and all results lead with [num_seeds].

    One replica is not vmapped, so that its program is the plain one, bit for bit.
    """
    if num_seeds > 1:
        return jax.vmap(fn, in_axes)

    def single(*args):
        args = [
            arg if axis is None else jax.tree.map(lambda x: x[0], arg)
            for arg, axis in zip(args, in_axes, strict=True)
        ]
        return jax.tree.map(lambda x: x[None], fn(*args))

    return single


def masked_mean(values, mask):
    """The mean of float32[B] over the examples that exist."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def seen(augment_fn, state, batch, *, steps_per_epoch, mix_steps):
    """(images, labels) of a batch as the model sees them in the step that follows a state."""
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    epoch, mix = state.step // steps_per_epoch, state.step < mix_steps
    return augment_fn(jax.random.fold_in(key, 0), batch, epoch=epoch, mix=mix)


def make_train_step(
    model,
    optimizer,
    augment_fn,
    *,
    schedule,
    steps_per_epoch,
    mix_steps,
    ema_decay,
    accumulate_steps=1,
    skip_bad=False,
):
    """train_step(state, batch) -> (state, metrics): pure, to be jitted by the caller.

    The batch is {"image": uint8[B, H, W, C], "label": int32[B], "mask": bool[B]}. Metrics are
    float32[]: loss and accuracy over the mask, grad_norm (before clipping) and lr. All randomness
    of a step derives from (state.seed, state.step). Mixup and cutmix stop after `mix_steps`.

    The metric `bad` is bool[]: the loss or the gradient is not finite. With `skip_bad` such a step
    changes nothing but the count of steps and is excluded from `sums`; the metric `skipped` counts
    such steps in the epoch so far.

    With `accumulate_steps` of A the batch is augmented and mixed whole, then goes forward and
    backward in A parts, one after another, whose gradients are summed: the same step for the
    memory of B / A images. Only dropout draws otherwise, each part with a key of its own. A part
    is every A-th row, so that each device finds its share of every part among its own rows.
    """

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        dropout_key = jax.random.fold_in(key, 1)
        images, labels = seen(
            augment_fn, state, batch, steps_per_epoch=steps_per_epoch, mix_steps=mix_steps
        )

        def loss_fn(params, images, labels, mask, dropout_key):
            rngs = {"dropout": dropout_key}
            logits = model.apply({"params": params}, images, train=True, rngs=rngs)
            losses = optax.softmax_cross_entropy(logits, labels)
            if accumulate_steps == 1:
                return masked_mean(losses, mask), logits
            return jnp.sum(jnp.where(mask, losses, 0.0)) / count, logits

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        inputs = (images, labels, batch["mask"])
        if accumulate_steps == 1:
            (loss, logits), grads = grad_fn(state.params, *inputs, dropout_key)
        else:
            count = jnp.maximum(jnp.sum(batch["mask"]), 1)  # of the whole batch, not of a part

            def split(x):
                return jnp.swapaxes(x.reshape(-1, accumulate_steps, *x.shape[1:]), 0, 1)

            def add_part(total, part):
                inputs, i = part
                key = jax.random.fold_in(dropout_key, i)
                (loss, logits), grads = grad_fn(state.params, *inputs, key)
                return jax.tree.map(jnp.add, total, (loss, grads)), logits

            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
            parts = (jax.tree.map(split, inputs), jnp.arange(accumulate_steps))
            (loss, grads), logits = jax.lax.scan(add_part, zeros, parts)
            logits = jnp.swapaxes(logits, 0, 1).reshape(-1, logits.shape[-1])

        def update(grads, params, opt_state, ema_params):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            if ema_params is not None:
                # The average warms up, or a short run would remember its first weights.
                decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
                ema_params = jax.tree.map(
                    lambda e, p: decay * e + (1 - decay) * p, ema_params, params
                )
            return params, opt_state, ema_params

        # With the axis of the replicas, as the state is kept: so XLA updates its arrays in place,
        # where behind a reshape it copies each of them first.
        old = (grads, state.params, state.opt_state, state.ema_params)
        new = jax.vmap(update)(*jax.tree.map(lambda x: x[None], old))
        params, opt_state, ema_params = jax.tree.map(lambda x: x[0], new)
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        metrics = {
            "loss": loss,
            "accuracy": masked_mean(correct.astype(jnp.float32), batch["mask"]),
            "grad_norm": optax.tree.norm(grads),
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
        }
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"]))
        batches = state.step % steps_per_epoch
        added = {k: metrics[k] for k in ("loss", "accuracy")}
        if skip_bad:
            old = (state.params, state.opt_state, state.ema_params)
            new = (params, opt_state, ema_params)
            params, opt_state, ema_params = jax.tree.map(
                lambda a, b: jnp.where(bad, a, b), old, new
            )
            added = {k: jnp.where(bad, 0.0, v) for k, v in added.items()}
            added["skipped"] = bad.astype(jnp.float32)
        sums = {k: jnp.where(batches == 0, 0.0, state.sums[k]) + v for k, v in added.items()}
        if skip_bad:
            metrics["skipped"] = sums["skipped"]
        state = TrainState(state.step + 1, state.seed, params, opt_state, ema_params, sums)
        return state, metrics | {"bad": bad}

    return train_step


def make_eval_step(model, *, mean, std):
    """eval_step(params, batch) -> {"loss", "correct", "count"}: sums over the batch's mask."""

    def eval_step(params, batch):
        logits = model.apply({"params": params}, augment.normalize(batch["image"], mean, std))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        mask = batch["mask"]
        return {
            "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
            "correct": jnp.sum(correct & mask),
            "count": jnp.sum(mask),
        }

    return eval_step
