"""Builds the data, model, optimizer, and jitted step of a config, and describes them."""

import functools
import hashlib
import itertools
import math
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import augment, data, optim, seeds
from vit_jax import config as config_lib
from vit_jax import feed as feed_lib
from vit_jax import step as step_lib
from vit_jax import weights as weights_lib
from vit_jax.durations import Plan
from vit_jax.errors import UserError
from vit_jax.evaluate import make_evaluate
from vit_jax.model import check_image_shape, make_model, num_tokens, train_flops_per_image
from vit_jax.parallel import backend
from vit_jax.parallel import mesh as mesh_lib


class Experiment:
    """Everything derived from a config before the first step; see `make_experiment`.

    With several seeds, the arrays of the state and the metrics have a leading axis of seeds.

    Attributes:
      splits: {"train", "val", "test": Dataset or Stream}, except those empty in the config.
      initial_weights: the source of the initial weights, and the changes made to them.
      state_shapes: a TrainState of jax.ShapeDtypeStruct with shardings.
      init: () -> the TrainState before the first step, on the devices.
      train_step: jitted, (state, *inputs) -> (state, metrics); donates the state.
      eval_step: (params, batch) -> sums.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, splits: dict[str, Any], fresh: bool) -> None:
        self.config, self.mesh, self.splits = config, mesh, splits
        self.train = train = splits["train"]
        self.plan = Plan(config, train.num_examples)
        self.model = make_model(config.model, num_classes=len(train.class_names))
        check_image_shape(self.model, train.image_shape)
        augment.check_image_shape(config.augment, train.image_shape)
        self.feed = feed_lib.make_feed(train, config, self.plan, mesh)
        params, self.initial_weights = None, ()
        if config.init_from and fresh:
            weights = weights_lib.load_weights(config.init_from, num_heads=self.model.num_heads)
            params, notes = weights_lib.start_from(
                weights,
                self.model,
                train.image_shape,
                train.class_names,
                mean=config.data.mean,
                std=config.data.std,
            )
            self.initial_weights = (f"{config.init_from} ({weights.kind})", *notes)
        lengths = {
            "total_steps": self.plan.total_steps,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "warmup_steps": self.plan.warmup_steps,
        }
        o = config.optim
        schedule = optim.make_schedule(o, **lengths)
        muon_schedule = optim.make_schedule(o, **lengths, peak_lr=o.muon_lr)
        optimizer = optim.make_optimizer(o, schedule, muon_schedule=muon_schedule, mesh=mesh)
        self._pretrained = params
        self.init, self.state_shapes = self._make_init(optimizer, params)
        self.train_step = self._make_train_step(optimizer, schedule)
        eval_step = step_lib.make_eval_step(self.model, mean=config.data.mean, std=config.data.std)
        self.eval_step = seeds.vmap_seeds(eval_step, config, (0, None))
        self._evaluate = make_evaluate(self.eval_step, mesh)
        self._eval_batches: dict[str, Any] = {}

    def _make_init(self, optimizer, params):
        """Returns (() -> TrainState, its jax.ShapeDtypeStruct with shardings)."""
        config, mesh = self.config, self.mesh

        def init(seed, params):
            return step_lib.init_state(
                seed,
                self.model,
                optimizer,
                image_shape=self.train.image_shape,
                params=params,
                ema=config.optim.ema_decay > 0,
            )

        init = seeds.vmap_seeds(init, config, (0, None))
        seed = seeds.stack([np.uint32(seed) for seed in seeds.seeds_of(config)])
        shapes = jax.eval_shape(init, seed, params)
        shardings = seeds.state_sharding(mesh, shapes, config)
        jitted = jax.jit(init, out_shardings=shardings)
        shapes = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)
        everywhere = mesh_lib.replicated(mesh)
        return lambda: jitted(mesh_lib.to_devices(seed, everywhere), params), shapes

    def _make_train_step(self, optimizer, schedule):
        config, feed = self.config, self.feed
        augment_fn = augment.make_augment(
            config.augment,
            num_classes=self.model.num_classes,
            label_smoothing=config.optim.label_smoothing,
            mean=config.data.mean,
            std=config.data.std,
        )
        step = step_lib.make_train_step(
            self.model,
            optimizer,
            augment_fn,
            schedule=schedule,
            ema_decay=config.optim.ema_decay,
            accumulate_steps=config.accumulate_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            mix_steps=self.plan.mix_steps,
            skip_bad=config.on_bad_loss == "skip",
        )

        def train_step(state, *inputs):
            return step(state, feed.batch(state.step, *inputs))

        state_shardings = jax.tree.map(lambda x: x.sharding, self.state_shapes)
        return jax.jit(
            seeds.vmap_seeds(train_step, config, (0, *feed.vmap_axes)),
            # To locate a NaN, JAX reruns the step on the same inputs, which must not be donated.
            donate_argnums=() if jax.config.jax_debug_nans else 0,
            out_shardings=(state_shardings, mesh_lib.replicated(self.mesh)),
        )

    @property
    def num_params(self) -> int:
        """Number of parameters of the model."""
        params = seeds.unstack_shapes(self.state_shapes.params, self.config)
        return sum(p.size for p in jax.tree.leaves(params))

    @property
    def flops_per_image(self) -> float:
        """Floating-point operations of one image, forward and backward."""
        return train_flops_per_image(self.model, self.train.image_shape)

    @functools.cached_property
    def data_identity(self) -> dict[str, Any]:
        """Class names, and each split's size and digest (of a sample, if streamed), as JSON."""
        kind = {"digest_of": "a sample" if self.config.data.streaming else "all images"}
        splits = {
            name: {"num_examples": split.num_examples, "digest": split.digest()} | kind
            for name, split in self.splits.items()
        }
        return {"class_names": list(self.train.class_names), "splits": splits}

    @property
    def initial_digest(self) -> str:
        """A hash of the weights of `config.init_from`."""
        digest = hashlib.sha256()
        for array in jax.tree.leaves(self._pretrained):
            digest.update(np.asarray(array).tobytes())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def documents(self) -> dict[str, Any]:
        """The JSON items of a checkpoint: `config` (completed by each workdir) and `data`."""
        pixels = self.config.data
        config = {
            "class_names": self.train.class_names,
            "image_shape": self.train.image_shape,
            "num_heads": self.model.num_heads,  # 0 in config.model means the size's
            "preprocessing": {"divide_by": 255, "mean": pixels.mean, "std": pixels.std},
        }
        return {"config": config, "data": self.data_identity}

    def check(self) -> None:
        """Raises the UserErrors that only tracing the step finds. jit caches the trace."""
        self.train_step.eval_shape(self.state_shapes, *self.feed.input_shapes)

    def batches(self, after: int = 0) -> Iterator[tuple[int, tuple]]:
        """Yields (step, inputs of `train_step`) for every step after step `after`."""
        steps = range(after + 1, self.plan.total_steps + 1)
        # Not strict, so that the feed is not read after the last step.
        return zip(steps, self.feed.inputs(after), strict=False)

    def stored_batch(self, step: int, seed: int) -> dict[str, np.ndarray]:
        """Returns the examples of a step, counted from 1, as the split stores them, on the host.

        {"image": uint8[b, H, W, C], "label": int32[b], "index": int32[b]}.
        """
        plan = self.plan
        epoch, i = divmod(step - 1, plan.steps_per_epoch)
        index = data.epoch_order(plan.num_examples, plan.batch_size, seed=seed, epoch=epoch)[i]
        index = index[index >= 0]
        images, labels = self.train.examples(index)
        return {"image": images, "label": labels, "index": index}

    def evaluate(self, params: Any, split: str) -> dict[str, Any]:
        """Returns {"loss", "accuracy", "count"} of parameters on a split, by its name."""
        if split not in self._eval_batches:  # a resident split stays on the devices
            batches = feed_lib.make_eval_batches(self.splits[split], self.config, self.mesh)
            self._eval_batches[split] = batches
        return self._evaluate(params, self._eval_batches[split]())


