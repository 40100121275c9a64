"""Launches of the pooling head's attention: widths of published models, a batch and one image."""

from collections.abc import Iterator

import torch

from bench.compiled.launch import NAMES, Launch

# so400m, for which some GPUs have too little shared memory, and base.
PUBLISHED = "^bf16 (64 x 729 x 1152|1 x 196 x 768) "


def launches() -> Iterator[Launch]:
    """Training of so400m, the widest that fits; one image of it and of base; and base with padded samples."""
    yield from _training(64, 729, 1152, 16, torch.bfloat16)
    yield from _training(1, 729, 1152, 16, torch.bfloat16)
    yield from _training(1, 196, 768, 12, torch.bfloat16)
    yield from _training(256, 196, 768, 12, torch.float16, padded=True)


def _training(
    batch: int, tokens: int, width: int, heads: int, dtype: torch.dtype, padded: bool = False
) -> Iterator[Launch]:
    name = f"{NAMES[dtype]} {batch} x {tokens} x {width}{' lengths' if padded else ''}"

    def run(backward: bool) -> None:
        from siglip_kernels.attention_pool.config import fits
        from siglip_kernels.attention_pool.kernels import attention_pool_backward, attention_pool_forward

        x = torch.empty(batch, tokens, width, dtype=dtype, device="meta")
        if not fits(x, heads):  # the operation runs in PyTorch
            return
        folded = torch.empty(heads, width, dtype=dtype, device="meta")
        pooled = torch.empty(batch, heads, width, dtype=dtype, device="meta")
        statistics = torch.empty(batch, heads, device="meta")
        lengths = torch.empty(batch, dtype=torch.int32, device="meta") if padded else None
        if backward:
            attention_pool_backward(pooled, x, folded, pooled, statistics, statistics, 0.1, lengths, True, True)
        else:
            attention_pool_forward(x, folded, 0.1, lengths)

    yield Launch(f"{name} forward", lambda: run(False))
    yield Launch(f"{name} backward", lambda: run(True))
