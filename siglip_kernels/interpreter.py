"""Two operations that Triton's interpreter (3.6 to 3.9) computes wrongly: products of tiles, and rounding.

The interpreter takes the bits of tl.dot's bf16 operands for integers, and truncates to bf16 where a GPU rounds. To fp8
(e4m3) it rounds ties away from zero, loses a carry from the mantissa (-124 becomes -64), wraps around beyond 448 and
makes a number of NaN; from fp8 it reads NaN as 480.
`INTERPRETED` is a constant: on a GPU `dot` is tl.dot and `narrow` a conversion, and nothing else is compiled.
"""

import triton
import triton.language as tl

from siglip_kernels.device import interpreting

# Fixed at import, as @triton.jit itself decides then whether a kernel is interpreted.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def _e4m3(x):
    """fp32 x rounded to e4m3, as cvt.rn.satfinite does: beyond 448 to 448, NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # whose last bit is 2⁻⁹, as that of e4m3 below 2⁻⁶
    rounded = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    rounded = tl.minimum(tl.maximum(rounded, -448.0), 448.0)
    codes = rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(x == x, codes, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _from_e4m3(x):
    """x in fp32."""
    is_nan = (x.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F
    return tl.where(is_nan, float("nan"), x.to(tl.float32))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 x in the dtype, rounded to nearest, ties to even. To fp8 (e4m3) it saturates."""
    if INTERPRETED and dtype == tl.float8e4nv:
        return _e4m3(x)
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # a NaN of many set bits would be carried over into a number
    return x.to(dtype)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """a b + accumulator in fp32. PRECISION: of fp32 operands, "ieee" or "tf32"."""
    if INTERPRETED and a.dtype == tl.float8e4nv:
        a = _from_e4m3(a)
        b = _from_e4m3(b)
    elif INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)
