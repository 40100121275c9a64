"""Peak rates of usual GPUs, for the model's FLOP/s utilisation (MFU)."""

from __future__ import annotations

import re

import torch

# TFLOP/s of dense bfloat16 products with sums in fp32, as public training code has them. They were not checked against
# the makers' data sheets, some of which state the double, of sparse ones. By a part of the name that PyTorch reports:
# the first that is in it counts.
_PEAKS = {
    "GB200": 2500,
    "B200": 2250,
    "H[12]00 NVL": 835,
    "H[18]00 PCIe": 756,
    "H100|H200|H800|GH200": 989,
    "A100|A800": 312,
    "A30": 165,
    "A40": 150,
    "A10": 125,
    "A10G": 70,
    "RTX A6000": 155,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX 6000 Ada": 364,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 209,
    "MI300X|MI325X": 1307,
}
_OTHER = re.compile(r"\b(MIG|GRID|Laptop|Ti|D)\b|-\d+[ABCQ]\b")  # a part of a GPU, or a slower or faster sibling


def peak_tflops(device: torch.device) -> float | None:
    """Of a device, if it is known; a CPU is not."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """Of a GPU by its name, such as "NVIDIA H100 80GB HBM3"."""
    if _OTHER.search(name):
        return None
    return next((peak for part, peak in _PEAKS.items() if re.search(rf"\b({part})\b", name)), None)
