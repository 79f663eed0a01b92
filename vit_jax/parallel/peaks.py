"""Peak arithmetic rates of known devices, for MFU.

The rates are the vendors' dense (no structured sparsity) matrix rates on 16-bit inputs with float32
accumulation: bfloat16, except for the two GPUs without bfloat16 units (V100 and T4), where they are
float16 rates. If a data sheet lists only the rate with 2:4 sparsity, the value is half of it.
"""

# `device_kind` as JAX reports it -> FLOP/s per device. On NVIDIA GPUs it is the driver's product
# name. Names are compared exactly: a variant of a card (PCIe, NVL, laptop, a MIG slice) runs at
# other rates, and an unknown peak is better than a wrong one.
PEAK_FLOPS = {
    # NVIDIA data sheets: V100 (SXM2, PCIe) and T4, float16.
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla V100-PCIE-16GB": 112e12,
    "Tesla V100-PCIE-32GB": 112e12,
    "Tesla T4": 65e12,
    # NVIDIA data sheets: A100 (one rate for SXM4 and PCIe), A10, and A10G.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    # NVIDIA data sheets: L4 (242 sparse), L40, and L40S.
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    # NVIDIA data sheets, sparse: H100 SXM, H200 SXM, and GH200 1,979; H100 PCIe 1,513; NVL 1,671.
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 120GB": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    # NVIDIA Blackwell data sheet, sparse, per GPU: HGX B200 4,500; GB200 NVL72 5,000.
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    # NVIDIA architecture white papers (GA102, Ada, RTX Blackwell): GeForce cards run float32
    # accumulation at half the rate of float16 accumulation.
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    # Google Cloud TPU documentation, per chip. JAX calls v5e "v5 lite", v5p "v5", v6e "v6 lite".
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak FLOP/s of one device by its JAX `device_kind`, or None if it is unknown."""
    return PEAK_FLOPS.get(device_kind)
