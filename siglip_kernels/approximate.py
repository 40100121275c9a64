"""Functions by the single instructions that Triton does not choose by itself.

`reciprocal` and `log2` use the special-function unit, to a relative 2⁻²² within the stated range, and `tanh` to 2⁻¹¹;
tl.log2 and a division handle the whole range of their operands, denormal numbers included, and take ten instructions
more. The others are exact. Triton's interpreter has no inline assembly; there plain operations stand in.
"""

import triton
import triton.language as tl

from siglip_kernels.interpreter import INTERPRETED


@triton.jit
def reciprocal(x):
    """1 / x for 1 <= x <= inf, in fp32."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def tanh(x):
    """The hyperbolic tangent in fp32, to a relative 2⁻¹¹: in the interpreter it is rounded to as many bits."""
    if INTERPRETED:
        bits = (1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))).to(tl.uint32, bitcast=True)
        return ((bits + 0x800) & 0xFFFFF000).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log2(x):
    """The binary logarithm of 2 <= x <= inf, in fp32. Near 1 the instruction is accurate to an absolute 2⁻²² only."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def saturated_fma(x, y, z):
    """x y + z in fp32, rounded once and limited to [0, 1]; 0 if it is not a number."""
    if INTERPRETED:
        result = x * y + z
        return tl.where(result >= 0.0, tl.minimum(result, 1.0), 0.0)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def widen(x):
    """x in fp32. A pair of bf16 in a register takes two instructions; left to itself the compiler spends three."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
