"""Throughput, MFU, memory, and compilation time of an experiment, alone or alternating with others.

Timing drives the jitted step and the feed that training uses. With several sides, a round times
each of them once, so that other load on the machine affects them equally.
"""

import collections
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import jax
from jax.experimental.compilation_cache import compilation_cache

from vit_jax.commands.describe import compile_step
from vit_jax.errors import UserError
from vit_jax.parallel import peaks


class JaxSide:
    """Training steps of an experiment, fed, dispatched, and awaited as `vit_jax.train` does."""

    def __init__(self, experiment):
        self._train_step, self._state = experiment.train_step, experiment.init()
        # After the last step, training starts again from the first batch.
        self._inputs = itertools.chain.from_iterable(
            experiment.feed.inputs(after=0) for _ in itertools.count()
        )

    def steps(self, n):
        """Returns the seconds that n steps take."""
        in_flight = collections.deque()
        start = time.perf_counter()
        with jax.transfer_guard("disallow"):  # implicit transfers raise, as in training
            for inputs in itertools.islice(self._inputs, n):
                self._state, metrics = self._train_step(self._state, *inputs)
                in_flight.append(metrics)
                if len(in_flight) > 1:
                    jax.block_until_ready(in_flight.popleft())
            jax.block_until_ready(metrics)
        return time.perf_counter() - start


class TorchSide:
    """The same training in PyTorch, in a child process (see torch_side.py)."""

    def __init__(self, variant, experiment):
        config = experiment.config
        spec = {
            "variant": variant,
            "dtype": experiment.model.dtype.name,
            "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
            "batch_size": config.batch_size,
            "seed": config.seed,
            "data": config.data.to_dict(),
            "model": notebook_arguments(experiment),
        }
        command = [sys.executable, "-m", f"{__package__}.torch_side", json.dumps(spec)]
        self._log = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, text=True
        )
        self.about = self._answer()["about"]  # PyTorch's version, device, and threads

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            lines = self._log.read().strip().splitlines() or ["no message"]
            raise UserError(f"the PyTorch process exited: {lines[-1]}")
        return json.loads(line)

    def steps(self, n):
        """Returns the seconds that n steps take."""
        print(n, file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self):
        """Ends the process."""
        self._process.communicate()  # closes its stdin, which ends it


def start_torch_sides(experiment, variants):
    """Starts one PyTorch process per variant.

    Returns ({name: TorchSide}, {name: {"failed": reason}}). A variant that fails is reported on
    stderr, and the others are measured. Raises UserError if the notebook cannot train by the
    experiment's config.
    """
    notebook_arguments(experiment)
    sides, failures = {}, {}
    for variant in variants:
        name = f"PyTorch {variant}"
        try:
            side = TorchSide(variant, experiment)
            side.steps(1)
            sides[name] = side
        except UserError as e:
            failures[name] = {"failed": str(e)}
            print(f"{name} failed: {e}; measuring the others", file=sys.stderr, flush=True)
    return sides, failures


def notebook_arguments(experiment):
    """Returns the arguments with which the notebook's class builds the experiment's model.

    Raises UserError, with the fields that differ, if the notebook cannot train by this config.
    """
    config, model = experiment.config, experiment.model
    required = {"pool": "cls", "posemb": "learned", "stem": "patch", "gelu": "exact"}
    required |= dict.fromkeys(("qk_norm", "layer_scale", "dropout", "drop_path", "pre_logits"), 0)
    required |= {"norm_eps": 1e-5, "image_size": 0, "mlp_dim": 4 * model.width}
    differences = [
        f"model.{k}={getattr(model, k)}" for k, v in required.items() if getattr(model, k) != v
    ]
    a = config.augment
    strengths = (a.erasing_prob, a.mixup_alpha, a.cutmix_alpha)
    if {a.crop, a.flip, a.policy} != {"none"} or any(strengths):
        differences.append("augment")
    if config.optim.name != "adamw":
        differences.append(f"optim.name={config.optim.name}")
    if config.num_seeds > 1:
        differences.append(f"num_seeds={config.num_seeds}")
    if differences:
        raise UserError(
            "--against torch compares with the notebook's model and loop, from which this recipe "
            f"differs ({', '.join(differences)}): use --config cifar10_vit"
        )
    return {
        "img_size": experiment.train.image_shape[0],
        "patch_size": model.patch_size,
        "num_classes": model.num_classes,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.num_heads,
    }


