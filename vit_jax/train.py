"""The training loop: the only file that decides when."""

import collections
import json
import pathlib
import shutil
import time

import jax
import numpy as np

from vit_jax import checkpoint, mesh, metrics
from vit_jax import config as config_lib
from vit_jax.errors import UserError
from vit_jax.run import header, setup
from vit_jax.step import TrainState

# May differ between a run and its continuation: they do not change what is computed.
NOT_COMPARED = ("data.dir", "data.streaming", "data.streaming_threads", "mesh.data", "mesh.fsdp")
NOT_COMPARED += ("model.remat", "tensorboard")


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
            if jax.process_index() == 0:
                open_workdir(self.workdir, self.config, command)
        self.checkpoints = checkpoint.Checkpoints(self.workdir / "checkpoints")
        self._saved_config = {
            "config": self.config.to_dict(),
            "class_names": list(run.train.class_names),
            "image_shape": list(run.train.image_shape),
            "num_heads": run.model.num_heads,  # config.model.size may say it instead
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


def train(config, workdir, *, command="", peers=None):
    """Trains by a config, printing as it goes, and returns the content of result.json.

    Continues from the newest checkpoint in `workdir` when it holds one of the same config. Raises
    UserError for wrong input, before anything is written. One of several processes gets its
    `peers` (distributed.Peers); process 0 alone prints, and writes all but its part of a
    checkpoint, which orbax asks of each.
    """
    workdir = pathlib.Path(workdir)
    first = jax.process_index() == 0
    saved = workdir / "checkpoints"
    continuing = saved.is_dir() and any(step.name.isdigit() for step in saved.iterdir())
    run = setup(config, fresh=not continuing)
    saved = (run.shapes.params, run.shapes.ema_params, run.shapes.opt_state)
    a_checkpoint = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(saved))
    # Two are kept while a third is being written.
    if first:
        open_workdir(workdir, config, command, needs=3 * a_checkpoint)
    if peers:
        splits = {"train": run.train, "val": run.val, "test": run.test}
        peers.agree({f"the data of the {k} split": v.digest() for k, v in splits.items() if v})
    if first:
        print(*header(run, workdir), sep="\n", flush=True)
    replicas = [Replica(run, workdir, i, command) for i in range(config.num_seeds)]
    start = min(r.checkpoints.latest_step() or 0 for r in replicas)
    if not start and continuing:  # what looked like a checkpoint is none
        run = setup(config)
    complete = start == run.total_steps and (workdir / "result.json").exists()
    if peers:  # a workdir on each host's own disk would differ
        peers.agree({f"the newest checkpoint in {workdir}": start, "a result there": complete})
    if complete:
        result = json.loads((workdir / "result.json").read_text())
        if first:
            print(f"Already complete. {summary(result)}")
        return result
    shardings = jax.tree.map(lambda x: x.sharding, run.shapes)
    if start:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), run.shapes)
        states, progress = zip(*(r.restore(start, one) for r in replicas), strict=True)
        state = mesh.put(jax.tree.map(lambda *x: np.stack(x), *states), shardings)
        progress = progress[0]
        if first:
            print(f"Continuing from step {start:,} of {run.total_steps:,}", flush=True)
    else:
        state, progress = run.init(run.put(run.seeds)), {"timed_images": 0, "timed_seconds": 0.0}
    clock = metrics.Clock(progress["timed_images"], progress["timed_seconds"])
    writer = metrics.Writer(
        [r.workdir for r in replicas] if first else [],
        step=start,
        total_steps=run.total_steps,
        batch_size=config.batch_size,
        tensorboard=config.tensorboard,
    )
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    num_examples, spe = run.train.num_examples, run.steps_per_epoch
    inputs = run.inputs(start)
    evaluate_val = run.evaluator(run.val) if run.val else None
    in_flight = collections.deque()

    def images(step):
        """Examples that each replica has seen: the last batch of an epoch may be smaller."""
        return step // spe * num_examples + step % spe * config.batch_size

    def due(name, step):
        return run.durations[name] and step % run.durations[name] == 0

    def averaged(state):
        return state.params if state.ema_params is None else state.ema_params

    # Nothing crosses between host and device in the loop that is not asked for by name.
    with jax.transfer_guard("disallow"):
        for step in range(start + 1, run.total_steps + 1):
            epoch, batches = (step - 1) // spe, (step - 1) % spe + 1
            began = time.perf_counter()
            step_inputs = next(inputs)
            clock.wait(time.perf_counter() - began)
            state, step_metrics = run.step(state, *step_inputs)

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
                    waiting = clock.waiting if config.data.streaming else None
                    if waiting is not None:
                        line["time/waiting_for_data"] = waiting
                    if peak:
                        line["time/mfu"] = rate * run.flops_per_image / (peak * run.mesh.size)
                    writer.write(done, line)
                    loss = line["train/loss"].mean()
                    writer.progress(
                        done, loss=loss, images_per_second=rate / config.num_seeds, waiting=waiting
                    )

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
                writer.sync()  # before the checkpoint: a continued run keeps lines up to its step
                host = mesh.fetch(state)
                timed = {"timed_images": clock.images, "timed_seconds": clock.seconds}
                for i, replica in enumerate(replicas):
                    replica.save(step, jax.tree.map(lambda x, i=i: x[i], host), timed)
            if epoch_ends or evaluates or saves:
                clock.skip()
    for replica in replicas:
        replica.checkpoints.close()

    final = {"train_loss": jax.device_get(state.sums["loss"]) / ((run.total_steps - 1) % spe + 1)}
    evaluate_test = run.evaluator(run.test) if run.test else None
    for name, evaluate in (("val", evaluate_val), ("test", evaluate_test)):
        if evaluate:
            evaluated = evaluate(averaged(state))
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
        if first:
            metrics.write_json(replica.workdir / "result.json", result)
    if config.num_seeds > 1:
        result = {"seed": run.seeds.tolist(), **shared}
        for name, of_each in final.items():
            result[name] = float(np.mean(of_each))
            result[f"{name}_std"] = float(np.std(of_each, ddof=1))
            result[f"{name}_of_each_seed"] = [float(v) for v in of_each]
        if first:
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
