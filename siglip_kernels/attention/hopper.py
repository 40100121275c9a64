"""Attention, forward, on Hopper: when hopper_kernel.py can take a call, with which tiles, and its launch."""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from siglip_kernels.attention import configuration
from siglip_kernels.attention.forward import exponent_scale
from siglip_kernels.attention.hopper_kernel import ROWS, attention_forward_hopper_kernel
from siglip_kernels.device import facts
from siglip_kernels.errors import unsupported

_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True)
class Tile:
    """The work of one program at a time: `consumers` × 64 queries by `keys` keys."""

    consumers: int
    keys: int
    stages: int
    consumer_registers: int  # of a thread
    producer_registers: int


def tile(head_dim: int, query_tokens: int) -> Tile:
    columns = sum(configuration.split_head_dim(head_dim))
    units = -(-query_tokens // ROWS.value)
    three_fit = columns <= 80
    if three_fit and -(-units // 3) * 3 <= -(-units // 2) * 2:
        return Tile(3, 128, 2, 160, 32)
    return Tile(2, 128, 2, 240, 24)


def last_keys(key_tokens: int, keys: int, has_lengths: bool) -> tuple[int, int]:
    """(LAST, LAST_MAIN): how many columns the step with the last keys has, and its first part.

    As many as they need, in one or two powers of two, at least 16 each: 729 keys are 5 tiles of 128 and 64 + 32. With
    lengths any number may be left: a whole tile. None where whole tiles are all there is.
    """
    if has_lengths:
        return keys, keys
    left = key_tokens % keys
    main, tail = configuration.split_head_dim(left) if left else (0, 0)
    return main + tail, main


def _described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    box = [1, rows, 1, columns]
    return TensorDescriptor.from_tensor(tensor, box, gl.NVMMASharedLayout.get_default_for(box, _ELEMENTS[tensor.dtype]))


def _readable_by_tma(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where TMA cannot read it: rows that do not start at multiples of 16 bytes, or repeat."""
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:3])
    repeats = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor if aligned and not repeats else tensor.contiguous()


def attention_forward_hopper(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, keep_log_sum_exp: bool
) -> tuple[Tensor, Tensor]:
    """Launches the kernel: forward.attention_forward's contract, for fp16 and bf16.

    q, k, v: unit stride along D. Strides that do not divide by 8, and expanded axes, are copied first: TMA cannot read
    them. Raises UnsupportedInputError for fp32.
    """
    batch, query_tokens, heads, head_dim = q.shape
    key_tokens = k.shape[1]
    if q.dtype not in _ELEMENTS:
        raise unsupported("attention", "q", f"has dtype {q.dtype} with the Hopper kernels", "float16, bfloat16")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_sum_exp = torch.empty(
        (batch, heads, query_tokens) if keep_log_sum_exp else 0, dtype=torch.float32, device=q.device
    )
    if out.numel() == 0:
        return out, log_sum_exp
    if key_tokens == 0:
        return out.zero_(), log_sum_exp.fill_(float("inf"))
    chosen = tile(head_dim, query_tokens)
    main, tail = configuration.split_head_dim(head_dim)
    last, last_main = last_keys(key_tokens, chosen.keys, lengths is not None)
    query_tiles = -(-query_tokens // (chosen.consumers * ROWS.value))
    tiles = configuration.grid(batch * heads * query_tiles)
    parts = [
        _described(tensor, rows, columns)
        for tensor, rows in (
            (_readable_by_tma(q), ROWS.value),
            (_readable_by_tma(k), chosen.keys),
            (_readable_by_tma(v), chosen.keys),
            (out, ROWS.value),
        )
        for columns in (main, tail or main)
    ]
    attention_forward_hopper_kernel[(min(tiles, facts(q.device).multiprocessors),)](
        *parts,
        log_sum_exp if keep_log_sum_exp else None,
        lengths,
        heads,
        query_tokens,
        key_tokens,
        query_tiles,
        tiles,
        exponent_scale(scale),
        MAIN=main,
        TAIL=tail,
        KEYS=chosen.keys,
        LAST=last,
        LAST_MAIN=last_main,
        STAGES=chosen.stages,
        CONSUMERS=chosen.consumers,
        CONSUMER_REGISTERS=chosen.consumer_registers,
        PRODUCER_REGISTERS=chosen.producer_registers,
        NEGATIVE_SCALE=scale < 0,
        num_warps=4,
    )
    return out, log_sum_exp
