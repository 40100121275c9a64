"""Attention, forward, on Hopper: when hopper_kernel.py can take a call, with which tiles, and its launch."""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from siglip_kernels.attention import config
from siglip_kernels.attention.forward import exponent_scale
from siglip_kernels.attention.hopper_forward import ROWS, attention_forward_hopper_kernel
from siglip_kernels.device import Facts, facts
from siglip_kernels.errors import unsupported

_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_KEYS = 128  # of a step


@dataclass(frozen=True)
class Tile:
    """The work of one program at a time: `consumers` × 64 queries by `keys` keys."""

    consumers: int
    keys: int
    stages: int
    consumer_registers: int  # of a thread
    producer_registers: int


def tile(head_dim: int, query_tokens: int, last: int, has_lengths: bool) -> Tile:
    """Not measured on a GPU. As few tiles of queries as two or three consumers allow. Three only where all fits 160
    registers a thread: beyond 64 columns the accumulators spill, and wgmma wait for each other; and without lengths so
    do the scores of a first step (last_keys) as wide as all the others.

    Counted by `python -m bench.inner_loop bench.attention_hopper_launches bench.attention_launches` with triton 3.7.1:
    clocks of a quarter of a multiprocessor for 16 × 128 scores, and what share of the tensor pipe's peak the busiest
    pipe allows, here and in the portable kernel, whose loop issues no exponential beneath its products.

    | D      | tensor | exponentials | fma | alu | issue | share | portable         |
    |--------|--------|--------------|-----|-----|-------|-------|------------------|
    | 64     | 512    | 528          | 170 | 226 | 423   | 97 %  | 70 % (issue)     |
    | 72, 80 | 640    | 528          | 176 | 230 | 462   | 100 % | 76 % (issue)     |
    | 96     | 768    | 528          | 184 | 230 | 483   | 100 % | 91 % at 88 (issue) |
    | 128    | 1024   | 528          | 200 | 230 | 465   | 100 % | 100 %            |

    So all exponentials stay on the special-function units: at 64, where those are the bound, an eighth of them as a
    polynomial would win at most 3 %, for half of the clocks in which nothing is issued.
    """
    columns = sum(config.split_head_dim(head_dim))
    units = -(-query_tokens // ROWS.value)
    stages = 3 if columns <= 96 else 2
    fits = columns <= 64 and (last < _KEYS or has_lengths)
    if fits and -(-units // 3) * 3 <= -(-units // 2) * 2:
        return Tile(3, _KEYS, stages, 160, 32)
    return Tile(2, _KEYS, stages, 240, 24)


def last_keys(key_tokens: int, keys: int, has_lengths: bool) -> tuple[int, int]:
    """(LAST, FIRST_PART): how many columns the step with the last keys has, and the first of its parts.

    As many as they need, in one or two powers of two, at least 16 each: 729 keys are 5 tiles of 128 and 32 + 64. With
    lengths any number may be left: a whole tile. (0, 0) where whole tiles are all there is.
    """
    if has_lengths:
        return keys, keys
    left = key_tokens % keys
    wide, narrow = config.split_head_dim(left) if left else (0, 0)
    return wide + narrow, narrow or wide


def require_hopper(q: Tensor) -> Facts:
    """The facts of q's device, where the Hopper kernels can take it."""
    gpu = facts(q.device)
    if gpu.capability != (9, 0):
        raise unsupported("attention", "q", f"is on {gpu.name}", "Hopper (sm_90), as SIGLIP_KERNELS_HOPPER=1 asks for")
    if q.dtype not in _ELEMENTS:
        got = f"has dtype {q.dtype}"
        raise unsupported("attention", "q", got, "float16, bfloat16 with SIGLIP_KERNELS_HOPPER=1")
    return gpu


def boxes(tokens: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """Two descriptors of each (B, S, H, D), with boxes of so many tokens of one head: for the two parts of its columns,
    the second None where there is one."""
    descriptors: list[TensorDescriptor | None] = []
    for tensor in tensors:
        for columns in config.split_head_dim(tensor.shape[3]):
            box = [1, tokens, 1, columns]
            layout = gl.NVMMASharedLayout.get_default_for(box, _ELEMENTS[tensor.dtype])
            descriptors.append(TensorDescriptor.from_tensor(tensor, box, layout) if columns else None)
    return descriptors


def readable_by_tma(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where TMA cannot read it: rows that do not start at multiples of 16 bytes, or repeat."""
    if tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 and stride > 0 for stride in tensor.stride()[:3]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # .contiguous() would keep what only starts off


def attention_forward_hopper(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, keep_log_sum_exp: bool
) -> tuple[Tensor, Tensor]:
    """Launches the kernel: forward.attention_forward's contract, for fp16 and bf16.

    q, k, v: unit stride along D. Strides that do not divide by 8, and expanded axes, are copied first: TMA cannot read
    them. Raises UnsupportedInputError for fp32, and where the device is no Hopper.
    """
    batch, query_tokens, heads, head_dim = q.shape
    key_tokens = k.shape[1]
    gpu = require_hopper(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_sum_exp = torch.empty(
        (batch, heads, query_tokens) if keep_log_sum_exp else 0, dtype=torch.float32, device=q.device
    )
    if out.numel() == 0:
        return out, log_sum_exp
    if key_tokens == 0:
        return out.zero_(), log_sum_exp.fill_(float("inf"))
    last, first_part = last_keys(key_tokens, _KEYS, lengths is not None)
    chosen = tile(head_dim, query_tokens, last, lengths is not None)
    query_tiles = -(-query_tokens // (chosen.consumers * ROWS.value))
    tiles = config.grid(batch * heads * query_tiles)
    attention_forward_hopper_kernel[(min(tiles, gpu.multiprocessors),)](
        *boxes(ROWS.value, readable_by_tma(q)),
        *boxes(chosen.keys, readable_by_tma(k), readable_by_tma(v)),
        *boxes(ROWS.value, out),
        log_sum_exp if keep_log_sum_exp else None,
        lengths,
        heads,
        query_tokens,
        key_tokens,
        query_tiles,
        tiles,
        exponent_scale(scale),
        LAST=last,
        FIRST_PART=first_part,
        STAGES=chosen.stages,
        CONSUMERS=chosen.consumers,
        CONSUMER_REGISTERS=chosen.consumer_registers,
        PRODUCER_REGISTERS=chosen.producer_registers,
        NEGATIVE_SCALE=scale < 0,
        num_warps=4,
    )
    return out, log_sum_exp