def make_experiment(
    config: ConfigDict,
    *,
    devices: Sequence[jax.Device] | None = None,
    splits: dict[str, Any] | None = None,
    fresh: bool = True,
) -> Experiment:
    """Builds the Experiment of a config on a list of devices (default: all).

    Reads the data, unless `splits` are given, and writes nothing. Raises UserError for invalid
    input. If `fresh` is false, a checkpoint will replace the initial state, so `config.init_from`
    is not read.
    """
    config_lib.validate(config)
    if config.deterministic:
        backend.require_determinism()
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    if config.model.attention == "cudnn":
        backend.require_fused_attention(mesh.devices.flat[0])
    splits = splits or _read_splits(config)
    _check_data(config, splits)
    return Experiment(config, mesh, splits, fresh)


def _read_splits(config):
    names = {name: config.data[f"{name}_split"] for name in ("train", "val", "test")}
    return {
        name: data.open_split(
            config.data.name,
            split,
            data_dir=config.data.dir or None,
            image_size=config.data.image_size or None,
            streaming=config.data.streaming,
        )
        for name, split in names.items()
        if split
    }


def _check_data(config, splits):
    """Raises UserError if the splits do not fit the config or each other."""
    train = splits["train"]
    name, channels, given = config.data.name, train.image_shape[-1], len(config.data.mean)
    for kind, split in splits.items():
        if tuple(split.image_shape) != tuple(train.image_shape):
            raise UserError(
                f"the images of {name} are {tuple(train.image_shape)} for training and "
                f"{tuple(split.image_shape)} in the {kind} split: set config.data.image_size"
            )
    for first, second in itertools.combinations(splits, 2):
        if data.overlap(splits[first], splits[second]):
            raise UserError(
                f"config.data.{second}_split={config.data[f'{second}_split']} overlaps "
                f"{first}_split={config.data[f'{first}_split']}: hold out images, as in "
                "train[:90%] and train[90%:]"
            )
    if config.batch_size > train.num_examples:
        raise UserError(
            f"config.batch_size={config.batch_size} is larger than the {train.num_examples} "
            f"examples of {name} {config.data.train_split}: use at most {train.num_examples}"
        )
    if given != channels:
        raise UserError(
            f"config.data.mean has length {given}, but the images of {name} have {channels} "
            "channels: set one value per channel in data.mean and data.std"
        )


