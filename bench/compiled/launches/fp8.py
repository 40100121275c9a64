"""Launches of the fp8 GEMMs with their epilogues, and of the quantisation of rows, at the widths of so400m and base."""

import functools
from collections.abc import Callable, Iterator

import torch

from bench.compiled.launch import Launch, with_kernels_for

LEAST_CAPABILITY = (8, 9)
PUBLISHED = "^so400m (46656 |729 fc2$)|^base 1 fc2$"  # every epilogue; split depths

HOPPER_PUBLISHED = "^so400m 46656 "

_WIDTHS = {"so400m": (1152, 4304), "base": (768, 3072)}
_PRODUCTS = ("qkv", "out_proj", "gelu", "fc2")


def launches() -> Iterator[Launch]:
    """A batch of 64 images; then one image and one text."""
    for model, rows, only in (
        ("so400m", 46_656, None),
        ("base", 12_544, None),
        ("so400m", 729, ("gelu", "fc2")),
        ("base", 64, ("gelu", "fc2", "normalise, bound")),
        ("base", 1, ("gelu", "fc2")),
    ):
        for name, call in _layer(*_WIDTHS[model], rows).items():
            if only is None or name in only:
                yield Launch(f"{model} {rows} {name}", call)
    yield Launch("so400m 46656 fc2, fp32 residual", _layer(*_WIDTHS["so400m"], 46_656, torch.float32)["fc2"])


def hopper_launches() -> Iterator[Launch]:
    """The products: every epilogue, then an fp32 residual and one image."""
    for model, rows in (("so400m", 46_656), ("base", 12_544), ("so400m", 729)):
        for name, call in _layer(*_WIDTHS[model], rows).items():
            if name in _PRODUCTS:
                yield Launch(f"{model} {rows} {name}", with_kernels_for("hopper", call))
    fp32_residual = _layer(*_WIDTHS["so400m"], 46_656, torch.float32)["fc2"]
    yield Launch("so400m 46656 fc2, fp32 residual", with_kernels_for("hopper", fp32_residual))


def _layer(
    width: int, hidden: int, rows: int, residual_dtype: torch.dtype = torch.bfloat16
) -> dict[str, Callable[[], object]]:
    """What an encoder layer launches besides attention, by name. Results of products are bf16, or fp8 after GELU."""
    from siglip_kernels.fp8.quantise import quantise_rows
    from siglip_kernels.gemm.kernels import Scales, gemm

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def product(a: torch.Tensor, out: int, to_fp8: bool = False, **epilogue: object) -> None:
        values, weight = (each.to(torch.float8_e4m3fn) for each in (a, empty(out, a.shape[1])))
        row_scales = empty(rows, dtype=torch.float32)
        scales = Scales(row_scales, empty(out, dtype=torch.float32), row_scales if to_fp8 else None)
        dtype = torch.float8_e4m3fn if to_fp8 else residual_dtype
        gemm(values, [weight], [empty(out)], scales=scales, out_dtype=dtype, **epilogue)  # type: ignore[arg-type]

    x, h = empty(rows, width), empty(rows, hidden)
    residual = x.to(residual_dtype)
    norm = (empty(width), empty(width), 1e-6)
    return {
        "normalise": functools.partial(quantise_rows, x, norm),
        "normalise, bound": functools.partial(quantise_rows, x, norm, empty(2, dtype=torch.float32)),
        "quantise": functools.partial(quantise_rows, x),
        "qkv": functools.partial(product, x, 3 * width),
        "out_proj": functools.partial(product, x, width, residual=residual),
        "gelu": functools.partial(product, x, hidden, to_fp8=True, gelu="forward"),
        "fc2": functools.partial(product, h, width, residual=residual),
    }
