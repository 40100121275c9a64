"""Attention on Hopper: launchers of the Gluon kernels in hopper_forward.py and hopper_backward.py, and their tiles."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from siglip_kernels.attention import config
from siglip_kernels.attention.backward import gradients_to_write
from siglip_kernels.attention.exact_delta import exact_delta
from siglip_kernels.attention.forward import exponent_scale, results_to_write
from siglip_kernels.attention.hopper_backward import (
    CONSUMERS,
    attention_backward_keys_hopper_kernel,
    attention_backward_queries_hopper_kernel,
)
from siglip_kernels.attention.hopper_forward import ROWS, attention_forward_hopper_kernel
from siglip_kernels.device import Facts, facts
from siglip_kernels.errors import unsupported

_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def require_gpu(q: Tensor, capability: tuple[int, int], gpus: str, switch: str) -> Facts:
    """The facts of q's device. Raises UnsupportedInputError unless it has the capability and q is fp16 or bf16.

    gpus: what has the capability, as messages call it; switch: the setting that selects the kernel.
    """
    gpu = facts(q.device)
    if gpu.capability != capability:
        raise unsupported("attention", "q", f"is on {gpu.name}", f"{gpus} with {switch}")
    if q.dtype not in _ELEMENTS:
        raise unsupported("attention", "q", f"has dtype {q.dtype}", f"float16, bfloat16 with {switch}")
    return gpu


def require_hopper(q: Tensor) -> Facts:
    """`require_gpu` for Hopper."""
    return require_gpu(q, (9, 0), "Hopper (sm_90)", "SIGLIP_KERNELS_HOPPER=1")


def boxes(tokens: int, **tensors: Tensor) -> dict[str, TensorDescriptor | None]:
    """The kernels' arguments for tensors (B, S, H, D): two descriptors each, with boxes of `tokens` tokens of one head.

    {name}_main and {name}_tail are the two parts of a head's columns; the tail is None where there is one part.
    """
    descriptors: dict[str, TensorDescriptor | None] = {}
    for name, tensor in tensors.items():
        for part, columns in zip(("main", "tail"), config.split_head_dim(tensor.shape[3]), strict=True):
            box = [1, tokens, 1, columns]
            layout = gl.NVMMASharedLayout.get_default_for(box, _ELEMENTS[tensor.dtype])
            descriptor = TensorDescriptor.from_tensor(tensor, box, layout) if columns else None
            descriptors[f"{name}_{part}"] = descriptor
    return descriptors


def box_of_statistics(statistics: Tensor, tokens: int) -> TensorDescriptor:
    """The descriptor of statistics (B · H, 2, Sq), with boxes of both of `tokens` tokens of one head."""
    box = [1, 2, tokens]
    return TensorDescriptor.from_tensor(statistics, box, gl.NVMMASharedLayout.get_default_for(box, gl.float32))


def readable_by_tma(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where TMA cannot read it: rows not aligned to 16 bytes, or expanded axes."""
    if tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 and stride > 0 for stride in tensor.stride()[:3]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # .contiguous() would keep a misaligned start


_KEYS = 128  # per step of the forward kernel


@dataclass(frozen=True)
class ForwardTile:
    """One step of a program computes the scores of `consumers` × 64 queries with `keys` keys."""

    consumers: int  # warpgroups
    keys: int
    stages: int  # of keys and values in shared memory
    consumer_registers: int  # per thread
    producer_registers: int


