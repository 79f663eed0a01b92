"""Searches the values of a recipe's fields with Optuna, and tabulates and plots the runs.

    vit-jax sweep --config cifar10_vit_20ep --set optim.peak_lr=1e-3,3e-3 --workdir workdirs/sweep

Runs are compared by validation accuracy, and no run of a sweep reads the test split. The study is
WORKDIR/study.db, which several processes may share, each on its own device.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import re
import signal
import subprocess
import sys
import warnings

import numpy as np

from vit_jax import config as config_lib
from vit_jax.errors import UserError, expand_home
from vit_jax.workdir import read_lines, write_errors

try:
    import matplotlib
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState
except ImportError as e:
    raise UserError("the sweep needs Optuna: pip install 'vit-jax[sweep]'") from e


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax sweep",
        description="Train a recipe with several values of its fields, and print a table, best "
        "validation accuracy first. Rerun the same command to resume. Start it in several "
        "processes, each with its own CUDA_VISIBLE_DEVICES, to train runs in parallel.",
        epilog="--config.FIELD=VALUE applies to every run, as in vit-jax train.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="name or path")
    parser.add_argument(
        "--set",
        required=True,
        nargs="+",
        action="extend",
        metavar="FIELD=V,V",
        help="a field and its values; for tpe also FIELD=LOW..HIGH, on a logarithmic scale if LOW "
        "is above 0",
    )
    parser.add_argument(
        "--search",
        choices=["grid", "one", "tpe"],
        default="grid",
        help="grid: every combination; one: the recipe, then one changed field per run; tpe: runs "
        "chosen by Optuna's TPESampler, pruned by its MedianPruner every config.eval_every",
    )
    parser.add_argument("--runs", type=int, default=0, help="number of runs, for tpe")
    parser.add_argument("--workdir", required=True, help="directory; each run gets a subdirectory")
    args, overrides = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sweep = Sweep(args, overrides)
    while run := sweep.next_run():
        sweep.train(*run)
    sweep.finish()


class Sweep:
    """A study, and the runs of its trials, each in WORKDIR/FIELD=VALUE,FIELD=VALUE."""

    def __init__(self, args, overrides):
        self.folder, self.recipe, self.overrides = expand_home(args.workdir), args.config, overrides
        self.prune, self.runs = args.search == "tpe", args.runs
        if self.prune != (self.runs > 0):
            raise UserError("--search tpe needs --runs N; the other searches do not take --runs")
        self.space = parse_settings(args.set, ranges=self.prune)
        if args.search == "one":  # a single parameter: the one change, or none
            single = [f"{field}={v}" for field, d in self.space.items() for v in d.choices]
            self.space = {"change": CategoricalDistribution(["", *single])}
        if self.prune:  # each choice, and both ends of a range
            points, checked = [], [{f: v} for f, d in self.space.items() for v in _extremes(d)]
        else:
            checked = points = grid({f: d.choices for f, d in self.space.items()})
        for point in checked:  # before the first run starts
            self._check(self._fields(point))
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "study.lock"):
            self.study = self._open([args.search, args.config, *args.set, *overrides], points)

    def _fields(self, params):
        """Returns the command-line arguments that set the fields of a run."""
        return [*self.overrides, *(f"--config.{change}" for change in changes(params))]

    def _name(self, params):
        # A workdir's path must not contain *, ?, or [, as in train[:80%].
        name = re.sub(r"[/*?[]", "_", ",".join(changes(params))) or "recipe"
        if len(name.encode()) > 200:  # a file system allows 255 bytes
            digest = hashlib.sha256(name.encode()).hexdigest()[:12]
            name = f"{name.encode()[:180].decode(errors='ignore')}-{digest}"
        return name

    def _check(self, fields):
        """Raises UserError if a run's config is invalid or has no validation split."""
        config = config_lib.from_file(self.recipe)
        config_lib.override(config, fields, "--config, --set, --search, --runs, --workdir")
        if not config.data.val_split:
            raise UserError(
                f"{self.recipe} has no validation split to compare the runs on: add "
                "--config.data.train_split='train[:90%]' --config.data.val_split='train[90%:]'"
            )

    def _open(self, settings, points):
        """Opens or creates the study, and requeues runs that failed or whose process has ended."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            storage=f"sqlite:///{self.folder.absolute() / 'study.db'}",
            study_name="sweep",
            direction="maximize",
            sampler=optuna.samplers.TPESampler(constant_liar=True),
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
        if (saved := study.user_attrs.get("settings", settings)) != settings:
            raise UserError(
                f"{self.folder} contains another sweep ({' '.join(saved)}): use another --workdir"
            )
        if "settings" not in study.user_attrs:
            for point in points:
                study.enqueue_trial(point)
            study.set_user_attr("settings", settings)
        waiting = study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        queued = {self._name(_point(t)) for t in waiting}
        for name, trial in self._runs(study).items():
            ended = trial.state == TrialState.RUNNING and not _is_locked(self.folder / name)
            if ended:
                study.tell(trial.number, state=TrialState.FAIL)
            if (ended or trial.state == TrialState.FAIL) and name not in queued:
                study.enqueue_trial(_point(trial), user_attrs={"repeats": trial.number})
        return study

    def _runs(self, study):
        """Returns {name: latest trial} of the runs that have started."""
        started = (t for t in self._trials(study) if t.state != TrialState.WAITING)
        return {self._name(_point(t)): t for t in started}

    def _trials(self, study):
        """Returns the trials that have all values: not one whose process was killed in `ask`."""
        trials = study.get_trials(deepcopy=False)
        return [t for t in trials if self.space.keys() <= _point(t).keys()]

    def next_run(self):
        """Returns the next trial and its lock file, or None after the last trial.

        The lock is taken before another process can see the trial; see `_open`.
        """
        with _locked(self.folder / "study.lock"):
            trials = self._trials(self.study)
            waiting = any(t.state == TrialState.WAITING for t in trials)
            if waiting or sum("repeats" not in t.user_attrs for t in trials) < self.runs:
                trial = self.study.ask(self.space)
                folder = self.folder / self._name(trial.params)
                folder.mkdir(exist_ok=True)
                lock = open(folder / "sweep.lock", "w")
                with contextlib.suppress(BlockingIOError):  # a second trial of the same run
                    _lock(lock, fcntl.LOCK_NB)
                return trial, lock

    def train(self, trial, lock):
        """Trains the run of a trial, its output in log.txt, and stores its validation accuracy."""
        name = self._name(trial.params)
        folder = self.folder / name
        print(f"[{len(self._runs(self.study))}] {name}", flush=True)
        command = [sys.executable, "-m", "vit_jax.main", "--workdir", str(folder)]
        command += ["--config", self.recipe, *self._fields(trial.params)]
        command += ["--config.data.test_split="]
        with lock, open(folder / "log.txt", "a") as log:
            _lock(lock)
            # The run holds the lock too, in case it outlives this process.
            child = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()]
            )
            try:
                pruned = self._wait(trial, child, folder)
            except KeyboardInterrupt:
                child.wait()  # Ctrl-C reaches the run too, which saves a checkpoint before it exits
                raise
            except SystemExit:  # SIGTERM reaches only this process
                child.terminate()
                child.wait()
                raise
            if pruned:
                self.study.tell(trial, state=TrialState.PRUNED)
            elif child.returncode:  # a result.json may then belong to another config
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                result = json.loads((folder / "result.json").read_text())
                self.study.tell(trial, result["val_accuracy"])

    def _wait(self, trial, child, folder):
        """Waits for a run, and returns whether the pruner has stopped it."""
        reported = 0
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1)
            for step, accuracy in validations(folder).items():
                if step > reported:
                    trial.report(accuracy, step)
                    reported = step
            if self.prune and child.poll() is None and trial.should_prune():
                child.terminate()
                child.wait()
                return True
        return False

    def finish(self):
        """Prints and writes the table, and draws study.png. Raises UserError if a run failed."""
        runs = self._runs(self.study)
        lines = table(list(self.space), [(t, self.folder / name) for name, t in runs.items()])
        (self.folder / "table.md").write_text("\n".join(lines) + "\n")
        print(*lines, sep="\n")
        draw(self.study, self.folder / "study.png")
        if failed := [name for name, t in runs.items() if t.state == TrialState.FAIL]:
            log = self.folder / failed[0] / "log.txt"
            raise UserError(f"{len(failed)} of {len(runs)} runs failed: see {log}")


def parse_settings(settings, *, ranges):
    """Returns {field: distribution} of FIELD=VALUE,VALUE and, if `ranges`, of FIELD=LOW..HIGH.

    A value in parentheses keeps its commas, as in data.mean=(0.5,0.5,0.5),(0.4,0.4,0.4).
    """
    space = {}
    for setting in settings:
        field, _, text = setting.partition("=")
        if field in space:
            raise UserError(f"--set {setting}: {field} is set twice")
        known = config_lib.FIELDS.get(field)
        is_int = known is not None and type(known.default) is int
        bounds = re.fullmatch(r"([-+.\de]+?)\.\.([-+.\de]+)", text)
        try:
            if bounds and ranges:
                low, high = map(int if is_int else float, bounds.groups())
                distribution = IntDistribution if is_int else FloatDistribution
                space[field] = distribution(low, high, log=low > 0)
            elif text and not bounds:
                values = dict.fromkeys(re.split(r",(?![^(]*\))", text))
                space[field] = CategoricalDistribution(list(values))
        except ValueError as e:
            raise UserError(f"--set {setting}: {e}") from e
        if field not in space:
            more = " or FIELD=LOW..HIGH" if ranges else "; a range needs --search tpe"
            raise UserError(f"--set {setting}: use FIELD=VALUE,VALUE,...{more}")
    return space


def grid(choices):
    """Returns every combination of {field: values}, in order, as {field: value}."""
    return [dict(zip(choices, v, strict=True)) for v in itertools.product(*choices.values())]


def _extremes(distribution):
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return distribution.low, distribution.high


def _point(trial):
    """Returns {field: value}. `params` lacks values if a process was killed in `study.ask`."""
    return trial.system_attrs.get("fixed_params", trial.params)


def texts(params):
    """Returns {field: text} of a trial's {field: text or number}."""
    return {f: f"{v:.6g}" if isinstance(v, float) else str(v) for f, v in params.items()}


