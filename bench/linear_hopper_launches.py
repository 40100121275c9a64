"""What the products launch on Hopper with SIGLIP_KERNELS_HOPPER=1, for `bench.ahead_of_time` and `bench.inner_loop`."""

import os
from collections.abc import Iterator
from unittest import mock

import torch

from bench.ahead_of_time import Launch

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_IN_FP16 = ("bias, residual", "kept", "weight")


def launches() -> Iterator[Launch]:
    """Every epilogue at so400m's widths, a residual stream in fp32 among them; some in fp16 at a smaller size."""
    yield from _layer(1152, 4304, 46_656, torch.bfloat16)
    yield from (launch for launch in _layer(768, 3072, 1024, torch.float16) if launch.name.endswith(_IN_FP16))


def _layer(width: int, hidden: int, tokens: int, dtype: torch.dtype) -> Iterator[Launch]:
    """The products of one encoder layer."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def launch(epilogue: str, *arguments, **options) -> Launch:
        def call() -> None:
            from siglip_kernels.gemm.kernels import gemm

            with mock.patch.dict(os.environ, SIGLIP_KERNELS_HOPPER="1"):
                gemm(*arguments, **options)

        return Launch(f"{_NAMES[dtype]} {tokens}x{width} {epilogue}", call)

    x, h = empty(tokens, width), empty(tokens, hidden)
    fc1, fc2, square = empty(hidden, width), empty(width, hidden), empty(width, width)
    b_hidden, b_width = empty(hidden), empty(width)
    yield launch("qkv", x, [square] * 3, [b_width] * 3)
    yield launch("bias, residual", x, [square], [b_width], residual=x)
    yield launch("gelu", x, [fc1], [b_hidden], gelu="forward")
    yield launch("gelu, kept", x, [fc1], [b_hidden], gelu="forward", keep_pre_activation=True)
    yield launch("fc2, residual", h, [fc2], [b_width], residual=x)
    yield launch("fc2, fp32 residual", h, [fc2], [b_width], residual=empty(tokens, width, dtype=torch.float32))
    kept = {"gelu": "backward", "pre_activation": h, "keep_column_sums": True}
    yield launch("gelu backward", x, [fc2.T], [None], **kept, keep_activation=True)
    yield launch("gelu backward, frozen weight", x, [fc2.T], [None], **kept)
