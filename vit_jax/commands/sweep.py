"""A grid of runs and one table: python -m vit_jax.sweep --config F --set optim.peak_lr=1e-3,3e-3.

Runs are chosen between by validation accuracy: the recipe needs a val_split, and no run of a sweep
reads the test split.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import queue
import subprocess
import sys

from vit_jax import config as config_lib
from vit_jax.errors import UserError, run_command


def grid(settings, *, one_at_a_time=False):
    """['a=1,2', 'b=x,y'] -> [{'a': '1', 'b': 'x'}, ...]: every combination, in order.

    With `one_at_a_time` only those that change at most one field from its first value: an ablation.
    A value in brackets keeps its commas: data.mean=(0.5,0.5,0.5),(0.4,0.4,0.4).
    """
    axes = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not text:
            raise UserError(f"--set takes FIELD=VALUE,VALUE,..., got {setting!r}")
        values, depth = [""], 0
        for character in text:
            depth += (character in "([") - (character in ")]")
            if character == "," and depth == 0:
                values.append("")
            else:
                values[-1] += character
        axes[name] = values
    runs = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if one_at_a_time:
        runs = [run for run in runs if sum(run[k] != axes[k][0] for k in axes) <= 1]
    return runs


def table(runs, results):
    """The sweep's lines, best validation accuracy first; runs without a result last."""
    rows = []
    for run, result in zip(runs, results, strict=True):
        row = {**run, "val_accuracy": "failed", "val_loss": "", "train_loss": "", "images/s": ""}
        if result:
            spread = result.get("val_accuracy_std")
            row["val_accuracy"] = f"{100 * result['val_accuracy']:.2f}%"
            row["val_accuracy"] += f" +- {100 * spread:.2f}" if spread is not None else ""
            row["val_loss"] = f"{result['val_loss']:.4f}"
            row["train_loss"] = f"{result['train_loss']:.4f}"
            row["images/s"] = f"{result['images_per_second'] or 0:,.0f}"
        rows.append((-result["val_accuracy"] if result else 1, list(row.items())))
    rows = [dict(row) for _, row in sorted(rows, key=lambda r: r[0])]
    widths = {k: max(len(k), *(len(r[k]) for r in rows)) for k in rows[0]}
    lines = [[k.ljust(w) for k, w in widths.items()], ["-" * w for w in widths.values()]]
    lines += [[r[k].ljust(w) for k, w in widths.items()] for r in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def main():
    """Runs every combination of the settings, continuing where an earlier call stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.sweep",
        description=main.__doc__,
        epilog="--config.FIELD=VALUE holds for every run, as in vit_jax.main.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, help="the recipe all runs start from, a name or a file"
    )
    parser.add_argument("--set", required=True, nargs="+", metavar="FIELD=V,V", help="an axis")
    parser.add_argument("--workdir", required=True, help="one folder a run in it")
    parser.add_argument(
        "--one_at_a_time", action="store_true", help="an ablation: change one field from the first"
    )
    parser.add_argument(
        "--processes", type=int, help="runs at once; default: one on a GPU, one a CPU core else"
    )
    args, rest = parser.parse_known_args()
    args.workdir = pathlib.Path(os.path.expanduser(args.workdir))
    runs = grid(args.set, one_at_a_time=args.one_at_a_time)

    # Every run is checked before the first starts.
    commands = []
    for run in runs:
        config = config_lib.from_file(args.config)
        for argument in rest:
            name, equals, value = argument.partition("=")
            if not name.startswith("--config.") or not equals:
                raise UserError(f"unknown argument {argument}: use --config.FIELD=VALUE")
            config_lib.set_field(config, name.removeprefix("--config."), value)
        for name, value in run.items():
            config_lib.set_field(config, name, value)
        if not config.data.val_split:
            raise UserError(
                f"{args.config} holds nothing out to choose by: add "
                "--config.data.train_split='train[:90%]' --config.data.val_split='train[90%:]'"
            )
        config.data.test_split = ""
        config_lib.validate(config)
        # The fields that tell the runs apart; in an ablation, the one that changed.
        told = {k: v for k, v in run.items() if not args.one_at_a_time or v != runs[0][k]}
        name = ",".join(f"{k}={v}" for k, v in told.items()).replace("/", "_") or "base"
        overrides = [f"--config.{k}={v}" for k, v in {**run, "data.test_split": ""}.items()]
        workdir = args.workdir / name
        commands.append((workdir, ["--workdir", str(workdir), *rest, *overrides]))

    # Asked in a process of its own, which gives the accelerator's memory back.
    code = "import jax; print(jax.default_backend())"
    backend = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    gpu = backend.strip() != "cpu"
    cores = sorted(os.sched_getaffinity(0))
    processes = max(1, min(args.processes or (1 if gpu else len(cores)), len(runs)))
    environment = dict(os.environ)
    if gpu and processes > 1:  # by default JAX reserves 75% of a GPU's memory for one process
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Runs side by side share the cores out: each would otherwise take them all.
    shares = queue.SimpleQueue()
    for i in range(processes):
        shares.put(cores[i::processes] or cores)

    def start(i):
        workdir, arguments = commands[i]
        workdir.mkdir(parents=True, exist_ok=True)
        share = shares.get()
        print(f"[{i + 1}/{len(runs)}] {workdir.name}", flush=True)
        if not gpu:
            os.sched_setaffinity(0, share)  # of this thread; the process it starts inherits it
        try:
            with open(workdir / "log.txt", "a") as log:
                ended = subprocess.run(
                    [sys.executable, "-m", "vit_jax.main", "--config", args.config, *arguments],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
        finally:
            shares.put(share)
        # One that refused its workdir found the result of another config there.
        return None if ended.returncode else json.loads((workdir / "result.json").read_text())

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        results = list(pool.map(start, range(len(runs))))
    lines = table(runs, results)
    (args.workdir / "table.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    failed = [c[0] for c, result in zip(commands, results, strict=True) if not result]
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed; see {failed[0] / 'log.txt'}")


if __name__ == "__main__":
    run_command(main)
