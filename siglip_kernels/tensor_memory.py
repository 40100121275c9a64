"""Blackwell's tensor memory under its names in each Triton version: 3.9 renamed two functions."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import blackwell

OLDER = gl.constexpr(hasattr(blackwell, "get_tmem_reg_layout"))  # before 3.9; reinterpret is _reinterpret there


@gluon.constexpr_function
def register_layout(shape: list[int], layout: Any, warps: int, instruction: str = "32x32b") -> Any:
    """The layout with which `warps` load and store such a block of fp32. layout: in tensor memory.

    instruction: the shape of tcgen05.ld, "32x32b" with a row per thread or "16x256b" as the results of mma.
    """
    if OLDER:
        return blackwell.get_tmem_reg_layout(gl.float32, shape, layout, warps, instruction)
    block = blackwell.tensor_memory_descriptor_type(gl.float32, shape, layout, shape)
    return block.get_reg_layout(warps, instruction)
