"""Peak arithmetic rates of known devices, for MFU.

The rates are the vendors' dense matrix rates on bfloat16 inputs (float16 on V100 and T4) with
float32 accumulation: half the rate, where a data sheet lists only that with 2:4 sparsity.
"""

# TFLOP/s per device, and `device_kind` as JAX reports it: on NVIDIA GPUs, the driver's product
# name. Names are compared exactly: a variant of a card (PCIe, NVL, laptop, a MIG slice) runs at
# other rates, and an unknown peak is better than a wrong one.
_TFLOPS: list[tuple] = [
    # NVIDIA data sheets.
    (125, "Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
    (112, "Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"),
    (65, "Tesla T4"),
    (312, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"),
    (312, "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
    (125, "NVIDIA A10"),
    (70, "NVIDIA A10G"),
    (121, "NVIDIA L4"),  # 242 sparse
    (181, "NVIDIA L40"),
    (362, "NVIDIA L40S"),
    (989, "NVIDIA H100 80GB HBM3", "NVIDIA H200"),  # 1,979 sparse
    (989, "NVIDIA GH200 120GB", "NVIDIA GH200 480GB", "NVIDIA GH200 144G HBM3e"),
    (835, "NVIDIA H100 NVL", "NVIDIA H200 NVL"),  # 1,671 sparse
    (756, "NVIDIA H100 PCIe"),  # 1,513 sparse
    (2250, "NVIDIA B200"),  # 4,500 sparse, of HGX B200
    (2500, "NVIDIA GB200"),  # 5,000 sparse, of GB200 NVL72
    # NVIDIA architecture white papers (GA102, Ada, RTX Blackwell): GeForce cards run float32
    # accumulation at half the rate of float16 accumulation.
    (71, "NVIDIA GeForce RTX 3090"),
    (165.2, "NVIDIA GeForce RTX 4090"),
    (209.5, "NVIDIA GeForce RTX 5090"),
    # Google Cloud TPU documentation, per chip. JAX calls v5e "v5 lite", v5p "v5", v6e "v6 lite".
    (275, "TPU v4"),
    (197, "TPU v5 lite", "TPU v5e"),
    (459, "TPU v5", "TPU v5p"),
    (918, "TPU v6 lite", "TPU v6e"),
]


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak FLOP/s of one device by its JAX `device_kind`, or None if it is unknown."""
    return next((tflops * 1e12 for tflops, *kinds in _TFLOPS if device_kind in kinds), None)
