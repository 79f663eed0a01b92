"""Everything that needs a GPU, in one command: python scripts/gpu_all.py --out OUT.

Prints the expected time first. Each item is an ordinary command whose output goes to
OUT/NAME/log.txt. Complete items are not run again, and an interrupted run resumes. At the end the
rows for docs/results.md and docs/performance.md are printed and written to OUT/report.md. `--steps
1` rehearses everything on any machine with a tiny model and one step per run. Without PyTorch,
which launch.sh does not install, the comparisons measure vit_jax alone.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from vit_jax.workdir import metrics

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = sys.executable

# The notebook's own losses, epoch by epoch, and its test accuracy.
NOTEBOOK = (1.6314, 1.2619, 1.1252, 1.0384, 0.9710, 0.9030, 0.8483, 0.7844, 0.7255, 0.6616)
NOTEBOOK += (0.5961, 0.5351, 0.4638, 0.3972, 0.3345, 0.2838, 0.2528, 0.2088, 0.1896, 0.1769)
NOTEBOOK_TEST = 63.68

HELD_OUT = ("--config.data.train_split=train[:45000]", "--config.data.val_split=train[45000:]")
BF16 = "--config.model.dtype=bfloat16"
PLAIN = ("crop=none", "flip=none", "policy=none", "erasing_prob=0", "mixup_alpha=0")
PLAIN = tuple(f"--config.augment.{x}" for x in (*PLAIN, "cutmix_alpha=0"))
TESTS = ("step", "model", "optim", "train")
TESTS = (*(f"tests/test_{t}.py" for t in TESTS), "tests/augment", "tests/parity")
RECIPES = ("20ep", "100ep", "300ep")
TINY = ("width=32", "depth=1", "mlp_dim=128", "patch_size=8", "num_heads=4")


def train(recipe, *flags):
    """A run of a recipe, into the item's own folder."""
    return ("vit_jax.main", "--config", f"configs/{recipe}.py", "--workdir", "{folder}", *flags)


def bench(recipe, *flags):
    """A benchmark of a recipe."""
    return ("vit_jax benchmark", "--config", f"configs/{recipe}.py", "--json", *flags)


def sweep(recipe, *settings):
    """A grid on the part held out of the training split; the test split is not read."""
    config = ("--config", f"configs/{recipe}.py", "--workdir", "{folder}")
    return ("vit_jax sweep", *config, "--set", *settings, *HELD_OUT)


def script(name, *flags):
    """A script beside this one, on the notebook's recipe."""
    return (f"scripts.{name}", "--config", "configs/cifar10_vit.py", *flags)


def batch(size):
    """Flags of the notebook's model in bfloat16 at a batch size."""
    return (BF16, f"--config.batch_size={size}")


AGAINST = ("--against", "torch")
ONE_BY_ONE = ("optim.peak_lr=5e-4,1e-3,2e-3", "optim.weight_decay=0.05,0.1")
# name -> (minutes at 150 TFLOP/s, command after `python -m`), in the order of their worth.
ITEMS = {
    "tests": (15, ("pytest", "-q", *TESTS)),
    "one_epoch": (1, train("cifar10_vit", "--config.epochs=1")),
    "notebook": (1, train("cifar10_vit")),
    "bench_64": (4, bench("cifar10_vit", *AGAINST)),
    "bench_64_bf16": (4, bench("cifar10_vit", *AGAINST, BF16)),
    "bench_512_bf16": (4, bench("cifar10_vit", *AGAINST, *batch(512))),
    "bench_1024_bf16": (4, bench("cifar10_vit", *AGAINST, *batch(1024))),
    "profile_64": (1, script("profile_step")),
    "profile_1024_bf16": (1, script("profile_step", *batch(1024))),
    "lever_64": (3, script("gpu_levers")),
    "lever_1024_bf16": (3, script("gpu_levers", *batch(1024))),
    # One thing changed from bench_1024_bf16 each: 64 tokens, heads of 64, ...
    "bench_gap": (1, bench("cifar10_vit", *batch(1024), "--config.model.pool=gap")),
    "bench_heads": (1, bench("cifar10_vit", *batch(1024), "--config.model.num_heads=4")),
    "bench_float32": (1, bench("cifar10_vit", "--config.batch_size=1024")),
    "bench_remat": (1, bench("cifar10_vit", *batch(1024), "--config.model.remat=true")),
    **{f"bench_b{b}": (1, bench("cifar10_vit", *batch(b))) for b in (128, 256, 2048, 4096)},
    # What augmentation costs: with it and without.
    **{f"augment_{r}": (1, bench(f"cifar10_vit_{r}")) for r in RECIPES},
    **{f"augment_{r}_off": (1, bench(f"cifar10_vit_{r}", *PLAIN)) for r in RECIPES},
    "cost": (15, script("cost_table", *batch(512))),
    "improved": (1, train("cifar10_vit_improved")),
    "20ep": (2, train("cifar10_vit_20ep", "--config.num_seeds=3")),
    "sweep_20ep": (8, sweep("cifar10_vit_20ep", *ONE_BY_ONE)),
    "100ep": (6, train("cifar10_vit_100ep", "--config.num_seeds=3")),
    "sweep_100ep": (12, sweep("cifar10_vit_100ep", *ONE_BY_ONE)),
    "300ep": (17, train("cifar10_vit_300ep", "--config.num_seeds=3")),
    "cifar100": (17, train("cifar100_vit", "--config.num_seeds=3")),
}


