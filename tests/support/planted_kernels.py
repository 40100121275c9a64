"""Small kernels with one fault each, and two without: what `bench.compiled` must report, and what it must not.

    python tests/support/planted_kernels.py

compiles them without a GPU and prints their rows as JSON.
"""

import dataclasses
import json

import torch
import triton
import triton.language as tl

from bench.compiled import ahead_of_time
from bench.compiled.launch import GPUS, Launch

WITHOUT_TENSOR_CORES = "sm_75"  # those of this architecture are not Triton's, which compiles products to multiply-adds
GPUS[WITHOUT_TENSOR_CORES] = dataclasses.replace(GPUS["a100"], name=WITHOUT_TENSOR_CORES, capability=(7, 5))


@triton.jit
def spilling_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets).to(tl.float32)
    for _ in range(3):
        x = x * tl.sum(x)
    tl.store(y_ptr + offsets, x)


@triton.jit
def product_kernel(x_ptr, y_ptr, depth, SIZE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)
    accumulator = tl.zeros([SIZE, SIZE], tl.float32)
    for k in tl.range(0, depth, num_stages=STAGES):
        x = tl.load(x_ptr + k * SIZE * SIZE + offsets)
        y = tl.load(y_ptr + k * SIZE * SIZE + offsets)
        accumulator = tl.dot(x, y, accumulator, input_precision=PRECISION)
    tl.store(y_ptr + offsets, accumulator.to(y_ptr.dtype.element_ty))


def product(dtype: torch.dtype, size: int = 32, precision: str = "ieee", stages: int = 2) -> None:
    x = torch.empty(1, device="meta", dtype=dtype)
    product_kernel[(1,)](x, x, 100, SIZE=size, PRECISION=precision, STAGES=stages)


def elementwise(registers: int | None) -> None:
    x = torch.empty(1, device="meta", dtype=torch.bfloat16)
    spilling_kernel[(1,)](x, x, SIZE=4096, num_warps=1, maxnreg=registers)


def broken() -> None:
    product(torch.bfloat16, size=31)  # not a power of two


LAUNCHES = (
    ("a spill", "a100", lambda: elementwise(32)),
    ("no product", "a100", lambda: elementwise(None)),
    ("shared memory", "rtx4090", lambda: product(torch.float16, 128, stages=5)),
    ("half precision without matrix instructions", WITHOUT_TENSOR_CORES, lambda: product(torch.float16)),
    ("tf32 without matrix instructions", WITHOUT_TENSOR_CORES, lambda: product(torch.float32, precision="tf32")),
    ("half precision", "rtx5090", lambda: product(torch.bfloat16)),
    ("tf32", "a100", lambda: product(torch.float32, precision="tf32")),
    ("fp32", "a100", lambda: product(torch.float32)),
    ("does not compile", "a100", broken),
)

if __name__ == "__main__":
    rows = [ahead_of_time.compile_launches(iter([Launch(name, call)]), gpu) for name, gpu, call in LAUNCHES]
    print(json.dumps([dataclasses.asdict(row) for (row,) in rows]))
