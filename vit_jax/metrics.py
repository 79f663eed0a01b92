"""What a run tells: metrics.jsonl, TensorBoard events, the terminal, throughput and MFU."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

import jax
import numpy as np
import tqdm

# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "V100": 125e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind):
    """The bfloat16 peak of a device in FLOP/s, or None where it is not known."""
    words = device_kind.upper().replace("-", " ").split()
    for name, peak in PEAK_FLOPS.items():
        if all(word in words for word in name.upper().split()):
            return peak
    return None


def write_json(path, value):
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as f:
        f.write(value if isinstance(value, str) else json.dumps(value, indent=2))
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def keep_lines_until(path, step):
    """Drops the lines of a metrics.jsonl later than `step`: the run goes on from there.

    Dropped too are the lines of the final test, which follows the last checkpoint, and a last
    line cut off by a kill.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values["step"] <= step and "test/accuracy" not in values:
            kept.append(line)
    write_json(path, "\n".join(kept)) if kept else path.write_text("")


def environment(command):
    """What a run ran on: command, date, versions, commit and devices, for run.json."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    folder = pathlib.Path(__file__).parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
        "host": platform.node(),
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
    }


class Clock:
    """Counts training images and seconds, leaving out compilation, evaluation and saving.

    `images` and `seconds` go on from the values of an earlier part of the run.
    """

    def __init__(self, images, seconds):
        self.images, self.seconds = images, seconds
        self._last = None  # the first step compiles: it only starts the clock
        self._lap_images, self._lap_seconds, self._lap_waited = 0, 0.0, 0.0
        self.waiting = 0.0  # share of the last lap that was spent waiting for data

    def wait(self, seconds):
        """So long the next batch was waited for."""
        self._lap_waited += seconds

    def tick(self, images):
        """A step of so many images is done."""
        now = time.perf_counter()
        if self._last is not None:
            passed = now - self._last
            self.images += images
            self.seconds += passed
            self._lap_images += images
            self._lap_seconds += passed
        self._last = now

    def skip(self):
        """What happened since the last tick is not training."""
        if self._last is not None:
            self._last = time.perf_counter()

    def lap(self):
        """Images a second since the last lap; 0 where no step was timed."""
        rate = self._lap_images / self._lap_seconds if self._lap_seconds else 0.0
        self.waiting = min(self._lap_waited / self._lap_seconds, 1.0) if self._lap_seconds else 0.0
        self._lap_images, self._lap_seconds, self._lap_waited = 0, 0.0, 0.0
        return rate


class Writer:
    """Writes metrics of a run into its workdirs, one a replica, and its progress to the terminal.

    On a terminal a bar shows images, images/s, the time left and the newest loss; elsewhere a line
    is printed every `plain_seconds` at most. `say` prints a line without tearing the bar. Without
    workdirs it is silent: of several processes one tells.
    """

    def __init__(self, workdirs, *, step, total_steps, batch_size, tensorboard, plain_seconds=30):
        for workdir in workdirs:
            keep_lines_until(workdir / "metrics.jsonl", step)
        self._files = [open(workdir / "metrics.jsonl", "a") for workdir in workdirs]
        self._total_steps, self._batch_size = total_steps, batch_size
        self._boards = []
        if tensorboard:
            from tensorboardX import SummaryWriter  # slow to import: only where it is used

            self._boards = [SummaryWriter(str(w), purge_step=step + 1) for w in workdirs]
        self._bar = tqdm.tqdm(
            total=total_steps * batch_size,
            initial=step * batch_size,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not workdirs or not sys.stderr.isatty(),
        )
        self._plain_seconds, self._last_plain = plain_seconds, time.monotonic()

    def write(self, step, metrics):
        """One line of each metrics.jsonl: {"step": step, name: float, ...}.

        A value is one number for all replicas, or one a replica.
        """
        if not self._files:
            return
        metrics = {k: np.broadcast_to(v, len(self._files)) for k, v in metrics.items()}
        for i, file in enumerate(self._files):
            values = {name: float(value[i]) for name, value in metrics.items()}
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
            for name, value in values.items() if self._boards else ():
                self._boards[i].add_scalar(name, value, step)

    def progress(self, step, *, loss, images_per_second, waiting=None):
        """Moves the bar, or prints a plain line where there is no terminal.

        `waiting` is the share of time spent waiting for data, where that can be.
        """
        waits = {} if waiting is None else {"waiting": f"{waiting:.0%}"}
        if not self._files:
            return
        if not self._bar.disable:
            self._bar.set_postfix(loss=f"{loss:.4f}", **waits, refresh=False)
            self._bar.update(step * self._batch_size - self._bar.n)
        elif images_per_second and time.monotonic() - self._last_plain >= self._plain_seconds:
            self._last_plain = time.monotonic()
            left = (self._total_steps - step) * self._batch_size / images_per_second
            print(
                f"step {step}/{self._total_steps}, loss {loss:.4f}, "
                f"{images_per_second:,.0f} images/s, {duration(left)} left"
                + (f", {waits['waiting']} of the time waiting for data" if waits else ""),
                flush=True,
            )

    def say(self, text):
        """Prints a line."""
        if self._files:
            self._bar.write(text)
        sys.stdout.flush()

    def sync(self):
        """Makes what was written survive a crash of the machine."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self):
        """Closes the files and leaves the bar as it stands."""
        self._bar.close()
        for file in (*self._files, *self._boards):
            file.close()


def duration(seconds):
    """Seconds as a person says them: '42 s', '3 min', '1 h 20 min'."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
