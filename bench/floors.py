"""How fast the machine is at the two things that everything is made of: a matrix product and a copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.shapes import Shape
from bench.timing import Steps, clock, interleaved

GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}


@dataclass(frozen=True)
class Floors:
    """Measured in the same run as what is compared with them."""

    flops: float  # FLOPs a second of a large product in one dtype
    bytes: float  # bytes a second, read and written, of a large copy

    def milliseconds(self, shape: Shape, direction: str, element: int) -> float:
        """The least that a call can take: the longer of its arithmetic and its traffic."""
        return 1e3 * max(shape.flops(direction) / self.flops, shape.bytes(direction, element) / self.bytes)


def measure_floors(device: str, dtype: torch.dtype, seconds: float = 0.3) -> Floors:
    """A product of large random matrices and a copy of a large tensor, in turn."""
    size, length = GEMM_SIZE[device], COPY_BYTES[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(0, 256, (length,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    contenders = {
        "product": Steps([lambda: torch.mm(a, b, out=product)]),
        "copy": Steps([lambda: target.copy_(source)]),
    }
    times = interleaved(contenders, clock(device), seconds)
    return Floors(2e3 * size**3 / times["product"].median, 2e3 * length / times["copy"].median)
