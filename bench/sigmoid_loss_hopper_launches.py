"""What the loss launches on Hopper with SIGLIP_KERNELS_HOPPER=1, for `bench.ahead_of_time` and `bench.inner_loop`."""

import os
from collections.abc import Iterator
from unittest import mock

import torch

from bench.ahead_of_time import Launch


def launches() -> Iterator[Launch]:
    """Training with several blocks and with one, and scalar gradients alone."""
    yield Launch("bf16 D=768 train, blocks", lambda: _run(torch.bfloat16, 6000, 768))
    yield Launch("fp16 D=1152 train, one block", lambda: _run(torch.float16, 1000, 1152))
    yield Launch("bf16 D=768 scalars", lambda: _run(torch.bfloat16, 1000, 768, gradients=False))


def _run(dtype: torch.dtype, pairs: int, width: int, gradients: bool = True) -> None:
    from siglip_kernels.sigmoid_loss.blocks import loss_and_gradients
    from siglip_kernels.sigmoid_loss.engines import make_engine

    x = torch.empty(pairs, width, dtype=dtype, device="meta")
    scalar = torch.empty((), device="meta")
    with mock.patch.dict(os.environ, SIGLIP_KERNELS_HOPPER="1"):
        loss_and_gradients(make_engine("triton", x), x, x, scalar, scalar, gradients, gradients, True)