def changes(params):
    """Returns the FIELD=VALUE texts of a trial."""
    settings = [v if f == "change" else f"{f}={v}" for f, v in texts(params).items()]
    return [setting for setting in settings if setting]


def validations(folder):
    """Returns {step: validation accuracy, the mean over seeds} that a run has written so far."""
    files = [*folder.glob("seed_*/metrics.jsonl")] or [*folder.glob("metrics.jsonl")]
    lines = [[v for _, v in read_lines(file) if "val/accuracy" in v] for file in files]
    seeds = [{v["step"]: v["val/accuracy"] for v in seed} for seed in lines]
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    return {step: float(np.mean([seed[step] for seed in seeds])) for step in steps}


def table(fields, runs):
    """Returns the lines of a table of (trial, its folder): best validation accuracy first."""
    rows = sorted(runs, key=lambda run: (run[0].value is None, -(run[0].value or 0)))
    cells = [[*fields, "val_accuracy", "val_loss", "train_loss", "images/s"]]
    for trial, folder in rows:
        values = texts(_point(trial))
        cells.append([*(values.get(field, "") for field in fields), *_columns(trial, folder)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]


def _columns(trial, folder):
    if trial.state != TrialState.COMPLETE:
        text = {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
        for step, accuracy in sorted(trial.intermediate_values.items())[-1:]:
            text += f" at step {step:,}: {accuracy:.2%}"
        return text, "", "", ""
    if not (folder / "result.json").exists():  # the folder was deleted
        return f"{trial.value:.2%}", "", "", ""
    result = json.loads((folder / "result.json").read_text())
    std = result.get("val_accuracy_std")
    return (
        f"{trial.value:.2%}" + (f" +- {100 * std:.2f}" if std is not None else ""),
        f"{result['val_loss']:.4f}",
        f"{result['train_loss']:.4f}",
        f"{result['images_per_second'] or 0:,.0f}",
    )


def draw(study, path):
    """Draws validation accuracy against each field, as a PNG, once a run is complete."""
    if study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        matplotlib.use("agg")
        with warnings.catch_warnings(action="ignore"):  # Optuna calls plot_slice experimental
            axes = np.ravel(optuna.visualization.matplotlib.plot_slice(study))
        axes[0].set_ylabel("validation accuracy")
        axes[0].figure.savefig(path, dpi=150, bbox_inches="tight")


@contextlib.contextmanager
def _locked(path):
    with open(path, "w") as file:
        _lock(file)
        yield


def _lock(file, flags=0):
    """Locks an open file; does nothing on a file system that does not support locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
    except BlockingIOError:
        raise
    except OSError:
        pass


def _is_locked(folder):
    """Returns whether a sweep is training the run in a folder."""
    try:
        with open(folder / "sweep.lock", "r+") as file:
            _lock(file, fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False
