"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases, the terminal; throughput, MFU."""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
import uuid

import jax
import numpy as np
import tqdm

from vit_jax.errors import UserError


def write_json(path, value):
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves is written over
    with open(temporary, "w") as f:
        f.write(value if isinstance(value, str) else json.dumps(value, indent=2))
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_lines(path):
    """(text, values) of each line of a metrics.jsonl, but for what a kill cut off.

    Raises OSError, and ValueError where it is no text.
    """
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield line, values


def keep_lines_until(path, step):
    """Drops the lines of a metrics.jsonl later than `step`: the run goes on from there.

    Dropped too are the lines of the final test, which follows the last checkpoint, and a last
    line cut off by a kill. Raises UserError where the file is no text.
    """
    if not path.exists():
        return
    try:
        lines = list(read_lines(path))
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}): mend it or remove it") from e
    kept = [
        line for line, values in lines if values["step"] <= step and "test/accuracy" not in values
    ]
    write_json(path, "\n".join(kept)) if kept else path.unlink()


def commit_of(path):
    """The commit of the repository that tracks a file, with -dirty if it has changes; else None.

    A package installed inside another repository, in an environment that it ignores, has none.
    """

    def git(*arguments):
        command = ["git", *arguments]
        return subprocess.run(command, cwd=path.parent, capture_output=True, text=True)

    with contextlib.suppress(OSError):  # git is not installed
        if git("ls-files", "--error-unmatch", path.name).returncode == 0:
            described = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
            return described.stdout.strip() or None
    return None


def environment(command):
    """What a run ran on: command, date, versions, commit and devices, for run.json."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit_of(pathlib.Path(__file__)),
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

    Always metrics.jsonl; TensorBoard events with `tensorboard`; Weights & Biases with `wandb`, the
    name of a project. `fields` is {dotted name: value} of each replica's config. A terminal has a
    live bar; elsewhere a line is printed every `plain_seconds` at most. `say` prints a line
    without tearing the bar. Without workdirs it is silent: of several processes one tells.
    """

    def __init__(
        self,
        workdirs,
        *,
        step,
        total_steps,
        steps_per_epoch,
        batch_size,
        fields=(),
        tensorboard=False,
        wandb="",
        plain_seconds=30,
    ):
        self._paths = [workdir / "metrics.jsonl" for workdir in workdirs]
        for path in self._paths:
            keep_lines_until(path, step)
        self._files = [open(path, "ab", buffering=0) for path in self._paths]
        self._pending = [b""] * len(self._files)  # what a full disk did not take
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
        self._batch_size = batch_size
        self._boards, self._wandb_runs = [], []
        if tensorboard:
            from tensorboardX import SummaryWriter  # slow to import: only where it is used

            self._boards = [SummaryWriter(str(w), purge_step=step + 1) for w in workdirs]
        if wandb:
            of_each = zip(workdirs, fields, strict=True)
            self._wandb_runs = [_start_wandb(wandb, *each) for each in of_each]
        for board, config in zip(self._boards, fields, strict=False):
            _describe(board, config)
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=step,
            bar_format="{percentage:3.0f}%|{bar:10}| {desc}",
            dynamic_ncols=True,
            disable=not workdirs or not sys.stderr.isatty(),
        )
        self._plain_seconds, self._last_plain = plain_seconds, time.monotonic()

    def write(self, step, metrics):
        """One line of each metrics.jsonl: {"step": step, name: float, ...}.

        A value is one number for all replicas, or one a replica; JSON has no NaN and no infinity,
        which are left out. What the disk does not take is kept for the next line, and for `sync`.
        """
        if not self._files:
            return
        metrics = {k: np.broadcast_to(v, len(self._files)) for k, v in metrics.items()}
        for i, file in enumerate(self._files):
            values = {name: float(v[i]) for name, v in metrics.items() if math.isfinite(v[i])}
            self._pending[i] += (json.dumps({"step": step, **values}) + "\n").encode()
            with contextlib.suppress(OSError):
                self._flush(i, file)
            for name, value in values.items() if self._boards else ():
                self._boards[i].add_scalar(name, value, step)
            if self._wandb_runs:
                self._wandb_runs[i].log(values, step=step)

    def _flush(self, i, file):
        while self._pending[i]:
            self._pending[i] = self._pending[i][file.write(self._pending[i]) :]

    def images(self, step, name, images):
        """Pictures for TensorBoard: uint8[replicas, N, H, W, C], each batch as one mosaic."""
        for board, batch in zip(self._boards, images, strict=False):
            columns = math.ceil(len(batch) ** 0.5)
            rows = math.ceil(len(batch) / columns)
            H, W, C = batch.shape[1:]
            page = np.zeros((rows * columns, H, W, C), np.uint8)
            page[: len(batch)] = batch
            page = page.reshape(rows, columns, H, W, C).swapaxes(1, 2)
            board.add_image(name, page.reshape(rows * H, columns * W, C), step, dataformats="HWC")

    def histograms(self, step, params):
        """The distribution of each parameter for TensorBoard; their arrays lead with [replicas]."""
        for path, values in jax.tree_util.tree_leaves_with_path(params):
            name = "params/" + "/".join(part.key for part in path)
            for board, value in zip(self._boards, values, strict=False):
                if np.isfinite(value).all():
                    board.add_histogram(name, np.asarray(value, np.float32), step)

    def move(self, step):
        """Moves the bar, which then has the newest text."""
        self._bar.update(step - self._bar.n)

    def progress(self, step, metrics):
        """Tells the terminal how the run does; `metrics` as in `write`."""
        if not self._files or (rate := metrics["time/images_per_second"]) <= 0:
            return
        means = {name: float(np.mean(value)) for name, value in metrics.items()}
        images = (self._total_steps - step) * self._batch_size * len(self._files)
        epochs = [math.ceil(n / self._steps_per_epoch) for n in (step, self._total_steps)]
        line = (
            f"epoch {epochs[0]}/{epochs[1]}, step {step}/{self._total_steps}, "
            f"loss {means['train/loss']:.4f}, accuracy {means['train/accuracy']:.1%}, "
            f"lr {means['train/lr']:.3g}, {rate:,.0f} images/s"
        )
        if "time/mfu" in means:
            line += f", MFU {means['time/mfu']:.0%}"
        if "time/waiting_for_data" in means:
            line += f", {means['time/waiting_for_data']:.0%} of the time waiting for data"
        line += f", {peak_memory() / 1e9:.1f} GB, {duration(images / rate)} left"
        if not self._bar.disable:
            self._bar.set_description_str(line)
        elif time.monotonic() - self._last_plain >= self._plain_seconds:
            self._last_plain = time.monotonic()
            print(line, flush=True)

    def say(self, text):
        """Prints a line."""
        if self._files:
            self._bar.write(text)
        sys.stdout.flush()

    def sync(self):
        """Makes what was written survive a crash of the machine.

        Raises UserError where the disk does not take it, or the file is no longer there.
        """
        for i, (path, file) in enumerate(zip(self._paths, self._files, strict=True)):
            try:
                self._flush(i, file)
                os.fsync(file.fileno())
                if not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    raise FileNotFoundError(errno.ENOENT, "another file has taken its place")
            except OSError as e:
                raise UserError(f"cannot write {path}: {e.strerror}") from e

    def close(self):
        """Closes the files and leaves the bar as it stands. Raises as `sync` does."""
        self._bar.close()
        self.sync()
        for file in (*self._files, *self._boards):
            file.close()
        for run in self._wandb_runs:
            run.finish()


