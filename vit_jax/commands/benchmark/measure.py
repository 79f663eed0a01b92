"""How fast a recipe trains, and what it takes: python -m vit_jax.benchmark --config F.

Drives the step and the data that training runs (`run.setup`), as `train.train` does. With
`--against torch` PyTorch trains the same model in processes of its own, in turn with ours: a round
of ours, a round of each, and again, so that what else the machine does falls on all alike.
"""

import argparse
import collections
import importlib.util
import json
import os
import pathlib
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from vit_jax import config as config_lib
from vit_jax.errors import UserError, run_command

VARIANTS = ("written", "eager", "compiled")  # of PyTorch; benchmark_torch says what they are


class Ours:
    """Rounds of training steps, fed, dispatched and waited for as training does."""

    def __init__(self, run):
        import jax

        self.run, self.state = run, run.init(run.put(run.seeds))
        self._inputs = iter(())
        start = time.perf_counter()
        self.first_inputs = jax.block_until_ready(self._next())
        self.first_seconds = time.perf_counter() - start  # a resident split goes to the device here
        self.waited, self.made, self.bytes_to_host = 0.0, 0, 0

    def _next(self):
        try:
            return next(self._inputs)
        except StopIteration:  # the run is over: from its beginning again
            self._inputs = self.run.inputs(0)
            return next(self._inputs)

    def steps(self, n):
        """Seconds that n steps take."""
        import jax

        in_flight = collections.deque()
        start = time.perf_counter()
        with jax.transfer_guard("disallow"):  # a step that asked for the host would end here
            for _ in range(n):
                began = time.perf_counter()
                inputs = self._next()
                self.waited += time.perf_counter() - began
                self.state, metrics = self.run.step(self.state, *inputs)
                in_flight.append(metrics)
                if len(in_flight) > 1:
                    jax.block_until_ready(in_flight.popleft())
            jax.block_until_ready(metrics)
        self.made += n
        self.bytes_to_host = sum(m.nbytes for m in metrics.values())
        return time.perf_counter() - start