def describe(experiment: Experiment, workdir: str | pathlib.Path) -> dict[str, str]:
    """Describes an experiment before its first step, as {name: text}; see `description_lines`."""
    c, plan, train = experiment.config, experiment.plan, experiment.train
    m, mesh, (H, W, C) = experiment.model, experiment.mesh, train.image_shape
    resized = f" resized to {m.image_size}x{m.image_size}" if m.image_size else ""
    microbatches = f", {c.accumulate_steps} microbatches" if c.accumulate_steps > 1 else ""
    recomputed = ", activations recomputed" if m.remat else ""
    last_batch = plan.num_examples - (plan.steps_per_epoch - 1) * plan.batch_size
    counts = ", ".join(
        f"{c.data[f'{name}_split']}: {split.num_examples:,}"
        for name, split in experiment.splits.items()
    )
    augmentation = [
        f"{name.removeprefix('augment.')}={value}"
        for name, value in config_lib.flat(c).items()
        if name.startswith("augment.") and value != config_lib.FIELDS[name].default
    ]
    stored = f"data decoded by {c.data.streaming_threads} threads per process"
    if not c.data.streaming:
        stored = f"data {train.images.nbytes / 1e6:,.1f} MB on each device"
    lines = {
        "model": f"ViT, patch {m.patch_size}, width {m.width}, depth {m.depth}, {m.num_heads} "
        f"heads, MLP {m.mlp_dim}, pool {m.pool}, {num_tokens(m, train.image_shape)} tokens of "
        f"{H}x{W}x{C} images{resized}, init {m.weight_init}, compute {m.dtype.name}, "
        f"matmul precision {m.matmul_precision}, attention {m.attention}",
        "size": f"{experiment.num_params:,} parameters; "
        f"{experiment.flops_per_image / 1e9:.2f} GFLOP per image, forward and backward",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind} (data {mesh.shape['data']}, "
        f"fsdp {mesh.shape['fsdp']}); global batch {c.batch_size}, "
        f"{math.ceil(c.batch_size / mesh.size)} per device{microbatches}{recomputed}",
        "sharding": f"{mesh_lib.describe(mesh, experiment.state_shapes)}; {stored}",
        "steps": f"{plan.total_steps:,} of batch {plan.batch_size}, {plan.steps_per_epoch:,} per "
        f"epoch ({plan.total_steps / plan.steps_per_epoch:g} epochs; the last batch of an epoch "
        f"has {last_batch})",
        "optimizer": _describe_optimizer(experiment),
        "augmentation": ", ".join(augmentation) or "none",
        "initial weights": ", ".join(experiment.initial_weights),
        "data": f"{train.source}; {counts} images, {len(train.class_names)} classes",
        "seed": ", ".join(map(str, seeds.seeds_of(c)))
        + (", deterministic programs on a GPU" if c.deterministic else ""),
        "workdir": str(workdir),
    }
    return {name: text for name, text in lines.items() if text}


def description_lines(description: dict[str, str]) -> list[str]:
    """Formats a description: two columns on a terminal, otherwise 'name: text' lines."""
    if not sys.stdout.isatty():
        return [f"{name}: {text}" for name, text in description.items()]
    width = max(map(len, description)) + 2
    wrap = functools.partial(
        textwrap.fill,
        width=shutil.get_terminal_size().columns,
        subsequent_indent=" " * width,
        break_long_words=False,  # so that paths can be copied
        break_on_hyphens=False,
    )
    return [wrap(text, initial_indent=f"{name:{width}}") for name, text in description.items()]


def _describe_optimizer(experiment):
    c, o = experiment.config, experiment.config.optim
    params = seeds.unstack_shapes(experiment.state_shapes.params, c)
    mask = optim.decay_mask(o.decay, params)
    count = sum(jax.tree.leaves(jax.tree.map(lambda p, decays: p.size * decays, params, mask)))
    excluded = {path[-1].key for path, d in jax.tree_util.tree_leaves_with_path(mask) if not d}
    peak = f"{o.peak_lr:g}" + (f" (matrices: {o.muon_lr:g})" if o.name == "muon" else "")
    text = f"{o.name}, {o.schedule} {peak}, {experiment.plan.warmup_steps} steps of warmup"
    which = f"not on {', '.join(sorted(excluded))}" if excluded else "all of them"
    decayed = f"{count:,} of {experiment.num_params:,} parameters ({which})"
    return f"{text}; weight decay {o.weight_decay:g} on {decayed}"
