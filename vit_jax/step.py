"""TrainState, and the pure functions that create it, advance it by a step, and evaluate it."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from optax.microbatching import AccumulationType, microbatch

from vit_jax import augment
from vit_jax.model import VisionTransformer, init_params
from vit_jax.optim import global_norm


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes from step to step, and the seed.

    `sums` are the sums of the batch losses and accuracies since the epoch began, and the number of
    skipped steps, so that an epoch's mean survives an interruption.
    """

    step: jax.Array  # int32[]: optimizer updates so far
    seed: jax.Array  # uint32[]
    params: Any
    opt_state: Any
    ema_params: Any  # None without EMA
    sums: dict[str, jax.Array]  # float32[] each

    @property
    def eval_params(self) -> Any:
        """The weights to evaluate: the EMA weights if the run keeps them."""
        return self.params if self.ema_params is None else self.ema_params


def init_state(
    seed: jax.Array,
    model: VisionTransformer,
    optimizer: optax.GradientTransformation,
    *,
    image_shape: tuple[int, int, int],
    ema: bool,
    params: Any = None,  # default: random initial weights
) -> TrainState:
    """Returns the state before the first step, for images of (H, W, C). Jittable."""
    if params is None:
        params = init_params(model, jax.random.key(seed), image_shape)
    return TrainState(
        step=jnp.int32(0),
        seed=jnp.uint32(seed),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        sums={k: jnp.float32(0) for k in ("loss", "accuracy", "skipped")},
    )


def gather(data: dict[str, jax.Array], indices: jax.Array) -> dict[str, jax.Array]:
    """Gathers the batch {"image", "label", "mask"} of rows int32[B]; -1 is masked."""
    with jax.named_scope("gather"):
        rows = jnp.maximum(indices, 0)
        return {"image": data["image"][rows], "label": data["label"][rows], "mask": indices >= 0}


def loss_and_grads(
    model: VisionTransformer,
    params: Any,
    inputs: Sequence[jax.Array],
    count: jax.Array,
    dropout_key: jax.Array,
    *,
    num_microbatches: int = 1,
) -> tuple[jax.Array, Any, jax.Array]:
    """Returns (loss, gradients, logits) of a batch, whose `inputs` are (images, soft labels, mask).

    The loss is the sum of the cross-entropies over the mask, divided by `count`. Microbatches run
    in sequence, in the memory of one. Microbatch i has rows i, i + num_microbatches, ..., so no
    rows move between devices. Its dropout key is fold_in(dropout_key, i).
    """

    def one_pass(inputs, dropout_key):
        images, labels, mask = inputs

        def loss_fn(params):
            rngs = {"dropout": dropout_key}
            logits = model.apply({"params": params}, images, train=True, rngs=rngs)
            with jax.named_scope("loss"):
                losses = optax.softmax_cross_entropy(logits, labels)
                return jnp.sum(jnp.where(mask, losses, 0.0)) / count, logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return loss, grads, logits

    def one_microbatch(part):
        *inputs, rows = part
        return one_pass(inputs, jax.random.fold_in(dropout_key, rows[0]))

    if num_microbatches == 1:
        return one_pass(inputs, dropout_key)
    rows = jnp.arange(inputs[-1].shape[0])
    return microbatch(
        one_microbatch,
        argnums=0,
        microbatch_size=len(rows) // num_microbatches,
        accumulator=(AccumulationType.SUM, AccumulationType.SUM, AccumulationType.CONCAT),
    )((*inputs, rows))


def apply_update(
    optimizer: optax.GradientTransformation, grads: Any, state: TrainState, *, ema_decay: float
) -> TrainState:
    """Returns the state with updated weights, optimizer state, and EMA weights."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        # The decay warms up; otherwise a short run stays biased toward its initial weights.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema_params = optax.incremental_update(params, ema_params, 1 - decay)
    return state.replace(params=params, opt_state=opt_state, ema_params=ema_params)


def _add_to_sums(state, metrics, skipped, *, steps_per_epoch):
    """Returns the sums of the epoch so far. A skipped step is counted and adds nothing."""
    added = {k: jnp.where(skipped, 0.0, metrics[k]) for k in ("loss", "accuracy")}
    added["skipped"] = jnp.float32(skipped)
    first = state.step % steps_per_epoch == 0
    return {k: jnp.where(first, 0.0, state.sums[k]) + v for k, v in added.items()}


def make_train_step(
    model: VisionTransformer,
    optimizer: optax.GradientTransformation,
    augment_fn: Callable,
    *,
    schedule: optax.Schedule,
    steps_per_epoch: int,
    mix_steps: int,
    ema_decay: float,
    accumulate_steps: int = 1,
    skip_bad: bool = False,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns train_step(state, batch) -> (state, metrics), pure, for the caller to jit.

    The batch is {"image": uint8[B, H, W, C], "label": int32[B], "mask": bool[B]}. The metrics are
    float32[] scalars: loss and accuracy over the mask, grad_norm (before clipping), and lr; and
    `bad`, bool[]: whether the loss or the gradient is not finite. With `skip_bad`, a bad step
    changes only `step` and `sums`, and the metric `skipped` is the epoch's count.

    All randomness of a step derives from (state.seed, state.step). Mixup and CutMix stop after
    `mix_steps`. The whole batch is augmented, then split into `accumulate_steps` microbatches.
    """

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        epoch, mix = state.step // steps_per_epoch, state.step < mix_steps
        with jax.named_scope("augment"):  # the names of the parts in a profile, and in describe
            images, labels = augment_fn(jax.random.fold_in(key, 0), batch, epoch=epoch, mix=mix)
        mask = batch["mask"]
        count = jnp.maximum(jnp.sum(mask), 1)
        loss, grads, logits = loss_and_grads(
            model,
            state.params,
            (images, labels, mask),
            count,
            jax.random.fold_in(key, 1),
            num_microbatches=accumulate_steps,
        )
        # Update in place after the last use of the weights; otherwise XLA copies them first.
        grads = jax.lax.optimization_barrier(grads)
        with jax.named_scope("metrics"):
            correct = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
            metrics = {
                "loss": loss,
                "accuracy": jnp.sum(jnp.where(mask, correct, 0.0)) / count,
                "grad_norm": global_norm(grads),
                "lr": jnp.asarray(schedule(state.step), jnp.float32),
            }
            bad = ~(jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"]))
            skipped = bad if skip_bad else False
            sums = _add_to_sums(state, metrics, skipped, steps_per_epoch=steps_per_epoch)
        with jax.named_scope("optimizer"):
            new_state = apply_update(optimizer, grads, state, ema_decay=ema_decay)
        if skip_bad:
            new_state = jax.tree.map(lambda old, new: jnp.where(bad, old, new), state, new_state)
            metrics["skipped"] = sums["skipped"]
        return new_state.replace(step=state.step + 1, sums=sums), metrics | {"bad": bad}

    return train_step


def make_eval_step(
    model: VisionTransformer, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]:
    """Returns eval_step(params, batch) -> {"loss", "correct", "count"}: sums over the mask."""

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
