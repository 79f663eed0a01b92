"""Runs every measurement that needs a GPU, most important first.

    python scripts/gpu_all.py --out OUT [--minutes 28]

Prints the expected time first. Each item is an ordinary command whose output goes to
OUT/NAME/log.txt. An item that exceeds its own limit, or the script's --minutes, is stopped; a
training run then saves a checkpoint. Rerunning the script skips complete items and resumes an
interrupted run, so the GPU time may be spent in several parts. After each item, the rows for
docs/results.md and docs/performance.md are written to OUT/report.md. `--steps 1` rehearses
everything on any machine: a tiny model, one step per run. Without PyTorch, which launch.sh does not
install, the comparisons measure vit_jax alone. For a machine without network access,
scripts/gpu_pack.py packs the missing packages and the data.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

from vit_jax.workdir import read_lines, write_json

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = sys.executable

NOTEBOOK_LOSSES = ROOT / "docs" / "log" / "notebook_losses.csv"
NOTEBOOK_TEST = 63.68  # its test accuracy, in percent

HELD_OUT = ("--config.data.train_split=train[:45000]", "--config.data.val_split=train[45000:]")
TF32 = "--config.model.matmul_precision=tf32"
BF16 = ("--config.model.dtype=bfloat16", TF32)
PLAIN = ("crop=none", "flip=none", "policy=none", "erasing_prob=0", "mixup_alpha=0")
PLAIN = tuple(f"--config.augment.{x}" for x in (*PLAIN, "cutmix_alpha=0"))
TESTS = ("tests/test_step.py", "tests/test_model.py", "tests/test_optim.py", "tests/augment")
TESTS += ("tests/parity/test_notebook_golden.py", "tests/parity/test_notebook_torch.py")
TESTS += ("tests/test_fused_attention.py",)
RECIPES = ("20ep", "100ep", "300ep")
TINY = ("width=32", "depth=1", "mlp_dim=128", "patch_size=8", "num_heads=4")


def train(recipe, *flags):
    """Returns the command that trains a recipe in the item's folder."""
    return ("vit_jax", "train", "--config", f"configs/{recipe}.py", "--workdir", "{folder}", *flags)


def bench(recipe, *flags):
    """Returns the command that measures a recipe."""
    return ("vit_jax", "benchmark", "--config", f"configs/{recipe}.py", "--json", *flags)


def sweep(recipe, *settings):
    """Returns the command that trains a grid, validated on a held-out part of the training data."""
    config = ("--config", f"configs/{recipe}.py", "--workdir", "{folder}")
    return ("vit_jax", "sweep", *config, "--set", *settings, *HELD_OUT)


def script(name, *flags):
    """Returns the command that runs another script on the notebook's recipe."""
    return (f"scripts.{name}", "--config", "configs/cifar10_vit.py", *flags)


def batch(size):
    """Returns the overrides for bfloat16, TF32, and a batch size."""
    return (*BF16, f"--config.batch_size={size}")