def forward_tile(head_dim: int, query_tokens: int, last: int, has_lengths: bool) -> ForwardTile:
    """The tile of `attention_forward_hopper_kernel`. Not measured on a GPU.

    Two or three consumers, whichever makes fewer tiles of queries. Three need all to fit 160 registers per thread:
    beyond 64 columns the accumulators spill, and then wgmmas are serialised; so do, without lengths, the scores of a
    first step (`last_keys`) that is as wide as the others.

    Counted by `python -m bench count attention_hopper attention --gpu h200` with triton 3.7.1: clocks of a quarter of a
    multiprocessor for 16 × 128 scores, and the share of the tensor pipe's peak that the busiest pipe allows, here and
    in the portable kernel, whose loop issues no exponential beneath its products. "shared": operands of wgmma in shared
    memory, and what TMA writes there; with three consumers 405 at D = 64.

    | D      | tensor | shared | exponentials | fma | alu | issue | share | portable         |
    |--------|--------|--------|--------------|-----|-----|-------|-------|------------------|
    | 64     | 512    | 448    | 528          | 170 | 226 | 423   | 97 %  | 97 % (MUFU)      |
    | 72, 80 | 640    | 560    | 528          | 176 | 230 | 462   | 100 % | 100 %            |
    | 96     | 768    | 672    | 528          | 184 | 230 | 483   | 100 % | 93 % (shared)    |
    | 128    | 1024   | 896    | 528          | 200 | 230 | 465   | 100 % | 95 % (shared)    |

    So all exponentials stay on the special-function units: at D = 64, where those are the bound, computing an eighth of
    them by a polynomial would gain at most 3 % and take half of the free issue slots.
    """
    columns = sum(config.split_head_dim(head_dim))
    units = -(-query_tokens // ROWS.value)
    stages = 3 if columns <= 96 else 2
    fits = columns <= 64 and (last < _KEYS or has_lengths)
    if fits and -(-units // 3) * 3 <= -(-units // 2) * 2:
        return ForwardTile(3, _KEYS, stages, 160, 32)
    return ForwardTile(2, _KEYS, stages, 240, 24)


def last_keys(key_tokens: int, keys: int, has_lengths: bool) -> tuple[int, int]:
    """(LAST, FIRST_PART): the columns of the step with the last keys, and of the first of its one or two parts.

    Each part is a power of two of at least 16 columns, and both are as narrow as the keys left over by whole tiles
    allow: 729 keys are 5 tiles of 128 and 32 + 64. With lengths any number may be left over, so LAST is a whole tile.
    (0, 0) where no keys are left over.
    """
    if has_lengths:
        return keys, keys
    left = key_tokens % keys
    wide, narrow = config.split_head_dim(left) if left else (0, 0)
    return wide + narrow, narrow or wide


def attention_forward_hopper(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, keep_log_sum_exp: bool
) -> tuple[Tensor, Tensor]:
    """Launches the kernel, with the contract of `forward.attention_forward` for fp16 and bf16.

    q, k, v: unit stride along D; copied first where `readable_by_tma` says so. Raises as `require_hopper` does.
    """
    batch, query_tokens, heads, head_dim = q.shape
    key_tokens = k.shape[1]
    gpu = require_hopper(q)
    out, log_sum_exp = results_to_write(q, keep_log_sum_exp)
    if out.numel() == 0:
        return out, log_sum_exp
    if key_tokens == 0:
        return out.zero_(), log_sum_exp.fill_(float("inf"))
    last, first_part = last_keys(key_tokens, _KEYS, lengths is not None)
    chosen = forward_tile(head_dim, query_tokens, last, lengths is not None)
    query_tiles = -(-query_tokens // (chosen.consumers * ROWS.value))
    tiles = config.grid(batch * heads * query_tiles)
    attention_forward_hopper_kernel[(min(tiles, gpu.multiprocessors),)](
        **boxes(ROWS.value, q=readable_by_tma(q), out=out),
        **boxes(chosen.keys, k=readable_by_tma(k), v=readable_by_tma(v)),
        log_sum_exp=log_sum_exp if keep_log_sum_exp else None,
        lengths=lengths,
        heads=heads,
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        query_tiles=query_tiles,
        tiles=tiles,
        exponent_scale=exponent_scale(scale),
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


@dataclass(frozen=True)
class BackwardTile:
    """Two consumers own 64 rows of scores each; one step computes `columns` columns."""

    columns: int  # tokens per stage
    stages: int
    slots: int  # buffers for each consumer's rows: with two, the next tile's are loaded early
    in_registers: int  # how many of its two tiles of rows a consumer keeps in registers


def backward_tile(kernel: str, head_dim: int) -> BackwardTile:
    """The tile of the kernel that owns "queries" or "keys". Not measured on a GPU.

    The widest that does not spill in its loop and fits 227 KB of shared memory. Counted as in `forward_tile`: clocks of
    a quarter of a multiprocessor for 16 rows × `columns` of scores. "shared" has the loads of statistics too.

    | D      | kernel  | tensor | shared | exponentials | alu | issue | share | portable        |
    |--------|---------|--------|--------|--------------|-----|-------|-------|-----------------|
    | 64     | queries | 768    | 640    | 512          | 324 | 488   | 100 % | 100 %           |
    |        | keys    | 512    | 450    | 256          | 196 | 335   | 100 % | 82 % (shared)   |
    | 72, 80 | queries | 960    | 800    | 512          | 326 | 531   | 100 % | 100 %           |
    |        | keys    | 640    | 530    | 256          | 194 | 371   | 100 % | 87 % (shared)   |
    | 96     | queries | 576    | 384    | 256          | 164 | 303   | 100 % | 82 % (shared)   |
    |        | keys    | 768    | 706    | 256          | 194 | 372   | 100 % | 61 % (shared)   |
    | 128    | queries | 768    | 512    | 256          | 164 | 294   | 100 % | 83 % (shared)   |
    |        | keys    | 512    | 513    | 128          | 98  | 219   | 100 % | 64 % (shared)   |

    The tensor pipe is the bound here. With rows in shared memory alone, it would be shared memory for the kernel that
    owns keys: 578 clocks at D = 64, 690 at 72, 802 at 96, 641 at 128. The other would have as many clocks of both from
    D = 96 on. There the first would spill in its loop with both keys and values in registers. The portable kernels lack
    exponentials beneath their products, loads without registers and instructions of the same warps, and persistent
    programs.
    """
    columns = sum(config.split_head_dim(head_dim))
    if kernel == "queries":
        if columns <= 80:
            return BackwardTile(128, 2, 2, 0)
        return BackwardTile(64, 2, 2 if columns <= 96 else 1, 2)
    if columns <= 80:
        return BackwardTile(64, 4, 1, 2)
    return BackwardTile(64, 2, 2, 1) if columns <= 96 else BackwardTile(32, 4, 1, 1)


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
    packed_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernels, with the contract of `backward.attention_backward` for fp16 and bf16.

    Copies and raises as `attention_forward_hopper` does.
    """
    gpu = require_hopper(q)
    batch, query_tokens, heads, head_dim = q.shape
    key_tokens = k.shape[1]
    q_grad, k_grad, v_grad = gradients_to_write(q, k, needs_q, needs_k_or_v, packed_grad)
    if batch * heads == 0:
        return q_grad, k_grad, v_grad
    if query_tokens == 0 or key_tokens == 0:
        return q_grad.zero_(), k_grad.zero_(), v_grad.zero_()
    # Log-sum-exp and delta. TMA reads rows of whole 16 bytes.
    statistics_row = -(-query_tokens // 4) * 4
    statistics = torch.empty((batch * heads, 2, statistics_row), dtype=torch.float32, device=q.device)
    q, k, v, out_grad = readable_by_tma(q), readable_by_tma(k), readable_by_tma(v), readable_by_tma(out_grad)
    delta = torch.empty((batch, heads, query_tokens), dtype=torch.float32, device=q.device)
    exact_delta(out_grad, q, k, v, out, log_sum_exp, delta, lengths, scale)
    rows = CONSUMERS.value * ROWS.value
    same_in_both: dict[str, Any] = dict(
        lengths=lengths,
        heads=heads,
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        scale=scale,
        exponent_scale=exponent_scale(scale),
        num_warps=4,
    )

    chosen = backward_tile("queries", head_dim)
    query_tiles = -(-query_tokens // rows)
    tiles = config.grid(batch * heads * query_tiles)
    attention_backward_queries_hopper_kernel[(min(tiles, gpu.multiprocessors),)](
        **boxes(ROWS.value, q=q, out_grad=out_grad, out=out, q_grad=q_grad if needs_q else out),
        **boxes(chosen.columns, k=k, v=v),
        **same_in_both,
        log_sum_exp=log_sum_exp,
        exact_delta=delta,
        statistics=statistics,
        query_tiles=query_tiles,
        tiles=tiles,
        statistics_row=statistics_row,
        SLOTS=chosen.slots,
        STAGES=chosen.stages,
        IN_REGISTERS=chosen.in_registers,
        ONLY_DELTA=not needs_q,
    )
    if needs_k_or_v:
        chosen = backward_tile("keys", head_dim)
        key_tiles = -(-key_tokens // rows)
        tiles = config.grid(batch * heads * key_tiles)
        attention_backward_keys_hopper_kernel[(min(tiles, gpu.multiprocessors),)](
            **boxes(ROWS.value, k=k, v=v, k_grad=k_grad, v_grad=v_grad),
            **boxes(chosen.columns, q=q, out_grad=out_grad),
            **same_in_both,
            statistics=box_of_statistics(statistics[:, :, :query_tokens], chosen.columns),
            key_tiles=key_tiles,
            tiles=tiles,
            SLOTS=chosen.slots,
            STAGES=chosen.stages,
            IN_REGISTERS=chosen.in_registers,
        )
    return q_grad, k_grad, v_grad