class Torch:
    """PyTorch's side, in a process of its own."""

    def __init__(self, variant, run):
        import jax

        config = run.config
        spec = {
            "variant": variant,
            "dtype": run.model.dtype.name,
            "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
            "batch_size": config.batch_size,
            "seed": config.seed,
            "data": {
                "name": config.data.name,
                "split": config.data.train_split,
                "data_dir": config.data.dir,
                "image_size": config.data.image_size,
                "mean": config.data.mean,
                "std": config.data.std,
            },
            "model": model_of_the_notebook(run),
        }
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vit_jax.benchmark_torch", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.about = self._answer()["about"]

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["it says nothing"])[-1]
            raise UserError(f"PyTorch's side ended: {last}")
        return json.loads(line)

    def steps(self, n):
        """Seconds that n steps take."""
        print(n, file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def start_rivals(run, variants):
    """Starts PyTorch's side of a Run. Returns {name: Torch} and {name: {"failed": why}}.

    A variant that fails is reported on stderr and does not keep the others from being measured.
    Raises UserError if the notebook has no such model.
    """
    model_of_the_notebook(run)
    rivals, failed = {}, {}
    for variant in variants:
        name = f"PyTorch {variant}"
        try:
            side = Torch(variant, run)
            side.steps(1)
            rivals[name] = side
        except UserError as e:
            failed[name] = {"failed": str(e)}
            print(f"{name} failed: {e}; measuring the others", file=sys.stderr, flush=True)
    return rivals, failed


def model_of_the_notebook(run):
    """Arguments of the notebook's class for a Run's model; UserError where there are none."""
    config, model = run.config, run.model
    must = {"pool": "cls", "posemb": "learned", "stem": "patch", "gelu": "exact", "norm_eps": 1e-5}
    must |= dict.fromkeys(("qk_norm", "layer_scale", "dropout", "drop_path", "pre_logits"), 0)
    must |= {"image_size": 0, "mlp_dim": 4 * model.width}
    differing = [
        f"model.{k}={getattr(model, k)}" for k, v in must.items() if getattr(model, k) != v
    ]
    a = config.augment
    augments = {a.crop, a.flip, a.policy} != {"none"} or any(
        (a.erasing_prob, a.mixup_alpha, a.cutmix_alpha, *a.color_jitter)
    )
    differing += ["augment"] * augments + [f"optim.name={config.optim.name}"] * (
        config.optim.name != "adamw"
    )
    differing += [f"num_seeds={config.num_seeds}"] * (config.num_seeds > 1)
    if differing:
        raise UserError(
            f"--against torch compares the notebook's model and loop, and this recipe differs "
            f"({', '.join(differing)}): take --config cifar10_vit"
        )
    return {
        "img_size": run.train.image_shape[0],
        "patch_size": model.patch_size,
        "num_classes": model.num_classes,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.num_heads,
    }


def spread(values):
    """{"median", "min", "max"} of a list."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measured_peak(dtype, *, seconds=0.5):
    """(FLOP/s, size) of the fastest square matrix product on one device, of those that take less
    than about `seconds`."""
    import jax
    import jax.numpy as jnp

    product, best = jax.jit(jnp.matmul), (0.0, 0)
    for size in (1024, 2048, 4096, 8192, 16384):
        a = jnp.ones((size, size), dtype)
        times, n = [], 1
        jax.block_until_ready(product(a, a))
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready([product(a, a) for _ in range(n)])
            times.append((time.perf_counter() - start) / n)
            n = min(64, max(1, int(0.05 / min(times))))  # a short one's dispatch does not count
        best = max(best, (2 * size**3 / min(times), size))
        if 8 * min(times) > seconds:
            break
    return best


def compile_seconds(run):
    """{"cold", "cached"}: compiling the step with an empty persistent cache, then with a full one.

    Tracing and lowering count in both.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache
    from vit_jax.explain import compile_step

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before, result = {name: getattr(jax.config, name) for name in names}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in zip(names, (folder, 0.0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for kind in ("cold", "cached"):
            jax.clear_caches()
            start = time.perf_counter()
            compiled = compile_step(run)
            result[kind] = time.perf_counter() - start
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    return result, compiled


def start_seconds(arguments):
    """{"cold", "warm"}: from the command `vit_jax.main` to the first step's metrics on disk.

    Cold with an empty compilation cache, warm with what the cold start left there.
    """
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("cold", "warm"):
            workdir = pathlib.Path(folder, kind)
            command = [sys.executable, "-m", "vit_jax.main", *arguments, "--workdir", workdir]
            command += ["--config.log_every=1 step"]
            command += [f"--config.log_every_{u}=0" for u in ("epochs", "examples", "percent")]
            env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla"}
            start = time.perf_counter()
            with open(f"{folder}/log", "w+") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
                # Of several seeds each has its own, in a folder of the workdir.
                while not any(p.stat().st_size for p in workdir.rglob("metrics.jsonl")):
                    if process.poll() is not None:
                        log.seek(0)
                        raise UserError(f"the run ended before its first step: {log.read()[-500:]}")
                    time.sleep(0.01)
                result[kind] = time.perf_counter() - start
                process.send_signal(signal.SIGKILL)  # only the start was of interest
                process.wait()
    return result


def measure(run, *, rounds=5, round_seconds=2.0, rivals=()):
    """The figures of a Run, as a dict, its own and in turn with those of `rivals`.

    Rates are medians over `rounds` of about `round_seconds` each, with the least and the most.
    `rivals` is {name: an object with steps(n) -> seconds}.
    """
    import jax
    from vit_jax.explain import traffic

    from vit_jax import peaks

    compiling, compiled = compile_seconds(run)
    sides = {"vit_jax": Ours(run), **dict(rivals)}
    counts, times = {}, {name: [] for name in sides}
    for name, side in sides.items():
        side.steps(2)  # compiles, allocates
        counts[name] = max(1, round(round_seconds / (side.steps(2) / 2)))
    for _ in range(rounds):
        for name, side in sides.items():
            side.steps(1)  # brings the caches back to this side
            times[name].append(side.steps(counts[name]) / counts[name])

    ours, device = sides["vit_jax"], run.mesh.devices.flat[0]
    images = run.config.batch_size * run.config.num_seeds
    seconds = spread(times["vit_jax"])
    rate = images / seconds["median"]
    flops = rate * run.flops_per_image / run.mesh.size
    memory = compiled.memory_analysis()
    in_use = (device.memory_stats() or {}).get("peak_bytes_in_use")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak, size = measured_peak(run.model.dtype)  # last: its matrices are not the run's memory
    stated = peaks.peak_flops(device.device_kind)
    # Streamed, the batch; resident, the order of an epoch shared out over its steps.
    *split, fed = ours.first_inputs
    input_bytes = sum(x.nbytes for x in jax.tree.leaves(fed)) / (
        run.steps_per_epoch if split else 1
    )
    sent = {k: b for k, (_, b) in traffic(compiled.as_text()).items() if "-" not in k}
    return {
        "batch_size": run.config.batch_size,
        "num_seeds": run.config.num_seeds,
        "dtype": run.model.dtype.name,
        "num_params": run.num_params,
        "gflop_per_image": run.flops_per_image / 1e9,
        "seconds_per_step": seconds,
        "images_per_second": rate,
        "seconds_per_epoch": seconds["median"] * run.steps_per_epoch,
        "tflops_per_second": flops / 1e12,
        "peak_stated_tflops": stated and stated / 1e12,
        "peak_measured_tflops": peak / 1e12,
        "peak_measured_by": f"{size} x {size} {run.model.dtype.name} product",
        "mfu_of_stated": stated and flops / stated,
        "mfu_of_measured": flops / peak,
        "compile_seconds": compiling,
        "memory_estimated_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "memory_temporary_bytes": memory.temp_size_in_bytes,
        "memory_device_peak_bytes": in_use,
        "memory_process_peak_bytes": resident,
        "data_first_seconds": ours.first_seconds,
        "data_waiting_seconds_per_step": ours.waited / ours.made,
        # What the program itself asks for, and its inputs.
        "bytes_to_device_per_step": sent.get("infeed", 0) + input_bytes,
        "bytes_to_host_per_logged_step": sent.get("outfeed", 0) + ours.bytes_to_host,
        "fusions": compiled.as_text().count(" fusion("),
        "rivals": {
            name: {
                "seconds_per_step": spread(times[name]),
                "images_per_second": images / statistics.median(times[name]),
                "ours_times_theirs": statistics.median(times[name]) / seconds["median"],
            }
            for name in rivals
        },
    }


def table(result):
    """The lines of a result as a markdown table."""
    r, ms = result, 1e3

    def timed(s):
        return f"{s['median'] * ms:,.2f} ms ({s['min'] * ms:,.2f} to {s['max'] * ms:,.2f})"

    rows = [("images/s", f"{r['images_per_second']:,.1f}")]
    rows += [("a step", timed(r["seconds_per_step"]))]
    rows += [("an epoch", f"{r['seconds_per_epoch']:,.2f} s")]
    mfu = f"{100 * r['mfu_of_measured']:.1f}% of {r['peak_measured_tflops']:.3g} TFLOP/s measured "
    mfu += f"({r['peak_measured_by']})"
    if r["mfu_of_stated"]:
        mfu += f", {100 * r['mfu_of_stated']:.1f}% of {r['peak_stated_tflops']:.3g} stated (16-bit)"
    rows += [("MFU", f"{r['tflops_per_second']:.3g} TFLOP/s: {mfu}")]
    c = r["compile_seconds"]
    rows += [("compile", f"{c['cold']:.1f} s cold, {c['cached']:.1f} s from the cache")]
    if "start_seconds" in r:
        s = r["start_seconds"]
        rows += [("command to first step", f"{s['cold']:.1f} s cold, {s['warm']:.1f} s warm")]
    held = f"{r['memory_estimated_bytes'] / 1e6:,.0f} MB estimated by the compiler "
    held += f"({r['memory_temporary_bytes'] / 1e6:,.0f} of it while a step computes)"
    if r["memory_device_peak_bytes"]:
        held += f", {r['memory_device_peak_bytes'] / 1e6:,.0f} MB peak on the device"
    rows += [("memory", f"{held}; process {r['memory_process_peak_bytes'] / 1e6:,.0f} MB")]
    data = f"{r['data_seconds']:.2f} s to read, " if "data_seconds" in r else ""
    data += f"{r['data_first_seconds']:.2f} s to the first step's, then "
    data += f"{r['data_waiting_seconds_per_step'] * ms:.3f} ms of waiting a step"
    rows += [("data", data)]
    moved = f"{r['bytes_to_device_per_step']:,.0f} bytes in a step, "
    moved += f"{r['bytes_to_host_per_logged_step']:,} out a logged one"
    rows += [("host and device", moved)]
    for name, rival in r["rivals"].items():
        if "failed" in rival:
            rows += [(name, f"failed: {rival['failed']}")]
            continue
        text = f"{rival['images_per_second']:,.1f} images/s, {timed(rival['seconds_per_step'])}; "
        rows += [(name, f"{text}**ours {rival['ours_times_theirs']:.2f} times**")]
    e = r["environment"]
    versions = [f"jax {e['versions']['jax']}", *([r["torch"]] if "torch" in r else [])]
    where = f"{len(e['devices'])} x {e['devices'][0]}, {', '.join(versions)}, "
    where += (e["commit"] or "no commit")[:10]
    head = f"batch {r['batch_size']}, {r['dtype']}, {r['gflop_per_image']:.2f} GFLOP an image"
    lines = [f"`{e['command']}`: {where}, {e['date'][:10]}", "", f"| {head} | |", "|---|---|"]
    return lines + [f"| {name} | {value} |" for name, value in rows]


def main():
    """Measures a recipe and prints a table, or one JSON object."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.benchmark",
        description="Measures training by a recipe: throughput, MFU, memory, compile time, start.",
        epilog="--config.FIELD=VALUE changes a field of the recipe, as in vit_jax.main.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=pathlib.Path, required=True, help="a recipe's name or file"
    )
    parser.add_argument("--against", choices=("torch",), help="PyTorch in turn with ours")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="of PyTorch"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round_seconds", type=float, default=2.0, help="about, of each side")
    parser.add_argument("--no_start", action="store_true", help="leave the start-up time out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args, rest = parser.parse_known_args()
    if args.rounds < 1 or args.round_seconds <= 0:
        raise UserError("--rounds must be at least 1 and --round_seconds above 0")
    if args.against and importlib.util.find_spec("torch") is None:
        raise UserError(
            "--against torch needs PyTorch, which is not installed: pip install torch, or leave "
            "--against out to measure vit_jax alone"
        )
    config = config_lib.from_file(args.config)
    config_lib.override(config, rest, "--config, --against, --rounds, --round_seconds, --json")
    if config.data.streaming:
        raise UserError("the benchmark measures resident data: leave config.data.streaming false")
    if args.against:  # the memory of a GPU is shared with PyTorch's processes
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    from vit_jax.run import setup

    from vit_jax import mesh, metrics

    mesh.check_backend()
    start = {}
    if not args.no_start:
        start["start_seconds"] = start_seconds(["--config", args.config, *rest])
    began = time.perf_counter()
    run = setup(config)
    data_seconds = time.perf_counter() - began
    rivals, failed = start_rivals(run, args.variants) if args.against else ({}, {})
    result = measure(run, rounds=args.rounds, round_seconds=args.round_seconds, rivals=rivals)
    for side in rivals.values():
        side.close()
    result["rivals"] |= failed
    command = shlex.join(["python", "-m", "vit_jax.benchmark", *sys.argv[1:]])
    result |= start | {"data_seconds": data_seconds}
    if rivals:
        result["torch"] = next(iter(rivals.values())).about
    result["environment"] = metrics.environment(command)
    print(*([json.dumps(result)] if args.json else table(result)), sep="\n")


if __name__ == "__main__":
    run_command(main)
