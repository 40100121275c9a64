"""What attention launches on Hopper with SIGLIP_KERNELS_HOPPER=1, for `bench.ahead_of_time` and `bench.inner_loop`."""

from collections.abc import Callable, Iterator

import torch

from bench.ahead_of_time import Launch

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def launches() -> Iterator[Launch]:
    """Each head dim once; two and three consumers; with and without a narrower last step, lengths and statistics."""
    yield _forward(729, 72, torch.bfloat16)
    yield _forward(729, 72, torch.bfloat16, padded=True)
    yield _forward(1024, 64, torch.bfloat16)
    yield _forward(729, 64, torch.bfloat16)
    yield _forward(729, 64, torch.bfloat16, padded=True)
    yield _forward(577, 80, torch.float16)
    yield _forward(577, 96, torch.bfloat16)
    yield _forward(1024, 128, torch.bfloat16)
    yield _forward(729, 128, torch.float16, padded=True)


def _forward(tokens: int, head_dim: int, dtype: torch.dtype, padded: bool = False) -> Launch:
    name = f"{_NAMES[dtype]} S={tokens} D={head_dim}{' lengths' if padded else ''} forward"
    return Launch(name, _call(tokens, head_dim, dtype, padded))


def _call(tokens: int, head_dim: int, dtype: torch.dtype, padded: bool) -> Callable[[], object]:
    def launch() -> object:
        from siglip_kernels.attention.hopper import attention_forward_hopper

        q, k, v = torch.empty(64, tokens, 3, 16, head_dim, device="meta", dtype=dtype).unbind(2)
        lengths = torch.empty(64, device="meta", dtype=torch.int32) if padded else None
        return attention_forward_hopper(q, k, v, lengths, head_dim**-0.5, True)

    return launch
