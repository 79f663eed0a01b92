"""Progress of a run: throughput, the terminal, and the metrics of each step, one step late."""

import collections
import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from vit_jax.durations import Plan


class BadStep(Exception):
    """A step whose loss or gradient is not finite, or too many such steps in a row."""

    def __init__(self, step: int, bad: Any, loss: Any, grad_norm: Any) -> None:
        self.step, self.bad, self.loss, self.grad_norm = step, bad, loss, grad_norm


class Throughput:
    """Counts training images and seconds, without compilation, evaluation, and saving.

    `images` and `seconds` are the totals before a resume.
    """

    def __init__(self, images: int = 0, seconds: float = 0.0) -> None:
        self.images, self.seconds = images, seconds
        self._last: float | None = None  # the first step compiles: it only starts the clock
        self._lap_images, self._lap_seconds, self._lap_waited = 0, 0.0, 0.0

    def wait(self, seconds: float) -> None:
        """Adds the time that a step waited for its batch."""
        self._lap_waited += seconds

    def tick(self, images: int) -> None:
        """Ends a step of `images` images."""
        now = time.perf_counter()
        if self._last is not None:
            passed = now - self._last
            self.images += images
            self.seconds += passed
            self._lap_images += images
            self._lap_seconds += passed
        self._last = now

    def pause(self) -> None:
        """Excludes the time since the last tick."""
        if self._last is not None:
            self._last = time.perf_counter()

    def lap(self) -> tuple[float, float]:
        """(images/s, share of the time spent waiting for data) since the last lap."""
        rate = waiting = 0.0
        if self._lap_seconds:
            rate = self._lap_images / self._lap_seconds
            waiting = min(self._lap_waited / self._lap_seconds, 1.0)
        self._lap_images, self._lap_seconds, self._lap_waited = 0, 0.0, 0.0
        return rate, waiting


