"""Two operations that Triton's interpreter (3.6 to 3.9) computes wrongly in bf16: products of tiles, and rounding.

The interpreter takes the bits of tl.dot's bf16 operands for integers, and truncates to bf16 where a GPU rounds.
`INTERPRETED` is a constant: on a GPU `dot` is tl.dot and `narrow` a conversion, and nothing else is compiled.
"""

import triton
import triton.language as tl

from siglip_kernels.device import interpreting

# Fixed at import, as @triton.jit itself decides then whether a kernel is interpreted.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 x in the dtype, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # a NaN of many set bits would be carried over into a number
    return x.to(dtype)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """a b + accumulator in fp32. PRECISION: of fp32 operands, "ieee" or "tf32"."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)
