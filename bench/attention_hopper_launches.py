"""What attention launches on Hopper with SIGLIP_KERNELS_HOPPER=1, for `bench.ahead_of_time` and `bench.inner_loop`."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.ahead_of_time import Launch

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def launches() -> Iterator[Launch]:
    """Each head dim once; two and three consumers; with and without a narrower last step, lengths and statistics."""
    for tokens, head_dim, dtype, padded in (
        (729, 72, torch.bfloat16, False),
        (729, 72, torch.bfloat16, True),
        (1024, 64, torch.bfloat16, False),
        (729, 64, torch.bfloat16, False),
        (729, 64, torch.bfloat16, True),
        (767, 64, torch.bfloat16, False),
        (577, 80, torch.float16, False),
        (577, 96, torch.bfloat16, False),
        (1024, 128, torch.bfloat16, False),
        (729, 128, torch.float16, True),
    ):
        name = f"{_NAMES[dtype]} S={tokens} D={head_dim}{' lengths' if padded else ''}"
        yield Launch(f"{name} forward", _forward(tokens, head_dim, dtype, padded))
        if (tokens, head_dim) not in ((729, 64), (767, 64)):  # the backward has two consumers always
            yield Launch(f"{name} backward", _backward(tokens, head_dim, dtype, padded))


def _tensors(tokens: int, head_dim: int, dtype: torch.dtype, padded: bool) -> tuple[list[Tensor], Tensor | None]:
    packed = torch.empty(64, tokens, 3, 16, head_dim, device="meta", dtype=dtype)
    return list(packed.unbind(2)), torch.empty(64, device="meta", dtype=torch.int32) if padded else None


def _forward(tokens: int, head_dim: int, dtype: torch.dtype, padded: bool) -> Callable[[], object]:
    def launch() -> object:
        from siglip_kernels.attention.hopper import attention_forward_hopper

        (q, k, v), lengths = _tensors(tokens, head_dim, dtype, padded)
        return attention_forward_hopper(q, k, v, lengths, head_dim**-0.5, True)

    return launch


def _backward(tokens: int, head_dim: int, dtype: torch.dtype, padded: bool) -> Callable[[], object]:
    def launch() -> object:
        from siglip_kernels.attention.hopper import attention_backward_hopper

        (q, k, v), lengths = _tensors(tokens, head_dim, dtype, padded)
        out = torch.empty(q.shape, device="meta", dtype=dtype)
        statistics = torch.empty(q.shape[0], q.shape[2], tokens, device="meta")
        return attention_backward_hopper(out, q, k, v, out, statistics, lengths, head_dim**-0.5, True, True)

    return launch
