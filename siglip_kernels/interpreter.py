"""What Triton's interpreter gets wrong about bf16 (3.6 to 3.7), put right: products of tiles and rounding.

It takes the bits of tl.dot's bf16 operands for integers, and cuts numbers off to bf16 where a GPU rounds them. Kernels
get `INTERPRETED` as a constant, so that nothing of this is compiled for a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 x in the dtype, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """a b + accumulator in fp32. PRECISION: of fp32 operands, "ieee" or "tf32"."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)
