"""The machine's roofline: the measured rates of a large GEMM and of a large copy, and the least time they allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bench.cases.shapes import Shape
from bench.measure.timing import Steps, Timing

GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2**29, "cpu": 2**26}


@dataclass(frozen=True)
class Roofline:
    """Rates that were measured in turn with the contenders."""

    flops: float  # FLOPs per second of a large GEMM in one dtype
    bytes: float  # bytes per second, read and written, of a large copy

    def milliseconds(self, shape: Shape, direction: str, element: int) -> float:
        """The least time of a call: the longer of its arithmetic and its traffic."""
        return 1e3 * max(shape.flops(direction) / self.flops, shape.bytes(direction, element) / self.bytes)


class RooflineProbe:
    """A GEMM of large random matrices and a copy of a large tensor, to be timed in turn with contenders."""

    PRODUCT, COPY = "roofline: GEMM", "roofline: copy"

    def __init__(self, device: str, dtype: torch.dtype):
        self.size, self.length = GEMM_SIZE[device], COPY_BYTES[device]
        a, b = (torch.randn(self.size, self.size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        source = torch.randint(0, 256, (self.length,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.contenders = {
            self.PRODUCT: Steps([lambda: torch.mm(a, b, out=product)]),
            self.COPY: Steps([lambda: target.copy_(source)]),
        }

    def roofline(self, times: Mapping[str, Timing]) -> Roofline:
        """The roofline from the times of `contenders`."""
        product, copy = times[self.PRODUCT].median, times[self.COPY].median
        return Roofline(2e3 * self.size**3 / product, 2e3 * self.length / copy)
