"""Estimated minimum time of a compiled step on a GPU, kernel by kernel (a roofline model).

A kernel takes as long as its arithmetic at the peak rate, its memory traffic at the peak bandwidth,
or a launch, whichever is longest. A step takes the sum over its kernels. This is an estimate at
stated rates, not a forecast: a kernel may miss its peak rate, cached data is read faster, CUDA
graphs make launches cheaper, and the links between GPUs are not modeled. With a GPU present, XLA
also autotunes each matrix product, which it cannot do here.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator

from vit_jax.commands.describe.program import COLLECTIVES, Kernel
from vit_jax.errors import UserError
from vit_jax.parallel.targets import Gpu

# The part of a step that an operation belongs to, by the first pattern found in its path.
_PARTS = {
    "LayerNorm": r"VisionTransformer.*/(norm\w*|[qk]_norm)(/|$)",
    "linear layers": r"VisionTransformer.*/(qkv|out|fc\d|\w+_embed|conv_stem|head|pre_logits)(/|$)",
    "attention": r"VisionTransformer.*/attn(/|$)",
    "GELU": r"VisionTransformer.*/mlp(/|$)",
    "residual, embeddings": "VisionTransformer",
    "augmentation": r"\baugment\b",
    "gather": r"\bgather\b(?!/gather$)",
    "loss": r"\bloss\b",
    "optimizer": r"\boptimizer\b",
    "metrics": r"\bmetrics\b",
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peak rates of a device."""

    bf16: float  # TFLOP/s of products on bfloat16, accumulated in float32
    tf32: float  # TFLOP/s of products on float32, rounded to TF32
    f32: float  # TFLOP/s of products on float32
    bandwidth: float  # GB/s of the device's memory
    launch: float = 2.0  # microseconds per kernel

    def __str__(self) -> str:
        return (
            f"{self.bf16:g} TFLOP/s in bfloat16, {self.tf32:g} in TF32, {self.f32:g} in float32, "
            f"{self.bandwidth:,.0f} GB/s, {self.launch:g} us per launch"
        )

    def arithmetic(self, flops: dict[str, float]) -> float:
        """Returns the seconds of {precision: FLOP}."""
        return sum(n / (getattr(self, p, self.f32) * 1e12) for p, n in flops.items())

    def seconds(self, kernel: Kernel) -> float:
        """Returns the minimum seconds of one execution of a kernel."""
        traffic = kernel.num_bytes / (self.bandwidth * 1e9)
        return max(self.arithmetic(kernel.flops), traffic, self.launch * 1e-6)


def rates_of(gpu: Gpu) -> Rates:
    """Returns the peak rates of a GPU."""
    return Rates(gpu.bf16, gpu.tf32, gpu.f32, gpu.bandwidth)


def replace_rates(rates: Rates, settings: Iterable[str]) -> Rates:
    """Returns rates with NAME=VALUE settings applied, such as 'bandwidth=3000'."""
    names = [field.name for field in dataclasses.fields(Rates)]
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in names or not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
            raise UserError(f"--rates {setting}: use NAME=NUMBER with one of {', '.join(names)}")
        rates = dataclasses.replace(rates, **{name: float(text)})
    return rates


def part(kernel: Kernel) -> str:
    """Returns the part of a training step that a kernel, or the result of a fusion, belongs to."""
    if kernel.kind in COLLECTIVES:
        return "collectives"
    for name, pattern in _PARTS.items():
        if re.search(pattern, kernel.op_name):
            return name
    return "copies" if kernel.kind == "copy" else "other"


def total(kernels: Iterable[Kernel], rates: Rates) -> dict[str, float]:
    """Returns sums over kernels: number, bytes, FLOP, seconds, and seconds of each bound alone."""
    sums: dict[str, float] = collections.defaultdict(float)
    for k in kernels:
        seconds = rates.seconds(k)
        sums["kernels"] += k.times
        sums["bytes"] += k.times * k.num_bytes
        sums["flops"] += k.times * sum(k.flops.values())
        sums["seconds"] += k.times * seconds
        sums["arithmetic"] += k.times * rates.arithmetic(k.flops)
        sums["traffic"] += k.times * k.num_bytes / (rates.bandwidth * 1e9)
        sums["launch_bound"] += k.times * (seconds <= rates.launch * 1e-6)
    return sums


def by_part(kernels: Iterable[Kernel], rates: Rates) -> dict[str, dict[str, float]]:
    """Returns {part: sums as in `total`}, the longest first."""
    parts: dict[str, list[Kernel]] = collections.defaultdict(list)
    for k in kernels:
        parts[part(k)].append(k)
    sums = {name: total(ks, rates) for name, ks in parts.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1]["seconds"]))


def kernel_lines(kernels: list[Kernel], rates: Rates) -> Iterator[str]:
    """Yields a table by part, and the 15 longest kernels with their shapes and source lines."""
    everything = total(kernels, rates)["seconds"]
    yield f"{'part':22} {'ms':>8} {'share':>6} {'kernels':>8} {'GB':>8} {'GFLOP':>9}"
    for name, sums in by_part(kernels, rates).items():
        yield (
            f"{name:22} {sums['seconds'] * 1e3:8.3f} {sums['seconds'] / everything:6.1%} "
            f"{sums['kernels']:8.0f} {sums['bytes'] / 1e9:8.3f} {sums['flops'] / 1e9:9.2f}"
        )
    yield ""
    yield f"{'us':>8} {'times':>5} {'MB':>9} {'GFLOP':>8}  longest kernels"
    for k in sorted(kernels, key=lambda k: -k.times * rates.seconds(k))[:15]:
        shape = re.sub(r"\{[^}]*\}", "", k.instruction.shape)
        yield (
            f"{k.times * rates.seconds(k) * 1e6:8.1f} {k.times:5} {k.num_bytes / 1e6:9.2f} "
            f"{sum(k.flops.values()) / 1e9:8.2f}  {k.instruction.name} {shape[:60]} "
            f"[{part(k)}] {k.source}"
        )
