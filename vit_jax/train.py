"""The training loop: the only file that decides when."""

import collections
import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from vit_jax import augment, checkpoint, data, metrics, optim
from vit_jax import config as config_lib
from vit_jax import mesh as mesh_lib
from vit_jax.errors import UserError
from vit_jax.evaluate import make_evaluate
from vit_jax.model import (
    VisionTransformer,
    check_image_shape,
    make_model,
    num_tokens,
    train_flops_per_image,
)
from vit_jax.step import TrainState, gather, init_state, make_eval_step, make_train_step, over_seeds

# May differ between a run and its continuation: they do not change what is computed.
NOT_COMPARED = ("data.dir", "mesh.data", "mesh.fsdp", "tensorboard")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run made ready: everything that follows from its config before the first step."""

    config: Any
    mesh: jax.sharding.Mesh
    model: VisionTransformer
    train: data.Dataset
    val: data.Dataset | None
    test: data.Dataset | None
    steps_per_epoch: int
    total_steps: int
    durations: dict[str, int]  # log_every, eval_every, ... in steps; 0: never
    schedule: Any  # step -> learning rate
    shapes: TrainState  # of jax.ShapeDtypeStruct, with shardings; leads with [num_seeds]
    init: Any  # jitted: seeds -> TrainState, leading with [num_seeds]
    step: Any  # jitted: (state, resident split, order) -> (state, metrics); donates the state
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
        return train_flops_per_image(self.model, self.train.images.shape[1:])

    def put(self, tree):
        """Arrays of the host onto every device."""
        return jax.device_put(tree, mesh_lib.replicated(self.mesh))

    def resident(self, split):
        """A data.Dataset on every device, as {"image", "label"}."""
        return self.put({"image": split.images, "label": split.labels})

    def order(self, epoch):
        """The resident order of an epoch: int32[num_seeds, steps_per_epoch, B], -1 for no example.

        B is the batch size, rounded up to what the mesh divides.
        """
        n, batch_size = len(self.train.labels), self.config.batch_size
        order = [data.epoch_indices(n, batch_size, seed=int(s), epoch=epoch) for s in self.seeds]
        padding = ((0, 0), (0, 0), (0, -batch_size % self.mesh.size))
        return self.put(np.pad(np.stack(order), padding, constant_values=-1))

    def evaluator(self, split):
        """A function params -> [{"loss", "accuracy", "count"}] over all of a split, by replica."""
        resident = self.resident(split)
        evaluate = make_evaluate(
            self.eval_step,
            self.mesh,
            num_examples=len(split.labels),
            batch_size=self.config.eval_batch_size,
            num_seeds=self.config.num_seeds,
        )
        return lambda params: evaluate(params, resident)


def setup(config):
    """The Run of a config. Reads the data; writes nothing. Raises UserError for wrong input."""
    config_lib.validate(config)
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp)
    train, val, test = (
        data.load_split(
            config.data.name,
            split,
            data_dir=config.data.dir or None,
            image_size=config.data.image_size or None,
        )
        if split
        else None
        for split in (config.data.train_split, config.data.val_split, config.data.test_split)
    )
    num_examples, *image_shape = train.images.shape
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
    groups = {"log_every": config, "eval_every": config, "checkpoint_every": config}
    groups |= {"warmup": config.optim, "mix_off_last": config.augment}
    durations = {k: config_lib.in_steps(group, k, **counts) for k, group in groups.items()}
    for name in ("warmup", "mix_off_last"):
        if durations[name] > total_steps:
            raise UserError(f"{name} is {durations[name]} steps, the run has only {total_steps}")

    model = make_model(config.model, num_classes=len(train.class_names))
    check_image_shape(model, image_shape)
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
    )

    def init(seed):
        ema = config.optim.ema_decay > 0
        return init_state(seed, model, optimizer, image_shape=image_shape, ema=ema)

    def resident_step(state, split, order):
        batch = gather(split, order[state.step % steps_per_epoch])
        batch = jax.lax.with_sharding_constraint(batch, mesh_lib.batch_sharding(mesh))
        return train_step(state, batch)

    init = over_seeds(init, config.num_seeds, (0,))
    resident_step = over_seeds(resident_step, config.num_seeds, (0, None, 0))
    shapes = jax.eval_shape(init, np.zeros(config.num_seeds, np.uint32))
    shardings = mesh_lib.state_sharding(mesh, shapes)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    step_shardings = (shardings, mesh_lib.replicated(mesh))
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
        schedule=schedule,
        shapes=shapes,
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(resident_step, donate_argnums=0, out_shardings=step_shardings),
        eval_step=make_eval_step(model, **pixels),
    )


def header(run, workdir):
    """The lines that explain a run before its first step."""
    c, m, o, n = run.config, run.model, run.config.optim, len(run.train.labels)
    H, W, C = run.train.images.shape[1:]
    tokens = num_tokens(m, (H, W, C))
    mask = optim.decay_mask(o.decay, run.shapes.params)
    sizes = jax.tree.map(lambda p: math.prod(p.shape[1:]), run.shapes.params)
    decayed = sum(
        s for s, d in zip(jax.tree.leaves(sizes), jax.tree.leaves(mask), strict=True) if d
    )
    left_out = {path[-1].key for path, d in jax.tree_util.tree_leaves_with_path(mask) if not d}
    decay = f"weight decay {o.weight_decay:g} on {decayed:,} of {run.num_params:,} parameters"
    decay += f" (not on {', '.join(sorted(left_out))})" if left_out else " (all of them)"
    rate = f"{o.schedule} {o.peak_lr:g}"
    if o.schedule != "constant":
        rate += f" to {o.end_lr:g}, changing every {o.schedule_per}"
    if run.durations["warmup"]:
        rate += f", warm-up of {run.durations['warmup']} steps"
    devices = run.mesh.size
    seeds = f"seed: {c.seed}"
    if c.num_seeds > 1:
        seeds = f"seeds: {', '.join(map(str, run.seeds))}, trained in one program"
    splits = ((c.data.train_split, run.train), (c.data.val_split, run.val))
    splits = (*splits, (c.data.test_split, run.test))
    counts = ", ".join(f"{name}: {len(split.labels):,}" for name, split in splits if split)
    return [
        f"model: ViT, patch {m.patch_size}, width {m.width}, depth {m.depth}, {m.num_heads} heads, "
        f"MLP {m.mlp_dim}, pool {m.pool}, {tokens} tokens of {H}x{W}x{C} images, "
        f"init {m.weight_init}, compute {m.dtype.name}",
        f"size: {run.num_params:,} parameters; {run.flops_per_image / 1e9:.2f} GFLOP an image, "
        "forward and backward",
        f"devices: {devices} x {jax.devices()[0].device_kind} "
        f"(data {run.mesh.shape['data']}, fsdp {run.mesh.shape['fsdp']}); "
        f"batch {c.batch_size} in all, {math.ceil(c.batch_size / devices)} a device",
        f"steps: {run.total_steps:,} of batch {c.batch_size}, {run.steps_per_epoch:,} an epoch "
        f"({run.total_steps / run.steps_per_epoch:g} epochs; the last batch of an epoch holds "
        f"{n - (run.steps_per_epoch - 1) * c.batch_size})",
        f"optimizer: {o.name}, {rate}; {decay}",
        f"augmentation: {', '.join(augment.describe(c.augment)) or 'none'}",
        f"data: {run.train.source}; {counts} images, {m.num_classes} classes",
        seeds,
        f"workdir: {workdir}",
    ]


def open_workdir(workdir, config, command, *, needs=0):
    """Makes the workdir and its config.json and run.json, or checks that it is this config's.

    Raises UserError when it cannot be written, has less free space than `needs` bytes, or holds a
    run of another config.
    """
    try:
        existing = next(f for f in (workdir.absolute(), *workdir.absolute().parents) if f.exists())
        if (free := shutil.disk_usage(existing).free) < needs:
            raise UserError(
                f"the checkpoints of this run need {needs / 1e6:,.1f} MB in {workdir}, where "
                f"{free / 1e6:,.1f} MB are free: make room or give another --workdir"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "config.json"
        if not path.exists():
            metrics.write_json(path, config.to_dict())
        elif other := config_lib.difference(config, _read_config(path), ignore=NOT_COMPARED):
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(other[:5])}): "
                "give another --workdir, or delete this one"
            )
        metrics.write_json(workdir / "run.json", metrics.environment(command))
    except OSError as e:
        raise UserError(f"cannot write the workdir {workdir}: {e.strerror or e}") from e


def _read_config(path):
    try:
        return config_lib.from_dict(json.loads(path.read_text()))
    except ValueError as e:
        raise UserError(f"{path} is not the config of a run: {e}") from e


class Replica:
    """What one seed of a run keeps on disk: its checkpoints, metrics and result.

    A run of one seed keeps them in the workdir itself; of several, each in seed_N, which is then a
    workdir of its own, with the config of that seed alone.
    """

    def __init__(self, run, workdir, index, command):
        self.seed = int(run.seeds[index])
        self.config = config_lib.from_dict(run.config.to_dict())
        self.workdir = workdir
        if run.config.num_seeds > 1:
            self.config.seed, self.config.num_seeds = self.seed, 1
            self.workdir = workdir / f"seed_{self.seed}"
            open_workdir(self.workdir, self.config, command)
        self.checkpoints = checkpoint.Checkpoints(self.workdir / "checkpoints")
        self._saved_config = {
            "config": self.config.to_dict(),
            "class_names": list(run.train.class_names),
            "image_shape": list(run.train.images.shape[1:]),
            "preprocessing": {
                "divide_by": 255,
                "mean": list(self.config.data.mean),
                "std": list(self.config.data.std),
            },
        }

    def save(self, step, state, timed):
        """Starts saving this replica's part of a state. `timed` is kept beside it."""
        self.checkpoints.save(
            step,
            params=state.params,
            ema_params=state.ema_params,
            opt_state=state.opt_state,
            config=self._saved_config,
            progress={"sums": {k: float(v) for k, v in state.sums.items()}, **timed},
        )

    def restore(self, step, shapes):
        """(TrainState of host arrays, progress) of a saved step."""
        saved = self.checkpoints.restore(
            step,
            params=shapes.params,
            ema_params=shapes.ema_params,
            opt_state=shapes.opt_state,
        )
        state = TrainState(
            step=np.int32(step),
            seed=np.uint32(self.seed),
            params=saved["params"],
            opt_state=saved["opt_state"],
            ema_params=saved["ema_params"],
            sums={k: np.float32(v) for k, v in saved["progress"]["sums"].items()},
        )
        return state, saved["progress"]


