"""Our side of the comparison, assembled from configs/cifar10_vit.py as training assembles it."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import augment, optim, step
from vit_jax.model import make_model

CONFIG = Path(__file__).parents[2] / "configs" / "cifar10_vit.py"
NUM_CLASSES = 10


def notebook_config(**model_fields):
    """Returns the notebook's config, with some fields of `config.model` changed."""
    config = runpy.run_path(CONFIG)["get_config"]()
    config.model.update(model_fields)
    return config


def sizes(width, depth, num_heads, patch_size):
    """Returns the fields of `config.model` for the notebook's model in these sizes."""
    return {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "patch_size": patch_size,
        "mlp_dim": 4 * width,
    }


def _keep_gradients():
    """Returns gradients unchanged and stores the last ones as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params: (grads,) * 2,
    )


class Trainer:
    """vit_jax's model, optimizer, augmentation, and step, on a resident split.

    `images` uint8[N, H, W, C] and `labels` int[N] are the split; the sums of an epoch restart
    every `steps_per_epoch` steps.
    """

    def __init__(self, config, images, labels, *, steps_per_epoch):
        o, norm = config.optim, {"mean": config.data.mean, "std": config.data.std}
        self.model = make_model(config.model, num_classes=NUM_CLASSES)
        schedule = optim.make_schedule(
            o, total_steps=1000, steps_per_epoch=steps_per_epoch, warmup_steps=0
        )
        self.optimizer = optax.chain(_keep_gradients(), optim.make_optimizer(o, schedule))
        train_step = step.make_train_step(
            self.model,
            self.optimizer,
            augment.make_augment(
                config.augment, num_classes=NUM_CLASSES, label_smoothing=o.label_smoothing, **norm
            ),
            schedule=schedule,
            steps_per_epoch=steps_per_epoch,
            mix_steps=0,
            ema_decay=o.ema_decay,
        )
        eval_step = step.make_eval_step(self.model, **norm)
        data = {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
        self._train_step = jax.jit(lambda s, indices: train_step(s, step.gather(data, indices)))
        self._eval_step = jax.jit(lambda p, indices: eval_step(p, step.gather(data, indices)))
        self._logits = jax.jit(
            lambda p, images: self.model.apply({"params": p}, augment.normalize(images, **norm))
        )

    def start(self, params):
        """Returns the state before the first step, with these weights."""
        params = jax.tree.map(jnp.asarray, params)
        return step.init_state(
            0, self.model, self.optimizer, image_shape=(32, 32, 3), ema=False, params=params
        )

    def train(self, params, batches):
        """Runs one step per row of indices: (losses, gradients of the last batch, final state)."""
        state, losses = self.start(params), []
        for indices in batches:
            state, metrics = self._train_step(state, jnp.asarray(indices, jnp.int32))
            losses.append(float(metrics["loss"]))
        return np.array(losses), jax.device_get(state.opt_state[0]), state

    def evaluate(self, params, batches):
        """Returns {"loss", "correct", "count"} summed over rows of indices."""
        sums = [self._eval_step(params, jnp.asarray(indices, jnp.int32)) for indices in batches]
        return {name: float(sum(s[name] for s in sums)) for name in sums[0]}

    def logits(self, params, images):
        return np.asarray(self._logits(params, images))


def relative_differences(ours, theirs):
    """Returns {name: max |a - b| / max |b|} of two dicts of arrays with the same names."""
    assert set(ours) == set(theirs)
    return {
        name: np.abs(ours[name] - b).max() / max(np.abs(b).max(), 1e-30)
        for name, b in theirs.items()
    }


def assert_all_below(differences, limit):
    """Fails with the names whose difference is not below the limit."""
    wrong = {name: float(d) for name, d in differences.items() if not d < limit}
    assert not wrong, f"not within {limit}: {wrong}"


def is_constant(array):
    return bool((array == array.flat[0]).all())
