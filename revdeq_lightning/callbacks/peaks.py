"""Peak floating-point operations per second of GPUs, by vendor data, without structured sparsity."""

import re

import torch

PEAKS = {
    "B200": (2250, 1125, 75),
    "H200 NVL": (835, 417, 60),
    "H200": (989, 494, 67),
    "GH200": (989, 494, 67),
    "H100 NVL": (835, 417, 60),
    "H100 PCIe": (756, 378, 51),
    "H100": (989, 494, 67),
    "A100": (312, 156, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "RTX A6000": (154.8, 77.4, 38.7),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
    "V100": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1),
}
"""In 10^12 per second: matrix products of 16-bit numbers added in float32, of TF32, and of float32.

Source: NVIDIA's data sheets of the data center GPUs, of which those since Ampere state twice as much, with sparsity
(Blackwell: HGX B200), and its architecture white papers GA102, AD102 and Blackwell of the GeForce and RTX GPUs.
"""


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The peak of a GPU by its name, for products of this dtype; None if it is not known, or a variant or a part."""
    known = [key for key in PEAKS if re.search(rf"\b{key}\b", name, re.IGNORECASE)]
    is_variant = re.search(r"\b(Ti|D|Laptop|MIG)\b", name)
    if not known or is_variant or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    of_16_bits, of_tf32, of_float32 = PEAKS[max(known, key=len)]
    if dtype != torch.float32:
        return 1e12 * of_16_bits
    return 1e12 * (of_float32 if torch.get_float32_matmul_precision() == "highest" else of_tf32)