def torch_problem(rehearse):
    """Returns why PyTorch cannot train here, or None; a rehearsal needs no GPU."""
    code = "import torch" if rehearse else "import torch; torch.zeros(1, device='cuda')"
    tried = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    return (tried.stderr.strip().splitlines() or ["no message"])[-1] if tried.returncode else None


def command_of(name, folder, rehearse, *, against_torch):
    """The item's argv; in a rehearsal of a tiny model and few steps."""
    module, *rest = ITEMS[name][1]
    rest = [part.format(folder=folder) for part in rest if against_torch or part not in AGAINST]
    if rehearse and module == "pytest":
        rest = ["-q", "tests/test_optim.py"]
    elif rehearse:
        rest += [f"--config.model.{x}" for x in TINY]
        if module in ("vit_jax.main", "vit_jax sweep"):
            rest += [f"--config.steps={rehearse}", "--config.num_seeds=1"]
            rest += [] if module == "vit_jax sweep" else ["--config.data.test_split=test[:500]"]
        if module == "vit_jax benchmark":
            rest += ["--rounds", "1", "--round_seconds", "0.1"]
            rest += ["--variants", "written"] if "torch" in rest else []
        if module == "scripts.cost_table":
            rest += ["--rounds", "1", "--round_seconds", "0.1", "--only", "patch size"]
        if module == "scripts.gpu_levers":
            rest += ["--counts", "1", "2"]
    return [PYTHON, "-m", *module.split(), *rest]


def complete(name, out, rehearse, *, against_torch):
    """Returns whether the item has ended well; a rehearsal is not the measurement.

    Without PyTorch a comparison measured earlier counts, and so does vit_jax alone.
    """
    done = out / name / "done.json"
    enough = [
        command_of(name, out / name, rehearse, against_torch=t) for t in {True, against_torch}
    ]
    return done.exists() and json.loads(done.read_text())["command"] in enough


def run_item(name, out, rehearse, *, against_torch):
    """Runs an item unless it is complete. Returns whether it is complete afterward."""
    folder = out / name
    if complete(name, out, rehearse, against_torch=against_torch):
        print(f"{name}: complete already", flush=True)
        return True
    folder.mkdir(parents=True, exist_ok=True)
    command = command_of(name, folder, rehearse, against_torch=against_torch)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    if name == "tests" and not rehearse:
        env["JAX_PLATFORMS"] = ""  # the tests take the CPU unless told otherwise; here: the best
        env["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # their bounds are of float32, not TF32
    print(f"{name} ...", end=" ", flush=True)
    start = time.monotonic()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=env)
    seconds = time.monotonic() - start
    if process.returncode:
        last = ((folder / "log.txt").read_text().strip().splitlines() or [""])[-1]
        print(
            f"ended with code {process.returncode} after {seconds:.0f} s: {last[:150]}", flush=True
        )
        return False
    (folder / "done.json").write_text(json.dumps({"seconds": seconds, "command": command}))
    print(f"{seconds:.0f} s", flush=True)
    return True