def peak_memory():
    """The most bytes in use so far: of the first device, or of this process where it is the CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return (
        stats.get("peak_bytes_in_use") or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


def _describe(board, fields):
    """The config into TensorBoard: as a text, and as hparams to compare runs by."""
    from tensorboardX.summary import hparams

    rows = [f"| {name} | {value!r} |" for name, value in fields.items()]
    board.add_text("config", "\n".join(["| field | value |", "| --- | --- |", *rows]))
    kinds = (bool, int, float, str)
    values = {k: v if isinstance(v, kinds) else str(v) for k, v in fields.items()}
    results = dict.fromkeys(("train/loss", "val/accuracy", "test/accuracy"), 0)
    for summary in hparams(values, results):  # what results are is read from the scalars
        board.file_writer.add_summary(summary)


def import_wandb():
    """The wandb module. Raises UserError where it is missing."""
    try:
        import wandb
    except ImportError as e:
        raise UserError("config.wandb needs Weights & Biases: pip install 'vit-jax[wandb]'") from e
    return wandb


def _start_wandb(project, workdir, fields):
    """A Weights & Biases run that a continued training goes on with; offline by WANDB_MODE."""
    wandb = import_wandb()
    identity = workdir / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex)
    try:
        return wandb.init(
            project=project,
            dir=workdir,
            id=identity.read_text(),
            name=workdir.name,
            config=fields,
            resume="allow",
            reinit="create_new",
        )
    except wandb.errors.Error as e:
        raise UserError(
            f"Weights & Biases does not start: {e}; log in, or set WANDB_MODE=offline"
        ) from e


def duration(seconds):
    """Seconds as a person says them: '42 s', '3 min', '1 h 20 min'."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
