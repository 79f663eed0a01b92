"""GPUs that a step can be compiled for without having one, and peak rates of known devices.

`target_devices(*find_target("h100x8"))` returns the devices of a topology. Pass them to
`make_experiment(devices=...)`; `describe.compile_step` then compiles for them. They run nothing.
"""

import dataclasses
import os
import re

import jax

from vit_jax.config import nearest
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, from NVIDIA's data sheet or architecture white paper unless noted.

    Rates are dense (half of the rates with 2:4 sparsity) with float32 accumulation. The compiler
    also needs `capability`, `cores`, `l2_mb`, and `clock_ghz`.
    """

    kind: str  # `device_kind` as JAX reports it: the driver's product name
    bf16: float  # TFLOP/s on bfloat16
    tf32: float  # TFLOP/s on TF32
    f32: float  # TFLOP/s on float32, without tensor cores
    bandwidth: float  # GB/s
    memory: float  # GB, of 10^9 bytes
    capability: float
    cores: int  # streaming multiprocessors
    l2_mb: float
    clock_ghz: float


TARGETS = {
    "t4": Gpu("Tesla T4", 8.1, 8.1, 8.1, 320, 15.8, 7.5, 40, 4, 1.59),
    "l4": Gpu("NVIDIA L4", 121, 60.5, 30.3, 300, 24, 8.9, 58, 48, 2.04),
    "a10": Gpu("NVIDIA A10", 125, 62.5, 31.2, 600, 24, 8.6, 72, 6, 1.695),
    # GeForce cards accumulate in float32 at half the rate of float16.
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 71, 35.6, 35.6, 936, 24, 8.6, 82, 6, 1.695),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6, 1008, 24, 8.9, 128, 72, 2.52),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 209.5, 105, 105, 1792, 32, 12.0, 170, 96, 2.41),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 312, 156, 19.5, 1555, 40, 8.0, 108, 40, 1.41),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 312, 156, 19.5, 2039, 80, 8.0, 108, 40, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 989, 494, 67, 3350, 80, 9.0, 132, 50, 1.98),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 756, 378, 51, 2039, 80, 9.0, 114, 50, 1.755),
    "h100-nvl": Gpu("NVIDIA H100 NVL", 835, 417, 60, 3900, 94, 9.0, 132, 50, 1.785),
    "h200": Gpu("NVIDIA H200", 989, 494, 67, 4800, 141, 9.0, 132, 50, 1.98),
    "b200": Gpu("NVIDIA B200", 2250, 1125, 75, 7700, 180, 10.0, 148, 126, 1.965),  # HGX B200
}

# By compute capability, from the CUDA C++ programming guide: threads and bytes of shared memory per
# multiprocessor, bytes of shared memory per block, and float32 lanes per multiprocessor.
_LIMITS = {
    7.5: (1024, 65536, 65536, 64),
    8.0: (2048, 167936, 166912, 64),
    8.6: (1536, 102400, 101376, 128),
    8.9: (1536, 102400, 101376, 128),
    9.0: (2048, 233472, 232448, 128),
    10.0: (2048, 233472, 232448, 128),
    12.0: (1536, 102400, 101376, 128),
}

# Peak TFLOP/s of other devices, for MFU: dense, on bfloat16 (float16 on V100 and T4) with float32
# accumulation. Names are compared exactly: a variant of a card (PCIe, NVL, laptop, a MIG slice)
# runs at other rates, and an unknown peak is better than a wrong one.
_TFLOPS: list[tuple] = [
    (125, "Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
    (112, "Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"),
    (65, "Tesla T4"),
    (312, "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
    (70, "NVIDIA A10G"),
    (181, "NVIDIA L40"),
    (362, "NVIDIA L40S"),
    (989, "NVIDIA GH200 120GB", "NVIDIA GH200 480GB", "NVIDIA GH200 144G HBM3e"),
    (835, "NVIDIA H200 NVL"),
    (2500, "NVIDIA GB200"),  # GB200 NVL72
    # Google Cloud TPU documentation, per chip. JAX calls v5e "v5 lite", v5p "v5", v6e "v6 lite".
    (275, "TPU v4"),
    (197, "TPU v5 lite", "TPU v5e"),
    (459, "TPU v5", "TPU v5p"),
    (918, "TPU v6 lite", "TPU v6e"),
]


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak FLOP/s of one device by its JAX `device_kind`, or None if it is unknown."""
    rows = [*_TFLOPS, *((gpu.bf16, gpu.kind) for gpu in TARGETS.values())]
    return next((tflops * 1e12 for tflops, *kinds in rows if device_kind in kinds), None)


def find_target(name: str) -> tuple[Gpu, int]:
    """Returns the GPU and the number of GPUs that a name such as 'h100x8' means.

    Raises UserError for an unknown name.
    """
    kind, _, count = name.rpartition("x")
    if name in TARGETS or not re.fullmatch("[1-9][0-9]{0,4}", count):
        kind, count = name, "1"
    if kind not in TARGETS:
        raise UserError(
            f"unknown target {name}{nearest(kind, TARGETS)}: use NAME or NAMExCOUNT, such as "
            f"h100x8, with one of {', '.join(TARGETS)}"
        )
    return TARGETS[kind], int(count)


def target_devices(gpu: Gpu, count: int) -> list[jax.Device]:
    """Returns the devices of a GPU topology, which can be used only for compilation.

    Hosts have eight GPUs each if 8 divides `count`; otherwise there is one host. Call this before
    JAX starts. Raises UserError if the GPU compiler is not installed.
    """
    from jax._src.cudnn import fused_attention_stablehlo
    from jax.experimental import topologies

    # To lower fused attention, JAX checks this machine's cuDNN version, which compilation ignores.
    fused_attention_stablehlo.check_cudnn_version = lambda: 91000
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin otherwise needs a driver
    jax.config.update("jax_platforms", "cpu")
    hosts, per_host = (count // 8, 8) if count % 8 == 0 else (1, count)
    try:
        return topologies.get_topology_desc(
            "", "cuda", target_config=_target_config(gpu), topology=f"1x{hosts}x{per_host}"
        ).devices
    except (NotImplementedError, RuntimeError) as e:
        raise UserError(
            "--target needs the GPU compiler, in the same version as JAX: "
            f"pip install 'vit-jax[gpu-check]' ({str(e).splitlines()[0]})"
        ) from e


def _target_config(gpu):
    """Returns XLA's description of a GPU, a GpuTargetConfigProto as text."""
    threads, shared, shared_per_block, lanes = _LIMITS[gpu.capability]
    major, minor = divmod(round(gpu.capability * 10), 10)
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major in (9, 10) else ""
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {threads}
  core_count: {gpu.cores}  fpus_per_core: {lanes}
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {shared_per_block}
  shared_memory_per_core: {shared}
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth * 1e9:.0f}  l2_cache_size: {gpu.l2_mb * 2**20:.0f}
  clock_rate_ghz: {gpu.clock_ghz}  device_memory_size: {gpu.memory * 1e9:.0f}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{gpu.kind}"
"""
