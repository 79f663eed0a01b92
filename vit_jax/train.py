"""The training loop: the only file that decides when."""

import collections
import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import time

import jax
import numpy as np

from vit_jax import checkpoint, mesh, metrics, peaks
from vit_jax import config as config_lib
from vit_jax.distributed import check_same, shared_errors
from vit_jax.errors import Stopped, UserError
from vit_jax.run import header, setup
from vit_jax.step import TrainState
from vit_jax.stopping import StopRequest

# May differ between a run and its continuation: they do not change what is computed, or only
# where it would have come to nothing.
NOT_COMPARED = (
    *("data.dir", "data.streaming", "data.streaming_threads", "mesh.data", "mesh.fsdp"),
    *("model.remat", "tensorboard", "wandb", "on_bad_loss", "keep_every", "histograms_every"),
)


def open_workdir(workdir, config, *, needs=0):
    """Makes the workdir and its config.json, or checks that it is this config's.

    Returns the open file that holds it for this process. Raises UserError when it cannot be
    written, has less free space than `needs` bytes, holds a run of another config or a symbolic
    link, or another run is at work in it.
    """
    with _writing(workdir):
        existing = next(f for f in (workdir.absolute(), *workdir.absolute().parents) if f.exists())
        if (free := shutil.disk_usage(existing).free) < needs:
            raise UserError(
                f"the checkpoints of this run need {needs / 1e6:,.1f} MB in {workdir}, where "
                f"{free / 1e6:,.1f} MB are free: make room or give another --workdir"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        for path in (*workdir.iterdir(), *(workdir / "checkpoints").glob("*")):
            if path.is_symlink():  # whoever made the workdir chose where it leads
                raise UserError(
                    f"{path} is a symbolic link, and a run writes only into its workdir: remove "
                    "it, or give another --workdir"
                )
        held = _lock(workdir)
        path = workdir / "config.json"
        if not path.exists():
            metrics.write_json(path, config.to_dict())
        elif other := config_lib.difference(config, _read_config(path), ignore=NOT_COMPARED):
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(other[:5])}): "
                "give another --workdir, or delete this one"
            )
        return held


@contextlib.contextmanager
def _writing(workdir):
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write the workdir {workdir}: {e.strerror or e}") from e


def _lock(workdir):
    """An open file in the workdir that one process at a time can have, as long as it lives."""
    file = open(workdir / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno == errno.EWOULDBLOCK:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{workdir} is in use by {owner}: wait for it, end it, or give another --workdir"
            ) from e
        # Else this file system has no locks.
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


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

    def __init__(self, run, workdir, index, stack):
        self.seed = int(run.seeds[index])
        self.config = config_lib.from_dict(run.config.to_dict())
        self.workdir = workdir
        if run.config.num_seeds > 1:
            self.config.seed, self.config.num_seeds = self.seed, 1
            self.workdir = workdir / f"seed_{self.seed}"
            if jax.process_index() == 0:
                stack.enter_context(open_workdir(self.workdir, self.config))
        self.directory = self.workdir.absolute() / "checkpoints"
        self.checkpoints = None  # until `open`
        self._run = run
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

    def check_data(self, step):
        """Raises UserError if the checkpoint of a step was trained on other data than the run's."""
        folder = self.directory / str(step)
        try:
            other = data_difference(checkpoint.read_data(folder), self._run.data_identity)
        except (LookupError, TypeError, ValueError) as e:
            raise UserError(f"{folder / 'data'} is not what vit_jax writes ({e!r})") from e
        if other:
            raise UserError(
                f"{self.workdir} holds a run on other data ({'; '.join(other)}): resume it with "
                "the data that it began with, or give another --workdir"
            )

    def open(self):
        """Opens the checkpoints. All processes must do so together."""
        keep_every = self._run.durations["keep_every"]
        self.checkpoints = checkpoint.Checkpoints(self.directory, keep_every=keep_every)

    def save(self, step, state, timed, val_accuracy):
        """Starts saving this replica's part of a state. `timed` is kept beside it."""
        self.checkpoints.save(
            step,
            params=state.params,
            ema_params=state.ema_params,
            opt_state=state.opt_state,
            config=self._saved_config,
            data=self._run.data_identity,
            progress={"sums": {k: float(v) for k, v in state.sums.items()}, **timed},
            val_accuracy=val_accuracy,
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
            sums={k: np.float32(saved["progress"]["sums"].get(k, 0)) for k in shapes.sums},
        )
        return state, saved["progress"]


