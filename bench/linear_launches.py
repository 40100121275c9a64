"""What the projections and the MLP launch, for `bench.ahead_of_time`: every epilogue, widths of so400m and base."""

from collections.abc import Iterator

import torch

from bench.ahead_of_time import Launch

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_WIDTHS = {"so400m": (1152, 4304), "base": (768, 3072)}


def launches() -> Iterator[Launch]:
    """Training shapes, then those of one image, other dtypes, and a residual stream in fp32 (autocast)."""
    for model in _WIDTHS:
        yield from _layer(model, 46_656)
    yield from _layer("so400m", 729)
    yield from _layer("so400m", 46_656, torch.float16)
    yield from _layer("so400m", 46_656, torch.float32)
    yield from _layer("so400m", 46_656, torch.float32, allow_tf32=True)


def _layer(model: str, tokens: int, dtype: torch.dtype = torch.bfloat16, allow_tf32: bool = False) -> Iterator[Launch]:
    """The products of one encoder layer that are not cuBLAS's."""
    from siglip_kernels.linear.gemm import gemm

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def launch(epilogue: str, *arguments, **options) -> Launch:
        def call() -> None:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = allow_tf32
            try:
                gemm(*arguments, **options)
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return Launch(f"{'tf32' if allow_tf32 else _NAMES[dtype]} {model} {tokens} {epilogue}", call)

    width, hidden = _WIDTHS[model]
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
