"""What the launchers of the GEMMs for Hopper and for Blackwell share: checks, descriptors, arguments of the kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from siglip_kernels.device import facts
from siglip_kernels.errors import unsupported
from siglip_kernels.gemm.epilogue import PIECE
from siglip_kernels.gemm.ring import BLOCK_BYTES

GROUP = 8  # row tiles that are computed together, so that their operands stay in the L2
HALF = (torch.float16, torch.bfloat16)


def check_supported(
    a: Tensor,
    out: Tensor,
    capability: tuple[int, int],
    gpus: str,
    switch: str,
    dtypes: tuple[torch.dtype, ...] = HALF,
) -> None:
    """Raises UnsupportedInputError unless the kernel supports the product `out` (M, N) of `a` (M, K) and a weight.

    gpus: what has the capability, as messages call it; switch: the setting that selects the kernel; dtypes: of a.
    """
    gpu = facts(a.device)
    if gpu.capability != capability:
        raise unsupported("linear", "x", f"is on {gpu.name}", f"{gpus} with {switch}")
    if a.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise unsupported("linear", "x", f"has dtype {a.dtype}", f"{names} with {switch}")
    for name, matrix in (("in_features", a), ("out_features", out)):
        extent, unit = matrix.shape[1], max(8, 16 // matrix.element_size())
        if extent == 0 or extent % unit:
            raise unsupported("linear", name, f"is {extent}", f"multiples of {unit} with {switch}")


def stages(rows: int, columns: int, buffers: int, out_dtype: torch.dtype, shared_memory: int) -> int:
    """As many stages of the operands of a tile as fit beside the epilogue's buffers and 1 KiB for the barriers."""
    epilogue = buffers * rows * PIECE.value * out_dtype.itemsize + 1024
    return (shared_memory - epilogue) // ((rows + columns) * BLOCK_BYTES)


def arguments(
    a: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    outs: list[Tensor],
    *,
    transposed: bool,
    residual: Tensor | None,
    gelu: str,
    pre_activation: Tensor | None,
    activation: Tensor | None,
    partial_sums: Tensor | None,
    block_rows: int,
    block_columns: int,
) -> dict[str, Any]:
    """The kernels' arguments by name: descriptors of blocks of [block_rows, block_columns], pointers, extents.

    The other arguments are those of `launch`.
    """
    rows, depth = a.shape
    block_depth = BLOCK_BYTES // a.element_size()
    result_block = [block_rows, PIECE.value]
    weight_block = [block_depth, block_columns] if transposed else [block_columns, block_depth]
    weight, weight_second, weight_third = _by_part([descriptor(weight, weight_block) for weight in weights])
    bias, bias_second, bias_third = _by_part(biases)
    out, out_second, out_third = _by_part([descriptor(out, result_block) for out in outs])
    added = pre_activation if gelu == "backward" else residual
    if added is not None:
        added = added.to(outs[0].dtype)  # results leave from the buffers that it is loaded into
    second_out = activation if gelu == "backward" else pre_activation
    return dict(
        a=descriptor(a, [block_rows, block_depth]),
        weight=weight,
        weight_second=weight_second,
        weight_third=weight_third,
        bias=bias,
        bias_second=bias_second,
        bias_third=bias_third,
        added=None if added is None else descriptor(added, result_block),
        second_out=None if second_out is None else descriptor(second_out, result_block),
        out=out,
        out_second=out_second,
        out_third=out_third,
        column_sums=partial_sums,
        rows=rows,
        COLUMNS=outs[0].shape[1],
        DEPTH=depth,
        PARTS=len(outs),
        TRANSPOSED=transposed,
        GELU=gelu,
    )


def buffers_of(added: bool, second_out: bool, pieces: int) -> int:
    """How many pieces of a tile the epilogue keeps in shared memory (epilogue.py)."""
    return pieces + second_out if added else 2


def _by_part(values: Sequence[Any]) -> tuple[Any, Any, Any]:
    """A kernel argument of its three parts, such as weight, weight_second and weight_third; None beyond `values`."""
    first, second, third = (*values, None, None)[:3]
    return first, second, third


_GLUON_DTYPES = {
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.float32: gl.float32,
}


def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """The tensor descriptor of a matrix with rows of unit stride, or of a copy if not all rows start at multiples of 16
    bytes."""
    unit = max(8, 16 // matrix.element_size())
    stride = matrix.stride(0) if matrix.shape[0] > 1 else -(-matrix.shape[1] // unit) * unit
    if matrix.data_ptr() % 16 or stride * matrix.element_size() % 16:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
        stride = matrix.shape[1]
    layout = gl.NVMMASharedLayout.get_default_for(block, _GLUON_DTYPES[matrix.dtype])
    return TensorDescriptor(matrix, list(matrix.shape), [stride, 1], block, layout)
