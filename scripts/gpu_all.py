"""Everything that waits for a GPU, in order: python scripts/gpu_all.py --out OUT [--only NAME...].

Tells the expected time first. Each item is a run of the ordinary command into OUT/NAME, so that an
interrupted call goes on where it stopped; at the end the rows for docs/results.md are printed from
the runs' result.json and run.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# name, recipe, extra flags, training GFLOP an image times images (in PFLOP, all seeds)
RUNS = (
    ("one_epoch", "cifar10_vit", ("--config.epochs=1",), 0.1),
    ("notebook", "cifar10_vit", (), 1.9),
    ("improved", "cifar10_vit_improved", (), 4.8),
    ("20ep", "cifar10_vit_20ep", ("--config.num_seeds=3",), 10.0),
    ("100ep", "cifar10_vit_100ep", ("--config.num_seeds=3",), 50.0),
    ("300ep", "cifar10_vit_300ep", ("--config.num_seeds=3",), 150.0),
)


def row(name, folder):
    """One line of the results table, or that the run is not complete."""
    try:
        result = json.loads((folder / "result.json").read_text())
        run = json.loads((folder / "run.json").read_text())
    except FileNotFoundError:
        return f"| {name} | not yet measured | | | | |"
    accuracy = f"{100 * result['test_accuracy']:.2f}"
    if "test_accuracy_std" in result:
        accuracy += f" +- {100 * result['test_accuracy_std']:.2f} ({len(result['seed'])} seeds)"
    minutes, rate = result["seconds"] / 60, result["images_per_second"] or 0
    commit = (run["commit"] or "")[:10]
    return (
        f"| `{run['command']}` | {accuracy} | {result['train_loss']:.4f} | {minutes:.1f} | "
        f"{rate:,.0f} | {result['device']}, jax {run['versions']['jax']}, {commit}, "
        f"{run['date'][:10]} |"
    )


def main():
    """Runs what is not yet complete, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[r[0] for r in RUNS], default=None)
    parser.add_argument("--tflops", type=float, default=150.0, help="expected rate, for the time")
    parser.add_argument("--steps", type=int, default=0, help="bounds every run: for a rehearsal")
    args = parser.parse_args()
    chosen = [r for r in RUNS if args.only is None or r[0] in args.only]
    for name, _, _, petaflop in chosen:
        minutes = petaflop * 1000 / args.tflops / 60
        print(f"{name}: about {minutes:.1f} min at {args.tflops:g} TFLOP/s")
    for name, recipe, flags, _ in chosen:
        command = [sys.executable, "-m", "vit_jax.main", "--config", f"configs/{recipe}.py"]
        command += ["--workdir", str(args.out.absolute() / name), *flags]
        command += [f"--config.steps={args.steps}"] * bool(args.steps)
        code = subprocess.run(command, cwd=ROOT).returncode
        if code:
            print(f"{name} ended with code {code}; the others go on", file=sys.stderr)
    print("| command | test accuracy, % | train loss | minutes | images/s | where |")
    print("|---|---|---|---|---|---|")
    for name, *_ in chosen:
        print(row(name, args.out / name))


if __name__ == "__main__":
    main()
