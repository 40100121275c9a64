"""Attention, backward, on Hopper: the tiles and launches of hopper_backward_kernels.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_kernels.attention import config
from siglip_kernels.attention.forward import exponent_scale
from siglip_kernels.attention.hopper import boxes, readable_by_tma, require_hopper
from siglip_kernels.attention.hopper_backward_kernels import (
    CONSUMERS,
    attention_backward_keys_hopper_kernel,
    attention_backward_queries_hopper_kernel,
)
from siglip_kernels.attention.hopper_forward import ROWS


@dataclass(frozen=True)
class Tile:
    """Two consumers of 64 rows each, and how much of the other axis is loaded at once."""

    columns: int  # tokens of a stage
    stages: int
    slots: int  # for each consumer's rows


def tile(kernel: str, head_dim: int) -> Tile:
    """Of "queries" or "keys". Not measured on a GPU: the widest without a spill, in 227 KB of shared memory.

    Counted as in hopper.py: clocks of a quarter of a multiprocessor for 16 rows of scores, as many columns as a stage
    has tokens. "operands" are those that wgmma reads from shared memory.

    | D      | kernel  | tensor | operands | exponentials | alu | issue | share | portable        |
    |--------|---------|--------|----------|--------------|-----|-------|-------|-----------------|
    | 64     | queries | 768    | 512      | 512          | 324 | 488   | 100 % | 100 %           |
    |        | keys    | 512    | 384      | 256          | 314 | 431   | 100 % | 100 %           |
    | 72, 80 | queries | 960    | 640      | 512          | 326 | 531   | 100 % | 100 %           |
    |        | keys    | 640    | 480      | 256          | 320 | 473   | 100 % | 100 %           |
    | 96     | queries | 576    | 480      | 256          | 174 | 317   | 100 % | not counted     |
    |        | keys    | 768    | 576      | 256          | 342 | 486   | 100 % | not counted     |
    | 128    | queries | 768    | 640      | 256          | 166 | 326   | 100 % | 100 %           |
    |        | keys    | 512    | 512      | 128          | 208 | 296   | 100 % | 86 % (operands) |

    No pipe but the tensor pipe is the bound, here or there; what the portable kernels lack is exponentials beneath
    their products, loads that take no registers and no instructions of the same warps, and a program that goes on.
    """
    columns = sum(config.split_head_dim(head_dim))
    slots = 2 if columns <= 96 else 1
    if kernel == "queries":
        return Tile(128 if columns <= 80 else 64, 2, slots)
    return Tile(64 if columns <= 96 else 32, 3 if columns <= 80 else 2, slots)


def attention_backward_hopper(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    lengths: Tensor | None,
    scale: float,
    needs_q: bool,
    needs_k_or_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernels: backward.attention_backward's contract, for fp16 and bf16. What TMA cannot read is copied
    first, as in hopper.py. Raises UnsupportedInputError for fp32, and where the device is no Hopper."""
    gpu = require_hopper(q)
    batch, query_tokens, heads, head_dim = q.shape
    key_tokens = k.shape[1]
    q_grad = torch.empty(q.shape if needs_q else 0, dtype=q.dtype, device=q.device)
    k_grad, v_grad = (torch.empty(k.shape if needs_k_or_v else 0, dtype=q.dtype, device=q.device) for _ in range(2))
    if batch * heads == 0:
        return q_grad, k_grad, v_grad
    if query_tokens == 0 or key_tokens == 0:
        return q_grad.zero_(), k_grad.zero_(), v_grad.zero_()
    delta = torch.empty((batch, heads, query_tokens), dtype=torch.float32, device=q.device)
    q, k, v, out_grad = readable_by_tma(q), readable_by_tma(k), readable_by_tma(v), readable_by_tma(out_grad)
    rows = CONSUMERS.value * ROWS.value
    numbers = (heads, query_tokens, key_tokens)
    scales = (scale, exponent_scale(scale))

    chosen = tile("queries", head_dim)
    query_tiles = -(-query_tokens // rows)
    tiles = config.grid(batch * heads * query_tiles)
    attention_backward_queries_hopper_kernel[(min(tiles, gpu.multiprocessors),)](
        *boxes(ROWS.value, q, out_grad, out),
        *boxes(chosen.columns, k, v),
        *boxes(ROWS.value, q_grad if needs_q else out),
        log_sum_exp,
        delta,
        lengths,
        *numbers,
        query_tiles,
        tiles,
        *scales,
        SLOTS=chosen.slots,
        STAGES=chosen.stages,
        ONLY_DELTA=not needs_q,
        num_warps=4,
    )
    if needs_k_or_v:
        chosen = tile("keys", head_dim)
        key_tiles = -(-key_tokens // rows)
        tiles = config.grid(batch * heads * key_tiles)
        attention_backward_keys_hopper_kernel[(min(tiles, gpu.multiprocessors),)](
            *boxes(ROWS.value, k, v),
            *boxes(chosen.columns, q, out_grad),
            *boxes(ROWS.value, k_grad, v_grad),
            log_sum_exp,
            delta,
            lengths,
            *numbers,
            key_tiles,
            tiles,
            *scales,
            SLOTS=chosen.slots,
            STAGES=chosen.stages,
            num_warps=4,
        )
    return q_grad, k_grad, v_grad
