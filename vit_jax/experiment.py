"""A run made ready: data, model, optimizer and jitted step, all that precedes the first step."""

import collections
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import augment, data, optim
from vit_jax import config as config_lib
from vit_jax import mesh as mesh_lib
from vit_jax.durations import in_steps
from vit_jax.errors import UserError
from vit_jax.evaluate import batch_order, make_evaluate, resident_batches
from vit_jax.model import (
    VisionTransformer,
    check_image_shape,
    make_model,
    num_tokens,
    train_flops_per_image,
)
from vit_jax.step import (
    TrainState,
    gather,
    init_state,
    make_eval_step,
    make_train_step,
    over_seeds,
    seen,
)
from vit_jax.weights import load_weights, start_from


@dataclasses.dataclass(frozen=True)
class Run:
    """A run made ready: everything that follows from its config before the first step."""

    config: Any
    mesh: jax.sharding.Mesh
    model: VisionTransformer
    train: data.Dataset | data.Stream
    val: data.Dataset | data.Stream | None
    test: data.Dataset | data.Stream | None
    steps_per_epoch: int
    total_steps: int
    durations: dict[str, int]  # log_every, eval_every, ... in steps; 0: never
    shapes: TrainState  # of jax.ShapeDtypeStruct, with shardings; leads with [num_seeds]
    init: Any  # seeds -> TrainState, leading with [num_seeds]
    start: tuple[str, ...]  # what was done to the weights of config.init_from, in words
    step: Any  # jitted: (state, *inputs) -> (state, metrics); donates the state
    seen: Any  # jitted: (state, *inputs) -> uint8[num_seeds, N, H, W, C], see below
    eval_step: Any  # pure: (params, batch) -> sums, of one replica

    @property
    def num_params(self):
        """Parameters of the model."""
        return sum(math.prod(p.shape[1:]) for p in jax.tree.leaves(self.shapes.params))

    @property
    def seeds(self):
        """The seed of each replica."""
        return np.arange(self.config.num_seeds, dtype=np.uint32) + np.uint32(self.config.seed)

    @property
    def flops_per_image(self):
        """Floating-point operations of one image, forward and backward."""
        return train_flops_per_image(self.model, self.train.image_shape)

    @functools.cached_property
    def data_identity(self):
        """The identity of the data, as JSON: class names, and of each split the size and a digest.

        A streamed split's digest covers only some of its images, so it compares only with another
        streamed one's; "digest_of" says which it is.
        """
        digest_of = "a sample" if self.config.data.streaming else "all images"
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {
            "class_names": list(self.train.class_names),
            "splits": {
                name: {
                    "num_examples": split.num_examples,
                    "digest": split.digest(),
                    "digest_of": digest_of,
                }
                for name, split in splits.items()
                if split
            },
        }

    def put(self, tree):
        """Arrays of the host onto every device."""
        return mesh_lib.put(tree, mesh_lib.replicated(self.mesh))

    def resident(self, split):
        """A data.Dataset on every device, as {"image", "label"}."""
        return self.put({"image": split.images, "label": split.labels})

    def order(self, epoch):
        """The resident order of an epoch: int32[num_seeds, steps_per_epoch, B], -1 for no example.

        B is the batch size, rounded up to what the mesh and the parts of a batch divide.
        """
        n, batch_size = self.train.num_examples, self.config.batch_size
        order = [data.epoch_order(n, batch_size, seed=int(s), epoch=epoch) for s in self.seeds]
        return self.put(self._padded(np.stack(order)))

    def _padded(self, order):
        """An order of batches, with rows of no example up to `order_shape`'s B."""
        padding = ((0, 0),) * (order.ndim - 1) + ((0, self.order_shape[-1] - order.shape[-1]),)
        return np.pad(order, padding, constant_values=-1)

    def inputs(self, start):
        """Yields what `step` takes besides the state, for each step after `start`.

        Resident, the split and its epoch's order; streamed, the batch.
        """
        spe = self.steps_per_epoch
        if isinstance(self.train, data.Dataset):
            split, order = self.resident(self.train), None
            for step in range(start, self.total_steps):
                if order is None or step % spe == 0:
                    order = self.order(step // spe)
                yield split, order
            return

        @functools.lru_cache(maxsize=2)  # at an epoch's end batches of the next are read already
        def order(epoch):
            n, c = self.train.num_examples, self.config
            return self._padded(data.epoch_order(n, c.batch_size, seed=c.seed, epoch=epoch))

        crop = data.make_crop(
            self.config.augment,
            size=self.config.data.image_size,
            seed=self.config.seed,
            steps_per_epoch=spe,
        )
        steps = range(start, self.total_steps)
        for batch in self._streamed(self.train, lambda i: order(i // spe)[i % spe], steps, crop):
            yield (batch,)

    def _streamed(self, split, order, steps, crop=None):
        """Yields global batches on the devices, two on their way ahead of the one yielded."""
        sharding, num_rows = mesh_lib.batch_sharding(self.mesh), len(order(steps[0]))
        rows = mesh_lib.local_rows(sharding, num_rows)
        ahead, threads = collections.deque(), self.config.data.streaming_threads
        for batch in split.batches(order, steps, rows=rows, threads=threads, crop=crop):
            ahead.append(mesh_lib.put_rows(batch, rows, num_rows, sharding))
            if len(ahead) > 2:
                yield ahead.popleft()
        yield from ahead

    def input_shapes(self):
        """What `inputs` yields, as jax.ShapeDtypeStruct."""
        everywhere, split = mesh_lib.replicated(self.mesh), mesh_lib.batch_sharding(self.mesh)

        def shape(sizes, dtype, sharding=everywhere):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        n, b, image = self.train.num_examples, self.order_shape[-1], self.train.image_shape
        if isinstance(self.train, data.Dataset):
            resident = {"image": shape((n, *image), np.uint8), "label": shape((n,), np.int32)}
            return resident, shape(self.order_shape, np.int32)
        batch = {"image": ((b, *image), np.uint8), "label": ((b,), np.int32), "mask": ((b,), bool)}
        return ({k: shape(*v, split) for k, v in batch.items()},)

    @property
    def order_shape(self):
        """(num_seeds, steps_per_epoch, B) of an epoch's order."""
        batch_size = self.config.batch_size
        batch_size += -batch_size % (self.mesh.size * self.config.accumulate_steps)
        return self.config.num_seeds, self.steps_per_epoch, batch_size

    def batch(self, step, replica=0):
        """The examples of a step (the first is 1) on the host, as they are stored.

        {"image": uint8[B, H, W, C], "label": int32[B], "index": int32[B]}; the last batch of an
        epoch may be smaller.
        """
        epoch, i = divmod(step - 1, self.steps_per_epoch)
        n, seed = self.train.num_examples, int(self.seeds[replica])
        index = data.epoch_order(n, self.config.batch_size, seed=seed, epoch=epoch)[i]
        index = index[index >= 0]
        images, labels = self.train.examples(index)
        return {"image": images, "label": labels, "index": index}

    def evaluator(self, split):
        """A function params -> [{"loss", "accuracy", "count"}] over all of a split, by replica."""
        evaluate = make_evaluate(self.eval_step, self.mesh, num_seeds=self.config.num_seeds)
        order = batch_order(split.num_examples, self.config.eval_batch_size, self.mesh)
        if isinstance(split, data.Dataset):
            resident = self.resident(split)
            return lambda params: evaluate(params, resident_batches(resident, order, self.mesh))
        return lambda params: evaluate(
            params, self._streamed(split, order.__getitem__, range(len(order)))
        )


def setup(config, *, devices=None, fresh=True):
    """The Run of a config, on a list of devices or on all.

    Reads the data; writes nothing. Raises UserError for wrong input. With `fresh` false a
    checkpoint will take the place of `init`, and config.init_from, which may be gone by then, is
    not read.
    """
    config_lib.validate(config)
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    train, val, test = (
        data.open_split(
            config.data.name,
            split,
            data_dir=config.data.dir or None,
            image_size=config.data.image_size or None,
            skip_bad=config.data.on_bad_image == "skip",
            streaming=config.data.streaming,
        )
        if split
        else None
        for split in (config.data.train_split, config.data.val_split, config.data.test_split)
    )
    num_examples, image_shape = train.num_examples, train.image_shape
    if config.batch_size > num_examples:
        raise UserError(
            f"config.batch_size={config.batch_size} is larger than the {num_examples} examples "
            f"of {config.data.name} {config.data.train_split}"
        )
    if len(config.data.mean) != image_shape[-1]:
        raise UserError(
            f"config.data.mean has {len(config.data.mean)} entries, the images of "
            f"{config.data.name} have {image_shape[-1]} channels"
        )

    steps_per_epoch = math.ceil(num_examples / config.batch_size)
    total_steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
    counts = {
        "steps_per_epoch": steps_per_epoch,
        "batch_size": config.batch_size,
        "total_steps": total_steps,
    }
    every = ("log_every", "eval_every", "save_every", "keep_every", "histograms_every")
    given = {name: config[name] for name in every}
    given |= {"warmup": config.optim.warmup, "mix_off_last": config.augment.mix_off_last}
    durations = {name: in_steps(text, **counts) for name, text in given.items()}
    for name in ("warmup", "mix_off_last"):
        durations[name] = min(durations[name], total_steps)

    model = make_model(config.model, num_classes=len(train.class_names))
    check_image_shape(model, image_shape)
    augment.check_image_shape(config.augment, image_shape)
    plan = {
        "total_steps": total_steps,
        "steps_per_epoch": steps_per_epoch,
        "warmup_steps": durations["warmup"],
    }
    schedule = optim.make_schedule(config.optim, **plan)
    muon_schedule = optim.make_schedule(config.optim, **plan, peak_lr=config.optim.muon_lr)
    optimizer = optim.make_optimizer(config.optim, schedule, muon_schedule=muon_schedule)
    pixels = {"mean": config.data.mean, "std": config.data.std}
    augment_fn = augment.make_augment(
        config.augment,
        num_classes=model.num_classes,
        label_smoothing=config.optim.label_smoothing,
        **pixels,
    )
    train_step = make_train_step(
        model,
        optimizer,
        augment_fn,
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        mix_steps=total_steps - durations["mix_off_last"],
        ema_decay=config.optim.ema_decay,
        accumulate_steps=config.accumulate_steps,
        skip_bad=config.on_bad_loss == "skip",
    )

    params, start = None, ()
    if config.init_from and fresh:
        weights = load_weights(config.init_from, num_heads=model.num_heads)
        params, notes = start_from(weights, model, image_shape, train.class_names)
        start = (f"{config.init_from} ({weights.kind})", *notes)

    def init(seed, params):
        options = {"ema": config.optim.ema_decay > 0, "skip_bad": config.on_bad_loss == "skip"}
        return init_state(seed, model, optimizer, image_shape=image_shape, params=params, **options)

    if config.data.streaming:
        axes = (0, None)

        def batch_of(state, batch):
            return batch

    else:
        axes = (0, None, 0)

        def batch_of(state, split, order):
            batch = gather(split, order[state.step % steps_per_epoch])
            return jax.lax.with_sharding_constraint(batch, mesh_lib.batch_sharding(mesh))

    def step(state, *inputs):
        return train_step(state, batch_of(state, *inputs))

    def seen_pixels(state, *inputs):
        """The first 64 images of the next step's batch, augmented, as pixels again."""
        batch, mix_steps = batch_of(state, *inputs), total_steps - durations["mix_off_last"]
        images, _ = seen(
            augment_fn, state, batch, steps_per_epoch=steps_per_epoch, mix_steps=mix_steps
        )
        images = images[: min(64, config.batch_size)] * np.float32(pixels["std"])
        images = 255 * (images + np.float32(pixels["mean"]))
        return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)

    init = over_seeds(init, config.num_seeds, (0, None))
    step = over_seeds(step, config.num_seeds, axes)
    seen_pixels = over_seeds(seen_pixels, config.num_seeds, axes)
    shapes = jax.eval_shape(init, np.zeros(config.num_seeds, np.uint32), params)
    shardings = mesh_lib.state_sharding(mesh, shapes)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    init = jax.jit(init, out_shardings=shardings)
    step_shardings = (shardings, mesh_lib.replicated(mesh))
    # To find the operation of a NaN, JAX computes the step again, from inputs that it kept.
    donated = () if jax.config.jax_debug_nans else 0
    return Run(
        config=config,
        mesh=mesh,
        model=model,
        train=train,
        val=val,
        test=test,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        durations=durations,
        shapes=shapes,
        init=lambda seeds: init(seeds, params),
        start=start,
        step=jax.jit(step, donate_argnums=donated, out_shardings=step_shardings),
        seen=jax.jit(seen_pixels, out_shardings=mesh_lib.replicated(mesh)),
        eval_step=make_eval_step(model, **pixels),
    )


def header(run, workdir):
    """The lines that explain a run before its first step."""
    c, m, o, n = run.config, run.model, run.config.optim, run.train.num_examples
    H, W, C = run.train.image_shape
    tokens = num_tokens(m, (H, W, C))
    mask = optim.decay_mask(o.decay, run.shapes.params)
    sizes = jax.tree.map(lambda p: math.prod(p.shape[1:]), run.shapes.params)
    labels = jax.tree.leaves(optim.freeze_labels(o.freeze, run.shapes.params))
    frozen = sum(
        s for s, label in zip(jax.tree.leaves(sizes), labels, strict=True) if label == "frozen"
    )
    decayed = sum(
        s for s, d in zip(jax.tree.leaves(sizes), jax.tree.leaves(mask), strict=True) if d
    )
    left_out = {path[-1].key for path, d in jax.tree_util.tree_leaves_with_path(mask) if not d}
    decay = f"weight decay {o.weight_decay:g} on {decayed:,} of {run.num_params:,} parameters"
    decay += f" (not on {', '.join(sorted(left_out))})" if left_out else " (all of them)"
    rate = f"{o.schedule} {o.peak_lr:g}"
    if o.schedule != "constant":
        rate += f" to {o.end_lr:g}, changing every {o.schedule_per}"
    if o.name == "muon":
        rate += f" (the blocks' matrices {o.muon_lr:g})"
    if run.durations["warmup"]:
        rate += f", warm-up of {run.durations['warmup']} steps"
    if o.backbone_lr_factor != 1:
        rate += f", times {o.backbone_lr_factor:g} for all but the head"
    if frozen:
        rate += f"; {frozen:,} parameters frozen ({o.freeze})"
    resized = f" resized to {m.image_size}x{m.image_size}" if m.image_size else ""
    devices = run.mesh.size
    kind = run.mesh.devices.flat[0].device_kind
    seeds = f"seed: {c.seed}"
    if c.num_seeds > 1:
        seeds = f"seeds: {', '.join(map(str, run.seeds))}, trained in one program"
    splits = ((c.data.train_split, run.train), (c.data.val_split, run.val))
    splits = (*splits, (c.data.test_split, run.test))
    counts = ", ".join(f"{name}: {split.num_examples:,}" for name, split in splits if split)
    return [
        f"model: ViT, patch {m.patch_size}, width {m.width}, depth {m.depth}, {m.num_heads} heads, "
        f"MLP {m.mlp_dim}, pool {m.pool}, {tokens} tokens of {H}x{W}x{C} images{resized}, "
        f"init {m.weight_init}, compute {m.dtype.name}",
        f"size: {run.num_params:,} parameters; {run.flops_per_image / 1e9:.2f} GFLOP an image, "
        "forward and backward",
        f"devices: {devices} x {kind} "
        f"(data {run.mesh.shape['data']}, fsdp {run.mesh.shape['fsdp']}); "
        f"batch {c.batch_size} in all, {math.ceil(c.batch_size / devices)} a device"
        + (f", computed in {c.accumulate_steps} parts" if c.accumulate_steps > 1 else "")
        + (", blocks computed again in the backward pass" if m.remat else ""),
        f"sharding: {mesh_lib.describe(run.mesh, run.shapes)}; "
        + (
            f"data decoded by {c.data.streaming_threads} threads a host"
            if c.data.streaming
            else f"data {run.train.images.nbytes / 1e6:,.1f} MB on each"
        ),
        f"steps: {run.total_steps:,} of batch {c.batch_size}, {run.steps_per_epoch:,} an epoch "
        f"({run.total_steps / run.steps_per_epoch:g} epochs; the last batch of an epoch holds "
        f"{n - (run.steps_per_epoch - 1) * c.batch_size})",
        f"optimizer: {o.name}, {rate}; {decay}",
        f"augmentation: {', '.join(augment.describe(c.augment)) or 'none'}",
        *([f"start: {', '.join(run.start)}"] if run.start else []),
        f"data: {run.train.source}; {counts} images, {m.num_classes} classes",
        seeds,
        f"workdir: {workdir}",
    ]
