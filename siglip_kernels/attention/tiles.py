"""Tiles of a head, shared by the attention kernels: loads, stores and products.

Rows are tokens. A tile [rows, D] is held as two blocks, [rows, MAIN] and [rows, TAIL], so that head dim 72 costs
64 + 16 columns of products and not 128; the columns of TAIL beyond D are zeros. With TAIL = 0 there is one block, and
the variable for the other is never used.
"""

import triton
import triton.language as tl

from siglip_kernels.interpreter import dot, narrow


def stride_names(*tensors: str) -> list[str]:
    """The kernel parameters for what `strides.strides_of` returns: strides of batch, token and head of each tensor."""
    return [f"{tensor}_{axis}_stride" for tensor in tensors for axis in ("batch", "token", "head")]


@triton.jit
def load_block(pointer, offsets, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[rows, WIDTH] from column FIRST on. offsets: [rows]. valid: [rows], or None if every row is.

    Zeros in invalid rows and beyond HEAD_DIM.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + (offsets[:, None] + columns[None, :])
    if valid is None:
        if FIRST + WIDTH <= HEAD_DIM:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        if FIRST + WIDTH <= HEAD_DIM:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=valid[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_tile(
    pointer, offsets, valid, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # -> [rows, MAIN], [rows, TAIL]
    main = load_block(pointer, offsets, valid, 0, MAIN, HEAD_DIM)
    tail = main
    if TAIL > 0:
        tail = load_block(pointer, offsets, valid, MAIN, TAIL, HEAD_DIM)
    return main, tail


@triton.jit
def store_tile(
    pointer,
    offsets,
    valid,
    main,
    tail,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    element: tl.constexpr = pointer.dtype.element_ty
    columns = tl.arange(0, MAIN)
    mask = valid[:, None]
    if MAIN > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    tl.store(pointer + (offsets[:, None] + columns[None, :]), narrow(main, element), mask=mask)
    if TAIL > 0:
        columns = MAIN + tl.arange(0, TAIL)
        mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(pointer + (offsets[:, None] + columns[None, :]), narrow(tail, element), mask=mask)


@triton.jit
def inner_products(a_main, a_tail, b_main, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ of two tiles, fp32 [rows of a, rows of b]."""
    products = dot(a_main, tl.trans(b_main), None, PRECISION)
    if TAIL > 0:
        products = dot(a_tail, tl.trans(b_tail), products, PRECISION)
    return products


@triton.jit
def accumulate(weights, b_main, b_tail, main, tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """(main, tail) + weights b, for weights [n, rows of b] in b's dtype and a tile (main, tail) of n rows, fp32."""
    main = dot(weights, b_main, main, PRECISION)
    if TAIL > 0:
        tail = dot(weights, b_tail, tail, PRECISION)
    return main, tail
