"""Train a grid of runs and tabulate them.

    vit-jax sweep --config cifar10_vit_20ep --set optim.peak_lr=1e-3,3e-3 --workdir workdirs/sweep

Runs are compared by validation accuracy, and no run of a sweep reads the test split.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys

from vit_jax import config as config_lib
from vit_jax.errors import UserError, expand_home


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax sweep",
        description="Train every combination of the settings, one run after the other, and print "
        "a table, best validation accuracy first. Rerun the same command to resume.",
        epilog="--config.FIELD=VALUE applies to every run, as in vit-jax train.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="name or path")
    parser.add_argument(
        "--set", required=True, nargs="+", metavar="FIELD=V,V", help="a field and its values"
    )
    parser.add_argument("--workdir", required=True, help="directory of the sweep, one run each")
    args, overrides = parser.parse_known_args(argv)
    folder, runs, results = expand_home(args.workdir), grid(args.set), []
    names = [",".join(f"{k}={v}" for k, v in run.items()).replace("/", "_") for run in runs]
    fields = [[*overrides, *(f"--config.{k}={v}" for k, v in run.items())] for run in runs]
    for run_fields in fields:  # before the first run starts
        _check(args.config, run_fields)
    for i, name in enumerate(names):
        print(f"[{i + 1}/{len(runs)}] {name}", flush=True)
        results.append(_train(folder / name, ["--config", args.config, *fields[i]]))
    lines = table(runs, results)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    if num_failed := results.count(None):
        log = folder / names[results.index(None)] / "log.txt"
        raise UserError(f"{num_failed} of {len(runs)} runs failed: see {log}")


def grid(settings):
    """Returns every combination of the settings, in order, as {field: text}.

    ['a=1,2', 'b=x,y'] becomes [{'a': '1', 'b': 'x'}, {'a': '1', 'b': 'y'}, ...].
    A value in parentheses keeps its commas, as in data.mean=(0.5,0.5,0.5),(0.4,0.4,0.4).
    """
    axes = {}
    for setting in settings:
        field, _, text = setting.partition("=")
        if not text:
            raise UserError(f"--set {setting}: use FIELD=VALUE,VALUE,...")
        axes[field] = re.split(r",(?![^(]*\))", text)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _check(recipe, fields):
    """Raises UserError if a run's config is invalid or has no validation split."""
    config = config_lib.from_file(recipe)
    config_lib.override(config, fields, "--config, --set, --workdir")
    if not config.data.val_split:
        raise UserError(
            f"{recipe} has no validation split to compare the runs by: add "
            "--config.data.train_split='train[:90%]' --config.data.val_split='train[90%:]'"
        )


def _train(workdir, arguments):
    """Trains one run, its output in log.txt. Returns the content of result.json, or None."""
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "vit_jax.main", "--workdir", str(workdir), *arguments]
    command += ["--config.data.test_split="]
    with open(workdir / "log.txt", "a") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            failed = child.wait()
        except KeyboardInterrupt:
            child.wait()  # Ctrl-C reaches the run too, which saves a checkpoint before it exits
            raise
    # A run that rejected its workdir found another config's result there.
    return None if failed else json.loads((workdir / "result.json").read_text())


def table(runs, results):
    """Returns the lines of the sweep's table: best validation accuracy first, failed runs last."""
    ranked = sorted(
        zip(runs, results, strict=True), key=lambda x: -x[1]["val_accuracy"] if x[1] else 1
    )
    rows = [[*runs[0], "val_accuracy", "val_loss", "train_loss", "images/s"]]
    rows += [[*run.values(), *_columns(result)] for run, result in ranked]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]


def _columns(result):
    if result is None:
        return "failed", "", "", ""
    accuracy, std = f"{result['val_accuracy']:.2%}", result.get("val_accuracy_std")
    return (
        accuracy if std is None else f"{accuracy} +- {100 * std:.2f}",
        f"{result['val_loss']:.4f}",
        f"{result['train_loss']:.4f}",
        f"{result['images_per_second'] or 0:,.0f}",
    )