def result_row(folder):
    """One line of the results table."""
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
    """The notebook's losses beside ours, epoch by epoch."""
    path = folder / "metrics.jsonl"
    lines = metrics.read_lines(path) if path.exists() else ()
    ours = [m["epoch/loss"] for _, m in lines if "epoch/loss" in m]
    yield from ("| epoch | the notebook's loss | ours |", "|---|---|---|")
    for epoch, loss in enumerate(ours, 1):
        theirs = f"{NOTEBOOK[epoch - 1]:.4f}" if epoch <= len(NOTEBOOK) else ""
        yield f"| {epoch} | {theirs} | {loss:.4f} |"
    if (folder / "result.json").exists():
        accuracy = json.loads((folder / "result.json").read_text())["test_accuracy"]
        yield f"| test accuracy, % | {NOTEBOOK_TEST} | {100 * accuracy:.2f} |"


def report(out, chosen, done):
    """The lines for the documents, of what is done."""
    module = {n: ITEMS[n][1][0] for n in chosen}
    yield from ("## docs/results.md", "")
    yield "| command | test accuracy, % | train loss | minutes | images/s | where |"
    yield "|---|---|---|---|---|---|"
    for name in (n for n in chosen if module[n] == "vit_jax.main"):
        yield result_row(out / name) if name in done else f"| {name} | not yet measured | | | | |"
    if "notebook" in chosen:
        yield from ("", *notebook_lines(out / "notebook"))
    yield from ("", "## docs/performance.md", "")
    yield ("| item | images/s | ms per step | epoch, s | MFU, % | faster than PyTorch | where |")
    yield "|---|---|---|---|---|---|---|"
    for name in done:
        if module[name] != "vit_jax benchmark":
            continue
        lines = (out / name / "log.txt").read_text().splitlines()
        r = json.loads([line for line in lines if line.startswith("{")][-1])  # warnings stand about
        mfu, e = f"{100 * r['mfu']:.1f}" if r["mfu"] else "", r["environment"]
        rivals = "; ".join(f"{k}: {v['speedup']:.2f} times" for k, v in r["rivals"].items())
        where = [
            e["devices"][0],
            f"jax {e['versions']['jax']}",
            *([r["torch"]] if "torch" in r else []),
        ]
        where = ", ".join([*where, (e["commit"] or "no commit")[:10], e["date"][:10]])
        yield (
            f"| {name} | {r['images_per_second']:,.0f} | "
            f"{1e3 * r['seconds_per_step']['median']:.3f} | {r['seconds_per_epoch']:.2f} | {mfu} | "
            f"{rivals} | {where} |"
        )
    for name in done:
        if module[name] not in ("vit_jax.main", "vit_jax benchmark"):
            yield from ("", f"### {name}", "", (out / name / "log.txt").read_text().strip())


def main():
    """Runs what is not yet complete, then prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=None)
    parser.add_argument("--tflops", type=float, default=150.0, help="expected rate, for the time")
    parser.add_argument("--steps", type=int, default=0, help="a rehearsal of so many steps a run")
    args = parser.parse_args()
    out = args.out.absolute()
    chosen = [n for n in ITEMS if args.only is None or n in args.only]
    if not args.steps:
        code = "import jax; print(jax.default_backend())"  # the memory is given back
        asked = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
        if asked.stdout.strip() != "gpu":
            sys.exit("error: jax sees no GPU here; --steps 1 rehearses on any machine")
    problem = torch_problem(args.steps)
    against_torch = problem is None
    if problem and any(AGAINST[0] in ITEMS[n][1] for n in chosen):
        print(
            f"No comparison with PyTorch ({problem}): vit_jax is measured alone. To compare, "
            "install PyTorch ('.[parity]' in pyproject.toml) and start again.",
            flush=True,
        )
    left = [n for n in chosen if not complete(n, out, args.steps, against_torch=against_torch)]
    minutes = {n: ITEMS[n][0] * 150 / args.tflops for n in left}
    print(*(f"{n}: about {m:.0f} min" for n, m in minutes.items()), sep="\n")
    print(f"In all about {sum(minutes.values()):.0f} min", flush=True)
    done = [n for n in chosen if run_item(n, out, args.steps, against_torch=against_torch)]
    lines = list(report(out, chosen, done))
    (out / "report.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    if failed := [n for n in chosen if n not in done]:
        sys.exit(f"not complete: {', '.join(failed)}; see log.txt in each; start again to go on")


if __name__ == "__main__":
    main()
