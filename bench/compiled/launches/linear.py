"""What the projections and the MLP launch: every epilogue, at the widths of so400m and base."""

import functools
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from bench.compiled.ahead_of_time import Launch

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_WIDTHS = {"so400m": (1152, 4304), "base": (768, 3072), "odd": (1151, 4303)}


def launches() -> Iterator[Launch]:
    """A training batch and a single image, other dtypes, a residual in fp32 (autocast), rows that do not align."""
    yield from _layer("so400m", 46_656)
    yield from _layer("base", 46_656, only=("qkv", "fc2, residual"))
    yield from _layer("so400m", 729, only=("gelu, kept", "fc2, residual", "gelu backward"))
    yield from _layer("so400m", 46_656, torch.float16, only=("gelu backward",))
    yield from _layer("odd", 46_656, only=("gelu, kept", "fc2, residual", "gelu backward"))
    yield from _layer("odd", 46_656, torch.float32, only=("fc2, residual", "gelu backward"))
    for allow_tf32 in (False, True):
        yield from _layer("so400m", 46_656, torch.float32, allow_tf32, ("gelu, kept", "fc2, residual", "gelu backward"))


def _layer(
    model: str,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    allow_tf32: bool = False,
    only: tuple[str, ...] | None = None,
) -> Iterator[Launch]:
    """The products of one encoder layer that are not cuBLAS's, forward and backward: all, or `only` some."""
    from siglip_kernels.gemm.kernels import gemm

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width, hidden = _WIDTHS[model]
    x, h = empty(tokens, width), empty(tokens, hidden)
    fc1, fc2, square = empty(hidden, width), empty(width, hidden), empty(width, width)
    b_hidden, b_width = empty(hidden), empty(width)
    backward = functools.partial(gemm, gelu="backward", pre_activation=h, keep_column_sums=True)
    calls: dict[str, Callable[[], object]] = {
        "qkv": lambda: gemm(x, [square] * 3, [b_width] * 3),
        "bias, residual": lambda: gemm(x, [square], [b_width], residual=x),
        "gelu": lambda: gemm(x, [fc1], [b_hidden], gelu="forward"),
        "gelu, kept": lambda: gemm(x, [fc1], [b_hidden], gelu="forward", keep_pre_activation=True),
        "fc2, residual": lambda: gemm(h, [fc2], [b_width], residual=x),
        "fc2, fp32 residual": lambda: gemm(h, [fc2], [b_width], residual=empty(tokens, width, dtype=torch.float32)),
        "gelu backward": lambda: backward(x, [fc2.T], [None], keep_activation=True),
        "gelu backward, frozen weight": lambda: backward(x, [fc2.T], [None]),
    }
    for epilogue, call in calls.items():
        if only is None or epilogue in only:
            name = f"{'tf32' if allow_tf32 else _NAMES[dtype]} {model} {tokens} {epilogue}"
            yield Launch(name, functools.partial(_with_tf32, allow_tf32, call))


def _with_tf32(allow_tf32: bool, call: Callable[[], object]) -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision  # type: ignore[attr-defined]
    settings.fp32_precision = "tf32" if allow_tf32 else "ieee"  # type: ignore[attr-defined]
    try:
        call()
    finally:
        settings.fp32_precision = before  # type: ignore[attr-defined]


_HOPPER_IN_FP16 = ("bias, residual", "kept", "weight")


def hopper_launches() -> Iterator[Launch]:
    """Every epilogue at so400m's widths, a residual stream in fp32 among them; some in fp16 at a smaller size."""
    yield from _layer_on_hopper(1152, 4304, 46_656, torch.bfloat16)
    in_fp16 = _layer_on_hopper(768, 3072, 1024, torch.float16)
    yield from (launch for launch in in_fp16 if launch.name.endswith(_HOPPER_IN_FP16))


def _layer_on_hopper(width: int, hidden: int, tokens: int, dtype: torch.dtype) -> Iterator[Launch]:
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