def train(config, workdir, *, command=""):
    """Trains by a config, printing as it goes, and returns the content of result.json.

    Continues from the newest checkpoint in `workdir` when it holds one of the same config. Raises
    UserError for wrong input, before anything is written.
    """
    workdir = pathlib.Path(workdir)
    run = setup(config)
    saved = (run.shapes.params, run.shapes.ema_params, run.shapes.opt_state)
    a_checkpoint = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(saved))
    # Two are kept while a third is being written.
    open_workdir(workdir, config, command, needs=3 * a_checkpoint)
    print(*header(run, workdir), sep="\n", flush=True)
    replicas = [Replica(run, workdir, i, command) for i in range(config.num_seeds)]
    start = min(r.checkpoints.latest_step() or 0 for r in replicas)
    if start == run.total_steps and (workdir / "result.json").exists():
        result = json.loads((workdir / "result.json").read_text())
        print(f"Already complete. {summary(result)}")
        return result
    shardings = jax.tree.map(lambda x: x.sharding, run.shapes)
    if start:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), run.shapes)
        states, progress = zip(*(r.restore(start, one) for r in replicas), strict=True)
        state = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *states), shardings)
        progress = progress[0]
        print(f"Continuing from step {start:,} of {run.total_steps:,}", flush=True)
    else:
        state, progress = run.init(run.seeds), {"timed_images": 0, "timed_seconds": 0.0}
    clock = metrics.Clock(progress["timed_images"], progress["timed_seconds"])
    writer = metrics.Writer(
        [r.workdir for r in replicas],
        step=start,
        total_steps=run.total_steps,
        batch_size=config.batch_size,
        tensorboard=config.tensorboard,
    )
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    num_examples, spe = len(run.train.labels), run.steps_per_epoch
    split = run.resident(run.train)
    evaluate_val = run.evaluator(run.val) if run.val else None
    order, in_flight = None, collections.deque()

    def images(step):
        """Examples that each replica has seen: the last batch of an epoch may be smaller."""
        return step // spe * num_examples + step % spe * config.batch_size

    def due(name, step):
        return run.durations[name] and step % run.durations[name] == 0

    def averaged(state):
        return state.params if state.ema_params is None else state.ema_params

    for step in range(start + 1, run.total_steps + 1):
        epoch, batches = (step - 1) // spe, (step - 1) % spe + 1
        if batches == 1 or order is None:
            order = run.order(epoch)
        state, step_metrics = run.step(state, split, order)

        # A step's metrics are read once the next step is under way, so that neither waits.
        in_flight.append((step, step_metrics))
        last = step == run.total_steps
        epoch_ends, saves = batches == spe or last, due("checkpoint_every", step) or last
        evaluates = run.val and (due("eval_every", step) or last)
        while len(in_flight) > (0 if epoch_ends or saves or evaluates else 1):
            done, values = in_flight.popleft()
            jax.block_until_ready(values)
            clock.tick((images(done) - images(done - 1)) * config.num_seeds)
            if due("log_every", done):
                rate = clock.lap()
                line = {f"train/{k}": v for k, v in jax.device_get(values).items()}
                line["time/images_per_second"] = rate
                if peak:
                    line["time/mfu"] = rate * run.flops_per_image / (peak * run.mesh.size)
                writer.write(done, line)
                loss = line["train/loss"].mean()
                writer.progress(done, loss=loss, images_per_second=rate / config.num_seeds)

        if epoch_ends:
            means = {f"epoch/{k}": v / batches for k, v in jax.device_get(state.sums).items()}
            writer.write(step, means)
            part = "" if batches == spe else f" ({batches} of its {spe} steps)"
            writer.say(f"Epoch {epoch + 1}, Loss: {means['epoch/loss'].mean():.4f}{part}")
        if evaluates:
            results = evaluate_val(averaged(state))
            values = {f"val/{k}": [r[k] for r in results] for k in ("loss", "accuracy")}
            writer.write(step, values)
            writer.say(f"Validation Accuracy: {100 * np.mean(values['val/accuracy']):.2f}%")
        if saves:
            writer.sync()  # before the checkpoint: a continued run keeps the lines up to its step
            host = jax.device_get(state)
            timed = {"timed_images": clock.images, "timed_seconds": clock.seconds}
            for i, replica in enumerate(replicas):
                replica.save(step, jax.tree.map(lambda x, i=i: x[i], host), timed)
        if epoch_ends or evaluates or saves:
            clock.skip()
    for replica in replicas:
        replica.checkpoints.close()

    final = {"train_loss": jax.device_get(state.sums["loss"]) / ((run.total_steps - 1) % spe + 1)}
    for name, split in (("val", run.val), ("test", run.test)):
        if split:
            evaluated = run.evaluator(split)(averaged(state))
            final |= {f"{name}_{k}": [r[k] for r in evaluated] for k in ("accuracy", "loss")}
    if run.test:
        values = {f"test/{k}": final[f"test_{k}"] for k in ("loss", "accuracy")}
        writer.write(run.total_steps, values)
    shared = {
        "steps": run.total_steps,
        "epochs": run.total_steps / spe,
        "seconds": clock.seconds,
        "images_per_second": clock.images / clock.seconds if clock.seconds else None,
        "num_params": run.num_params,
        "device": f"{run.mesh.size} x {jax.devices()[0].device_kind}",
    }
    for i, replica in enumerate(replicas):
        result = {k: float(v[i]) for k, v in final.items()} | {"seed": replica.seed, **shared}
        metrics.write_json(replica.workdir / "result.json", result)
    if config.num_seeds > 1:
        result = {"seed": run.seeds.tolist(), **shared}
        for name, of_each in final.items():
            result[name] = float(np.mean(of_each))
            result[f"{name}_std"] = float(np.std(of_each, ddof=1))
            result[f"{name}_of_each_seed"] = [float(v) for v in of_each]
        metrics.write_json(workdir / "result.json", result)
    writer.say(summary(result))
    writer.close()
    return result


def summary(result):
    """'Test Accuracy: 63.68%', or of the validation split where no test split is read."""
    name = "test" if "test_accuracy" in result else "val"
    text = f"{'Test' if name == 'test' else 'Validation'} Accuracy: "
    text += f"{100 * result[f'{name}_accuracy']:.2f}%"
    if f"{name}_accuracy_std" in result:
        spread, n = 100 * result[f"{name}_accuracy_std"], len(result["seed"])
        text += f" (mean of {n} seeds, standard deviation {spread:.2f})"
    return text