class Terminal:
    """A progress bar on a terminal, else a line per `seconds` at most; nothing unless `shown`."""

    def __init__(self, plan: Plan, *, step: int, shown: bool, seconds: float = 30) -> None:
        self._plan, self._shown, self._seconds = plan, shown, seconds
        self._last = time.monotonic()
        self._bar = tqdm.tqdm(
            total=plan.total_steps,
            initial=step,
            bar_format="{percentage:3.0f}%|{bar:10}| {desc}",
            dynamic_ncols=True,
            disable=not shown or not sys.stderr.isatty(),
        )

    def move(self, step: int) -> None:
        """Advances the bar."""
        self._bar.update(step - self._bar.n)

    def update(self, step: int, metrics: dict[str, Any], images_left: int) -> None:
        """Shows the metrics of a step, {name: scalar or one per seed}."""
        means = {name: float(np.mean(value)) for name, value in metrics.items()}
        if not self._shown or means["time/images_per_second"] <= 0:
            return
        plan, rate = self._plan, means["time/images_per_second"]
        line = (
            f"epoch {plan.epoch(step)[0]}/{plan.epoch(plan.total_steps)[0]}, "
            f"step {step}/{plan.total_steps}, loss {means['train/loss']:.4f}, "
            f"accuracy {means['train/accuracy']:.1%}, lr {means['train/lr']:.3g}, "
            f"{rate:,.0f} images/s"
        )
        if "time/mfu" in means:
            line += f", MFU {means['time/mfu']:.0%}"
        if "time/waiting_for_data" in means:
            line += f", {means['time/waiting_for_data']:.0%} of the time waiting for data"
        line += f", {peak_memory() / 1e9:.1f} GB, {format_duration(images_left / rate)} left"
        if not self._bar.disable:
            self._bar.set_description_str(line)
        elif time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            print(line, flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._shown:
            self._bar.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Closes the bar."""
        self._bar.close()


class TrainLog:
    """Writes a run's metrics to its workdir and terminal.

    A step's metrics are read one step late, when the next step is already running, so that neither
    host nor device waits. Other uses of the state run under `paused`, which reads the pending
    metrics first and is excluded from the training time.
    """

    def __init__(
        self,
        workdir: Any,
        plan: Plan,
        *,
        step: int,
        progress: dict[str, Any],
        patience: int,
        flops_per_image: float,
        peak_flops: float | None,
        streaming: bool,
    ) -> None:
        """Starts after `step`.

        Args:
          workdir: has `write(step, scalars)` and `is_best(val_accuracy)`.
          plan: a `durations.Plan`.
          progress: {"timed_images", "timed_seconds"} of the run so far.
          patience: number of consecutive bad steps that ends the run.
          peak_flops: FLOP/s of all devices, or None if unknown.
          streaming: whether to record the time spent waiting for data.
        """
        self._workdir, self._plan = workdir, plan
        self._patience, self._bad_in_a_row = patience, np.zeros((), int)
        self._flops_per_image, self._peak_flops = flops_per_image, peak_flops
        self._streaming = streaming
        self._queue: collections.deque = collections.deque()
        self.throughput = Throughput(progress["timed_images"], progress["timed_seconds"])
        self.terminal = Terminal(plan, step=step, shown=jax.process_index() == 0)
        self.step = step  # the last one pushed
        self.has_new_best = False
        self.val_accuracy = None  # of the current step, if it was validated

    @property
    def progress(self) -> dict[str, Any]:
        """The log's state in a checkpoint, as JSON."""
        images, seconds = self.throughput.images, self.throughput.seconds
        return {"timed_images": images, "timed_seconds": seconds}

    def push(self, step: int, metrics: dict[str, Any]) -> None:
        """Queues a step's metrics, on the devices, and reads the previous step's."""
        self.step, self.has_new_best, self.val_accuracy = step, False, None
        self._queue.append((step, metrics))
        if len(self._queue) > 1:
            self._read()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for and reads the pushed steps, and stops the clock during the context."""
        while self._queue:
            self._read()
        yield
        self.throughput.pause()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yields from an iterator, and counts the time spent waiting for it."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.throughput.wait(time.perf_counter() - start)
            yield batch

    def _read(self):
        step, metrics = self._queue.popleft()
        bad = jax.device_get(metrics.pop("bad"))  # waits for the step
        images = self._plan.images(step) - self._plan.images(step - 1)
        self.throughput.tick(images * np.size(bad))  # over all seeds
        self._bad_in_a_row = np.where(bad, self._bad_in_a_row + 1, 0)
        if self._bad_in_a_row.max() >= self._patience:
            values = jax.device_get(metrics)
            bad = self._bad_in_a_row >= self._patience
            raise BadStep(step, bad, values["loss"], values["grad_norm"])
        self.terminal.move(step)
        if self._plan.log(step):
            self._log(step, jax.device_get(metrics))

    def _log(self, step, metrics):
        rate, waiting = self.throughput.lap()
        line = {f"train/{name}": value for name, value in metrics.items()}
        line["time/images_per_second"] = rate
        if self._streaming:
            line["time/waiting_for_data"] = waiting
        if self._peak_flops:
            line["time/mfu"] = rate * self._flops_per_image / self._peak_flops
        self._workdir.write(step, line)
        images = self._plan.images(self._plan.total_steps) - self._plan.images(step)
        self.terminal.update(step, line, images * np.size(metrics["loss"]))

    def epoch(self, step: int, state: Any) -> None:
        """Records the mean loss and accuracy of an epoch, from the sums in the state."""
        with self.paused():
            epoch, steps = self._plan.epoch(step)
            means = {f"epoch/{name}": value for name, value in epoch_means(state, steps).items()}
            self._workdir.write(step, means)
            spe = self._plan.steps_per_epoch
            part = "" if steps == spe else f" ({steps} of its {spe} steps)"
            self.terminal.say(f"Epoch {epoch}, Loss: {np.mean(means['epoch/loss']):.4f}{part}")

    def validation(self, step: int, values: Mapping[str, Any]) -> None:
        """Records {"loss", "accuracy", ...} of the validation split."""
        self._workdir.write(step, {f"val/{name}": values[name] for name in ("loss", "accuracy")})
        accuracy = values["accuracy"]
        self.terminal.say(f"Validation Accuracy: {100 * np.mean(accuracy):.2f}%")
        self.val_accuracy, self.has_new_best = accuracy, self._workdir.is_best(accuracy)


def epoch_means(state: Any, steps: int) -> dict[str, Any]:
    """{"loss", "accuracy"}: means over the epoch's first `steps` steps, except skipped ones."""
    sums = jax.device_get(state.sums)
    counted = np.maximum(steps - sums.pop("skipped", 0), 1)
    return {name: value / counted for name, value in sums.items()}


def peak_memory() -> float:
    """Peak bytes in use on the first device, or by this process if that is the CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return (
        stats.get("peak_bytes_in_use") or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


def format_duration(seconds: float) -> str:
    """Formats seconds: '42 s', '3 min', '1 h 20 min'."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