def data_difference(saved, current):
    """Describes how two values of `Run.data_identity` differ, one text per class list or split."""
    classes = [data["class_names"] for data in (saved, current)]
    if classes[0] != classes[1]:
        pairs = enumerate(itertools.zip_longest(*classes))
        i, (before, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        return [f"class {i} is {now or 'absent'}, was {before or 'absent'}"]
    found = []
    for name, now in current["splits"].items():
        before = saved["splits"][name]
        if now["num_examples"] != before["num_examples"]:
            found.append(f"{name}: {now['num_examples']:,} images, was {before['num_examples']:,}")
        elif now["digest_of"] == before["digest_of"] and now["digest"] != before["digest"]:
            found.append(f"{name}: other images or labels, as many as before")
    return found


def train(config, workdir, *, command=""):
    """Trains by a config, printing as it goes, and returns the content of result.json.

    Continues from the newest checkpoint in `workdir` when it holds one of the same config. Raises
    UserError for wrong input, before anything is written, and for a disk that refuses or numbers
    that go bad; Stopped when a signal ended it early, saved. With several processes, only process
    0 prints, and writes everything except the other processes' parts of a checkpoint.
    """
    with contextlib.ExitStack() as stack:  # what ends with the run: its hold on the workdir
        workdir = pathlib.Path(os.path.expanduser(workdir))
        return _train(config, workdir, command, stack)


def _begin(workdir, replicas, start, corrupted, command):
    """The first writes of a run that is sure to train: run.json, and nothing after step `start`."""
    with _writing(workdir):
        for folder in dict.fromkeys([workdir, *(r.workdir for r in replicas)]):
            metrics.write_json(folder / "run.json", metrics.environment(command))
        for replica in replicas:
            moved = checkpoint.clear_after(replica.directory, start, corrupted)
            for folder, target in moved.items():
                print(f"corrupted: {folder}: {corrupted[folder]}; moved to {target}", flush=True)


def _train(config, workdir, command, stack):
    first = jax.process_index() == 0
    if config.wandb:
        metrics.import_wandb()
    folders = [workdir, *workdir.glob("seed_*")]  # a run of several seeds keeps them in the latter
    continuing = any(step.name.isdigit() for f in folders for step in f.glob("checkpoints/*"))
    with shared_errors():
        run = setup(config, fresh=not continuing)
        # Raises what only tracing finds; jit keeps the trace, so the first step is no slower.
        run.step.eval_shape(run.shapes, *run.input_shapes())
    saved = (run.shapes.params, run.shapes.ema_params, run.shapes.opt_state)
    a_checkpoint = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(saved))
    # Two and the best are kept while another is being written; some may be there already.
    needs = 4 * a_checkpoint
    found = (p for f in folders for p in f.glob("checkpoints/*"))
    kept = (p for p in found if p.suffix != checkpoint.CORRUPTED)  # these stay, for people
    for folder, _, names in (listed for step in kept for listed in os.walk(step)):
        for name in names:
            with contextlib.suppress(OSError):  # another run at work there, which is found out next
                needs -= os.lstat(os.path.join(folder, name)).st_size
    with shared_errors():
        if first:
            stack.enter_context(open_workdir(workdir, config, needs=needs))
    if jax.process_count() > 1:
        splits = run.data_identity["splits"]
        check_same({f"the data of the {k} split": v["digest"] for k, v in splits.items()})
    if first:
        print(*header(run, workdir), sep="\n", flush=True)
    replicas = [Replica(run, workdir, i, stack) for i in range(config.num_seeds)]
    directories = [replica.directory for replica in replicas]
    start, corrupted = checkpoint.newest_intact_step(directories)
    if not start and continuing:  # what looked like a checkpoint is none
        run = setup(config)
    complete = start == run.total_steps and (workdir / "result.json").exists()
    # A workdir on each host's own disk would differ.
    check_same({f"the newest checkpoint in {workdir}": start, "a result there": complete})
    for replica in replicas if start else ():
        replica.check_data(start)
    if complete:
        result = json.loads((workdir / "result.json").read_text())
        if first:
            print(f"Already complete. {summary(result)}")
        return result
    if first:
        _begin(workdir, replicas, start, corrupted, command)
    for replica in replicas:
        replica.open()
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
        steps_per_epoch=run.steps_per_epoch,
        batch_size=config.batch_size,
        fields=[config_lib.flat(r.config) for r in replicas],
        tensorboard=config.tensorboard,
        wandb=config.wandb,
    )
    peak = peaks.peak_flops(jax.devices()[0].device_kind)
    num_examples, spe = run.train.num_examples, run.steps_per_epoch
    inputs = run.inputs(start)
    evaluate_val = run.evaluator(run.val) if run.val else None
    in_flight, validated = collections.deque(), None
    # Where bad steps are skipped, nothing but such steps for this long end the run all the same.
    patience = max(run.durations["log_every"], 10) if config.on_bad_loss == "skip" else 1
    bad_in_a_row = np.zeros(config.num_seeds, int)

    def images(step):
        """Examples that each replica has seen: the last batch of an epoch may be smaller."""
        return step // spe * num_examples + step % spe * config.batch_size

    def due(name, step):
        return run.durations[name] and step % run.durations[name] == 0

    def averaged(state):
        return state.params if state.ema_params is None else state.ema_params

    def save(step, state, accuracies):
        """Starts a save of every replica."""
        host = mesh.fetch(state)
        timed = {"timed_images": clock.images, "timed_seconds": clock.seconds}
        writer.sync()  # before the checkpoint: a continued run keeps lines up to its step
        for i, replica in enumerate(replicas):
            part = jax.tree.map(lambda x, i=i: x[i], host)
            if not all(np.isfinite(x).all() for x in jax.tree.leaves(part.params)):
                bad_numbers(step, i)
            replica.checkpoints.wait()
            replica.save(step, part, timed, accuracies[i])

    def bad_numbers(step, i, *, loss=None, grad_norm=None, **_):
        """Ends the run: the batch of the step is written down, the last good checkpoint named."""
        replica = replicas[i]
        path = replica.workdir / f"bad_batch_{step}.npz"
        kept = f"the batch is in {path}"
        try:
            if first:
                np.savez(path, **run.batch(step, i), seed=replica.seed, step=step)
        except (OSError, UserError) as e:
            kept = f"the batch could not be kept ({e})"
        for each in replicas:
            each.checkpoints.close()
        writer.close()
        steps = replica.checkpoints.steps()
        what = "the weights are not finite"
        if loss is not None:
            what = f"the loss is {loss[i]:.4g} and the gradient's norm {grad_norm[i]:.4g}"
        raise UserError(
            f"{what} at step {step} of seed {replica.seed}; the last good checkpoint is "
            f"{replica.workdir / 'checkpoints' / str(steps[-1]) if steps else 'none'}; "
            f"{kept}; a lower optim.peak_lr or an optim.grad_clip_norm may help, "
            "--config.on_bad_loss=skip leaves such steps out, --debug_nans finds the operation"
        )

    step = start
    # Nothing crosses between host and device in the loop that is not asked for by name.
    guard = "allow" if jax.config.jax_debug_nans else "disallow"
    with jax.transfer_guard(guard), StopRequest() as stop:
        for step in range(start + 1, run.total_steps + 1):
            epoch, batches = (step - 1) // spe, (step - 1) % spe + 1
            began = time.perf_counter()
            step_inputs = next(inputs)
            clock.wait(time.perf_counter() - began)
            # Of epochs 1, 2, 4, 8, ...: what changes in the images changes slowly.
            if config.tensorboard and batches == 1 and epoch & (epoch + 1) == 0:
                writer.images(step, "train/images", mesh.fetch(run.seen(state, *step_inputs)))
            state, step_metrics = run.step(state, *step_inputs)

            # A step's metrics are read once the next step is under way, so that neither waits.
            in_flight.append((step, step_metrics))
            last, stops = step == run.total_steps, stop.reached(step)
            epoch_ends, evaluates = (
                batches == spe or last,
                run.val and (due("eval_every", step) or last),
            )
            saves = due("save_every", step) or due("keep_every", step) or last or stops
            while len(in_flight) > (0 if epoch_ends or saves or evaluates else 1):
                done, values = in_flight.popleft()
                bad = jax.device_get(values.pop("bad"))  # waits for the step
                clock.tick((images(done) - images(done - 1)) * config.num_seeds)
                bad_in_a_row = np.where(bad, bad_in_a_row + 1, 0)
                if bad_in_a_row.max() >= patience:
                    bad_numbers(done, int(np.argmax(bad_in_a_row)), **jax.device_get(values))
                writer.move(done)
                if due("log_every", done):
                    rate = clock.lap()
                    line = {f"train/{k}": v for k, v in jax.device_get(values).items()}
                    line["time/images_per_second"] = rate
                    if config.data.streaming:
                        line["time/waiting_for_data"] = clock.waiting
                    if peak:
                        line["time/mfu"] = rate * run.flops_per_image / (peak * run.mesh.size)
                    writer.write(done, line)
                    writer.progress(done, line)

            if epoch_ends:
                sums = jax.device_get(state.sums)
                counted = np.maximum(batches - sums.pop("skipped", 0), 1)
                means = {f"epoch/{k}": v / counted for k, v in sums.items()}
                writer.write(step, means)
                part = "" if batches == spe else f" ({batches} of its {spe} steps)"
                writer.say(f"Epoch {epoch + 1}, Loss: {means['epoch/loss'].mean():.4f}{part}")
                if config.data.streaming and run.train.skipped:
                    left_out = list(run.train.skipped.values())
                    writer.say(f"{len(left_out)} images left out so far, as {left_out[0]}")
            accuracies = [None] * config.num_seeds
            if evaluates:
                validated = evaluate_val(averaged(state))
                values = {f"val/{k}": [r[k] for r in validated] for k in ("loss", "accuracy")}
                writer.write(step, values)
                writer.say(f"Validation Accuracy: {100 * np.mean(values['val/accuracy']):.2f}%")
                accuracies = values["val/accuracy"]
                best = [replica.checkpoints.best_accuracy for replica in replicas]
                saves |= any(a > b for a, b in zip(accuracies, best, strict=True))
            if saves:
                save(step, state, accuracies)
            histograms = due("histograms_every", step)
            if histograms:  # of all processes, also where only one writes: a fetch is everyone's
                writer.histograms(step, mesh.fetch(state.params))
            if epoch_ends or evaluates or saves or histograms:
                clock.skip()
            if stops:
                break
        for replica in replicas:
            replica.checkpoints.close()
    if stop.signal:
        writer.say(
            f"{signal.Signals(stop.signal).name}: saved step {step:,} of {run.total_steps:,}; "
            "the same command goes on from there"
        )
        writer.close()
        raise Stopped(stop.signal)

    sums, batches = jax.device_get(state.sums), (run.total_steps - 1) % spe + 1
    final = {"train_loss": sums["loss"] / np.maximum(batches - sums.get("skipped", 0), 1)}
    # The last step was validated in the loop, unless this start has only the test left to do.
    evaluated = {"val": validated or evaluate_val(averaged(state))} if run.val else {}
    if run.test:
        evaluated["test"] = run.evaluator(run.test)(averaged(state))
    for name, seeds in evaluated.items():
        final |= {f"{name}_{k}": [r[k] for r in seeds] for k in ("accuracy", "loss")}
    if run.test:
        values = {f"test/{k}": final[f"test_{k}"] for k in ("loss", "accuracy")}
        writer.write(run.total_steps, values)
    of_each, result = results(run, final, clock)
    folders = [*(r.workdir for r in replicas), workdir]  # one and the same for one seed
    for folder, content in dict(zip(folders, [*of_each, result], strict=True)).items():
        if first:
            metrics.write_json(folder / "result.json", content)
    writer.say(summary(result))
    writer.close()
    return result


