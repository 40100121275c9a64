"""Launches of the projections and the MLP: every epilogue, at the widths of so400m and base."""

import functools
from collections.abc import Callable, Iterator

import torch

from bench.compiled.launch import NAMES, Launch, precision_name, with_kernels_for, with_tf32

PUBLISHED = "^bf16 (so400m 46656 |base 196 gelu$|base 64 fc2, residual$)"  # every epilogue; small tiles, a split depth
HOPPER_PUBLISHED = BLACKWELL_PUBLISHED = "^bf16 46656x1152 "

_WIDTHS = {"so400m": (1152, 4304), "base": (768, 3072), "odd": (1151, 4303)}


def launches() -> Iterator[Launch]:
    """A training batch, other dtypes, an fp32 residual (autocast), rows that do not align; then small batches."""
    yield from _layer("so400m", 46_656)
    yield from _layer("base", 46_656, only=("qkv", "fc2, residual"))
    yield from _layer("so400m", 729, only=("gelu, kept", "fc2, residual", "gelu backward"))
    yield from _layer("so400m", 46_656, torch.float16, only=("gelu backward",))
    yield from _layer("odd", 46_656, only=("gelu, kept", "fc2, residual", "gelu backward"))
    yield from _layer("odd", 46_656, torch.float32, only=("fc2, residual", "gelu backward"))
    for allow_tf32 in (False, True):
        yield from _layer("so400m", 46_656, torch.float32, allow_tf32, ("gelu, kept", "fc2, residual", "gelu backward"))
    yield from _small_batches()


def _small_batches() -> Iterator[Launch]:
    """One image, one text and one pooled row: smaller tiles, and a depth that several programs share."""
    yield from _layer("so400m", 256, only=("gelu", "fc2, residual"))
    image = ("qkv", "bias, residual", "gelu", "fc2, residual", "fc2, fp32 residual", "gelu backward")
    yield from _layer("base", 196, only=image)
    yield from _layer("base", 64, only=("gelu", "fc2, residual"))
    yield from _layer("base", 1, only=("gelu", "fc2, residual"))
    yield from _layer("odd", 64, only=("gelu, kept", "fc2, residual"))
    for allow_tf32 in (False, True):
        yield from _layer("base", 196, torch.float32, allow_tf32, ("gelu", "fc2, residual"))


def hopper_launches() -> Iterator[Launch]:
    """Every epilogue at so400m's widths, including an fp32 residual; some in fp16 at a smaller size."""
    yield from _layers_with_kernels_for("hopper")


def blackwell_launches() -> Iterator[Launch]:
    """The same."""
    yield from _layers_with_kernels_for("blackwell")


def _layers_with_kernels_for(family: str) -> Iterator[Launch]:
    yield from _layer_with_kernels_for(family, 1152, 4304, 46_656, torch.bfloat16)
    in_fp16 = _layer_with_kernels_for(family, 768, 3072, 1024, torch.float16)
    yield from (launch for launch in in_fp16 if launch.name.endswith(("bias, residual", "kept", "weight")))


def _layer(
    model: str,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    allow_tf32: bool = False,
    only: tuple[str, ...] | None = None,
) -> Iterator[Launch]:
    """The products of an encoder layer with the portable kernels: all, or `only` some."""
    for epilogue, call in _products(*_WIDTHS[model], tokens, dtype).items():
        if only is None or epilogue in only:
            name = f"{precision_name(dtype, allow_tf32)} {model} {tokens} {epilogue}"
            yield Launch(name, with_tf32(allow_tf32, call))


def _layer_with_kernels_for(family: str, width: int, hidden: int, tokens: int, dtype: torch.dtype) -> Iterator[Launch]:
    for epilogue, call in _products(width, hidden, tokens, dtype).items():
        yield Launch(f"{NAMES[dtype]} {tokens}x{width} {epilogue}", with_kernels_for(family, call))


def _products(width: int, hidden: int, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The GEMMs of one encoder layer with a fused epilogue, forward and backward, by epilogue."""
    from siglip_kernels.gemm.kernels import gemm

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, h = empty(tokens, width), empty(tokens, hidden)
    fc1, fc2, square = empty(hidden, width), empty(width, hidden), empty(width, width)
    b_hidden, b_width = empty(hidden), empty(width)
    backward = functools.partial(gemm, gelu="backward", pre_activation=h, keep_column_sums=True)
    return {
        "qkv": lambda: gemm(x, [square] * 3, [b_width] * 3),
        "bias, residual": lambda: gemm(x, [square], [b_width], residual=x),
        "gelu": lambda: gemm(x, [fc1], [b_hidden], gelu="forward"),
        "gelu, kept": lambda: gemm(x, [fc1], [b_hidden], gelu="forward", keep_pre_activation=True),
        "fc2, residual": lambda: gemm(h, [fc2], [b_width], residual=x),
        "fc2, fp32 residual": lambda: gemm(h, [fc2], [b_width], residual=empty(tokens, width, dtype=torch.float32)),
        "gelu backward": lambda: backward(x, [fc2.T], [None], keep_activation=True),
        "gelu backward, frozen weight": lambda: backward(x, [fc2.T], [None]),
    }
