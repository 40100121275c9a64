"""Attention on data-centre Blackwell: the launcher of the Gluon kernel in blackwell_forward.py."""

from torch import Tensor

from siglip_kernels.attention import config
from siglip_kernels.attention.blackwell_forward import KEYS, ROWS, TILES, attention_forward_blackwell_kernel
from siglip_kernels.attention.forward import exponent_scale, results_to_write
from siglip_kernels.attention.hopper import boxes, readable_by_tma, require_gpu


def attention_forward_blackwell(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, keep_log_sum_exp: bool
) -> tuple[Tensor, Tensor]:
    """Launches the kernel, with the contract of `forward.attention_forward` for fp16 and bf16.

    q, k, v: unit stride along D; copied first where `readable_by_tma` says so. Raises as `require_gpu` does. With
    lengths every partition reads global memory, and ptxas keeps the descriptor for that on the stack, beside what it
    keeps there without them: 24 bytes.
    """
    batch, query_tokens, heads, head_dim = q.shape
    key_tokens = k.shape[1]
    gpu = require_gpu(q, (10, 0), "data-centre Blackwell (sm_100)", "SIGLIP_KERNELS_BLACKWELL=1")
    out, log_sum_exp = results_to_write(q, keep_log_sum_exp)
    if out.numel() == 0:
        return out, log_sum_exp
    if key_tokens == 0:
        return out.zero_(), log_sum_exp.fill_(float("inf"))
    query_tiles = -(-query_tokens // (TILES.value * ROWS.value))
    tiles = config.grid(batch * heads * query_tiles)
    attention_forward_blackwell_kernel[(min(tiles, gpu.multiprocessors),)](
        **boxes(ROWS.value, q=readable_by_tma(q), out=out),
        **boxes(KEYS.value, k=readable_by_tma(k), v=readable_by_tma(v)),
        log_sum_exp=log_sum_exp if keep_log_sum_exp else None,
        lengths=lengths,
        heads=heads,
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        query_tiles=query_tiles,
        tiles=tiles,
        exponent_scale=exponent_scale(scale),
        STAGES=3 if sum(config.split_head_dim(head_dim)) <= 96 else 2,
        WEIGH_REGISTERS=192,
        OTHER_REGISTERS=48,
        NEGATIVE_SCALE=scale < 0,
        num_warps=4,
    )
    return out, log_sum_exp
