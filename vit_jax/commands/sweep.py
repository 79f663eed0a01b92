"""vit-jax sweep: train a grid of runs and tabulate them.

    vit-jax sweep --config cifar10_vit_20ep --set optim.peak_lr=1e-3,3e-3 --workdir workdirs/sweep

Runs are compared by validation accuracy: the recipe needs a val_split, and no run of a sweep reads
the test split.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import queue
import subprocess
import sys

from vit_jax import config as config_lib
from vit_jax.errors import UserError, expand_home


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax sweep",
        description="Train every combination of the settings and print a table, best validation "
        "accuracy first. Rerun the same command to resume.",
        epilog="--config.FIELD=VALUE applies to every run, as in vit-jax train.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="RECIPE", help="name or path of the common recipe"
    )
    parser.add_argument(
        "--set", required=True, nargs="+", metavar="FIELD=V,V", help="a field and its values"
    )
    parser.add_argument("--workdir", required=True, help="directory of the sweep, one run each")
    parser.add_argument(
        "--one_at_a_time",
        action="store_true",
        help="ablation: change at most one field from its first value",
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="concurrent runs (default: one on a GPU, otherwise one per CPU core)",
    )
    args, overrides = parser.parse_known_args(argv)
    runs = grid(args.set, one_at_a_time=args.one_at_a_time)
    fields = [[*overrides, *(f"--config.{k}={v}" for k, v in run.items())] for run in runs]
    for run_fields in fields:  # before the first run starts
        _check(args.config, run_fields)
    folder = expand_home(args.workdir)
    workdirs = [folder / name for name in run_names(runs, one_at_a_time=args.one_at_a_time)]
    no_test = "--config.data.test_split="
    arguments = [["--config", args.config, *run_fields, no_test] for run_fields in fields]
    results = _train_all(workdirs, arguments, args.processes)
    lines = table(runs, results)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    failed = [w for w, result in zip(workdirs, results, strict=True) if result is None]
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: see {failed[0] / 'log.txt'}")


def grid(settings, *, one_at_a_time=False):
    """Returns every combination of the settings, in order, as {field: text}.

    ['a=1,2', 'b=x,y'] becomes [{'a': '1', 'b': 'x'}, {'a': '1', 'b': 'y'}, ...]. With
    `one_at_a_time`, only combinations that change at most one field from its first value are
    returned. A value in brackets keeps its commas, as in
    data.mean=(0.5,0.5,0.5),(0.4,0.4,0.4). Raises UserError for any other text.
    """
    axes = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not text:
            raise UserError(f"--set {setting}: use FIELD=VALUE,VALUE,...")
        axes[name] = _split_at_commas(text)
    runs = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if one_at_a_time:
        runs = [run for run in runs if sum(run[k] != axes[k][0] for k in axes) <= 1]
    return runs


def _split_at_commas(text):
    """Returns the parts of a text between the commas that are not in brackets."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return values


def _check(recipe, fields):
    """Raises UserError if a run's config is invalid or has no validation split."""
    config = config_lib.from_file(recipe)
    flags = "--config, --set, --workdir, --one_at_a_time, --processes"
    config_lib.override(config, fields, flags)
    if not config.data.val_split:
        raise UserError(
            f"{recipe} has no validation split to compare the runs by: add "
            "--config.data.train_split='train[:90%]' --config.data.val_split='train[90%:]'"
        )


def run_names(runs, *, one_at_a_time=False):
    """Returns the name of each run's directory: its settings.

    With `one_at_a_time`, a name has only the setting that differs from the first run's.
    """
    names = []
    for run in runs:
        shown = {k: v for k, v in run.items() if not one_at_a_time or v != runs[0][k]}
        names.append(",".join(f"{k}={v}" for k, v in shown.items()).replace("/", "_") or "base")
    return names


def _train_all(workdirs, arguments, processes):
    """Trains the runs in child processes. Returns the content of each result.json, or None."""
    gpu, cores = _has_accelerator(), sorted(os.sched_getaffinity(0))
    processes = max(1, min(processes or (1 if gpu else len(cores)), len(workdirs)))
    environment = dict(os.environ)
    if gpu and processes > 1:  # by default, JAX reserves 75% of a GPU's memory for one process
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Each concurrent run gets its own share of the cores; otherwise each would use all of them.
    shares = queue.SimpleQueue()
    for i in range(processes):
        shares.put(cores[i::processes] or cores)

    def start(i):
        print(f"[{i + 1}/{len(workdirs)}] {workdirs[i].name}", flush=True)
        share = shares.get()
        try:
            return _train(workdirs[i], arguments[i], environment, None if gpu else share)
        finally:
            shares.put(share)

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        return list(pool.map(start, range(len(workdirs))))


def _has_accelerator():
    """Returns whether JAX's default backend is not the CPU.

    Runs in a child process, which frees the accelerator's memory when it exits.
    """
    code = "import jax; print(jax.default_backend())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return child.stdout.strip() != "cpu"


def _train(workdir, arguments, environment, cores):
    """Trains one run, its output in log.txt. Returns the content of result.json, or None.

    `cores` are the CPU cores to run on, or None for all.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if cores is not None:
        os.sched_setaffinity(0, cores)  # of this thread; the child process inherits it
    command = [sys.executable, "-m", "vit_jax.main", "--workdir", str(workdir), *arguments]
    with open(workdir / "log.txt", "a") as log:
        child = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    # A run that rejected its workdir found another config's result there.
    return None if child.returncode else json.loads((workdir / "result.json").read_text())


def table(runs, results):
    """Returns the lines of the sweep's table: best validation accuracy first, failed runs last."""
    ranked = sorted(
        zip(runs, results, strict=True), key=lambda x: -x[1]["val_accuracy"] if x[1] else 1
    )
    rows = [run | _columns(result) for run, result in ranked]
    widths = {k: max(len(k), *(len(row[k]) for row in rows)) for k in rows[0]}
    lines = [[k.ljust(w) for k, w in widths.items()], ["-" * w for w in widths.values()]]
    lines += [[row[k].ljust(w) for k, w in widths.items()] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _columns(result):
    """Returns {column: text} of a result.json's content, or of a run without one."""
    if result is None:
        return {"val_accuracy": "failed", "val_loss": "", "train_loss": "", "images/s": ""}
    accuracy, std = result["val_accuracy"], result.get("val_accuracy_std")
    return {
        "val_accuracy": f"{accuracy:.2%}" + (f" +- {100 * std:.2f}" if std is not None else ""),
        "val_loss": f"{result['val_loss']:.4f}",
        "train_loss": f"{result['train_loss']:.4f}",
        "images/s": f"{result['images_per_second'] or 0:,.0f}",
    }
