"""Progress of a run: metrics (read one step late), throughput, and console output."""

import contextlib
import sys
import time
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from vit_jax.durations import Plan


class BadStep(Exception):
    """Raised at a step whose loss or gradient is not finite, or after too many such steps in a row.

    Also raised before a save if the weights are not finite; `loss` and `grad_norm` are then None.
    """

    def __init__(self, step: int, bad: Any, loss: Any, grad_norm: Any) -> None:
        self.step, self.bad, self.loss, self.grad_norm = step, bad, loss, grad_norm


class TrainLog:
    """Writes a run's metrics to its workdir and the terminal.

    A step's metrics are read one step late, when the next step is already running, so that neither
    host nor device waits. Other uses of the state run under `paused`. `images` and `seconds` count
    training without compilation and pauses. Only process 0 prints: a progress bar on a terminal,
    otherwise a line at most every 30 s.
    """

    def __init__(
        self,
        workdir: Any,  # has write, is_best, and steps_since_best
        plan: Plan,
        *,
        step: int,  # the last one trained
        progress: dict[str, Any],  # `TrainLog.progress`, as saved at that step
        patience: int,  # consecutive bad steps that end the run
        peak_rate: float | None,  # images/s at the devices' peak FLOP/s, if known
    ) -> None:
        self._workdir, self._plan = workdir, plan
        self._patience, self._peak_rate = patience, peak_rate
        self._bad_in_a_row = np.zeros((), int)
        self._unread: tuple[int, dict[str, Any]] | None = None  # the last step and its metrics
        self.images, self.seconds = progress["timed_images"], progress["timed_seconds"]
        self._logged = (self.images, self.seconds)  # at the last logged step
        self._clock: float | None = None  # the first step compiles: it only starts the clock
        self._shown, self._last_printed = jax.process_index() == 0, time.monotonic()
        self._bar = tqdm.tqdm(
            total=plan.total_steps,
            initial=step,
            bar_format="{percentage:3.0f}%|{bar:10}| {desc}",
            dynamic_ncols=True,
            disable=not (self._shown and sys.stderr.isatty()),
        )
        self._bar.set_description_str("compiling")
        self.step, self.has_new_best = step, False
        self.val_accuracy = None  # of `step`, if it was validated

    @property
    def progress(self) -> dict[str, Any]:
        """The log's state in a checkpoint, as JSON."""
        return {"timed_images": self.images, "timed_seconds": self.seconds}

    @property
    def out_of_patience(self) -> bool:
        """Whether the run ends after `step`: no better validation accuracy in `stop_after`."""
        if self.has_new_best or not self._plan.evaluate(self.step):
            return False
        return 0 < self._plan.stop_after <= self._workdir.steps_since_best(self.step)

    def push(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes a step's metrics, on the devices, and reads the previous step's."""
        self.step, self.has_new_best, self.val_accuracy = step, False, None
        self._read(then=(step, metrics))

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Waits for the last step, reads its metrics, and stops the clock during the context."""
        self._read()
        yield
        if self._clock is not None:
            self._clock = time.perf_counter()

    def _read(self, then=None):
        unread, self._unread = self._unread, then
        if unread is None:
            return
        step, metrics = unread
        bad = jax.device_get(metrics.pop("bad"))  # waits for the step
        now = time.perf_counter()
        if self._clock is None:
            self._bar.set_description_str("training")  # until a step is logged
        else:
            images = self._plan.images(step) - self._plan.images(step - 1)
            self.images += images * np.size(bad)  # over all seeds
            self.seconds += now - self._clock
        self._clock = now
        self._bad_in_a_row = np.where(bad, self._bad_in_a_row + 1, 0)
        if (ended := self._bad_in_a_row >= self._patience).any():
            values = jax.device_get(metrics)
            raise BadStep(step, ended, values["loss"], values["grad_norm"])
        self._bar.update()
        if self._plan.log(step):
            self._log(step, jax.device_get(metrics))

    def _log(self, step, metrics):
        images, seconds = self.images - self._logged[0], self.seconds - self._logged[1]
        self._logged = (self.images, self.seconds)
        rate = images / seconds if seconds else 0.0
        line = {f"train/{name}": value for name, value in metrics.items()}
        if rate:  # 0 until a step is timed
            line["time/images_per_second"] = rate
            if self._peak_rate:
                line["time/mfu"] = rate / self._peak_rate
        self._workdir.write(step, line)
        if rate and not self._bar.disable:
            self._bar.set_description_str(progress_line(self._plan, step, line))
        elif rate and self._shown and time.monotonic() - self._last_printed >= 30:
            self._last_printed = time.monotonic()
            print(progress_line(self._plan, step, line), flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._shown:
            self._bar.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Closes the bar."""
        self._bar.close()

    def epoch(self, step: int, state: Any) -> None:
        """Records the mean loss and accuracy of an epoch, from the sums in the state."""
        with self.paused():
            epoch, steps = self._plan.epoch(step)
            means = {f"epoch/{name}": value for name, value in epoch_means(state, steps).items()}
            self._workdir.write(step, means)
            spe = self._plan.steps_per_epoch
            part = "" if steps == spe else f" ({steps} of its {spe} steps)"
            self.say(f"Epoch {epoch}, Loss: {np.mean(means['epoch/loss']):.4f}{part}")

    def validation(self, step: int, values: Mapping[str, Any]) -> None:
        """Records {"loss", "accuracy", ...} of the validation split."""
        self._workdir.write(step, {f"val/{name}": values[name] for name in ("loss", "accuracy")})
        accuracy = values["accuracy"]
        self.say(f"Validation Accuracy: {100 * np.mean(accuracy):.2f}%")
        self.val_accuracy, self.has_new_best = accuracy, self._workdir.is_best(accuracy)


def progress_line(plan: Plan, step: int, metrics: Mapping[str, Any]) -> str:
    """Returns the metrics of a step, {name: scalar or one per seed}, as text."""
    means = {name: np.mean(value) for name, value in metrics.items()}
    rate = means["time/images_per_second"]
    images_left = plan.images(plan.total_steps) - plan.images(step)
    seconds_left = images_left * np.size(metrics["train/loss"]) / rate
    mfu = f", MFU {means['time/mfu']:.0%}" if "time/mfu" in means else ""
    return (
        f"epoch {plan.epoch(step)[0]}/{plan.epoch(plan.total_steps)[0]}, "
        f"step {step}/{plan.total_steps}, loss {means['train/loss']:.4f}, "
        f"accuracy {means['train/accuracy']:.1%}, lr {means['train/lr']:.3g}, "
        f"{rate:,.0f} images/s{mfu}, {format_duration(seconds_left)} left"
    )


def epoch_means(state: Any, steps: int) -> dict[str, Any]:
    """Returns the mean loss and accuracy of an epoch's first `steps` steps, except skipped ones.

    They are NaN if all were skipped.
    """
    sums = jax.device_get(state.sums)
    counted = steps - sums.pop("skipped")
    with np.errstate(invalid="ignore"):
        return {name: value / counted for name, value in sums.items()}


def format_duration(seconds: float) -> str:
    """Formats seconds: '42 s', '3 min', '1 h 20 min'."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