AGAINST = ("--against", "torch")
PROFILE = ("--config.steps=30", "--profile_steps", "20-25", "--config.data.test_split=test[:1000]")
# name -> (minutes at 150 TFLOP/s, arguments of `python -m`), most important first.
ITEMS = {
    "tests": (3, ("pytest", "-q", *TESTS)),
    "one_epoch": (1, train("cifar10_vit", "--config.epochs=1")),
    "notebook": (1, train("cifar10_vit")),
    "bench_64": (2, bench("cifar10_vit", *AGAINST)),
    "bench_1024_bf16": (2, bench("cifar10_vit", *AGAINST, *batch(1024))),
    "profile_64": (1, train("cifar10_vit", *PROFILE)),
    "profile_1024_bf16": (1, train("cifar10_vit", *PROFILE, *batch(1024))),
    "20ep": (2, train("cifar10_vit_20ep", "--config.num_seeds=3")),
    "100ep": (6, train("cifar10_vit_100ep", "--config.num_seeds=3")),
    "300ep": (17, train("cifar10_vit_300ep", "--config.num_seeds=3")),
    "sweep_20ep": (
        8,
        sweep("cifar10_vit_20ep", "optim.name=muon,adamw", "optim.peak_lr=1e-3,2e-3"),
    ),
    "bench_64_tf32": (2, bench("cifar10_vit", *AGAINST, TF32)),
    "bench_64_bf16": (2, bench("cifar10_vit", *AGAINST, *BF16)),
    "bench_512_bf16": (2, bench("cifar10_vit", *AGAINST, *batch(512))),
    "lever_64": (3, script("gpu_levers")),
    "lever_1024_bf16": (3, script("gpu_levers", *batch(1024))),
    # Each changes one thing in bench_1024_bf16: 64 tokens, heads of 64, ...
    "bench_gap": (1, bench("cifar10_vit", *batch(1024), "--config.model.pool=gap")),
    "bench_heads": (1, bench("cifar10_vit", *batch(1024), "--config.model.num_heads=4")),
    "bench_float32": (1, bench("cifar10_vit", "--config.batch_size=1024")),
    "bench_tf32": (1, bench("cifar10_vit", "--config.batch_size=1024", TF32)),
    "bench_remat": (1, bench("cifar10_vit", *batch(1024), "--config.model.remat=true")),
    **{f"bench_b{b}": (1, bench("cifar10_vit", *batch(b))) for b in (128, 256, 2048, 4096)},
    # The cost of augmentation: with and without it.
    **{f"augment_{r}": (1, bench(f"cifar10_vit_{r}")) for r in RECIPES},
    **{f"augment_{r}_off": (1, bench(f"cifar10_vit_{r}", *PLAIN)) for r in RECIPES},
    "sweep_100ep": (12, sweep("cifar10_vit_100ep", "optim.muon_lr=0.01,0.02,0.04")),
    "cost": (15, script("cost_table", *batch(512))),
    "improved": (1, train("cifar10_vit_improved")),
    "cifar100": (17, train("cifar100_vit", "--config.num_seeds=3")),
}


def kind(name):
    """Returns the command of an item ("train", "sweep", ...), or the module that is not vit_jax."""
    module, command, *_ = ITEMS[name][1]
    return command if module == "vit_jax" else module


def is_profile(name):
    """Returns whether an item trains only to profile some steps."""
    return "--profile_steps" in ITEMS[name][1]


def torch_problem(rehearse):
    """Returns why PyTorch cannot train here, or None. A rehearsal needs no GPU."""
    code = "import torch" if rehearse else "import torch; torch.zeros(1, device='cuda')"
    tried = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    return (tried.stderr.strip().splitlines() or ["no message"])[-1] if tried.returncode else None


def command_of(name, folder, rehearse, *, against_torch):
    """Returns the item's argv. With `rehearse`, a tiny model trains that many steps."""
    arguments = [
        part.format(folder=folder)
        for part in ITEMS[name][1]
        if against_torch or part not in AGAINST
    ]
    if rehearse and kind(name) == "pytest":
        arguments = ["pytest", "-q", "tests/test_optim.py"]
    elif rehearse:
        arguments += [f"--config.model.{x}" for x in TINY]
        arguments += rehearsal(kind(name), rehearse)
        if is_profile(name):
            arguments += ["--profile_steps", f"1-{rehearse}"]
    return [PYTHON, "-m", *arguments]


def rehearsal(kind, steps):
    """Returns the arguments that shorten a command of this kind."""
    run = [f"--config.steps={steps}", "--config.num_seeds=1"]
    return {
        "train": [*run, "--config.data.test_split=test[:500]"],
        "sweep": run,
        "benchmark": ["--rounds", "1"],
        "scripts.cost_table": ["--rounds", "1", "--only", "patch size"],
        "scripts.gpu_levers": ["--counts", "1", "2"],
    }.get(kind, [])


