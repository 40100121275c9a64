"""A launch to compile, the GPUs to compile it for, and two switches: TF32 and kernels for one architecture."""

import dataclasses
import os
from collections.abc import Callable
from unittest import mock

import torch

from siglip_kernels.device import Facts

# Shared memory is the limit of one program (CUDA C++ programming guide, compute capabilities).
GPUS = {
    "a100": Facts("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912, 40 * 2**20),
    "rtx3090": Facts("NVIDIA GeForce RTX 3090", (8, 6), 82, 101_376, 6 * 2**20),
    "rtx4090": Facts("NVIDIA GeForce RTX 4090", (8, 9), 128, 101_376, 72 * 2**20),
    "h200": Facts("NVIDIA H200", (9, 0), 132, 232_448, 50 * 2**20),
    "b200": Facts("NVIDIA B200", (10, 0), 148, 232_448, 126 * 2**20),
    "rtx5090": Facts("NVIDIA GeForce RTX 5090", (12, 0), 170, 101_376, 96 * 2**20),
}


def architecture(gpu: str) -> str:
    """The architecture of a GPU of GPUS: sm_90 of h200."""
    major, minor = GPUS[gpu].capability
    return f"sm_{major}{minor}"


# Both kinds of names that select a GPU: its own, and its architecture, which stands for the first GPU that has it.
BY_NAME = {**{architecture(gpu): gpu for gpu in reversed(GPUS)}, **{gpu: gpu for gpu in GPUS}}

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A named call of a launcher on tensors of the `meta` device."""

    name: str
    call: Callable[[], object]


def precision_name(dtype: torch.dtype, allow_tf32: bool = False) -> str:
    """bf16, fp16, fp32, or tf32 for fp32 operands in TF32 products."""
    return "tf32" if allow_tf32 else NAMES[dtype]


def with_tf32(allow_tf32: bool, call: Callable[[], object]) -> Callable[[], None]:
    """The call with fp32 products in TF32 or in fp32."""

    def launch() -> None:
        settings = torch.backends.cuda.matmul
        before = settings.fp32_precision  # type: ignore[attr-defined]
        settings.fp32_precision = "tf32" if allow_tf32 else "ieee"  # type: ignore[attr-defined]
        try:
            call()
        finally:
            settings.fp32_precision = before  # type: ignore[attr-defined]

    return launch


def with_kernels_for(family: str, call: Callable[[], object]) -> Callable[[], None]:
    """The call with the kernels for "hopper" or "blackwell"."""

    def launch() -> None:
        with mock.patch.dict(os.environ, {f"SIGLIP_KERNELS_{family.upper()}": "1"}):
            call()

    return launch