def measure(experiment, *, rounds=5, round_seconds=2.0, rivals=None):
    """Measures an experiment, and `rivals` alternately with it, as a dict of JSON values.

    Rates are medians over `rounds` of about `round_seconds` per side. `rivals` is {name: an object
    with steps(n) -> seconds}.
    """
    rivals = rivals or {}
    compilation, compiled = compile_seconds(experiment)
    times = _time({"vit_jax": JaxSide(experiment), **rivals}, rounds, round_seconds)
    seconds, device = times["vit_jax"], experiment.mesh.devices.flat[0]
    config, mesh = experiment.config, experiment.mesh
    images = config.batch_size * config.num_seeds
    rate = images / seconds["median"]
    flops, peak = (
        rate * experiment.flops_per_image / mesh.size,
        peaks.peak_flops(device.device_kind),
    )
    memory = compiled.memory_analysis()
    return {
        "batch_size": config.batch_size,
        "num_seeds": config.num_seeds,
        "dtype": experiment.model.dtype.name,
        "num_params": experiment.num_params,
        "gflop_per_image": experiment.flops_per_image / 1e9,
        "seconds_per_step": seconds,
        "images_per_second": rate,
        "seconds_per_epoch": seconds["median"] * experiment.plan.steps_per_epoch,
        "tflops_per_second": flops / 1e12,  # per device, as the peak
        "peak_tflops": peak and peak / 1e12,
        "mfu": peak and flops / peak,
        "compile_seconds": compilation,
        "memory_estimated_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "memory_temporary_bytes": memory.temp_size_in_bytes,
        "memory_device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "memory_process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rivals": {
            name: {
                "seconds_per_step": times[name],
                "images_per_second": images / times[name]["median"],
                "speedup": times[name]["median"] / seconds["median"],
            }
            for name in rivals
        },
    }


def _time(sides, rounds, round_seconds):
    """Returns {name: {"median", "min", "max"}} of the seconds per step of each side."""
    counts, times = {}, {name: [] for name in sides}
    for name, side in sides.items():
        side.steps(2)  # compiles and allocates
        counts[name] = max(1, round(round_seconds / (side.steps(2) / 2)))
    for _ in range(rounds):
        for name, side in sides.items():
            side.steps(1)  # refills the CPU's caches with this side's data
            times[name].append(side.steps(counts[name]) / counts[name])
    return {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
        for name, t in times.items()
    }


def compile_seconds(experiment):
    """Compiles the step with an empty persistent cache ("cold"), then with a filled one ("cached").

    Returns ({"cold", "cached"}: seconds including tracing and lowering, the compiled step).
    """
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before, seconds = {name: getattr(jax.config, name) for name in names}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in zip(names, (folder, 0.0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for kind in ("cold", "cached"):
            jax.clear_caches()
            start = time.perf_counter()
            compiled = compile_step(experiment)
            seconds[kind] = time.perf_counter() - start
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    return seconds, compiled


def table(result):
    """Returns the lines of a markdown table of `measure`'s result and its environment."""
    r, e, c = result, result["environment"], result["compile_seconds"]
    mfu = f"{r['tflops_per_second']:.3g} TFLOP/s per device, "
    mfu += (
        f"{r['mfu']:.1%} of its 16-bit peak of {r['peak_tflops']:.3g} TFLOP/s"
        if r["mfu"]
        else "whose peak is unknown"
    )
    memory = f"{r['memory_estimated_bytes'] / 1e6:,.0f} MB estimated by the compiler "
    memory += f"({r['memory_temporary_bytes'] / 1e6:,.0f} MB temporary)"
    if r["memory_device_peak_bytes"]:
        memory += f", {r['memory_device_peak_bytes'] / 1e6:,.0f} MB peak on the device"
    rows = {
        "images/s": f"{r['images_per_second']:,.1f}",
        "time per step": _milliseconds(r["seconds_per_step"]),
        "time per epoch": f"{r['seconds_per_epoch']:,.2f} s",
        "MFU": mfu,
        "compilation": f"{c['cold']:.1f} s cold, {c['cached']:.1f} s from the cache",
        "memory": f"{memory}; process {r['memory_process_peak_bytes'] / 1e6:,.0f} MB",
        **{name: _rival(rival) for name, rival in r["rivals"].items()},
    }
    where = [f"{len(e['devices'])} x {e['devices'][0]}", f"jax {e['versions']['jax']}"]
    where += [r["torch"]] if "torch" in r else []
    where += [(e["commit"] or "no commit")[:10], e["date"][:10]]
    head = f"batch {r['batch_size']}, {r['dtype']}, {r['gflop_per_image']:.2f} GFLOP per image"
    return [
        *(f"`{e['command']}`: {', '.join(where)}", "", f"| {head} | |", "|---|---|"),
        *(f"| {name} | {text} |" for name, text in rows.items()),
    ]


def _rival(rival):
    if "failed" in rival:
        return f"failed: {rival['failed']}"
    return (
        f"{rival['images_per_second']:,.1f} images/s, {_milliseconds(rival['seconds_per_step'])}; "
        f"**vit_jax is {rival['speedup']:.2f} times as fast**"
    )


def _milliseconds(seconds):
    median, low, high = (1e3 * seconds[k] for k in ("median", "min", "max"))
    return f"{median:,.2f} ms ({low:,.2f} to {high:,.2f})"
