"""Functions by one instruction of the special-function unit, to a relative 2⁻²² within the stated range.

tl.log2 and a division handle the whole range of their operands, denormal numbers included, and take ten instructions
more. Triton's interpreter has no inline assembly; there the exact functions stand in.
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
def log2(x):
    """The binary logarithm of 2 <= x <= inf, in fp32. Near 1 the instruction is accurate to an absolute 2⁻²² only."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