def complete(name, out, rehearse, *, against_torch):
    """Returns whether the item has succeeded before; a rehearsal does not count as a measurement.

    Without PyTorch, both an earlier comparison and an earlier measurement of vit_jax alone count.
    """
    done = out / name / "done.json"
    sufficient = [
        command_of(name, out / name, rehearse, against_torch=t) for t in {True, against_torch}
    ]
    return done.exists() and json.loads(done.read_text())["command"] in sufficient


def run_item(name, out, rehearse, *, against_torch, limit):
    """Runs an item for at most `limit` seconds. Returns whether it is complete."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    command = command_of(name, folder, rehearse, against_torch=against_torch)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    if name == "tests" and not rehearse:
        env["JAX_PLATFORMS"] = ""  # the tests run on the CPU by default; "" selects the GPU
        env["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # their bounds are for float32, not TF32
    print(f"{name} ...", end=" ", flush=True)
    start = time.monotonic()
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env=env, start_new_session=True
        )
        stopped = wait(process, limit)
    seconds = time.monotonic() - start
    if process.returncode:
        last = ((folder / "log.txt").read_text().strip().splitlines() or [""])[-1]
        why = (
            f"stopped at its {limit:.0f} s limit" if stopped else f"exit code {process.returncode}"
        )
        print(f"{why} after {seconds:.0f} s: {last[:150]}", flush=True)
        return False
    write_json(folder / "done.json", {"seconds": seconds, "command": command})
    print(f"{seconds:.0f} s", flush=True)
    return True


def wait(process, limit, grace=20):
    """Waits for a process group, and stops it after `limit` seconds. Returns whether it did.

    It is stopped too if this process is interrupted. SIGTERM lets a training run save a checkpoint;
    SIGKILL follows after `grace` seconds.
    """
    try:
        process.wait(limit)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def result_row(folder):
    """Returns a row of the results table."""
    result = json.loads((folder / "result.json").read_text())
    run = json.loads((folder / "run.json").read_text())
    accuracy = f"{100 * result['test_accuracy']:.2f}"
    if "test_accuracy_std" in result:
        accuracy += f" +- {100 * result['test_accuracy_std']:.2f} ({len(result['seed'])} seeds)"
    minutes, rate = result["seconds"] / 60, result["images_per_second"] or 0
    return (
        f"| `{run['command']}` | {accuracy} | {result['train_loss']:.4f} | {minutes:.1f} | "
        f"{rate:,.0f} | {result['device']}, jax {run['versions']['jax']}, "
        f"{(run['commit'] or '')[:10]}, {run['date'][:10]} |"
    )


def notebook_lines(folder):
    """Yields a table of the notebook's losses and the run's, epoch by epoch."""
    path = folder / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else ()
    losses = [m["epoch/loss"] for _, m in lines if "epoch/loss" in m]
    yield from ("| epoch | loss of the notebook | loss of vit_jax |", "|---|---|---|")
    with NOTEBOOK_LOSSES.open() as file:
        for row, loss in zip(csv.DictReader(file), losses, strict=False):
            yield f"| {row['epoch']} | {row['loss']} | {loss:.4f} |"
    if (folder / "result.json").exists():
        accuracy = json.loads((folder / "result.json").read_text())["test_accuracy"]
        yield f"| test accuracy, % | {NOTEBOOK_TEST} | {100 * accuracy:.2f} |"


def profile_lines(folder):
    """Yields a table of the longest operations of a profile, by milliseconds per step."""
    yield from ("| operation | ms | times |", "|---|---|---|")
    for row in json.loads((folder / "profile" / "operations.json").read_text())[:40]:
        yield f"| {row['operation']} | {row['milliseconds']:.3f} | {row['times']:g} |"


def benchmark_row(name, folder):
    """Returns a row of the performance table."""
    lines = (folder / "log.txt").read_text().splitlines()
    r = json.loads([line for line in lines if line.startswith("{")][-1])  # between warnings
    rivals = "; ".join(f"{v['speedup']:.2f} times as fast as {k}" for k, v in r["rivals"].items())
    e = r["environment"]
    where = [e["devices"][0], f"matmul precision {r['matmul_precision']}"]
    where += [f"{k} {v}" for k, v in e["versions"].items() if k in ("jax", "torch")]
    where += [(e["commit"] or "no commit")[:10], e["date"][:10]]
    mfu = f"{100 * r['mfu']:.1f}" if r["mfu"] else ""
    return (
        f"| {name} | {r['images_per_second']:,.0f} | "
        f"{1e3 * r['seconds_per_step']['median']:.3f} | {r['seconds_per_epoch']:.2f} | {mfu} | "
        f"{rivals} | {', '.join(where)} |"
    )


def report(out, chosen, done):
    """Yields the lines for the documents, from the items that are done."""
    yield from ("## docs/results.md", "")
    yield "| command | test accuracy, % | train loss | minutes | images/s | where |"
    yield "|---|---|---|---|---|---|"
    for name in (n for n in chosen if kind(n) == "train" and not is_profile(n)):
        yield result_row(out / name) if name in done else f"| {name} | not yet measured | | | | |"
    if "notebook" in chosen:
        yield from ("", *notebook_lines(out / "notebook"))
    yield from ("", "## docs/performance.md", "")
    yield "| item | images/s | ms per step | s per epoch | MFU, % | vit_jax vs. PyTorch | where |"
    yield "|---|---|---|---|---|---|---|"
    for name in (n for n in done if kind(n) == "benchmark"):
        yield benchmark_row(name, out / name)
    for name in filter(is_profile, done):
        yield from ("", f"### {name}", "", *profile_lines(out / name))
    for name in (n for n in done if kind(n) not in ("train", "benchmark")):
        yield from ("", f"### {name}", "", (out / name / "log.txt").read_text().strip())


def main():
    """Runs the items that are not complete, then prints the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to write")
    parser.add_argument("--only", nargs="+", choices=ITEMS, metavar="ITEM", help="items to run")
    parser.add_argument(
        "--tflops", type=float, default=150.0, help="expected TFLOP/s, for the estimate of the time"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="rehearse with this many steps per run"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after this time (default: never)"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `wait` stops its item
    deadline = time.monotonic() + 60 * args.minutes
    out = args.out.absolute()
    chosen = [n for n in ITEMS if args.only is None or n in args.only]
    if not args.steps:
        code = "import jax; print(jax.default_backend())"  # the child frees the GPU's memory
        child = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
        if child.stdout.strip() != "gpu":
            sys.exit("error: JAX finds no GPU on this machine: use --steps 1 to rehearse")
    problem = torch_problem(args.steps)
    against_torch = problem is None
    if problem and any(AGAINST[0] in ITEMS[n][1] for n in chosen):
        print(
            f"No comparison with PyTorch ({problem}): vit_jax is measured alone. To compare, "
            "install PyTorch ('.[parity]' in pyproject.toml) and rerun this command.",
            flush=True,
        )
    done = [n for n in chosen if complete(n, out, args.steps, against_torch=against_torch)]
    left = [n for n in chosen if n not in done]
    minutes = {n: ITEMS[n][0] * 150 / args.tflops for n in left}
    print(*(f"{n}: about {m:.0f} min" for n, m in minutes.items()), sep="\n")
    print(f"Total: about {sum(minutes.values()):.0f} min", flush=True)
    for name in left:
        # Three times the expected minutes, and two to start and compile.
        limit = min(60 * (3 * minutes[name] + 2), deadline - time.monotonic())
        if limit < 20:
            print(f"no time is left for {name} and the items after it", flush=True)
            break
        if run_item(name, out, args.steps, against_torch=against_torch, limit=limit):
            done.append(name)
        lines = list(report(out, chosen, done))
        (out / "report.md").write_text("\n".join(lines) + "\n")
    print(*report(out, chosen, done), sep="\n")
    if missing := [n for n in chosen if n not in done]:
        sys.exit(f"not complete: {', '.join(missing)}: see log.txt of each, and rerun to resume")


if __name__ == "__main__":
    main()