def results(run, final, clock):
    """(the content of each replica's result.json, that of the run's), the same for one seed.

    `final` is {name: a value for each seed}. The run's has the mean of several under the name,
    their standard deviation under NAME_std, and all of them under NAME_of_each_seed.
    """
    shared = {
        "steps": run.total_steps,
        "epochs": run.total_steps / run.steps_per_epoch,
        "seconds": clock.seconds,
        "images_per_second": clock.images / clock.seconds if clock.seconds else None,
        "num_params": run.num_params,
        "device": f"{run.mesh.size} x {jax.devices()[0].device_kind}",
    }
    seeds = run.seeds.tolist()
    of_each = [
        {k: float(v[i]) for k, v in final.items()} | {"seed": seed, **shared}
        for i, seed in enumerate(seeds)
    ]
    if len(seeds) == 1:
        return of_each, of_each[0]
    together = {"seed": seeds, **shared}
    for name, values in final.items():
        together[name] = float(np.mean(values))
        together[f"{name}_std"] = float(np.std(values, ddof=1))
        together[f"{name}_of_each_seed"] = [float(v) for v in values]
    return of_each, together


def summary(result):
    """'Test Accuracy: 63.68%', or of the validation split where no test split is read."""
    name = "test" if "test_accuracy" in result else "val"
    text = f"{'Test' if name == 'test' else 'Validation'} Accuracy: "
    text += f"{100 * result[f'{name}_accuracy']:.2f}%"
    if f"{name}_accuracy_std" in result:
        spread, n = 100 * result[f"{name}_accuracy_std"], len(result["seed"])
        text += f" (mean of {n} seeds, standard deviation {spread:.2f})"
    return text
