"""The training loop."""

import contextlib
import pathlib
import signal
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax.errors import Stopped, UserError, expand_home
from vit_jax.experiment import describe, description_lines, make_experiment
from vit_jax.parallel import backend, targets
from vit_jax.parallel.preemption import StopSignal
from vit_jax.parallel.processes import check_same, shared_errors
from vit_jax.seeds import RunWorkdir
from vit_jax.workdir import (
    BadStep,
    TrainLog,
    check_steps,
    epoch_means,
    import_wandb,
    saved_steps,
    trace,
)


def train(
    config: ConfigDict,
    path: str | pathlib.Path,
    *,
    command: str = "",
    profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Trains a model from a config in the workdir `path`; returns the content of result.json.

    Resumes from the newest intact checkpoint there. With several processes, only process 0 prints.
    With `profile_steps` = (first, last), traces these steps; see `workdir.profile`.

    Raises UserError if the config or the data is invalid (before it writes to the workdir), if the
    workdir contains another run, if a write fails, or if the loss or the gradient is not finite.
    Raises Stopped after a signal, once the state is saved.
    """
    if config.deterministic:
        backend.require_determinism()  # before `shared_errors` starts JAX
    if config.wandb:
        import_wandb()
    path = expand_home(path)
    workdir = RunWorkdir(path, config)
    resuming = workdir.has_checkpoints
    with contextlib.ExitStack() as stack:
        with shared_errors():
            experiment = make_experiment(config, fresh=not resuming)
            experiment.check()
            if profile_steps:
                check_steps(profile_steps, experiment.plan.total_steps)
        with shared_errors():  # only now, since process 0 creates the workdir
            workdir.lock(stack)
        _say(*description_lines(describe(experiment, path)))
        with shared_errors():
            start = workdir.find_resume_step()
            if resuming and not start:  # the only saved step is missing for some seeds
                experiment = make_experiment(config, splits=experiment.splits)
            result = workdir.read_result()
        result = result if result and result["steps"] == start else None
        if jax.process_count() > 1:  # otherwise the digests are not needed yet
            splits = experiment.data_identity["splits"]
            same = {f"the data of the {k} split": v["digest"] for k, v in splits.items()}
            # The workdir, and the file or run of init_from, may be on each host's own disk.
            same |= {f"the newest checkpoint in {path}": start}
            same |= {f"a result of the newest checkpoint in {path}": bool(result)}
            check_same(same | {"the weights of config.init_from": experiment.initial_digest})
        with shared_errors():
            if start:
                workdir.check_resume(start, experiment.data_identity)
            if not result:
                workdir.begin(start, command)
        if result:
            _say(f"Already complete. {_summary(result)}")
            return result
        workdir.open(start, keep=experiment.plan.keep)
        return _train(experiment, workdir, start, profile_steps)


def _train(experiment, workdir, start, profile_steps):
    """Trains from step `start` to the end, and returns the content of result.json."""
    if start:
        state, progress = workdir.restore(start, experiment.state_shapes)
        _say(f"Resuming from step {start:,} of {experiment.plan.total_steps:,}")
    else:
        state, progress = experiment.init(), {"timed_images": 0, "timed_seconds": 0.0}
    log = _make_log(experiment, workdir, start, progress)
    tracing = contextlib.nullcontext()
    if profile_steps and profile_steps[0] <= start:
        log.say(f"Step {profile_steps[0]:,} was trained before; there is no profile.")
    elif profile_steps:
        tracing = trace(experiment, workdir.path / "profile", start, profile_steps, log.paused)
    # Allow only explicit host-device transfers, unless JAX checks every result for NaNs.
    guard = "allow" if jax.config.jax_debug_nans else "disallow"
    try:
        with jax.transfer_guard(guard), StopSignal() as stop, tracing:
            state, validated = _loop(experiment, workdir, log, state, stop)
            workdir.wait()
        if stop.signal:  # or one received during the last save
            workdir.close()
            log.say(
                f"{signal.Signals(stop.signal).name}: saved step {log.step:,} of "
                f"{experiment.plan.total_steps:,}; rerun the same command to resume"
            )
            raise Stopped(stop.signal)
    except BadStep as e:
        raise _bad_step_error(experiment, workdir, e) from e
    except UserError:
        with contextlib.suppress(UserError):  # the same full disk may fail both
            workdir.wait()  # otherwise the exit of the process cancels a pending save
        raise
    finally:
        log.close()
    result = _results(experiment, workdir, log, state, validated)
    workdir.close()
    _say(_summary(result))
    return result


def _loop(experiment, workdir, log, state, stop):
    """Trains until the run ends or a signal; returns (state, last validation metrics or None)."""
    plan, validated = experiment.plan, None
    for step, inputs in experiment.batches(after=log.step):
        if log.out_of_patience:
            log.say(f"No better validation accuracy in {experiment.config.stop_after}")
            break
        state, metrics = experiment.train_step(state, *inputs)
        log.push(step, metrics)
        stopping = stop.reached(step)  # in every process and at every step, since it is collective
        if plan.ends_epoch(step):
            log.epoch(step, state)
        if plan.evaluate(step) and "val" in experiment.splits:
            with log.paused():
                validated = experiment.evaluate(state.eval_params, "val")
                log.validation(step, validated)
        ending = stopping or log.out_of_patience
        if plan.save(step) or plan.keep(step) or log.has_new_best or ending:
            with log.paused():
                workdir.save(step, state, experiment.documents, log)
        if stopping:
            break
    return state, validated


def _make_log(experiment, workdir, start, progress):
    config, peak = experiment.config, targets.peak_flops(jax.devices()[0].device_kind)
    return TrainLog(
        workdir,
        experiment.plan,
        step=start,
        progress=progress,
        # With bad steps skipped, this many in a row still end the run.
        patience=max(experiment.plan.log.steps, 10) if config.on_bad_loss == "skip" else 1,
        peak_rate=peak and peak * experiment.mesh.size / experiment.flops_per_image,
    )


def _bad_step_error(experiment, workdir, bad_step):
    """Returns the UserError of a non-finite step. Stores the step's batch next to the metrics."""
    index, step = int(np.argmax(bad_step.bad)), bad_step.step
    seed, folder = workdir.seeds[index], workdir.folders[index]
    path = folder / f"bad_batch_{step}.npz"
    batch_note = f"the batch is in {path}"
    try:
        if jax.process_index() == 0:
            np.savez(path, **experiment.stored_batch(step, seed), seed=seed, step=step)
    except (OSError, UserError) as e:
        batch_note = f"the batch could not be stored ({e})"
    workdir.close()
    steps = saved_steps(folder / "checkpoints")
    problem = "the weights are not finite"
    if bad_step.loss is not None:
        loss, norm = (np.atleast_1d(v)[index] for v in (bad_step.loss, bad_step.grad_norm))
        problem = f"the loss is {loss:.4g} and the gradient norm {norm:.4g}"
    return UserError(
        f"{problem} at step {step} of seed {seed}; last good checkpoint: "
        f"{folder / 'checkpoints' / str(steps[-1]) if steps else 'none'}; {batch_note}; try a "
        "lower optim.peak_lr or set optim.grad_clip_norm, skip such steps with "
        "--config.on_bad_loss=skip, or set JAX_DEBUG_NANS=true to locate the operation"
    )


def _results(experiment, workdir, log, state, validated):
    """Evaluates the final weights, and writes and returns the content of result.json."""
    plan = experiment.plan
    values = {"train_loss": epoch_means(state, plan.epoch(log.step)[1])["loss"]}
    metrics = {"val": validated}  # None if the run resumed at its last step
    for name in ("val", "test"):
        if name in experiment.splits:
            if not (found := metrics.get(name)):
                _say(f"Evaluating {experiment.splits[name].num_examples:,} {name} images")
                found = experiment.evaluate(state.eval_params, name)
            values |= {f"{name}_{k}": found[k] for k in ("accuracy", "loss")}
    if "test" in experiment.splits:
        scalars = {f"test/{k}": values[f"test_{k}"] for k in ("loss", "accuracy")}
        workdir.write(log.step, scalars)
    shared = {
        "steps": log.step,
        "epochs": log.step / plan.steps_per_epoch,
        "seconds": log.seconds,
        "images_per_second": log.images / log.seconds if log.seconds else None,
        "num_params": experiment.num_params,
        "device": f"{experiment.mesh.size} x {jax.devices()[0].device_kind}",
    }
    return workdir.write_results(values, shared)


def _say(*lines):
    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)


def _summary(result):
    """Returns 'Test Accuracy: 63.68%', or the validation accuracy if there is no test split."""
    name, title = ("test", "Test") if "test_accuracy" in result else ("val", "Validation")
    text = f"{title} Accuracy: {100 * result[f'{name}_accuracy']:.2f}%"
    if f"{name}_accuracy_std" in result:
        std, n = 100 * result[f"{name}_accuracy_std"], len(result["seed"])
        text += f" (mean of {n} seeds, standard deviation {std:.2f})"
    return text
