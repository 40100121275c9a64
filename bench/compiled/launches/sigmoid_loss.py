"""What the sigmoid loss launches: training and inference, one block of pairs and several."""

import os
from collections.abc import Iterator
from unittest import mock

import torch

from bench.compiled.ahead_of_time import Launch


def launches() -> Iterator[Launch]:
    """Several blocks of pairs exercise every variant of the kernels; one block writes its results directly."""
    yield Launch("bf16 D=768 train, blocks", lambda: _run(torch.bfloat16, 12_000, 768))
    yield Launch("bf16 D=1152 train, blocks", lambda: _run(torch.bfloat16, 12_000, 1152))
    yield Launch("bf16 D=768 inference", lambda: _run(torch.bfloat16, 1000, 768, train=False))
    yield Launch("fp16 D=72 train, one block", lambda: _run(torch.float16, 1000, 72))
    yield Launch("fp32 D=768 train, one block", lambda: _run(torch.float32, 1000, 768))
    yield Launch("tf32 D=768 train, one block", lambda: _run(torch.float32, 1000, 768, allow_tf32=True))


def _run(dtype: torch.dtype, pairs: int, width: int, train: bool = True, allow_tf32: bool = False) -> None:
    from siglip_kernels.sigmoid_loss.blocks import loss_and_gradients
    from siglip_kernels.sigmoid_loss.engines import make_engine

    x = torch.empty(pairs, width, dtype=dtype, device="meta")
    scalar = torch.empty((), device="meta")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        engine = make_engine("triton", x)
        loss_and_gradients(engine, x, x, scalar, scalar, train, train, train)
        if train:
            engine.scale(torch.empty(pairs, width, dtype=engine.saved_dtype, device="meta"), scalar, 1.0, x)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def hopper_launches() -> Iterator[Launch]:
    """Training with several blocks and with one, and scalar gradients alone."""
    yield Launch("bf16 D=768 train, blocks", lambda: _run_on_hopper(torch.bfloat16, 6000, 768))
    yield Launch("fp16 D=1152 train, one block", lambda: _run_on_hopper(torch.float16, 1000, 1152))
    yield Launch("bf16 D=768 scalars", lambda: _run_on_hopper(torch.bfloat16, 1000, 768, gradients=False))


def _run_on_hopper(dtype: torch.dtype, pairs: int, width: int, gradients: bool = True) -> None:
    from siglip_kernels.sigmoid_loss.blocks import loss_and_gradients
    from siglip_kernels.sigmoid_loss.engines import make_engine

    x = torch.empty(pairs, width, dtype=dtype, device="meta")
    scalar = torch.empty((), device="meta")
    with mock.patch.dict(os.environ, SIGLIP_KERNELS_HOPPER="1"):
        loss_and_gradients(make_engine("triton", x), x, x, scalar, scalar, gradients, gradients, True)
